"""Code shared by diffusion transformers: weights from an original checkpoint, and latents cut into patches."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import MissingPackage, UnmatchedKeys
from ..storage.stored import LazyTensors, QuantisedTensor, Stored, stored_under
from ..tensor_names.table import NameTable, Place
from . import text
from .ldm import kl_pixels, shapes_in, vae_component
from .packages import import_diffusers
from .spec import DENOISER_PREFIX, Component, Conditioning, LatentShape

Names = Collection[str]
"""The original names of a denoiser's tensors, without their prefix in a checkpoint."""
Shapes = Callable[..., tuple[int, ...]]
"""A function that looks up the shape of such a tensor, see `ldm.shapes_in`."""


def splitter(
    config_of: Callable[[Names, Shapes], dict[str, Any]],
    keys: NameTable,
    kinds: Mapping[str, str],
    vae: Callable[[Mapping[str, Tensor]], Component],
    renames: Sequence[tuple[str, str]] = (),
    left_out: str = r"$^",
) -> Callable[[Mapping[str, Tensor]], dict[str, Component]]:
    """Return a family's `split`. `config_of` makes the denoiser's config, and `vae` the VAE from its tensors.

    `kinds` has text encoders by part. The others are as in `transformer_component`.
    """

    def split(tensors: Mapping[str, Tensor]) -> dict[str, Component]:
        config = config_of(stored_under(tensors, DENOISER_PREFIX).keys(), shapes_of(tensors))
        denoiser = transformer_component(tensors, config, keys, renames, left_out)
        return {"denoiser": denoiser} | text.other_parts(tensors, vae, kinds)

    return split


def transformer_component(
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    keys: NameTable,
    renames: Sequence[tuple[str, str]] = (),
    left_out: str = r"$^",
) -> Component:
    """Return a checkpoint's denoiser under diffusers' names. Fused layers are split by the table that LoRA files use too.

    `renames` are pairs of a regular expression for a whole original name and the diffusers name. They take precedence over the
    table. Names that match `left_out` are skipped.
    """
    stored = {
        name: read for name, read in stored_under(tensors, DENOISER_PREFIX).items() if not re.search(left_out, name)
    }
    readers: dict[str, Callable[[], Tensor]] = {}
    kept: dict[str, Tensor] = {}
    shape = shapes_of(tensors)

    @cache
    def inputs_of(path: str) -> int:
        return shape(f"{path}.weight")[1]

    for short, read in stored.items():
        renamed = next((re.sub(pattern, new, short) for pattern, new in renames if re.fullmatch(pattern, short)), None)
        if renamed is not None:
            readers[renamed] = read
            continue
        path, _, kind = short.rpartition(".")
        fusion = keys.of_original(path)
        if kind == "scale" and (norm := fusion or keys.of_original(short)):  # the weight of a norm
            fusion, kind = norm, "weight"
        if fusion and len(fusion.parts) == 1 and not fusion.halves_swapped:
            readers[f"{fusion.parts[0]}.{kind}"] = read
        elif fusion is None or kind not in ("weight", "bias") or f"{path}.weight" not in stored:
            readers[short] = read  # Loading the network reports a tensor that it does not have.
        else:
            for index, part in enumerate(fusion.parts):
                place = Place("denoiser", fusion, None)
                readers[f"{part}.{kind}"] = _Rows(tensors, read.name, place, index, partial(inputs_of, path), kept)
    return Component(config, LazyTensors(readers))


