"""The commands for LoRA files except inspect: verify, convert, merge, resize, extract, metadata, sidecars and publish."""

import argparse
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..device import PRECISIONS
from ..errors import BadConfig, BadFile, FaceLoraError, counted, one_line
from ..lora import (
    WORD_KEY,
    BaseWeights,
    LoraFile,
    convert_for,
    convert_lora,
    edit_metadata,
    embedding_files,
    extract_lora,
    file_word,
    fit,
    merge_into_checkpoint,
    merge_loras,
    resize_lora,
    verify_lora,
    word_of,
    write_sidecars,
)
from ..pictures import publish
from ..storage.files import check_writable
from .arguments import EDITABLE
from .common import checkpoint, print_warning, progress_bar, split_strength


def _save(lora, error: float, options: argparse.Namespace, sources: Sequence[LoraFile] = ()) -> None:
    """Write the LoRA, and beside it the trigger word vectors of its sources if its naming scheme cannot contain them."""
    words = [(source, embedding_files(source)) for source in sources]  # If they are broken, nothing is written.
    places: dict[Path, str] = {}
    for word in (word for _, files in words for word in files):
        place = _beside(options.output, word)
        if places.setdefault(place, word) != word:
            raise BadFile(f"{place}: this would be the file of both {places[place]!r} and {word!r}")
        check_writable(place)
        _check_place_of_word(place, word)
    lora.save(options.output, PRECISIONS[options.precision], on_progress=progress_bar("writing"))
    size = options.output.stat().st_size / 1e6
    lost = f"; largest relative error of a module's change: {error:.2g}" if error else ""
    print(f"{options.output}  ({lora.family}, {lora.scheme} names, {size:.1f} MB){lost}")
    for source, files in words:
        _save_words(source, files, options)


def run_verify(options: argparse.Namespace) -> int:
    faults = verify_lora(options.file, checkpoint(options.base), on_progress=progress_bar("reading"))
    for fault in faults:
        print(f"{'error' if fault.is_error else 'odd'}: {one_line(fault.text)}")
    if not faults:
        print("no faults found")
    return int(any(fault.is_error for fault in faults))


def run_convert(options: argparse.Namespace) -> None:
    path = checkpoint(options.base)
    lora = LoraFile.read(options.file, options.family)
    if others := lora.other_families:
        print_warning(
            f"{options.file}: treated as {lora.family}, but its modules also fit {' and '.join(others)}, and its metadata "
            "name none of them; choose one with --family"
        )
    weight = None
    if path is not None:
        base = BaseWeights.open(path)
        fit(lora, base.family, base.shapes).check(lora.name)
        weight = base.read
    elif lora.entries and not lora.identity.models and not lora.identity.is_near:
        print_warning(f"{options.file}: no published model has most of its modules; programs may not load the result")
    settings = options.plain_rank, weight, progress_bar("converting")
    if options.readers is None:
        converted, error = convert_lora(lora, options.to, *settings)
    else:
        converted, error = convert_for(lora, options.readers.split(","), *settings)
        options.to = converted.scheme
    _save(converted, error, options, [lora] if options.to == "diffusers" else [])
    for scheme, count in Counter(entry.scheme for entry in lora.entries if entry.scheme != options.to).items():
        print(f"  {counted(count, 'module')} had {scheme} names")


def _save_words(lora, files: Mapping[str, LoraFile], options: argparse.Namespace) -> None:
    for word in sorted({word_of(lora, key) for key in lora.embedding_keys} - files.keys()):
        print_warning(f"the vectors of {word!r} are left out: {lora.family} has no embedding files")
    for word, embedding in files.items():
        beside = _beside(options.output, word)
        embedding.save(beside, PRECISIONS[options.precision])
        print(f"{beside}  (the vectors of {word!r}, which a LoRA with {options.to} names cannot contain)")


def _beside(output: Path, word: str) -> Path:
    """Return the path of a trigger word's embedding file, beside the output."""
    return output.with_name(f"{output.stem}-{file_word(word)}{output.suffix}")


def _check_place_of_word(path: Path, word: str) -> None:
    """Raise BadFile if a file exists that isn't an embedding of that word."""
    holds = None
    with suppress(FaceLoraError):
        holds = LoraFile.read(path).metadata.get(WORD_KEY)
    if holds != word and os.path.lexists(path):
        raise BadFile(f"{path}: this file exists and is not an embedding of {word!r}; choose another output")


def run_merge(options: argparse.Namespace) -> None:
    named = [split_strength(name) for name in options.files]
    into = checkpoint(options.into)
    loras = [(LoraFile.read(path), strength) for path, strength in named]
    if into is None:
        merged, error = merge_loras(loras, options.rank, options.to, on_progress=progress_bar("merging"))
        _save(merged, error, options, [lora for lora, _ in loras] if merged.scheme == "diffusers" else [])
        return
    if given := [name for name in ("rank", "to") if getattr(options, name) is not None]:
        raise BadConfig(f"--{given[0]} and --into are both given: a checkpoint has no rank, and keeps its names")
    count = merge_into_checkpoint(
        into, loras, options.output, on_progress=progress_bar("merging"), on_warning=print_warning
    )
    print(f"{options.output}  ({counted(count, 'tensor')} of {into.name} changed)")


def run_resize(options: argparse.Namespace) -> None:
    resized = resize_lora(
        LoraFile.read(options.file), options.rank, options.energy, on_progress=progress_bar("resizing")
    )
    _save(*resized, options)


def run_extract(options: argparse.Namespace) -> None:
    extracted = extract_lora(
        checkpoint(options.original),
        checkpoint(options.tuned),
        options.rank,
        on_progress=progress_bar("extracting"),
        on_warning=print_warning,
    )
    _save(*extracted, options)


def run_metadata(options: argparse.Namespace) -> None:
    texts = {name: getattr(options, name) for name in EDITABLE}
    edit_metadata(
        options.file,
        options.output,
        tags=options.tag,
        thumbnail=options.thumbnail,
        remove=options.remove,
        on_progress=progress_bar("hashing"),
        **texts,
    )
    print(options.output or options.file)


def run_sidecars(options: argparse.Namespace) -> None:
    written = write_sidecars(options.file, options.picture, on_progress=progress_bar("hashing"))
    print("\n".join(map(str, written)) or f"all files already exist beside {options.file}")


def run_publish(options: argparse.Namespace) -> None:
    made = publish(
        options.file,
        options.output,
        options.pictures,
        agreed=options.agreed,
        title=options.title,
        description=options.description,
        on_progress=progress_bar("hashing"),
        on_warning=print_warning,
    )
    for path in (made.lora, made.page, *made.pictures):
        print(path)
    print(f"{len(made.left_out)} metadata entries were left out; {options.file} is unchanged")
    print("Before you upload, read the page and the prompts in the pictures: they contain your own texts.")
