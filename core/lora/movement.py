"""How far a LoRA moves the weights of its base model."""

import math
from collections.abc import Callable
from statistics import median
from typing import Any

from ..errors import LoraMisfit
from ..models.base import Base
from ..tensor_names import ModuleId
from .changes import change_norm
from .file import LoraFile
from .kinds import needs_base


def movement_of(lora: LoraFile, base: Base, step: Callable[[], None] = lambda: None) -> dict[str, Any] | None:
    """Return the `median` of |dW| / |W| over the LoRA's layers, and the `largest` one with the name of its `layer`.

    The norms are Frobenius norms, and dW is the change at strength 1. For a LoRA, |s B A|² = s² trace(B^T B A A^T) takes only
    products of r x r. Each weight is read once, and each layer is a `step`. Layers that the base model doesn't have, and those
    whose change depends on the weight (DoRA, OFT), are left out. Returns None if none is left. Raises LoraMisfit for a LoRA of
    another family.
    """
    if lora.family != base.family.name:
        raise LoraMisfit(f"{lora.name}: is for {lora.family}, but {base.name} is {base.family.name}")
    shares: dict[str, float] = {}
    for entry in lora.entries:
        step()
        weights = [_weight_norm(base, module) for module in entry.modules]
        if all(weights) and entry.kind != "bias" and not needs_base(entry.kind, entry.keys):
            shares[entry.name] = change_norm(entry.kind, lora.tensors_of(entry)) / math.hypot(*weights)
    if not shares or not math.isfinite(sum(shares.values())):
        return None
    layer = max(shares, key=lambda name: shares[name])
    return {"median": _rounded(median(shares.values())), "largest": _rounded(shares[layer]), "layer": layer}


def _weight_norm(base: Base, module: ModuleId) -> float:
    """Return the Frobenius norm of the weight of a module; 0 if the base model doesn't have it."""
    part, path = module
    tensors = base.components[part].tensors if part in base.components else {}
    name = f"{path}.weight"
    return tensors[name].float().norm().item() if name in tensors else 0.0


def _rounded(share: float) -> float:
    return float(f"{share:.3g}")
