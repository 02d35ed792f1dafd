"""The command `score`, which measures how much pictures look like photos."""

import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence, Set
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
    import numpy as np

    from ..faces import Face, FaceNetwork


@dataclass(frozen=True)
class ScoreOptions(Options):
    images: InputPath = argument("Folder of pictures", "IMAGES")
    reference: InputPath = option("Folder of photos of the person that training has not seen", "PHOTOS")
    trained_on: InputPath | None = option("Folder of the photos trained on: adds MultiID-Bench's copy-paste", "PHOTOS")
    people: InputPath | None = option(
        "Folder with a folder of photos for each other person: adds rank-1 and mAP", "PEOPLE"
    )
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
    others = _other_people(options.people, {photo.digest for photo in (*reference, *trained)}) if options.people else {}
    network = load_faces(options.face_network)
    networks = [network]
    if options.judge:
        networks.append(load_faces(options.judge))
        check_judge(networks[1], network)
    looked = [_look(each, images, reference, trained, others) for each in networks]
    for place, score in looked[0][2].items():
        print_warning(
            f"--people: {place} seems to show the person of --reference too (likeness {score:.2f}). If it does, rank-1 and mAP "
            "are too low: leave this folder out"
        )
    judged = looked[1][0] if options.judge else [(None, None)] * len(images)
    scored = [
        (training.Score.of(photo.name, *seen, other), photo)
        for photo, seen, (other, _) in zip(images, looked[0][0], judged, strict=True)
    ]
    scored.sort(key=lambda one: -2.0 if one[0].likeness is None else one[0].likeness, reverse=True)
    figures = {each.name: found for each, (_, found, _) in zip(networks, looked, strict=True)}
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
    others: Mapping[Path, Sequence["photos.Photo"]],
) -> tuple[list[tuple[float | None, "Face | None"]], "training.Figures", dict[Path, float]]:
    """Return each picture's likeness and face, both None where no face was found, and the figures of all pictures.

    The last value is the folders of other people that seem to show the person, with their highest likeness.
    """
    from ..faces import embed_one_by_one, likeness, look_one_by_one, mean_face

    faces, vectors = look_one_by_one(network, (photo.image() for photo in images))
    of_person, of_trained, of_others = (
        embed_one_by_one(network, (photo.image() for photo in group))
        for group in (reference, trained, itertools.chain(*others.values()))
    )
    figures = training.Figures.of(vectors, of_person, of_trained, of_others)
    person = mean_face(of_person)
    assert person is not None, "the figures require a face"
    cosines = likeness(vectors, person[None])[:, 0]
    return (
        [(round(float(cosine), 4) if face else None, face) for cosine, face in zip(cosines, faces, strict=True)],
        figures,
        _alike(network, of_person, of_others, [place for place, group in others.items() for _ in group]),
    )


def _alike(
    network: "FaceNetwork", of_person: "np.ndarray", of_others: "np.ndarray", places: Sequence[Path]
) -> dict[Path, float]:
    """Return the places whose vectors are as near to the person as the person's own are, or as the same person's usually are.

    Each has the highest cosine to the person's mean face.
    """
    from ..faces import likeness, likeness_to_rest, mean_face
    from ..photos.measure import LIKENESS_LIMITS

    different, same, _ = LIKENESS_LIMITS.get(network.name, LIKENESS_LIMITS["sface"])
    least = max(different, min([same, *likeness_to_rest(of_person)]))
    person, found = mean_face(of_person), {}
    assert person is not None
    for place, score in zip(places, likeness(of_others, person[None])[:, 0], strict=True):
        if score >= least:
            found[place] = max(found.get(place, -1.0), float(score))
    return found


def _other_people(folder: Path, own: Set[str]) -> dict[Path, list["photos.Photo"]]:
    """Return the photos of all people in the folder, by folder, without the person whose photos have the digests `own`."""
    found, places = {}, folder.iterdir() if os.path.isdir(folder) else ()
    for place in sorted(path for path in places if path.is_dir() and not path.name.startswith(".")):
        person = photos.read_photos(place, on_warning=print_warning)
        if not {photo.digest for photo in person} & own:
            found[place] = person
    if not found:
        raise BadConfig(
            f"--people {folder}: no photos of other people found; give a folder with a folder for each person"
        )
    return found


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
