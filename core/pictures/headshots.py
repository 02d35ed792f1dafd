"""Make a batch of headshots in a folder: draw, improve small faces, rank by likeness, keep the best, write a page."""

import filecmp
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image

from ..errors import BadConfig, BadFile, counted
from ..faces import LIKENESS, Reference
from ..lora.file import LoraFile
from ..models.base import Base
from ..photos.reading import DAMAGED
from ..progress import PICTURES, READING, OnPhase, silent
from ..storage.drawn import save_png
from ..storage.files import (
    EARLIER,
    make_folder,
    read_json,
    remove_leftovers,
    set_aside,
    write_file,
    write_text,
    writing,
)
from ..storage.locks import locked
from ..storage.plain_values import parse_json, read_as
from .drawing_model import DrawingModel
from .gallery import SAME_PERSON, Models, gallery_page
from .generate import GenerateConfig, Picture, PictureJob, generate, parameters_text
from .headshot import (
    CutOut,
    FaceOutcome,
    FacePass,
    Headshot,
    blend,
    cut_out,
    drawn_again,
    face_share,
    redrawn_of,
)
from .sheet import contact_sheet
from .sizes import checked_size

OVERVIEW = "headshots.json"
CONTACT_SHEET, GALLERY = "contact_sheet.png", "gallery.html"
KEPT = "kept"
PICTURE_NAME = r"\d{3,}-\d+\.png"
"""The pattern of a picture's file name: its number in the batch, then its seed."""
COLUMNS = 10
"""The number of pictures in a row of the contact sheet."""
TILE = 256
"""The height of a picture on the contact sheet, in pixels."""


def make_headshots(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    jobs: Sequence[PictureJob],
    folder: str | os.PathLike[str],
    config: GenerateConfig | None = None,
    *,
    reference: Iterable[Image.Image] | Reference | None = None,
    face_pass: FacePass | None = None,
    keep: int | None = None,
    device: torch.device | None = None,
    on_progress: OnPhase | None = None,
    check_cancelled: Callable[[], None] = silent,
) -> list[Headshot]:
    """Draw the pictures of all jobs into `folder` as PNG files, and return them; most alike first with a `reference`.

    `reference` is photos of the person (of a Photo, its `image()`), or a Reference made from them. With it, faces that
    `face_pass` considers small are redrawn in the more alike half of the pictures (or the best `keep`, if these are more).
    A new face is used if likeness doesn't fall. Then the `keep` most alike
    pictures (None: a quarter) are copied into `folder`/kept, but none with a likeness below SAME_PERSON.

    A picture that already exists and was made from the same job, models and settings is not drawn again, so an interrupted
    batch continues where it stopped. A different picture of that name moves to `folder`/earlier, and moves back when it is
    requested again. Files of another batch in `folder`/kept move to `folder`/kept/earlier. The files contact_sheet.png,
    gallery.html and headshots.json are written too.

    `on_progress(phase, done, total)` is called with the phases READING, "pictures" and "faces", and `check_cancelled` in each
    sampling step of a picture. Both may raise to cancel. Raises BadFile if the folder cannot be written, InUse if another
    batch is being drawn into it, and BadPhoto if no reference photo shows a face. Raises BadConfig if two jobs are the same, or
    if `keep` is given without `reference` or below 1.
    """
    check_keep(keep, reference is not None)
    person = reference if reference is None or isinstance(reference, Reference) else Reference.on(reference)
    jobs = [replace(job, size=checked_size(base, job.size)) for job in jobs]
    config, on_progress = config or GenerateConfig(), on_progress or silent
    batch = Batch(base, loras, config, device, on_progress, check_cancelled, person, 0 if person is None else 1)
    return batch.make(jobs, folder, face_pass or FacePass(), keep)


def check_keep(keep: int | None, compared: bool) -> None:
    """Raise BadConfig if the number of pictures to keep is below 1, or given without photos to compare with."""
    if keep is not None and not compared:
        raise BadConfig("keep: photos of the person are required to choose the most alike pictures")
    if keep is not None and keep < 1:
        raise BadConfig(f"keep = {keep}: must be at least 1")


class Compared(Protocol):
    """What pictures are compared with: a `Reference`, or everyone in a group."""

    measure: str
    """What the cosines are called."""

    def likeness(self, images: Iterable[Image.Image]) -> list[float | None]:
        """Return the likeness of each picture; None if a face is missing."""
        ...


