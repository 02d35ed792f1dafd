"""Estimate a studio run in advance: who is to be made, how much work that is, and how long others have taken."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..device import processor, usable_device
from ..errors import BadFile
from ..models.base import Base
from ..photos import count_photos, read_photos
from ..training.callbacks import NO_CALLBACKS, Callbacks
from .cost import Cost, Work, seconds_for
from .ledger import Basis, Ledger, basis
from .people import Person
from .report import read_report
from .result import Terms, is_made


@dataclass(frozen=True)
class Plan:
    """The planned work. Photos are counted without opening them, so a plan is made instantly."""

    to_make: Mapping[str, Work]
    """The work for each person to make, by name. Training that stops early takes fewer steps."""
    made_before: tuple[str, ...]
    """People who are finished already, unless a photo or one of the files has changed."""
    refused: tuple[str, ...]
    """People who will fail because of a fault in their entry."""
    earlier: tuple[Cost, ...]
    """The costs of people in the output's report on the same base model and processor."""

    @property
    def work(self) -> Work:
        """The work for everyone who is to be made."""
        return Work.sum(self.to_make.values())

    @property
    def seconds(self) -> float | None:
        """The estimated time on one device from earlier costs; None without any."""
        return seconds_for(self.work, self.earlier)


def plan(people: Iterable[Person], base: Base, output: Path, terms: Terms, device: torch.device | None = None) -> Plan:
    """Return the plan of a call to `run` with the same arguments."""
    to_make: dict[str, Work] = {}
    made_before, refused = [], []
    for person in people:
        photos = count_photos(person.photos) if person.agreed and not person.problem else 0
        try:
            order = terms.order(person, photos, base) if photos else None
            if order is None:
                refused.append(person.name)
            elif is_made(order, photos, base, output):
                made_before.append(person.name)
            else:
                to_make[person.name] = Work(1, photos, order.config.steps, order.count)
        except Exception:  # `run` will report it.
            refused.append(person.name)
    used = processor(usable_device(device))
    earlier: list[Cost] = []
    with suppress(BadFile):  # A damaged report will be rewritten.
        costs = [result.cost for result in read_report(output) if result.cost]
        earlier = [cost for cost in costs if (cost.base, cost.processor) == (base.identity, used)]
    return Plan(to_make, tuple(made_before), tuple(refused), tuple(earlier))


def plan_ledger(
    before: Plan,
    people: Iterable[Person],
    base: Base,
    terms: Terms,
    device: torch.device | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
) -> Ledger | None:
    """Return the work for everyone who is to be made, whose photos are opened but not checked; None without anyone."""
    shared: dict[str, Basis] = {}
    ledgers: list[Ledger] = []
    for person in people:
        if person.name not in before.to_make:
            continue
        try:
            photos = read_photos(person.photos, on_warning=callbacks.on_warning)
            order = terms.order(person, len(photos), base, callbacks)
            alike = repr(replace(order.config, trigger_word="sks", class_word="person"))
            if alike not in shared:
                shared[alike] = basis(photos, base, order.config, device, order.training_adapter)
            ledgers.append(shared[alike].ledger(photos, order.config, order.jobs(base)))
        except Exception as error:
            callbacks.on_warning(f"{person.name} is not included in the estimate: {error}")
    return Ledger.sum(ledgers) if ledgers else None
