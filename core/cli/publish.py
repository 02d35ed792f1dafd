"""The command `publish`, which makes a folder to upload, without personal data."""

from dataclasses import dataclass
from typing import ClassVar

from .. import pictures  # Its modules load only when a name is used.
from .common import print_warning, print_whether_signed, progress_bar
from .options import Options, argument, option
from .values import Folder, InputPath, Text


@dataclass(frozen=True)
class PublishOptions(Options):
    epilog: ClassVar[str | None] = (
        "Since May 2025, Civitai does not accept models of real people, even if they agree. "
        "Read the rules of the site first."
    )
    file: InputPath = argument("LoRA to publish. The file stays unchanged", "LORA")
    output: Folder = option("Folder to make")
    pictures: list[InputPath] = option(
        "Example pictures. Their metadata is removed, except for how they were drawn", "FILE|FOLDER", nargs="+"
    )
    title: Text | None = option("Title, which also names the files (default: the one in the LoRA's metadata)", "TEXT")
    description: Text | None = option("Description (default: the one in the LoRA's metadata)", "TEXT")
    agreed: bool = option("Confirm that the person shown has agreed to be published. Required, and stated on the page")


def run(options: PublishOptions) -> None:
    made = pictures.publish(
        options.file, options.output, options.pictures, agreed=options.agreed, title=options.title,
        description=options.description, on_progress=progress_bar("hashing"), on_warning=print_warning,
    )  # fmt: skip
    for path in (made.lora, made.page, *made.pictures):
        print(path)
    print(f"{len(made.left_out)} metadata entries were left out; {options.file} is unchanged")
    print_whether_signed()
    print("Before you upload, read the page and the prompts in the pictures: they contain your own texts.")
