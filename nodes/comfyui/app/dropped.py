"""Photos that were dropped on a page: the folder for each person in ComfyUI's input folder, and its owner.

Photos are numbered, because ComfyUI writes the graph, with their names, into every picture that it saves. The original names
are saved beside the photos, and are sent only to their user's pages.
"""

# pyright: reportMissingImports=false

import json
import os
import re
import secrets
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import folder_paths
from comfy.cli_args import args

from ....core.errors import BadFile, BadPhoto
from ....core.photos import read_photo_files
from ....core.photos.agreement import PERSON_FILE
from ....core.photos.reading import MASK_ENDING, PHOTO_SUFFIXES
from ....core.storage.cache_folder import content_key
from ....core.storage.files import make_folder, read_json, write_file, write_text

ROOT = "photos"
"""The folder of all dropped photos, below ComfyUI's input folder."""
NAMES = ".names.json"
"""The file in a person's folder with the original names of the photos, by their numbered names."""
_changing = threading.Lock()
"""Held while a photo is added or photos are deleted, so that two pages don't write the same number or list of names."""
_NOT_IN_NAMES = re.compile(r'[<>:"|?*\\/\x00-\x1f]')
_NUMBER = re.compile(r"photo (\d{2,6})")


def input_folder() -> Path:
    return Path(folder_paths.get_input_directory()).resolve()


def path_of(name: str) -> Path:
    """Return the path of a folder or file, by its name below the input folder, with all links resolved.

    Raises BadPhoto for a path elsewhere and for an impossible name.
    """
    root, name = input_folder(), str(name)  # A graph may give a number.
    try:
        path = Path(os.path.realpath(root / name))
        path.exists()
    except (OSError, ValueError) as problem:  # a name that is too long, or has a NUL character
        raise BadPhoto(f"{name[:80]!r}: not a valid file name ({problem.args[-1]})") from None
    if not path.is_relative_to(root):
        raise BadPhoto(f"{name}: not in ComfyUI's input folder. Copy it there first")
    return path


def own_root(user: str | None) -> str:
    """Return the folder, below the input folder, of all photos that the user has dropped.

    With --multi-user, each user has their own, and others cannot guess its name.
    """
    return f"{ROOT}/{content_key('photos', user, _secret())[:20]}" if args.multi_user else ROOT


def _secret() -> str:
    """Return random text. It is made once and kept in ComfyUI's folder of users, where no user can read it."""
    file = Path(folder_paths.get_user_directory()) / "facelora-secret.txt"
    if not file.exists():
        write_text(file, secrets.token_hex())
    return file.read_text()


def is_hidden(name: str, user: str | None) -> bool:
    """Return whether a folder or file below the input folder is another user's. Such a file is treated as missing."""
    if not args.multi_user or not f"{name}/".casefold().startswith(f"{ROOT}/"):
        return False
    return user is None or not name.startswith(f"{own_root(user)}/")


def folders_for(user: str | None) -> list[str]:
    """Return the folders below the input folder that the user may choose."""
    return [name for name in folder_paths.get_input_subfolders() if not is_hidden(name, user)]


def own_name(name: str) -> str:
    """Return the original name of a dropped photo's file, by its name below the input folder; for others, the file's name."""
    path = input_folder() / name
    return _own_names(path.parent).get(path.name, path.name)


def _own_names(folder: Path) -> dict[str, str]:
    with suppress(BadFile, AttributeError):
        # Anyone who may upload pictures may upload this file too, so only names that `add` gives count.
        named = {name: own for name, own in read_json(folder / NAMES).items() if isinstance(own, str)}
        return {name: own for name, own in named.items() if _NUMBER.fullmatch(stem_of(name)) and _split(name)[1]}
    return {}


def photos_in(folder: str) -> list[str]:
    """Return the names of the dropped photos and masks in a folder below the input folder. A folder that is a link has none."""
    path = input_folder() / folder
    return [] if path.is_symlink() else [name for name in _own_names(path) if (path / name).is_file()]


def folders_of(user: str | None) -> list[str]:
    """Return the folders below the input folder with photos that the user has dropped."""
    root = own_root(user)
    names = sorted(file.parent.name for file in (input_folder() / root).glob(f"*/{NAMES}"))
    return [folder for name in names if photos_in(folder := f"{root}/{name}")]


