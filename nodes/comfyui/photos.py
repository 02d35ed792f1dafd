"""The node Load Face Photos, and the routes that its page uses: add photos, check them, get thumbnails."""

# pyright: reportMissingImports=false

import asyncio
import hashlib
import re
from collections import Counter
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

from ...core.errors import BadFile, BadPhoto, FaceLoraError, check_length, counted
from ...core.faces import faces_if_installed
from ...core.models.base import Base
from ...core.models.opening import load_base
from ...core.photos import Photo, SetReport, Thresholds, check_photos, format_report, read_photo_files, read_photos
from ...core.photos.reading import MASK_ENDING, PHOTO_SUFFIXES
from ...core.photos.report import CROP, REJECT, REVIEW, USE
from ...core.storage.files import write_text
from . import panel, people
from .convert import FacePhotos, image_tensor, resolution_of
from .dropped import NAMES, add, folders_for, input_folder, is_hidden, own_name
from .folders import refusal, says_no_server_paths, without_server_paths

PREVIEW_SIDE = 1024
"""Longest side of the pictures that go to other nodes, in pixels; training reads the photos themselves."""
THUMBNAIL_SIDE = 160
"""Longest side of a thumbnail in the node, in pixels."""
DEFAULT_RESOLUTION = 1024
"""The resolution that photos are judged for when the base model is unknown, in pixels."""
PHOTOS, CLASS, REFERENCE = USES = "photos", "class_photos", "reference"
"""What photos are for: the input of Train Face LoRA or Likeness Score that they are connected to."""
_NOTHING = {
    PHOTOS: "no photos: add 10 to 20 photos of one person, or choose a folder of them",
    CLASS: "no class images: add pictures of other people, or choose a folder of them",
    REFERENCE: "no reference photos: add photos of the person, or choose a folder of them",
}
HIDDEN = ".not-yours"
"""A name in the input folder that no file has."""
NO_FOLDER = "(no folder)"
COLOURS = {USE: "good", CROP: "good", REVIEW: "doubtful", REJECT: "rejected"}
"""The look of a photo's tile, by the verdict of the report."""


