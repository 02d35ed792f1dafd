"""What has come of a person of a studio: made, or found where it has been made before, and kept in the person's folder.

Content decides: someone whose photos, wishes, base model and settings are unchanged is found, and an interrupted one goes
on. All that is kept of a person lies in that person's folder, so that it can be deleted whole.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..config import RecipeName
from ..device import device_and_dtype
from ..errors import BadConfig, BadFile, FaceLoraError, one_line
from ..models.base import Base
from ..photos import Photo, count_photos, read_photos
from ..pictures.headshot import Headshot
from ..pictures.style_pack import StylePack
from ..storage.cache_folder import cache_in, content_key
from ..storage.files import make_folder, read_bytes, read_json, write_text
from ..storage.locks import locked
from ..training.callbacks import NO_CALLBACKS, Callbacks
from ..training.recipes import recipe_config
from ..training.training_adapter import TrainingAdapter
from .cost import Cost, Stopwatch, cost_of
from .people import Person
from .person import Order, Outcome, check, make

RECORD = "studio.json"
"""A person's record in the person's folder."""
CACHE = ".facelora-cache"
"""What is kept of an unfinished person; `.cache` would be any user's, and with it the user's folder a person's."""
Status = Literal["made", "found", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)
NONE_ALIKE = "none alike"
"""What is said of someone of whom all is made, but no picture is like enough to the person."""
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
    training_adapter: TrainingAdapter | None = None
    """On in the steps of everybody's training alone."""

    def order(self, person: Person, photos: int, base: Base, callbacks: Callbacks = NO_CALLBACKS) -> Order:
        """The order for a person with that number of photos. Raises BadConfig for a wish that cannot be met."""
        own = {"class_word": person.class_word, "trigger_word": person.trigger_word}
        given = {**self.settings, **{name: value for name, value in own.items() if value is not None}}
        config = recipe_config(self.recipe, base, photos, given, callbacks.on_warning)
        name = person.style_pack or self.style_pack
        if name not in self.packs:
            raise BadConfig(f"style_pack = {name!r}: choose one of {', '.join(sorted(self.packs))}")
        count = person.count or self.count
        return Order(person.name, config, self.packs[name], count, self.seed, self.size, self.training_adapter)


@dataclass(frozen=True)
class Result:
    """What has come of a person."""

    name: str
    status: Status
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
    leakage: float | None = None
    """How much the class has come to look like the person, measured in the training; None where it was not."""
    cost: Cost | None = None
    """What making it has cost; None where it failed."""

    @property
    def told(self) -> str:
        """What a person is told of the status: of someone made or found of whom no picture is alike, this."""
        return NONE_ALIKE if self.reason and self.status != "failed" else self.status

    @property
    def kept_of(self) -> str:
        """How many of its pictures are kept, such as "4 of 20"; of pictures that could not be ranked that they are not."""
        ranked = self.kept or self.reason
        return f"{self.kept} of {len(self.pictures)}" if ranked else f"{len(self.pictures)}, not ranked"

    @property
    def seconds(self) -> float:
        """How long it took to make."""
        return sum(self.cost.seconds.values()) if self.cost else 0.0


def failed(person: Person, error: Exception) -> Result:
    """The result of a person whose making has raised the error."""
    reason = str(error) if isinstance(error, FaceLoraError) else one_line(f"{type(error).__name__}: {error}")
    return Result(person.name, "failed", reason)


def find(person: Person, base: Base, output: Path, terms: Terms) -> Result | None:
    """The result of someone of whom all has been made; None where something is to do.

    Photos are read only where there is something that has been made. Raises FaceLoraError for what keeps anything from being
    made.
    """
    _check_agreed(person)
    if not (output / person.name / RECORD).exists():
        return None
    return _asked(person, base, output, terms, NO_CALLBACKS).recorded(output)


