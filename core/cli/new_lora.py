"""What commands that make a LoRA from others have in common: the options of its file, and writing it."""

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from .. import lora  # Its modules load only when a name is used.
from ..config import SavePrecision
from ..errors import BadFile, FaceLoraError
from ..storage.files import check_writable
from .common import print_warning, progress_bar
from .options import Options, option
from .shared_options import OVERWRITE
from .values import LoraOutput

SCHEMES_HELP = (
    "Tensor names: kohya, comfy (the original model's), diffusers or others. Which ones a program loads depends on the model: "
    "docs/formats.md lists them, and convert --for PROGRAM chooses"
)


@dataclass(frozen=True)
class NewLoraOptions(Options):
    """The options of a command that makes a LoRA."""

    output: LoraOutput = option("File to write")
    precision: SavePrecision = option("Precision of the tensors (default: fp16)", default="fp16")
    overwrite: bool = OVERWRITE


def read_source(path: str | os.PathLike[str], family: str | None = None) -> "lora.LoraFile":
    """Read a LoRA as `LoraFile.read` does, and warn if it may be for another model."""
    source = lora.LoraFile.read(path, family)
    if others := source.other_models:
        also = "also fit" if source.is_known else "are also named like those of"
        print_warning(
            f"{path}: treated as {source.family}, but its modules {also} {' and '.join(others)}, and its metadata name none of "
            "them; choose a family with convert --family"
        )
    return source


def save(made: "lora.NewLora", options: NewLoraOptions, sources: Sequence["lora.LoraFile"] = ()) -> None:
    """Write the LoRA, and beside it the trigger word vectors of `sources`, which diffusers' naming scheme cannot contain."""
    from ..device import PRECISIONS

    new, dtype = made.lora, PRECISIONS[options.precision]
    # If they are broken, nothing is written.
    words = [(source, lora.embedding_files(source)) for source in sources]
    places: dict[Path, str] = {}
    for word in (word for _, files in words for word in files):
        place = _beside(options.output, word)
        if places.setdefault(place, word) != word:
            raise BadFile(f"{place}: this would be the file of both {places[place]!r} and {word!r}")
        check_writable(place)
        _check_place_of_word(place, word)
    new.save(options.output, dtype, on_progress=progress_bar("writing"))
    lost = f"; largest relative error of a module's change: {made.error:.2g}" if made.error else ""
    size = options.output.stat().st_size / 1e6
    print(f"{options.output}  ({new.family}, {new.scheme} names, {size:.1f} MB){lost}")
    for source, files in words:
        for word in sorted({lora.word_of(source, key) for key in source.embedding_keys} - files.keys()):
            print_warning(f"the vectors of {word!r} are left out: {source.family} has no embedding files")
        for word, embedding in files.items():
            beside = _beside(options.output, word)
            embedding.save(beside, dtype)
            print(f"{beside}  (the vectors of {word!r}, which a LoRA with diffusers names cannot contain)")


def _beside(output: Path, word: str) -> Path:
    return output.with_name(f"{output.stem}-{lora.file_word(word)}{output.suffix}")


def _check_place_of_word(path: Path, word: str) -> None:
    """Raise BadFile if a file exists that isn't an embedding of that word."""
    holds = None
    with suppress(FaceLoraError):
        holds = lora.LoraFile.read(path).metadata.get(lora.WORD_KEY)
    if holds != word and os.path.lexists(path):
        raise BadFile(f"{path}: this file exists and is not an embedding of {word!r}; choose another output")
