"""InvokeAI's models as values of `core`: the base model that a node is given, and a LoRA with its words."""

# pyright: reportMissingImports=false

from invokeai.invocation_api import BaseModelType, InvocationContext, ModelIdentifierField, ModelType

from ...core.errors import BadConfig
from ...core.lora.file import LoraFile
from ...core.lora.stated import trigger_words
from ...core.models.base import Base
from ...core.models.opening import load_base

TRAINED = {BaseModelType.StableDiffusion1: "SD1.5", BaseModelType.StableDiffusionXL: "SDXL"}
"""The base models whose InvokeAI files hold all parts, with their names for users."""
MAIN_MODEL = {"ui_model_base": list(TRAINED), "ui_model_type": ModelType.Main}
"""The options of a field for a base model."""
LORA_MODEL = {"ui_model_base": list(TRAINED), "ui_model_type": ModelType.LoRA}
"""The options of a field for a LoRA."""


def base_of(context: InvocationContext, model: ModelIdentifierField) -> Base:
    """Return the base model. Raises BadConfig for an unsupported kind of model, and the errors of `load_base`."""
    config = context.models.get_config(model)
    if config.type != ModelType.Main or config.base not in TRAINED:
        kind = f"{config.base.value} {config.type.value}"
        wanted = f"Choose a main model for {' or '.join(TRAINED.values())}"
        raise BadConfig(f"model: {config.name} is a {kind}. {wanted}")
    return load_base(context.models.get_absolute_path(config))


def lora_of(context: InvocationContext, lora: ModelIdentifierField) -> tuple[LoraFile, str]:
    """Return the LoRA and its trigger phrase: from the file, else from the model's record in InvokeAI, else ""."""
    config = context.models.get_config(lora)
    file = LoraFile.read(context.models.get_absolute_path(config))
    words = [*trigger_words(file.metadata), *sorted(getattr(config, "trigger_phrases", None) or ())]
    return file, next(iter(words), "")
