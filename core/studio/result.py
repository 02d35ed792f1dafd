"""The result of a person in a studio: newly made, or found from an earlier run, and saved in the person's folder.

Content decides: a person whose photos, settings and base model are unchanged is found, and an interrupted one continues. All
files of a person are in that person's folder, so that everything can be deleted.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..config import RecipeName
from ..device import usable_device
from ..errors import BadConfig, BadFile, FaceLoraError, InUse, one_line
from ..faces import LIKENESS
from ..models.base import Base
from ..photos import Photo, check_agreed
from ..photos.agreement import NOTE
from ..pictures.style_pack import StylePack
from ..progress import READING, OnProgress
from ..storage.cache_folder import cache_in, content_key
from ..storage.files import make_folder, read_bytes, read_json, write_text
from ..storage.locks import lock_of, locked
from ..storage.plain_values import read_as
from ..training.callbacks import NO_CALLBACKS, Callbacks
from ..training.recipes import recipe_config
from ..training.training_adapter import TrainingAdapter
from .cost import Cost, Stopwatch
from .people import Person, read_person
from .person import Order, ready_photos, train_and_draw

RECORD = "studio.json"
"""A person's record in the person's folder."""
CACHE = ".facelora-cache"
"""The folder for an unfinished person. `.cache` could belong to anyone, and would make a user's folder look like a person's."""
Status = Literal["made", "found", "failed"]
STATUSES: tuple[Status, ...] = get_args(Status)
NONE_ALIKE = "none alike"
"""The status of a person who is finished, but has no picture that is like them."""
_MOST_BYTES = 2**33
"""The largest size of a LoRA or a picture, in bytes."""


@dataclass(frozen=True)
class Terms:
    """The settings for everyone who has no settings of their own."""

    packs: Mapping[str, StylePack]
    """The style packs to choose from, by name."""
    style_pack: str
    count: int = 20
    seed: int = 1
    size: tuple[int, int] | None = None
    """Width and height of the pictures in pixels; None derives them from each style and the base model."""
    recipe: RecipeName = "balanced"
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Training settings that override the recipe's."""
    training_adapter: TrainingAdapter | None = None
    """An adapter that is applied in everyone's training steps only."""
    drawn_on: Base | None = None
    """Another base model of the same family to draw everyone's pictures on."""

    def identity(self, base: Base) -> str:
        """Return a text that is equal if the same base models are used."""
        return " ".join(one.identity for one in (base, self.drawn_on) if one)

    def compute_hashes(self, base: Base, on_progress: OnProgress) -> None:
        """Compute the identity in advance: the base models' files are read."""
        for model in (base, self.drawn_on):
            if model:
                model.compute_hashes(on_progress)

    def order(self, person: Person, photos: int, base: Base, callbacks: Callbacks = NO_CALLBACKS) -> Order:
        """Return the order for a person with that number of photos. Raises BadConfig for an invalid setting."""
        own = {"class_word": person.class_word, "trigger_word": person.trigger_word}
        given = {**self.settings, **{name: word for name, word in own.items() if word is not None}}
        config = recipe_config(self.recipe, base, photos, given, callbacks.on_warning)
        name = person.style_pack or self.style_pack
        if name not in self.packs:
            raise BadConfig(f"style_pack = {name!r}: choose one of {', '.join(sorted(self.packs))}")
        return Order(
            person.name, config, self.packs[name], person.count or self.count, self.seed, self.size,
            self.training_adapter, self.drawn_on, person.agreed,
        )  # fmt: skip


@dataclass(frozen=True)
class Result:
    """The result of a person."""

    name: str
    status: Status
    """`found`: everything had been made before, and nothing was done now."""
    reason: str = ""
    """Why it failed, or how to improve if no picture is like the person."""
    lora: str | None = None
    """The LoRA's file, relative to the studio's output, as are the pictures; None if it failed."""
    pictures: tuple[str, ...] = ()
    """All pictures, most alike first where likeness could be measured."""
    kept: int = 0
    """The number of pictures kept: the most alike that show the person."""
    likeness: float | None = None
    """The mean likeness of the kept pictures, or of all if none is kept; None if it was not measured."""
    leakage: float | None = None
    """How much the class has come to look like the person, measured in training; None if it was not measured."""
    cost: Cost | None = None
    """The cost of making it; None if it failed."""
    in_use: bool = field(default=False, repr=False)  # The digests of earlier records are of a repr without it.
    """Whether it failed because another run is making the person."""

    @property
    def shown_status(self) -> str:
        """The displayed status: "none alike" if the person was made or found, but no picture is like them."""
        return NONE_ALIKE if self.reason and self.status != "failed" else self.status

    @property
    def kept_of(self) -> str:
        """How many pictures are kept, such as "4 of 20", or that they aren't ranked."""
        ranked = self.kept or self.reason
        return f"{self.kept} of {len(self.pictures)}" if ranked else f"{len(self.pictures)}, not ranked"

    @property
    def seconds(self) -> float:
        """How long it took to make."""
        return sum(self.cost.seconds.values()) if self.cost else 0.0


def failed(person: Person, error: Exception) -> Result:
    """Return the result of a person whose job raised the error."""
    reason = str(error) if isinstance(error, FaceLoraError) else one_line(f"{type(error).__name__}: {error}")
    return Result(person.name, "failed", reason, in_use=isinstance(error, InUse))


