"""The command line: `facelora <command>`, the same as `python -m facelora <command>`."""

import argparse
import dataclasses
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .cli_lora import LORA_COMMANDS, split_strength
from .config import TrainConfig, config_from
from .errors import BadConfig, BadFile, FaceLoraError


class Cancelled(FaceLoraError):
    """The user has stopped the command."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0 when it is done, 1 when it failed with a message on stderr, 2 for wrong usage."""
    parser = build_parser()
    options = parser.parse_args(arguments)
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
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photos (jpg, png, webp, heic, ...)")
    parser.add_argument("--base", required=True, help="checkpoint file, diffusers folder, or hub id")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.safetensors", help="the LoRA to write")
    parser.add_argument("--class-photos", type=Path, metavar="DIR", help="photos of the class, for prior preservation")
    parser.add_argument("--continue-from", type=Path, metavar="FILE", help="LoRA to go on from")
    parser.add_argument(
        "--config", type=Path, metavar="FILE.toml", help="settings; options given here win over the file's"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the saved state of the same run if there is one"
    )
    parser.add_argument(
        "--strict", action="store_true", help="fail on a photo that cannot be read, instead of skipping it"
    )
    add_device(parser)
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per report on stdout instead of a progress bar"
    )
    add_settings(parser.add_argument_group("settings"))


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1, mps, ...; default: the best there is")


def add_settings(group) -> None:
    """One option for each field of TrainConfig; what is not given does not appear, so that a file's value stays."""
    hints = get_type_hints(TrainConfig)
    for item in dataclasses.fields(TrainConfig):
        flag = "--" + item.name.replace("_", "-")
        names = ["--trigger", flag] if item.name == "trigger_word" else [flag]
        hint, text = hints[item.name], item.metadata["help"]
        common: dict[str, Any] = {"dest": f"setting_{item.name}", "default": argparse.SUPPRESS}
        if get_origin(hint) is Literal:
            text = f"{text} (default: {item.default})"
            group.add_argument(*names, choices=get_args(hint), help=text, **common)
        elif hint is bool:
            text = f"{text} (default: {'yes' if item.default else 'no'})"
            group.add_argument(*names, action=argparse.BooleanOptionalAction, help=text, **common)
        elif get_origin(hint) is dict:
            number = get_args(hint)[1]
            kind = _pattern_of(number)
            group.add_argument(*names, action="append", type=kind, metavar="REGEX=NUMBER", help=text, **common)
        elif get_origin(hint) is tuple:
            name = flag.removesuffix("s")
            group.add_argument(name, action="append", metavar="TEXT", help=f"{text}; may be repeated", **common)
        else:
            kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
            if item.default is not None:
                text = f"{text} (default: {item.default})"
            metavar = {int: "N", float: "X", str: "TEXT"}[kinds[0]]
            group.add_argument(*names, type=kinds[0], metavar=metavar, help=text.replace("%", "%%"), **common)


def _pattern_of(number: type) -> Callable[[str], tuple[str, Any]]:
    def parse(text: str) -> tuple[str, Any]:
        pattern, separator, value = text.rpartition("=")
        if not separator:
            raise argparse.ArgumentTypeError(f"{text!r} is not REGEX=NUMBER")
        try:
            return pattern, number(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} in {text!r} is not a number") from None

    return parse


def settings_from(options: argparse.Namespace) -> TrainConfig:
    """The TrainConfig of a TOML file, overridden by the options given on the command line."""
    settings = read_toml(options.config) if options.config else {}
    for name, value in vars(options).items():
        if name.startswith("setting_"):
            if value and isinstance(value, list) and isinstance(value[0], tuple):
                value = dict(value)
            settings[name.removeprefix("setting_")] = value
    return config_from(settings)


def read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile(f"{path}: cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path}: not a TOML file: {error}") from None


