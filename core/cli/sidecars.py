"""The command `sidecars`, which writes files beside a LoRA that tell other programs its words and picture."""

from dataclasses import dataclass

from .. import lora  # Its modules load only when a name is used.
from .common import progress_bar
from .options import Options, argument, option
from .values import InputPath


@dataclass(frozen=True)
class SidecarsOptions(Options):
    file: InputPath = argument(
        "LoRA. Existing files beside it stay, except unedited ones that this command wrote", "FILE"
    )
    picture: InputPath | None = option(
        "Also write a copy as NAME.png and NAME.preview.png. It shows the person: use it only if they agree", "PICTURE"
    )


def run(options: SidecarsOptions) -> None:
    written = lora.write_sidecars(options.file, options.picture, on_progress=progress_bar("hashing"))
    print("\n".join(map(str, written)) or f"all files already exist beside {options.file}")
