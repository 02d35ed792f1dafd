"""The kinds of adapters that LoRA files hold, and the change of a weight that each of them means.

The tensors of a module come as a mapping from their roles (`down`, `hada_w1_a`, ...: see tensor_names/keys.py).
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

KINDS = {
    "lora": "LoRA (arXiv:2106.09685)",
    "locon": "LoRA of convolutions (LyCORIS LoCon)",
    "dora": "LoRA with a trained magnitude (arXiv:2402.09353)",
    "loha": "product of two LoRAs, element by element (arXiv:2108.06098)",
    "lokr": "Kronecker product (arXiv:2309.14859)",
    "oft": "rotation of blocks of output rows (arXiv:2306.07280)",
    "boft": "butterfly of rotations (arXiv:2311.06243)",
    "full": "the whole difference of a weight",
    "norm": "the difference of a normalisation layer",
    "bias": "the difference of a bias only",
    "embedding": "the vectors of a new word (textual inversion, arXiv:2208.01618)",
}


BIAS_ROLES = ("diff_b", "b_norm", "bias")
"""The roles of tensors that change a bias, with a weight or alone; `bias` is the bias of the up matrix, which peft has."""
LARGEST_WEIGHT = 1 << 30
"""The most elements of a weight: no model has such a layer, but two small tensors can claim a product of any size."""
LARGEST_KERNEL = 256
"""The most positions of a convolution's kernel, 16 x 16 as of some patch embeddings."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of a module, by its role."""


def kind_of(shapes: Shapes) -> str | None:
    """The kind of adapter, one of KINDS, for tensors with these roles and shapes; None when they do not make one up."""
    kind = _kind_by_roles(shapes)
    return kind if kind is not None and _fit_together(kind, shapes) else None


def _kind_by_roles(shapes: Shapes) -> str | None:
    roles = shapes.keys()
    if "down" in roles and "up" in roles:
        if "dora" in roles:
            return "dora"
        kernel = shapes["mid"] if "mid" in roles else shapes["down"]
        return "locon" if math.prod(kernel[2:]) > 1 else "lora"
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= roles:
        return "loha"
    if ("lokr_w1" in roles or {"lokr_w1_a", "lokr_w1_b"} <= roles) and (
        "lokr_w2" in roles or {"lokr_w2_a", "lokr_w2_b"} <= roles
    ):
        return "lokr"
    if "oft_blocks" in roles:
        return "boft" if len(shapes["oft_blocks"]) == 4 else "oft"
    if "diff" in roles:
        return "full"
    if "w_norm" in roles:
        return "norm"
    return "bias" if roles and roles <= {"diff_b", "b_norm"} else None


def _fit_together(kind: str, shapes: Shapes) -> bool:
    """Whether tensors of these shapes can be multiplied as their kind says, to a weight that a model may have."""
    biases = {shapes[role] for role in BIAS_ROLES if role in shapes}
    if math.prod(shapes.get("alpha", ())) != 1 or len(biases) > 1 or any(len(shape) != 1 for shape in biases):
        return False
    if kind in ("oft", "boft"):
        blocks = shapes["oft_blocks"]
        return len(blocks) in (3, 4) and blocks[-1] == blocks[-2] > 0
    if kind in ("full", "norm", "bias"):
        return all(shape and math.prod(shape) > 0 for shape in shapes.values())
    tensors = {role: shape for role, shape in shapes.items() if role not in ("alpha", "dora", *BIAS_ROLES)}
    is_sensible = all(
        len(shape) in (2, 4) and math.prod(shape) > 0 and math.prod(shape[2:]) <= LARGEST_KERNEL
        for shape in tensors.values()
    )
    if not is_sensible:
        return False
    if kind in ("lora", "locon", "dora"):
        rank = shapes["down"][0]
        fits = shapes["up"][1] == rank and math.prod(shapes["up"][2:]) == 1
        if "mid" in shapes:
            core = shapes["mid"]
            fits = fits and len(core) == 4 and core[:2] == (rank, rank) and math.prod(shapes["down"][2:]) == 1
    elif kind == "loha":
        fits = all(_product(shapes, f"hada_w{n}", f"hada_t{n}") for n in "12")
        fits = fits and _product(shapes, "hada_w1", "hada_t1") == _product(shapes, "hada_w2", "hada_t2")
    else:
        whole = [_product(shapes, f"lokr_w{n}", "lokr_t2" if n == "2" else None) for n in "12"]
        fits = None not in whole
    shape = weight_shape(kind, shapes) if fits else None
    return shape is not None and math.prod(shape) <= LARGEST_WEIGHT