@dataclass(frozen=True, eq=False)
class _Rows(Stored):
    """A reader of the rows of a fused weight or bias that belong to one module."""

    place: Place
    index: int
    inputs: Callable[[], int]
    """Returns the weight's number of inputs, which the rows of its bias are split by too."""
    kept: dict[str, Tensor]
    """The fused weight that was split last, kept until its last part is read, since dequantising or merging it is slow."""

    def __call__(self) -> Tensor:
        whole = self.kept[self.name] if self.name in self.kept else self.tensors[self.name]
        if whole.ndim > 1:
            self.kept.clear()
            if self.index < len(self.place.modules) - 1:
                self.kept[self.name] = whole
        return self._cut(whole)

    def layout(self) -> tuple[torch.dtype, tuple[int, ...]]:
        dtype, shape = super().layout()
        return dtype, (self._rows(shape)[self.index], *shape[1:])

    def quantised(self, read: bool = True) -> QuantisedTensor | None:
        whole = super().quantised(read)
        return whole and whole.cut(self._cut)

    def _cut(self, whole: Tensor) -> Tensor:
        self._rows(whole.shape)
        return self.place.split(whole, self.inputs())[self.index][1].contiguous()

    def _rows(self, shape: Sequence[int]) -> list[int]:
        """Return the number of rows of each module. Raises UnmatchedKeys when a tensor of this shape doesn't have them."""
        try:
            return self.place.rows(shape[0], self.inputs())
        except (IndexError, ValueError):
            raise UnmatchedKeys(f"{self.name} has shape {list(shape)}, which does not fit its modules") from None


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Return the function that looks up the shape of a denoiser's tensor in a checkpoint."""
    return shapes_in(LazyTensors(stored_under(tensors, DENOISER_PREFIX)), "the denoiser")


def build(name: str, version: tuple[int, int], config: dict[str, Any]) -> Any:
    """Build a diffusers network without weights, by the name of its class.

    Raises MissingPackage when the installed diffusers is older than the given version.
    """
    diffusers = import_diffusers()
    installed = tuple(int(number) for number in diffusers.__version__.split(".")[:2])
    if installed < version:
        needed = ".".join(map(str, version))
        raise MissingPackage(
            f"{name} needs diffusers {needed} or later, but {diffusers.__version__} is installed. Run: "
            f"pip install 'diffusers>={needed}'"
        )
    network = getattr(diffusers, name).from_config(config)
    for path, module in list(network.named_modules()):
        if type(module) is diffusers.models.normalization.RMSNorm and module.weight is not None and module.bias is None:
            norm = RmsNorm(list(module.dim), module.eps)
            norm.weight = module.weight
            network.set_submodule(path, norm)
    return network


class RmsNorm(nn.RMSNorm):
    """diffusers' RMSNorm, using torch's own function, which is one kernel on a GPU (from torch 2.9 on)."""

    def forward(self, x: Tensor) -> Tensor:
        x, kind = x.to(self.weight.dtype), x.device.type
        if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):
            return super().forward(x)
        with torch.autocast(kind, enabled=False):  # autocast would return float32
            return super().forward(x)


def activate_once(denoiser: Any, embedding: str = "time_text_embed") -> None:
    """Activate (SiLU) the time embedding of a diffusers network once for all blocks, instead of in each block."""
    denoiser.get_submodule(embedding).register_forward_hook(lambda _, __, embedded: F.silu(embedded))
    for path, module in list(denoiser.named_modules()):
        if isinstance(module, nn.SiLU) and not path.startswith(f"{embedding}."):
            denoiser.set_submodule(path, nn.Identity())
        elif type(module).__name__ in ("AdaLayerNormZero", "AdaLayerNormZeroSingle"):
            denoiser.set_submodule(path, _ModulatedNorm(module))


