"""The command line: `facelora <command>`, the same as `python -m facelora <command>`."""

import argparse
import dataclasses
import io
import json
import logging
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import config_from
from ..errors import BadConfig, FaceLoraError
from ..training.methods import METHODS
from ..training.recipes import RECIPES, recipe_settings
from .common import BarProgress, Command, JsonProgress, add_base, add_device, add_face_network, base_from, device_from
from .compare import COMPARE_COMMANDS
from .lora import LORA_COMMANDS
from .pictures import PICTURE_COMMANDS
from .settings import add_settings, schedule_from, settings_from


class Cancelled(FaceLoraError):
    """The user has stopped the command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 when it is done, 1 when it failed with a message on stderr, 2 for wrong usage."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr does: a name that the terminal, or the file in its place, has no letters for is no reason to fail.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not hasattr(options, "run"):
        parser.print_help()
        return 2
    # peft imports bitsandbytes where it is installed, which then complains about kernels that nobody here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        return options.run(options) or 0
    except FaceLoraError as error:
        print(f"facelora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("facelora: stopped", file=sys.stderr)
        return 1
    except BrokenPipeError:
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="facelora",
        description="10-20 photos of a person in, a small LoRA in Kohya's format out, and pictures of the person from it. "
        "Train only people who have agreed to it.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for name, text, add, run in COMMANDS:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        add(command)
        command.set_defaults(run=run)
    return parser


# --- train ---


def add_train(parser: argparse.ArgumentParser) -> None:
    # Before each wrong usage argparse would list every setting.
    parser.usage = "%(prog)s PHOTOS --base BASE --output FILE.safetensors [OPTIONS] (--help lists them)"
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photos (jpg, png, webp, heic, ...)")
    add_base(parser, required=True)
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors", help="the LoRA to write")
    parser.add_argument("--class-photos", type=Path, metavar="DIR", help="photos of the class, for prior preservation")
    parser.add_argument("--continue-from", type=Path, metavar="FILE", help="LoRA to go on from")
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="settings; options given here win over the file's"
    )
    parser.add_argument(
        "--recipe", choices=tuple(RECIPES),
        help="settings for little, usual or much time, which the file's and the options here win over",
    )  # fmt: skip
    unfinished = parser.add_mutually_exclusive_group()
    unfinished.add_argument(
        "--resume", action="store_true", help="go on from the saved state of the same run if there is one"
    )
    unfinished.add_argument("--restart", action="store_true", help="begin anew, whatever state is there")
    parser.add_argument(
        "--strict", action="store_true", help="fail on a photo that cannot be read, instead of skipping it"
    )
    add_face_network(parser, default=None)
    add_device(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per report on stdout instead of a progress bar"
    )
    add_settings(parser.add_argument_group("settings"))


def run_train(options: argparse.Namespace) -> None:
    from ..faces import load_faces
    from ..training.callbacks import Callbacks
    from ..training.job import state_path, train
    from ..training.likeness import LIKENESS_KEY

    given = settings_from(options)
    base = base_from(options, **schedule_from(given))
    config = config_from(recipe_settings(options.recipe, base.family.name, given) if options.recipe else given)
    stop = _StopOnSignal()
    progress = JsonProgress() if options.json else BarProgress()

    def on_step(report) -> None:
        progress.step(report)
        if stop.asked:
            raise Cancelled(
                f"stopped after step {report.step} of {report.steps}; "
                f"go on with --resume (state: {state_path(options.output)})"
            )

    def on_phase(phase: str, done: int, total: int) -> None:
        if phase == "samples":  # a part of the training, whose bar is shown
            return
        progress.phase(phase, done, total)
        if stop.asked:
            raise Cancelled(f"stopped while {phase}; nothing is lost, start again")

    if "learning_rate" in given and METHODS[config.method].makes == "embedding" and config.optimizer != "prodigy":
        progress.warning(f"learning_rate is that of a denoiser; the vectors of {config.method} have embedding_lr")
    looks = config.hold_out or config.check_photos or config.face_crops or config.face_masks
    if options.face_network and not looks:
        raise BadConfig(
            "--face-network needs --hold-out, --check-photos, --face-crops or --face-masks: nothing else looks"
        )
    faces = load_faces(options.face_network) if options.face_network else None
    with stop, progress:
        lora = train(
            options.photos, base, config, faces=faces,
            output=options.output, class_photos=options.class_photos, continue_from=options.continue_from,
            resume=options.resume, restart=options.restart, strict=options.strict, device=device_from(options),
            callbacks=Callbacks(on_step=on_step, on_phase=on_phase, on_warning=progress.warning),
        )  # fmt: skip
    size = options.output.stat().st_size
    trigger = lora.metadata["modelspec.trigger_phrase"]
    if options.json:
        print(json.dumps({"output": str(options.output), "bytes": size, "trigger_phrase": trigger}))
    else:
        print(f"{options.output}  ({size / 1e6:.1f} MB, rank {config.rank}); prompt it with: a photo of {trigger}")
        if LIKENESS_KEY in lora.metadata:
            print(format_likeness(json.loads(lora.metadata[LIKENESS_KEY])))


def format_likeness(measured: dict[str, Any]) -> str:
    """The curve in a LoRA's metadata as a table."""
    rows = [
        f"likeness to held-out photos ({measured['network']}; the training photos themselves: {measured['photos']:.2f})"
    ]
    rows.append("      step  likeness  copying  leakage  drift")
    for index, point in enumerate(measured["points"]):
        name = "+".join(map(str, point["merged"])) or str(point["step"])
        rows.append(
            f"{name:>10}  {point['likeness']:8.2f}  {point['copying']:7.2f}  {point['leakage']:7.2f}  {point['drift']:5.1f}"
            + ("  <- kept" if index == measured["kept"] else "")
        )
    return "\n".join(rows)


