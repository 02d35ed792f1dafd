"""Photos in ComfyUI's input folder, as Load Face Photos and its page see them: which are chosen, how good they are."""

# pyright: reportMissingImports=false

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from ....core.errors import BadPhoto, check_length
from ....core.faces import faces_if_installed
from ....core.photos import Photo, SetReport, Thresholds, check_photos, read_photo_files, read_photos
from ....core.photos.reading import MASK_ENDING, PHOTO_SUFFIXES
from ....core.progress import OnProgress, silent
from ....core.storage.files import write_text
from ...shown import shown_check
from ..folders import without_server_paths
from .dropped import NAMES, input_folder, is_hidden, own_name, path_of

THUMBNAIL_SIDE = 160
"""Longest side of a thumbnail in the node, in pixels."""
DEFAULT_RESOLUTION = 1024
"""The resolution that photos are judged for when the base model is unknown, in pixels."""
PHOTOS, CLASS, REFERENCE = USES = "photos", "class_photos", "reference"
"""What photos are for: the input of Train Face LoRA or Likeness Score that they are connected to."""
_NOTHING = {
    PHOTOS: "no photos: add 10 to 20 photos of one person, or choose a folder of them",
    CLASS: "no class images: add pictures of other people, or choose a folder of them",
    REFERENCE: "no reference photos: add photos of the person, or choose a folder of them",
}
HIDDEN = ".not-yours"
"""A name in the input folder that no file has."""
NO_FOLDER = "(no folder)"


@dataclass(frozen=True)
class CheckedPhotos:
    """Photos, and the result of their check."""

    photos: list[Photo]
    unread: dict[str, str]
    """The reason for each added picture that cannot be read, by name."""
    notes: list[str]
    report: SetReport | None
    """None if the photos were only read."""

    def shown(self) -> dict[str, Any]:
        """Return what the node shows: a tile for each photo, one headline, and the verdict on the set."""
        shown = shown_check(list(map(_name_below_input, self.photos)), self.unread, self.notes, self.report)
        return shown | {"headline": without_server_paths(shown["headline"])}


def read_checked(
    folder: str,
    pictures: str,
    user: str | None,
    resolution: int | None,
    use: str = PHOTOS,
    *,
    strict: bool = False,
    on_progress: OnProgress = silent,
) -> CheckedPhotos:
    """Read the photos of a folder and the added ones, and check them for their use: to be trained on at the resolution, or to
    compare pictures with. Class images aren't checked, and nothing is if the resolution is None. `on_progress(photos, total)`
    is called after each checked photo, and may raise to cancel.

    Raises BadPhoto without any photos, and with `strict` for a photo that cannot be read.
    """
    if folder == NO_FOLDER and not _names(pictures):
        raise BadPhoto(_NOTHING[use])
    list(chosen_files(folder, pictures, user))  # report a missing file before anything is read
    notes: list[str] = []
    photos, unread = _read_chosen(folder, pictures, user, strict=strict, on_warning=notes.append)
    if resolution is None or use == CLASS:
        return CheckedPhotos(photos, unread, notes, None)
    network = faces_if_installed(notes.append)
    limits = Thresholds.for_reference() if use == REFERENCE else Thresholds.for_resolution(resolution)
    return CheckedPhotos(photos, unread, notes, check_photos(photos, network, limits, on_progress=on_progress))


def _read_chosen(
    folder: str, pictures: str, user: str | None, *, strict: bool, on_warning: Callable[[str], None]
) -> tuple[list[Photo], dict[str, str]]:
    """Read the photos. Return them, and the reason for each added picture that cannot be read, by name.

    `on_warning` is called for everything that is left out.
    """
    photos: list[Photo] = []
    unread: dict[str, str] = {}
    if _is_left_out(folder, pictures, user):
        on_warning(f"{folder}: this folder doesn't exist in ComfyUI's input folder. Only the added photos are used")
    elif folder != NO_FOLDER:
        photos += read_photos(_path(folder, user), strict=strict, on_warning=on_warning)
    in_folder = {_name_below_input(photo) for photo in photos}
    for name in (name for name in _names(pictures) if name not in in_folder):
        problems: list[str] = []
        photos += read_photo_files([_path(name, user)], strict=strict, on_warning=problems.append)
        for problem in problems:
            unread[name] = problem
            on_warning(problem)
    if not photos:
        raise BadPhoto(next(iter(unread.values()), f"{folder}: no photo in this folder can be read"))
    return photos, unread


