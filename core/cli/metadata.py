"""The command `metadata`, which changes the metadata of a LoRA file."""

from dataclasses import dataclass
from typing import Any

from .. import lora  # Its modules load only when a name is used.
from .common import progress_bar
from .options import Options, argument, option
from .shared_options import OVERWRITE
from .values import InputPath, LoraEdited, LoraOutput, Text


def new_text() -> Any:
    return option('New text; "" deletes it', "TEXT")


@dataclass(frozen=True)
class MetadataOptions(Options):
    file: LoraEdited = argument("LoRA to change, in place unless you give --output")
    output: LoraOutput | None = option("File to write instead")
    overwrite: bool = OVERWRITE
    title: Text | None = new_text()
    author: Text | None = new_text()
    description: Text | None = new_text()
    trigger_phrase: Text | None = new_text()
    license: Text | None = new_text()
    usage_hint: Text | None = new_text()
    tag: list[Text] | None = option("New tag, which replaces all tags; may be repeated", "TEXT")
    thumbnail: InputPath | None = option("Picture to put into the file as a small copy", "PICTURE")
    remove: list[str] = option("Metadata key to remove; may be repeated", "KEY")


def run(options: MetadataOptions) -> None:
    lora.edit_metadata(
        options.file, options.output, title=options.title, author=options.author, description=options.description,
        trigger_phrase=options.trigger_phrase, license=options.license, usage_hint=options.usage_hint, tags=options.tag,
        thumbnail=options.thumbnail, remove=options.remove, on_progress=progress_bar("hashing"),
    )  # fmt: skip
    print(options.output or options.file)