def run_train(options: argparse.Namespace) -> None:
    from .likeness import LIKENESS_KEY
    from .photos_to_lora import state_path, train

    config = settings_from(options)
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
        progress.phase(phase, done, total)
        if stop.asked:
            raise Cancelled(f"stopped while {phase}; nothing is lost, start again")

    with stop, progress:
        lora = train(
            options.photos, options.base, config,
            output=options.output, class_photos=options.class_photos, continue_from=options.continue_from,
            resume=options.resume, strict=options.strict, device=device_from(options),
            on_step=on_step, on_phase=on_phase, on_warning=progress.warning,
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


def device_from(options: argparse.Namespace):
    if options.device is None:
        return None
    import torch

    try:
        device = torch.device(options.device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise BadConfig(f"--device {options.device}: {reason}") from None
    return device


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


class BarProgress:
    """Progress bars on stderr, which look at the loss no more than twice a second."""

    def __init__(self) -> None:
        self._bar, self._name, self._shown = None, "", 0.0

    def __enter__(self) -> "BarProgress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _bar_for(self, name: str, total: int):
        from tqdm import tqdm

        if self._bar is None or self._name != name:
            self.__exit__()
            self._bar, self._name = tqdm(total=total, desc=name, dynamic_ncols=True, file=sys.stderr), name
        return self._bar

    def phase(self, name: str, done: int, total: int) -> None:
        bar = self._bar_for(name, total)
        bar.update(done - bar.n)

    def step(self, report) -> None:
        bar = self._bar_for("training", report.steps)
        if bar.n == 0 and report.step > 1:
            bar.initial = bar.n = report.step - 1  # resumed: the rate counts this session's steps only
        now = time.monotonic()
        if now - self._shown > 0.5 or report.step == report.steps:
            self._shown = now
            alike = f", likeness {report.likeness.likeness:.2f}" if report.likeness else ""
            memory = f", {report.memory / 2**30:.1f} GiB" if report.memory else ""
            bar.set_postfix_str(f"loss {report.loss:.4f}, lr {report.learning_rate:.1e}{alike}{memory}", refresh=False)
            bar.update(report.step - bar.n)

    def warning(self, message: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(f"warning: {message}", file=sys.stderr)


class JsonProgress:
    """The same as lines of JSON on stdout, at most twice a second and for the last step."""

    def __init__(self) -> None:
        self._shown = 0.0

    def __enter__(self) -> "JsonProgress":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def phase(self, name: str, done: int, total: int) -> None:
        self._print(done == total, phase=name, done=done, total=total)

    def step(self, report) -> None:
        now = time.monotonic()
        if report.step == report.steps or now - self._shown > 0.5:
            self._print(
                True, phase="training", step=report.step, steps=report.steps, loss=report.loss,
                learning_rate=report.learning_rate, seconds_per_step=report.seconds_per_step,
                seconds_left=report.seconds_left, memory=report.memory,
                likeness=report.likeness and dataclasses.asdict(report.likeness),
            )  # fmt: skip

    def warning(self, message: str) -> None:
        self._print(True, warning=message)

    def _print(self, always: bool, **values: Any) -> None:
        if always or time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            print(json.dumps(values), flush=True)


# --- generate, score, check ---


def add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", help="checkpoint file, diffusers folder, or hub id")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    parser.add_argument(
        "--prompt", action="append", default=[], help="may be repeated; default: the LoRA's trigger phrase"
    )
    parser.add_argument(
        "--style-pack", metavar="NAME", help="make headshots in the styles of a pack; 'list' lists them"
    )
    parser.add_argument("--style", action="append", metavar="NAME", help="only this style of the pack; may be repeated")
    parser.add_argument(
        "--style-folder", action="append", default=[], type=Path, metavar="DIR", help="your own style packs"
    )
    parser.add_argument(
        "--subject", metavar="WORDS", help="the person in style prompts; default: the LoRA's trigger phrase"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the pictures; what is there is not made again"
    )
    parser.add_argument(
        "--reference", type=Path, metavar="PHOTOS", help="photos of the person: sorts the pictures by likeness"
    )
    parser.add_argument(
        "--keep",
        type=int,
        metavar="K",
        help="copy the K most alike into DIR/kept (default: a quarter; needs --reference)",
    )
    parser.add_argument(
        "--face-pass",
        type=float,
        metavar="SHARE",
        help="draw faces anew that are smaller than this share of the base's "
        "resolution, where likeness does not fall by it; 0: never (default: 0.25; needs --reference)",
    )
    parser.add_argument(
        "--face-denoise", type=float, metavar="SHARE", help="of the steps that are taken for it (default: 0.35)"
    )
    parser.add_argument("--negative", default="", help="what should not be in the pictures")
    parser.add_argument("--count", type=int, default=4, help="pictures of each prompt, or of a whole pack (default: 4)")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the first picture; the next ones count up (default: 1)"
    )
    parser.add_argument("--size", type=_size, metavar="WxH", help="in pixels; default: what the base was trained at")
    parser.add_argument("--steps", type=int, help="sampling steps (default: 25, or the style's)")
    parser.add_argument(
        "--guidance", type=float, help="classifier-free guidance, CFG scale (default: 6, or the style's)"
    )
    parser.add_argument(
        "--sampler", default="dpmpp_2m_karras", help="default: dpmpp_2m_karras; an unknown one lists them"
    )
    parser.add_argument("--clip-skip", type=int, default=1, help="1: last layer of the text encoder (default: 1)")
    parser.add_argument("--batch-size", type=int, default=1, help="pictures at a time (default: 1)")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto")
    add_device(parser)
    parser.add_argument("--json", action="store_true", help="list the pictures as JSON")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT")
    return int(width), int(height)


def run_generate(options: argparse.Namespace) -> None:
    from .base import load_base
    from .face_pass import FacePass
    from .generate import GenerateConfig
    from .headshots import OVERVIEW, make_headshots, summary
    from .lora_file import LoraFile
    from .photos import read_photos

    if options.style_pack == "list":
        list_style_packs(options)
        return
    for option, value in (("--base FILE", options.base), ("--output DIR", options.output)):
        if value is None:
            raise BadConfig(f"{option} is missing")
    config = GenerateConfig(options.sampler, options.clip_skip, options.batch_size, options.precision)
    given = {name: getattr(options, name) for name in ("keep", "face_pass", "face_denoise")}
    if options.reference is None and (wanting := [name for name, value in given.items() if value is not None]):
        raise BadConfig(f"--{wanting[0].replace('_', '-')} needs --reference PHOTOS, to measure likeness")
    face_pass = FacePass(
        FacePass.below if options.face_pass is None else options.face_pass,
        FacePass.denoise if options.face_denoise is None else options.face_denoise,
    )
    loras = [(LoraFile.read(path), strength) for path, strength in map(split_strength, options.lora)]
    base = load_base(options.base)
    with BarProgress() as progress:
        jobs = style_jobs(options, base, loras, progress) if options.style_pack else prompt_jobs(options, loras)
        reference = read_photos(options.reference, on_warning=progress.warning) if options.reference else []
        shots = make_headshots(
            base, loras, jobs, options.output, config,
            reference=[photo.image() for photo in reference], face_pass=face_pass, keep=options.keep,
            device=device_from(options), on_progress=progress.phase,
        )  # fmt: skip
    if options.json:
        print((options.output / OVERVIEW).read_text("utf-8"), end="")
        return
    print(summary(shots))
    redrawn = [shot.face_pass for shot in shots if shot.face_pass]
    if redrawn:
        print(f"faces drawn anew: {len(redrawn)}, of which {sum(one.kept for one in redrawn)} were taken")
    if any(shot.kept for shot in shots):
        print(f"most alike: {shots[0].path} ({shots[0].likeness:.2f}); the kept ones are in {options.output / 'kept'}")
    print(f"overview: {options.output / 'gallery.html'} and contact_sheet.png")


def trigger_phrase(loras: Sequence[tuple[Any, float]]) -> str | None:
    """What the first LoRA that says so wants to be called by."""
    phrases = [lora.metadata.get("modelspec.trigger_phrase") for lora, _ in loras]
    return next((phrase for phrase in phrases if phrase), None)


def prompt_jobs(options: argparse.Namespace, loras: Sequence[tuple[Any, float]]) -> list[Any]:
    from .generate import Job

    if options.style or options.subject:
        raise BadConfig("--style and --subject go with --style-pack")
    prompts = options.prompt or [f"a photo of {phrase}" for phrase in [trigger_phrase(loras)] if phrase]
    if not prompts:
        raise BadConfig("no --prompt given, and no LoRA that names a trigger phrase")
    if options.count < 1:
        raise BadConfig(f"--count {options.count}: must be at least 1")
    steps = 25 if options.steps is None else options.steps
    guidance = 6.0 if options.guidance is None else options.guidance
    return [
        Job(prompt, options.seed + number, options.negative, options.size, steps, guidance)
        for prompt in prompts
        for number in range(options.count)
    ]


def style_jobs(
    options: argparse.Namespace, base, loras: Sequence[tuple[Any, float]], progress: "BarProgress"
) -> list[Any]:
    from .families.clip import caption_tokens
    from .generate import Job
    from .style_pack import Subject, find_style_packs, long_prompts

    if options.prompt:
        raise BadConfig("--prompt and --style-pack are both given; choose one")
    found = find_style_packs(options.style_folder)
    for problem in found.problems:
        progress.warning(problem)
    phrase = options.subject or trigger_phrase(loras)
    if not phrase:
        raise BadConfig("no --subject given, and no LoRA that names a trigger phrase")
    trigger, _, class_word = phrase.partition(" ")
    styled = found.pick(options.style_pack).prompts(
        Subject(trigger, class_word), base.family.name, options.count, options.seed, options.style, base.resolution
    )
    for line in long_prompts(styled, lambda text: len(caption_tokens(text)) + 2):
        progress.warning(line + "; it is encoded in several chunks")
    return [
        Job(
            prompt.prompt,
            prompt.seed,
            ", ".join(part for part in (prompt.negative, options.negative) if part),
            options.size or (prompt.width, prompt.height),
            prompt.steps if options.steps is None else options.steps,
            prompt.guidance if options.guidance is None else options.guidance,
            prompt.strength,
            prompt.style,
        )
        for prompt in styled
    ]


def list_style_packs(options: argparse.Namespace) -> None:
    from .style_pack import find_style_packs

    found = find_style_packs(options.style_folder)
    packs = {name: {"title": pack.title, "styles": pack.names} for name, pack in sorted(found.packs.items())}
    if options.json:
        print(json.dumps({"packs": packs, "problems": list(found.problems)}, indent=1))
        return
    for name, pack in packs.items():
        print(f"{name}: {pack['title']}")
        for style in pack["styles"]:
            print(f"    {style}")
    for problem in found.problems:
        print(f"warning: {problem}", file=sys.stderr)


def add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of pictures")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="PHOTOS", help="folder of photos of the person"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="also write a sheet of the pictures, sorted")
    parser.add_argument("--json", action="store_true")


def run_score(options: argparse.Namespace) -> None:
    from .faces import Reference
    from .files import write_file
    from .generate import contact_sheet
    from .likeness import Score
    from .photos import read_photos

    def warn(message: str) -> None:
        print(f"warning: {message}", file=sys.stderr)

    images = read_photos(options.images, on_warning=warn)
    reference = read_photos(options.reference, on_warning=warn)
    person = Reference([photo.image() for photo in reference])
    found = person.compare(photo.image() for photo in images)
    scores = [Score.of(photo.name, *seen) for photo, seen in zip(images, found, strict=True)]
    order = sorted(
        range(len(images)), key=lambda index: -2.0 if (score := scores[index].likeness) is None else score, reverse=True
    )
    if options.sheet:
        tiles = [(images[index].image(shorter_side=256), str(scores[index])) for index in order]
        rows = [tiles[start : start + 6] for start in range(0, len(tiles), 6)]
        sheet = contact_sheet(
            [(f"{6 * number + 1} to {6 * number + len(row)}", [image for image, _ in row]) for number, row in enumerate(rows)],
            tile=224, labels=[[label for _, label in row] for row in rows], title="likeness, the most alike first",
        )  # fmt: skip
        write_file(options.sheet, lambda file: sheet.save(file, "PNG"))
    if options.json:
        print(json.dumps([dataclasses.asdict(scores[index]) for index in order], indent=1))
        return
    for index in order:
        print(f"{scores[index]}  {scores[index].image}")


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photos of one person")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.html", help="also write a page with the faces and the reasons"
    )
    parser.add_argument(
        "--resolution", type=int, default=1024, help="that the base is trained at, in pixels (default: 1024)"
    )
    parser.add_argument("--json", action="store_true")


