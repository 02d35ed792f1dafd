"""The commands that make pictures and look at them: generate, check, score."""

import argparse
import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import BadConfig, BadStylePack
from ..photos import Photo
from ..pictures.headshots import CONTACT_SHEET
from .common import (
    BarProgress,
    Command,
    add_base,
    add_device,
    add_face_network,
    base_from,
    device_from,
    print_warning,
    split_strength,
    unicode_text,
)
from .settings import SCHEDULE, add_settings, given_settings

SHEET_KEY = "facelora.sheet"
"""In a PNG file of `score`: it is a sheet of pictures, and none itself."""


def add_generate(parser: argparse.ArgumentParser) -> None:
    add_base(parser, required=False)
    add_settings(parser, SCHEDULE)
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="may be repeated")
    parser.add_argument(
        "--prompt",
        action="append",
        type=unicode_text,
        default=[],
        help="may be repeated; default: the LoRA's trigger phrase; words have no weights: "
        "brackets, as in (word:1.3), are characters",
    )
    parser.add_argument(
        "--style-pack", metavar="NAME", help="make headshots in the styles of a pack; 'list' lists them"
    )
    parser.add_argument("--style", action="append", metavar="NAME", help="only this style of the pack; may be repeated")
    parser.add_argument(
        "--style-folder", action="append", default=[], type=Path, metavar="DIR", help="your own style packs"
    )
    parser.add_argument(
        "--subject",
        type=unicode_text,
        metavar="WORDS",
        help="the person in style prompts; default: the LoRA's trigger phrase",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="folder for the pictures; what is there is not made again, and moves to DIR/earlier where it was made otherwise",
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
    parser.add_argument(
        "--negative",
        type=unicode_text,
        default="",
        help="what should not be in the pictures (FLUX.1-dev and the like take none, nor does --guidance 1)",
    )
    parser.add_argument("--count", type=int, default=4, help="pictures of each prompt, or of a whole pack (default: 4)")
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of the first picture; the next ones count up (default: 1)"
    )
    parser.add_argument("--size", type=_size, metavar="WxH", help="in pixels; default: what the base was trained at")
    parser.add_argument("--steps", type=int, help="sampling steps (default: what suits the base, or the style's)")
    parser.add_argument(
        "--guidance",
        type=float,
        help="classifier-free guidance, CFG scale (default: what suits the base, or the style's)",
    )
    parser.add_argument("--sampler", help="default: what suits the base (dpmpp_2m_karras; FLUX.1 and later: euler); "
                        "an unknown one lists them")  # fmt: skip
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
    from ..lora.file import LoraFile
    from ..photos import read_photos
    from ..pictures.face_pass import FacePass
    from ..pictures.generate import GenerateConfig
    from ..pictures.headshots import OVERVIEW, batch_summary, make_headshots

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
    if options.reference is not None and options.reference.resolve() == options.output.resolve():
        raise BadConfig(
            f"--output {options.output}: is the folder of the --reference photos, to which pictures would be added"
        )
    face_pass = FacePass(
        FacePass.below if options.face_pass is None else options.face_pass,
        FacePass.denoise if options.face_denoise is None else options.face_denoise,
    )
    loras = [(LoraFile.read(path), strength) for path, strength in map(split_strength, options.lora)]
    base = base_from(options, **given_settings(options))
    with BarProgress() as progress:
        if options.negative and base.embeds_guidance:
            progress.warning(f"--negative has no effect: this {base.family.title} takes no negative prompt")
        jobs = style_jobs(options, base, loras, progress) if options.style_pack else prompt_jobs(options, base, loras)
        for line in unread_syntax([text for job in jobs for text in (job.prompt, job.negative)]):
            progress.warning(line)
        photos = read_photos(options.reference, on_warning=progress.warning) if options.reference else None
        shots = make_headshots(
            base, loras, jobs, options.output, config,
            reference=None if photos is None else (photo.image() for photo in photos), face_pass=face_pass, keep=options.keep,
            device=device_from(options), on_progress=progress.phase,
        )  # fmt: skip
    if options.json:
        print((options.output / OVERVIEW).read_text("utf-8"), end="")
        return
    print(batch_summary(shots))
    redrawn = [shot.face_pass for shot in shots if shot.face_pass]
    if redrawn:
        print(f"faces drawn anew: {len(redrawn)}, of which {sum(one.kept for one in redrawn)} were taken")
    if any(shot.kept for shot in shots):
        print(f"most alike: {shots[0].path} ({shots[0].likeness:.2f}); the kept ones are in {options.output / 'kept'}")
    print(f"overview: {options.output / 'gallery.html'} and contact_sheet.png")


