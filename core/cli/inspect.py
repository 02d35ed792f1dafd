"""The command `inspect`. With --fast it reads LoRAs without torch, for programs that inspect thousands of files."""

import gc
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .. import lora, models, photos, storage  # Their modules load only when a name is used.
from ..errors import BadFile, BadPhoto, one_line
from .common import progress_bar
from .options import Options, argument, option
from .values import InputName, InputPath


@dataclass(frozen=True)
class InspectOptions(Options):
    files: list[InputPath] = argument(
        "A LoRA or a picture. Several files, or a folder of LoRAs, print one line each", "FILE|FOLDER"
    )
    base: InputName | None = option(
        "Base model of the LoRA: checkpoint file, diffusers folder, hub id, or demo. Also print how far it moves the weights"
    )
    fast: bool = option("Read no tensors. The norms of the blocks are left out")
    json: bool = option("Print everything as JSON")


@contextmanager
def _few_collections() -> Iterator[None]:
    """Search less often for cycles of objects. Among the millions in headers, the search takes a fifth of the time."""
    usual = gc.get_threshold()
    gc.set_threshold(50_000)
    try:
        yield
    finally:
        gc.set_threshold(*usual)


@_few_collections()
def run(options: InspectOptions) -> None:
    """Print what is in the files. Raises BadFile for refused files, after all others have been printed."""
    first, *others = options.files
    is_one = not others and not os.path.isdir(first)
    base = models.load_base(options.base) if options.base else None
    inspect_lora = lora.inspect_header if options.fast else lora.inspect_lora
    if is_one and not options.fast:
        inspect_lora = partial(lora.inspect_lora, on_progress=progress_bar("reading"))

    def inspect(path: Path) -> dict[str, Any]:
        moves = {"movement": lora.movement_of(lora.LoraFile.read(path), base)} if base and not _is_picture(path) else {}
        return _inspect_picture(path) if _is_picture(path) else inspect_lora(path) | moves

    if is_one and not options.json:
        report = inspect(Path(first))
        print(_picture_line(report) if _is_picture(Path(first)) else lora.format_inspection(report))
        return
    count, refused = 0, []
    for report in lora.inspect_files(options.files, inspect):
        count += 1
        refused += [f"{report['file']}: {report['error']}"] if "error" in report else []
        line = _picture_line if "digital_source_type" in report else lora.format_line
        print(json.dumps(report, indent=1 if is_one else None) if options.json else line(report), flush=True)
    if not count:
        raise BadFile(f"{first}: this folder has no .safetensors file")
    if refused:
        several = "" if is_one else f"{len(refused)} of {count} files were refused; the first: "
        raise BadFile(several + refused[0])


def _is_picture(path: Path) -> bool:
    # The module with the suffixes of pictures also loads numpy, which --fast does without.
    return path.suffix.lower() != ".safetensors" and path.name.lower().endswith(photos.PHOTO_SUFFIXES)


def _inspect_picture(path: Path) -> dict[str, Any]:
    try:
        photos.read_photo_files([path], strict=True)
    except BadPhoto as error:
        raise BadFile(f"{path}: {str(error).removeprefix(f'{path.name}: ')}") from None
    return {"file": os.fspath(path), **storage.inspect_mark(path), "signature": storage.inspect_signature(path)}


def _picture_line(report: Mapping[str, Any]) -> str:
    kind, tool = report["digital_source_type"], report["creator_tool"]
    drawn = {"trainedAlgorithmicMedia": "drawn", "compositeWithTrainedAlgorithmicMedia": "partly drawn"}
    what = f"{drawn[kind]} by a program ({kind})" if kind in drawn else kind
    marked = f"marked as {what}{f', {tool}' if tool else ''}" if kind else "not marked as drawn by a program"
    return one_line(f"{report['file']}: {marked}; {_signature_text(report['signature'])}")


def _signature_text(signature: Mapping[str, Any]) -> str:
    signers = "; then ".join(
        f"{one['program']} ({', '.join(filter(None, (*one['actions'], one['digital_source_type'])))}) "
        f"with the certificate {one['certificate']!r}"
        for one in signature["history"]
    )
    problems, whose = ", ".join(signature["problems"]), "whose certificate it is isn't checked"
    texts = {
        "none": "not signed, or the signature was removed",
        "unknown": f"whether it is signed is unknown without c2pa-python: {storage.HOW_TO_SIGN}",
        "unreadable": f"its signature can't be read: {problems}",
        "valid": f"signed and unchanged since: {signers}; {whose}",
        "changed": f"signed, but changed afterwards: {signers}; {whose}",
        "invalid": f"signed, but not validly ({problems}): {signers}; {whose}",
    }
    return texts[signature["state"]]
