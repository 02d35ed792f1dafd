"""Options that several commands have. Importing this doesn't load torch."""

from dataclasses import dataclass

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


SPEED_LORA = option(
    "LoRA that makes the base model draw in a few steps, such as SDXL-Lightning's or DMD2's. It is used for pictures only",
    "FILE",
)
BASE = option("Base model: checkpoint file, diffusers folder, hub id, or demo, the small one of the package")
DEVICE = option("Device: cpu, cuda, cuda:1, mps, ... (default: the best available)")
DRAWN_PHOTOS = option(
    "Pictures of the person that a program has drawn, to train on too. They count at most as much as the photos", "DIR"
)
DRY_RUN = option("Print the work of each part, the time and the memory, then exit")
FACE_NETWORK_HELP = "Face network that tells people apart: sface, dlib, or a file in ArcFace's format (default: sface)"
FACE_NETWORK = option(FACE_NETWORK_HELP, "NAME|FILE.onnx", default="sface")
JSON = option("Print JSON")
JUDGE = option("Second face network. It only reports likeness, and selects or sorts nothing", "NAME|FILE.onnx")
OVERWRITE = option("Replace the output if it exists")
SEED = option("Seed of the first picture; the next ones count up (default: 1)", default=1)
SIDECARS = option("Also write files that tell other programs the LoRA's words")
STYLE_FOLDER = option("Folder with your own style packs; may be repeated", "DIR")
TRAINING_ADAPTER = option(
    "LoRA that undoes the distillation of a base model (Turbo, schnell). Used only during training steps", "FILE"
)
