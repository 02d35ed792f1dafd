"""What the nodes need of InvokeAI beyond its public `invocation_api`. Only this file knows private names.

Each was seen in version SEEN_IN. Where another version lacks one, the error says which.
"""

# invokeai is importable only inside InvokeAI.
# pyright: reportMissingImports=false

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from invokeai.invocation_api import InvocationContext, MetadataField, ModelIdentifierField, ModelType, __version__
from PIL import Image

from ...core.errors import BadFile, BadPhoto, MissingPackage
from ...core.storage.drawn import save_png, write_picture
from ...core.storage.files import write_file

SEEN_IN = "6.14.2"
_ADVICE = f"these nodes were made for InvokeAI {SEEN_IN}, and this is {__version__}. Update this pack or InvokeAI"

try:
    from invokeai.app.services.config.config_default import get_config
    from invokeai.app.services.image_records.image_records_common import ImageRecordNotFoundException
    from invokeai.app.services.model_records.model_records_base import ModelRecordChanges
    from invokeai.app.services.session_processor.session_processor_common import CanceledException
    from invokeai.backend.util.devices import TorchDevice
except ImportError as problem:
    raise ImportError(f"{problem}; {_ADVICE}") from problem

ALL_MEMORY = 2**60
"""More bytes than any device has, so that every model which is not in use makes room."""
REGISTERING = 300
"""The most seconds that registering a LoRA may take; it reads one small file."""


def root_folder() -> Path:
    """InvokeAI's root folder."""
    return get_config().root_path


def device() -> Any:
    """The torch device that InvokeAI computes on, in this thread."""
    return TorchDevice.choose_torch_device()


def photo_path(context: InvocationContext, name: str) -> Path:
    """Where InvokeAI keeps the photo of that name. Raises BadPhoto if it has been deleted."""
    try:
        return Path(context.images.get_path(name))
    except (ImageRecordNotFoundException, PermissionError):  # Only administrators get the former.
        raise BadPhoto(f"{name}: this photo is not in your gallery any more. Add another one instead") from None


def save_drawn(
    context: InvocationContext, image: Image.Image, metadata: MetadataField, hashes: Mapping[str, str]
) -> str:
    """Save a picture drawn with the models of these `hashes`, and return InvokeAI's name of it.

    InvokeAI writes its own texts and no others, so its file is written again with these texts and the mark of drawn pictures.
    """
    name = context.images.save(image, metadata=metadata).image_name
    path = context.images.get_path(name)
    with Image.open(path) as saved:
        texts = {key: text for key, text in saved.info.items() if isinstance(text, str)}
    save_png(path, image, texts, hashes=hashes)
    return name


def raise_if_cancelled(context: InvocationContext) -> None:
    """Raise InvokeAI's exception for a cancelled node if the user has cancelled it."""
    if context.util.is_canceled():
        raise CanceledException


def make_room(context: InvocationContext) -> None:
    """Moves InvokeAI's models off the GPU. It loads them again when it needs them."""
    context.models.make_room_in_vram(ALL_MEMORY)


def register_lora(
    context: InvocationContext,
    path: Path,
    trigger_phrase: str,
    description: str,
    cover: Image.Image | None,
    is_new: bool,
) -> ModelIdentifierField:
    """The LoRA among InvokeAI's models: the record of that file, or a new one with words and a cover picture.

    A new file gets a new record: that of an earlier file, deleted by hand, has other words and another picture. Raises BadFile
    when InvokeAI does not take the file for a LoRA.
    """
    install, records = _service(context, "model_manager", "install"), _service(context, "model_manager", "store")
    images = _service(context, "model_images")
    models = context.config.get().models_path
    stored = path.relative_to(models) if path.is_relative_to(models) else path  # as InvokeAI writes it into its records
    known = context.models.search_by_path(Path(stored.as_posix()))
    if is_new:
        for record in known:
            install.unregister(record.key)
            Path(images.get_path(record.key)).unlink(missing_ok=True)
    elif known:
        return ModelIdentifierField.from_config(known[0])
    named = ModelRecordChanges(name=path.stem, description=description)
    # A job of its installer: its pages list the new model at once.
    job = install.wait_for_job(install.heuristic_import(str(path), config=named, inplace=True), REGISTERING)
    if job.config_out is None:
        raise BadFile(f"{path.name} is trained, but InvokeAI could not register it: {job.error}")
    if job.config_out.type != ModelType.LoRA:
        raise BadFile(f"{path.name} is trained, but InvokeAI {__version__} does not recognise it as a LoRA")
    if trigger_phrase:  # which the installer does not take
        records.update_model(job.config_out.key, ModelRecordChanges(trigger_phrases={trigger_phrase}))
    if cover:
        images.save(cover, job.config_out.key)
        saved_cover = Path(images.get_path(job.config_out.key))
        with Image.open(saved_cover) as saved:
            small = saved.copy()
        write_file(saved_cover, lambda file: write_picture(file, small, "WEBP"))  # with the mark of drawn pictures
    return ModelIdentifierField.from_config(job.config_out)


def _service(context: InvocationContext, *names: str) -> Any:
    """One of InvokeAI's services. Raises MissingPackage where this version does not have it."""
    service: Any = context._services
    for name in names:
        service = getattr(service, name, None)
    if service is None:
        raise MissingPackage(f"InvokeAI lacks the service {'.'.join(names)}: {_ADVICE}")
    return service
