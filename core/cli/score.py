"""The command `score`, which measures how much pictures look like photos."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import photos, pictures, training  # Their modules load only when a name is used.
from ..errors import BadConfig, counted
from .common import print_warning
from .options import Options, argument, option
from .shared_options import FACE_NETWORK, JSON, JUDGE, OVERWRITE
from .values import InputPath, PngOutput

if TYPE_CHECKING:
    from ..faces import Face, FaceNetwork


@dataclass(frozen=True)
class ScoreOptions(Options):
    images: InputPath = argument("Folder of pictures", "IMAGES")
    reference: InputPath = option("Folder of photos of the person that training has not seen", "PHOTOS")
    trained_on: InputPath | None = option("Folder of the photos trained on: adds MultiID-Bench's copy-paste", "PHOTOS")
    sheet: PngOutput | None = option("Also write a sheet of the sorted pictures")
    overwrite: bool = OVERWRITE
    face_network: str = FACE_NETWORK
    judge: str | None = JUDGE
    json: bool = JSON


def run(options: ScoreOptions) -> None:
    from ..faces import check_judge, load_faces

    found = photos.read_photos(options.images, repeats=False, drawn=True, on_warning=print_warning)
    images = [photo for photo in found if not _is_sheet(photo)]
    reference = photos.read_photos(options.reference, on_warning=print_warning)
    trained = photos.read_photos(options.trained_on, on_warning=print_warning) if options.trained_on else []
    if both := {photo.digest for photo in trained} & {photo.digest for photo in reference}:
        raise BadConfig(f"--trained-on: {counted(len(both), 'photo')} of {options.trained_on} are in --reference too")
    network = load_faces(options.face_network)
    networks = [network]
    if options.judge:
        networks.append(load_faces(options.judge))
        check_judge(networks[1], network)
    looked = [_look(each, images, reference, trained) for each in networks]
    judged = looked[1][0] if options.judge else [(None, None)] * len(images)
    scored = [
        (training.Score.of(photo.name, *seen, other), photo)
        for photo, seen, (other, _) in zip(images, looked[0][0], judged, strict=True)
    ]
    scored.sort(key=lambda one: -2.0 if one[0].likeness is None else one[0].likeness, reverse=True)
    figures = {each.name: found for each, (_, found) in zip(networks, looked, strict=True)}
    if options.json:
        pictures_of = [dataclasses.asdict(score) for score, _ in scored]
        named = {name: dataclasses.asdict(found) | {"share": found.share} for name, found in figures.items()}
        print(json.dumps({"pictures": pictures_of, "figures": named}, indent=1))
    else:
        print("\n".join(f"{score}  {score.image}" for score, _ in scored))
        print("\n".join(f"{name}: {found}" for name, found in figures.items()))
    if options.sheet:
        _save_sheet(scored, options.sheet)


def _look(
    network: "FaceNetwork",
    images: Sequence["photos.Photo"],
    reference: Sequence["photos.Photo"],
    trained: Sequence["photos.Photo"],
) -> tuple[list[tuple[float | None, "Face | None"]], "training.Figures"]:
    """Return each picture's likeness and face, both None where no face was found, and the figures of all pictures."""
    from ..faces import embed_one_by_one, faces_one_by_one, likeness, mean_face

    faces, vectors = faces_one_by_one(network, (photo.image() for photo in images))
    of_person, of_trained = (
        embed_one_by_one(network, (photo.image() for photo in group)) for group in (reference, trained)
    )
    figures = training.Figures.of(vectors, of_person, of_trained)
    person = mean_face(of_person)
    assert person is not None, "the figures require a face"
    cosines = likeness(vectors, person[None])[:, 0]
    return (
        [(round(float(cosine), 4) if face else None, face) for cosine, face in zip(cosines, faces, strict=True)],
        figures,
    )


def _save_sheet(scored: Sequence[tuple["training.Score", "photos.Photo"]], place: Path) -> None:
    """Save a sheet of the pictures, marked as drawn if they are. Some or all may be photos."""
    from ..storage.drawn import DRAWN, PARTLY_DRAWN, read_mark, save_png

    rows = [scored[start : start + 6] for start in range(0, len(scored), 6)]
    sheet = pictures.contact_sheet(
        [
            (f"{6 * number + 1} to {6 * number + len(row)}", [photo.image(shorter_side=256) for _, photo in row])
            for number, row in enumerate(rows)
        ],
        tile=224,
        labels=[[str(score) for score, _ in row] for row in rows],
        title="likeness, the most alike first",
    )
    marks = {read_mark(photo.source) for _, photo in scored if isinstance(photo.source, Path)}
    mark = DRAWN if marks == {DRAWN} else PARTLY_DRAWN if marks - {None} else None
    save_png(place, sheet, {photos.SHEET_KEY: "score"}, mark=mark)


def _is_sheet(photo: "photos.Photo") -> bool:
    assert isinstance(photo.source, Path), "photos of a folder have a path"
    return photo.name == pictures.CONTACT_SHEET or photos.is_sheet(photo.source)