def _product(shapes: Shapes, name: str, core_name: str | None) -> tuple[int, ...] | None:
    """The shape of a factor that is stored whole, as `a` times `b`, or as both around a core; None when they do not fit."""
    if name in shapes:
        return shapes[name]
    first, second, core = shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get(core_name or "")
    if len(first) != 2 or len(second) != 2:
        return None
    if core is None:
        return (first[0], second[1]) if first[1] == second[0] else None
    return (first[1], second[1], *core[2:]) if len(core) == 4 and core[:2] == (first[0], second[0]) else None


def needs_base(kind: str, roles: Collection[str]) -> bool:
    """Whether the change depends on the weight itself, as it does for rotations and for any kind with a magnitude."""
    return kind in ("oft", "boft") or "dora" in roles


def rank_of(kind: str, shapes: Shapes) -> int | None:
    """The rank by which alpha is divided; None for a kind without a rank."""
    if kind in ("lora", "locon", "dora"):
        return shapes["down"][0]
    if kind == "loha":
        return shapes["hada_w1_b"][0]
    if kind == "lokr":
        factors = shapes.get("lokr_w2_b") or shapes.get("lokr_w1_b")
        return factors[0] if factors else None
    return None


def weight_shape(kind: str, shapes: Shapes) -> tuple[int, ...] | None:
    """The shape (out, in, ...) of the changed weight, where a kernel may be flattened into `in`; None if unknown."""
    if kind in ("lora", "locon", "dora"):
        kernel = shapes["mid"][2:] if "mid" in shapes else shapes["down"][2:]
        return (shapes["up"][0], shapes["down"][1], *kernel)
    if kind == "loha":
        return _product(shapes, "hada_w1", "hada_t1")
    if kind == "lokr":
        first, second = _product(shapes, "lokr_w1", None), _product(shapes, "lokr_w2", "lokr_t2")
        return (first[0] * second[0], first[1] * second[1], *second[2:]) if first and second else None
    if kind == "full":
        return shapes["diff"]
    if kind == "norm":
        return shapes["w_norm"]
    return None


def weight_change(kind: str, tensors: Mapping[str, Tensor], base: Tensor | None = None) -> Tensor:
    """The change that the adapter makes to the weight, float32.

    `base` is the weight itself, which is needed where `needs_base` says so: the change then has its shape, else that of
    `weight_shape`. Raises ValueError when `base` is needed and missing.
    """
    if base is None and needs_base(kind, tensors):
        raise ValueError(f"the change that this {kind} makes depends on the base weight: give it")
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
    """The change that the adapter makes to the bias, float32 (out,); None if it makes none."""
    changes = [tensors[role].float() for role in ("diff_b", "b_norm") if role in tensors]
    if "bias" in tensors:
        # peft's lora_bias: the bias of the up matrix is scaled like the product.
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
    """The factor on the product: alpha / rank, where there are both."""
    # Without an .alpha key every program takes alpha = rank. Of a LoKr whose factors are whole, LyCORIS ignores it.
    rank = rank_of(kind, {role: tuple(tensor.shape) for role, tensor in tensors.items()})
    return tensors["alpha"].item() / rank if rank and "alpha" in tensors else 1.0


def _tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """The kernel (out, in, kh, kw) of a core (r, s, kh, kw) with output factors (r, out) and input factors (s, in)."""
    # In this order what is between is no larger than what is given or what comes back.
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
    return scale_of("lokr", t) * torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


def _with_magnitude(weight: Tensor, magnitude: Tensor) -> Tensor:
    """The weight with its norms replaced by trained magnitudes (DoRA, arXiv:2402.09353)."""
    if magnitude.ndim > 1 and magnitude.shape[0] == 1 and magnitude.shape[1] == weight.shape[1]:
        # LyCORIS' first layout, (1, in): one magnitude for each input feature.
        norm = weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))
    else:
        # peft's (out) and LyCORIS' (out, 1): one magnitude for each output feature.
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))
    return weight * (magnitude.reshape(norm.shape) / norm.clamp_min(torch.finfo(torch.float32).eps))


def _rotation(t: Mapping[str, Tensor], base: Tensor) -> Tensor:
    """The change that OFT and BOFT make: rotations by the Cayley transform, as in LyCORIS 4.1 and sd-scripts."""
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
            # A butterfly: level by level, rows that are further apart are rotated together.
            stride = 2**level * (blocks.shape[-1] // 2)
            mixed = rotated.unflatten(0, (-1, 2, stride)).transpose(1, 2).flatten(0, 2)
            mixed = torch.einsum("bij,bjk->bik", level_rotations, mixed.unflatten(0, (-1, blocks.shape[-1])))
            rotated = mixed.flatten(0, 1).unflatten(0, (-1, stride, 2)).transpose(1, 2).flatten(0, 2)
    rotated = rotated.reshape(base.shape)
    if "rescale" in t:
        rotated = rotated * t["rescale"].reshape(-1, *[1] * (base.ndim - 1))
    return rotated - base
