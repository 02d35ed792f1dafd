"""Write a batch of group pictures into a folder, as for headshots of one person."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from ..lora.file import LoraFile
from ..models.base import Base
from ..progress import OnPhase, silent
from .generate import GenerateConfig, Job, Picture
from .group import Group, Mask, check_group, generate_group, group_parameters, sized
from .group_faces import GroupReference, redraw_faces
from .headshot import FaceOutcome, FacePass, Headshot
from .headshots import Batch, Compared, check_keep, lora_option, read_picture, save_outcome


def make_group_pictures(
    base: Base,
    group: Group,
    jobs: Sequence[Job],
    folder: Path,
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
    batch = _GroupBatch(base, loras, config, device, on_progress or silent, people, group)
    return batch.make([sized(base, group, job) for job in jobs], folder, face_pass or FacePass(), keep)


@dataclass(frozen=True)
class _GroupBatch(Batch):
    group: Group

    @property
    def compared_with(self) -> int:
        return 0 if self.person is None else len(self.group.people)

    def draw(self, jobs: Sequence[Job]) -> Iterator[Picture]:
        return generate_group(self.base, self.group, jobs, self.config, loras=self.loras, device=self.device)

    def parameters(self, job: Job) -> str:
        return group_parameters(self.base, self.group, self.loras, job, self.config)

    def improve_faces(self, paths: Mapping[Job, Path], face_pass: FacePass, person: Compared) -> None:
        """Redraw faces that are small or not alike, and write the outcome into each picture."""
        assert isinstance(person, GroupReference)
        pictures = {job: (job, read_picture(path)) for job, path in paths.items()}
        drawn = redraw_faces(
            self.base, person, pictures, self.config, face_pass, loras=self.loras, device=self.device,
            on_progress=lambda done, total: self.on_progress("faces", done, total),
        )  # fmt: skip
        for job, faces in drawn.items():
            outcome = FaceOutcome(face_pass.below, face_pass.denoise, faces.before, faces.after)
            save_outcome(paths[job], job, faces.image, outcome)

    def model_options(self, folder: Path, job: Job) -> list[str]:
        """Return the options as for one person's batch; none if regions are masks, since their files are unknown."""
        people, named = self.group.people, super().model_options(folder, job)
        if any(isinstance(place, Mask) for place in self.group.layout) or not named:
            return []
        if not all(Path(one.lora.name).is_file() for one in people):
            return []
        for one in people:
            named.append(f"--person={one.name}={lora_option(one.lora, one.strength * job.strength, folder)}")
        for one, box in zip(people, self.group.boxes, strict=True):
            named.append(f"--region={one.name}={','.join(f'{share:g}' for share in box)}")
        return named
