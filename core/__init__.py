"""Face LoRAs from a script: `train`, `load_base`, `LoraFile`, `apply`, `generate` and the steps they are made of.

from core import TrainConfig, train

lora = train("photos", "sd15.safetensors", TrainConfig(trigger_word="sks", steps=800), output="me.safetensors")
"""

from .config import TrainConfig
from .errors import FaceLoraError
from .lora.apply import apply
from .lora.file import LoraFile
from .lora.modules import LoraModule
from .models.base import Base, load_base
from .photos import Photo, prepare, read_photos
from .pictures.generate import GenerateConfig, Job, generate
from .pictures.sheet import contact_sheet
from .storage.cache_folder import clear_cache
from .training.callbacks import Callbacks, StepReport
from .training.encode import encode
from .training.job import train
from .training.loop import train_lora

__all__ = [
    "Base",
    "Callbacks",
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
