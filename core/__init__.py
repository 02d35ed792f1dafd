"""The library for scripts: `train`, `load_base`, `LoraFile`, `apply`, `generate`, and the steps that these consist of.

from core import train

lora = train("photos", "sd15.safetensors", output="me.safetensors")

Its rooms, `lora`, `photos`, `pictures`, `training`, `studio` and others, have more: `core.lora.merge_loras`. In an installed
package, `facelora` offers all of this, as `facelora.train` and `facelora.lora.merge_loras`.

Importing it loads nothing else, not even torch; each name is loaded when it is used.
"""

from typing import TYPE_CHECKING

from .lazy_names import lazy_names

if TYPE_CHECKING:
    from . import demo as demo
    from . import doctor as doctor
    from . import faces as faces
    from . import lora as lora
    from . import models as models
    from . import photos as photos
    from . import pictures as pictures
    from . import storage as storage
    from . import studio as studio
    from . import tensor_names as tensor_names
    from . import training as training
    from .config import TrainConfig as TrainConfig
    from .errors import FaceLoraError as FaceLoraError
    from .lora import LoraFile as LoraFile
    from .lora import LoraModule as LoraModule
    from .lora.apply import apply as apply
    from .models import Base as Base
    from .models import load_base as load_base
    from .photos import Photo as Photo
    from .photos import prepare as prepare
    from .photos import read_photos as read_photos
    from .pictures import contact_sheet as contact_sheet
    from .pictures.generate import GenerateConfig as GenerateConfig
    from .pictures.generate import Job as Job
    from .pictures.generate import PictureJob as PictureJob
    from .pictures.generate import generate as generate
    from .storage import clear_cache as clear_cache
    from .training import Callbacks as Callbacks
    from .training import StepReport as StepReport
    from .training import recipe_config as recipe_config
    from .training import train as train
    from .training import train_lora as train_lora
    from .training.encode import encode as encode
    from .version import __version__ as __version__
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
