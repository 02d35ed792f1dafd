"""The node Train Face LoRA, which trains a LoRA on photos of a person, or finds the one trained before."""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false

import torch
from invokeai.invocation_api import (
    BaseInvocationOutput,
    ImageField,
    InputField,
    InvocationContext,
    ModelIdentifierField,
    OutputField,
    UIComponent,
    invocation,
    invocation_output,
)

from ...core.config import RecipeName
from ...core.device import within_free_memory
from ...core.errors import BadPhoto
from ...core.lora.file import LoraFile
from ...core.lora.stated import trigger_words
from ...core.photos.ready import SWITCH
from ...core.threads import within_quota
from ...core.training.job import TrainingJob
from ...core.training.recipes import recipes_of
from ...core.training.store import LoraFolders, check_makes_lora, find_or_train, lora_path
from ...core.training.trained_file import TrainedFile
from ..settings import NodeSettings
from . import services
from .fields import setting_field
from .models import MAIN_MODEL, base_of
from .photos import PhotosInvocation, read_named
from .progress import NodeProgress

FOLDER = "facelora"
"""The folder of trained LoRAs, in InvokeAI's folder of models."""


@invocation_output("facelora_train_output")
class TrainFaceLoraOutput(BaseInvocationOutput):
    lora: ModelIdentifierField = OutputField(description="The LoRA, for Apply LoRA or Headshots.", title="LoRA")
    model: ModelIdentifierField = OutputField(description="The base model, for Headshots.")
    trigger_phrase: str = OutputField(description="The words for the person in prompts.")
    photo_names: list[str] = OutputField(description="The photos, for Headshots or Likeness.")
    report: str = OutputField(description="What was trained, its likeness, and notes about the photos.")


@invocation(
    "facelora_train",
    title="Train Face LoRA",
    tags=["facelora", "lora", "train", "dreambooth", "face"],
    category="FaceLoRA",
    version="1.1.0",
    use_cache=False,
)
class TrainFaceLoraInvocation(PhotosInvocation):
    """Train a LoRA of one person, and add it to the models. If you cancel and queue it again, training continues.

    Train only people who have agreed to it.
    """

    model: ModelIdentifierField = InputField(description="The base model to train on: SD1.5 or SDXL.", **MAIN_MODEL)
    name: str = InputField(
        default="my-face", description="Name of the LoRA. A number is added if another LoRA already has this name."
    )
    trigger_word: str = setting_field(NodeSettings, "trigger_word")
    class_word: str = setting_field(NodeSettings, "class_word")
    recipe: RecipeName = setting_field(
        NodeSettings, "recipe",
        "Preset for the training run: fast for a first try, balanced for most people, best for the longest training.",
    )  # fmt: skip
    steps: int = setting_field(NodeSettings, "steps")
    training_seed: int = setting_field(NodeSettings, "training_seed")
    check_photos: bool = InputField(
        default=True,
        description="Leave out photos that the photo check rejects. If off, all photos are used.",
    )
    cover: bool = InputField(
        default=True,
        description="Use the last sample, a picture of the person, as the cover of the LoRA in the model list.",
    )
    settings: str = setting_field(
        NodeSettings, "settings",
        "Any other training setting as lines of TOML, such as rank = 32. Settings here override the recipe.",
        ui_component=UIComponent.Textarea,
    )  # fmt: skip
    drawn_photos: list[ImageField] | None = InputField(
        default=None,
        description="Pictures of the person that a model has drawn, to train on too. They count at most as much as the photos.",
    )

    def invoke(self, context: InvocationContext) -> TrainFaceLoraOutput:
        progress = NodeProgress(context)
        photos = self.read_photos(context, progress)
        drawn = read_named(context, [picture.image_name for picture in self.drawn_photos or ()], progress)
        base = base_of(context, self.model)
        place = LoraFolders(lora_path(self.name), [context.config.get().models_path / FOLDER])
        inputs = NodeSettings(
            self.trigger_word, self.class_word, self.recipe, steps=self.steps, training_seed=self.training_seed,
            settings=self.settings,
        )  # fmt: skip
        recipes = recipes_of(base, progress.warning)
        config = inputs.config(recipes, len(photos), {"check_photos": self.check_photos}, progress.warning)
        check_makes_lora(config)
        progress.show("checking the photos")
        try:
            job = TrainingJob.of(photos, base, config, drawn_photos=drawn, on_warning=progress.warning)
        except BadPhoto as error:
            raise BadPhoto(str(error).replace(SWITCH, "turn off Check Photos")) from None
        services.make_room(context)
        made = _train(job, place, progress)
        metadata, samples = LoraFile.read(made.path).metadata, made.run.samples()
        phrase = next(iter(trigger_words(metadata)), "")
        cover = samples[max(samples)][0] if self.cover and samples else None
        described = metadata.get("modelspec.description") or f"A person. Words for the person in prompts: {phrase}"
        lora = services.register_lora(context, made.path, phrase, described, cover, is_new=not made.found)
        return TrainFaceLoraOutput(
            lora=lora,
            model=self.model,
            trigger_phrase=phrase,
            photo_names=self.image_names(context),
            report="\n".join([_summary(made), *progress.notes]),
        )


def _train(job: TrainingJob, place: LoraFolders, progress: NodeProgress) -> TrainedFile:
    device = services.device()
    with torch.inference_mode(False), torch.enable_grad(), within_quota(), within_free_memory(device):
        return find_or_train(job, place, device=device, on_point=progress.point, callbacks=progress.callbacks())


def _summary(made: TrainedFile) -> str:
    """Return one line about the LoRA: its name, whether it already existed, and its best likeness if measured."""
    likenesses = [likeness for _, likeness in made.likenesses()]
    best = f", likeness {max(likenesses):.2f}" if likenesses else ""
    return f"{made.path.stem}: {'already trained' if made.found else 'trained'}{best}"
