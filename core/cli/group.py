"""Read the people in a group picture from the options of `facelora generate`."""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from ..errors import BadConfig
from ..lora import LoraFile
from ..photos import read_photo_files, read_photos
from ..photos.reading import PHOTO_SUFFIXES
from ..pictures import Group, GroupMember, Mask
from ..pictures.group import Area, read_box
from .common import split_strength


def group_from(options: argparse.Namespace) -> Group:
    """Return the people of --person with the regions of --region. Raises BadConfig with the option if that is not a group."""
    files = _by_name("--person", options.person, "FILE.safetensors")
    if len(files) == 1:
        raise BadConfig(
            f"--person {next(iter(files))}: a group needs at least two people; for one person, use --lora FILE"
        )
    if options.subject:
        raise BadConfig("--subject is for one person; with --person, those people are the subject of a --style-pack")
    if not (options.prompt or options.style_pack):
        raise BadConfig(f"no --prompt given: describe who does what, as in {_example(list(files))!r}")
    boxes = _by_name("--region", options.region, "LEFT,TOP,RIGHT,BOTTOM or NAME=MASK.png")
    if boxes and (differing := sorted({*files} ^ {*boxes})):
        raise BadConfig(f"--region: give one for each --person and nobody else; check {differing[0]}")
    group = Group(
        tuple(_person(name, file) for name, file in files.items()),
        tuple(_place(name, boxes[name]) for name in files) if boxes else (),
    )
    for prompt in options.prompt:
        group.check_prompt(prompt)
    return group


def photos_from(
    group: Group, references: Sequence[str], on_warning: Callable[[str], None]
) -> dict[str, Iterator[Image.Image]]:
    """Return everyone's photos from --reference. Raises BadConfig unless they are of exactly the people of the group."""
    folders, names = _by_name("--reference", references, "PHOTOS"), [person.name for person in group.people]
    if differing := sorted({*folders} ^ {*names}):
        raise BadConfig(f"--reference: give NAME=PHOTOS for each --person and nobody else; check {differing[0]}")
    read = {name: read_photos(folder, on_warning=on_warning) for name, folder in folders.items()}
    return {name: (photo.image() for photo in photos) for name, photos in read.items()}


def _place(name: str, text: str) -> Area:
    """Return the region from LEFT,TOP,RIGHT,BOTTOM, or the mask from the file of that name."""
    if not text.lower().endswith(PHOTO_SUFFIXES):
        return read_box(name, text)
    (mask,) = read_photo_files([text], strict=True)
    return Mask(mask.image())


def _by_name(option: str, given: Sequence[str], what: str) -> dict[str, str]:
    """Return the values by name for an option given as NAME=VALUE."""
    values: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not (name and value):
            raise BadConfig(f"{option} {text}: must be NAME={what}")
        if name in values:
            raise BadConfig(f"{option} {name} is given twice")
        values[name] = value
    return values


def _example(names: Sequence[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in names) + " in an office"


def _person(name: str, file: str) -> GroupMember:
    path, strength = split_strength(file)
    lora = LoraFile.read(path)
    phrase = lora.metadata.get("modelspec.trigger_phrase")
    if not phrase:
        raise BadConfig(
            f"--person {name}: {Path(path).name} has no trigger phrase in its metadata; "
            f"`facelora metadata {path} --trigger-phrase 'sks woman'` adds it"
        )
    return GroupMember(name, lora, phrase, strength)
