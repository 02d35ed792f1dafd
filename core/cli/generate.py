"""The command `generate`, which draws pictures of one person, or of several with --person."""

import argparse
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .. import lora, models, photos, pictures  # Their modules load only when a name is used.
from ..config import Precision
from ..errors import BadConfig, BadStylePack, one_line
from ..progress import OnWarning
from .common import BarProgress, base_from, packs_for, print_warning, print_whether_signed, split_strength
from .computing import device_from
from .options import Options, below, option, settings
from .settings import SCHEDULE
from .shared_options import BASE, DEVICE, SEED, SPEED_LORA, STYLE_FOLDER, BaseParts
from .values import Folder, InputName, InputPath, Text

if TYPE_CHECKING:
    from PIL import Image

Loras = Sequence[tuple["lora.LoraFile", float]]
"""LoRAs and their strengths."""


def size_from(text: str) -> tuple[int, int]:
    """Convert WxH to width and height."""
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT in pixels, such as 512x640")
    return int(width), int(height)


@dataclass(frozen=True)
class GenerateOptions(Options):
    base: InputName | None = BASE
    parts: BaseParts = below()
    speed_lora: InputPath | None = SPEED_LORA
    schedule: dict[str, Any] = settings(SCHEDULE)
    lora: list[InputName] = option("LoRA to draw with; may be repeated", "FILE[:STRENGTH]")
    person: list[Text] = option(
        "LoRA of one of several people; give one for each. Prompts name them in braces: '{anna} and {ben} in an office'",
        "NAME=FILE[:STRENGTH]",
    )
    region: list[Text] = option(
        "Where a --person is, in fractions of the picture, or NAME=MASK.png; give one for each (default: side by side)",
        "NAME=LEFT,TOP,RIGHT,BOTTOM",
    )
    prompt: list[Text] = option(
        "Prompt; may be repeated (default: a photo of the LoRA's trigger phrase). It is plain text: brackets, as in "
        "(word:1.3), are ordinary characters"
    )
    style_pack: str | None = option("Draw headshots in the styles of a pack. 'list' lists the packs", "NAME")
    style: list[str] | None = option("Draw only this style of the pack; may be repeated", "NAME")
    style_folder: list[InputPath] = STYLE_FOLDER
    subject: Text | None = option("Words for the person in style prompts (default: the LoRA's trigger phrase)", "WORDS")
    output: Folder | None = option(
        "Folder for the pictures. Existing ones are not drawn again; others with the same name move to DIR/earlier"
    )
    reference: list[str] = option(
        "Photos of the person, to sort the pictures by likeness. Give NAME=PHOTOS for each --person", "PHOTOS"
    )
    keep: int | None = option(
        "Copy the K most alike pictures into DIR/kept (default: a quarter; needs --reference)", "K"
    )
    face_pass: float | None = option(
        "Redraw faces smaller than this fraction of the base model's resolution, unless that lowers likeness; 0: never "
        "(default: 0.25; needs --reference)",
        "SHARE",
    )
    face_denoise: float | None = option("Fraction of the sampling steps used to redraw a face (default: 0.35)", "SHARE")
    negative: Text = option(
        "What should not be in the pictures. Not used by FLUX.1-dev and similar base models, or with --guidance 1",
        default="",
    )
    count: int = option("Pictures for each prompt, or for a whole pack (default: 4)", default=4)
    seed: int = SEED
    size: Annotated[tuple[int, int], size_from] | None = option(
        "Size in pixels (default: what the base model was trained at)", "WxH"
    )
    steps: int | None = option("Sampling steps (default: what suits the base model or the style)")
    guidance: float | None = option("Guidance, the CFG scale (default: what suits the base model or the style)")
    sampler: str | None = option(
        "Sampler; an unknown name lists them (default: dpmpp_2m_karras for SD1.5 and SDXL, euler for other "
        "and for distilled models)"
    )
    clip_skip: int = option("Layer of the text encoder to use; 1 is the last (default: 1)", default=1)
    batch_size: int = option("Pictures drawn at once (default: 1)", default=1)
    precision: Precision = option("Precision of weights and arithmetic (default: auto)", default="auto")
    device: str | None = DEVICE
    json: bool = option("List the pictures as JSON")


