"""The node Load Face Photos, and what its page asks for: photos added, checked, and their thumbnails."""

# pyright: reportMissingImports=false

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web
from comfy_api.latest import io
from server import PromptServer

from ...core.errors import BadFile, BadPhoto, FaceLoraError, counted
from ...core.faces import faces_if_installed
from ...core.models.base import Base
from ...core.models.families import FAMILIES
from ...core.models.opening import load_base
from ...core.photos import Photo, SetReport, Thresholds, check_photos, format_report, read_photo_files, read_photos
from ...core.photos.reading import MASK_ENDING
from ...core.photos.report import CROP, REJECT, REVIEW, USE
from . import panel
from .convert import FacePhotos, image_tensor, trained_family
from .dropped import NAMES, add, folders_for, input_folder, is_hidden, own_name
from .folders import says_no_server_paths, without_server_paths

PREVIEW_SIDE = 1024
"""Longest side of the pictures that go to other nodes, in pixels; training reads the photos themselves."""
THUMBNAIL_SIDE = 160
"""Longest side of an uploaded picture as its node shows it, in pixels."""
DEFAULT_RESOLUTION = 1024
"""The resolution that photos are judged for when the base model is unknown, in pixels."""
HIDDEN = ".not-yours"
"""A name below the input folder that no file has."""
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
                    options=[NO_FOLDER, *folders_for(panel.asking_user())],
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
            is_output_node=True,  # so that it can be run by itself
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
        for name, file in _files(folder, pictures, panel.running_user()):
            digest.update(name.encode("utf-8", "surrogateescape") + file.read_bytes())
        return digest.hexdigest()

    @classmethod
    @says_no_server_paths
    def execute(cls, folder: str, check: bool, strict: bool, pictures: str, model: Any = None) -> io.NodeOutput:
        resolution = FAMILIES[trained_family(model)].resolution if model else DEFAULT_RESOLUTION
        seen = look(folder, pictures, panel.running_user(), resolution if check else None, strict=strict)
        if seen.report and seen.report.network and not any(item.faces for item in seen.report.photos):
            raise BadPhoto(
                f"of {counted(len(seen.photos), 'photo')} none shows a face; to use them anyway, switch check off, and "
                "choose 'all photos' in Train Face LoRA"
            )
        images = [photo.image(shorter_side=PREVIEW_SIDE) for photo in seen.photos]
        for image in images:
            image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        lines = [counted(len(seen.photos), "photo"), *seen.notes]
        return io.NodeOutput(
            seen.photos,
            [image_tensor(image) for image in images],
            [photo.caption or "" for photo in seen.photos],
            without_server_paths("\n".join(lines + ([format_report(seen.report)] if seen.report else []))),
            ui={"facelora_photos": [seen.shown()]},
        )


@dataclass(frozen=True)
class Seen:
    """Photos, and what was seen of them."""

    photos: list[Photo]
    unread: dict[str, str]
    """The added pictures that cannot be read: name -> why."""
    notes: list[str]
    report: SetReport | None
    """None where they were only read."""

    def shown(self) -> dict[str, Any]:
        """What the node shows: a tile for each photo, one headline, and how good all of it is."""
        tiles: list[dict[str, Any]] = [{"name": _name_below_input(photo)} for photo in self.photos]
        tiles += [{"name": name, "verdict": COLOURS[REJECT], "reason": why} for name, why in self.unread.items()]
        headline, verdict = _in_short(self.notes), "doubtful" if self.unread else "good"
        if self.report:
            headline = "; ".join(filter(None, (self.report.headline, headline)))
            all_used = len(self.report.usable) == len(self.photos) and not self.unread
            verdict = "rejected" if not self.report.enough else "good" if all_used else "doubtful"
            people = self.report.people or [0] * len(self.photos)
            for tile, item, person in zip(tiles, self.report.photos, people, strict=False):
                reasons = "; ".join(finding.sentence for finding in item.findings)
                tile |= {"verdict": COLOURS[item.verdict], "reason": reasons, "person": person}
        text = without_server_paths(headline)
        return {
            "photos": tiles,
            "headline": text,
            "verdict": verdict,
            "mixed": bool(self.report and self.report.people),
        }


