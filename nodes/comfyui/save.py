"""The node Save Headshots, which saves pictures as Save Image does, with the mark of drawn pictures."""

# pyright: reportMissingImports=false

import json
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui
from PIL import Image

from ...core.errors import BadConfig, BadFile
from ...core.storage import SafetensorsFile
from ...core.storage.drawn import save_png
from .app.people import digest_of
from .app.state import app
from .convert import picture_key, pictures
from .folders import says_no_server_paths


class SaveHeadshots(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRASaveHeadshots",
            display_name="Save Headshots",
            category="FaceLoRA",
            description="Saves pictures like Save Image, each once, and marks them as drawn by a program (IPTC's digital "
            "source type), which photo galleries and search engines can show. Don't use it for photos.",
            search_aliases=["save image", "ai label", "iptc", "xmp", "metadata"],
            is_output_node=True,
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=[
                io.Image.Input("images", tooltip="The drawn pictures to save."),
                io.String.Input(
                    "filename_prefix",
                    default="headshots/headshot",
                    tooltip="Start of the file names in the output folder. You can use the same placeholders as in Save "
                    "Image, such as %date:yyyy-MM-dd%. %lora_name% becomes the name in lora_name.",
                ),
                io.String.Input(
                    "lora_name",
                    optional=True,
                    force_input=True,
                    tooltip="The file name of the person's LoRA, from Train Face LoRA. It keeps the headshots of people "
                    "with the same name apart.",
                ),
            ],
            outputs=[io.Image.Output(display_name="images", tooltip="The same pictures.")],
        )

    @classmethod
    @says_no_server_paths
    def execute(cls, images, filename_prefix, lora_name="") -> io.NodeOutput:
        graph = {"prompt": cls.hidden.prompt, **(cls.hidden.extra_pnginfo or {})}
        texts = {} if args.disable_metadata else {name: json.dumps(value) for name, value in graph.items()}
        prefix = filename_prefix.replace("%lora_name%", lora_name.removesuffix(".safetensors"))
        place, size = folder_paths.get_output_directory(), (images.shape[2], images.shape[1])
        if not Path(place, prefix).resolve().is_relative_to(Path(place).resolve()):  # ComfyUI tells the server's paths
            raise BadConfig(f"filename_prefix = {filename_prefix!r}: must not lead out of ComfyUI's output folder")
        folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path(prefix, place, *size)
        hashes = _hashes(lora_name) if texts else {}
        saved, likenesses = [], []
        for number, image in enumerate(pictures(images)):
            key = filename_prefix, lora_name, picture_key(image)
            facts = {"lora_name": lora_name, "likeness": app().likenesses.get(picture_key(image))}
            known, digest = app().saved.get(key, (None, ""))
            if known is None or digest_of(_below_output(known)) != digest:
                name = stem.replace("%batch_num%", str(number))
                # ComfyUI counts from 1 each time if the prefix contains %batch_num% or ends with a slash.
                while os.path.exists(path := Path(folder, f"{name}_{counter:05}_.png")):
                    counter += 1
                save_png(path, image, texts and texts | {"facelora": json.dumps(facts)}, hashes=hashes)
                known, counter = ui.SavedResult(path.name, subfolder, io.FolderType.output), counter + 1
                app().saved[key] = known, digest_of(_below_output(known))
            saved.append(known)
            likenesses.append(facts["likeness"])
        facts = {"likeness": likenesses, "lora_name": [lora_name] * len(saved)}
        return io.NodeOutput(images, ui=ui.SavedImages(saved).as_dict() | facts)


def preview(sheet: Image.Image) -> dict[str, Any]:
    """Return what a node shows of a sheet with drawn pictures, which is in the temp folder with their mark."""
    folder = folder_paths.get_temp_directory()
    folder, stem, counter, subfolder, _ = folder_paths.get_save_image_path("facelora", folder, *sheet.size)
    name = f"{stem}_{counter:05}_.png"
    save_png(Path(folder) / name, sheet)
    return ui.SavedImages([ui.SavedResult(name, subfolder, io.FolderType.temp)]).as_dict()


def renamed(old: str, new: str, headshots: Collection[str]) -> None:
    """Note that a LoRA has another name, so that its headshots, by name below the output folder, aren't saved again."""
    for (prefix, lora_name, picture), (saved, digest) in list(app().saved.items()):
        if Path(lora_name).stem == old and _below_output(saved) in headshots:
            name = str(Path(lora_name).with_name(f"{new}.safetensors"))
            app().saved[prefix, name, picture] = saved, digest


def _hashes(lora_name: str) -> dict[str, str]:
    """Return what the signature says of the LoRA, by its short hash as A1111 writes it."""
    path = lora_name and folder_paths.get_full_path("loras", lora_name)
    with suppress(BadFile, KeyError):  # The name may be any text, and the LoRA another program's.
        return {SafetensorsFile.open(path).metadata["sshs_model_hash"][:12]: "LoRA"} if path else {}
    return {}


def _below_output(saved: ui.SavedResult) -> str:
    return f"{saved.subfolder}/{saved.filename}".lstrip("/")