def delete_dropped(folder: str, photos: Collection[str] | None = None) -> list[str]:
    """Delete dropped photos, by name, with masks and captions from a folder below the input folder. None deletes all of them.

    With the last photo, the note of consent is deleted too.
    Returns the names of deleted files below the input folder. All other files stay, and so does the folder while it has any.
    """
    with _changing:
        path, own = input_folder() / folder, photos_in(folder)
        stems = {stem_of(name) for name in own if photos is None or name in photos}
        gone = [name for name in own if stem_of(name) in stems]
        for name in gone:
            (path / name).unlink()
            (path / name).with_suffix(".txt").unlink(missing_ok=True)
        if len(gone) < len(own):
            write_text(
                path / NAMES, json.dumps({name: file for name, file in _own_names(path).items() if name not in gone})
            )
        elif gone:
            (path / NAMES).unlink()
            (path / PERSON_FILE).unlink(missing_ok=True)
            with suppress(OSError):  # It still has other files.
                path.rmdir()
    return [f"{folder}/{name}" for name in gone]


def add(user: str | None, person: str, folder: str, file_name: str, content: bytes) -> str:
    """Write a dropped photo or mask, and return its name below the input folder.

    It is written into `folder` if that folder is for the user's dropped photos. Otherwise a new folder is named after the
    person, unless a folder of that name has the photo. A photo that is in the folder already is not written again. Raises
    BadPhoto, with the file's own name, for a file that cannot be read.
    """
    stem, ending = _split(file_name)
    if not ending:
        raise BadPhoto(f"{file_name}: not a photo. Use jpg, png, webp, heic or another image format")
    with _changing:
        if not _is_own(folder, user):
            folder = _folder_for(user, person, content)
        if same := _with_content(folder, content):
            return f"{folder}/{same}"
        path = input_folder() / folder
        names = _own_names(path)
        name = f"photo {_photo_number(stem, ending, names):02}{ending}"
        make_folder(path)
        write_file(path / name, lambda stream: stream.write(content))
        try:
            if ending != MASK_ENDING:
                read_photo_files([path / name], strict=True, on_warning=lambda _: None)
        except BadPhoto as problem:
            (path / name).unlink()
            with suppress(OSError):  # it holds other photos
                path.rmdir()
            raise BadPhoto(str(problem).replace(name, file_name)) from None
        write_text(path / NAMES, json.dumps(names | {name: file_name}))
        return f"{folder}/{name}"


def stem_of(name: str) -> str:
    """Return the name of a photo or its mask without the ending. Both have the same."""
    return _split(name)[0]


def _split(file_name: str) -> tuple[str, str]:
    """Return the name and the ending of a photo or mask. For other files, the ending is empty."""
    ending = next((end for end in (MASK_ENDING, *PHOTO_SUFFIXES) if file_name.lower().endswith(end)), "")
    return file_name[: len(file_name) - len(ending)], ending


def _photo_number(stem: str, ending: str, names: dict[str, str]) -> int:
    """Return the number of a photo or mask: that of its mask or photo if there is one, or the next free number."""
    halves = {(_split(own)[0], _split(own)[1] == MASK_ENDING): int(match[1])
              for name, own in names.items() if (match := _NUMBER.match(name))}  # fmt: skip
    is_mask = ending == MASK_ENDING
    if (stem, is_mask) not in halves and (stem, not is_mask) in halves:
        return halves[stem, not is_mask]
    return max(halves.values(), default=0) + 1


def _is_own(folder: str, user: str | None) -> bool:
    root, _, word = folder.rpartition("/")
    path = input_folder() / folder
    is_name = word.strip(" .") == word != "" and not _NOT_IN_NAMES.search(word) and len(os.fsencode(word)) < 256
    is_own = root == own_root(user) and is_name and not path.is_symlink()
    return is_own and ((path / NAMES).exists() or not path.exists())


def _folder_for(user: str | None, person: str, content: bytes) -> str:
    """Return the name of a folder named after the person: one that has the photo, or a new one, with -2 and so on."""
    word = _NOT_IN_NAMES.sub("_", person)[:60].strip(" .") or "person"
    first = f"{own_root(user)}/{word}"
    names = (first if number == 1 else f"{first}-{number}" for number in range(1, 10_000))
    return next(name for name in names if not (input_folder() / name).exists() or _with_content(name, content))


def _with_content(folder: str, content: bytes) -> str:
    """Return the name of the dropped photo in the folder that has this content; "" if none has."""
    path = input_folder() / folder
    same_size = (name for name in photos_in(folder) if (path / name).stat().st_size == len(content))
    return next((name for name in same_size if (path / name).read_bytes() == content), "")