class LoadFacePhotos(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRALoadPhotos",
            display_name="Load Face Photos",
            category="FaceLoRA",
            description="Loads 10 to 20 photos of one person, uploaded here or from a folder in ComfyUI's input folder. It "
            "checks them, and reports which ones help and what to add.",
            search_aliases=["load photos", "upload photos", "face dataset", "training images", "load folder"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=[NO_FOLDER, *folders_for(panel.asking_user())],
                    tooltip="A folder in ComfyUI's input folder with photos to use. NAME.txt beside a photo is its "
                    "caption, and NAME-masklabel.png its mask. Photos in a subfolder named '10_name' count ten times.",
                ),
                io.Boolean.Input(
                    "check",
                    default=True,
                    tooltip="Check each photo for a face, sharpness, light, size and the same person. On by default. It "
                    "takes about a second for five photos.",
                ),
                io.Boolean.Input(
                    "strict",
                    default=False,
                    advanced=True,
                    tooltip="Stop with an error if a photo cannot be read. Off by default: unreadable photos are left "
                    "out and listed in the report.",
                ),
                io.String.Input(
                    "pictures",
                    default="",
                    multiline=True,
                    placeholder="file names in the input folder, one per line",
                    tooltip="Photos to use in addition to folder: drop files or a folder onto the node, paste them, or "
                    "press Add photos. The value lists their names in ComfyUI's input folder, one per line.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The base model to train on. Its resolution decides how large a face must be. Without it, "
                    "the check uses 1024 pixels. Photos for Likeness Score don't need it.",
                ),
            ],
            outputs=[
                FacePhotos.Output(display_name="photos", tooltip="The photos at full size, for Train Face LoRA."),
                io.Image.Output(
                    display_name="images",
                    is_output_list=True,
                    tooltip=f"The photos as images of at most {PREVIEW_SIDE} pixels, for other nodes.",
                ),
                io.String.Output(
                    display_name="captions",
                    is_output_list=True,
                    tooltip="The caption of each photo. Empty if it has none.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="The result of the photo check: the verdict on each photo, and what to add.",
                ),
            ],
            has_intermediate_output=True,
            is_output_node=True,  # so that it can be run alone
        )

    @classmethod
    def validate_inputs(cls, folder: str | None = None) -> bool:
        """Accept any folder, because photos may have been added. `execute` reports a missing folder once.

        ComfyUI would repeat the message for each argument of this function.
        """
        return True

    @classmethod
    def fingerprint_inputs(cls, folder: str, pictures: str, **_: object) -> str:
        digest = hashlib.sha256(panel.running_use(USES).encode())
        for name, file in _files(folder, pictures, panel.running_user()):
            digest.update(name.encode("utf-8", "surrogateescape") + file.read_bytes())
        return digest.hexdigest()

    @classmethod
    @says_no_server_paths
    def execute(cls, folder: str, check: bool, strict: bool, pictures: str, model: Any = None) -> io.NodeOutput:
        use = panel.running_use(USES)
        resolution = resolution_of(model) if model else DEFAULT_RESOLUTION
        seen = look(folder, pictures, panel.running_user(), resolution if check else None, use, strict=strict)
        if seen.report and seen.report.network and not any(item.faces for item in seen.report.photos):
            raise BadPhoto(
                f"none of the {counted(len(seen.photos), 'photo')} shows a face. Add other photos. To use these anyway, "
                "turn off check, and set use to 'all photos' in Train Face LoRA"
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
    """Photos, and the result of their check."""

    photos: list[Photo]
    unread: dict[str, str]
    """The reason for each added picture that cannot be read, by name."""
    notes: list[str]
    report: SetReport | None
    """None if the photos were only read."""

    def shown(self) -> dict[str, Any]:
        """Return what the node shows: a tile for each photo, one headline, and the verdict on the set."""
        tiles: list[dict[str, Any]] = [{"name": _name_below_input(photo)} for photo in self.photos]
        tiles += [{"name": name, "verdict": COLOURS[REJECT], "reason": why} for name, why in self.unread.items()]
        more = f" (and {counted(len(self.notes) - 1, 'more note')})" if len(self.notes) > 1 else ""
        headline = self.notes[0] + more if self.notes else ""
        verdict = "doubtful" if self.unread else "good"
        if self.report:
            headline = "; ".join(filter(None, (self.report.headline, headline)))
            usable = len(self.report.usable)
            good = usable == len(self.photos) and not self.unread and usable >= self.report.thresholds.photos_measured
            verdict = "rejected" if not self.report.enough else "good" if good else "doubtful"
            people = self.report.people or [0] * len(self.photos)
            for tile, item, person in zip(tiles, self.report.photos, people, strict=False):
                reasons = "; ".join(finding.sentence for finding in item.findings)
                tile |= {"verdict": COLOURS[item.verdict], "reason": reasons, "person": person}
        mixed = bool(self.report and self.report.people)
        return {"photos": tiles, "headline": without_server_paths(headline), "verdict": verdict, "mixed": mixed}


def look(
    folder: str, pictures: str, user: str | None, resolution: int | None, use: str = PHOTOS, *, strict: bool = False
) -> Seen:
    """Read the photos of a folder and the added ones, and check them for their use: to be trained on at the resolution, or to
    compare pictures with. Class images aren't checked, and nothing is if the resolution is None.

    Raises BadPhoto without any photos, and with `strict` for a photo that cannot be read.
    """
    if folder == NO_FOLDER and not _names(pictures):
        raise BadPhoto(_NOTHING[use])
    list(_files(folder, pictures, user))  # report a missing file before anything is read
    notes: list[str] = []
    photos, unread = _read_chosen(folder, pictures, user, strict=strict, on_warning=notes.append)
    if resolution is None or use == CLASS:
        return Seen(photos, unread, notes, None)
    network = faces_if_installed(notes.append)
    limits = Thresholds.for_reference() if use == REFERENCE else Thresholds.for_resolution(resolution)
    return Seen(photos, unread, notes, check_photos(photos, network, limits))


def _read_chosen(
    folder: str, pictures: str, user: str | None, *, strict: bool, on_warning: Callable[[str], None]
) -> tuple[list[Photo], dict[str, str]]:
    """Read the photos. Return them, and the reason for each added picture that cannot be read, by name.

    `on_warning` is called for everything that is left out.
    """
    photos: list[Photo] = []
    unread: dict[str, str] = {}
    if _is_left_out(folder, pictures, user):
        on_warning(f"{folder}: this folder doesn't exist in ComfyUI's input folder. Only the added photos are used")
    elif folder != NO_FOLDER:
        photos += read_photos(_path(folder, user), strict=strict, on_warning=on_warning)
    in_folder = {_name_below_input(photo) for photo in photos}
    for name in (name for name in _names(pictures) if name not in in_folder):
        problems: list[str] = []
        photos += read_photo_files([_path(name, user)], strict=strict, on_warning=problems.append)
        for problem in problems:
            unread[name] = problem
            on_warning(problem)
    if not photos:
        raise BadPhoto(next(iter(unread.values()), f"{folder}: no photo in this folder can be read"))
    return photos, unread


def _names(pictures: str) -> list[str]:
    return [line.strip() for line in pictures.splitlines() if line.strip()]


def _files(folder: str, pictures: str, user: str | None) -> Iterator[tuple[str, Path]]:
    """Yield (name, path) of each file that the node reads: photos, captions, masks. Raises BadPhoto if one is missing."""
    if folder != NO_FOLDER and not _is_left_out(folder, pictures, user):
        path = _path(folder, user)
        if not path.is_dir():
            raise BadPhoto(f"{folder}: this folder doesn't exist in ComfyUI's input folder. Choose another one")
        files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name != NAMES)
        yield from ((str(file.relative_to(path)), file) for file in files)
    for name in _names(pictures):
        picture = _path(name, user)
        if not picture.is_file():
            raise BadPhoto(f"{name}: this picture doesn't exist in ComfyUI's input folder. Add it again, or remove it")
        companions = (picture.with_suffix(".txt"), picture.with_name(picture.stem + MASK_ENDING))
        yield from ((file.name, file) for file in (picture, *companions) if file.is_file())


