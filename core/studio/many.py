"""Many people, one after the other on one base model that is loaded once: each one's LoRA and gallery, and a report.

Content decides: someone whose photos, wishes, base model and settings are unchanged is found, and an interrupted one goes
on. What fails, fails alone. All that is kept of a person lies in that person's folder, so that it can be deleted whole.
"""

import hashlib
import html
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import RecipeName
from ..errors import BadConfig, BadFile, FaceLoraError
from ..models.base import Base
from ..photos import Photo, read_photos
from ..pictures.headshot import Headshot
from ..pictures.style_pack import StylePack
from ..storage.cache_folder import cache_in, content_key
from ..storage.files import make_folder, read_bytes, read_json, write_text
from ..storage.locks import locked
from ..training.callbacks import NO_CALLBACKS, Callbacks
from ..training.recipes import recipe_config
from .people import Person
from .person import Order, Outcome, check, make

RECORD, REPORT, PAGE = "studio.json", "report.json", "report.html"
"""A person's record in the person's folder; the report on all of them in the studio's output, as JSON and as a page."""
_CACHE = ".facelora-cache"
"""What is kept of an unfinished person; `.cache` would be any user's, and with it the user's folder a person's."""
_MOST_BYTES = 2**33
"""The most that a LoRA or a picture may have."""


@dataclass(frozen=True)
class Terms:
    """What everybody gets who has no wishes of their own."""

    packs: Mapping[str, StylePack]
    """The style packs to choose from, by name."""
    style_pack: str
    count: int = 20
    seed: int = 1
    size: tuple[int, int] | None = None
    """Width and height of the pictures in pixels; None: what each style and the base come to."""
    recipe: RecipeName = "balanced"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the training that differ from the recipe's."""

    def order(self, person: Person, photos: int, base: Base, callbacks: Callbacks = NO_CALLBACKS) -> Order:
        """The order for a person with that number of photos. Raises BadConfig for a wish that cannot be met."""
        own = {"class_word": person.class_word, "trigger_word": person.trigger_word}
        given = {**self.settings, **{name: value for name, value in own.items() if value is not None}}
        config = recipe_config(self.recipe, base, photos, given, callbacks.on_warning)
        name = person.style_pack or self.style_pack
        if name not in self.packs:
            raise BadConfig(f"style_pack = {name!r}: choose one of {', '.join(sorted(self.packs))}")
        return Order(person.name, config, self.packs[name], person.count or self.count, self.seed, self.size)


@dataclass(frozen=True)
class Result:
    """What has come of a person."""

    name: str
    status: Literal["made", "found", "failed"]
    """`found`: all of it had been made before, and nothing was done now."""
    reason: str = ""
    """Why it failed, or what would help where no picture is like enough to the person."""
    lora: str | None = None
    """The LoRA's file, seen from the studio's output, as are the pictures; None where it failed."""
    pictures: tuple[str, ...] = ()
    """All pictures, most alike first where likeness could be measured."""
    kept: int = 0
    """How many of them are kept: those that are most alike, and the person."""
    likeness: float | None = None
    """The mean likeness of the kept pictures, of all where none is kept; None where it was not measured."""
    seconds: float = 0.0
    """How long it took to make."""


def run(
    people: Iterable[Person],
    base: Base,
    output: Path,
    terms: Terms,
    *,
    device: torch.device | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Iterator[Result]:
    """The result of each person, as soon as it is there; after each the report in `output` is written anew.

    A person's files lie in the folder of that name in `output`. Errors of one person are that person's result. What is not
    of the project's own errors, such as an interrupt that a callback raises, ends the run; called again it goes on there.
    """
    make_folder(output)
    results: list[Result] = []
    for person in people:
        try:
            result = _one(person, base, output, terms, device, callbacks)
        except FaceLoraError as error:
            result = Result(person.name, "failed", str(error))
        results.append(result)
        write_report(output, results)
        yield result


def _one(
    person: Person, base: Base, output: Path, terms: Terms, device: torch.device | None, callbacks: Callbacks
) -> Result:
    if person.problem:
        raise BadConfig(person.problem)
    if not person.agreed:
        raise BadConfig("has not agreed (agreed = true says so)")
    photos = read_photos(person.photos, on_warning=callbacks.on_warning)
    order = terms.order(person, len(photos), base, callbacks)
    folder = output / person.name
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).exists() and not (folder / _CACHE).exists():
        raise BadFile(f"{folder}: holds files of others; choose another output, or another name for this person")
    key, record = _key(order, photos, base), folder / RECORD
    if (found := _recorded(record, key, output)) is not None:
        return replace(found, status="found")
    started = time.monotonic()
    report = check(photos, base, order.config, callbacks)
    make_folder(folder)
    with locked(record), cache_in(folder / _CACHE):
        outcome = make(report, base, order, folder, device=device, callbacks=callbacks)
    result = _result(person, outcome, output, time.monotonic() - started)
    write_text(record, json.dumps({"result": asdict(result), "digest": _digest(key, result, output)}, indent=1))
    shutil.rmtree(folder / _CACHE, ignore_errors=True)  # nothing of it is wanted any more
    return result


def _key(order: Order, photos: Sequence[Photo], base: Base) -> str:
    """A hash that is equal when the same LoRA would be trained, and the same pictures drawn."""
    return content_key(
        "studio", repr(order.config), order.jobs(base), [photo.fingerprint for photo in photos], base.identity
    )


