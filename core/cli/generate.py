"""The command `generate`, which draws pictures of one person, or of several with --person."""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from ..errors import BadConfig, BadStylePack, one_line
from ..lora import LoraFile
from ..lora.names import trigger_phrases
from ..models import Base, caption_tokens
from ..photos import (
    read_photo_files,
    read_photos,
)
from ..photos.reading import PHOTO_SUFFIXES
from ..pictures import (
    OVERVIEW,
    FacePass,
    GenerateConfig,
    Group,
    GroupMember,
    Headshot,
    Job,
    Mask,
    Subject,
    batch_summary,
    check_count,
    long_prompts,
    make_group_pictures,
    make_headshots,
)
from ..pictures.group import Area, read_box
from ..progress import OnWarning
from .common import BarProgress, base_from, packs_for, print_warning, split_strength
from .computing import device_from
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
        for line in [*without_trigger(loras, [job.prompt for job in jobs]), *unused_strengths(loras)]:
            progress.warning(line)
        if line := few_steps_hint(base, options.steps, options.guidance):
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


def few_steps_hint(
    base: Base, steps: int | None = None, guidance: float | None = None, remedy: str | None = None
) -> str | None:
    """Return a line on how a base model draws if only its name shows that it was distilled; None if nothing changes.

    `steps` and `guidance` are the options, if they are given. `remedy` is what to do if the name is wrong; for None, give them.
    """
    own = {"--steps": (steps, f"in {base.steps} steps"), "--guidance": (guidance, "without guidance")}
    left = {option: how for option, (given, how) in own.items() if given is None}
    if not (base.few_steps and left) or base.is_distilled:
        return None
    return (
        f"{base.name}: its name says that it was distilled to a few steps, so it draws {' '.join(left.values())}; "
        "if that is wrong, " + (remedy or f"set {' and '.join(left)}")
    )


def unread_syntax(texts: Sequence[str]) -> list[str]:
    """Return a warning for each part of the prompts that is special syntax in A1111 and ComfyUI, such as `(word:1.3)`."""
    weights, files = r"[(\[][^()\[\]]*:\s*-?[\d.]+\s*[)\]]|\(\([^()]*\)\)", r"<(?:lora|lyco|hypernet):[^<>]*>"
    found = {match for text in texts for match in re.findall(rf"{weights}|{files}|\bBREAK\b", text)}
    return [
        f"{match!r} is read as ordinary text: "
        + {"<": "use facelora generate --lora for the file", "B": "prompts cannot be divided"}.get(
            match[0], "words cannot have weights"
        )
        for match in sorted(found)
    ]


def without_trigger(loras: Sequence[tuple[Any, float]], prompts: Sequence[str]) -> list[str]:
    """Return a warning for each LoRA whose trigger phrases are all missing from the prompts."""
    shown, warnings = "\n".join(prompts).casefold(), []
    for lora, _ in loras:
        phrases = trigger_phrases(lora.metadata)
        called = phrases if lora.entries else [*phrases, Path(lora.name).stem]  # An embedding has two names.
        if phrases and not any(phrase.casefold() in shown for phrase in called):
            words = " or ".join(map(repr, phrases))
            warnings.append(f"no prompt contains the trigger phrase of {Path(lora.name).name}, {words}")
    return warnings


def unused_strengths(loras: Sequence[tuple[Any, float]]) -> list[str]:
    """Return a warning for each embedding with another strength than 1, which changes nothing."""
    return [
        f"{Path(lora.name).name} is an embedding, which has no strength: {strength:g} has no effect"
        for lora, strength in loras
        if strength != 1 and not lora.entries
    ]


def trigger_phrase(loras: Sequence[tuple[Any, float]]) -> str | None:
    """Return the first trigger phrase in the metadata of the LoRAs, if there is one."""
    return next((phrase for lora, _ in loras for phrase in trigger_phrases(lora.metadata)), None)


def prompt_jobs(options: argparse.Namespace, base: Base, loras: Sequence[tuple[Any, float]]) -> list[Any]:
    if options.style or options.subject or options.style_folder:
        raise BadConfig("--style, --subject and --style-folder require --style-pack")
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
    # A Job checks the first seed, which is as given.
    seeds = [options.seed, *((options.seed + number) % 2**64 for number in range(1, options.count))]
    return [Job(prompt, seed, options.negative, options.size, steps, guidance) for seed in seeds for prompt in prompts]


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
    found = packs_for(options)
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
    found = packs_for(options)
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


def group_from(options: argparse.Namespace) -> Group:
    """Return the people of --person with the regions of --region. Raises BadConfig with the option if that is not a group."""
    files = _by_name("--person", options.person, "FILE.safetensors")
    if len(files) == 1:
        raise BadConfig(
            f"--person {next(iter(files))}: a group needs at least two people; for one person, use --lora FILE"
        )
    if options.subject:
        raise BadConfig("--subject is for one person; with --person, those people are the subject of a --style-pack")
    if not (options.prompt or options.style_pack):
        raise BadConfig(f"no --prompt given: describe who does what, as in {_example(list(files))!r}")
    boxes = _by_name("--region", options.region, "LEFT,TOP,RIGHT,BOTTOM or NAME=MASK.png")
    if boxes and (differing := sorted({*files} ^ {*boxes})):
        raise BadConfig(f"--region: give one for each --person and nobody else; check {differing[0]}")
    group = Group(
        tuple(_person(name, file) for name, file in files.items()),
        tuple(_place(name, boxes[name]) for name in files) if boxes else (),
    )
    for prompt in options.prompt:
        group.check_prompt(prompt)
    return group


def photos_from(group: Group, references: Sequence[str], on_warning: OnWarning) -> dict[str, Iterator[Image.Image]]:
    """Return everyone's photos from --reference. Raises BadConfig unless they are of exactly the people of the group."""
    folders, names = _by_name("--reference", references, "PHOTOS"), [person.name for person in group.people]
    if differing := sorted({*folders} ^ {*names}):
        raise BadConfig(f"--reference: give NAME=PHOTOS for each --person and nobody else; check {differing[0]}")
    read = {name: read_photos(folder, on_warning=on_warning) for name, folder in folders.items()}
    return {name: (photo.image() for photo in photos) for name, photos in read.items()}


def _place(name: str, text: str) -> Area:
    """Return the region from LEFT,TOP,RIGHT,BOTTOM, or the mask from the file of that name: transparent is black in it."""
    if not text.lower().endswith(PHOTO_SUFFIXES):
        return read_box(name, text)
    (mask,) = read_photo_files([text], strict=True)
    white, opaque = mask.image().convert("L"), mask.mask()
    return Mask(ImageChops.multiply(white, opaque) if opaque else white)


def _by_name(option: str, given: Sequence[str], what: str) -> dict[str, str]:
    """Return the values by name for an option given as NAME=VALUE."""
    values: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not (name and value):
            raise BadConfig(f"{option} {text}: must be NAME={what}")
        if name in values:
            raise BadConfig(f"{option} {name} is given twice")
        values[name] = value
    return values


def _example(names: Sequence[str]) -> str:
    return " and ".join(f"{{{name}}}" for name in names) + " in an office"


def _person(name: str, file: str) -> GroupMember:
    path, strength = split_strength(file)
    lora = LoraFile.read(path)
    phrase = trigger_phrase([(lora, strength)])
    if not phrase:
        raise BadConfig(
            f"--person {name}: {Path(path).name} has no trigger phrase in its metadata; "
            f"`facelora metadata {path} --trigger-phrase 'sks woman'` adds it"
        )
    return GroupMember(name, lora, phrase, strength)
