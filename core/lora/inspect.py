"""Inspect a LoRA file: its header, its hashes, and how much each block changes."""

import math
import os
import re
from collections.abc import Callable
from typing import Any

from ..progress import OnProgress, silent, steps
from .file import LoraFile
from .hashes import chunks, file_hashes
from .kinds import needs_base
from .low_rank import change_norm
from .names import Entry
from .report import inspect_header


def inspect_lora(path: str | os.PathLike[str], on_progress: OnProgress = silent) -> dict[str, Any]:
    """Report everything about a LoRA file, as values for JSON: the report of `inspect_header`, `hashes` and `norms`.

    Raises BadFile or UnknownFamily when it is not a LoRA file.
    """
    report = inspect_header(path)
    lora = LoraFile.read(path)
    step = steps(on_progress, chunks(path) + len(lora.entries))
    return report | {"hashes": file_hashes(path, step), "norms": block_norms(lora, step)}


def block_norms(lora: LoraFile, step: Callable[[], None] = lambda: None) -> dict[str, float | None]:
    """Compute the Frobenius norm of each block's weight change, None if it is not finite. DoRA and OFT are left out.

    `step` is called for each module.
    """
    norms: dict[str, float] = {}
    for entry in lora.entries:
        step()
        if entry.kind == "bias" or needs_base(entry.kind, entry.keys):
            continue
        block = _block(entry)
        norms[block] = math.hypot(norms.get(block, 0.0), change_norm(entry.kind, lora.tensors_of(entry)))
    return {
        block: round(norms[block], 6) if math.isfinite(norms[block]) else None
        for block in sorted(norms, key=_by_number)
    }


def _by_number(block: str) -> list[tuple[str, int]]:
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D+)(\d*)", block)]


def _block(entry: Entry) -> str:
    path = entry.modules[0][1]
    match = re.match(r"(?:text_model\.encoder\.)?\w+(?:\.\d+)?", path)
    block = match[0].removeprefix("text_model.encoder.") if match else path
    return block if entry.part == "denoiser" else f"{entry.part}.{block}"
