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
"""The choice of the naming scheme that LoRAs of the family are written in by default."""


class SaveLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRASave",
            display_name="Save Face LoRA",
            category="FaceLoRA",
            description="Writes a LoRA with its metadata and hashes into ComfyUI's output/loras folder.",
            search_aliases=["export lora", "convert lora"],
            is_output_node=True,
            inputs=[
                LoraModel.Input("lora", tooltip="A LoRA from Train Face LoRA, Inspect LoRA or ComfyUI's Train LoRA."),
                io.String.Input(
                    "name", default="lora", tooltip="Name of the file, or FOLDER/NAME; a number is added to it."
                ),
                io.Combo.Input(
                    "scheme",
                    options=[AUTOMATIC, *SCHEMES],
                    tooltip="The names of the tensors in the file. automatic: those that most programs load for this base "
                    "model. kohya, diffusers, comfy: for a program that needs them.",
                ),
                io.Combo.Input(
                    "precision", options=list(PRECISIONS), tooltip="fp16 is what is usually shared.", advanced=True
                ),
                io.Boolean.Input(
                    "preview",
                    default=False,
                    optional=True,
                    tooltip="Also write the last sample of the training beside it, as NAME.preview.png, which LoRA managers "
                    "show. It is a picture of the person: only where they agree.",
                ),
                io.Boolean.Input(
                    "sidecars",
                    default=False,
                    optional=True,
                    tooltip="Also write the files in which A1111, Forge, InvokeAI, LoRA Manager and Stability Matrix look for "
                    "the trigger word and the description. With preview, also NAME.png.",
                    advanced=True,
                ),
            ],
            outputs=[io.String.Output(display_name="lora_name", tooltip="Its name in loaders' lists.")],
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
        text = f"written: output/loras/{relative}"
        if preview:
            text += f"\n{_write_preview(file, path)}"
        if sidecars:
            picture = path.with_suffix(".preview.png")
            written = write_sidecars(path, picture if picture.exists() else None)
            text += f"\nsidecars: {', '.join(one.name for one in written)}"
        return io.NodeOutput(relative, ui=ui.PreviewText(text))


def _write_preview(lora: LoraFile, path: Path) -> str:
    """Writes the LoRA's sample beside the file at `path`, where there is one; a sentence about what was done."""
    sample = drawn_sample(lora)
    if sample is None:
        return "no preview: no sample of its training is in the cache folder"
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
            description="What is in a LoRA file: family, rank, trigger words, training settings, hashes, and what "
            "ComfyUI would not load.",
            search_aliases=["lora info", "lora metadata"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="A file of the loras folders.",
                )
            ],
            outputs=[
                io.String.Output(display_name="report", tooltip="As lines of text."),
                io.String.Output(display_name="json", tooltip="The same for programs."),
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
    """Adds GET /facelora/lora?name=NAME, which answers with the text of Inspect LoRA on a file of the loras folders."""

    @PromptServer.instance.routes.get("/facelora/lora")
    async def lora(request: web.Request) -> web.Response:
        name = request.query.get("name", "")
        if name not in folder_paths.get_filename_list("loras"):
            return web.Response(text=f"{name}: there is no such file in the loras folder", status=404)
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
            description="How much the faces in pictures are those of the person in the reference photos, by a "
            "face-recognition network, and the pictures sorted by it.",
            search_aliases=["face similarity", "face score", "rank images"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to judge."),
                io.MultiType.Input(
                    "reference",
                    [FacePhotos, io.Image],
                    tooltip="Photos of the person, best such as were not trained on.",
                ),
                io.Boolean.Input(
                    "required", default=True, optional=True, advanced=True,
                    tooltip="Off: where nothing can be compared (no face networks, no face in the reference), the pictures go "
                    "on in the order in which they came.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The pictures, most alike first."),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="Cosine to the mean of the reference faces, in the same order: the same person mostly above "
                    "0.55, someone else mostly below 0.40; -1 where no face was found.",
                ),
                io.Image.Output(display_name="sheet", tooltip="The pictures in that order with their scores."),
                io.Image.Output(display_name="plot", tooltip="The scores in that order, beside the two limits."),
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
            description="Pictures side by side on one sheet, with a label below each.",
            search_aliases=["grid", "image grid", "collage"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="Pictures of any sizes."),
                io.Int.Input("columns", default=4, min=1, max=50, tooltip="Pictures in a row."),
                io.Int.Input("height", default=256, min=32, max=2048, tooltip="Height of each, in pixels."),
                io.String.Input("title", default="", tooltip="Stands above the sheet."),
                io.String.Input("labels", optional=True, force_input=True, tooltip="A label for each picture."),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The sheet.")],
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
