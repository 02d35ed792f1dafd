"""The people of a studio: a folder with a folder of photos for each, or a manifest that lists them."""

import csv
import io
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import BadConfig, BadFile, FaceLoraError
from ..photos import Photo, count_photos, read_photos
from ..photos.agreement import MAX_BYTES, PERSON_FILE, SETTINGS, YES, read_person_file
from ..pictures.style_pack import check_count
from ..progress import OnWarning
from ..storage.files import RESERVED, read_bytes
from ..storage.plain_values import is_text, parse_json

REPORT, PAGE = "report.json", "report.html"
"""The studio's files in its output, beside the people's folders."""
DRAWN_FOLDER = "drawn"
"""The folder of drawn pictures of a person, in the folder of the person's photos."""
_MOST_NAME_BYTES = 200
"""The longest name in bytes: file systems allow 255, and file names add more to the person's name."""
_NO = ("false", "no", "0", "")


@dataclass(frozen=True)
class Person:
    """A person whose photos become a LoRA and headshots."""

    name: str
    """The name of the person's folder in the studio's output."""
    photos: Path
    """The folder of photos."""
    agreed: bool = False
    """Whether the person has agreed; people who haven't are skipped."""
    class_word: str | None = None
    """A noun for the person, such as woman; None uses the studio's settings, as for the fields below."""
    trigger_word: str | None = None
    style_pack: str | None = None
    count: int | None = None
    """The number of pictures."""
    problem: str = ""
    """What is wrong with the person's entry; empty if it is valid."""

    def count_files(self) -> tuple[int, int]:
        """Count the photos and the drawn pictures without opening them."""
        return count_photos(self.photos), count_photos(self.photos / DRAWN_FOLDER)


_OWN_SETTINGS = ("agreed", *SETTINGS)


def read_people(place: str | os.PathLike[str]) -> list[Person]:
    """Read the people from a folder of folders, in the order of their names, or from a manifest, in its own order.

    Each folder has photos and a `person.toml`, such as `agreed = true` and `class_word = "woman"`. A manifest is a CSV file
    with the columns `name`, `photos`, `agreed` and optionally `class_word`, `trigger_word`, `style_pack` and `count`, or a file
    of JSON lines with these names. Its `photos` are relative to its own folder.

    A fault in one person's entry becomes that person's `problem`; all others are still made. Raises BadFile or BadConfig if
    nothing can be read, and for a name that two people have.
    """
    place = Path(place)
    if os.path.isdir(place):
        try:
            folders = sorted(path for path in place.iterdir() if os.path.isdir(path) and not path.name.startswith("."))
        except OSError as error:
            raise BadFile(f"{place}: cannot be read: {error.strerror or error}") from None
        people = [_person(folder.name, folder, _read_settings(folder)) for folder in folders]
    else:
        try:
            text = read_bytes(place, MAX_BYTES).decode("utf-8-sig")
        except UnicodeDecodeError:
            raise BadConfig(f"{place}: not UTF-8 text; save it again as UTF-8") from None
        rows = _json_lines(place, text) if place.suffix in (".jsonl", ".json") else _csv_rows(place, text)
        people = []
        for number, row in enumerate(rows, start=1):
            settings = dict(row)
            name, photos = settings.pop("name", None), settings.pop("photos", None)
            if not isinstance(name, str) or not isinstance(photos, str):
                raise BadConfig(f"{place}, person {number}: name and photos (the folder of photos) are required")
            people.append(_person(name, place.parent / photos, settings))
    if not people:
        raise BadConfig(
            f"{place}: no people found; give a folder with a folder for each person, or a manifest (.csv, .jsonl)"
        )
    valid = [person.name for person in people if not person.problem]
    names = Counter(name.casefold() for name in valid)  # `Anna` and `anna` may be the same folder.
    if twice := [name for name in valid if names[name.casefold()] > 1]:
        raise BadConfig(f"{place}: two people are called {twice[-1]!r}; choose another name for one")
    return people


