"""The nodes Save Face LoRA and Inspect LoRA."""

# pyright: reportMissingImports=false

import asyncio
import json
from pathlib import Path

import folder_paths
from aiohttp import web
from comfy_api.latest import io, ui
from server import PromptServer

from ...core.device import PRECISIONS
from ...core.errors import FaceLoraError
from ...core.lora.convert import convert_lora
from ...core.lora.file import LoraFile
from ...core.lora.inspect import inspect_lora
from ...core.lora.report import format_inspection
from ...core.lora.sidecars import write_sidecars
from ...core.storage.drawn import save_png
from ...core.tensor_names import SCHEMES
from ...core.training.store import lora_path
from ...core.training.trained_file import drawn_sample
from .apply import file_state
from .convert import LoraModel, lora_file, lora_model
from .folders import says_no_server_paths, without_server_paths

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
        picture = path.with_suffix(".preview.png")
        if preview:
            sample = drawn_sample(file)
            if sample is not None:
                save_png(picture, sample)
            missing = "no preview: the cache folder doesn't contain a sample from training this LoRA"
            text += f"\n{missing if sample is None else f'preview: {picture.name}'}"
        if sidecars:
            written = write_sidecars(path, picture if picture.exists() else None)
            text += f"\nsidecars: {', '.join(one.name for one in written)}"
        return io.NodeOutput(relative, ui=ui.PreviewText(text))


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
        return file_state(lora_name)

    @classmethod
    @says_no_server_paths
    def execute(cls, lora_name) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        inspection = inspect_lora(path)
        report = format_inspection(inspection)
        lora = lora_model(LoraFile.read(path))
        return io.NodeOutput(report, json.dumps(inspection, indent=1), lora, ui=ui.PreviewText(report))


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
            inspection = await asyncio.to_thread(inspect_lora, folder_paths.get_full_path_or_raise("loras", name))
        except FaceLoraError as problem:
            return web.Response(text=without_server_paths(str(problem)), status=422)
        return web.Response(text=format_inspection(inspection))
