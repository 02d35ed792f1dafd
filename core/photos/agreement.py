"""What a person has agreed to: the `person.toml` among their photos, and the note beside each LoRA, which is a copy of it.

Who has agreed, and to what, stays in these files. A LoRA's metadata only state that the person has agreed, and until when.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any

from ..errors import BadConfig, FaceLoraError, check_length, one_line
from ..storage.files import EARLIER, read_bytes, write_text
from ..storage.plain_values import parse_toml, read_value

PERSON_FILE = "person.toml"
"""The file in a person's folder with that person's settings and agreement."""
NOTE = ".person.toml"
"""The ending of the note beside a LoRA, instead of the LoRA's own."""
SETTINGS = ("class_word", "trigger_word", "style_pack", "count")
"""The settings of a person in a studio."""
MAX_BYTES = 2**24
"""The largest list of people, and file about one, in bytes."""
YES = ("true", "yes", "1")
"""The texts that mean agreement where a file has no other values than texts."""
MOST_YEARS = 10
_DAYS = ("agreed_on", "agreed_until", "withdrawn")


@dataclass(frozen=True)
class Agreement:
    """Who has agreed, when, to what and until when, as the user has written it. Nothing is set if nothing was written."""

    agreed_by: str = ""
    agreed_on: date | None = None
    agreed_for: str = ""
    agreed_until: date | None = None
    """The last day, at most MOST_YEARS after `agreed_on`."""
    withdrawn: date | None = None
    copy_of: str = ""
    """The `person.toml` that a note is a copy of."""

    def __post_init__(self) -> None:
        first, last = self.agreed_on, self.agreed_until
        if (first is None) != (last is None):
            raise BadConfig("agreed_on and agreed_until need each other: give the first and the last day")
        if first and last and not (first <= last and _parts(last, MOST_YEARS) <= _parts(first)):
            raise BadConfig(f"agreed_until = {last}: must be at most {MOST_YEARS} years after agreed_on = {first}")

    def is_same(self, other: "Agreement") -> bool:
        """Whether both are about the same agreement, which may have been withdrawn or extended in one file only."""
        return (self.agreed_by, self.agreed_on) == (other.agreed_by, other.agreed_on)

    def check(self, file: str | os.PathLike[str]) -> None:
        """Raise BadConfig, with the name of the agreement's file, if it has been withdrawn or has ended."""
        if self.withdrawn:
            raise BadConfig(f"{file}: the person has withdrawn the agreement (withdrawn = {self.withdrawn})")
        if self.agreed_until and self.agreed_until < date.today():
            raise BadConfig(
                f"{file}: the agreement has ended (agreed_until = {self.agreed_until}); ask the person again"
            )


def check_agreed(*folders: str | os.PathLike[str]) -> Agreement:
    """Return the agreement in the `person.toml` of these folders, and of several the one that ends first.

    Raises BadConfig if a file says that the person has not agreed, no longer agrees, or if it can't be read.
    """
    found = [Agreement()]
    for file in (Path(folder) / PERSON_FILE for folder in folders):
        agreement, others = read_person_file(file)
        agreed = others.get("agreed", True)
        if agreed is not True and str(agreed).strip().lower() not in YES:
            raise BadConfig(
                f"{file}: the person has not agreed (agreed = {agreed!r}); train only people who have agreed to it"
            )
        agreement.check(file)
        if agreement != Agreement():
            found.append(replace(agreement, copy_of=os.path.abspath(file)))
    return min(found, key=lambda one: (one == Agreement(), one.agreed_until or date.max))


def agreement_of(lora: str | os.PathLike[str]) -> Agreement:
    """Return the agreement that counts for a LoRA. Raises BadConfig if it has been withdrawn or has ended."""
    file = agreement_file(lora)
    agreement, _ = read_person_file(file)
    agreement.check(file)
    return agreement


