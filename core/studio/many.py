"""Make many people on one base model that a process loads once: each person's LoRA and gallery, and a report.

On one machine people are made one after the other; on a cluster each worker makes one. One person's failure doesn't affect
others. `plan_people` lists in advance who is to be made, how much work that is, and how long others have taken.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..models.base import Base
from ..progress import silent
from ..storage.files import make_folder
from ..storage.locks import at_work, locked
from ..training.callbacks import NO_CALLBACKS, Callbacks
from .cluster import make_on_cluster
from .cost import Work
from .ledger import Basis, Ledger, basis
from .people import REPORT, Person, read_person
from .report import delete_leftovers, read_report, write_report
from .result import Result, Terms, check_person, failed, find_or_make, is_made

_REPORT_PAUSE = 20
"""The report is rewritten after this many times the time that writing it took: with many people it is long."""
_LONGEST_WRITE = 60.0
"""The seconds to wait while another run writes the report."""


def make_people(
    people: Iterable[Person],
    base: Base,
    output: str | os.PathLike[str],
    terms: Terms,
    *,
    device: torch.device | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
    ray: str | None = None,
) -> Iterator[Result]:
    """Yield the result of each person as soon as it is made. The report in `output` is updated regularly, and at the end.

    A person's files are in the folder of that name in `output`. An error while a person is made becomes that person's result.
    Exceptions that aren't an Exception, such as a callback's KeyboardInterrupt, end the call; another call continues from
    there. Until the end, `forget` raises InUse for this output.

    With `ray`, HOST:PORT of a Ray cluster's head node, the cluster's workers make the people, each on its own device. With
    "local", workers on this machine's GPUs do. All machines must have photos, base model and `output` under the same paths. Of
    the callbacks, `on_warning` is called, and `on_phase` while the base model is read, then with ("people", done, all) and
    ("at work", workers, all).
    """
    output = make_folder(output)
    read_report(output)  # Raises for a file of that name that isn't a report.
    output = output.absolute()  # The report only removes the folders of absolute paths.
    people = [replace(person, photos=person.photos.absolute()) for person in people]
    results: list[Result] = []
    due, written = 0.0, 0

    def make_here() -> Iterator[Result]:
        for person in people:
            try:
                yield find_or_make(person, base, output, terms, device, callbacks)
            except Exception as error:
                yield failed(person, error)

    made = make_here() if ray is None else make_on_cluster(people, base, output, terms, callbacks, ray)

    def report() -> None:
        """Write the results, and those of other people who are in the report. Only people of this call count as made.

        For a person whom another run is making, that run's line counts.
        """
        with locked(output / REPORT, wait=_LONGEST_WRITE):
            delete_leftovers(output, [])
            names = {result.name for result in results if not result.in_use}
            others = {one.name: one for one in read_report(output) if one.name not in names}
            found = [replace(one, status="found") if one.status == "made" else one for one in others.values()]
            write_report(output, [*found, *(one for one in results if one.name not in others)])

    with at_work(output / REPORT):  # Until the end, since `forget` would miss people who are yet to be made.
        try:
            for result in made:
                results.append(result)
                begun = time.monotonic()
                if begun >= due:
                    report()
                    due, written = begun + _REPORT_PAUSE * (time.monotonic() - begun), len(results)
                yield result
        finally:
            if written < len(results):
                report()


@dataclass(frozen=True)
class Plan:
    """The planned work. Photos are counted without opening them, so a plan is made instantly."""

    to_make: Mapping[str, Work]
    """The work for each person to make, by name. Training that stops early takes fewer steps."""
    made_before: tuple[str, ...]
    """People who are finished already, unless a photo or one of the files has changed."""
    refused: Mapping[str, str]
    """Why people will fail because of a fault in their entry, photos or folder, by name."""

    @property
    def work(self) -> Work:
        """The work for everyone who is to be made."""
        return Work.sum(self.to_make.values())


def plan_people(people: Iterable[Person], base: Base, output: str | os.PathLike[str], terms: Terms) -> Plan:
    """Return the plan of a call to `make_people` with the same arguments."""
    output = Path(output)
    to_make: dict[str, Work] = {}
    made_before: list[str] = []
    refused: dict[str, str] = {}
    for person in people:
        try:
            check_person(person, output)
            # Without any, reading them raises the reason.
            photos, drawn = person.count_files()
            photos = photos or len(read_person(person, silent)[0])
            order = terms.order(person, photos, base)
            if is_made(order, photos, drawn, base, output):
                made_before.append(person.name)
            else:
                to_make[person.name] = Work(1, photos + drawn, order.config.steps, order.count)
        except Exception as error:
            refused[person.name] = failed(person, error).reason
    return Plan(to_make, tuple(made_before), refused)


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
            photos, drawn = read_person(person, callbacks.on_warning)
            order = terms.order(person, len(photos), base, callbacks)
            photos = [*photos, *drawn]
            alike = repr(replace(order.config, trigger_word="sks", class_word="person"))
            if alike not in shared:
                shared[alike] = basis(photos, base, order.config, device, order.training_adapter)
            ledgers.append(shared[alike].ledger(photos, order.config, order.jobs(base)))
        except Exception as error:
            callbacks.on_warning(f"{person.name} is not included in the estimate: {error}")
    return Ledger.sum(ledgers) if ledgers else None
