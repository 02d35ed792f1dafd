"""Options that several commands have. Importing this doesn't load torch."""

from dataclasses import dataclass
from typing import Any

from .options import option
from .values import InputName


@dataclass(frozen=True)
class BaseParts:
    """The additional files of a base model."""

    vae: InputName | None = option("VAE, if the base model's file has only the denoiser", "FILE")
    text_encoder: list[InputName] = option(
        "Text encoder, if the base model's file has none; repeat it for each (FLUX.1: CLIP-L and T5)", "FILE"
    )
    tokenizer: InputName | None = option(
        "Folder with the tokenizer of T5 or Qwen (FLUX.1 and later), from a diffusers folder or ComfyUI's comfy/text_encoders",
        "DIR",
    )


def base_option() -> Any:
    return option("Base model: checkpoint file, diffusers folder, hub id, or demo, the small one of the package")


def device_option() -> Any:
    return option("Device: cpu, cuda, cuda:1, mps, ... (default: the best available)")


def json_option(text: str = "Print JSON") -> Any:
    return option(text)


def overwrite_option() -> Any:
    return option("Replace the output if it exists")


def seed_option() -> Any:
    return option("Seed of the first picture; the next ones count up (default: 1)", default=1)


def style_folder_option() -> Any:
    return option("Folder with your own style packs; may be repeated", "DIR")


def dry_run_option() -> Any:
    return option("Print the work of each part, the time and the memory, then exit")


def face_network_option(default: str | None = "sface") -> Any:
    text = "Face network that tells people apart: sface, dlib, or a file in ArcFace's format (default: sface)"
    return option(text, "NAME|FILE.onnx", default=default)


def judge_option() -> Any:
    return option("Second face network. It only reports likeness, and selects or sorts nothing", "NAME|FILE.onnx")


def training_adapter_option() -> Any:
    return option(
        "LoRA that undoes the distillation of a base model (Turbo, schnell). Used only during training steps", "FILE"
    )


def sidecars_option() -> Any:
    return option("Also write files that tell other programs the LoRA's words")