def find_or_make(
    person: Person,
    base: Base,
    output: Path,
    terms: Terms,
    device: torch.device | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Result:
    """The result of a person, whose files lie in the folder of that name in `output`. Raises FaceLoraError.

    InUse is raised while another run is making the person.
    """
    watch = Stopwatch()
    asked = _asked(person, base, output, terms, callbacks)
    if (found := asked.recorded(output)) is not None:
        return found
    number = count_photos(person.photos)
    planned = _key(terms.order(person, number, base), number, base)
    callbacks = watch.listening(callbacks)
    ready = check(asked.photos, base, asked.order.config, callbacks)
    watch.enter("encode")
    folder = output / person.name
    make_folder(folder)
    with locked(folder / RECORD), cache_in(folder / CACHE):
        outcome = make(ready, base, asked.order, folder, device=device, callbacks=callbacks)
    used = device_and_dtype(asked.order.config, device)[0]
    result = _result(person, outcome, output, watch.cost(used, base.identity, len(asked.photos)))
    record = {"result": asdict(result), "digest": _digest(asked.key, result, output), "planned": planned}
    write_text(folder / RECORD, json.dumps(record, indent=1))
    shutil.rmtree(folder / CACHE, ignore_errors=True)  # nothing of it is wanted any more
    return result


def is_made(order: Order, photos: int, base: Base, output: Path) -> bool:
    """Whether the record of a person holds this order on the same base, of as many photos, none of which is opened."""
    record = output / order.name / RECORD
    try:
        return record.exists() and read_json(record)["planned"] == _key(order, photos, base)
    except (FaceLoraError, TypeError, KeyError):  # damaged: it is made anew
        return False


@dataclass(frozen=True)
class _Asked:
    """What is asked for a person."""

    photos: Sequence[Photo]
    order: Order
    key: str
    """A hash that is equal when the same LoRA would be trained, and the same pictures drawn."""

    def recorded(self, output: Path) -> Result | None:
        """The result that the person's record holds, where it is of this, and its files are there and as they were made."""
        record = output / self.order.name / RECORD
        if not record.exists():
            return None
        try:
            values = read_json(record)
            result = result_of(values["result"])
            unchanged = values["digest"] == _digest(self.key, result, output)
            return replace(result, status="found") if unchanged else None
        except (FaceLoraError, TypeError, KeyError):  # damaged: it is made anew, of which most is found
            return None


def _check_agreed(person: Person) -> None:
    if person.problem:
        raise BadConfig(person.problem)
    if not person.agreed:
        raise BadConfig("has not agreed (agreed = true says so)")


def _asked(person: Person, base: Base, output: Path, terms: Terms, callbacks: Callbacks) -> _Asked:
    _check_agreed(person)
    photos = read_photos(person.photos, on_warning=callbacks.on_warning)
    order = terms.order(person, len(photos), base, callbacks)
    folder = output / person.name
    if folder.is_dir() and any(folder.iterdir()) and not (folder / RECORD).exists() and not (folder / CACHE).exists():
        raise BadFile(f"{folder}: holds files of others; choose another output, or another name for this person")
    return _Asked(photos, order, _key(order, [photo.fingerprint for photo in photos], base))


def _key(order: Order, photos: Sequence[str] | int, base: Base) -> str:
    """A hash that is equal where the same is ordered, on the same base, of photos with these fingerprints or of as many."""
    adapter = [order.training_adapter.digest] if order.training_adapter else []
    return content_key("studio", repr(order.config), order.jobs(base), photos, base.identity, *adapter)


def _result(person: Person, outcome: Outcome, output: Path, cost: Cost) -> Result:
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
        outcome.trained.leakage(),
        cost,
    )


def _seen_from(output: Path, path: Path) -> str:
    return path.relative_to(output).as_posix()


def _digest(key: str, result: Result, output: Path) -> str:
    """A hash of the result of that key and of its files. Raises BadFile where one is not there, or is no regular file."""
    files = [read_bytes(output / file, _MOST_BYTES) for file in (result.lora or "", *result.pictures)]
    return content_key(key, result, *(hashlib.sha256(file).hexdigest() for file in files))


def result_of(values: Any) -> Result:
    """The result of which the values were read from a file. Raises TypeError or KeyError where it is damaged."""
    cost = None if values["cost"] is None else cost_of(values["cost"])
    result = Result(**{**values, "pictures": tuple(values["pictures"]), "cost": cost})
    texts = (result.name, result.status, result.reason, result.lora or "", *result.pictures)
    numbers = (result.kept, result.likeness or 0.0, result.leakage or 0.0)
    if not all(isinstance(one, str) for one in texts) or not all(isinstance(one, (int, float)) for one in numbers):
        raise TypeError("a value is of another type")
    if result.status not in STATUSES:  # it is written into a page
        raise TypeError(f"status = {result.status!r}")
    return result