def run_check(options: argparse.Namespace) -> None:
    from .faces import load_faces
    from .photos import Thresholds, check_photos, format_report, read_photos, save_sheet

    photos = read_photos(options.photos, on_warning=lambda message: print(f"warning: {message}", file=sys.stderr))
    report = check_photos(photos, load_faces(), Thresholds.for_resolution(options.resolution))
    if options.sheet:
        save_sheet(report, options.sheet)
    print(json.dumps(report.to_dict(), indent=1) if options.json else format_report(report))


# --- the smaller commands ---


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("demo_output"), metavar="DIR")
    parser.add_argument("--person", type=int, default=35, help="which of the unseen people, 35 to 40 (default: 35)")
    parser.add_argument("--steps", type=int, help="optimizer steps; default: the demo's own")


def run_demo(options: argparse.Namespace) -> None:
    from .demo import CONFIG, run

    config = CONFIG if options.steps is None else dataclasses.replace(CONFIG, steps=options.steps)
    with BarProgress() as bar:
        report = run(options.output, person=options.person, config=config, progress=bar)
    print(report.text)
    print(f"look at {options.output / 'contact_sheet.png'}")


def add_bench(parser: argparse.ArgumentParser) -> None:
    from .bench import add_arguments

    add_arguments(parser)
    add_device(parser)
    parser.add_argument("--json", action="store_true")


