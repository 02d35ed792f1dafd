"""The command `verify`, which checks a LoRA file for faults."""

from dataclasses import dataclass

from .. import lora  # Its modules load only when a name is used.
from ..errors import one_line
from .common import checkpoint, progress_bar
from .options import Options, argument, option
from .values import InputPath


@dataclass(frozen=True)
class VerifyOptions(Options):
    file: InputPath = argument("LoRA to check", "FILE")
    base: InputPath | None = option("Base model that the LoRA should fit", "CHECKPOINT")


def run(options: VerifyOptions) -> int:
    base = options.base and checkpoint(options.base)
    faults = lora.verify_lora(options.file, base, on_progress=progress_bar("reading"))
    for fault in faults:
        print(f"{'error' if fault.is_error else 'odd'}: {one_line(fault.text)}")
    if not faults:
        print("no faults found")
    return int(any(fault.is_error for fault in faults))