def unread_syntax(texts: Sequence[str]) -> list[str]:
    """A line for each thing in prompts that A1111 and ComfyUI read as more than text, as `(word:1.3)`."""
    weights, files = r"[(\[][^()\[\]]*:\s*[\d.]+\s*[)\]]", r"<(?:lora|lyco|hypernet):[^<>]*>"
    found = {match for text in texts for match in re.findall(f"{weights}|{files}", text)}
    return [
        f"{match!r} is read as these characters: "
        + ("give the file with --lora" if match.startswith("<") else "words have no weights here")
        for match in sorted(found)
    ]


def trigger_phrase(loras: Sequence[tuple[Any, float]]) -> str | None:
    """What the first LoRA that says so wants to be called by."""
    phrases = [lora.metadata.get("modelspec.trigger_phrase") for lora, _ in loras]
    return next((phrase for phrase in phrases if phrase), None)


def prompt_jobs(options: argparse.Namespace, base, loras: Sequence[tuple[Any, float]]) -> list[Any]:
    from ..pictures.generate import Job

    if options.style or options.subject:
        raise BadConfig("--style and --subject go with --style-pack")
    prompts = options.prompt or [f"a photo of {phrase}" for phrase in [trigger_phrase(loras)] if phrase]
    if not prompts:
        raise BadConfig("no --prompt given, and no LoRA that names a trigger phrase")
    for prompt in prompts:
        if prompts.count(prompt) > 1:
            raise BadConfig(f"--prompt {prompt!r} is given twice; --count makes more pictures of each")
    if options.count < 1:
        raise BadConfig(f"--count {options.count}: must be at least 1")
    steps = base.family.steps if options.steps is None else options.steps
    guidance = base.family.guidance if options.guidance is None else options.guidance
    # A larger count goes on where a smaller one ended, so that no picture gets another number.
    return [
        Job(prompt, options.seed + number, options.negative, options.size, steps, guidance)
        for number in range(options.count)
        for prompt in prompts
    ]


def style_jobs(
    options: argparse.Namespace, base, loras: Sequence[tuple[Any, float]], progress: BarProgress
) -> list[Any]:
    from ..models.clip import caption_tokens
    from ..pictures.generate import Job
    from ..pictures.style_pack import Subject, find_style_packs, long_prompts

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
    if base.family.wording == "tags":  # those that read nothing but CLIP
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
    from ..pictures.style_pack import find_style_packs

    found = find_style_packs(options.style_folder)
    problems = list(found.problems)
    packs = {}
    for name, pack in sorted(found.packs.items()):
        pictures = {}
        for style in pack.styles:
            try:
                if path := pack.picture(style):
                    pictures[style.name] = str(path)
            except BadStylePack as problem:
                problems.append(str(problem))
        packs[name] = {"title": pack.title, "styles": pack.names, "pictures": pictures}
    if options.json:
        print(json.dumps({"packs": packs, "problems": problems}, indent=1))
        return
    for name, pack in packs.items():
        print(f"{name}: {pack['title']}")
        for style in pack["styles"]:
            print(f"    {style}")
    for problem in problems:
        print_warning(problem)


def add_score(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", type=Path, metavar="IMAGES", help="folder of pictures")
    parser.add_argument(
        "--reference", type=Path, required=True, metavar="PHOTOS", help="folder of photos of the person"
    )
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="also write a sheet of the pictures, sorted")
    add_face_network(parser)
    parser.add_argument("--json", action="store_true")


