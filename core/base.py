"""Base models: a checkpoint file, a mapping of tensors, a diffusers folder or a hub id, as parts that load on demand."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import BadFile, UnknownFamily, UnmatchedKeys
from .families import FAMILIES, detect_family
from .families.spec import Component, FamilySpec, LazyTensors, materialise
from .objective import NoiseSchedule
from .safetensors_file import SafetensorsFile, tensor_bytes

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class Base:
    """A base model whose networks are loaded one by one, when they are needed."""

    family: FamilySpec
    name: str
    """File or folder name, without its path."""
    components: Mapping[str, Component]
    """denoiser, vae, text_encoder, ... as the family names them."""
    prediction_type: PredictionType
    zero_terminal_snr: bool
    resolution: int
    """Side of the square at which the model was trained, in pixels."""
    file: SafetensorsFile | None = field(default=None, repr=False)
    """The checkpoint file, when it is one."""
    _digests: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Part -> sha256 over its tensors, of the parts that were asked for."""

    @property
    def latent_size(self) -> int:
        """Pixels along a side of one latent (8 in SD1.x and SDXL)."""
        return 2 ** (len(self.components["vae"].config["block_out_channels"]) - 1)

    @property
    def size_multiple(self) -> int:
        """What a picture's width and height must be multiples of, in pixels, so that every level of the UNet halves."""
        return self.latent_size * 2 ** (len(self.components["denoiser"].config["block_out_channels"]) - 1)

    @property
    def latent_scale(self) -> float:
        """VAE latents times this are what the denoiser works on."""
        return self.components["vae"].config["scaling_factor"]

    def noise_schedule(self) -> NoiseSchedule:
        return NoiseSchedule.scaled_linear(self.prediction_type, self.zero_terminal_snr)

    def load(self, part: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The part's network with frozen weights, in evaluation mode."""
        component = self.components[part]
        with torch.device("meta"):
            module = self.family.build(part, component.config)
        what = f"{self.name}: the {part.replace('_', ' ')}"
        return materialise(module, component.tensors, what, device, dtype)

    def load_text_encoders(self, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
        return {part: self.load(part, device, dtype) for part in self.family.text_encoders}

    def fingerprint(self, *parts: str) -> str:
        """sha256 over the parts' tensors, read once: equal for equal weights, wherever they come from."""
        for part in parts:
            if part not in self._digests:
                self._digests[part] = _digest(part, self.components[part].tensors)
        return hashlib.sha256("".join(self._digests[part] for part in parts).encode()).hexdigest()

    @cached_property
    def sha256(self) -> str | None:
        """sha256 of the checkpoint file (`ss_new_sd_model_hash`); None when the base is no file."""
        return self.file.sha256() if self.file else None

    @cached_property
    def legacy_hash(self) -> str | None:
        """A1111's old hash of the checkpoint file (`ss_sd_model_hash`): 8 hex digits of a sha256 over 64 KiB at 1 MiB."""
        if self.file is None:
            return None
        with self.file.path.open("rb") as file:
            file.seek(0x100000)
            return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]

    def module_shapes(self) -> dict[tuple[str, str], tuple[int, ...]]:
        """(part, module path) -> shape of its weight, for every weight of the denoiser and the text encoders."""
        parts = ("denoiser", *self.family.text_encoders)
        return {
            (part, name.removesuffix(".weight")): tuple(self.components[part].tensors[name].shape)
            for part in parts
            for name in self.components[part].tensors
            if name.endswith(".weight")
        }


def _digest(part: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{part}.{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def load_base(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    *,
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = "auto",
    zero_terminal_snr: bool = False,
) -> Base:
    """A Base from a `.safetensors` checkpoint, a mapping of tensors in its naming, a diffusers folder, or a hub id.

    Only a hub id (`owner/name` that is no local path) lets the network be used. v-prediction and zero terminal SNR are
    recognised by the marker tensors `v_pred` and `ztsnr` and by modelspec metadata; the options override.
    BadFile, UnknownFamily or UnmatchedKeys when it is not a usable base.
    """
    file = None
    if isinstance(source, Mapping):
        name, tensors, metadata = "given tensors", source, {}
    else:
        path = Path(source)
        if path.is_dir():
            return _read_folder(path, prediction_type, zero_terminal_snr)
        if not path.exists() and _is_hub_id(str(source)):
            return _read_folder(_download(str(source)), prediction_type, zero_terminal_snr)
        file = SafetensorsFile.open(path)
        name, tensors, metadata = path.name, file, file.metadata
    try:
        family = detect_family(tensors)
        components = family.split(tensors)
    except (UnknownFamily, UnmatchedKeys) as error:
        raise type(error)(f"{name}: {error}") from None
    marked_v = "v_pred" in tensors or metadata.get("modelspec.prediction_type", "") in ("v", "v_prediction")
    return Base(
        family=family,
        name=name,
        components=components,
        prediction_type=_choose(prediction_type, "v_prediction" if marked_v else "epsilon"),
        zero_terminal_snr=zero_terminal_snr or "ztsnr" in tensors,
        resolution=_side(metadata.get("modelspec.resolution"), family.resolution),
        file=file,
    )


def _choose(wanted: str, found: str) -> PredictionType:
    chosen = found if wanted == "auto" else wanted
    return "v_prediction" if chosen in ("v", "v_prediction") else "epsilon"


def _side(resolution: str | None, default: int) -> int:
    """The side of modelspec's `WIDTHxHEIGHT`; the default when there is none or it makes no sense."""
    sides = (resolution or "").lower().split("x")
    if len(sides) == 2 and all(side.isdecimal() and 8 <= int(side) <= 8192 for side in sides):
        return round((int(sides[0]) * int(sides[1])) ** 0.5)
    return default


def _is_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) == 2 and all(parts) and not source.endswith((".safetensors", ".ckpt", ".pt", ".bin"))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Of these folders only: a repository may hold the same weights again as a single file.
        folders = ("scheduler", *_FOLDERS.values())
        wanted = [f"{folder}/*.{ending}" for folder in folders for ending in ("json", "safetensors")]
        return Path(snapshot_download(hub_id, allow_patterns=["model_index.json", *wanted]))
    except Exception as error:  # the hub client raises many kinds, down to those of its HTTP library
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadFile(f"{hub_id}: no such file or folder, and the hub does not give it: {reason}") from error


_FOLDERS = {"denoiser": "unet", "vae": "vae", "text_encoder": "text_encoder", "text_encoder_2": "text_encoder_2"}


def _read_folder(folder: Path, prediction_type: str, zero_terminal_snr: bool) -> Base:
    """A Base from a folder as diffusers' `save_pretrained` writes it; only safetensors weights are read."""
    class_name = _read_json(folder / "model_index.json").get("_class_name")
    family = next((family for family in FAMILIES.values() if family.pipeline_class == class_name), None)
    if family is None:
        known = ", ".join(family.pipeline_class for family in FAMILIES.values())
        raise UnknownFamily(f"{folder.name}: model_index.json says {class_name}; supported: {known}")
    components = {}
    for part in ("denoiser", "vae", *family.text_encoders):
        subfolder = folder / _FOLDERS[part]
        config = _read_json(subfolder / "config.json")
        components[part] = Component(config, _folder_tensors(subfolder, part))
    config = components["denoiser"].config
    if config.get("in_channels", 4) != 4:
        raise UnknownFamily(
            f"{folder.name}: its denoiser takes {config['in_channels']} channels (inpainting?), which is not supported"
        )
    scheduler_path = folder / "scheduler" / "scheduler_config.json"
    scheduler = _read_json(scheduler_path) if scheduler_path.exists() else {}
    latent_side, vae_levels = config.get("sample_size"), len(components["vae"].config["block_out_channels"])
    components["vae"].config.setdefault("scaling_factor", family.latent_scale)
    return Base(
        family=family,
        name=folder.name,
        components=components,
        prediction_type=_choose(prediction_type, scheduler.get("prediction_type", "epsilon")),
        zero_terminal_snr=zero_terminal_snr or bool(scheduler.get("rescale_betas_zero_snr")),
        resolution=latent_side * 2 ** (vae_levels - 1) if isinstance(latent_side, int) else family.resolution,
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadFile(f"{path.parent.name}: not a whole diffusers folder, {path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise BadFile(f"{path}: cannot be read: {error}") from None


def _folder_tensors(folder: Path, part: str) -> Mapping[str, Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    # Beside the plain weights a folder may hold the same in fp16, or an EMA of them.
    plain = [path for path in paths if not any(f".{word}" in path.name for word in ("fp16", "non_ema", "ema"))] or paths
    if not plain:
        others = ", ".join(path.name for path in folder.glob("*.bin")) or "no weights"
        raise BadFile(
            f"{folder.name}: no .safetensors in it ({others}); pickled weights are not read, convert them first"
        )
    readers: dict[str, Callable[[], Tensor]] = {}
    for path in plain:
        file = SafetensorsFile.open(path)
        for name in file:
            if name.endswith(("position_ids", "logit_scale")):
                continue
            readers[_library_name(name, part)] = partial(file.tensor, name)
    return LazyTensors(readers)


def _library_name(name: str, part: str) -> str:
    """Today's name of a tensor in a diffusers folder, which may have been written by an old or a very new library."""
    if part == "vae" and ".attentions." in name:
        for old, new in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("proj_attn", "to_out.0")):
            name = name.replace(f".{old}.", f".{new}.")
    if part.startswith("text_encoder") and not name.startswith(("text_model.", "text_projection.")):
        name = f"text_model.{name}"
    return name