def _names(pictures: str) -> list[str]:
    return [line.strip() for line in pictures.splitlines() if line.strip()]


def chosen_files(folder: str, pictures: str, user: str | None) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of each file that the node reads: photos, captions, masks. Raises BadPhoto if one is missing."""
    if folder != NO_FOLDER and not _is_left_out(folder, pictures, user):
        path = _path(folder, user)
        if not path.is_dir():
            raise BadPhoto(f"{folder}: this folder doesn't exist in ComfyUI's input folder. Choose another one")
        if path == input_folder():
            raise BadPhoto(f"folder {folder!r}: this is ComfyUI's whole input folder. Choose a folder in it")
        for file in sorted(path.rglob("*")):
            name = file.relative_to(input_folder()).as_posix()
            # `_path` raises for a link out of the input folder.
            if file.is_symlink() and file.exists() and not _path(name, user).exists():
                raise BadPhoto(f"{name}: this link leads to another user's photos. Remove it")
            if file.is_file() and file.name != NAMES:
                yield str(file.relative_to(path)), file
    for name in _names(pictures):
        picture = _path(name, user)
        if not picture.is_file():
            raise BadPhoto(f"{name}: this picture doesn't exist in ComfyUI's input folder. Add it again, or remove it")
        companions = (picture.with_suffix(".txt"), picture.with_name(picture.stem + MASK_ENDING))
        yield from ((file.name, file) for file in (picture, *companions) if path_of(str(file)).is_file())


def _is_left_out(folder: str, pictures: str, user: str | None) -> bool:
    """Return whether the folder is ignored: it doesn't exist (a template may name a missing one), and photos were added."""
    return folder != NO_FOLDER and bool(_names(pictures)) and not _path(folder, user).exists()


def _path(name: str, user: str | None) -> Path:
    """Return the path of a folder or picture in the input folder.

    For another user's dropped photo, the path does not exist. Raises BadPhoto for a path elsewhere or an impossible name.
    """
    path, root = path_of(name), input_folder()
    return root / HIDDEN if is_hidden(path.relative_to(root).as_posix(), user) else path


def _name_below_input(photo: Photo) -> str:
    """Return the photo's name for GET /facelora/photo."""
    assert isinstance(photo.source, Path)
    return photo.source.relative_to(input_folder()).as_posix()


def thumbnail(name: str, user: str | None) -> bytes:
    """Return a JPEG of a picture in the input folder, upright, its longer side at most THUMBNAIL_SIDE pixels.

    Raises BadPhoto if the file is missing or not a picture.
    """
    path = _path(name, user)
    if not path.is_file():
        raise BadPhoto(f"{name}: this picture doesn't exist in ComfyUI's input folder")
    (photo,) = read_photo_files([path], strict=True, on_warning=lambda _: None)
    image = photo.image(shorter_side=THUMBNAIL_SIDE)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_caption(name: str, text: str, user: str | None) -> None:
    """Write a photo's caption beside it; "" deletes it. Raises BadPhoto if the photo is missing or the text too long."""
    path = _path(name, user)
    if not path.is_file() or path.suffix.lower() not in PHOTO_SUFFIXES:
        raise BadPhoto(f"{name}: this picture doesn't exist in ComfyUI's input folder")
    check_length(f"{path.name}: its caption", text, BadPhoto)
    file = path_of(str(path.with_suffix(".txt")))  # raises for a link out of the input folder
    if text:
        write_text(file, text)
    else:
        file.unlink(missing_ok=True)


def with_own_names(checked: CheckedPhotos) -> dict[str, Any]:
    """Return what the node shows, with the original names of photos, and their captions.

    The node's output doesn't contain them, because everybody can read the history with --multi-user.
    """
    shown = checked.shown()
    names = {tile["name"]: own_name(tile["name"]) for tile in shown["photos"]}
    plain = Counter(Path(name).name for name in names)
    # Photos with the same name in two folders keep it: a reason doesn't tell which one it is about.
    own_names = {Path(name).name: own for name, own in names.items() if plain[Path(name).name] == 1}
    for tile in shown["photos"] if own_names else ():
        if tile.get("reason"):
            tile["reason"] = re.sub(
                "|".join(map(re.escape, own_names)), lambda found: own_names[found[0]], tile["reason"]
            )
    shown["own_names"] = names
    shown["captions"] = {_name_below_input(photo): photo.caption for photo in checked.photos if photo.caption}
    return shown
