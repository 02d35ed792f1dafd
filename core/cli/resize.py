"""The command `resize`, which reduces the rank of a LoRA."""

from dataclasses import dataclass

from .. import lora  # Its modules load only when a name is used.
from .common import progress_bar
from .new_lora import NewLoraOptions, read_source, save
from .options import argument, option
from .values import InputPath


@dataclass(frozen=True)
class ResizeOptions(NewLoraOptions):
    file: InputPath = argument("LoRA to resize", "IN")
    rank: int | None = option("Largest rank of a module", "N")
    energy: float | None = option("Instead of --rank: fraction of the squared singular values to keep, up to 1", "X")


def run(options: ResizeOptions) -> None:
    read, progress = read_source(options.file), progress_bar("resizing")
    save(lora.resize_lora(read, options.rank, options.energy, on_progress=progress), options)
