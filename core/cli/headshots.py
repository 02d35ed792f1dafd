"""The command `headshots`, which turns photos into a gallery."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from .. import demo
from ..config import TrainConfig
from ..errors import BadConfig
from ..lora import file_word, write_sidecars
from ..models import Base
from ..photos import check_agreed, read_photos
from ..pictures import FoundPacks, StylePack, batch_summary
from ..progress import OnWarning
from ..studio import Order, Outcome, check_drawn_on, device_rate, ledger_of, ready_photos, train_and_draw
from ..training import recipe_config
from .common import DEMO, BarProgress, JsonProgress, base_from, packs_for
from .computing import device_from, show_work, work_in_short
from .generate import few_steps_hint, unread_syntax
from .settings import schedule_from, settings_from
from .train import Cancelled, StopOnSignal, shown, training_adapter_from

STYLE_PACK, COUNT = "corporate", 20
"""The default style pack and number of pictures. The demo's base model knows only one style."""
Answer = TypeVar("Answer")


def run_headshots(options: argparse.Namespace) -> int:
    """Run the command. Returns 1 if no picture is like the person, else 0."""
    check_agreed(options.photos)
    place = options.photos.resolve()
    if not (options.output or place.name):
        raise BadConfig(f"{place}: pictures can't be saved beside this folder: choose one with --output")
    folder = options.output or place.with_name(f"{place.name}-headshots")
    given = settings_from(options)
    base, device = base_from(options, **schedule_from(given)), device_from(options)
    adapter, drawn_on = training_adapter_from(options, base), drawn_on_from(options, base, **schedule_from(given))
    stop, progress = StopOnSignal(), JsonProgress() if options.json else BarProgress()

    def check_stop(where: str) -> None:
        if stop.asked:
            raise Cancelled(f"stopped{where}; run the same command again to continue")

    callbacks = dataclasses.replace(shown(progress, check_stop), check_cancelled=lambda: check_stop(""))
    with progress:
        found = packs_for(options)
        for problem in found.problems:
            progress.warning(problem)
        if options.style_pack:
            found.pick(options.style_pack)  # Raises now, not after the photos have been checked.
        hint_at_few_steps(drawn_on or base, progress.warning)
        photos = read_photos(options.photos, on_warning=progress.warning)
        config = recipe_config(options.recipe, base, len(photos), given, progress.warning)
        ready = ready_photos(photos, base, config, callbacks)
        asks = sys.stdin.isatty() and not (options.yes or options.json or options.dry_run)
        if asks and len(ready.used) == len(ready.report.photos):  # Otherwise the check has reported it.
            print(f"photos: {ready.report.headline}")
        order = _order(options, config, found, asks)
        order = dataclasses.replace(order, training_adapter=adapter, drawn_on=drawn_on)
        for line in unread_in_pack(order.pack, base):
            progress.warning(line)
        if asks or options.dry_run:
            ledger, rate = ledger_of(ready, base, order, device), device_rate(base, device, order.config.precision)
            if options.dry_run:
                show_work(ledger, rate, options.json)
                return 0
            print(work_in_short(ledger, rate))
        with stop:
            outcome = train_and_draw(ready, base, order, folder, device=device, callbacks=callbacks)
    if options.sidecars:
        write_sidecars(outcome.trained.path)
    if options.json:
        print(json.dumps(_described(outcome)))
    else:
        print(_summary(outcome), *outcome.advice, sep="\n")
        print(f"LoRA: {outcome.trained.path}\ngallery: {folder / 'gallery.html'}")
    return 1 if outcome.advice else 0


def drawn_on_from(options: argparse.Namespace, base: Base, **schedule: Any) -> Base | None:
    """Return the base model to draw on if it isn't the one to train on. Raises BadConfig or BadFile if it doesn't fit that."""
    if not options.draw_on:
        return None
    other = base_from(options, options.draw_on, **schedule)
    check_drawn_on(other, base)
    return other


def hint_at_few_steps(base: Base, on_warning: OnWarning) -> None:
    """Warn if only the base model's name makes it draw in a few steps."""
    if line := few_steps_hint(base, remedy="rename the file"):
        on_warning(line)


def unread_in_pack(pack: StylePack, base: Base) -> list[str]:
    """Return a warning for each part of the pack's texts for the base model that is special syntax in other programs."""
    wordings = [style.wording(base.family.name) for style in pack.styles]
    values = [value for style in pack.styles for axis in style.axes.values() for value in axis]
    return unread_syntax([*values, *(text for wording in wordings for text in (wording.prompt, wording.negative))])


def _order(options: argparse.Namespace, config: TrainConfig, found: FoundPacks, asks: bool) -> Order:
    """Return the order from the options, else from answers to questions, else from the defaults."""
    is_demo = options.base == DEMO
    usual = demo.STYLE_PACK if is_demo else STYLE_PACK
    if asks and not hasattr(options, "setting_class_word"):
        config = dataclasses.replace(config, class_word=_answer("class word: woman, man, ...", config.class_word, str))
    pack = options.style_pack
    if pack is None:
        pack = _answer(f"styles: {', '.join(sorted(found.packs))}", usual, str) if asks else usual
    count = options.count
    if count is None:
        count = _answer("how many pictures", COUNT, int) if asks else COUNT
    size = demo.PICTURE_SIZE if is_demo else None
    # The LoRA's name is in its metadata and in each picture, so it must not be the name of a private folder.
    name = file_word(config.trigger_word)[:32]
    return Order(name, config, found.pick(pack), count, options.seed, size)


def _answer(question: str, usual: Answer, kind: Callable[[str], Answer]) -> Answer:
    """Return what the user types at the terminal, or the default for an empty line."""
    text = input(f"{question} [{usual}]: ").strip()
    try:
        return kind(text) if text else usual
    except ValueError:
        raise BadConfig(f"{text!r} is not a number") from None


def _summary(outcome: Outcome) -> str:
    return batch_summary(outcome.shots, people=1 if outcome.report.network else 0)


def _described(outcome: Outcome) -> dict[str, Any]:
    """Return the outcome as values for JSON."""
    return {
        "photos": outcome.report.headline,
        "lora": str(outcome.trained.path),
        "summary": _summary(outcome),
        "kept": [str(shot.path) for shot in outcome.shots if shot.kept],
        "advice": list(outcome.advice),
    }
