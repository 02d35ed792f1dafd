"""Apply LoRA."""

# pyright: reportMissingImports=false

from pathlib import Path

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..core.errors import BadFile
from ..core.lora_file import LoraFile
from ..core.lora_inspect import trigger_words
from .convert import LoraModel, loadable, lora_file
from .panel import show_text

CONNECTED = "(the connected LoRA)"


class ApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRAApply",
            display_name="Apply LoRA",
            category="FaceLoRA",
            description="Puts a LoRA on MODEL and CLIP, in whatever naming scheme its file is. A LoRA that does not fit "
            "is an error here, not a line in the log.",
            search_aliases=["lora loader", "load lora", "use lora"],
            inputs=[
                io.Model.Input("model", tooltip="The model that draws the pictures."),
                io.Combo.Input(
                    "lora_name",
                    options=[CONNECTED, *folder_paths.get_filename_list("loras")],
                    tooltip="A file of the loras folders; not used when a LoRA is connected.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=0.8, min=-10.0, max=10.0, step=0.05,
                    tooltip="How much of the LoRA goes onto MODEL; 1 is what was trained, less leaves the style more room.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=0.8, min=-10.0, max=10.0, step=0.05,
                    tooltip="The same for CLIP, if the LoRA has a part for it and CLIP is connected.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoder, for LoRAs that change it."),
                LoraModel.Input("lora", optional=True, tooltip="A LoRA from Train Face LoRA or from a loader."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="MODEL with the LoRA on it."),
                io.Clip.Output(display_name="clip", tooltip="CLIP with the LoRA on it; nothing if none was connected."),
                io.String.Output(
                    display_name="trigger_phrase",
                    tooltip="The words that call the person, from the LoRA's metadata, e.g. 'sks person'.",
                ),
                io.String.Output(display_name="prompt", tooltip="'a photo of' the trigger phrase, to begin a prompt with."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> str:
        path = _path(lora_name) if lora_name and lora_name != CONNECTED else None
        if path is None:
            return ""
        state = path.stat()
        return f"{state.st_size} {state.st_mtime_ns}"

    @classmethod
    def execute(cls, model, lora_name, strength_model, strength_clip, clip=None, lora=None) -> io.NodeOutput:
        if lora is not None:
            found = lora_file(lora)
        elif lora_name == CONNECTED:
            raise BadFile("no LoRA: connect one, or choose a file in lora_name")
        else:
            found = LoraFile.read(_path(lora_name))
        tensors = loadable(found, model, clip)
        new_model, new_clip = comfy.sd.load_lora_for_models(model, clip, tensors, strength_model, strength_clip)
        phrase = next(iter(trigger_words(found.metadata)), "")
        show_text(cls, summary(found, phrase))
        return io.NodeOutput(new_model, new_clip, phrase, f"a photo of {phrase}" if phrase else "")


def summary(lora: LoraFile, phrase: str) -> str:
    """What the node shows of a LoRA."""
    ranks = sorted({entry.rank for entry in lora.entries if entry.rank is not None})
    rank = f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    base = lora.metadata.get("ss_sd_model_name") or "an unknown base"
    return f"{Path(lora.name).name}: {lora.family}{rank}, made on {base}\ntrigger: {phrase or 'not stated'}"


def _path(name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise("loras", name))
