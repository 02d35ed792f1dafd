"""Make many people on one base model that a process loads once: each person's LoRA and gallery, and a report.

On one machine people are made one after the other; on a cluster each worker makes one. One person's failure doesn't affect
others.
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
"""The report is rewritten after this many times the time that writing it took: with many people it is long."""


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
    """Yield the result of each person as soon as it is made. The report in `output` is updated regularly, and at the end.

    A person's files are in the folder of that name in `output`. An error while a person is made becomes that person's result.
    Exceptions that aren't an Exception, such as a callback's KeyboardInterrupt, end the call; another call continues from
    there.

    With `ray`, HOST:PORT of a Ray cluster's head node, the cluster's workers make the people, each on its own device. With
    "local", workers on this machine's GPUs do. All machines must have photos, base model and `output` under the same paths. Of
    the callbacks, `on_warning` is called, and `on_phase` with ("people", done, all) and ("at work", workers, all).
    """
    make_folder(output)
    read_report(output)  # Raises for a file of that name that isn't a report.
    output = output.absolute()  # The report only removes the folders of absolute paths.
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
    """Delete everything that the studio has of a person, including the report's line, and return the number of files.

    Photos elsewhere, such as those that the LoRA was trained on, aren't the studio's and are kept. Raises BadConfig if the
    output doesn't have the person, and InUse while the person is being made. Raises BadFile, and deletes nothing, if something
    cannot be deleted or the report is damaged.
    """
    folders = {path.parent.name: path.parent for path in output.glob(f"*/{RECORD}")}
    folders |= {path.parent.name: path.parent for path in output.glob(f"*/{CACHE}")}
    if name not in folders:
        raise BadConfig(
            f"{output}: {name!r} was not found; this output contains {', '.join(sorted(folders)) or 'nobody'}"
        )
    with locked(folders[name] / RECORD):  # Release it before deleting: Windows cannot delete a held lock.
        left = read_report(output)
    count = sum(path.is_file() for path in folders[name].rglob("*"))
    try:
        shutil.rmtree(folders[name])
    except OSError as error:
        raise BadFile(f"{error.filename}: cannot be deleted: {error.strerror or error}") from None
    if left:
        write_report(output, [one for one in left if one.name != name])
    return count