def _result(person: Person, outcome: Outcome, output: Path, seconds: float) -> Result:
    shots: Sequence[Headshot] = outcome.shots
    kept = [shot for shot in shots if shot.kept]
    scores = [shot.likeness for shot in kept or shots if shot.likeness is not None]
    return Result(
        person.name,
        "made",
        " ".join(outcome.advice),
        _seen_from(output, outcome.trained.path),
        tuple(_seen_from(output, shot.path) for shot in shots),
        len(kept),
        sum(scores) / len(scores) if scores else None,
        round(seconds, 1),
    )


def _seen_from(output: Path, path: Path) -> str:
    return path.relative_to(output).as_posix()


def _recorded(record: Path, key: str, output: Path) -> Result | None:
    """The result that the record holds, where it is of that key, and its files are there and as they were made."""
    if not record.exists():
        return None
    try:
        values = read_json(record)
        result = _result_of(values["result"])
        return result if values["digest"] == _digest(key, result, output) else None
    except (FaceLoraError, TypeError, KeyError):  # damaged: it is made anew, of which most is found
        return None


def _digest(key: str, result: Result, output: Path) -> str:
    """A hash of the result of that key and of its files. Raises BadFile where one is not there, or is no regular file."""
    files = [read_bytes(output / file, _MOST_BYTES) for file in (result.lora or "", *result.pictures)]
    return content_key(key, result, *(hashlib.sha256(file).hexdigest() for file in files))


def _result_of(values: Any) -> Result:
    """The result of which the values were read from a file. Raises TypeError or KeyError where it is damaged."""
    result = Result(**{**values, "pictures": tuple(values["pictures"])})
    texts = (result.name, result.status, result.reason, result.lora or "", *result.pictures)
    numbers = (result.kept, result.seconds, result.likeness or 0.0)
    if not all(isinstance(one, str) for one in texts) or not all(isinstance(one, (int, float)) for one in numbers):
        raise TypeError("a value is of another type")
    return result


def forget(name: str, output: Path) -> int:
    """The number of files deleted: all that the studio keeps of a person, and the person's line in the report.

    Photos elsewhere, such as those that the LoRA was trained on, are not the studio's and stay. Raises BadConfig when there
    is no such person in the output, InUse while the person is being made, and BadFile when something cannot be deleted, or
    the report is damaged: then nothing is.
    """
    folders = {path.parent.name: path.parent for path in output.glob(f"*/{RECORD}")}
    folders |= {path.parent.name: path.parent for path in output.glob(f"*/{_CACHE}")}
    if name not in folders:
        raise BadConfig(f"{output}: has nothing of {name!r}; it has {', '.join(sorted(folders)) or 'nobody'}")
    with locked(folders[name] / RECORD):  # not while it is deleted: Windows deletes no lock that is held
        left = _reported(output / REPORT)
    count = sum(path.is_file() for path in folders[name].rglob("*"))
    try:
        shutil.rmtree(folders[name])
    except OSError as error:
        raise BadFile(f"{error.filename}: cannot be deleted: {error.strerror or error}") from None
    if left:
        write_report(output, [one for one in left if one.name != name])
    return count


def _reported(report: Path) -> list[Result]:
    """The results in a report; none where there is no report. Raises BadFile when it is damaged."""
    try:
        return [_result_of(one) for one in read_json(report)["people"]] if report.exists() else []
    except (TypeError, KeyError):
        raise BadFile(f"{report}: is damaged; delete it, and the next run of the studio writes it anew") from None


def write_report(output: Path, results: Sequence[Result]) -> None:
    """Writes the report on the results into the output, as JSON and as a page: what failed first, then the least alike."""

    def order(result: Result) -> tuple[bool, float]:
        return result.status != "failed", -1.0 if result.likeness is None else result.likeness

    ranked = sorted(results, key=order)
    counts = {status: sum(one.status == status for one in ranked) for status in ("made", "found", "failed")}
    summary = {**counts, "seconds": round(sum(one.seconds for one in ranked if one.status == "made"), 1)}
    write_text(output / REPORT, json.dumps({**summary, "people": [asdict(one) for one in ranked]}, indent=1))
    rows = "\n".join(_row(one) for one in ranked)
    title = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    write_text(output / PAGE, _PAGE.replace("<!--TITLE-->", title).replace("<!--ROWS-->", rows))


def _row(result: Result) -> str:
    name = html.escape(result.name)
    shown = name
    if result.lora:
        shown = f'<a href="{html.escape(Path(result.lora).parent.as_posix())}/gallery.html">{name}</a>'
    likeness = "" if result.likeness is None else f"{result.likeness:.2f}"
    kept = f"{result.kept} of {len(result.pictures)}" if result.pictures else ""
    seconds = f"{result.seconds:.0f}" if result.seconds else ""
    cells = (shown, result.status, likeness, kept, seconds, html.escape(result.reason))
    return f'<tr class="{result.status}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Studio: <!--TITLE--></title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
  table { border-collapse: collapse; width: 100%; }
  th, td { border-bottom: 1px solid #ddd; padding: .4rem .6rem; text-align: left; vertical-align: top; }
  .failed td:nth-child(2) { color: #b00020; }
</style>
<h1><!--TITLE--></h1>
<table><thead><tr><th>person<th>status<th>likeness<th>kept<th>seconds<th>reason</thead><tbody>
<!--ROWS-->
</tbody></table></html>
"""