def read_person(person: Person, on_warning: OnWarning) -> tuple[Sequence[Photo], Sequence[Photo]]:
    """Read a person's photos, and the pictures to train on too in the folder `drawn` beside them. Raises BadPhoto."""
    folder = person.photos / DRAWN_FOLDER
    photos = read_photos(person.photos, apart=folder, on_warning=on_warning)
    return photos, read_photos(folder, drawn=True, on_warning=on_warning) if count_photos(folder) else ()


def _read_settings(folder: Path) -> Mapping[str, Any] | str:
    """Return the settings in the folder's file, or what is wrong with the file."""
    file = folder / PERSON_FILE
    if os.access(folder, os.X_OK) and not os.path.lexists(file):
        return f"{PERSON_FILE} is missing; create it with agreed = true if the person has agreed"
    try:
        return read_person_file(file)[1]
    except FaceLoraError as error:
        return str(error)


def _csv_rows(place: Path, text: str) -> Iterable[Mapping[str, Any]]:
    rows = csv.DictReader(io.StringIO(text, newline=None), skipinitialspace=True)  # Lines may end in a single CR.
    try:
        if missing := {"name", "photos", "agreed"} - {*(rows.fieldnames or ())}:
            raise BadConfig(f"{place}: missing columns: {', '.join(sorted(missing))}")
        return [{key: value for key, value in row.items() if value not in ("", None)} for row in rows]
    except csv.Error as error:
        raise BadConfig(f"{place}: not a valid CSV file: {error}") from None


def _json_lines(place: Path, text: str) -> Iterable[Mapping[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise BadConfig(f"{place}, line {number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise BadConfig(f"{place}, line {number}: expected an object with name, photos and agreed")
        rows.append(row)
    return rows


def _person(name: str, photos: Path, settings: Mapping[str, Any] | str) -> Person:
    if problem := problem_of_name(name):
        shown = re.sub(r"[^\w .-]", "_", name).strip()[:50]
        return Person(shown or "without a name", photos, problem=problem)
    if isinstance(settings, str):
        return Person(name, photos, problem=settings)
    if unknown := settings.keys() - {*_OWN_SETTINGS}:
        problem = f"{', '.join(sorted(map(str, unknown)))}: unknown; choose from {', '.join(_OWN_SETTINGS)}"
        return Person(name, photos, problem=problem)
    try:
        return Person(name, photos, **{key: _value(key, value) for key, value in settings.items()})
    except (BadConfig, ValueError) as error:  # ValueError: a number of thousands of digits.
        return Person(name, photos, problem=str(error))


def _value(key: str, value: Any) -> Any:
    """Convert a setting from JSON, from TOML or from a text in a CSV file."""
    if key == "agreed":
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.strip().lower() in (*YES, *_NO):
            return value.strip().lower() in YES
        raise BadConfig(f"agreed = {value!r}: must be true or false")
    if key == "count":
        number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
        if isinstance(number, bool) or not isinstance(number, int):
            raise BadConfig(f"count = {value!r}: must be a whole number")
        check_count(number)
        return number
    if not isinstance(value, str) or not value.strip():
        raise BadConfig(f"{key} = {value!r}: must be a text")
    return value


def problem_of_name(name: str) -> str:
    """Return why the name cannot be a folder in the output; empty if it can."""
    if len(name.encode("utf-8", "replace")) > _MOST_NAME_BYTES:
        return f"the name is longer than {_MOST_NAME_BYTES} bytes; choose a shorter one for this person"
    if name.casefold() in (REPORT, PAGE):
        return f"{name!r} is the name of a studio file; choose another name for this person"
    if name.casefold() == DRAWN_FOLDER:
        return f"{name!r} is for a person's drawn pictures; move it into that person's folder, or choose another name"
    bad = not name.strip() or name != name.strip(" .") or set(name) & set('/\\:*?"<>|') or not is_text(name)
    if bad or RESERVED.fullmatch(name) or not name.isprintable():
        return f"{name!r} is not a valid folder name; choose another one for this person"
    return ""