def look(folder: str, pictures: str, user: str | None, resolution: int | None, *, strict: bool = False) -> Seen:
    """The photos of a folder and added ones, checked for a training at the resolution, or only read where that is None.

    Raises BadPhoto when there is none, and with `strict` for one that cannot be read.
    """
    if folder == NO_FOLDER and not _names(pictures):
        raise BadPhoto("no photos: add some to the node, or choose a folder below ComfyUI's input folder")
    list(_files(folder, pictures, user))  # report a missing file before anything is read
    notes: list[str] = []
    photos, unread = _read(folder, pictures, user, strict=strict, on_warning=notes.append)
    if resolution is None:
        return Seen(photos, unread, notes, None)
    network = faces_if_installed(notes.append)
    return Seen(photos, unread, notes, check_photos(photos, network, Thresholds.for_resolution(resolution)))


def _read(
    folder: str, pictures: str, user: str | None, *, strict: bool, on_warning: Callable[[str], None]
) -> tuple[list[Photo], dict[str, str]]:
    """The photos, and the added pictures that cannot be read: name -> why. `on_warning` is told about everything left out."""
    photos: list[Photo] = []
    unread: dict[str, str] = {}
    if _is_left_out(folder, pictures, user):
        on_warning(f"{folder}: there is no such folder below ComfyUI's input folder; the added photos alone are taken")
    elif folder != NO_FOLDER:
        photos += read_photos(_path(folder, user), strict=strict, on_warning=on_warning)
    for name in _names(pictures):
        problems: list[str] = []
        photos += read_photo_files([_path(name, user)], strict=strict, on_warning=problems.append)
        for problem in problems:
            unread[name] = problem
            on_warning(problem)
    if not photos:
        raise BadPhoto(next(iter(unread.values()), f"{folder}: no photo in this folder can be read"))
    return photos, unread


def _in_short(notes: list[str]) -> str:
    """The first of the notes and the number of the others; "" where there are none."""
    more = f" (and {counted(len(notes) - 1, 'more note')})" if len(notes) > 1 else ""
    return notes[0] + more if notes else ""


def _names(pictures: str) -> list[str]:
    return [line.strip() for line in pictures.splitlines() if line.strip()]


def _files(folder: str, pictures: str, user: str | None) -> Iterator[tuple[str, Path]]:
    """The (name, path) of each file that the node reads: photos, captions and masks. Raises BadPhoto when one is not there."""
    if folder != NO_FOLDER and not _is_left_out(folder, pictures, user):
        path = _path(folder, user)
        if not path.is_dir():
            raise BadPhoto(f"{folder}: there is no such folder below ComfyUI's input folder")
        files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != NAMES)
        yield from ((str(file.relative_to(path)), file) for file in files)
    for name in _names(pictures):
        picture = _path(name, user)
        if not picture.is_file():
            raise BadPhoto(f"{name}: there is no such picture in ComfyUI's input folder")
        companions = (picture.with_suffix(".txt"), picture.with_name(picture.stem + MASK_ENDING))
        yield from ((file.name, file) for file in (picture, *companions) if file.is_file())


def _is_left_out(folder: str, pictures: str, user: str | None) -> bool:
    """Whether the folder is ignored: it does not exist, as one that a template names may not, and photos were added."""
    return folder != NO_FOLDER and bool(_names(pictures)) and not _path(folder, user).exists()


def _path(name: str, user: str | None) -> Path:
    """The path of a folder or picture below the input folder.

    One of another user's dropped photos is a path at which there is nothing. Raises BadPhoto for a path elsewhere or an
    impossible name.
    """
    root = input_folder()
    try:
        path = (root / name).resolve()
        path.exists()
    except (OSError, ValueError) as problem:  # a name that is too long, or has a NUL character
        raise BadPhoto(f"{name[:80]!r}: no file can have this name ({problem})") from None
    if not path.is_relative_to(root):
        raise BadPhoto(f"{name}: is not below ComfyUI's input folder")
    return root / HIDDEN if is_hidden(path.relative_to(root).as_posix(), user) else path


