"""The node Load Face Photos."""

# pyright: reportMissingImports=false

import hashlib
from typing import Any

from comfy_api.latest import io

from ...core.errors import BadPhoto, counted
from ...core.photos import format_report
from .app.dropped import folders_for
from .app.photos import DEFAULT_RESOLUTION, NO_FOLDER, USES, chosen_files, read_checked
from .app.prompts import running_prompt, running_use
from .app.users import asking_user
from .convert import FacePhotos, image_tensor, moving_bar, resolution_of
from .folders import says_no_server_paths, without_server_paths

PREVIEW_SIDE = 1024
"""Longest side of the pictures that go to other nodes, in pixels; training reads the photos themselves."""


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
                    options=[NO_FOLDER, *folders_for(asking_user())],
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
        digest = hashlib.sha256(running_use(USES).encode())
        for name, file in chosen_files(folder, pictures, running_prompt().user):
            digest.update(name.encode("utf-8", "surrogateescape") + file.read_bytes())
        return digest.hexdigest()

    @classmethod
    @says_no_server_paths
    def execute(cls, folder: str, check: bool, strict: bool, pictures: str, model: Any = None) -> io.NodeOutput:
        use = running_use(USES)
        resolution = resolution_of(model) if model else DEFAULT_RESOLUTION
        checked = read_checked(
            folder,
            pictures,
            running_prompt().user,
            resolution if check else None,
            use,
            strict=strict,
            on_progress=moving_bar(),
        )
        if checked.report and checked.report.network and not any(item.faces for item in checked.report.photos):
            raise BadPhoto(
                f"none of the {counted(len(checked.photos), 'photo')} shows a face. Add other photos. To use these anyway, "
                "turn off check, and set use to 'all photos' in Train Face LoRA"
            )
        images = [photo.image(shorter_side=PREVIEW_SIDE) for photo in checked.photos]
        for image in images:
            image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        lines = [counted(len(checked.photos), "photo"), *checked.notes]
        return io.NodeOutput(
            checked.photos,
            [image_tensor(image) for image in images],
            [photo.caption or "" for photo in checked.photos],
            without_server_paths("\n".join(lines + ([format_report(checked.report)] if checked.report else []))),
            ui={"facelora_photos": [checked.shown()]},
        )
