"""A batch of headshots in a folder: drawn, small faces improved, ranked by likeness, the best kept, and shown on a page."""

import filecmp
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ..errors import BadConfig, counted
from ..faces import Reference
from ..lora.file import LoraFile
from ..models.base import Base
from ..photos.reading import DAMAGED
from ..storage.files import EARLIER, make_folder, remove_leftovers, set_aside, write_file, write_text, writing
from ..storage.locks import locked
from .face_pass import CutOut, FacePass, blend, cut_out, drawn_again, face_share
from .gallery import SAME_PERSON, Models, gallery_page
from .generate import GenerateConfig, Job, Picture, generate, parameters_text
from .headshot import FaceOutcome, Headshot
from .sheet import contact_sheet
from .sizes import checked_size

OVERVIEW = "headshots.json"
CONTACT_SHEET = "contact_sheet.png"
KEPT = "kept"
PICTURE_NAME = r"\d{3,}-\d+\.png"
"""The pattern of a picture's file name: its number in the batch and its seed."""
COLUMNS = 10
"""The number of pictures beside each other on the contact sheet."""
TILE = 256
"""The height of a picture on the contact sheet, in pixels."""
_EMBEDDED_BASE = Path(os.path.abspath(__file__)).parents[1] / "demo" / "base.safetensors"
"""The base that the commands call demo."""


