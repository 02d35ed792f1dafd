"""The command `studio`, which makes LoRAs and headshots of many people."""

import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import ClassVar

from .. import lora, models, studio  # Their modules load only when a name is used.
from ..errors import BadConfig
from ..progress import READING
from .common import JsonProgress, packs_for, print_whether_signed, progress_bar
from .computing import device_from, show_work, speed_hint
from .generate import few_steps_hint
from .headshots import COUNT, OrderOptions, bases_from, unread_in_pack, usual_pack_and_size
from .options import Options, argument, below, option
from .settings import settings_from
from .shared_options import BASE, DEVICE, DRY_RUN, BaseParts
from .studio_progress import StudioProgress, planned
from .train import StopOnSignal, shown, training_adapter_from
from .values import Folder, InputName, InputPath


@dataclass(frozen=True)
class StudioOptions(Options):
    usage: ClassVar[str | None] = "%(prog)s PEOPLE --base BASE --output DIR [OPTIONS] (--help lists them)"
    people: InputPath = argument(
        "Folder with a folder for each person: photos, and a person.toml with agreed = true. Or a manifest "
        "(.csv, .jsonl) with name, photos and agreed",
        "PEOPLE",
    )
    base: InputName = BASE
    parts: BaseParts = below()
    output: Folder = option(
        "Folder for the report, and for a folder of each person. Existing results are not made again"
    )
    order: OrderOptions = below()
    device: str | None = DEVICE
    ray: str | None = option(
        "Make several people at once, each on a GPU. Head node of a Ray cluster, or local for this machine's GPUs",
        "HOST:PORT|local",
    )
    dry_run: bool = DRY_RUN
    json: bool = option("Print one JSON object per report and person")


def run(options: StudioOptions) -> int:
    """Run the command. Returns 1 if anyone failed, else 0."""
    from ..storage.locks import at_work

    if options.ray and options.device:
        raise BadConfig("--device: leave this out, since each of Ray's workers has its own device")
    is_making = os.path.isdir(options.output) and not options.dry_run
    # Already while the model is read, `forget` would miss people who are yet to be made.
    with at_work(options.output / studio.REPORT) if is_making else nullcontext():
        return _make_all(options)


def _make_all(options: StudioOptions) -> int:
    people = studio.read_people(options.people)
    asked = options.order
    given = settings_from(asked.config, asked.given)
    base, drawn_on = bases_from(options.base, options.parts, asked, given)
    device = None if options.ray else device_from(options.device)
    found = packs_for(options.base, asked.style_folder)
    usual, size = usual_pack_and_size(options.base)
    terms = studio.Terms(
        packs=found.packs,
        style_pack=asked.style_pack or usual,
        count=COUNT if asked.count is None else asked.count,
        seed=asked.seed,
        size=size,
        recipe=asked.recipe,
        settings=given,
        training_adapter=training_adapter_from(asked.training_adapter, base),
        drawn_on=drawn_on,
    )
    stop, failed = StopOnSignal(None), False  # Our own errors would only fail this person.
    if (options.output / studio.REPORT).is_file():  # Whether somebody has been made depends on the base model.
        terms.compute_hashes(base, progress_bar(READING))
    before = studio.plan_people(people, base, options.output, terms)
    progress = JsonProgress() if options.json else StudioProgress([person.name for person in people], before)
    callbacks = shown(progress, stop, within_steps=True)
    refused = [f"{name} will be refused: {reason}" for name, reason in before.refused.items()]
    for line in (
        *found.problems,
        *_unread(people, terms, base),
        *(refused if options.dry_run else ()),
        *few_steps_hint(drawn_on or base, remedy="rename the file"),
        *speed_hint(drawn_on or (base.as_distilled() if terms.training_adapter else base), {}),
    ):
        callbacks.on_warning(line)
    if isinstance(progress, JsonProgress):
        aside = {"made_before": len(before.made_before), "refused": len(before.refused)}
        progress.print({"to_make": dataclasses.asdict(before.work), **aside})
    else:
        print(planned(before), file=sys.stderr)
    if options.dry_run:
        if ledger := studio.plan_ledger(before, people, base, terms, device, callbacks):
            speed = studio.speed_of(base, device, given.get("precision", "auto"))
            show_work(ledger, ledger.seconds(speed), options.json)
        return 0
    with stop, progress, redirect_stdout(sys.stderr):  # Ray prints the workers' output there.
        for result in studio.make_people(
            people, base, options.output, terms, device=device, callbacks=callbacks, ray=options.ray
        ):
            failed |= result.status == "failed"
            if asked.sidecars and result.lora:
                lora.write_sidecars(options.output / result.lora)
            if isinstance(progress, JsonProgress):
                progress.print(dataclasses.asdict(result))
            else:
                progress.ended(result)
    if not options.json:
        print(f"report: {options.output / 'report.html'}")
        print_whether_signed()
    return 1 if failed else 0


def _unread(people: Sequence["studio.Person"], terms: "studio.Terms", base: "models.Base") -> list[str]:
    """Return a warning for each part of the people's style packs that is special syntax in other programs."""
    chosen = {person.style_pack or terms.style_pack for person in people} & terms.packs.keys()
    return [line for name in sorted(chosen) for line in unread_in_pack(terms.packs[name], base)]
