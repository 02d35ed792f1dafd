"""Load Face Photos."""

# pyright: reportMissingImports=false

import hashlib
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..core.errors import BadPhoto, MissingPackage
from ..core.faces import load_faces
from ..core.generate import contact_sheet
from ..core.photos import Photo, check_photos, format_report, read_photos
from .convert import FacePhotos, image_tensor

PREVIEW_SIDE = 1024
"""Longest side of the pictures that go to other nodes, in pixels; training reads the photos themselves."""


class LoadFacePhotos(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRALoadPhotos",
            display_name="Load Face Photos",
            category="FaceLoRA",
            description="Ten to twenty photos of one person, from a folder below ComfyUI's input folder, and a report "
            "that says which of them will teach the person well.",
            search_aliases=["load photos", "face dataset", "training images", "load folder"],
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=folder_paths.get_input_subfolders(),
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
    def fingerprint_inputs(cls, folder: str, check: bool, strict: bool) -> str:
        digest = hashlib.sha256()
        path = _folder(folder)
        for file in sorted(path.rglob("*")):
            if file.is_file():
                digest.update(str(file.relative_to(path)).encode("utf-8", "surrogateescape") + file.read_bytes())
        return digest.hexdigest()

    @classmethod
    def execute(cls, folder: str, check: bool, strict: bool) -> io.NodeOutput:
        notes: list[str] = []
        try:
            photos = read_photos(_folder(folder), strict=strict, on_warning=notes.append)
        except BadPhoto as problem:
            # The path on the server is not for the report; the folder's name says enough.
            raise BadPhoto(str(problem).replace(str(_folder(folder)), folder)) from None
        if check:
            notes.append(_report(photos))
        images = [photo.image(shorter_side=PREVIEW_SIDE) for photo in photos]
        for image in images:
            image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        report = "\n".join([f"{len(photos)} photos", *notes])
        sheet = contact_sheet([(f"{folder}: {len(photos)} photos", images)], tile=128)
        return io.NodeOutput(
            photos,
            [image_tensor(image) for image in images],
            [photo.caption or "" for photo in photos],
            report,
            ui=ui.PreviewImage(image_tensor(sheet), cls=cls),
        )


def _folder(name: str) -> Path:
    """A folder below the input folder. BadPhoto for one that is elsewhere."""
    root = Path(folder_paths.get_input_directory()).resolve()
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise BadPhoto(f"{name}: is not below ComfyUI's input folder")
    return path


def _report(photos: list[Photo]) -> str:
    try:
        network = load_faces()
    except MissingPackage as missing:
        return f"Not checked: {missing}"
    return format_report(check_photos(photos, network))