class _StopOnSignal:
    """Within it, Ctrl-C and SIGTERM only leave a note, so that a run stops between two steps; a second Ctrl-C is at once."""

    asked = False

    def __enter__(self) -> "_StopOnSignal":
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


# --- the smaller commands ---


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR")
    parser.add_argument("--person", type=int, default=35, help="which of the unseen people, 35 to 40 (default: 35)")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the demo's own")


def run_demo(options: argparse.Namespace) -> None:
    from ..demo import CONFIG, run

    steps = CONFIG.steps if options.steps is None else options.steps
    config = dataclasses.replace(CONFIG, steps=steps, warmup_steps=max(0, min(CONFIG.warmup_steps, steps - 1)))
    with BarProgress() as bar:
        report = run(options.output, person=options.person, config=config, progress=bar)
    print(report.text)
    print(f"look at {options.output / 'contact_sheet.png'}")


def add_bench(parser: argparse.ArgumentParser) -> None:
    from ..bench.report import add_arguments

    add_arguments(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true")


def run_bench(options: argparse.Namespace) -> None:
    from ..bench.report import append_report, format_report, run
    from ..storage.files import check_writable

    if options.append:
        check_writable(options.append)
    report = run(options, device_from(options))
    print(json.dumps(report, indent=1) if options.json else format_report(report))
    if options.append:  # last, so that nothing measured is lost where it fails
        append_report(options.append, report, shlex.join(["facelora", *sys.argv[1:]]))


def add_clear_cache(parser: argparse.ArgumentParser) -> None:
    pass


def run_clear_cache(options: argparse.Namespace) -> None:
    from ..storage.cache_folder import cache_folder, clear_cache

    print(f"{clear_cache()} files deleted from {cache_folder()}")


COMMANDS: tuple[Command, ...] = (
    (
        "demo",
        "the whole job on the small base model that comes with the package, without GPU or download",
        add_demo,
        run_demo,
    ),
    ("train", "train a LoRA on a folder of photos of one person", add_train, run_train),
    *COMPARE_COMMANDS,
    *PICTURE_COMMANDS,
    *LORA_COMMANDS,
    (
        "bench",
        "time training steps on a full-size denoiser, beside a plain diffusers and peft loop",
        add_bench,
        run_bench,
    ),
    ("clear-cache", "delete everything that was kept of photos and captions", add_clear_cache, run_clear_cache),
)
