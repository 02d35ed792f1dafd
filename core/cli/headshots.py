"""The command `headshots`, which turns photos into a gallery."""

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from .. import lora, models, photos, pictures, studio, training  # Their modules load only when a name is used.
from ..config import RecipeName, TrainConfig
from ..errors import BadConfig
from . import shared_options
from .common import DEMO, BarProgress, JsonProgress, base_from, packs_for, print_whether_signed
from .computing import device_from, show_work, speed_hint, work_in_short
from .generate import few_steps_hint, unread_syntax
from .options import Options, argument, below, option, settings
from .settings import SCHEDULE, schedule_from, settings_from
from .train import StopOnSignal, drawn_from, shown, training_adapter_from
from .values import Folder, InputName, InputPath

STYLE_PACK, COUNT = "corporate", 20
"""The default style pack and number of pictures. The demo's base model knows only one style."""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class OrderOptions:
    """What to train and to draw, for one person or many."""

    style_pack: str | None = option("Style pack. `facelora generate --style-pack list` lists them", "NAME")
    style_folder: list[InputPath] = shared_options.STYLE_FOLDER
    count: int | None = option("Pictures to draw (default: 20)")
    seed: int = shared_options.SEED
    recipe: RecipeName = option(
        "Preset for a quick, normal or thorough training run (default: balanced)", default="balanced"
    )
    config: InputPath | None = option("File with other settings of the training run", "FILE.toml")
    training_adapter: InputPath | None = shared_options.TRAINING_ADAPTER
    draw_on: InputName | None = option(
        "Base model to draw on, instead of the one trained on: another of its family, such as SDXL-Lightning", "BASE"
    )
    speed_lora: InputPath | None = shared_options.SPEED_LORA
    sidecars: bool = shared_options.SIDECARS
    given: dict[str, Any] = settings(("trigger_word", "class_word", "steps", "check_photos", *SCHEDULE))


@dataclass(frozen=True)
class HeadshotsOptions(Options):
    usage: ClassVar[str | None] = "%(prog)s PHOTOS --base BASE [--output DIR] [OPTIONS] (--help lists them)"
    photos: InputPath = argument("Folder of 10 to 20 photos of one person", "PHOTOS")
    base: InputName = shared_options.BASE
    parts: shared_options.BaseParts = below()
    output: Folder | None = option(
        "Folder for the LoRA, the pictures and their page. Existing ones are not made again (default: PHOTOS-headshots)"
    )
    drawn_photos: InputPath | None = shared_options.DRAWN_PHOTOS
    order: OrderOptions = below()
    yes: bool = option("Ask no questions")
    dry_run: bool = shared_options.DRY_RUN
    device: str | None = shared_options.DEVICE
    json: bool = option("Print one JSON object per report, and ask no questions")


def run(options: HeadshotsOptions) -> int:
    """Run the command. Returns 1 if no picture is like the person, else 0."""
    asked = options.order
    photos.check_agreed(options.photos, *filter(None, [options.drawn_photos]))
    place = options.photos.resolve()
    if not (options.output or place.name):
        raise BadConfig(f"{place}: pictures can't be saved beside this folder: choose one with --output")
    folder = options.output or place.with_name(f"{place.name}-headshots")
    given = settings_from(asked.config, asked.given)
    base, drawn_on = bases_from(options.base, options.parts, asked, given)
    device, adapter = device_from(options.device), training_adapter_from(asked.training_adapter, base)
    stop = StopOnSignal("run the same command again to continue")
    progress = JsonProgress() if options.json else BarProgress()
    callbacks = shown(progress, stop, within_steps=True)
    with progress:
        found = packs_for(options.base, asked.style_folder)
        for line in (*found.problems, *few_steps_hint(drawn_on or base, remedy="rename the file")):
            progress.warning(line)
        if asked.style_pack:
            found.pick(asked.style_pack)  # Raises now, not after the photos have been checked.
        read = photos.read_photos(options.photos, apart=options.drawn_photos, on_warning=progress.warning)
        drawn = drawn_from(options.drawn_photos, progress)
        config = training.recipe_config(asked.recipe, base, len(read), given, progress.warning)
        ready = studio.ready_photos(read, base, config, callbacks, drawn)
        asks = sys.stdin.isatty() and not (options.yes or options.json or options.dry_run)
        if asks and len(ready.used) == len(ready.report.photos):  # Otherwise the check has reported it.
            print(f"photos: {ready.report.headline}")
        order = _order(options, config, found, asks)
        order = dataclasses.replace(order, training_adapter=adapter, drawn_on=drawn_on)
        watch, counted, seconds = studio.Stopwatch(), None, {}
        if asks or options.dry_run:
            ledger = studio.ledger_of(ready, base, order, device)
            speed = studio.speed_of(base, device, order.config.precision)
            counted, seconds = (ledger, speed), ledger.seconds(speed)
            if asks:
                print(work_in_short(ledger, seconds))
        for line in (*unread_in_pack(order.pack, base), *speed_hint(drawn_on or order.on(base), seconds)):
            progress.warning(line)
        if options.dry_run and counted:
            show_work(counted[0], seconds, options.json, order.config, len(ready.to_train_on))
            return 0
        watch.enter("encode")
        with stop:
            outcome = studio.train_and_draw(
                ready, base, order, folder, device=device, callbacks=watch.listening(callbacks)
            )
        if counted:
            cost = watch.cost(device, base.name, len(ready.photos))
            _remember_speed(base, order, *counted, cost, sum(shot.face_pass is not None for shot in outcome.shots))
    if asked.sidecars:
        lora.write_sidecars(outcome.trained.path)
    made, gallery = outcome.trained.path, folder / "gallery.html"
    people = 1 if outcome.report.network else 0
    summary = pictures.batch_summary(outcome.shots, people, outcome.measure)
    if options.json:
        kept = [str(shot.path) for shot in outcome.shots if shot.kept]
        result = {"photos": outcome.report.headline, "lora": str(made), "summary": summary, "kept": kept}
        print(json.dumps(result | {"advice": list(outcome.advice)}))
    else:
        print(summary, *outcome.advice, f"LoRA: {made}", f"gallery: {gallery}", sep="\n")
        print_whether_signed()
    return 1 if outcome.advice else 0


