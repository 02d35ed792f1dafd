"""Compute the weight and bias changes of each kind of adapter, from a module's tensors by role."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .kinds import BIAS_DIFFERENCES, needs_base, rank_of


def weight_change(kind: str, tensors: Mapping[str, Tensor], base: Tensor | None = None) -> Tensor:
    """Compute the change that the adapter makes to the weight, float32.

    `base` is the weight itself, required if `needs_base` returns True. The change then has its shape, else that of
    `weight_shape`. Raises ValueError when a required `base` is missing.
    """
    if base is None and needs_base(kind, tensors):
        raise ValueError(f"the change of this {kind} depends on the base weight; pass it as `base`")
    float32 = {role: tensor.float() for role, tensor in tensors.items()}
    if kind in ("oft", "boft"):
        assert base is not None
        return _rotation(float32, base.float())
    change = _additive_change(kind, float32)
    if "dora" not in tensors:
        return change
    assert base is not None
    return _with_magnitude(base.float() + change.reshape(base.shape), float32["dora"]) - base.float()


def bias_change(kind: str, tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Compute the change that the adapter makes to the bias, float32 (out,); None if it makes none."""
    changes = [tensors[role].float() for role in BIAS_DIFFERENCES if role in tensors]
    if "bias" in tensors:
        # With peft's lora_bias, the bias of the up matrix is scaled like the product.
        changes.append(scale_of(kind, tensors) * tensors["bias"].float())
    return torch.stack(changes).sum(0) if changes else None


def _additive_change(kind: str, tensors: Mapping[str, Tensor]) -> Tensor:
    if kind == "loha":
        return _loha(tensors)
    if kind == "lokr":
        return _lokr(tensors)
    if kind == "full":
        return tensors["diff"]
    return tensors["w_norm"] if kind == "norm" else _low_rank(tensors)


def scale_of(kind: str, tensors: Mapping[str, Tensor]) -> float:
    """Return the factor on the product: alpha / rank, or 1 if either is missing."""
    # Without an .alpha key, every program uses alpha = rank. LyCORIS ignores alpha if both LoKr factors are whole.
    rank = rank_of(kind, {role: tuple(tensor.shape) for role, tensor in tensors.items()})
    return tensors["alpha"].item() / rank if rank and "alpha" in tensors else 1.0


def _tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Compute the kernel (out, in, kh, kw) of a core (r, s, kh, kw) with output factors (r, out) and input factors (s, in)."""
    # This order keeps the intermediate result no larger than the inputs or the output.
    if core.shape[1] > inputs.shape[1]:
        return torch.einsum("rikl,ro->oikl", torch.einsum("rskl,si->rikl", core, inputs), outputs)
    return torch.einsum("oskl,si->oikl", torch.einsum("rskl,ro->oskl", core, outputs), inputs)


def _low_rank(t: Mapping[str, Tensor]) -> Tensor:
    down, up = t["down"], t["up"]
    scale = scale_of("lora", t)
    if "mid" in t:
        return scale * _tucker(t["mid"], up.flatten(1).T, down.flatten(1))
    return scale * (up.flatten(1) @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha(t: Mapping[str, Tensor]) -> Tensor:
    scale = scale_of("loha", t)
    if "hada_t1" in t:
        first = _tucker(t["hada_t1"], t["hada_w1_a"], t["hada_w1_b"])
        return scale * first * _tucker(t["hada_t2"], t["hada_w2_a"], t["hada_w2_b"])
    return scale * (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])


def _lokr(t: Mapping[str, Tensor]) -> Tensor:
    first = t["lokr_w1"] if "lokr_w1" in t else t["lokr_w1_a"] @ t["lokr_w1_b"]
    if "lokr_w2" in t:
        second = t["lokr_w2"]
    elif "lokr_t2" in t:
        second = _tucker(t["lokr_t2"], t["lokr_w2_a"], t["lokr_w2_b"])
    else:
        second = t["lokr_w2_a"] @ t["lokr_w2_b"]
    first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
    return scale_of("lokr", t) * torch.kron(first.contiguous(), second.contiguous())  # torch 2.5 takes no other


def _with_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return the weight with its norms replaced by trained magnitudes (DoRA, arXiv:2402.09353)."""
    if magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1]:
        # LyCORIS' first layout, (1, in): one magnitude for each input feature.
        norm = weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    else:
        # peft's (out) and LyCORIS' (out, 1): one magnitude for each output feature.
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    return weight * (magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(torch.float32).eps))


def _rotation(t: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """Compute the change of OFT and BOFT: rotations by the Cayley transform, as in LyCORIS 4.1 and sd-scripts."""
    blocks = t["oft_blocks"]
    skew = blocks - blocks.transpose(-1, -2)
    # Alpha bounds the rotation here instead of scaling it, and is stored per output feature.
    bound = t["alpha"].item() * base.shape[0] if "alpha" in t else 0.0
    if bound > 0 and skew.norm() > bound:
        skew = skew * (bound / skew.norm())
    identity = torch.eye(blocks.shape[-1], device=blocks.device)
    rotations = (identity + skew) @ torch.linalg.inv(identity - skew)
    rotated = base.flatten(1)
    if blocks.ndim == 3:
        count, size, _ = blocks.shape
        rotated = torch.einsum("knm,kni->kmi", rotations, rotated.reshape(count, size, -1)).flatten(0, 1)
    else:
        for level, level_rotations in enumerate(rotations):
            # Butterfly: each level rotates rows together that are further apart.
            stride = 2**level * (blocks.shape[-1] // 2)
            mixed = rotated.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
            mixed = torch.einsum("bij,bjk->bik", level_rotations, mixed.unflatten(0, (-1, blocks.shape[-1])))
            rotated = mixed.flatten(0, 1).unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    rotated = rotated.reshape(base.shape)
    if "rescale" in t:
        rotated = rotated * t["rescale"].reshape(-1, *[1] * (base.ndim - 1))
    return rotated - base
