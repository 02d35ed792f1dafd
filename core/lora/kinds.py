"""Recognise the kinds of adapters in LoRA files by the roles and shapes of a module's tensors, without torch.

The roles are `down`, `hada_w1_a`, ...: see tensor_names/keys.py. changes.py computes the change of each kind.
"""

import math
from collections.abc import Collection, Mapping

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
    "set": "the new weight of a normalisation layer",
    "bias": "the difference of a bias only",
    "embedding": "the vectors of a new word (textual inversion, arXiv:2208.01618)",
}


LOW_RANK = ("lora", "locon")
"""The kinds whose change is a product of two small matrices."""
BIAS_DIFFERENCES = ("diff_b", "b_norm")
"""The roles of tensors that are the difference of a bias. The module must have a bias."""
BIAS_ROLES = (*BIAS_DIFFERENCES, "bias")
"""The roles of tensors that change a bias, with or without a weight. `bias` is the bias of peft's up matrix."""
_BESIDE = ("alpha", "dora", "reshape_weight", *BIAS_ROLES)
"""The roles of tensors that may be beside those of any kind."""
UNBOUND = 1000.0
"""The alpha of an unbounded rotation. SD.Next and sd-scripts would take 0 for a bound that allows no rotation."""
LARGEST_WEIGHT = 1 << 30
"""The most elements of a weight. No model has a larger layer, but two small tensors can claim a product of any size."""
LARGEST_KERNEL = 256
"""The most positions in a convolution's kernel: 16 x 16, for some patch embeddings."""

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of a module, by its role."""


_FACTORS = {
    **dict.fromkeys(("lora", "locon", "dora"), ("down", "up", "mid")),
    **dict.fromkeys(("oft", "boft"), ("oft_blocks", "rescale")),
    "loha": ("hada_",), "lokr": ("lokr_",), "full": ("diff",), "norm": ("w_norm",), "set": ("set_weight",), "bias": (),
}  # fmt: skip
"""The roles of each kind, or their beginnings, except for the roles in _BESIDE."""


def kind_of(shapes: Shapes) -> str | None:
    """Return the kind of adapter, one of KINDS, of tensors with these roles and shapes; None if they don't form one.

    Two changes of the same module don't form one either.
    """
    kind = _kind_by_roles(shapes)
    if not kind or not all(role in _BESIDE or role.startswith(_FACTORS[kind]) for role in shapes):
        return None
    return kind if _fit_together(kind, shapes) and _fit_beside(kind, shapes) else None


def _kind_by_roles(shapes: Shapes) -> str | None:
    roles = shapes.keys()
    if "down" in roles and "up" in roles:
        if "dora" in roles:
            return "dora"
        kernel = shapes["mid"] if "mid" in roles else shapes["down"]
        return "locon" if math.prod(kernel[2:]) > 1 else "lora"
    if {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"} <= roles:
        return "loha"
    if all(f"lokr_w{n}" in roles or {f"lokr_w{n}_a", f"lokr_w{n}_b"} <= roles for n in "12"):
        return "lokr"
    if "oft_blocks" in roles:
        return "boft" if len(shapes["oft_blocks"]) == 4 else "oft"
    for kind in ("full", "norm", "set"):
        if _FACTORS[kind][0] in roles:
            return kind
    return "bias" if roles and roles <= {*BIAS_DIFFERENCES} else None


def _fit_together(kind: str, shapes: Shapes) -> bool:
    """Check that tensors of these shapes can be multiplied as their kind requires, to a weight of a plausible size."""
    biases = {shapes[role] for role in BIAS_ROLES if role in shapes}
    if math.prod(shapes.get("alpha", ())) != 1 or len(biases) > 1 or any(len(shape) != 1 for shape in biases):
        return False
    if kind in ("oft", "boft"):
        blocks = shapes["oft_blocks"]
        return len(blocks) in (3, 4) and blocks[-1] == blocks[-2] > 0
    if kind in ("full", "norm", "set", "bias"):
        return all(shape and math.prod(shape) > 0 for shape in shapes.values())
    factors = [shape for role, shape in shapes.items() if role not in _BESIDE]
    for shape in factors:
        if len(shape) not in (2, 4) or math.prod(shape) <= 0 or math.prod(shape[2:]) > LARGEST_KERNEL:
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


def _fit_beside(kind: str, shapes: Shapes) -> bool:
    """Check that a bias or magnitude beside the factors has the size of the changed weight, if the factors show it."""
    shape = weight_shape(kind, shapes)
    if shape is None:
        return True
    biases = all(shapes[role] == shape[:1] for role in BIAS_ROLES if role in shapes)
    return biases and ("dora" not in shapes or math.prod(shapes["dora"]) in shape[:2])


def _product(shapes: Shapes, name: str, core_name: str | None) -> tuple[int, ...] | None:
    """Return the shape of a factor that is stored whole, as `a` times `b`, or as both around a core; None if they don't fit."""
    if name in shapes:
        return shapes[name]
    first, second, core = shapes[f"{name}_a"], shapes[f"{name}_b"], shapes.get(core_name or "")
    if len(first) != 2 or len(second) != 2:
        return None
    if core is None:
        return (first[0], second[1]) if first[1] == second[0] else None
    return (first[1], second[1], *core[2:]) if len(core) == 4 and core[:2] == (first[0], second[0]) else None


def needs_base(kind: str, roles: Collection[str]) -> bool:
    """Check whether the change depends on the weight itself: for rotations, new weights, and any kind with a magnitude."""
    return kind in ("oft", "boft", "set") or "dora" in roles


def rank_of(kind: str, shapes: Shapes) -> int | None:
    """Return the rank that alpha is divided by; None for a kind without a rank."""
    if kind in ("lora", "locon", "dora"):
        return shapes["down"][0]
    if kind == "loha":
        return shapes["hada_w1_b"][0]
    if kind == "lokr":
        factors = shapes.get("lokr_w2_b") or shapes.get("lokr_w1_b")
        return factors[0] if factors else None
    return None


def weight_shape(kind: str, shapes: Shapes) -> tuple[int, ...] | None:
    """Return the shape (out, in, ...) of the changed weight; None if unknown. A kernel may be flattened into `in`."""
    if kind in ("lora", "locon", "dora"):
        kernel = shapes["mid"][2:] if "mid" in shapes else shapes["down"][2:]
        return (shapes["up"][0], shapes["down"][1], *kernel)
    if kind == "loha":
        return _product(shapes, "hada_w1", "hada_t1")
    if kind == "lokr":
        first, second = _product(shapes, "lokr_w1", None), _product(shapes, "lokr_w2", "lokr_t2")
        return (first[0] * second[0], first[1] * second[1], *second[2:]) if first and second else None
    return shapes[_FACTORS[kind][0]] if kind in ("full", "norm", "set") else None
