"""The node Load Face Photos, and the address that serves its thumbnails."""

# pyright: reportMissingImports=false

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web
from comfy_api.latest import io
from server import PromptServer

from ...core.errors import BadPhoto, counted
from ...core.faces import faces_if_installed
from ...core.models.families import FAMILIES
from ...core.photos import Photo, SetReport, Thresholds, check_photos, format_report, read_photo_files, read_photos
from ...core.photos.reading import MASK_ENDING
from ...core.photos.report import CROP, REJECT, REVIEW, USE
from .convert import FacePhotos, image_tensor, trained_family
from .folders import says_no_server_paths, without_server_paths

PREVIEW_SIDE = 1024
"""Longest side of the pictures that go to other nodes, in pixels; training reads the photos themselves."""
THUMBNAIL_SIDE = 160
"""Longest side of an uploaded picture as its node shows it, in pixels."""
NO_FOLDER = "(no folder)"
COLOURS = {USE: "good", CROP: "good", REVIEW: "doubtful", REJECT: "rejected"}
"""Verdict of the report -> how the photo's tile looks."""


class LoadFacePhotos(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRALoadPhotos",
            display_name="Load Face Photos",
            category="FaceLoRA",
            description="Ten to twenty photos of one person, from a folder below ComfyUI's input folder or uploaded here, "
            "and a report that says which of them will teach the person well.",
            search_aliases=["load photos", "upload photos", "face dataset", "training images", "load folder"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=[NO_FOLDER, *folder_paths.get_input_subfolders()],
                    tooltip="Folder below ComfyUI's input folder. NAME.txt beside a photo is its caption, "
                    "NAME-masklabel.png its mask; '10_name' folders in it count ten times.",
                ),
                io.Boolean.Input(
                    "check",
                    default=True,
                    tooltip="Look for faces and report on each photo: sharpness, light, size, whether it is the same "
                    "person. Takes about a second for five photos.",
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    advanced=True,
                    tooltip="Fail on a photo that cannot be read, instead of leaving it out with a note in the report.",
                ),
                io.String.Input(
                    "pictures",
                    default="",
                    multiline=True,
                    placeholder="names of pictures in the input folder, one a line",
                    tooltip="Single photos, taken beside those of the folder: drop files or a folder onto the node, paste "
                    "them, or press Add photos. The value is their names in ComfyUI's input folder, one a line.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model to train on, by whose resolution the sizes of faces are judged; without it 1024 pixels.",
                ),
            ],
            outputs=[
                FacePhotos.Output(display_name="photos", tooltip="The photos as they are, for Train Face LoRA."),
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip=f"The same as images of at most {PREVIEW_SIDE} pixels, for other nodes.",
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="Caption of each photo; empty where there is none.",
                ),
                io.String.Output(display_name="report", tooltip="What is good and bad about the photos."),
            ],
            has_intermediate_output=True,
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool:
        """A folder need not be one of the list, since photos may have been added; `execute` says what is wrong, once.

        (ComfyUI would repeat the message for each argument of this function.)
        """
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str, pictures: str, **_: object) -> str:
        digest = hashlib.sha256()
        for name, file in _files(folder, pictures):
            digest.update(name.encode("utf-8", "surrogateescape") + file.read_bytes())
        return digest.hexdigest()

    @classmethod
    @says_no_server_paths
    def execute(cls, folder: str, check: bool, strict: bool, pictures: str, model: Any = None) -> io.NodeOutput:
        if folder == NO_FOLDER and not _names(pictures):
            raise BadPhoto("no photos: add some to the node, or choose a folder below ComfyUI's input folder")
        list(_files(folder, pictures))  # what is not there is said before anything is read
        notes: list[str] = []
        photos, unread = _read(folder, pictures, strict=strict, on_warning=notes.append)
        tiles, headline = [{"name": _name_below_input(photo)} for photo in photos], _in_short(notes)
        if check:
            resolution = FAMILIES[trained_family(model)].resolution if model else 1024
            checked = _checked(photos, resolution, notes.append)
            notes.append(format_report(checked))
            headline = "; ".join(filter(None, (checked.headline, headline)))
            for tile, item in zip(tiles, checked.photos, strict=True):
                reasons = "; ".join(finding.sentence for finding in item.findings)
                tile |= {"verdict": COLOURS[item.verdict], "reason": reasons}
        tiles += [{"name": name, "verdict": COLOURS[REJECT], "reason": reason} for name, reason in unread.items()]
        images = [photo.image(shorter_side=PREVIEW_SIDE) for photo in photos]
        for image in images:
            image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        report = without_server_paths("\n".join([counted(len(photos), "photo"), *notes]))
        return io.NodeOutput(
            photos,
            [image_tensor(image) for image in images],
            [photo.caption or "" for photo in photos],
            report,
            ui={"facelora_photos": tiles, "facelora_headline": [without_server_paths(headline)]},
        )


