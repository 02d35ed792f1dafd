"""The commands that draw or measure pictures: generate, check and score."""

import argparse
import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ..errors import BadConfig, BadStylePack, one_line
from ..faces import Reference, check_judge, faces_if_installed, load_faces
from ..lora import LoraFile
from ..models import Base, caption_tokens
from ..photos import (
    SHEET_KEY,
    Photo,
    Thresholds,
    check_photos,
    format_report,
    is_sheet,
    read_photos,
    save_sheet,
)
from ..pictures import (
    CONTACT_SHEET,
    OVERVIEW,
    FacePass,
    GenerateConfig,
    Group,
    Headshot,
    Job,
    Subject,
    batch_summary,
    check_count,
    contact_sheet,
    find_style_packs,
    long_prompts,
    make_group_pictures,
    make_headshots,
)
from ..storage import write_file
from ..training import Score
from .common import BarProgress, base_from, print_warning, split_strength, terminal_width
from .computing import device_from
from .group import group_from, photos_from
from .settings import given_settings


def run_generate(options: argparse.Namespace) -> None:
    if options.style_pack == "list":
        list_style_packs(options)
        return
    _check_generate(options)
    config = GenerateConfig(options.sampler, options.clip_skip, options.batch_size, options.precision)
    face_pass = FacePass(
        FacePass.below if options.face_pass is None else options.face_pass,
        FacePass.denoise if options.face_denoise is None else options.face_denoise,
    )
    group = group_from(options) if options.person else None
    loras = [(LoraFile.read(path), strength) for path, strength in map(split_strength, options.lora)]
    base = base_from(options, **given_settings(options))
    with BarProgress() as progress:
        if options.negative and base.embeds_guidance:
            progress.warning(f"--negative has no effect: this {base.family.title} doesn't use a negative prompt")
        jobs = (
            pack_jobs(options, base, loras, progress, group)
            if options.style_pack
            else prompt_jobs(options, base, loras)
        )
        for line in without_trigger(loras, [job.prompt for job in jobs]):
            progress.warning(line)
        if line := few_steps_hint(options, base):
            progress.warning(line)
        for line in unread_syntax([text for job in jobs for text in (job.prompt, job.negative)]):
            progress.warning(line)
        device = device_from(options)
        if group:
            people = photos_from(group, options.reference, progress.warning) if options.reference else None
            shots = make_group_pictures(
                base, group, jobs, options.output, config, loras=loras, reference=people, face_pass=face_pass,
                keep=options.keep, device=device, on_progress=progress.phase,
            )  # fmt: skip
        else:
            photos = read_photos(*options.reference, on_warning=progress.warning) if options.reference else None
            shots = make_headshots(
                base, loras, jobs, options.output, config,
                reference=None if photos is None else (photo.image() for photo in photos), face_pass=face_pass,
                keep=options.keep, device=device, on_progress=progress.phase,
            )  # fmt: skip
    if options.json:
        print((options.output / OVERVIEW).read_text("utf-8"), end="")
    else:
        _print_headshots(shots, options.output, people=len(options.reference))


def _check_generate(options: argparse.Namespace) -> None:
    """Raise BadConfig, before loading anything, if an option is missing or is useless without another one."""
    for option, value in (("--base FILE", options.base), ("--output DIR", options.output)):
        if value is None:
            raise BadConfig(f"{option} is missing")
    given = {name: getattr(options, name) for name in ("keep", "face_pass", "face_denoise")}
    if not options.reference and (wanting := [name for name, value in given.items() if value is not None]):
        raise BadConfig(f"--{wanting[0].replace('_', '-')} requires --reference PHOTOS, to measure likeness")
    if len(options.reference) > 1 and not options.person:
        raise BadConfig("--reference is given twice; use --person for photos of several people")
    if options.region and not options.person:
        raise BadConfig("--region requires --person")


def _print_headshots(shots: Sequence[Headshot], folder: Path, people: int) -> None:
    print(batch_summary(shots, people))
    redrawn = [shot.face_pass for shot in shots if shot.face_pass]
    if redrawn:
        print(f"faces redrawn: {len(redrawn)}, used: {sum(one.kept for one in redrawn)}")
    if any(shot.kept for shot in shots):
        print(f"most alike: {shots[0].path} ({shots[0].likeness:.2f}); kept pictures are in {folder / 'kept'}")
    print(f"overview: {folder / 'gallery.html'} and contact_sheet.png")


def few_steps_hint(options: argparse.Namespace, base: Base) -> str | None:
    """Return a line on how a base model draws if only its name shows that it was distilled; None if nothing changes."""
    own = {"--steps": f"in {base.steps} steps", "--guidance": "without guidance"}
    left = {option: how for option, how in own.items() if getattr(options, option[2:]) is None}
    if not (base.few_steps and left) or base.is_distilled:
        return None
    return (
        f"{base.name}: its name says that it was distilled to a few steps, so it draws {' '.join(left.values())}; "
        f"if that is wrong, set {' and '.join(left)}"
    )


def unread_syntax(texts: Sequence[str]) -> list[str]:
    """Return a warning for each part of the prompts that is special syntax in A1111 and ComfyUI, such as `(word:1.3)`."""
    weights, files = r"[(\[][^()\[\]]*:\s*[\d.]+\s*[)\]]", r"<(?:lora|lyco|hypernet):[^<>]*>"
    found = {match for text in texts for match in re.findall(f"{weights}|{files}", text)}
    return [
        f"{match!r} is read as ordinary text: "
        + ("use --lora for the file" if match.startswith("<") else "words cannot have weights")
        for match in sorted(found)
    ]


