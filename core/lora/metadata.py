"""Edit the metadata of LoRA files without changing their tensors, and remove what is personal from metadata and other texts."""

import getpass
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path

from PIL import Image

from ..errors import BadConfig, BadFile, BadPhoto, NoLora, UnknownFamily
from ..photos.agreement import Agreement, agreement_of, as_day
from ..photos.reading import read_photo_files
from ..progress import OnProgress, silent, steps
from ..storage.drawn import jpeg_url, read_mark
from ..storage.safetensors_file import SafetensorsFile, copy_with_metadata
from .hashes import chunks, file_hashes, legacy_hash
from .names import LoraHeader
from .report import SETTINGS
from .stated import (
    AGREED,
    PEFT_KEY,
    PHRASE_KEY,
    SUBJECT_KEY,
    UNTIL_KEY,
    WORD_KEY,
    json_in,
    peft_metadata,
    trigger_words,
)

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
    """Edit a file's metadata, write it to `output` or over itself, and return the new metadata. The tensors are unchanged.

    None keeps a value, "" deletes it, and `remove` deletes any keys. `thumbnail` is a picture file, which is saved as a small
    JPEG without its EXIF data. Both `sshs_*` hashes are updated; that of the tensors stays the same.

    Raises BadConfig when there is nothing to change, or the file lacks a key of `remove`; BadFile when a file cannot be read
    or written. Raises NoLora for checkpoints and other files that are not LoRAs, because programs identify them by their hash.
    """
    file = SafetensorsFile.open(path)
    try:
        LoraHeader.read(path)
    except UnknownFamily as error:  # A LoRA for an unsupported model can be edited too.
        if isinstance(error, NoLora):
            raise
    values = {
        "title": title,
        "author": author,
        "description": description,
        "trigger_phrase": trigger_phrase,
        "tags": tags if tags is None or isinstance(tags, str) else ", ".join(tags),  # a text is a sequence of letters
        "license": license,
        "usage_hint": usage_hint,
    }
    covers = {} if thumbnail is None else cover(small_picture(thumbnail) if thumbnail else "")
    if not (remove or covers) and all(value is None for value in values.values()):
        raise BadConfig("nothing to change; give a title, an author, ... or keys to remove")
    if missing := [key for key in remove if key not in file.metadata]:
        there = ", ".join(sorted(file.metadata)) or "none"
        raise BadConfig(f"remove = {missing[0]!r}: {Path(path).name} does not have this key; it has: {there}")
    given = {f"modelspec.{key}": value for key, value in values.items() if value is not None} | covers
    removed = {*remove, *(key for key, value in given.items() if value == "")}
    if removed & cover("").keys():  # Both keys hold the same picture of the person.
        removed |= cover("").keys()
    # A configuration of peft stays behind, beside the original file.
    beside = _scales_of_peft(peft_metadata(file.path)) if output else {}
    metadata = {key: value for key, value in (beside | file.metadata | given).items() if key not in removed}
    if any(key.startswith("modelspec.") for key in metadata):
        # Programs ignore modelspec's other keys if its version is missing.
        metadata.setdefault("modelspec.sai_model_spec", MODELSPEC_VERSION)
    return copy_with_hashes(file, path if output is None else output, metadata, on_progress)


def copy_with_hashes(
    file: SafetensorsFile,
    output: str | os.PathLike[str],
    metadata: Mapping[str, str],
    on_progress: OnProgress = silent,
) -> dict[str, str]:
    """Write the unchanged tensors with new metadata to `output`, and return the metadata with both `sshs_*` hashes.

    Raises BadFile when the file cannot be written.
    """
    hashes = file_hashes(file.path, steps(on_progress, chunks(file.path)))
    metadata = {**metadata, "sshs_model_hash": hashes["sshs_model_hash"]}
    metadata["sshs_legacy_hash"] = legacy_hash(file, metadata)
    copy_with_metadata(file, output, metadata)
    return metadata


THUMBNAIL_SIDE = 256
"""The longest side of a thumbnail in pixels. It is small, because every program has to parse the header that contains it."""


def small_picture(picture: str | os.PathLike[str]) -> str:
    """Return the data URL of a JPEG of a picture, THUMBNAIL_SIDE pixels at most. Raises BadFile if it cannot be read."""
    return jpeg_url(opened_picture(picture, THUMBNAIL_SIDE), THUMBNAIL_SIDE, read_mark(picture))


def opened_picture(picture: str | os.PathLike[str], side: int) -> Image.Image:
    """Open a picture: upright, RGB, no metadata, sides of at most `side` pixels. Raises BadFile when it cannot be read."""
    try:
        image = read_photo_files([Path(picture)], strict=True)[0].image(shorter_side=side).convert("RGB")
    except BadPhoto as error:
        raise BadFile(f"{Path(picture)}: {str(error).removeprefix(f'{Path(picture).name}: ')}") from None
    image.thumbnail((side, side))
    image.info.clear()
    return image


def cover(url: str) -> dict[str, str]:
    """Return the metadata that programs read a LoRA's picture from. The values are empty for an empty data URL."""
    return {"modelspec.thumbnail": url, "ssmd_cover_images": json.dumps([url.partition(",")[2]]) if url else ""}


