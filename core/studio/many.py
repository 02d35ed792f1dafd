"""Many people on one base model that a process loads once: each one's LoRA and gallery, and a report.

On one machine they are made one after the other, on a cluster as many at a time as there are workers. What fails, fails alone.
"""

import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import BadConfig, BadFile
from ..models.base import Base
from ..storage.files import make_folder
from ..storage.locks import locked
from ..training.callbacks import NO_CALLBACKS, Callbacks
from .people import Person
from .queue import hand_out
from .ray_crew import RayCrew
from .report import read_report, write_report
from .result import CACHE, RECORD, Result, Terms, failed, find, find_or_make

_REPORT_PAUSE = 20
"""How many times as long as writing the report has taken passes before it is written again: with many people it is long."""


def run(
    people: Iterable[Person],
    base: Base,
    output: Path,
    terms: Terms,
    *,
    device: torch.device | None = None,
    callbacks: Callbacks = NO_CALLBACKS,
    ray: str | None = None,
) -> Iterator[Result]:
    """The result of each person, as soon as it is there. The report in `output` is written anew now and then, and at the end.

    A person's files lie in the folder of that name in `output`. Any error while a person is made is that person's result. What
    is no Exception, such as the KeyboardInterrupt that a callback raises, ends the run; called again it goes on there.

    With `ray`, HOST:PORT of a Ray cluster's head node, the cluster's workers make the people, each on a device of its own;
    with "local" workers of this machine do, on its GPUs.
    All its machines have photos, base model and `output` under the same paths. Of the callbacks `on_warning` is called, and
    `on_phase` with ("people", done, all) and ("at work", workers, all).
    """
    make_folder(output)
    read_report(output)  # raises for a file of that name which is not a report
    output = output.absolute()  # a report tells whole paths in a reason from other words, and leaves out the folders
    people = [replace(person, photos=person.photos.absolute()) for person in people]
    results: list[Result] = []
    made = _here(people, base, output, terms, device, callbacks)
    if ray is not None:
        made = _on_cluster(people, base, output, terms, callbacks, ray)
    due, written = 0.0, 0
    try:
        for result in made:
            results.append(result)
            begun = time.monotonic()
            if begun >= due:
                write_report(output, results)
                due, written = begun + _REPORT_PAUSE * (time.monotonic() - begun), len(results)
            yield result
    finally:
        if written < len(results):
            write_report(output, results)


def _here(
    people: Iterable[Person],
    base: Base,
    output: Path,
    terms: Terms,
    device: torch.device | None,
    callbacks: Callbacks,
) -> Iterator[Result]:
    for person in people:
        try:
            yield find_or_make(person, base, output, terms, device, callbacks)
        except Exception as error:
            yield failed(person, error)


def _on_cluster(
    people: Iterable[Person], base: Base, output: Path, terms: Terms, callbacks: Callbacks, address: str
) -> Iterator[Result]:
    def look(person: Person) -> Result | None:
        try:
            return find(person, base, output, terms)
        except Exception as error:
            return failed(person, error)

    with RayCrew(address, base, output, terms) as crew:
        yield from hand_out(people, crew, look, callbacks)


def forget(name: str, output: Path) -> int:
    """The number of files deleted: all that the studio keeps of a person, and the person's line in the report.

    Photos elsewhere, such as those that the LoRA was trained on, are not the studio's and stay. Raises BadConfig when there
    is no such person in the output, InUse while the person is being made, and BadFile when something cannot be deleted, or
    the report is damaged: then nothing is.
    """
    folders = {path.parent.name: path.parent for path in output.glob(f"*/{RECORD}")}
    folders |= {path.parent.name: path.parent for path in output.glob(f"*/{CACHE}")}
    if name not in folders:
        raise BadConfig(f"{output}: has nothing of {name!r}; it has {', '.join(sorted(folders)) or 'nobody'}")
    with locked(folders[name] / RECORD):  # not while it is deleted: Windows deletes no lock that is held
        left = read_report(output)
    count = sum(path.is_file() for path in folders[name].rglob("*"))
    try:
        shutil.rmtree(folders[name])
    except OSError as error:
        raise BadFile(f"{error.filename}: cannot be deleted: {error.strerror or error}") from None
    if left:
        write_report(output, [one for one in left if one.name != name])
    return count