def _is_left_out(folder: str, pictures: str, user: str | None) -> bool:
    """Return whether the folder is ignored: it doesn't exist (a template may name a missing one), and photos were added."""
    return folder != NO_FOLDER and bool(_names(pictures)) and not _path(folder, user).exists()


def _path(name: str, user: str | None) -> Path:
    """Return the path of a folder or picture in the input folder.

    For another user's dropped photo, the path does not exist. Raises BadPhoto for a path elsewhere or an impossible name.
    """
    root = input_folder()
    try:
        path = (root / name).resolve()
        path.exists()
    except (OSError, ValueError) as problem:  # a name that is too long, or has a NUL character
        raise BadPhoto(f"{name[:80]!r}: not a valid file name ({problem})") from None
    if not path.is_relative_to(root):
        raise BadPhoto(f"{name}: not in ComfyUI's input folder. Copy it there first")
    return root / HIDDEN if is_hidden(path.relative_to(root).as_posix(), user) else path


def _name_below_input(photo: Photo) -> str:
    """Return the photo's name for GET /facelora/photo."""
    assert isinstance(photo.source, Path)
    return photo.source.relative_to(input_folder()).as_posix()


def _thumbnail(name: str, user: str | None) -> bytes:
    """Return a JPEG of a picture in the input folder, upright, its longer side at most THUMBNAIL_SIDE pixels.

    Raises BadPhoto if the file is missing or not a picture.
    """
    path = _path(name, user)
    if not path.is_file():
        raise BadPhoto(f"{name}: this picture doesn't exist in ComfyUI's input folder")
    (photo,) = read_photo_files([path], strict=True, on_warning=lambda _: None)
    image = photo.image(shorter_side=THUMBNAIL_SIDE)
    image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _write_caption(name: str, text: str, user: str | None) -> None:
    """Write a photo's caption beside it; "" deletes it. Raises BadPhoto if the photo is missing or the text too long."""
    path = _path(name, user)
    if not path.is_file() or path.suffix.lower() not in PHOTO_SUFFIXES:
        raise BadPhoto(f"{name}: this picture doesn't exist in ComfyUI's input folder")
    check_length(f"{path.name}: its caption", text, BadPhoto)
    if text:
        write_text(path.with_suffix(".txt"), text)
    else:
        path.with_suffix(".txt").unlink(missing_ok=True)


def opened(base: str) -> Base | None:
    """Open a base model by its file's name in a loader; None if the file is missing or its family is unknown."""
    for kind in ("checkpoints", "diffusion_models"):
        if base in folder_paths.get_filename_list(kind):
            with suppress(FaceLoraError):
                return load_base(folder_paths.get_full_path_or_raise(kind, base))
    return None


