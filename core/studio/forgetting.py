"""Delete everything that a studio keeps of one person, so that a killed call can be repeated until nothing is left.

What makes a folder the person's is deleted after everything else in it, then the note of the agreement, and the line in the
report after the folder.
"""

import os
from collections.abc import Set
from pathlib import Path

from ..errors import BadConfig, BadFile, InUse
from ..photos.agreement import NOTE
from ..storage.files import check_deleted, delete
from ..storage.locks import alone, locked
from .people import REPORT
from .report import delete_leftovers, read_report, write_report
from .result import CACHE, RECORD, is_foreign


def forget(name: str, output: str | os.PathLike[str]) -> int:
    """Delete everything that the studio has of a person, including the report's line, and return the number of files.

    Photos elsewhere, such as those that the LoRA was trained on, aren't the studio's and are kept. So is what links in the
    person's folder lead to; if the folder itself is a link, its target is deleted too.

    If something cannot be deleted, the rest is, except the report's line, and BadFile names the first file that is left.
    Another call continues. Raises BadFile, and deletes nothing, if the report is damaged, or if it has the person's LoRA but
    nothing shows that the folder is theirs. Raises InUse while people of this output are being made, and BadConfig if the
    output doesn't have the person.
    """
    output = Path(output)
    try:
        names = os.listdir(f"{output}/.")  # Also raises for a folder that may be read, but not entered.
    except OSError as error:
        raise BadFile(f"{output}: cannot be read: {error.strerror or error}") from None
    try:
        with alone(output / REPORT):
            return _forget(name, output, {one for one in names if _is_persons(output / one)})
    except InUse as error:
        raise InUse(f"{output}: {name!r} can't be deleted while people are being made here: {error}") from None


def _forget(name: str, output: Path, folders: Set[str]) -> int:
    lines, left = read_report(output), list[str]()
    delete_leftovers(output, left)
    if name not in (known := folders | {line.name for line in lines}):
        check_deleted(0, left)
        raise BadConfig(
            f"{output}: {name!r} was not found; this output contains {', '.join(sorted(known)) or 'nobody'}"
        )
    folder = output / name
    if name not in folders and os.path.lexists(folder) and any(line.lora for line in lines if line.name == name):
        raise BadFile(
            f"{folder}: without {RECORD}, this folder may be somebody else's; delete it, and repeat the command"
        )
    count = _delete(folder, left) if name in folders else 0
    check_deleted(count, left)
    if any(line.name == name for line in lines):
        try:
            write_report(output, [line for line in lines if line.name != name], page_first=True)
        except BadFile as error:
            raise BadFile(f"{error}; the report still has {name!r}") from None
    return count


def _is_persons(folder: Path) -> bool:
    """Return whether a folder is a person's, or may be what a killed run or call has left of one."""
    try:
        return not is_foreign(folder) if os.path.isdir(folder) else folder.is_symlink() and not os.path.exists(folder)
    except OSError:
        return True  # It is only deleted if this is the name to delete, which then fails with the reason.


def _delete(folder: Path, left: list[str]) -> int:
    """Delete a person's folder, and return the number of files. Faults are added to `left`, as by `delete`."""
    place = Path(os.path.realpath(folder))
    if os.path.isdir(place):
        with locked(place / RECORD):  # Windows cannot delete a held lock: release it first.
            pass
    inner: list[Path] = []
    for one in (place, place / CACHE):
        try:
            inner += one.iterdir() if one.is_dir() else ()
        except OSError as error:
            left.append(f"{one}: cannot be deleted: {error.strerror or error}")
    notes = [one for one in inner if one.name.endswith(NOTE)]
    count = sum(delete(one, left) for one in inner if one.name not in (RECORD, CACHE) and one not in notes)
    for one in (place / CACHE, place / RECORD, *notes, place, folder):
        if not left:
            count += delete(one, left)
    return count
