"""Train LoRAs from photos: encoding, the training loop, training methods, likeness, and the store of training runs."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .callbacks import Callbacks as Callbacks
    from .callbacks import StepReport as StepReport
    from .callbacks import StopAndKeep as StopAndKeep
    from .encode import EncodedImage as EncodedImage
    from .encode import LatentCache as LatentCache
    from .job import TrainingJob as TrainingJob
    from .job import ready_for as ready_for
    from .likeness import LIKENESS_KEY as LIKENESS_KEY
    from .likeness import Figures as Figures
    from .likeness import Score as Score
    from .loop import train_lora as train_lora
    from .memory_prediction import predicted_memory as predicted_memory
    from .methods import METHODS as METHODS
    from .methods.method import Checkpoint as Checkpoint
    from .recipes import RECIPES as RECIPES
    from .recipes import recipe_config as recipe_config
    from .run_files import RunFiles as RunFiles
    from .store import LoraFolders as LoraFolders
    from .store import OutputFile as OutputFile
    from .store import find_or_train as find_or_train
    from .store import is_trained as is_trained
    from .store import train as train
    from .trained_file import TrainedFile as TrainedFile
    from .training_adapter import TrainingAdapter as TrainingAdapter
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
