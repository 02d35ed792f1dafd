"""What diffusion transformers have in common: weights read off an original checkpoint, latents cut into patches."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import MissingPackage, UnmatchedKeys
from ..storage.lazy import LazyTensors, Stored, shape_of
from ..tensor_names.table import NameTable, Place
from .ldm import kl_pixels, vae_component
from .spec import DENOISER_PREFIX, Component, LatentShape, holds_numbers


def denoiser_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Original name without a prefix -> name in the checkpoint, of the denoiser's tensors."""
    return {name.removeprefix(DENOISER_PREFIX): name for name in tensors if name.startswith(DENOISER_PREFIX)}


def transformer_component(
    tensors: Mapping[str, Tensor],
    config: dict[str, Any],
    keys: NameTable,
    renames: Sequence[tuple[str, str]] = (),
    left_out: str = r"$^",
) -> Component:
    """The denoiser of a checkpoint under diffusers' names: fused layers are split, by the same table as LoRA files.

    `renames` (regular expression of a whole original name -> diffusers name) go before the table; names that match
    `left_out` are no weights of the network.
    """
    names = {short: full for short, full in denoiser_names(tensors).items() if not re.search(left_out, short)}
    readers: dict[str, Callable[[], Tensor]] = {}
    kept: dict[str, Tensor] = {}
    """The weight that was cut last, until its last part is asked for: it may be dequantised, or merged with a LoRA."""

    @cache
    def inputs_of(weight: str) -> int:
        return shape_of(tensors, weight)[1]

    def part_of(full: str, place: Place, weight: str, index: int) -> Tensor:
        whole = kept[full] if full in kept else tensors[full]
        if full == weight:
            kept.clear()
            if index < len(place.modules) - 1:
                kept[full] = whole
        # A bias has as many rows as its weight, whose inputs say how many belong to each part.
        return place.split(whole, None if full == weight else inputs_of(weight))[index][1].contiguous()

    for short, full in names.items():
        renamed = next((re.sub(pattern, new, short) for pattern, new in renames if re.fullmatch(pattern, short)), None)
        if renamed is not None:
            readers[renamed] = Stored(tensors, full)
            continue
        path, _, kind = short.rpartition(".")
        fusion = keys.of_original(path)
        if fusion is None:
            readers[short] = Stored(tensors, full)
        elif len(fusion.parts) == 1 and not fusion.halves_swapped:
            readers[f"{fusion.parts[0]}.{kind}"] = Stored(tensors, full)
        else:
            weight = names[f"{path}.weight"]
            for index, part in enumerate(fusion.parts):
                readers[f"{part}.{kind}"] = partial(part_of, full, Place("denoiser", fusion, None), weight, index)
    return Component(config, LazyTensors(readers))


def shapes_of(tensors: Mapping[str, Tensor]) -> Callable[[str], tuple[int, ...]]:
    """A function: original name of the denoiser's tensor, without a prefix -> shape; UnmatchedKeys where it lacks it."""

    def shape(name: str) -> tuple[int, ...]:
        if DENOISER_PREFIX + name not in tensors:
            raise UnmatchedKeys(f"the denoiser lacks {name}")
        return shape_of(tensors, DENOISER_PREFIX + name)

    return shape


def diffusers_class(name: str, version: tuple[int, int]) -> Any:
    """The class of diffusers. MissingPackage when the installed one is older than the version from which it is of use here."""
    import diffusers

    installed = tuple(int(number) for number in diffusers.__version__.split(".")[:2])
    if installed < version:
        needed = ".".join(map(str, version))
        raise MissingPackage(
            f"{name} is in diffusers {needed} and later, and {diffusers.__version__} is installed: "
            f"pip install 'diffusers>={needed}'"
        )
    return getattr(diffusers, name)


def flux1_vae(tensors: Mapping[str, Tensor]) -> Component:
    """FLUX.1's VAE, which Z-Image has too, of a checkpoint."""
    return vae_component(tensors, latent_scale=0.3611, latent_shift=0.1159, quant_conv=False)


def patch_latent_shape(channels: int, components: Mapping[str, Component]) -> LatentShape:
    """Latents of a KL VAE, of which the denoiser takes two by two as one position."""
    return LatentShape(channels, kl_pixels(components), multiple=2, positions_side=2)


def cut_patches(latents: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H/2 * W/2, 4 C): two by two latents as one position, channel by channel."""
    return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def join_patches(patches: Tensor, height: int, width: int) -> Tensor:
    """(B, H/2 * W/2, 4 C) -> (B, C, H, W): undoes `cut_patches`."""
    return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


def grid_positions(height: int, width: int, device: torch.device) -> Tensor:
    """(height * width, 3) float32: 0, row and column of each position of a picture."""
    return torch.cartesian_prod(*(torch.arange(float(count), device=device) for count in (1, height, width)))


def text_lengths(mask: Tensor) -> list[int]:
    """How many tokens each text of a batch has, from its `context_mask`."""
    return mask.sum(1).int().tolist() if holds_numbers(mask) else [mask.shape[1]] * len(mask)
