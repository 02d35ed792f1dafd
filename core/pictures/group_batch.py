"""Batches of group pictures: match faces with people, redraw each with its person's LoRA, and rank by likeness."""

import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image

from ..errors import BadConfig
from ..faces import LIKENESS, Face, FaceNetwork, Reference
from ..lora.file import LoraFile
from ..models.base import Base
from ..progress import OnPhase, OnProgress, silent
from .drawing_model import DrawingModel
from .gallery import SAME_PERSON, SOMEONE_ELSE
from .generate import GenerateConfig, Picture, PictureJob
from .group import Group, Mask, check_group, generate_group, group_parameters, sized
from .headshot import CutOut, FaceOutcome, FacePass, Headshot, blend, cut_out, drawn_again, face_share
from .headshots import Batch, Compared, check_keep, lora_option, read_picture, save_outcome

TRIES = 3
"""How often a face that isn't alike is redrawn at most."""
_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class FoundFace:
    """A face in a picture that was matched with a person."""

    face: Face
    likeness: float
    """The cosine to the person's photos."""


class GroupReference:
    """The photos of everyone in a group, which pictures of the group are compared with."""

    measure: str = LIKENESS

    def __init__(self, group: Group, photos: Mapping[str, Iterable[Image.Image]], network: FaceNetwork | None = None):
        """Take photos by name. Raises the errors of `Reference`, and BadConfig unless they are of exactly these people."""
        names = [person.name for person in group.people]
        if differing := sorted({*names} ^ {*photos}):
            raise BadConfig(
                f"photos to compare with: give photos of each of {', '.join(names)} and nobody else; check {differing[0]}"
            )
        self.group = group
        self.people: list[Reference] = []
        for name in names:
            self.people.append(Reference.on(photos[name], network))
            network = self.people[0].network
        self.network: FaceNetwork = self.people[0].network

    def find(self, image: Image.Image) -> list[FoundFace | None]:
        """Return each person's face in the picture, or None if the person's face was not found."""
        faces = self.network.detect(image)
        alike = [reference.of_faces(image, faces) for reference in self.people]
        places = assign_faces(faces, self.group.regions(image.size, 1), alike)
        found = zip(places, alike, strict=True)
        return [None if index is None else FoundFace(faces[index], scores[index]) for index, scores in found]

    def likeness(self, images: Iterable[Image.Image]) -> list[float | None]:
        """Return the likeness of the least alike person in each picture; None if someone's face is missing."""
        found = map(self.find, images)
        return [None if None in one else _lowest(one) for one in found]


def assign_faces(
    faces: Sequence[Face], regions: Sequence[tuple[int, int, int, int]], alike: Sequence[Sequence[float]]
) -> list[int | None]:
    """Return the index of each person's face, or None; each face is used only once.

    A face centred in a person's region belongs to that person; the largest one wins. Faces outside all regions then go to the
    remaining person they are most like, by `alike[person][face]`, unless they look like someone else.
    """
    places: list[int | None] = [None] * len(regions)
    middles = [((face.box[0] + face.box[2]) / 2, (face.box[1] + face.box[3]) / 2) for face in faces]
    by_size = sorted(range(len(faces)), key=lambda number: -faces[number].size)
    for person, (left, top, right, bottom) in enumerate(regions):
        inside = (n for n in by_size if left <= middles[n][0] < right and top <= middles[n][1] < bottom)
        places[person] = next((n for n in inside if n not in places), None)
    pairs = [(alike[person][n], person, n) for person in range(len(regions)) for n in range(len(faces))]
    for score, person, number in sorted(pairs, reverse=True):
        if score >= SOMEONE_ELSE and places[person] is None and number not in places:
            places[person] = number
    return places


@dataclass(frozen=True)
class GroupFaces:
    """The result of the face passes on a group picture."""

    image: Image.Image
    before: float
    """The lowest likeness of a person before, of those whose face was there."""
    after: float