def _remember_speed(
    base: "models.Base",
    order: "studio.Order",
    ledger: "studio.Ledger",
    speed: "studio.Speed",
    cost: "studio.Cost",
    faces: int,
) -> None:
    """Keep the speed that a job has reached for later predictions. `faces` is the number of pictures with a face pass."""
    done = ledger.done(cost.work.steps / order.config.steps, faces / pictures.redrawn_of(order.count))
    if cost.work.pictures < order.count:  # The others are older, and it is unknown whose faces took the time.
        del done[studio.DRAW]
    studio.remember_speed(base, order.config.precision, speed, done, cost)


def bases_from(
    name: str, parts: shared_options.BaseParts, asked: OrderOptions, given: Mapping[str, Any]
) -> tuple["models.Base", "models.Base | None"]:
    """Return the base model to train on, and another one to draw on, if given. Raises a FaceLoraError unless they fit."""
    schedule = schedule_from(given)
    base, drawn_on = base_from(name, parts, schedule, other=asked.draw_on), None
    if asked.draw_on:
        drawn_on = base_from(asked.draw_on, parts, schedule, other=name)
        studio.check_drawn_on(drawn_on, base)
    if asked.speed_lora and drawn_on:
        drawn_on = pictures.with_speed_lora(drawn_on, asked.speed_lora)
    elif asked.speed_lora:
        base = pictures.with_speed_lora(base, asked.speed_lora)
    return base, drawn_on


def unread_in_pack(pack: "pictures.StylePack", base: "models.Base") -> list[str]:
    """Return a warning for each part of the pack's texts for the base model that is special syntax in other programs."""
    wordings = [style.wording(base.family.name) for style in pack.styles]
    values = [value for style in pack.styles for axis in style.axes.values() for value in axis]
    return unread_syntax([*values, *(text for wording in wordings for text in (wording.prompt, wording.negative))])


def _order(options: HeadshotsOptions, config: TrainConfig, found: "pictures.FoundPacks", asks: bool) -> "studio.Order":
    asked, (usual, size) = options.order, usual_pack_and_size(options.base)
    if asks and "class_word" not in asked.given:
        config = dataclasses.replace(config, class_word=_answer("class word: woman, man, ...", config.class_word, str))
    pack = asked.style_pack
    if pack is None:
        pack = _answer(f"styles: {', '.join(sorted(found.packs))}", usual, str) if asks else usual
    count = asked.count
    if count is None:
        count = _answer("how many pictures", COUNT, int) if asks else COUNT
    # The LoRA's name is in its metadata and in each picture, so it must not be the name of a private folder.
    name = lora.file_word(config.trigger_word)[:32]
    return studio.Order(name, config, found.pick(pack), count, asked.seed, size)


def usual_pack_and_size(base: str) -> tuple[str, tuple[int, int] | None]:
    """Return the default style pack, and the size of a picture if it isn't the base model's own."""
    if base != DEMO:
        return STYLE_PACK, None
    from .. import demo

    return demo.STYLE_PACK, demo.PICTURE_SIZE


def _answer(question: str, usual: Answer, kind: Callable[[str], Answer]) -> Answer:
    text = input(f"{question} [{usual}]: ").strip()
    try:
        return kind(text) if text else usual
    except ValueError:
        raise BadConfig(f"{text!r} is not a number") from None