def agreement_file(lora: str | os.PathLike[str]) -> Path:
    """Return the note beside a LoRA, or the file that it was copied from if that still has this agreement.

    Intermediate LoRAs and those in `earlier` share the note of their LoRA.
    """
    path = Path(lora)
    folders = [path.parent, *([path.parent.parent] if path.parent.name == EARLIER else [])]
    names = [f"{stem}{NOTE}" for stem in (path.stem, re.sub(r"-step\d+$", "", path.stem))]
    places = [folder / name for folder in folders for name in names]
    file = next(filter(os.path.lexists, places), places[0])
    note, _ = read_person_file(file)
    if note.copy_of and not note.withdrawn:
        original, _ = read_person_file(Path(note.copy_of))
        if original.is_same(note):
            return Path(note.copy_of)
    return file


def person_file(place: str | os.PathLike[str]) -> Path:
    """Return the `person.toml` of a folder of photos, or the note beside a LoRA."""
    return Path(place) / PERSON_FILE if os.path.isdir(place) else Path(place).with_suffix(NOTE)


def keep_agreement(lora: Path, agreement: Agreement) -> Agreement:
    """Copy the agreement of the photos into the note beside a LoRA, if there is one, and return the agreement that counts.

    Raises BadConfig if it has been withdrawn in the note.
    """
    file = person_file(lora)
    before, _ = read_person_file(file)
    if agreement == Agreement() or (before.withdrawn and before.is_same(agreement)):
        return agreement_of(lora)
    if before != agreement:
        write_person_file(
            file, {"agreed": True} | {one.name: getattr(agreement, one.name) for one in fields(Agreement)}
        )
    return agreement


def read_person_file(file: Path) -> tuple[Agreement, dict[str, Any]]:
    """Return the agreement in a `person.toml` or a note, and its other values unchecked; nothing if there is no such file.

    Raises BadConfig, with the file and the value, for what isn't valid.
    """
    return _read(file) if os.path.lexists(file) else (Agreement(), {})


def write_agreement(file: Path, values: Mapping[str, Any]) -> None:
    """Write what a person has agreed to, or only a withdrawal, as `write_person_file` does.

    An agreement begins today if neither the values nor the file have its first day. Raises BadConfig if it has no last day.
    """
    if values.keys() - {"withdrawn"}:
        before, _ = read_person_file(file)
        values = {"agreed": True, "agreed_on": before.agreed_on or date.today()} | {**values}
    write_person_file(file, values)


def write_person_file(file: Path, values: Mapping[str, Any]) -> None:
    """Set these values in a `person.toml` or a note, and keep the other lines. Empty values are left out.

    Raises BadConfig, and writes nothing, if the file wouldn't be valid.
    """
    read_person_file(file)
    before = file.read_text("utf-8-sig").splitlines() if file.exists() else []
    lines = [line for line in before if line.partition("=")[0].strip() not in values]
    given = {key: value for key, value in values.items() if value}
    lines += [f"{key} = {as_day(key, value) if key in _DAYS else json.dumps(value)}" for key, value in given.items()]
    _read(file, "\n".join(lines))
    write_text(file, "\n".join([*lines, ""]))


def as_day(name: str, value: Any) -> date:
    """Return a day from a date or a text. Raises BadConfig, with the name of the value, for anything else."""
    with suppress(ValueError):
        return date.fromisoformat(str(value))
    raise BadConfig(f"{name} = {str(value)[:80]!r}: expected a day, such as 2026-12-31")


def _read(file: Path, text: str | None = None) -> tuple[Agreement, dict[str, Any]]:
    try:
        values = parse_toml(read_bytes(file, MAX_BYTES, name=PERSON_FILE) if text is None else text)
        known = [one.name for one in fields(Agreement)]
        if unknown := values.keys() - {"agreed", *known, *SETTINGS}:
            key = min(unknown)
            allowed = ", ".join(("agreed", *known[:-1], *SETTINGS))
            raise BadConfig(f"{key} = {values[key]!r}: unknown; choose from {allowed}")
        given = {name: _value(name, values.pop(name)) for name in known if name in values}
        return Agreement(**given), values
    except FaceLoraError as error:
        raise BadConfig(one_line(f"{file}: {error}")) from None


def _value(name: str, value: Any) -> Any:
    if name in _DAYS:
        return as_day(name, value)
    check_length(name, text := read_value(name, value, str))
    return text


def _parts(day: date, years: int = 0) -> tuple[int, int, int]:
    """Return the parts of the day that many years earlier, which the calendar may not have: 29 February."""
    return day.year - years, day.month, day.day