def without_trigger(loras: Sequence[tuple[Any, float]], prompts: Sequence[str]) -> list[str]:
    """Return a warning for each LoRA whose trigger phrase is in none of the prompts."""
    phrases = {lora.name: lora.metadata.get("modelspec.trigger_phrase") for lora, _ in loras}
    return [
        f"no prompt contains the trigger phrase of {Path(name).name}, {phrase!r}"
        for name, phrase in phrases.items()
        if phrase and not any(phrase.casefold() in prompt.casefold() for prompt in prompts)
    ]


def trigger_phrase(loras: Sequence[tuple[Any, float]]) -> str | None:
    """Return the trigger phrase of the first LoRA whose metadata have one, else None."""
    phrases = [lora.metadata.get("modelspec.trigger_phrase") for lora, _ in loras]
    return next((phrase for phrase in phrases if phrase), None)


def prompt_jobs(options: argparse.Namespace, base: Base, loras: Sequence[tuple[Any, float]]) -> list[Any]:
    if options.style or options.subject:
        raise BadConfig("--style and --subject require --style-pack")
    prompts = options.prompt or [f"a photo of {phrase}" for phrase in [trigger_phrase(loras)] if phrase]
    if not prompts:
        raise BadConfig("no --prompt given, and no LoRA has a trigger phrase")
    for prompt in prompts:
        if prompts.count(prompt) > 1:
            raise BadConfig(f"--prompt {prompt!r} is given twice; --count makes more pictures of each")
    check_count(options.count)
    steps = base.steps if options.steps is None else options.steps
    guidance = base.guidance if options.guidance is None else options.guidance
    # All prompts with one seed, then the next seed: a larger --count only adds pictures, without renumbering any.
    return [
        Job(prompt, options.seed + number, options.negative, options.size, steps, guidance)
        for number in range(options.count)
        for prompt in prompts
    ]


def pack_jobs(
    options: argparse.Namespace,
    base: Base,
    loras: Sequence[tuple[Any, float]],
    progress: BarProgress,
    group: Group | None = None,
) -> list[Any]:
    """Return the jobs of a style pack. For a group, the list of names is the subject, and the size is the group's."""
    if options.prompt:
        raise BadConfig("--prompt and --style-pack are both given; use only one")
    found = find_style_packs(options.style_folder)
    for problem in found.problems:
        progress.warning(problem)
    phrase = options.subject or trigger_phrase(loras)
    if not (phrase or group):
        raise BadConfig("no --subject given, and no LoRA has a trigger phrase")
    trigger, _, class_word = (phrase or "").partition(" ")
    subject = Subject(group.listed, "") if group else Subject(trigger, class_word)
    styled = found.pick(options.style_pack).prompts(
        subject, base.family.name, options.count, options.seed, options.style, base.resolution
    )
    if base.family.wording == "tags":  # These families only have CLIP as a text encoder.
        for line in long_prompts(styled, lambda text: len(caption_tokens(text)) + 2):
            progress.warning(line + ", so it is encoded in several chunks")
    return [
        dataclasses.replace(
            job,
            negative=", ".join(part for part in (job.negative, options.negative) if part),
            size=options.size or (None if group else job.size),
            steps=job.steps if options.steps is None else options.steps,
            guidance=job.guidance if options.guidance is None else options.guidance,
        )
        for job in (Job.from_style(prompt).on(base) for prompt in styled)
    ]


def list_style_packs(options: argparse.Namespace) -> None:
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
        print(one_line(f"{name}: {pack['title']}"))
        for style in pack["styles"]:
            print(one_line(f"    {style}"))
    for problem in problems:
        print_warning(problem)


def run_score(options: argparse.Namespace) -> None:
    images = [
        photo for photo in read_photos(options.images, repeats=False, on_warning=print_warning) if not _is_sheet(photo)
    ]
    reference = read_photos(options.reference, on_warning=print_warning)
    network = load_faces(options.face_network)
    person = Reference.on((photo.image() for photo in reference), network)
    found = person.compare(photo.image() for photo in images)
    judged: Sequence[float | None] = [None] * len(images)
    if options.judge:
        judge = load_faces(options.judge)
        check_judge(judge, network)
        judged = Reference.on((photo.image() for photo in reference), judge).likeness(photo.image() for photo in images)
    scores = [
        Score.of(photo.name, *seen, by_judge) for photo, seen, by_judge in zip(images, found, judged, strict=True)
    ]
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
    """Return whether a file in the folder of pictures is a contact sheet made by this program."""
    assert isinstance(photo.source, Path), "photos of a folder have a path"
    return photo.name == CONTACT_SHEET or is_sheet(photo.source)


def run_check(options: argparse.Namespace) -> int:
    """Run the command. Returns 1 if too few photos can be used to train on, else 0."""
    resolution = options.resolution
    if resolution is None:
        resolution = base_from(options).resolution if options.base else 1024
    photos = read_photos(options.photos, on_warning=print_warning)
    network = faces_if_installed(print_warning, options.face_network)
    thresholds = Thresholds.for_resolution(resolution, network.name if network else "sface")
    report = check_photos(photos, network, dataclasses.replace(thresholds, **dict(options.threshold)))
    if options.json:
        print(json.dumps(report.to_dict() | {"resolution": resolution}, indent=1))
    else:
        print(format_report(report, terminal_width()))
        chosen = options.base or options.resolution
        print(
            f"Judged for training at {resolution} px{'' if chosen else '. Use --base or --resolution for another size'}."
        )
    if options.sheet:
        save_sheet(report, options.sheet)
    return 0 if report.enough else 1
