"""The nodes Save Face LoRA, Inspect LoRA, Likeness Score and Contact Sheet."""

# pyright: reportMissingImports=false

import asyncio
import json
from functools import partial
from pathlib import Path

import folder_paths
from aiohttp import web
from comfy_api.latest import io, ui
from server import PromptServer

from ...core.device import PRECISIONS
from ...core.errors import BadPhoto, FaceLoraError, MissingPackage
from ...core.faces import Reference
from ...core.lora.convert import convert_lora
from ...core.lora.file import LoraFile
from ...core.lora.inspect import inspect_lora
from ...core.lora.report import format_inspection
from ...core.lora.sidecars import write_sidecars
from ...core.pictures.gallery import SAME_PERSON, SOMEONE_ELSE
from ...core.pictures.sheet import contact_sheet
from ...core.storage.files import write_file
from ...core.tensor_names import SCHEMES
from ...core.training.store import drawn_sample, lora_path
from . import panel
from .convert import FacePhotos, LoraModel, image_tensor, lora_file, lora_model, photos_of, pictures
from .folders import says_no_server_paths, without_server_paths
from .plot import score_plot

AUTOMATIC = "automatic"
"""The option for the naming scheme that LoRAs of the family are saved in by default."""


class SaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRASave",
            display_name="Save Face LoRA",
            category="FaceLoRA",
            description="Saves a LoRA in ComfyUI's output/loras folder, with metadata and hashes. It can also convert "
            "the names of its tensors for other programs.",
            search_aliases=["export lora", "convert lora"],
            is_output_node=True,
            inputs=[
                LoraModel.Input(
                    "lora", tooltip="The LoRA to save, from Train Face LoRA, Inspect LoRA or ComfyUI's Train LoRA."
                ),
                io.String.Input(
                    "name",
                    default="lora",
                    tooltip="File name, or FOLDER/NAME. A number is added, so nothing is overwritten.",
                ),
                io.Combo.Input(
                    "scheme",
                    options=[AUTOMATIC, *SCHEMES],
                    tooltip="How tensors in the file are named. 'automatic' (default) uses the names that most programs "
                    "load for this base model. Choose 'kohya', 'diffusers' or 'comfy' if a program requires them.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    advanced=True,
                    tooltip="Number format of the tensors. fp16 (default) is the usual choice for sharing. fp32 files "
                    "are twice as large.",
                ),
                io.Boolean.Input(
                    "preview",
                    default=False,
                    optional=True,
                    tooltip="Also save the last training sample as NAME.preview.png, which LoRA managers show. Off by "
                    "default: it is a picture of the person, so ask for their consent.",
                ),
                io.Boolean.Input(
                    "sidecars",
                    default=False,
                    optional=True,
                    tooltip="Also save the files in which A1111, Forge, InvokeAI, LoRA Manager and Stability Matrix look "
                    "for the trigger word and description. With preview on, this includes NAME.png. Off by default.",
                    advanced=True,
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="The name of the saved file.")],
        )

    @classmethod
    @says_no_server_paths
    def execute(cls, lora, name, scheme, precision, preview=False, sidecars=False) -> io.NodeOutput:
        prefix, file = f"loras/{lora_path(name)}", lora_file(lora)
        converted, _ = convert_lora(file, file.table.scheme if scheme == AUTOMATIC else scheme)
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(
            prefix, folder_paths.get_output_directory()
        )
        path = Path(folder) / f"{stem}_{counter:05}_.safetensors"
        converted.save(path, PRECISIONS[precision])
        relative = str(Path(subfolder).relative_to("loras") / path.name)
        text = f"saved: output/loras/{relative}"
        if preview:
            text += f"\n{_write_preview(file, path)}"
        if sidecars:
            picture = path.with_suffix(".preview.png")
            written = write_sidecars(path, picture if picture.exists() else None)
            text += f"\nsidecars: {', '.join(one.name for one in written)}"
        return io.NodeOutput(relative, ui=ui.PreviewText(text))


def _write_preview(lora: LoraFile, path: Path) -> str:
    """Save the LoRA's sample beside the file at `path`, if it has one. Return a sentence about the result."""
    sample = drawn_sample(lora)
    if sample is None:
        return "no preview: the cache folder doesn't contain a sample from training this LoRA"
    picture = path.with_suffix(".preview.png")
    write_file(picture, partial(sample.save, format="PNG"))
    return f"preview: {picture.name}"


class InspectLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRAInspect",
            display_name="Inspect LoRA",
            category="FaceLoRA",
            description="Shows what a LoRA file contains: model family, rank, trigger words, training settings and "
            "hashes. It also lists the keys that ComfyUI would not load.",
            search_aliases=["lora info", "lora metadata"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="The LoRA file to inspect, from the loras folders.",
                )
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="The report as text."),
                io.String.Output(display_name="json", tooltip="The report as JSON, for scripts."),
                LoraModel.Output(display_name="lora", tooltip="The LoRA itself, for Save Face LoRA or Apply LoRA."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str) -> str:
        state = Path(folder_paths.get_full_path_or_raise("loras", lora_name)).stat()
        return f"{state.st_size} {state.st_mtime_ns}"

    @classmethod
    @says_no_server_paths
    def execute(cls, lora_name) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        found = inspect_lora(path)
        report = format_inspection(found)
        lora = lora_model(LoraFile.read(path))
        return io.NodeOutput(report, json.dumps(found, indent=1), lora, ui=ui.PreviewText(report))


def add_routes() -> None:
    """Add GET /facelora/lora?name=NAME, which returns the report of Inspect LoRA on a file in the loras folders."""

    @PromptServer.instance.routes.get("/facelora/lora")
    async def lora(request: web.Request) -> web.Response:
        name = request.query.get("name", "")
        if name not in folder_paths.get_filename_list("loras"):
            return web.Response(
                text=f"{name}: the loras folder doesn't contain this file. Press R to refresh the list", status=404
            )
        try:
            found = await asyncio.to_thread(inspect_lora, folder_paths.get_full_path_or_raise("loras", name))
        except FaceLoraError as problem:
            return web.Response(text=without_server_paths(str(problem)), status=422)
        return web.Response(text=format_inspection(found))


class LikenessScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRALikeness",
            display_name="Likeness Score",
            category="FaceLoRA",
            description="Measures how much the faces in pictures look like the person in the reference photos, with a "
            "face-recognition network. It sorts the pictures by likeness.",
            search_aliases=["face similarity", "face score", "rank images"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to measure."),
                io.MultiType.Input(
                    "reference",
                    [FacePhotos, io.Image],
                    tooltip="Photos of the person. Photos that were not used for training give the fairest result.",
                ),
                io.Boolean.Input(
                    "required", default=True, optional=True, advanced=True,
                    tooltip="On (default): the node stops with an error if the face networks are missing or the "
                    "reference shows no face. Off: it passes the pictures on unsorted instead.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The pictures, highest likeness first."),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="The likeness of each picture, in the same order. 0.55 or more is usually the same person, "
                    "below 0.40 usually someone else. -1 means that no face was found.",
                ),
                io.Image.Output(
                    display_name="sheet",
                    tooltip="The pictures in this order with their likeness, as one image.",
                ),
                io.Image.Output(
                    display_name="plot",
                    tooltip="A chart of the likeness of each picture, with lines at 0.55 and 0.40.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    @says_no_server_paths
    def execute(cls, images, reference, required=(True,)) -> io.NodeOutput:
        judged, title = [image for batch in images for image in pictures(batch)], "likeness"
        try:
            found = Reference.on([photo.image(shorter_side=640) for photo in photos_of(reference)]).likeness(judged)
        except (MissingPackage, BadPhoto) as problem:
            if required[0]:
                raise
            found, title = [None] * len(judged), f"not compared: {problem}"
        scores = [-1.0 if score is None else score for score in found]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        panel.scored([scores[index] for index in order])
        labels = [f"{scores[index]:.2f}" if scores[index] > -1 else "no face" for index in order]
        sheet = contact_sheet([(title, [judged[index] for index in order])], tile=256, labels=[labels])
        return io.NodeOutput(
            [image_tensor(judged[index]) for index in order],
            [scores[index] for index in order],
            image_tensor(sheet),
            image_tensor(score_plot([scores[index] for index in order], limits=(SAME_PERSON, SOMEONE_ELSE))),
            ui=ui.PreviewImage(image_tensor(sheet), cls=cls),
        )


class ContactSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRAContactSheet",
            display_name="Contact Sheet",
            category="FaceLoRA",
            description="Arranges pictures on one sheet, with a label below each.",
            search_aliases=["grid", "image grid", "collage"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to arrange. They can have different sizes."),
                io.Int.Input("columns", default=4, min=1, max=50, tooltip="Number of pictures per row."),
                io.Int.Input(
                    "height", default=256, min=32, max=2048, tooltip="Height of each picture on the sheet, in pixels."
                ),
                io.String.Input("title", default="", tooltip="Title above the sheet. If empty, there is no title."),
                io.String.Input(
                    "labels", optional=True, force_input=True, tooltip="One label for each picture, in the same order."
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The sheet as one image.")],
        )

    @classmethod
    @says_no_server_paths
    def execute(cls, images, columns, height, title, labels=None) -> io.NodeOutput:
        shown = [image for batch in images for image in pictures(batch)]
        texts = [str(label) for label in labels or ()]
        rows = [("", shown[start : start + columns[0]]) for start in range(0, len(shown), columns[0])]
        split = [texts[start : start + columns[0]] for start in range(0, len(shown), columns[0])]
        sheet = contact_sheet(rows, tile=height[0], labels=split if texts else None, title=title[0])
        return io.NodeOutput(image_tensor(sheet))