def run(options: GenerateOptions) -> None:
    if options.style_pack == "list":
        list_style_packs(options)
        return
    base_name, output = _check(options)
    config = pictures.GenerateConfig(options.sampler, options.clip_skip, options.batch_size, options.precision)
    asked = {"below": options.face_pass, "denoise": options.face_denoise}
    face_pass = pictures.FacePass(**{name: value for name, value in asked.items() if value is not None})
    group = group_from(options) if options.person else None
    loras = [(lora.LoraFile.read(path), strength) for path, strength in map(split_strength, options.lora)]
    base = base_from(base_name, options.parts, options.schedule)
    if options.speed_lora:
        base = pictures.with_speed_lora(base, options.speed_lora)
    with BarProgress() as progress:
        if options.negative and base.embeds_guidance:
            progress.warning(f"--negative has no effect: this {base.family.title} doesn't use a negative prompt")
        if options.style_pack:
            jobs = pack_jobs(options, options.style_pack, base, loras, progress.warning, group)
        else:
            jobs = prompt_jobs(options, base, loras)
        for line in (
            *without_trigger(loras, [job.prompt for job in jobs]),
            *unused_strengths(loras),
            *few_steps_hint(base, options.steps, options.guidance),
            *unread_syntax([text for job in jobs for text in (job.prompt, job.negative)]),
        ):
            progress.warning(line)
        device = device_from(options.device)
        if group:
            people = photos_from(group, options.reference, progress.warning) if options.reference else None
            shots = pictures.make_group_pictures(
                base, group, jobs, output, config, loras=loras, reference=people, face_pass=face_pass,
                keep=options.keep, device=device, on_progress=progress.phase,
            )  # fmt: skip
        else:
            read = photos.read_photos(*options.reference, on_warning=progress.warning) if options.reference else None
            shots = pictures.make_headshots(
                base, loras, jobs, output, config,
                reference=None if read is None else (photo.image() for photo in read), face_pass=face_pass,
                keep=options.keep, device=device, on_progress=progress.phase,
            )  # fmt: skip
    if options.json:
        print((output / pictures.OVERVIEW).read_text("utf-8"), end="")
    else:
        _print_headshots(shots, output, people=len(options.reference))
        print_whether_signed()


def _check(options: GenerateOptions) -> tuple[str, Path]:
    """Return the base model's name and the output. Raises BadConfig if an option is missing or useless without another one."""
    if options.base is None:
        raise BadConfig("--base FILE is missing")
    if options.output is None:
        raise BadConfig("--output DIR is missing")
    for name, value in (
        ("keep", options.keep), ("face-pass", options.face_pass), ("face-denoise", options.face_denoise)
    ):  # fmt: skip
        if value is not None and not options.reference:
            raise BadConfig(f"--{name} requires --reference PHOTOS, to measure likeness")
    if len(options.reference) > 1 and not options.person:
        raise BadConfig("--reference is given twice; use --person for photos of several people")
    if options.region and not options.person:
        raise BadConfig("--region requires --person")
    return options.base, options.output


def _print_headshots(shots: Sequence["pictures.Headshot"], folder: Path, people: int) -> None:
    print(pictures.batch_summary(shots, people))
    redrawn = [shot.face_pass for shot in shots if shot.face_pass]
    if redrawn:
        print(f"faces redrawn: {len(redrawn)}, used: {sum(one.kept for one in redrawn)}")
    if any(shot.kept for shot in shots):
        print(f"most alike: {shots[0].path} ({shots[0].likeness:.2f}); kept pictures are in {folder / 'kept'}")
    print(f"overview: {folder / 'gallery.html'} and contact_sheet.png")


def few_steps_hint(
    base: "models.Base", steps: int | None = None, guidance: float | None = None, remedy: str | None = None
) -> list[str]:
    """Return a warning on how a base model draws if only its name shows that it was distilled; empty if nothing changes.

    `steps` and `guidance` are the options, if they are given. `remedy` is what to do if the name is wrong; for None, give them.
    """
    own = {"--steps": (steps, f"in {base.steps} steps"), "--guidance": (guidance, "without guidance")}
    left = {option: how for option, (given, how) in own.items() if given is None}
    if not (base.few_steps and left) or base.is_distilled:
        return []
    if base.speed_lora:
        name = base.speed_lora.path
        message = f"{name.name}: its name gives no number of steps, so pictures are drawn {' '.join(left.values())}"
        unsaid = base.few_steps is base.family.few_steps
        return [f"{message}; to change that, rename it, such as to {name.stem}_4step.safetensors"] if unsaid else []
    return [
        f"{base.name}: its name says that it was distilled to a few steps, so it draws {' '.join(left.values())}; "
        "if that is wrong, " + (remedy or f"set {' and '.join(left)}")
    ]