def _name_below_input(photo: Photo) -> str:
    """What GET /facelora/photo takes for it."""
    assert isinstance(photo.source, Path)
    return photo.source.relative_to(input_folder()).as_posix()


def _thumbnail(name: str, user: str | None) -> bytes:
    """A JPEG of a picture in the input folder, turned upright, its longer side at most THUMBNAIL_SIDE pixels.

    Raises BadPhoto when the file is missing or no picture.
    """
    path = _path(name, user)
    if not path.is_file():
        raise BadPhoto(f"{name}: there is no such picture in ComfyUI's input folder")
    (photo,) = read_photo_files([path], strict=True, on_warning=lambda _: None)
    image = photo.image(shorter_side=THUMBNAIL_SIDE)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def opened(base: str) -> Base | None:
    """The base model in a file, by its name in a loader; None where there is no such file, or it is none of a known family."""
    for kind in ("checkpoints", "diffusion_models"):
        if base in folder_paths.get_filename_list(kind):
            with suppress(FaceLoraError):
                return load_base(folder_paths.get_full_path_or_raise(kind, base))
    return None


def add_routes() -> None:
    """Add the routes of the node's page.

    - POST /facelora/photos, a form of person, folder and file: add a dropped photo.
    - GET /facelora/photo?name=NAME: its thumbnail, a JPEG.
    - POST /facelora/check {"folder", "pictures", "base", "resolution"}: check the node's photos.
    """
    routes = PromptServer.instance.routes

    @routes.get("/facelora/photo")
    async def photo(request: web.Request) -> web.Response:
        try:
            small = await asyncio.to_thread(_thumbnail, request.query.get("name", ""), panel.user_of(request))
        except BadPhoto as problem:
            return _refusal(problem, 404)
        return web.Response(body=small, content_type="image/jpeg")

    @routes.post("/facelora/photos")
    async def photos(request: web.Request) -> web.Response:
        user, form = panel.user_of(request), await request.post()
        if user is None or not isinstance(file := form.get("file"), web.FileField):
            return web.json_response({"error": "send a user's form of person, folder and file"}, status=400)
        person, folder = (str(form.get(name, "")) for name in ("person", "folder"))
        try:
            name = await asyncio.to_thread(add, user, person, folder, Path(file.filename).name, file.file.read())
        except (BadFile, BadPhoto) as problem:
            return _refusal(problem, 200)  # browsers report other answers as faults of the page
        return web.json_response({"name": name})

    @routes.post("/facelora/check")
    async def check(request: web.Request) -> web.Response:
        user = panel.user_of(request)
        try:
            asked = await request.json()
            folder, pictures, base = (str(asked.get(name, "")) for name in ("folder", "pictures", "base"))
            given = int(asked.get("resolution", 0))
        except (AttributeError, TypeError, ValueError):
            return web.json_response({"error": 'send {"folder", "pictures", "base", "resolution"}'}, status=400)
        try:
            found = None if given else await asyncio.to_thread(opened, base)
            resolution = found.resolution if found else given or DEFAULT_RESOLUTION
            seen = await asyncio.to_thread(look, folder, pictures, user, resolution)
        except FaceLoraError as problem:
            return _refusal(problem, 200)  # browsers report other answers as faults of the page
        shown = seen.shown()
        # A node's own output has no file names: with --multi-user everybody can read the history.
        shown["own_names"] = {tile["name"]: own_name(tile["name"]) for tile in shown["photos"]}
        return web.json_response(shown)


def _refusal(problem: FaceLoraError, status: int) -> web.Response:
    return web.json_response({"error": without_server_paths(str(problem))}, status=status)