_MODELSPEC = (
    "sai_model_spec", "architecture", "implementation", "implementation_version", "title", "description",
    "trigger_phrase", "tags", "license", "usage_hint", "resolution", "prediction_type", "timestep_range", "encoder_layer",
)  # fmt: skip
_OTHERS = ("base_model_version", "new_sd_model_hash", "sd_model_hash", "network_args", "v2", "zero_terminal_snr")
_SETTINGS = tuple(f"ss_{name}" for name in (*SETTINGS, *_OTHERS))
_SHARED = {*(f"modelspec.{name}" for name in _MODELSPEC), *_SETTINGS, WORD_KEY, "format"}
"""The keys to keep. All others are removed, since other programs may have written anything into them."""
_PATH = re.compile(
    r"""(?<![\w/:.<>)])(?:[A-Za-z]:[\\/]|\\\\|~[\\/]|/(?=[^\s/,"']+/))[^\s,"']+|\bfile://[^\s,"']+""", re.ASCII
)
_ROOT = r"(?:[A-Za-z]:[\\/]|\\\\|~[\\/]|\.{1,2}[\\/]|/)"
_FIRST_PATH = re.compile(rf"^{_ROOT}[^\n]*?(?=: )")
_QUOTED_PATH = re.compile(rf"""(?<=['"]){_ROOT}[^'"]*(?=['"])""")
# The match must start at the beginning of a word. Otherwise, a long word would be searched from each of its characters.
_PHOTO = re.compile(
    r"""(?<![^\s\\/:,"'(<])[^\s\\/:,"'(<]+\.(?:jpe?g|jfif|png|webp|bmp|tiff?|gif|avif|hei[cf])\b""", re.IGNORECASE
)
_LINK = re.compile(r"""\bhttps?://[^\s"'<>]+""", re.IGNORECASE)
_NOBODY = {"root", "user", "admin", "administrator", "ubuntu"}
"""User names that many computers have, and that identify nobody."""


def shared_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return only the metadata that are useful to other people and reveal nothing about a person or a computer.

    Settings, modelspec's texts, the trigger words and the statement that the person has agreed are kept. Names of folders,
    files and authors, captions, times, unknown keys and settings that contain a path are removed. The texts are not checked.
    """
    shared = {key: value for key, value in metadata.items() if key in _SHARED}
    shared = {key: value for key, value in shared.items() if key not in _SETTINGS or not personal_part(value)}
    shared |= _scales_of_peft(metadata)
    until = as_day(UNTIL_KEY, metadata[UNTIL_KEY]) if UNTIL_KEY in metadata else None
    shared |= agreement_metadata(metadata.get(SUBJECT_KEY) == AGREED, until)
    if words := trigger_words(metadata):
        # Each program reads the trigger words from one of these two keys.
        phrase = metadata.get(PHRASE_KEY) or words[0]
        shared |= {PHRASE_KEY: phrase, "ss_tag_frequency": json.dumps({words[0]: {words[0]: 1}})}
    return shared


def agreement_metadata(agreed: bool, until: date | None = None) -> dict[str, str]:
    """Return the metadata which state that the person shown has agreed, and until when; none if they haven't."""
    said = {SUBJECT_KEY: AGREED} if agreed or until else {}
    return said | ({UNTIL_KEY: until.isoformat()} if until else {})


def agreed_until(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> date | None:
    """Return the last day of the agreement, from the note beside a LoRA or else from its metadata; None if neither has one.

    Raises BadConfig after that day, after a withdrawal, and for metadata that aren't a day.
    """
    if (until := agreement_of(path).agreed_until) is None and UNTIL_KEY in metadata:
        until = as_day(UNTIL_KEY, metadata[UNTIL_KEY])
        Agreement(agreed_on=until, agreed_until=until).check(f"{path}, {UNTIL_KEY}")
    return until


def _scales_of_peft(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return peft's configuration without the base model's path, since only it may have the scale of the modules."""
    if PEFT_KEY not in metadata:
        return {}
    numbers = re.compile(r"(?:.*\.)?(?:r|lora_alpha|alpha|rank_pattern|alpha_pattern|use_rslora)")
    config = json_in(metadata, PEFT_KEY, dict)
    return {PEFT_KEY: json.dumps({key: value for key, value in config.items() if numbers.fullmatch(key)})}


def personal_part(text: str, known: Collection[str] = ()) -> str | None:
    """Describe the first part of a text that reveals a computer or a photo, for a message; None if nothing does.

    This is a path or a picture's file name outside web links, or the name of this computer's user, unless it is one of the
    `known` words.
    """
    without_links = _LINK.sub("", text)
    for what, pattern in (("the path", _PATH), ("the file name", _PHOTO)):
        if found := pattern.search(without_links):
            return f"{what} {found[0][:80]!r}"
    users = {os.path.basename(os.path.expanduser("~"))}
    with suppress(KeyError, OSError, ImportError):  # A computer may not know its user.
        users.add(getpass.getuser())
    for name in {name.lower() for name in users if len(name) > 2} - _NOBODY - {word.lower() for word in known}:
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text.lower()):
            return f"the name of this computer's user, {name!r}"
    return None


def without_folders(text: str) -> str:
    """Shorten each recognisable path in a text to its last part.

    A path with spaces is recognised at the beginning of a text (`PATH: what is wrong`), or if it is quoted.
    """
    for pattern in (_FIRST_PATH, _QUOTED_PATH, _PATH):
        text = pattern.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], text)
    return text
