"""Random base models in the original checkpoint naming, small or of full size, and what tests do with them."""

import gc
import hashlib
import importlib
import json
import math
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from core.cli.command import command_parser, options_type
from core.cli.options import filled
from core.config import TrainConfig
from core.demo.people import person_photos
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.models.base import Base
from core.models.families import FAMILIES
from core.models.ldm import ldm_vae_path
from core.models.memory_plan import MemoryPlan
from core.models.spec import DENOISER_PREFIX, Component
from core.models.text import PREFIX
from core.pictures.sampling import encode_prompts
from core.storage.locks import locked
from core.storage.safetensors_file import Layout, SafetensorsFile, save_safetensors, write_safetensors
from core.tensor_names.unet import ldm_unet_path
from core.training.callbacks import Callbacks, StepReport
from core.training.encode import EncodedImage, LatentCache
from core.training.inputs import TrainingInputs
from core.training.loop import train_lora
from core.training.step import Run
from tests.small_flows import SMALL_FLOWS, flow_base


def collect_garbage_seldom() -> None:
    """Python looks for what can be freed less often, and not among imported modules: a fifth of the time of the tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@dataclass(frozen=True)
class Shape:
    """The configs of a base model's networks; those of full size are the published models' own."""

    family: str
    unet: dict[str, Any]
    vae_widths: tuple[int, ...]
    vae_layers: int
    text: dict[str, dict[str, Any]]


def _text_config(width: int, layers: int, activation: str, projection: int | None = None) -> dict[str, Any]:
    return {
        "vocab_size": 49408,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "max_position_embeddings": 77,
        "hidden_act": activation,
        "projection_dim": projection or width,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }


def _unet_config(
    widths: tuple[int, ...], depths: tuple[int, ...], layers: int, context: int, pooled: int | None = None
) -> dict[str, Any]:
    """`depths` are the transformer blocks of each level, 0 for none; `pooled` is the pooled text's width in SDXL."""
    config: dict[str, Any] = {
        "block_out_channels": widths,
        "layers_per_block": layers,
        "down_block_types": tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths),
        "up_block_types": tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)),
        "cross_attention_dim": context,
        "attention_head_dim": 8,
    }
    if pooled is not None:
        config |= {
            "transformer_layers_per_block": tuple(max(depth, 1) for depth in depths),
            "attention_head_dim": tuple(width // 64 for width in widths),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": pooled + 6 * 256,
        }
    return config


SMALL_SD15 = Shape(
    "sd15", _unet_config((32, 64), (1, 0), 1, 64), (32, 32), 1, {"text_encoder": _text_config(64, 2, "quick_gelu")}
)
SMALL_SDXL = Shape(
    "sdxl",
    _unet_config((64, 64, 128), (0, 1, 2), 2, 64 + 128, pooled=128),
    (32, 32),
    1,
    {"text_encoder": _text_config(64, 2, "quick_gelu"), "text_encoder_2": _text_config(128, 3, "gelu", 128)},
)
FULL_SD15 = Shape(
    "sd15",
    _unet_config((320, 640, 1280, 1280), (1, 1, 1, 0), 2, 768),
    (128, 256, 512, 512),
    2,
    {"text_encoder": _text_config(768, 12, "quick_gelu")},
)
FULL_SDXL = Shape(
    "sdxl",
    _unet_config((320, 640, 1280), (0, 2, 10), 2, 2048, pooled=1280),
    (128, 256, 512, 512),
    2,
    {"text_encoder": _text_config(768, 12, "quick_gelu"), "text_encoder_2": _text_config(1280, 32, "gelu", 1280)},
)


UNETS = ("sd15", "sdxl")
"""Families whose denoiser is a UNet."""


def command_options(name: str, *words: str) -> Any:
    """What a command's `run` is given for these words."""
    return filled(options_type(name), command_parser(name).read(words))


def mostly_slow(values: Iterable[str], *fast: str) -> list[Any]:
    """Parameters of a test of which a few show it in every run of the tests, and the others in a full one."""
    values = list(values)
    assert set(fast) <= set(values)
    return [value if value in fast else pytest.param(value, marks=pytest.mark.slow) for value in values]


def configs(shape: Shape) -> dict[str, dict[str, Any]]:
    """Part -> config, as diffusers and transformers want it."""
    levels = len(shape.vae_widths)
    vae = {
        "block_out_channels": shape.vae_widths,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": shape.vae_layers,
        "latent_channels": 4,
        "scaling_factor": {"sd15": 0.18215, "sdxl": 0.13025}[shape.family],
    }
    return {"denoiser": shape.unet, "vae": vae, **shape.text}


def original_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Original name -> shape of every tensor of a checkpoint."""
    result: dict[str, tuple[int, ...]] = {}
    attention_depths = [kind.startswith("CrossAttn") for kind in shape.unet["up_block_types"]]
    for part, config in configs(shape).items():
        with torch.device("meta"):
            state = FAMILIES[shape.family].build(part, config).state_dict()
        for name, tensor in state.items():
            size = tuple(tensor.shape)
            if part == "denoiser":
                path = ldm_unet_path(name, shape.unet["layers_per_block"], attention_depths.__getitem__)
                result["model.diffusion_model." + path] = size
            elif part == "vae":
                path = ldm_vae_path(name, len(shape.vae_widths))
                attention_matrix = ".attn_1." in path and len(size) == 2
                result["first_stage_model." + path] = (*size, 1, 1) if attention_matrix else size
            elif part == "text_encoder":
                prefix = "cond_stage_model." if shape.family == "sd15" else "conditioner.embedders.0."
                result[f"{prefix}transformer.{name}"] = size
            else:
                result |= _openclip_shapes(name, size)
    return result


_OPENCLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def _openclip_shapes(name: str, size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    prefix = "conditioner.embedders.1.model."
    if name in _OPENCLIP:
        return {prefix + _OPENCLIP[name]: size[::-1] if name.startswith("text_projection") else size}
    match = re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    assert match, name
    layer = f"{prefix}transformer.resblocks.{match[1]}."
    if match[2] in ("self_attn.k_proj", "self_attn.v_proj"):
        return {}
    if match[2] == "self_attn.q_proj":
        return {f"{layer}attn.in_proj_{match[3]}": (3 * size[0], *size[1:])}
    return {f"{layer}{_OPENCLIP_LAYER[match[2]]}.{match[3]}": size}


class RandomTensors:
    """Weights that keep activations in range, drawn by name, so that they need not be in memory together."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int):
        self.layout: Layout = {name: (dtype, size) for name, size in shapes.items()}
        self._pool = torch.randn(1_000_003, generator=torch.Generator().manual_seed(seed))

    def __call__(self, name: str) -> Tensor:
        dtype, size = self.layout[name]
        if re.search(r"(norm\d?|norm_\w+|ln_\w+|(in|out)_layers\.0|\bout\.0|layer_norm\d)\.weight$|running_var$", name):
            return torch.ones(size, dtype=dtype)
        count = math.prod(size)
        # Every tensor starts elsewhere in the same million numbers: billions of new ones would take minutes.
        start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % len(self._pool)
        deviation = 0.02 if len(size) < 2 or "embedding" in name else 0.7 / math.sqrt(math.prod(size[1:]))
        pool = self._pool.repeat(repeats) if (repeats := -(-(start + count) // len(self._pool))) > 1 else self._pool
        return (pool[start : start + count] * deviation).to(dtype).reshape(size)


def write_checkpoint(
    path: Path,
    shape: Shape,
    dtype: torch.dtype = torch.float16,
    seed: int = 1,
    metadata: dict[str, str] | None = None,
    without: str = "",
    extra: dict[str, Tensor] | None = None,
) -> Path:
    """A checkpoint file with random weights: tensors whose name contains `without` left out, `extra` ones added."""
    shapes = {name: size for name, size in original_shapes(shape).items() if not without or without not in name}
    draw, extra = RandomTensors(shapes, dtype, seed), extra or {}
    layout = {**draw.layout, **{name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in extra.items()}}
    write_safetensors(path, layout, lambda name: extra[name] if name in extra else draw(name), metadata)
    return path


def write_in_16_bits(source: Path, path: Path) -> Path:
    """A copy of a model's file in float16."""
    file = SafetensorsFile.open(source)
    save_safetensors(path, {name: file[name].half() for name in file}, file.metadata)
    return path


def predict_by(monkeypatch: pytest.MonkeyPatch, predicted: Callable[[MemoryPlan], int]) -> None:
    """Has the function say how many bytes a training run needs under a plan."""
    monkeypatch.setattr(
        "core.training.memory_prediction.StepPrediction", lambda *_: types.SimpleNamespace(bytes=predicted)
    )


def nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every plan need more than a limit of 1 GiB."""
    predict_by(monkeypatch, lambda _: 2**31)


def small_flow_base(name: str, **denoiser: Any) -> Base:
    """A Base of the family with random weights in memory, whose captions are encoded into random numbers.

    `denoiser` are settings of its config that are to be others.
    """
    family, small = FAMILIES[name], SMALL_FLOWS[name]
    components = {}
    for part, config in (("denoiser", {**small.denoiser, **denoiser}), ("vae", small.vae)):
        state = family.build_empty(part, config).state_dict()
        draw = RandomTensors({name: tuple(tensor.shape) for name, tensor in state.items()}, torch.float32, seed=1)
        components[part] = Component(config, {name: draw(name) for name in state})
    return flow_base(name, small, components)


def random_lora(base: Base, pattern: str = ".*", scheme: str = "diffusers", seed: int = 1) -> LoraFile:
    """A random LoRA on the linear layers and convolutions of the denoiser whose path matches, with an alpha of its own."""

    def draw(number: int, *shape: int) -> Tensor:
        return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + number))

    modules = {
        (part, path): LoraModule(draw(0, 3, *shape[1:]), draw(1, shape[0], 3, *[1] * (len(shape) - 2)), alpha=2.0)
        for (part, path), shape in base.module_shapes().items()
        if part == "denoiser" and len(shape) in (2, 4) and re.fullmatch(pattern, path)
    }
    claims = {"ss_base_model_version": base.family.base_model_version}  # small sizes do not tell Z-Image from Lumina 2
    return LoraFile.from_modules(base.family.name, modules, claims, scheme, base.names)


def write_photos(folder: Path, count: int = 4, scale: int = 1, person: int = 35) -> Path:
    """A folder with real photos of one person of the AT&T/ORL set (92x112 pixels times `scale`), one with a caption."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, photo in enumerate(person_photos(person)[:count]):
        size = (photo.width * scale, photo.height * scale)
        photo.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(folder / f"{index}.png")
    (folder / "0.txt").write_text("a photo of sks person, facing the camera")
    return folder


def write_quick_pack(folder: Path) -> Path:
    """A folder with the style pack `quick`, whose only style takes one step a picture."""
    prompts = {"tags": {"prompt": "{framing} photo of {subject}", "steps": 1, "guidance": 1}}
    style = {"name": "Plain", "category": "Quick", "framing": "close-up", "aspect": "4:5", "prompts": prompts}
    pack = {"id": "quick", "title": "Quick", "version": "1", "licence": "none", "styles": [style]}
    folder.mkdir()
    (folder / "quick.json").write_text(json.dumps(pack))
    return folder


@cache
def nodes_module(name: str, package: str = "nodes.comfyui") -> types.ModuleType:
    """A module of nodes/, imported without the package's own `__init__`, which needs ComfyUI."""
    root = Path(__file__).parents[1]
    for package_name, folder in (
        ("pack", root),
        ("pack.nodes", root / "nodes"),
        ("pack.nodes.comfyui", root / "nodes/comfyui"),
    ):
        made = types.ModuleType(package_name)
        made.__path__ = [str(folder)]
        sys.modules[package_name] = made
    return importlib.import_module(f"pack.{package}.{name}")


def whole_checkpoint(denoiser: Mapping[str, Tensor], kind: str, encoder: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a denoiser under original names and of a text encoder of that kind, as ComfyUI saves them in one file."""
    prefix = PREFIX.format(kind)
    return {f"{DENOISER_PREFIX}{name}": tensor for name, tensor in denoiser.items()} | {
        f"{prefix}{name}": tensor for name, tensor in encoder.items()
    }


@torch.no_grad()
def caption_states(base: Base, captions: Sequence[str]) -> list[Tensor]:
    """The states (L, D) of each caption by the base's own text encoders, float32, without what follows them in a batch."""
    made = base.family.encode_text(base.load_text_encoders(torch.device("cpu"), torch.float32), captions, 1, 1)
    lengths = made["context_mask"].sum(1).int().tolist()
    assert all(mask[:length].all() for mask, length in zip(made["context_mask"], lengths, strict=True))
    return [states[:length] for states, length in zip(made["context"], lengths, strict=True)]


def encoded_image(
    base: Base,
    name: str,
    caption: str,
    seed: int,
    is_class: bool = False,
    shape: tuple[int, int, int] = (4, 16, 16),
    **changes: Any,
) -> EncodedImage:
    """A training picture of latents of that shape, random but reproducible."""
    generator = torch.Generator().manual_seed(seed)
    image = EncodedImage(
        name=name,
        mean=torch.randn(shape, generator=generator),
        deviation=0.1 * torch.rand(shape, generator=generator),
        mask=None,
        conditioning=base.family.image_conditioning((90, 110), (0, 3), (32, 32)),
        caption=caption,
        class_caption="a photo of person",
        repeats=1,
        is_class=is_class,
    )
    return replace(image, **changes)


def started_run(cache: LatentCache, base: Base, config: TrainConfig) -> Run:
    """A run whose adapter already changes something, as in the middle of a training."""
    run = Run(TrainingInputs.on(torch.device("cpu"), cache, base, config))
    generator = torch.Generator().manual_seed(9)
    for name, parameter in run.parameters.items():
        if name.endswith(".up"):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return run


def assert_trained_alike(trained: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Equal but for rounding, each tensor as a whole: Adam makes much of a gradient's rounding where it is near zero.

    (Weights that only lie at other addresses round otherwise on some processors.)
    """
    assert trained.keys() == expected.keys() and expected
    for name, tensor in expected.items():
        assert (trained[name].detach() - tensor.detach()).norm() <= 1e-3 * tensor.norm(), name


def encoded_cache(base: Base, images: Sequence[EncodedImage]) -> LatentCache:
    """The images with the conditioning of their captions, made by the base's own text encoders."""
    encoders = base.load_text_encoders(torch.device("cpu"), torch.float32)
    captions = {"", *(image.caption for image in images), *(image.class_caption for image in images)}
    text = {caption: encode_prompts(base, encoders, [caption])[0] for caption in sorted(captions)}
    return LatentCache(tuple(images), text, 1, "digest")


def save_mean_colour(path: Path, size: int = 112) -> None:
    """An ONNX file that takes (1, 3, size, size) and gives each face's mean colour: a network in ArcFace's form."""
    import onnx
    from onnx import TensorProto, helper

    picture = helper.make_tensor_value_info("picture", TensorProto.FLOAT, [1, 3, size, size])
    result = helper.make_tensor_value_info("result", TensorProto.FLOAT, [1, 3, 1, 1])
    node = helper.make_node("GlobalAveragePool", ["picture"], ["result"])
    opset = helper.make_opsetid("", 17)
    graph = helper.make_graph([node], "mean", [picture], [result])
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), path)


def assert_goes_on_exactly(cache: LatentCache, base: Base, config: TrainConfig, folder: Path) -> None:
    """A training run that is cancelled after its second step goes on to the tensors of one that isn't."""

    def cancel(report: StepReport) -> None:
        if report.step == 2:
            raise KeyboardInterrupt

    run, state = partial(train_lora, cache, base, config, device=torch.device("cpu")), folder / "run.state.safetensors"
    whole = run()
    with pytest.raises(KeyboardInterrupt):
        run(state_path=state, callbacks=Callbacks(on_step=cancel))
    steps: list[int] = []
    resumed = run(state_path=state, resume=True, callbacks=Callbacks(on_step=lambda report: steps.append(report.step)))
    assert steps == [*range(3, config.steps + 1)] and whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())


def cache_of(base: Base, count: int = 1, side: int = 16) -> LatentCache:
    """So many pictures of random latents of that side, all with one caption."""
    shape = (base.latent_shape.channels, side, side)
    images = [encoded_image(base, f"{n}.png", "a photo of sks person", n, shape=shape) for n in range(1, count + 1)]
    return encoded_cache(base, images)


@contextmanager
def held_elsewhere(path: Path) -> Iterator[None]:
    """Within it another thread holds the lock of the path, as another run would."""
    context = locked(path)
    with ThreadPoolExecutor(1) as another:
        another.submit(context.__enter__).result()
        try:
            yield
        finally:
            another.submit(context.__exit__, None, None, None).result()


def write_gguf(path: Path, tensors: Mapping[str, tuple[torch.Tensor, Any]], architecture: str = "flux") -> Path:
    """Writes a GGUF file as ComfyUI-GGUF has them: the tensors by name, each in the quantisation of gguf that is with it."""
    import gguf

    writer = gguf.GGUFWriter(str(path), architecture)
    for name, (tensor, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