def run_bench(options: argparse.Namespace) -> None:
    from .bench import format_report, run

    report = run(options, device_from(options))
    print(json.dumps(report, indent=1) if options.json else format_report(report))


def add_clear_cache(parser: argparse.ArgumentParser) -> None:
    pass


def run_clear_cache(options: argparse.Namespace) -> None:
    from .cache import cache_folder, clear_cache

    print(f"{clear_cache()} files deleted from {cache_folder()}")


COMMANDS: tuple[
    tuple[str, str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], Any]], ...
] = (
    (
        "demo",
        "the whole job on the small base model that comes with the package, without GPU or download",
        add_demo,
        run_demo,
    ),
    ("train", "train a LoRA on a folder of photos of one person", add_train, run_train),
    (
        "generate",
        "make pictures with a base model and LoRAs, from prompts or in the styles of a pack",
        add_generate,
        run_generate,
    ),
    ("check", "say which photos will teach the person well, which not, and what is missing", add_check, run_check),
    ("score", "measure how much pictures look like the person on photos", add_score, run_score),
    *LORA_COMMANDS,
    (
        "bench",
        "time training steps on a full-size denoiser, beside a plain diffusers and peft loop",
        add_bench,
        run_bench,
    ),
    ("clear-cache", "delete everything that was kept of photos and captions", add_clear_cache, run_clear_cache),
)