def unread_syntax(texts: Sequence[str]) -> list[str]:
    """Return a warning for each part of the prompts that is special syntax in A1111 and ComfyUI, such as `(word:1.3)`."""
    weights, files = r"[(\[][^()\[\]]*:\s*-?[\d.]+\s*[)\]]|\(\([^()]*\)\)", r"<(?:lora|lyco|hypernet):[^<>]*>"
    found = {match for text in texts for match in re.findall(rf"{weights}|{files}|\bBREAK\b", text)}
    reasons = {"<": "use facelora generate --lora for the file", "B": "prompts cannot be divided"}
    return [
        f"{match!r} is read as ordinary text: {reasons.get(match[0], 'words cannot have weights')}"
        for match in sorted(found)
    ]


def without_trigger(loras: Loras, prompts: Sequence[str]) -> list[str]:
    """Return a warning for each LoRA whose trigger phrases are all missing from the prompts."""
    shown, warnings = "\n".join(prompts).casefold(), []
    for file, _ in loras:
        phrases = lora.trigger_phrases(file.metadata)
        called = phrases if file.entries else [*phrases, Path(file.name).stem]  # An embedding has two names.
        if phrases and not any(phrase.casefold() in shown for phrase in called):
            words = " or ".join(map(repr, phrases))
            warnings.append(f"no prompt contains the trigger phrase of {Path(file.name).name}, {words}")
    return warnings


def unused_strengths(loras: Loras) -> list[str]:
    """Return a warning for each embedding with another strength than 1, which changes nothing."""
    return [
        f"{Path(file.name).name} is an embedding, which has no strength: {strength:g} has no effect"
        for file, strength in loras
        if strength != 1 and not file.entries
    ]


def trigger_phrase(loras: Loras) -> str | None:
    """Return the first trigger phrase in the metadata of the LoRAs, if there is one."""
    return next((phrase for file, _ in loras for phrase in lora.trigger_phrases(file.metadata)), None)


def prompt_jobs(options: GenerateOptions, base: "models.Base", loras: Loras) -> list["pictures.PictureJob"]:
    if options.style or options.subject or options.style_folder:
        raise BadConfig("--style, --subject and --style-folder require --style-pack")
    prompts = options.prompt or [f"a photo of {phrase}" for phrase in [trigger_phrase(loras)] if phrase]
    if not prompts:
        raise BadConfig("no --prompt given, and no LoRA has a trigger phrase")
    for prompt in prompts:
        if prompts.count(prompt) > 1:
            raise BadConfig(f"--prompt {prompt!r} is given twice; --count makes more pictures of each")
    pictures.check_count(options.count)
    steps = base.steps if options.steps is None else options.steps
    guidance = base.guidance if options.guidance is None else options.guidance
    # All prompts with one seed, then the next seed: a larger --count only adds pictures, without renumbering any.
    # A PictureJob checks the first seed, which is as given.
    seeds = [options.seed, *((options.seed + number) % 2**64 for number in range(1, options.count))]
    return [
        pictures.PictureJob(prompt, seed, options.negative, options.size, steps, guidance)
        for seed in seeds
        for prompt in prompts
    ]


def pack_jobs(
    options: GenerateOptions,
    pack: str,
    base: "models.Base",
    loras: Loras,
    on_warning: OnWarning,
    group: "pictures.Group | None" = None,
) -> list["pictures.PictureJob"]:
    """Return the jobs of a style pack. For a group, the list of names is the subject, and the size is the group's."""
    if options.prompt:
        raise BadConfig("--prompt and --style-pack are both given; use only one")
    found = packs_for(options.base, options.style_folder)
    for problem in found.problems:
        on_warning(problem)
    phrase = options.subject or trigger_phrase(loras)
    if not (phrase or group):
        raise BadConfig("no --subject given, and no LoRA has a trigger phrase")
    trigger, _, class_word = (phrase or "").partition(" ")
    subject = pictures.Subject(group.listed, "") if group else pictures.Subject(trigger, class_word)
    styled = found.pick(pack).prompts(
        subject, base.family.name, options.count, options.seed, options.style, base.resolution
    )
    if base.family.wording == "tags":  # These families only have CLIP as a text encoder.
        for line in pictures.long_prompts(styled, lambda text: len(models.caption_tokens(text)) + 2):
            on_warning(line + ", so it is encoded in several chunks")
    return [
        dataclasses.replace(
            job,
            negative=", ".join(part for part in (job.negative, options.negative) if part),
            size=options.size or (None if group else job.size),
            steps=job.steps if options.steps is None else options.steps,
            guidance=job.guidance if options.guidance is None else options.guidance,
        )
        for job in (pictures.PictureJob.from_style(prompt).on(base) for prompt in styled)
    ]