@dataclass(frozen=True)
class Batch:
    """The models and settings that a batch is drawn with, and the people it should show."""

    base: Base
    loras: Sequence[tuple[LoraFile, float]]
    config: GenerateConfig
    device: torch.device | None
    on_progress: OnPhase
    check_cancelled: Callable[[], None]
    person: Compared | None
    compared_with: int
    """The number of people that a picture is compared with."""

    def make(
        self, jobs: Sequence[PictureJob], folder: str | os.PathLike[str], face_pass: FacePass, keep: int | None
    ) -> list[Headshot]:
        """Make the pictures of the jobs in the folder, as described in `make_headshots`; the jobs have sizes."""
        folder = make_folder(folder)
        for job, count in Counter(jobs).items():
            if count > 1:
                same = f"{count} pictures of {job.prompt!r} with seed {job.seed}"
                raise BadConfig(f"{same} would be the same; use different seeds")
        paths = {job: folder / f"{number:03d}-{job.seed}.png" for number, job in enumerate(jobs, start=1)}
        person = self.person
        with locked(folder / OVERVIEW):
            remove_leftovers(folder, r".*\.png")
            self.base.hash_files(partial(self.on_progress, READING))
            with self.model(jobs) as model:
                self.draw_missing(paths, face_pass, model)
                if person and face_pass.below:
                    found = {job: _face_outcome(path) for job, path in paths.items()}
                    chosen = list(paths)
                    if isinstance(person, Reference):
                        chosen = most_alike(paths, found, person)[: max(redrawn_of(len(paths)), keep or 0)]
                    left = [job for job in chosen if (one := found[job]) is None or one.settings != face_pass]
                    self.improve_faces({job: paths[job] for job in left}, face_pass, person, model)
            shots = [Headshot(path, job, face_pass=_face_outcome(path)) for job, path in paths.items()]
            if person:
                shots = ranked(shots, person, -(-len(shots) // 4) if keep is None else keep)
            if person or (folder / KEPT).is_dir():
                _fill_kept(shots, folder / KEPT, ranked=person is not None)
            measure = person.measure if person else LIKENESS
            _write_overview(shots, folder, self.compared_with, partial(self.model_options, folder), measure)
            return shots

    def model(self, jobs: Sequence[PictureJob]) -> DrawingModel:
        """Return the networks for all passes on the pictures of these jobs."""
        keeps_originals = len({job.strength for job in jobs}) > 1
        return DrawingModel(self.base, self.config.precision, self.config.clip_skip, self.device, keeps_originals)

    def draw(self, jobs: Sequence[PictureJob], model: DrawingModel) -> Iterator[Picture]:
        """Draw the pictures of the jobs."""
        return generate(
            self.base, self.loras, jobs, self.config, model=model, on_step=lambda *_: self.check_cancelled()
        )

    def key(self, job: PictureJob) -> str:
        """Return the key of a job's picture, equal when the same would be drawn: the parameters that are written into it."""
        return parameters_text(self.base, self.loras, job, self.config)

    def draw_missing(self, paths: dict[PictureJob, Path], face_pass: FacePass, model: DrawingModel) -> None:
        """Draw pictures that are missing or were made differently, to their paths. Each is saved while the next is drawn."""
        missing = [job for job, path in paths.items() if not self._is_there(job, path, face_pass)]
        drawn = self.draw(missing, model) if missing else ()

        def save(picture: Picture) -> None:
            set_aside(paths[picture.job])
            picture.save(paths[picture.job])

        with ThreadPoolExecutor(1) as pool:
            saving: Future[None] | None = None
            for done, picture in enumerate(drawn, start=len(paths) - len(missing) + 1):
                if saving:
                    saving.result()
                saving = pool.submit(save, picture)
                self.on_progress(PICTURES, done, len(paths))
            if saving:
                saving.result()

    def _is_there(self, job: PictureJob, path: Path, face_pass: FacePass) -> bool:
        """Return whether the job's picture is at its path, or was in the folder `earlier` beside it and has been moved back."""
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

    def _is_made(self, job: PictureJob, path: Path, face_pass: FacePass) -> bool:
        if not path.is_file():  # Opening a pipe of that name would wait forever.
            return False
        try:
            with Image.open(path) as image:
                image.load()  # Raises for a truncated file.
                same = image.info.get("parameters") == self.key(job)
        except (*DAMAGED, Image.DecompressionBombError):
            return False
        outcome = _face_outcome(path)
        # A face drawn with other settings must be replaced, and the picture without it no longer exists.
        return same and (outcome is None or not outcome.kept or outcome.settings == face_pass)

    def improve_faces(
        self, paths: Mapping[PictureJob, Path], face_pass: FacePass, person: Compared, model: DrawingModel
    ) -> None:
        """Redraw small faces, and write the outcome into each picture, even into pictures that didn't change."""
        assert isinstance(person, Reference)
        parts: dict[Path, tuple[PictureJob, CutOut]] = {}
        for job, path in paths.items():
            image = read_picture(path)
            faces = person.network.detect(image)
            if faces and face_pass.wants(faces[0], self.base.resolution):
                part = cut_out(image, faces[0], face_share(person), self.base.resolution, self.base.size_multiple)
                if part:
                    parts[path] = (job, part)
        drawn = drawn_again(self.base, self.loras, parts, self.config, face_pass.denoise, self.device, model)
        for done, (path, image) in enumerate(drawn, start=1):
            job, part = parts[path]
            first = read_picture(path)
            second = blend(first, part, image)
            before, after = person.likeness([first, second])
            assert before is not None, "the face has just been found"
            outcome = FaceOutcome(face_pass.below, face_pass.denoise, before, after)
            save_outcome(path, job, second if outcome.kept else first, outcome)
            self.on_progress("faces", done, len(parts))

    def model_options(self, folder: Path, job: PictureJob) -> list[str]:
        """Return the `facelora generate` options for a job's models, for the folder's page; none unless all are files."""
        named = _base_options(self.base, folder)
        if not named or not all(Path(lora.name).is_file() for lora, _ in self.loras):
            return []
        if self.config.sampler:
            named.append(f"--sampler={self.config.sampler}")
        if self.config.clip_skip > 1:
            named.append(f"--clip-skip={self.config.clip_skip}")
        used = (lora_option(lora, strength * job.strength, folder) for lora, strength in self.loras)
        return [*named, *(f"--lora={lora}" for lora in used)]


def set_others_aside(shots: Sequence[Headshot], folder: Path, lora: str) -> None:
    """Move pictures by a LoRA of that name that aren't in this batch from the folder into `folder`/earlier."""
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


def save_outcome(path: Path, job: PictureJob, image: Image.Image, outcome: FaceOutcome) -> None:
    """Replace a picture with the result of its face pass, and write the outcome into it."""
    with Image.open(path) as first:
        parameters = first.info["parameters"]
    Picture(image, job, parameters).save(path, {"face_pass": json.dumps(asdict(outcome))})


def _face_outcome(path: Path) -> FaceOutcome | None:
    """Return the outcome of the face pass stored in a picture; None without one, or for another program's text."""
    with Image.open(path) as image:
        text = image.info.get("face_pass", "")
    try:
        outcome = read_as(FaceOutcome, parse_json(text))
        _ = outcome.settings  # Raises BadConfig for numbers that no pass can have.
    except (ValueError, BadConfig):
        return None
    return outcome


def read_picture(path: Path) -> Image.Image:
    """Read a picture from a file, in RGB."""
    with Image.open(path) as image:
        return image.convert("RGB")


def most_alike(
    paths: Mapping[PictureJob, Path], redrawn: Mapping[PictureJob, FaceOutcome | None], person: Reference
) -> list[PictureJob]:
    """Return the jobs in the order of their pictures' likeness before the face pass, those without a face last."""

    def before(job: PictureJob) -> float:
        outcome = redrawn[job]
        score = outcome.before if outcome else person.likeness([read_picture(paths[job])])[0]
        return -2 if score is None else score

    return sorted(paths, key=before, reverse=True)


def ranked(shots: Sequence[Headshot], person: Compared, keep: int) -> list[Headshot]:
    """Return the pictures with their likeness to the person, most alike first and those without a face last.

    The first `keep` are marked as kept, except those without a face or with the likeness of another person.
    """
    scores = person.likeness(read_picture(shot.path) for shot in shots)
    judged = [replace(shot, likeness=score) for shot, score in zip(shots, scores, strict=True)]
    judged.sort(key=lambda shot: -2 if shot.likeness is None else shot.likeness, reverse=True)
    return [
        replace(shot, kept=place < keep and (shot.likeness or 0) >= SAME_PERSON) for place, shot in enumerate(judged)
    ]


def mean_likeness(shots: Sequence[Headshot]) -> float:
    """Return the mean likeness of the pictures, counting 0 for those without a face; 0 without pictures."""
    return round(float(np.mean([shot.likeness or 0.0 for shot in shots] or [0.0])), 4)


def _fill_kept(shots: Sequence[Headshot], folder: Path, ranked: bool) -> None:
    """Copy the kept pictures into `folder`, and remove pictures of other batches from it.

    A copy of a batch picture that no longer belongs there is deleted; any other picture moves to `folder`/earlier. Unless the
    pictures are `ranked`, all copies of this batch's pictures may stay.
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


def _base_options(base: Base, folder: Path) -> list[str]:
    """Return the options that name the base model's files, as `_named` does; none unless it is loaded from files."""
    if base.file is None or base.family.tokenizer:  # A base doesn't record the folder of its tokenizer.
        return []
    encoders = [file for file in base.files if file is not base.file and file is not base.vae_file]
    files = [("base", base.file), ("vae", base.vae_file), *(("text-encoder", file) for file in encoders)]
    files += [("speed-lora", base.speed_lora)]
    named = [f"--{name}={_named(file.path, folder)}" for name, file in files if file]
    schedule = base.opened_with or {}
    if schedule.get("prediction_type", "auto") != "auto":
        named.append(f"--prediction-type={schedule['prediction_type']}")
    return [*named, "--zero-terminal-snr"] if schedule.get("zero_terminal_snr") else named


def lora_option(lora: LoraFile, strength: float, folder: Path) -> str:
    """Return the option value for the LoRA's file, named as `_named` does, with its strength."""
    return f"{_named(Path(lora.name), folder)}:{strength:g}"


def _named(path: Path, folder: Path) -> str:
    """Return the name for a file in commands on the folder's page, without this machine's folders: pages are sent to others.

    This is the path relative to the folder if the file is in or below it, its folder's name for a base model of this package,
    else its own name.
    """
    path, folder, here = (Path(os.path.abspath(one)) for one in (path, folder, __file__))
    if path.is_relative_to(here.parents[1]):
        return path.parent.name
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def _write_overview(shots: Sequence[Headshot], folder: Path, people: int, models: Models, measure: str) -> None:
    compared, summary = people > 0, batch_summary(shots, people, measure)
    kept = [shot for shot in shots if shot.kept]
    means = {"mean_likeness": mean_likeness(shots), "mean_likeness_kept": mean_likeness(kept)} if compared else {}
    described = []
    for shot in shots:
        face_pass = asdict(shot.face_pass) | {"kept": shot.face_pass.kept} if shot.face_pass else None
        found = {"file": shot.path.name, "likeness": shot.likeness, "kept": shot.kept, "face_pass": face_pass}
        described.append(asdict(shot.job) | found | {"models": models(shot.job)})
    if not _is_overview(folder / OVERVIEW):  # Then files of these names are not ours.
        for name in (OVERVIEW, GALLERY, CONTACT_SHEET):
            set_aside(folder / name)
    write_text(folder / OVERVIEW, json.dumps({**means, "headshots": described}, indent=1) + "\n")
    write_text(folder / GALLERY, gallery_page(shots, summary, compared, models, measure))

    styles: dict[str, list[Headshot]] = {}
    for shot in shots:
        styles.setdefault(shot.job.style or shot.job.prompt, []).append(shot)
    rows = [(name, [_tile(shot.path) for shot in group]) for name, group in styles.items()]
    labels = [[_label(shot) for shot in group] for group in styles.values()] if compared else None
    sheet = contact_sheet(rows, tile=TILE, labels=labels, title=summary, columns=COLUMNS)
    save_png(folder / CONTACT_SHEET, sheet)


def _is_overview(path: Path) -> bool:
    """Return whether a file is the overview of a batch. Any program may use its name."""
    try:
        shots = read_json(path)["headshots"]
        return bool(shots) and all({"file", "likeness", "kept"} <= shot.keys() for shot in shots)
    except (BadFile, LookupError, TypeError, AttributeError):
        return False


def batch_summary(shots: Sequence[Headshot], people: int = 0, measure: str = LIKENESS) -> str:
    """Return a line about a batch: how many pictures there are, how many were kept, and how alike they are.

    `people` is the number of people they were compared with; above 0, the line mentions if no likeness could be measured.
    `measure` is what the cosines are called.
    """
    kept = [shot for shot in shots if shot.kept]
    best = max((shot.likeness for shot in shots if shot.likeness is not None), default=None)
    found = ""
    if kept:
        means = f"{mean_likeness(kept):.2f}, or {mean_likeness(shots):.2f} for all"
        found = f", the {len(kept)} most alike kept: mean {measure} {means}"
    elif best is not None:
        found = f", none alike enough: the best {measure} is {best:.2f}, and the same person needs {SAME_PERSON}"
    elif people:
        found = f", none with {'a face' if people == 1 else 'a face of everyone'}"
    return f"{counted(len(shots), 'picture')}{found}"


def _tile(path: Path) -> Image.Image:
    image = read_picture(path)
    image.thumbnail((image.width, TILE), Image.Resampling.LANCZOS)  # All pictures are in memory at once.
    return image


def _label(shot: Headshot) -> str:
    return ("no face" if shot.likeness is None else f"{shot.likeness:.2f}") + (", kept" if shot.kept else "")
