"""Reduce the ranks of a LoRA. Each module is processed separately; `on_progress(done, total)` is called after each."""

import math
from dataclasses import replace

import torch

from ..errors import BadConfig, UnmatchedKeys
from ..progress import OnProgress, silent
from .file import LoraFile
from .modules import LoraModule, without_tucker
from .new_lora import NewLora, check_rank, copied_metadata


def resize_lora(
    lora: LoraFile,
    rank: int | None = None,
    energy: float | None = None,
    on_progress: OnProgress = silent,
) -> NewLora:
    """Reduce the ranks of a LoRA, with the same names, and return the largest relative error in a module.

    Give one of two limits: `rank`, the largest rank of a module, or `energy` in (0, 1], the share of each module's squared
    singular values to keep. After a QR decomposition of both factors, only a rank x rank matrix needs an SVD. Raises
    BadConfig for other limits, UnmatchedKeys for other kinds of adapters.
    """
    if (rank is None) == (energy is None):
        raise BadConfig("give either a rank or an energy")
    if rank is not None:
        check_rank(rank)
    elif energy is not None and not 0 < energy <= 1:
        raise BadConfig(f"energy must be above 0 and at most 1, not {energy}")
    lora.check()
    if not lora.entries:
        raise UnmatchedKeys(f"{lora.name}: has no modules to resize")
    tensors = {**lora.tensors, **{key: lora.sound_vectors(key) for key in lora.embedding_keys}}
    ranks = set()
    worst = 0.0
    for done, entry in enumerate(lora.entries, 1):
        if entry.kind not in ("lora", "locon") or "bias" in entry.keys:
            what = "has a bias in its up matrix" if "bias" in entry.keys else f"is of kind {entry.kind}"
            raise UnmatchedKeys(f"{lora.name}: {entry.name} {what}; convert it to a plain LoRA first")
        found = lora.sound_tensors_of(entry)
        alpha = found["alpha"].item() if "alpha" in found else float(found["down"].shape[0])
        module = without_tucker(LoraModule(found["down"].float(), found["up"].float(), alpha, found.get("mid")))
        small, error = _resize(module, rank, energy)
        tensors[entry.keys["down"]], tensors[entry.keys["up"]] = small.down, small.up
        tensors.pop(entry.keys.get("mid", ""), None)
        if "alpha" in entry.keys:
            tensors[entry.keys["alpha"]] = torch.tensor(small.alpha)
        ranks.add(small.rank)
        worst = max(worst, error)
        on_progress(done, len(lora.entries))
    size = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    metadata = copied_metadata(lora) | {"ss_network_dim": size, "ss_network_alpha": size}
    return NewLora(replace(lora, tensors=tensors, metadata=metadata), worst)


def _resize(module: LoraModule, rank: int | None, energy: float | None) -> tuple[LoraModule, float]:
    down, up = module.down, module.up
    left_basis, left_core = torch.linalg.qr(up.flatten(1))
    right_basis, right_core = torch.linalg.qr(down.flatten(1).T)
    left, values, right = torch.linalg.svd(module.scale * (left_core @ right_core.T), full_matrices=False)
    kept = values.double().square().cumsum(0)
    total = kept[-1].item()
    if rank is not None:
        size = min(rank, len(values))
    else:
        assert energy is not None
        size = min(int((kept < energy * total).sum()) + 1, len(values))
    roots = values[:size].sqrt()
    small_down = (roots[:, None] * (right[:size] @ right_basis.T)).reshape(size, *down.shape[1:])
    small_up = (left_basis @ left[:, :size] * roots).reshape(up.shape[0], size, *up.shape[2:])
    error = math.sqrt(max(1 - kept[size - 1].item() / total, 0.0)) if total else 0.0
    # alpha = rank, because the singular values already include the scale. Both factors get an equal share of them.
    return LoraModule(small_down, small_up, float(size)), error