def find(person: Person, base: Base, output: Path, terms: Terms) -> Result | None:
    """Return the result of a person who is finished; None if something is left to do.

    Photos are read only if there is an earlier result. Raises FaceLoraError for anything that keeps the person from being made.
    """
    check_person(person, output)
    if not (output / person.name / RECORD).exists():
        return None
    _, _, order, key = _read_order(person, base, output, terms, NO_CALLBACKS)
    return _recorded(order, key, output)


def find_or_make(
    person: Person,
    base: Base,
    output: Path,
    terms: Terms,
    device: torch.device | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
    wait: float = 0.0,
) -> Result:
    """Return the result of a person, whose files are in the folder of that name in `output`. Raises FaceLoraError.

    Raises InUse if another run is making the person, for longer than `wait` seconds.
    """
    watch = Stopwatch()
    photos, drawn, order, key = _read_order(person, base, output, terms, callbacks)
    if (found := _recorded(order, key, output)) is not None:
        return found
    number, of_drawn = person.count_files()
    planned = terms.order(person, number, base).key(number, base, of_drawn)
    callbacks = watch.listening(callbacks)
    ready = ready_photos(photos, base, order.config, callbacks, drawn)
    watch.enter("encode")
    folder = output / person.name
    make_folder(folder)
    with locked(folder / RECORD, wait), cache_in(folder / CACHE):
        outcome = train_and_draw(ready, base, order, folder, device=device, callbacks=callbacks)
    kept = [shot for shot in outcome.shots if shot.kept]
    scores = [shot.likeness for shot in kept or outcome.shots if shot.likeness is not None]
    result = Result(
        person.name,
        "made",
        " ".join(outcome.advice),
        outcome.trained.path.relative_to(output).as_posix(),
        tuple(shot.path.relative_to(output).as_posix() for shot in outcome.shots),
        len(kept),
        sum(scores) / len(scores) if scores and outcome.measure == LIKENESS else None,
        outcome.trained.leakage(),
        watch.cost(usable_device(device), terms.identity(base), len(photos) + len(drawn)),
    )
    record = {"result": asdict(result), "digest": _hash_with_files(key, result, output), "planned": planned}
    write_text(folder / RECORD, json.dumps(record, indent=1))
    shutil.rmtree(folder / CACHE, ignore_errors=True)  # It is no longer needed.
    return result


def is_made(order: Order, photos: int, drawn: int, base: Base, output: Path) -> bool:
    """Return whether the person's record matches this order on the same base model and numbers of photos and drawn pictures,
    without opening them."""
    record = output / order.name / RECORD
    try:
        return record.exists() and read_json(record)["planned"] == order.key(photos, base, drawn)
    except (FaceLoraError, TypeError, KeyError):  # A damaged record is replaced.
        return False


def _recorded(order: Order, key: str, output: Path) -> Result | None:
    """Return the result in the person's record, if it has this key and its files exist and are unchanged."""
    record = output / order.name / RECORD
    if not record.exists():
        return None
    try:
        values = read_json(record)
        result = read_as(Result, values["result"])
        return replace(result, status="found") if values["digest"] == _hash_with_files(key, result, output) else None
    except (FaceLoraError, TypeError, KeyError):  # A damaged record is replaced; most results are found.
        return None


def check_person(person: Person, output: Path) -> None:
    """Raise BadConfig if the person's entry has a fault, or if they have not agreed.

    Raises BadFile if the person's folder in `output` has files, but is nobody's.
    """
    if person.problem:
        raise BadConfig(person.problem)
    if not person.agreed:
        raise BadConfig("the person has not agreed; set agreed = true if they have")
    check_agreed(person.photos)  # A list of people may say otherwise.
    if is_foreign(folder := output / person.name):
        raise BadFile(
            f"{folder}: this folder has files of another program; choose another output, or another name for this person"
        )


def is_foreign(folder: Path) -> bool:
    """Return whether a folder has files, but nothing that makes it a person's. Raises OSError if it can't be read."""
    names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    left = {name for name in names - {lock_of(folder / RECORD).name} if not name.endswith(NOTE)}
    return bool(left) and not names & {RECORD, CACHE}


def _read_order(
    person: Person, base: Base, output: Path, terms: Terms, callbacks: Callbacks
) -> tuple[Sequence[Photo], Sequence[Photo], Order, str]:
    """Return the photos, the drawn pictures to train on too, the order, and a key of the order."""
    check_person(person, output)
    terms.compute_hashes(base, callbacks.progress(READING))
    photos, drawn = read_person(person, callbacks.on_warning)
    order = terms.order(person, len(photos), base, callbacks)
    prints, of_drawn = ([photo.fingerprint for photo in group] for group in (photos, drawn))
    return photos, drawn, order, order.key(prints, base, of_drawn)


def _hash_with_files(key: str, result: Result, output: Path) -> str:
    """Return a hash of the result of that key and of its files. Raises BadFile if one is missing or not a regular file."""
    files = [read_bytes(output / file, _MOST_BYTES) for file in (result.lora or "", *result.pictures)]
    return content_key(key, result, *(hashlib.sha256(file).hexdigest() for file in files))