class _ModulatedNorm(nn.Module):
    """diffusers' AdaLayerNormZero, for a time embedding that is activated already."""

    def __init__(self, replaced: Any):
        super().__init__()
        self.linear: nn.Linear = replaced.linear
        self.norm: nn.LayerNorm = replaced.norm

    def forward(self, x: Tensor, emb: Tensor) -> tuple[Tensor, ...]:
        """Return x (B, L, D) normed, scaled and shifted by the layer's output for `emb` (B, D'), and the gates (B, D)."""
        made = self.linear(emb)
        shift, scale, *gates = made.chunk(made.shape[-1] // x.shape[-1], 1)
        norm = self.norm
        if len(x) == 1:  # a single kernel, and one for its backward pass
            return F.layer_norm(x, norm.normalized_shape, 1 + scale.squeeze(0), shift.squeeze(0), norm.eps), *gates
        return torch.addcmul(shift[:, None], norm(x), 1 + scale[:, None]), *gates


def through_blocks(denoiser: Any, blocks: Any, states: Tensor, *inputs: Any) -> Tensor:
    """Compute a diffusers network's blocks one after another, and again in the backward pass if its memory plan says so."""
    recomputes = torch.is_grad_enabled() and denoiser.gradient_checkpointing
    for block in blocks:
        states = denoiser._gradient_checkpointing_func(block, states, *inputs) if recomputes else block(states, *inputs)
    return states


def flux1_vae(tensors: Mapping[str, Tensor]) -> Component:
    """Return the VAE of FLUX.1 in a file, which Chroma and Z-Image use too."""
    return vae_component(tensors, latent_scale=0.3611, latent_shift=0.1159, quant_conv=False)


def patch_latent_shape(components: Mapping[str, Component], patched: bool = False) -> LatentShape:
    """Return the shape of a KL VAE's latents for a denoiser that takes two by two of them as one position.

    `patched` is whether the channels in the denoiser's config are those of a position, four times those of a latent.
    """
    channels = components["denoiser"].config["in_channels"] // (4 if patched else 1)
    return LatentShape(channels, kl_pixels(components), multiple=2, positions_side=2)


def targets(attention: str, transformer: str) -> dict[str, str]:
    """Return the `denoiser_targets` of a family whose denoiser has no convolutions to adapt."""
    return {"attention": attention, "transformer": transformer, "transformer+conv": transformer}


def predicted(
    denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, **more: Any
) -> Tensor:
    """Predict with a diffusers network that takes two by two latents as one position. `more` are its other arguments."""
    patches = F.pixel_unshuffle(latents, 2)  # (B, 4 C, H/2, W/2)
    positions = denoiser(
        patches.flatten(2).transpose(1, 2),
        encoder_hidden_states=conditioning["context"].to(latents.dtype),
        timestep=timesteps / 1000,
        return_dict=False,
        **more,
    )[0]
    return F.pixel_shuffle(positions.transpose(1, 2).unflatten(2, patches.shape[2:]), 2)


def patch_positions(latents: Tensor) -> Tensor:
    """Return the coordinates of each two by two latents, as `grid_positions` does."""
    return grid_positions(latents.shape[2] // 2, latents.shape[3] // 2, latents.device)


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """Return the coordinates of each position of a picture, (height * width, 3) float32: 0, its row and its column."""
    return torch.cartesian_prod(*(torch.arange(float(count), device=device) for count in (1, height, width)))


_Predict = Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]


def without_padding(predict: _Predict) -> _Predict:
    """Remove the padding of texts before a family predicts. Items whose texts differ in length are predicted one by one."""

    def cut(conditioning: Conditioning, items: slice, length: int) -> Conditioning:
        return {
            name: value[items, :length] if name in ("context", "context_mask") else value[items]
            for name, value in conditioning.items()
        }

    @wraps(predict)
    def predict_all(
        denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning
    ) -> Tensor:
        lengths = text_lengths(conditioning["context_mask"])
        if len(set(lengths)) == 1:
            return predict(denoiser, noisy_latents, timesteps, cut(conditioning, slice(None), lengths[0]))
        rows = [cut(conditioning, slice(i, i + 1), length) for i, length in enumerate(lengths)]
        parts = zip(noisy_latents.split(1), timesteps.split(1), rows, strict=True)
        return torch.cat([predict(denoiser, *part) for part in parts])

    return predict_all


def text_lengths(mask: Tensor) -> list[int]:
    """Return the number of tokens of each text in a batch, from its `context_mask` (B, L)."""
    return mask.sum(1).int().tolist()