def run_score(options: argparse.Namespace) -> None:
    from ..faces import Reference, load_faces
    from ..photos import read_photos
    from ..pictures.sheet import contact_sheet
    from ..storage.files import write_file
    from ..training.likeness import Score

    images = [photo for photo in read_photos(options.images, on_warning=print_warning) if not _is_sheet(photo)]
    reference = read_photos(options.reference, on_warning=print_warning)
    person = Reference((photo.image() for photo in reference), load_faces(options.face_network))
    found = person.compare(photo.image() for photo in images)
    scores = [Score.of(photo.name, *seen) for photo, seen in zip(images, found, strict=True)]
    order = sorted(
        range(len(images)), key=lambda index: -2.0 if (score := scores[index].likeness) is None else score, reverse=True
    )
    if options.json:
        print(json.dumps([dataclasses.asdict(scores[index]) for index in order], indent=1))
    else:
        print("\n".join(f"{scores[index]}  {scores[index].image}" for index in order))
    if options.sheet:
        tiles = [(images[index].image(shorter_side=256), str(scores[index])) for index in order]
        rows = [tiles[start : start + 6] for start in range(0, len(tiles), 6)]
        sheet = contact_sheet(
            [(f"{6 * number + 1} to {6 * number + len(row)}", [image for image, _ in row]) for number, row in enumerate(rows)],
            tile=224, labels=[[label for _, label in row] for row in rows], title="likeness, the most alike first",
        )  # fmt: skip
        marked = PngInfo()
        marked.add_text(SHEET_KEY, "score")
        write_file(options.sheet, lambda file: sheet.save(file, "PNG", pnginfo=marked))


def _is_sheet(photo: Photo) -> bool:
    """Whether it is one of our own sheets of pictures, which stands among them."""
    if photo.name == CONTACT_SHEET:
        return True
    assert isinstance(photo.source, Path), "it is read from a folder"
    with Image.open(photo.source) as image:
        return SHEET_KEY in image.info


def add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of photos of one person")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.html", help="also write a page with the faces and the reasons"
    )
    parser.add_argument(
        "--resolution", type=int, default=1024, help="that the base is trained at, in pixels (default: 1024)"
    )
    parser.add_argument(
        "--threshold", action="append", default=[], type=_threshold, metavar="NAME=NUMBER",
        help="where a verdict changes (docs/photos.md lists the names); may be repeated",
    )  # fmt: skip
    add_face_network(parser)
    parser.add_argument("--json", action="store_true")


def _threshold(text: str) -> tuple[str, float]:
    from ..photos import Thresholds

    name, _, number = text.partition("=")
    kinds = get_type_hints(Thresholds)
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"{name!r} is no threshold: {', '.join(kinds)}")
    try:
        value = kinds[name](number)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        what = "whole number" if kinds[name] is int else "number"
        raise argparse.ArgumentTypeError(f"{number!r} in {text!r} is not a {what}")
    return name, value


def run_check(options: argparse.Namespace) -> None:
    from ..faces import load_faces
    from ..photos import Thresholds, check_photos, format_report, read_photos, save_sheet

    photos = read_photos(options.photos, on_warning=print_warning)
    network = load_faces(options.face_network)
    thresholds = Thresholds.for_resolution(options.resolution, network.name)
    report = check_photos(photos, network, dataclasses.replace(thresholds, **dict(options.threshold)))
    print(json.dumps(report.to_dict(), indent=1) if options.json else format_report(report))
    if options.sheet:
        save_sheet(report, options.sheet)


PICTURE_COMMANDS: tuple[Command, ...] = (
    (
        "generate",
        "make pictures with a base model and LoRAs, from prompts or in the styles of a pack",
        add_generate,
        run_generate,
    ),
    ("check", "say which photos will teach the person well, which not, and what is missing", add_check, run_check),
    ("score", "measure how much pictures look like the person on photos", add_score, run_score),
)