def _read(
    folder: str, pictures: str, *, strict: bool, on_warning: Callable[[str], None]
) -> tuple[list[Photo], dict[str, str]]:
    """The photos, and the added pictures that cannot be read: name -> why. `on_warning` hears of all that is left out."""
    photos: list[Photo] = []
    unread: dict[str, str] = {}
    if _is_left_out(folder, pictures):
        on_warning(f"{folder}: there is no such folder below ComfyUI's input folder; the added photos alone are taken")
    elif folder != NO_FOLDER:
        photos += read_photos(_path(folder), strict=strict, on_warning=on_warning)
    for name in _names(pictures):
        problems: list[str] = []
        photos += read_photo_files([_path(name)], strict=strict, on_warning=problems.append)
        for problem in problems:
            unread[name] = problem
            on_warning(problem)
    if not photos:
        raise BadPhoto(f"no readable photo among {', '.join(_names(pictures))}")
    return photos, unread


def _in_short(notes: list[str]) -> str:
    """The first of the notes and the number of the others; "" where there are none."""
    more = f" (and {counted(len(notes) - 1, 'more note')})" if len(notes) > 1 else ""
    return notes[0] + more if notes else ""


def _names(pictures: str) -> list[str]:
    return [line.strip() for line in pictures.splitlines() if line.strip()]


def _files(folder: str, pictures: str) -> Iterator[tuple[str, Path]]:
    """The (name, path) of each file that the node reads: photos, captions and masks. Raises BadPhoto when one is not there."""
    if folder != NO_FOLDER and not _is_left_out(folder, pictures):
        path = _path(folder)
        if not path.is_dir():
            raise BadPhoto(f"{folder}: there is no such folder below ComfyUI's input folder")
        yield from ((str(file.relative_to(path)), file) for file in sorted(path.rglob("*")) if file.is_file())
    for name in _names(pictures):
        picture = _path(name)
        if not picture.is_file():
            raise BadPhoto(f"{name}: there is no such picture in ComfyUI's input folder")
        companions = (picture.with_suffix(".txt"), picture.with_name(picture.stem + MASK_ENDING))
        yield from ((file.name, file) for file in (picture, *companions) if file.is_file())


def _is_left_out(folder: str, pictures: str) -> bool:
    """Whether the folder is ignored: it does not exist, as one that a template names may not, and photos were added."""
    return folder != NO_FOLDER and bool(_names(pictures)) and not _path(folder).exists()


def _path(name: str) -> Path:
    """The path of a folder or picture below the input folder. Raises BadPhoto for a path elsewhere or an impossible name."""
    root = Path(folder_paths.get_input_directory()).resolve()
    try:
        path = (root / name).resolve()
        path.exists()
    except (OSError, ValueError) as problem:  # a name that is too long, or has a NUL character
        raise BadPhoto(f"{name[:80]!r}: no file can have this name ({problem})") from None
    if not path.is_relative_to(root):
        raise BadPhoto(f"{name}: is not below ComfyUI's input folder")
    return path


def _name_below_input(photo: Photo) -> str:
    """What GET /facelora/photo takes for it."""
    assert isinstance(photo.source, Path)
    return photo.source.relative_to(Path(folder_paths.get_input_directory()).resolve()).as_posix()


def _checked(photos: list[Photo], resolution: int, on_warning: Callable[[str], None]) -> SetReport:
    """The report on the photos for a training at the resolution. BadPhoto when there is no face at all."""
    network = faces_if_installed(on_warning)
    checked = check_photos(photos, network, Thresholds.for_resolution(resolution))
    if network and not any(item.faces for item in checked.photos):
        raise BadPhoto(
            f"of {counted(len(photos), 'photo')} none shows a face; to use them all the same, switch check off, and "
            "choose 'all photos' in Train Face LoRA"
        )
    return checked


def _thumbnail(name: str) -> bytes:
    """A JPEG of a picture in the input folder, turned upright, its longer side at most THUMBNAIL_SIDE pixels.

    Raises BadPhoto when the file is missing or no picture.
    """
    path = _path(name)
    if not path.is_file():
        raise BadPhoto(f"{name}: there is no such picture in ComfyUI's input folder")
    (photo,) = read_photo_files([path], strict=True, on_warning=lambda _: None)
    image = photo.image(shorter_side=THUMBNAIL_SIDE)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def add_routes() -> None:
    """Adds GET /facelora/photo?name=NAME, which answers with a JPEG thumbnail of a picture in the input folder."""

    @PromptServer.instance.routes.get("/facelora/photo")
    async def photo(request: web.Request) -> web.Response:
        try:
            small = await asyncio.to_thread(_thumbnail, request.query.get("name", ""))
        except BadPhoto as problem:
            return web.json_response({"error": without_server_paths(str(problem))}, status=404)
        return web.Response(body=small, content_type="image/jpeg")
