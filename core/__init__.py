"""Face LoRAs from a script: `train`, `load_base`, `LoraFile`, `apply`, `generate` and the steps they are made of.

from core import TrainConfig, train

lora = train("photos", "sd15.safetensors", TrainConfig(trigger_word="sks", steps=800), output="me.safetensors")
"""

from .apply import apply
from .base import Base, load_base
from .cache import encode
from .cache_folder import clear_cache
from .config import TrainConfig
from .errors import FaceLoraError
from .generate import GenerateConfig, Job, generate
from .lora_file import LoraFile
from .lora_modules import LoraModule
from .photos import Photo, prepare, read_photos
from .photos_to_lora import train
from .sheet import contact_sheet
from .training import StepReport, train_lora

__all__ = [
    "Base",
    "FaceLoraError",
    "GenerateConfig",
    "Job",
    "LoraFile",
    "LoraModule",
    "Photo",
    "StepReport",
    "TrainConfig",
    "apply",
    "clear_cache",
    "contact_sheet",
    "encode",
    "generate",
    "load_base",
    "prepare",
    "read_photos",
    "train",
    "train_lora",
]
