"""The command `merge`, which merges LoRAs into one LoRA or into a checkpoint."""

from dataclasses import dataclass

from .. import lora  # Its modules load only when a name is used.
from ..errors import BadConfig, counted
from ..tensor_names import SCHEMES
from .common import checkpoint, print_warning, progress_bar, split_strength
from .new_lora import SCHEMES_HELP, NewLoraOptions, read_source, save
from .options import argument, option
from .values import InputName, InputPath


@dataclass(frozen=True)
class MergeOptions(NewLoraOptions):
    files: list[InputName] = argument("LoRAs with their strengths (default: 1)", "FILE[:STRENGTH]")
    to: str | None = option(f"{SCHEMES_HELP} (default: what most programs load for the model)", choices=SCHEMES)
    rank: int | None = option("Rank of the result (default: the sum of the ranks, which is exact)", "N")
    into: InputPath | None = option(
        "Merge into a copy of this checkpoint instead, and keep its precision", "CHECKPOINT"
    )


def run(options: MergeOptions) -> None:
    named = [split_strength(name) for name in options.files]
    into, progress = options.into and checkpoint(options.into), progress_bar("merging")
    loras = [(read_source(path), strength) for path, strength in named]
    if into is None:
        made = lora.merge_loras(loras, options.rank, options.to, on_progress=progress)
        save(made, options, [source for source, _ in loras] if made.lora.scheme == "diffusers" else [])
        return
    for name, value in (("rank", options.rank), ("to", options.to)):
        if value is not None:
            raise BadConfig(f"--{name} and --into are both given: a checkpoint has no rank, and keeps its names")
    count = lora.merge_into_checkpoint(into, loras, options.output, on_progress=progress, on_warning=print_warning)
    print(f"{options.output}  ({counted(count, 'tensor')} of {into.name} changed)")