def add_routes() -> None:
    """Add the routes of the node's page.

    - POST /facelora/photos, a form of person, folder and file: add a dropped photo.
    - DELETE /facelora/photos {"names": [...]}: delete dropped photos, except those that a training run has or needs.
    - GET /facelora/photo?name=NAME: its thumbnail, a JPEG.
    - PUT /facelora/caption {"name", "caption"}: write a photo's caption into the .txt beside it, or delete it.
    - POST /facelora/check {"folder", "pictures", "base", "resolution", "use"}: check the node's photos.
    """
    routes = PromptServer.instance.routes

    @routes.get("/facelora/photo")
    async def photo(request: web.Request) -> web.Response:
        try:
            small = await asyncio.to_thread(_thumbnail, request.query.get("name", ""), panel.user_of(request))
        except BadPhoto as problem:
            return refusal(problem, 404)
        return web.Response(body=small, content_type="image/jpeg")

    @routes.post("/facelora/photos")
    async def photos(request: web.Request) -> web.Response:
        user = panel.user_of(request)
        form: Any = {}
        with suppress(ValueError):  # not a form
            form = await request.post()
        if user is None or not isinstance(file := form.get("file"), web.FileField):
            return web.json_response({"error": "send a form with the fields person, folder and file"}, status=400)
        person, folder = (str(form.get(name, "")) for name in ("person", "folder"))
        try:
            name = await asyncio.to_thread(add, user, person, folder, Path(file.filename).name, file.file.read())
        except (BadFile, BadPhoto) as problem:
            return refusal(problem, 200)  # browsers report other answers as faults of the page
        return web.json_response({"name": name})

    @routes.delete("/facelora/photos")
    async def delete(request: web.Request) -> web.Response:
        try:
            names = [str(name) for name in (await request.json())["names"]]
        except (KeyError, TypeError, ValueError):
            return web.json_response({"error": 'send {"names": [...]}'}, status=400)
        user, queued = panel.user_of(request), panel.queued_photos()
        deleted = await asyncio.to_thread(people.delete_photos, user, names, queued)
        return web.json_response({"deleted": deleted})

    @routes.put("/facelora/caption")
    async def caption(request: web.Request) -> web.Response:
        try:
            asked = await request.json()
            name, text = str(asked["name"]), " ".join(str(asked["caption"]).replace("\0", " ").split())
        except (KeyError, TypeError, ValueError):
            return web.json_response({"error": 'send {"name": NAME, "caption": TEXT}'}, status=400)
        try:
            await asyncio.to_thread(_write_caption, name, text, panel.user_of(request))
        except (BadFile, BadPhoto) as problem:
            return refusal(problem, 200)  # browsers report other answers as faults of the page
        return web.json_response({"caption": text})

    @routes.post("/facelora/check")
    async def check(request: web.Request) -> web.Response:
        user = panel.user_of(request)
        try:
            asked = await request.json()
            folder, pictures, base = (str(asked.get(name, "")) for name in ("folder", "pictures", "base"))
            given, use = int(asked.get("resolution", 0)), str(asked.get("use", PHOTOS))
            use = use if use in USES else PHOTOS
        except (AttributeError, OverflowError, TypeError, ValueError):
            return web.json_response({"error": 'send {"folder", "pictures", "base", "resolution", "use"}'}, status=400)
        try:
            found = None if given else await asyncio.to_thread(opened, base)
            resolution = found.resolution if found else given or DEFAULT_RESOLUTION
            seen = await asyncio.to_thread(look, folder, pictures, user, resolution, use)
        except FaceLoraError as problem:
            return refusal(problem, 200)  # browsers report other answers as faults of the page
        return web.json_response(_with_own_names(seen))


def _with_own_names(seen: Seen) -> dict[str, Any]:
    """Return what the node shows, with the original names of photos, and their captions.

    The node's output doesn't contain them, because everybody can read the history with --multi-user.
    """
    shown = seen.shown()
    names = {tile["name"]: own_name(tile["name"]) for tile in shown["photos"]}
    plain = Counter(Path(name).name for name in names)
    # Photos with the same name in two folders keep it: a reason doesn't tell which one it is about.
    said = {Path(name).name: own for name, own in names.items() if plain[Path(name).name] == 1}
    for tile in shown["photos"] if said else ():
        if tile.get("reason"):
            tile["reason"] = re.sub("|".join(map(re.escape, said)), lambda found: said[found[0]], tile["reason"])
    shown["own_names"] = names
    shown["captions"] = {_name_below_input(photo): photo.caption for photo in seen.photos if photo.caption}
    return shown
