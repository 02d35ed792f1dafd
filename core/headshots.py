"""A batch of headshots in a folder: made once, judged by likeness, shown on one page."""

import html
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .base import Base
from .errors import BadFile, BadPhoto
from .files import write_text
from .generate import GenerateConfig, Job, contact_sheet, generate, parameters_text, picture_size
from .lora_file import LoraFile


@dataclass(frozen=True)
class Headshot:
    """A picture of the batch."""

    path: Path
    job: Job
    likeness: float | None = None
    """Cosine to the person's photos; None when there is no reference or no face in the picture."""


def make_headshots(
    base: Base,
    loras: Sequence[tuple[LoraFile, float]],
    jobs: Sequence[Job],
    folder: Path,
    config: GenerateConfig | None = None,
    *,
    reference: Sequence[Image.Image] = (),
    device: torch.device | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> list[Headshot]:
    """The pictures of all jobs as PNG files in `folder`, most alike first where photos to compare with are given.

    A picture that is already there, made from the same job, models and settings, is not made again: an interrupted batch
    goes on where it was. Also writes contact_sheet.png, gallery.html and headshots.json. `on_picture(done, total)` may
    raise to cancel. BadFile when the folder cannot be written.
    """
    config = config or GenerateConfig()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFile(f"{folder}: cannot be written: {error.strerror}") from None
    width = len(str(len(jobs)))
    jobs = [replace(job, size=picture_size(base, job.size)) for job in jobs]
    paths = {job: folder / f"{number:0{width}d}-{job.seed}.png" for number, job in enumerate(jobs, start=1)}
    missing = [job for job, path in paths.items() if not _is_made(path, parameters_text(base, loras, job, config))]
    done = len(paths) - len(missing)
    for picture in generate(base, loras, missing, config, device=device) if missing else ():
        try:
            picture.save(paths[picture.job])
        except OSError as error:
            raise BadFile(f"{folder}: a picture cannot be written: {error.strerror}") from None
        done += 1
        if on_picture:
            on_picture(done, len(paths))
    shots = [Headshot(path, job) for job, path in paths.items()]
    if reference:
        shots = ranked(shots, reference)
    _write_overview(shots, folder)
    return shots


def _is_made(path: Path, parameters: str) -> bool:
    if not path.exists():
        return False
    try:
        with Image.open(path) as image:
            return image.info.get("parameters") == parameters
    except OSError:
        return False


def ranked(shots: Sequence[Headshot], reference: Sequence[Image.Image]) -> list[Headshot]:
    """The pictures with their likeness to the reference photos, most alike first, those without a face last."""
    scores = likeness_scores([Image.open(shot.path).convert("RGB") for shot in shots], reference)
    judged = [replace(shot, likeness=score) for shot, score in zip(shots, scores, strict=True)]
    return sorted(judged, key=lambda shot: -1 if shot.likeness is None else shot.likeness, reverse=True)


def likeness_scores(images: Sequence[Image.Image], reference: Sequence[Image.Image]) -> list[float | None]:
    """The cosine of each picture's largest face to the mean of the reference faces; None without a face.

    BadPhoto when no reference photo shows a face.
    """
    from .faces import embed_images, likeness, load_faces, mean_face

    network = load_faces()
    person = mean_face(embed_images(network, reference))
    if person is None:
        raise BadPhoto(f"no face was found in the {len(reference)} photos to compare with")
    scores = likeness(embed_images(network, images), person[None])[:, 0]
    return [None if np.isnan(score) else round(float(score), 4) for score in scores]


def _write_overview(shots: Sequence[Headshot], folder: Path) -> None:
    styles: dict[str, list[Headshot]] = {}
    for shot in shots:
        styles.setdefault(shot.job.style or shot.job.prompt, []).append(shot)
    rows = [(name, [Image.open(shot.path) for shot in group]) for name, group in styles.items()]
    labels = [[_score(shot) for shot in group] for group in styles.values()]
    contact_sheet(rows, tile=256, labels=labels).save(folder / "contact_sheet.png")
    described = [asdict(shot.job) | {"file": shot.path.name, "likeness": shot.likeness} for shot in shots]
    write_text(folder / "headshots.json", json.dumps(described, indent=1) + "\n")
    figures = "\n".join(
        f'<figure><img src="{html.escape(shot.path.name)}" loading="lazy"><figcaption><b>{_score(shot)}</b> '
        f"{html.escape(shot.job.style)} <span>{html.escape(shot.job.prompt)}</span></figcaption></figure>"
        for shot in shots
    )
    write_text(folder / "gallery.html", _PAGE.replace("FIGURES", figures).replace("COUNT", str(len(shots))))


def _score(shot: Headshot) -> str:
    return "" if shot.likeness is None else f"{shot.likeness:.2f}"


_PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Headshots</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 1.5rem; background: #fafafa; color: #222 }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1rem }
figure { margin: 0; background: #fff; border-radius: 8px; overflow: hidden; box-shadow: 0 1px 3px #0003 }
img { width: 100%; display: block }
figcaption { padding: .5rem .7rem }
figcaption span { color: #777; display: block; font-size: 12px }
</style>
<h1>COUNT headshots</h1>
<main>
FIGURES
</main>
"""