def make_headshots(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    jobs: Sequence[Job],
    folder: Path,
    config: GenerateConfig | None = None,
    *,
    reference: Iterable[Image.Image] | Reference | None = None,
    face_pass: FacePass | None = None,
    keep: int | None = None,
    device: torch.device | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> list[Headshot]:
    """The pictures of all jobs, written as PNG files into `folder`; most alike first where there is a `reference`.

    With `reference`, photos of the person or what was seen on them, faces that `face_pass` calls small are drawn again, and
    the new face is kept where likeness does not fall. The `keep` most alike pictures (None: a quarter) are then copied into
    `folder`/kept, but none whose likeness is below SAME_PERSON.

    A picture that is already there, made from the same job, models and settings, is not made again, so an interrupted
    batch goes on where it was. Another picture of its name moves to `folder`/earlier, from where it comes back when it is
    asked for again, and what another batch left in `folder`/kept moves to `folder`/kept/earlier. The files
    contact_sheet.png, gallery.html and headshots.json are written too.

    `on_progress(phase, done, total)` is called with the phases "pictures" and "faces", and may raise to cancel. Raises
    BadFile when the folder cannot be written, InUse when another batch is drawn into it, BadPhoto when no reference photo
    shows a face, and BadConfig when two jobs are the same or `keep` is given without `reference` or below 1.
    """
    check_keep(keep, reference is not None)
    person = reference if reference is None or isinstance(reference, Reference) else Reference.on(reference)
    jobs = [replace(job, size=checked_size(base, job.size)) for job in jobs]
    batch = Batch(
        base, loras, config or GenerateConfig(), device, on_progress or (lambda phase, done, total: None), person
    )
    return batch.make(jobs, folder, face_pass or FacePass(), keep)


def check_keep(keep: int | None, compared: bool) -> None:
    """Raises BadConfig for a number of pictures to keep that is below 1, or given where nothing is compared."""
    if keep is not None and not compared:
        raise BadConfig("keep needs photos of the person to compare with")
    if keep is not None and keep < 1:
        raise BadConfig(f"keep = {keep}: must be at least 1")


class Compared(Protocol):
    """Whoever pictures are compared with: `Reference`, or everyone in a group."""

    def likeness(self, images: Iterable[Image.Image]) -> list[float | None]:
        """The likeness of each picture; None where a face is missing."""
        ...


@dataclass(frozen=True)
class Batch:
    """The models and settings that the pictures of a batch are drawn with, and who is to be on them."""

    base: Base
    loras: Sequence[tuple[LoraFile, float]]
    config: GenerateConfig
    device: torch.device | None
    on_progress: Callable[[str, int, int], None]
    person: Compared | None

    def make(self, jobs: Sequence[Job], folder: Path, face_pass: FacePass, keep: int | None) -> list[Headshot]:
        """The pictures of the jobs in the folder, as `make_headshots` says; the jobs have sizes."""
        make_folder(folder)
        for job, count in Counter(jobs).items():
            if count > 1:
                raise BadConfig(
                    f"{count} pictures of {job.prompt!r} with seed {job.seed} would be the same; give other seeds"
                )
        paths = {job: folder / f"{number:03d}-{job.seed}.png" for number, job in enumerate(jobs, start=1)}
        person = self.person
        with locked(folder / OVERVIEW):
            remove_leftovers(folder, r".*\.png")
            self.draw_missing(paths, face_pass)
            if person and face_pass.below:
                left = {job: path for job, path in paths.items() if not _is_passed(path, face_pass)}
                self.improve_faces(left, face_pass, person)
            shots = [Headshot(path, job, face_pass=_face_outcome(path)) for job, path in paths.items()]
            if person:
                shots = ranked(shots, person, -(-len(shots) // 4) if keep is None else keep)
            if person or (folder / KEPT).is_dir():
                _fill_kept(shots, folder / KEPT, ranked=person is not None)
            _write_overview(shots, folder, self.compared_with, partial(self.model_options, folder))
            return shots

    @property
    def compared_with(self) -> int:
        """How many people a picture is compared with."""
        return 0 if self.person is None else 1

    def draw(self, jobs: Sequence[Job]) -> Iterator[Picture]:
        """The pictures of the jobs."""
        return generate(self.base, self.loras, jobs, self.config, device=self.device)

    def parameters(self, job: Job) -> str:
        """The text by which a picture of the job is known."""
        return parameters_text(self.base, self.loras, job, self.config)

    def draw_missing(self, paths: dict[Job, Path], face_pass: FacePass) -> None:
        """Draws the pictures that are not there yet, or were made otherwise, to their paths."""
        missing = [job for job, path in paths.items() if not self._is_there(job, path, face_pass)]
        done = len(paths) - len(missing)
        if missing:
            for picture in self.draw(missing):
                set_aside(paths[picture.job])
                picture.save(paths[picture.job])
                done += 1
                self.on_progress("pictures", done, len(paths))

    def _is_there(self, job: Job, path: Path, face_pass: FacePass) -> bool:
        """Whether the job's picture is at its path, or was in the folder `earlier` beside it and is moved back."""
        if self._is_made(job, path, face_pass):
            return True
        named = sorted((path.parent / EARLIER).glob(f"{path.stem}*{path.suffix}"))
        earlier = next((file for file in named if self._is_made(job, file, face_pass)), None)
        if earlier is None:
            return False
        set_aside(path)
        with writing(path):
            earlier.rename(path)
        return True

    def _is_made(self, job: Job, path: Path, face_pass: FacePass) -> bool:
        if not path.is_file():  # nor any other thing of that name: whoever opens a pipe waits
            return False
        try:
            with Image.open(path) as image:
                image.load()  # fails for a file that was cut short
                same = image.info.get("parameters") == self.parameters(job)
        except (*DAMAGED, Image.DecompressionBombError):
            return False
        outcome = _face_outcome(path)
        # A face that was drawn with other settings has to go, and the picture before it is no longer there.
        return same and (outcome is None or not outcome.kept or _settings(outcome) == face_pass)

    def improve_faces(self, paths: Mapping[Job, Path], face_pass: FacePass, person: Compared) -> None:
        """Draws the small faces again, and writes the outcome into each picture, also when the picture stays as it was."""
        assert isinstance(person, Reference)
        parts: dict[Path, tuple[Job, CutOut]] = {}
        for job, path in paths.items():
            image = read_picture(path)
            faces = person.network.detect(image)
            if faces and face_pass.wants(faces[0], self.base.resolution):
                part = cut_out(image, faces[0], face_share(person), self.base.resolution, self.base.size_multiple)
                if part:
                    parts[path] = (job, part)
        drawn = drawn_again(self.base, self.loras, parts, self.config, face_pass.denoise, self.device)
        for done, (path, image) in enumerate(drawn, start=1):
            job, part = parts[path]
            first = read_picture(path)
            second = blend(first, part, image)
            before, after = person.likeness([first, second])
            assert before is not None, "the face was found a moment ago"
            outcome = FaceOutcome(face_pass.below, face_pass.denoise, before, after)
            save_outcome(path, job, second if outcome.kept else first, outcome)
            self.on_progress("faces", done, len(parts))

    def model_options(self, folder: Path, job: Job) -> list[str]:
        """The options of `facelora generate` that name a job's models on the folder's page; none where not all are files."""
        named = base_options(self.base, folder, [lora for lora, _ in self.loras])
        loras = [lora_option(lora, strength * job.strength, folder) for lora, strength in self.loras]
        return named and [*named, *(f"--lora={lora}" for lora in loras)]


def set_others_aside(shots: Sequence[Headshot], folder: Path, lora: str) -> None:
    """Moves the pictures in the folder that a LoRA of that name has drawn, but not in this batch, into `folder`/earlier."""
    names = {shot.path.name for shot in shots}
    with locked(folder / OVERVIEW), writing(folder):
        for path in sorted(folder.glob("*.png")):
            if re.fullmatch(PICTURE_NAME, path.name) and path.name not in names and _is_drawn_with(lora, path):
                set_aside(path)


def _is_drawn_with(lora: str, path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return f"<lora:{lora}:" in str(image.info.get("parameters"))
    except (*DAMAGED, Image.DecompressionBombError):
        return False


def save_outcome(path: Path, job: Job, image: Image.Image, outcome: FaceOutcome) -> None:
    """Writes what a face pass has made of a picture in place of it, with the outcome."""
    with Image.open(path) as first:
        parameters = first.info["parameters"]
    Picture(image, job, parameters).save(path, {"face_pass": json.dumps(asdict(outcome))})


def _settings(outcome: FaceOutcome) -> FacePass:
    return FacePass(outcome.below, outcome.denoise)


def _is_passed(path: Path, face_pass: FacePass) -> bool:
    """Whether the face pass has been done on the picture with these settings."""
    outcome = _face_outcome(path)
    return outcome is not None and _settings(outcome) == face_pass


def _face_outcome(path: Path) -> FaceOutcome | None:
    """The outcome of the face pass that a picture has stored; None where there is none, or a text of another program."""
    with Image.open(path) as image:
        text = image.info.get("face_pass", "")
    try:
        given = json.loads(text)
        after = given.pop("after")
        numbers = {name: float(value) for name, value in given.items()}
        outcome = FaceOutcome(**numbers, after=None if after is None else float(after))
        _settings(outcome)
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError, BadConfig):
        return None
    return outcome


def read_picture(path: Path) -> Image.Image:
    """The picture in a file, in RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def ranked(shots: Sequence[Headshot], person: Compared, keep: int) -> list[Headshot]:
    """The pictures with their likeness to the person, most alike first and those without a face last.

    The first `keep` are marked as kept, but for those that are somebody else by their likeness, or show no face.
    """
    scores = person.likeness(read_picture(shot.path) for shot in shots)
    judged = [replace(shot, likeness=score) for shot, score in zip(shots, scores, strict=True)]
    judged.sort(key=lambda shot: -2 if shot.likeness is None else shot.likeness, reverse=True)
    return [
        replace(shot, kept=place < keep and (shot.likeness or 0) >= SAME_PERSON) for place, shot in enumerate(judged)
    ]


def mean_likeness(shots: Sequence[Headshot]) -> float:
    """The mean likeness of the pictures, where one without a face counts as 0; 0 without pictures."""
    return round(float(np.mean([shot.likeness or 0.0 for shot in shots] or [0.0])), 4)


def _fill_kept(shots: Sequence[Headshot], folder: Path, ranked: bool) -> None:
    """Copies the kept pictures into `folder`, and clears it of pictures of other batches.

    A copy of a picture of the batch above `folder` is deleted where it does not belong there any more; a picture that is no
    such copy moves to `folder`/earlier. Unless the pictures are `ranked`, every copy of this batch's pictures may stay.
    """
    belonging = {shot.path.name for shot in shots if shot.kept or not ranked}
    with writing(folder):
        for path in sorted(folder.glob("*.png")):
            if re.fullmatch(PICTURE_NAME, path.name):
                original = folder.parent / path.name
                if not (original.exists() and filecmp.cmp(path, original, shallow=False)):
                    set_aside(path)
                elif path.name not in belonging:
                    path.unlink()
    make_folder(folder)
    for shot in shots:
        if shot.kept:
            write_file(folder / shot.path.name, lambda file, path=shot.path: file.write(path.read_bytes()))


def base_options(base: Base, folder: Path, loras: Sequence[LoraFile]) -> list[str]:
    """The options that name the base model's files, as `_named` does; none where it or one of the LoRAs is no file."""
    # Where a tokenizer's folder is, a base does not remember.
    if base.file is None or base.family.tokenizer or not all(Path(lora.name).is_file() for lora in loras):
        return []
    encoders = [file for file in base.files if file not in (base.file, base.vae_file)]
    files = [("base", base.file), ("vae", base.vae_file), *(("text-encoder", file) for file in encoders)]
    return [f"--{name}={_named(file.path, folder)}" for name, file in files if file]


def lora_option(lora: LoraFile, strength: float, folder: Path) -> str:
    """The value of an option for the LoRA's file, named as `_named` does, with its strength."""
    return f"{_named(Path(lora.name), folder)}:{strength:g}"


def _named(path: Path, folder: Path) -> str:
    """What the command on the page in the folder calls the file, without the folders of this machine: pages are sent to others.

    That is the path as seen from the folder where the file is in or below it, `demo` for the embedded base, else the name.
    """
    path, folder = (Path(os.path.abspath(one)) for one in (path, folder))
    if path == _EMBEDDED_BASE:
        return "demo"
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def _write_overview(shots: Sequence[Headshot], folder: Path, people: int, models: Models) -> None:
    compared, summary = people > 0, batch_summary(shots, people)
    kept = [shot for shot in shots if shot.kept]
    means = {"mean_likeness": mean_likeness(shots), "mean_likeness_kept": mean_likeness(kept)} if compared else {}
    described = [asdict(shot.job) | _findings(shot) | {"models": models(shot.job)} for shot in shots]
    write_text(folder / OVERVIEW, json.dumps({**means, "headshots": described}, indent=1) + "\n")
    write_text(folder / "gallery.html", gallery_page(shots, summary, compared, models))

    styles: dict[str, list[Headshot]] = {}
    for shot in shots:
        styles.setdefault(shot.job.style or shot.job.prompt, []).append(shot)
    rows = [(name, [_tile(shot.path) for shot in group]) for name, group in styles.items()]
    labels = [[_label(shot) for shot in group] for group in styles.values()] if compared else None
    sheet = contact_sheet(rows, tile=TILE, labels=labels, title=summary, columns=COLUMNS)
    write_file(folder / CONTACT_SHEET, lambda file: sheet.save(file, "PNG"))


def batch_summary(shots: Sequence[Headshot], people: int = 0) -> str:
    """One line on a batch: how many pictures there are, how many were kept, and how alike they are.

    `people` is the number of those whom they were compared with, by which it says so where no likeness could be measured.
    """
    kept = [shot for shot in shots if shot.kept]
    best = max((shot.likeness for shot in shots if shot.likeness is not None), default=None)
    if not kept:
        none = ""
        if best is not None:
            none = f", none of them alike enough: the best has {best:.2f}, the same person {SAME_PERSON}"
        elif people:
            none = f", in none of which {'a face' if people == 1 else 'the face of everyone'} was found"
        return f"{counted(len(shots), 'picture')}{none}"
    return (
        f"{counted(len(shots), 'picture')}, the {len(kept)} most alike kept: "
        f"mean likeness {mean_likeness(kept):.2f}, that of all {mean_likeness(shots):.2f}"
    )


def _findings(shot: Headshot) -> dict:
    face_pass = asdict(shot.face_pass) | {"kept": shot.face_pass.kept} if shot.face_pass else None
    return {"file": shot.path.name, "likeness": shot.likeness, "kept": shot.kept, "face_pass": face_pass}


def _tile(path: Path) -> Image.Image:
    image = read_picture(path)
    image.thumbnail((image.width, TILE), Image.Resampling.LANCZOS)  # all of them are in memory at once
    return image


def _label(shot: Headshot) -> str:
    return ("no face" if shot.likeness is None else f"{shot.likeness:.2f}") + (", kept" if shot.kept else "")
