"""The command `studio`, which makes LoRAs and headshots of many people."""

import argparse
import dataclasses
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from typing import Any

from .. import demo
from ..errors import BadConfig
from ..lora import write_sidecars
from ..models import Base
from ..pictures import StylePack
from ..progress import READING
from ..storage.locks import at_work
from ..studio import REPORT, Person, Plan, Terms, device_rate, forget, read_people
from ..studio.many import make_people, plan_ledger, plan_people
from .common import DEMO, JsonProgress, base_from, packs_for, progress_bar
from .computing import device_from, show_work
from .headshots import COUNT, STYLE_PACK, drawn_on_from, hint_at_few_steps, unread_in_pack
from .settings import schedule_from, settings_from
from .studio_progress import StudioProgress, planned
from .train import StopOnSignal, shown, training_adapter_from


def run_studio(options: argparse.Namespace) -> int:
    """Run the command. Returns 1 if anyone failed, else 0."""
    if options.ray and options.device:
        raise BadConfig("--device: leave this out, since each of Ray's workers has its own device")
    waits = at_work(options.output / REPORT) if os.path.isdir(options.output) and not options.dry_run else nullcontext()
    with waits:  # Already while the model is read, `forget` would miss people who are yet to be made.
        return _run(options)


def _run(options: argparse.Namespace) -> int:
    people = read_people(options.people)
    given = settings_from(options)
    base, device = base_from(options, **schedule_from(given)), None if options.ray else device_from(options)
    found = packs_for(options)
    terms = _terms(options, base, given, found.packs)
    stop, failed = StopOnSignal(), False
    if (options.output / REPORT).is_file():  # The plan compares the base model with those in the report.
        terms.compute_hashes(base, progress_bar(READING))
    before = plan_people(people, base, options.output, terms, device)
    progress = JsonProgress() if options.json else StudioProgress([person.name for person in people], before)

    def check_stop(_where: str) -> None:
        if stop.asked:
            raise KeyboardInterrupt  # Our own errors would only fail this person.

    callbacks = dataclasses.replace(shown(progress, check_stop), check_cancelled=lambda: check_stop(""))
    refused = [f"{name} will be refused: {reason}" for name, reason in before.refused.items()]
    for problem in (*found.problems, *_unread(people, terms, base), *(refused if options.dry_run else ())):
        callbacks.on_warning(problem)
    hint_at_few_steps(terms.drawn_on or base, callbacks.on_warning)
    if isinstance(progress, JsonProgress):
        progress.print(_described(before))
    else:
        # Without earlier measurements, count the work as in a dry run.
        lines = planned(before, bool(options.ray))[: 1 if options.dry_run and before.seconds is None else 2]
        print(*lines, sep="\n", file=sys.stderr)
    if options.dry_run:
        if ledger := plan_ledger(before, people, base, terms, device, callbacks):
            # People who were made on this machine are a better measure than a matrix product.
            precision = given.get("precision", "auto")
            rate = ledger.total / before.seconds if before.seconds else device_rate(base, device, precision)
            show_work(ledger, rate, options.json)
        return 0
    with stop, progress, redirect_stdout(sys.stderr):  # Ray prints the workers' output there.
        results = make_people(people, base, options.output, terms, device=device, callbacks=callbacks, ray=options.ray)
        for result in results:
            failed |= result.status == "failed"
            if options.sidecars and result.lora:
                write_sidecars(options.output / result.lora)
            if isinstance(progress, JsonProgress):
                progress.print(dataclasses.asdict(result))
            else:
                progress.ended(result)
    if not options.json:
        print(f"report: {options.output / 'report.html'}")
    return 1 if failed else 0


def _terms(options: argparse.Namespace, base: Base, given: Mapping[str, Any], packs: Mapping[str, StylePack]) -> Terms:
    is_demo = options.base == DEMO
    return Terms(
        packs=packs,
        style_pack=options.style_pack or (demo.STYLE_PACK if is_demo else STYLE_PACK),
        count=COUNT if options.count is None else options.count,
        seed=options.seed,
        size=demo.PICTURE_SIZE if is_demo else None,
        recipe=options.recipe,
        settings=given,
        training_adapter=training_adapter_from(options, base),
        drawn_on=drawn_on_from(options, base, **schedule_from(given)),
    )


def _unread(people: Sequence[Person], terms: Terms, base: Base) -> list[str]:
    """Return a warning for each part of the people's style packs that is special syntax in other programs."""
    chosen = {person.style_pack or terms.style_pack for person in people} & terms.packs.keys()
    return [line for name in sorted(chosen) for line in unread_in_pack(terms.packs[name], base)]


def _described(before: Plan) -> dict[str, Any]:
    """Return the planned work as values for JSON."""
    aside = {"made_before": len(before.made_before), "refused": len(before.refused)}
    return {"to_make": dataclasses.asdict(before.work), **aside, "seconds": before.seconds}


def run_forget(options: argparse.Namespace) -> None:
    print(f"{forget(options.name, options.output)} files of {options.name} deleted from {options.output}")