def redraw_faces(
    base: Base,
    reference: GroupReference,
    pictures: Mapping[_Key, tuple[PictureJob, Image.Image]],
    config: GenerateConfig,
    face_pass: FacePass,
    *,
    loras: Sequence[tuple[LoraFile, float]] = (),
    device: torch.device | None = None,
    model: DrawingModel | None = None,
    on_progress: OnProgress | None = None,
) -> dict[_Key, GroupFaces]:
    """Redraw the faces in the pictures that the face pass considers small, or that are not alike.

    Each face is drawn in its own cut-out, with only its person's LoRA and words. A new face is used if likeness doesn't fall. A
    face that isn't alike is redrawn with another seed, up to TRIES times. `on_progress(done, total)` is called after each try
    with each person, and may raise to cancel. `model` is as in `generate`. The result has only the pictures in which a face was
    redrawn.
    """
    group = reference.group
    images = {key: image for key, (_, image) in pictures.items()}
    found = {key: reference.find(image) for key, image in images.items()}
    before: dict[_Key, float] = {}
    for number, person in enumerate(group.people):
        own = [*loras, (person.lora, person.strength)]
        for attempt in range(TRIES):
            parts: dict[_Key, tuple[PictureJob, CutOut]] = {}
            for key, (job, _) in pictures.items():
                seen = found[key][number]
                small = attempt == 0 and seen is not None and face_pass.wants(seen.face, base.resolution)
                if seen and (small or seen.likeness < SAME_PERSON):
                    part = _part_of(base, reference, number, images[key], seen.face)
                    words, seed = group.words_of(person, job.prompt), (job.seed + attempt) % 2**64
                    parts[key] = (replace(job, prompt=words, seed=seed), part)
                    before.setdefault(key, _lowest(found[key]))
            for key, drawn in drawn_again(base, own, parts, config, face_pass.denoise, device, model):
                image = blend(images[key], parts[key][1], drawn)
                now, was = reference.find(image), found[key][number]
                new = now[number]
                if was and new and new.likeness >= was.likeness:
                    images[key], found[key] = image, now
            if on_progress:
                on_progress(number * TRIES + attempt + 1, len(group.people) * TRIES)
    return {key: GroupFaces(images[key], lowest, _lowest(found[key])) for key, lowest in before.items()}


def _lowest(found: Sequence[FoundFace | None]) -> float:
    return min(one.likeness for one in found if one)


def _part_of(base: Base, reference: GroupReference, number: int, image: Image.Image, face: Face) -> CutOut:
    left, top, right, bottom = reference.group.regions(image.size, 1)[number]
    part = cut_out(
        image, face, face_share(reference.people[number]), base.resolution, base.size_multiple,
        aspect=f"{right - left}:{bottom - top}", also_large=True,
    )  # fmt: skip
    assert part, "also_large always gives a part"
    return part


def make_group_pictures(
    base: Base,
    group: Group,
    jobs: Sequence[PictureJob],
    folder: str | os.PathLike[str],
    config: GenerateConfig | None = None,
    *,
    loras: Sequence[tuple[LoraFile, float]] = (),
    reference: Mapping[str, Iterable[Image.Image]] | None = None,
    face_pass: FacePass | None = None,
    keep: int | None = None,
    device: torch.device | None = None,
    on_progress: OnPhase | None = None,
) -> list[Headshot]:
    """Draw the pictures of all jobs with `generate_group`, and write them into `folder` as `make_headshots` does.

    `reference` has photos of everyone by name. With it, `redraw_faces` redraws faces that are small or not alike, and pictures
    are ranked by the likeness of the least alike person. Raises the errors of these three functions.
    """
    check_keep(keep, reference is not None)
    config = config or GenerateConfig()
    check_group(base, group, jobs, loras, config)
    people = None if reference is None else GroupReference(group, reference)
    count = 0 if people is None else len(group.people)
    batch = _GroupBatch(base, loras, config, device, on_progress or silent, silent, people, count, group)
    return batch.make([sized(base, group, job) for job in jobs], folder, face_pass or FacePass(), keep)


@dataclass(frozen=True)
class _GroupBatch(Batch):
    group: Group

    def model(self, jobs: Sequence[PictureJob]) -> DrawingModel:
        return DrawingModel(self.base, self.config.precision, self.config.clip_skip, self.device, keeps_originals=True)

    def draw(self, jobs: Sequence[PictureJob], model: DrawingModel) -> Iterator[Picture]:
        return generate_group(self.base, self.group, jobs, self.config, loras=self.loras, model=model)

    def key(self, job: PictureJob) -> str:
        return group_parameters(self.base, self.group, self.loras, job, self.config)

    def improve_faces(
        self, paths: Mapping[PictureJob, Path], face_pass: FacePass, person: Compared, model: DrawingModel
    ) -> None:
        """Redraw faces that are small or not alike, and write the outcome into each picture."""
        assert isinstance(person, GroupReference)
        pictures = {job: (job, read_picture(path)) for job, path in paths.items()}
        drawn = redraw_faces(
            self.base, person, pictures, self.config, face_pass, loras=self.loras, device=self.device, model=model,
            on_progress=lambda done, total: self.on_progress("faces", done, total),
        )  # fmt: skip
        for job, faces in drawn.items():
            taken = faces.image is not pictures[job][1]
            outcome = FaceOutcome(face_pass.below, face_pass.denoise, faces.before, faces.after, taken)
            save_outcome(paths[job], job, faces.image, outcome)

    def model_options(self, folder: Path, job: PictureJob) -> list[str]:
        """Return the options as for one person's batch; none if regions are masks, since their files are unknown."""
        people, named = self.group.people, super().model_options(folder, job)
        are_files = all(Path(one.lora.name).is_file() for one in people)
        if not named or not are_files or any(isinstance(place, Mask) for place in self.group.layout):
            return []
        for one in people:
            named.append(f"--person={one.name}={lora_option(one.lora, one.strength * job.strength, folder)}")
        for one, box in zip(people, self.group.boxes, strict=True):
            named.append(f"--region={one.name}={','.join(f'{share:g}' for share in box)}")
        return named