def list_style_packs(options: GenerateOptions) -> None:
    found = packs_for(options.base, options.style_folder)
    problems = list(found.problems)
    packs = {}
    for name, pack in sorted(found.packs.items()):
        shown = {}
        for style in pack.styles:
            try:
                if path := pack.picture(style):
                    shown[style.name] = str(path)
            except BadStylePack as problem:
                problems.append(str(problem))
        packs[name] = {"title": pack.title, "styles": pack.names, "pictures": shown}
    if options.json:
        print(json.dumps({"packs": packs, "problems": problems}, indent=1))
        return
    for name, pack in packs.items():
        print(one_line(f"{name}: {pack['title']}"))
        for style in pack["styles"]:
            print(one_line(f"    {style}"))
    for problem in problems:
        print_warning(problem)


def group_from(options: GenerateOptions) -> "pictures.Group":
    """Return the people of --person with the regions of --region. Raises BadConfig with the option if that is not a group."""
    files = _by_name("--person", options.person, "FILE.safetensors")
    if len(files) == 1:
        (only,) = files
        raise BadConfig(f"--person {only}: a group needs at least two people; for one person, use --lora FILE")
    if options.subject:
        raise BadConfig("--subject is for one person; with --person, those people are the subject of a --style-pack")
    if not (options.prompt or options.style_pack):
        example = " and ".join(f"{{{name}}}" for name in files) + " in an office"
        raise BadConfig(f"no --prompt given: describe who does what, as in {example!r}")
    boxes = _by_name("--region", options.region, "LEFT,TOP,RIGHT,BOTTOM or NAME=MASK.png")
    if boxes and (differing := sorted({*files} ^ {*boxes})):
        raise BadConfig(f"--region: give one for each --person and nobody else; check {differing[0]}")
    regions = tuple(region_from(name, boxes[name]) for name in files) if boxes else ()
    group = pictures.Group(tuple(_member(name, file) for name, file in files.items()), regions)
    for prompt in options.prompt:
        group.check_prompt(prompt)
    return group


def photos_from(
    group: "pictures.Group", references: Sequence[str], on_warning: OnWarning
) -> dict[str, Iterator["Image.Image"]]:
    """Return everyone's photos from --reference. Raises BadConfig unless they are of exactly the people of the group."""
    folders, names = _by_name("--reference", references, "PHOTOS"), [person.name for person in group.people]
    if differing := sorted({*folders} ^ {*names}):
        raise BadConfig(f"--reference: give NAME=PHOTOS for each --person and nobody else; check {differing[0]}")
    read = {name: photos.read_photos(folder, on_warning=on_warning) for name, folder in folders.items()}
    return {name: (photo.image() for photo in of_one) for name, of_one in read.items()}


def region_from(name: str, text: str) -> "pictures.RelativeBox | pictures.Mask":
    """Return the region from LEFT,TOP,RIGHT,BOTTOM, or the mask from the file of that name: transparent is black in it."""
    from PIL import ImageChops

    from ..pictures.group import read_box

    if not text.lower().endswith(photos.PHOTO_SUFFIXES):
        return read_box(name, text)
    (mask,) = photos.read_photo_files([text], strict=True)
    white, opaque = mask.image().convert("L"), mask.mask()
    return pictures.Mask(ImageChops.multiply(white, opaque) if opaque else white)


def _by_name(option: str, given: Sequence[str], what: str) -> dict[str, str]:
    values: dict[str, str] = {}
    for text in given:
        name, _, value = text.partition("=")
        if not (name and value):
            raise BadConfig(f"{option} {text}: must be NAME={what}")
        if name in values:
            raise BadConfig(f"{option} {name} is given twice")
        values[name] = value
    return values


def _member(name: str, file: str) -> "pictures.GroupMember":
    path, strength = split_strength(file)
    read = lora.LoraFile.read(path)
    phrase = trigger_phrase([(read, strength)])
    if not phrase:
        raise BadConfig(
            f"--person {name}: {Path(path).name} has no trigger phrase in its metadata; "
            f"`facelora metadata {path} --trigger-phrase 'sks woman'` adds it"
        )
    return pictures.GroupMember(name, read, phrase, strength)
