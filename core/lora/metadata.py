"""Changes to the metadata of LoRA files alone."""

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..errors import BadConfig, BadFile, BadPhoto, NoLora, UnknownFamily
from ..photos.reading import read_photo_files
from ..storage.safetensors_file import SafetensorsFile, copy_with_metadata
from .hashes import chunks, file_hashes, legacy_hash
from .names import LoraHeader
from .progress import OnProgress, silent, steps

MODELSPEC_VERSION = "1.0.1"


def edit_metadata(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    author: str | None = None,
    description: str | None = None,
    trigger_phrase: str | None = None,
    tags: Sequence[str] | None = None,
    license: str | None = None,
    usage_hint: str | None = None,
    thumbnail: str | os.PathLike[str] | None = None,
    remove: Sequence[str] = (),
    on_progress: OnProgress = silent,
) -> dict[str, str]:
    """The new metadata, after the file is written with them to `output`, or over itself; tensors stay byte for byte.

    None leaves a value, "" deletes it, and `remove` deletes any keys. `thumbnail` is a picture file, which is shrunk to a
    JPEG without its EXIF data. Both `sshs_*` hashes are brought up to date; that of the tensors does not change. Raises
    BadConfig when there is nothing to change, or a key of `remove` is not there, BadFile when a file cannot be read or
    written, NoLora for a checkpoint and the like, whose hash other programs know it by.
    """
    file = SafetensorsFile.open(path)
    try:
        LoraHeader.read(path)
    except NoLora:
        raise
    except UnknownFamily:
        pass  # of a model that is not known here
    values = {
        "title": title,
        "author": author,
        "description": description,
        "trigger_phrase": trigger_phrase,
        "tags": None if tags is None else ", ".join(tags),
        "license": license,
        "usage_hint": usage_hint,
    }
    covers = {} if thumbnail is None else cover(small_picture(thumbnail) if thumbnail else "")
    if not (remove or covers) and all(value is None for value in values.values()):
        raise BadConfig("nothing to change: give a title, author, ... or keys to remove")
    if missing := [key for key in remove if key not in file.metadata]:
        there = ", ".join(sorted(file.metadata)) or "none"
        raise BadConfig(f"remove = {missing[0]!r}: {Path(path).name} has no such key (but: {there})")
    given = {f"modelspec.{key}": value for key, value in values.items() if value is not None} | covers
    removed = {*remove, *(key for key, value in given.items() if value == "")}
    if removed & cover("").keys():  # both are the person's picture
        removed |= cover("").keys()
    metadata = {key: value for key, value in (file.metadata | given).items() if key not in removed}
    if any(key.startswith("modelspec.") for key in metadata):
        # No program reads modelspec's other keys without its version.
        metadata.setdefault("modelspec.sai_model_spec", MODELSPEC_VERSION)
    return copy_with_hashes(file, path if output is None else output, metadata, on_progress)


def copy_with_hashes(
    file: SafetensorsFile,
    output: str | os.PathLike[str],
    metadata: Mapping[str, str],
    on_progress: OnProgress = silent,
) -> dict[str, str]:
    """The metadata with both `sshs_*` hashes, after the tensors are written with them to `output`, byte for byte.

    Raises BadFile when it cannot be written.
    """
    hashes = file_hashes(file.path, steps(on_progress, chunks(file.path)))
    metadata = {**metadata, "sshs_model_hash": hashes["sshs_model_hash"]}
    metadata["sshs_legacy_hash"] = legacy_hash(file, metadata)
    copy_with_metadata(file, output, metadata)
    return metadata


THUMBNAIL_SIDE = 256
"""The longest side of a thumbnail in pixels: it travels in the header, which every program parses."""


def small_picture(picture: str | os.PathLike[str]) -> str:
    """The picture as a data URL of a JPEG with sides of at most THUMBNAIL_SIDE pixels. Raises BadFile."""
    return thumbnail_url(opened_picture(picture, THUMBNAIL_SIDE))


def opened_picture(picture: str | os.PathLike[str], side: int) -> Image.Image:
    """The picture in a file, upright, RGB, its longer side at most `side` pixels, without its metadata. Raises BadFile."""
    try:
        image = read_photo_files([Path(picture)], strict=True)[0].image(shorter_side=side).convert("RGB")
    except BadPhoto as error:
        raise BadFile(f"{Path(picture)}: {str(error).removeprefix(f'{Path(picture).name}: ')}") from None
    image.thumbnail((side, side))
    image.info.clear()
    return image


def cover(url: str) -> dict[str, str]:
    """The metadata in which programs look for a LoRA's picture, from its data URL; empty where that is."""
    return {"modelspec.thumbnail": url, "ssmd_cover_images": json.dumps([url.partition(",")[2]]) if url else ""}


def thumbnail_url(image: Image.Image) -> str:
    """The picture as a data URL of a JPEG, its longer side at most THUMBNAIL_SIDE pixels."""
    small, data = image.convert("RGB"), io.BytesIO()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    small.save(data, "JPEG", quality=85, comment="")  # else the picture's own comment comes along
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
