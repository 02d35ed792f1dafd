"""The command `extract`, which makes a LoRA from the difference between two checkpoints."""

from dataclasses import dataclass

from .. import lora  # Its modules load only when a name is used.
from .common import checkpoint, print_warning, progress_bar
from .new_lora import NewLoraOptions, save
from .options import argument, option
from .values import InputPath


@dataclass(frozen=True)
class ExtractOptions(NewLoraOptions):
    original: InputPath = argument("Original checkpoint", "ORIGINAL")
    tuned: InputPath = argument("Checkpoint that was trained from it", "TUNED")
    rank: int = option("Rank of the LoRA (default: 64)", "N", default=64)


def run(options: ExtractOptions) -> None:
    pair = checkpoint(options.original), checkpoint(options.tuned)
    progress = progress_bar("extracting")
    save(lora.extract_lora(*pair, options.rank, on_progress=progress, on_warning=print_warning), options)
