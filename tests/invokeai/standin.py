"""A stand-in for as much of InvokeAI as the nodes use, so that they can be tested without it.

test_standin.py holds its names, parameters and values against the real one.
"""

import json
import sys
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

ROOT = Path(__file__).resolve().parents[2]
REQUIRED: Any = object()


@dataclass(frozen=True)
class Field:
    default: Any
    options: Mapping[str, Any]


def InputField(
    default: Any = REQUIRED, *, description: str, title: str = "", ge: float | None = None, le: float | None = None,
    input: Any = None, ui_component: Any = None, ui_choice_labels: Mapping[str, str] | None = None,
    ui_model_base: Any = None, ui_model_type: Any = None,
) -> Any:  # fmt: skip
    options = {"description": description, "title": title, "ge": ge, "le": le, "ui_choice_labels": ui_choice_labels}
    return Field(default, options | {"ui_model_base": ui_model_base, "ui_model_type": ui_model_type})


def OutputField(*, description: str, title: str = "") -> Any:
    return Field(REQUIRED, {"description": description, "title": title})


class _WithFields:
    def __init__(self, **values: Any):
        for name, one in fields_of(type(self)).items():
            setattr(self, name, values.pop(name) if name in values else one.default)
            assert getattr(self, name) is not REQUIRED, f"{name} is missing"
        assert not values, f"no such fields: {values}"


class BaseInvocation(_WithFields):
    pass


class BaseInvocationOutput(_WithFields):
    pass


class WithBoard:
    board: Any = Field(None, {"description": "The board of the pictures."})


def fields_of(kind: type) -> dict[str, Field]:
    """The fields of a node or of an output, by name."""
    parts = [vars(one) for one in reversed(kind.__mro__)]
    return {name: value for part in parts for name, value in part.items() if isinstance(value, Field)}


NODES: dict[str, Any] = {}
"""The registered nodes by type; each has its title and version."""


def invocation(
    invocation_type: str, *, title: str, tags: list[str], category: str, version: str, use_cache: bool
) -> Any:
    def register(kind: Any) -> Any:
        assert tags and category == "FaceLoRA" and not use_cache
        kind.title, kind.version = title, version
        NODES[invocation_type] = kind
        return kind

    return register


def invocation_output(output_type: str) -> Any:
    return lambda kind: kind


class BaseModelType(Enum):
    StableDiffusion1 = "sd-1"
    StableDiffusionXL = "sdxl"
    Flux = "flux"


class ModelType(Enum):
    Main = "main"
    LoRA = "lora"


class Input(Enum):
    Connection = "connection"
    Direct = "direct"


class UIComponent(Enum):
    Textarea = "textarea"


@dataclass(frozen=True)
class ImageField:
    image_name: str


@dataclass(frozen=True)
class BoardField:
    board_id: str


@dataclass(frozen=True)
class MetadataField:
    root: Any


@dataclass(frozen=True)
class ModelIdentifierField:
    key: str
    hash: str = ""
    name: str = ""
    base: Any = None
    type: Any = None

    @classmethod
    def from_config(cls, config: Any) -> "ModelIdentifierField":
        return cls(config.key, "", config.name, config.base, config.type)

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        return asdict(self)


@dataclass
class ModelRecordChanges:
    name: str = ""
    description: str = ""
    trigger_phrases: set[str] | None = None


class ImageRecordNotFoundException(Exception):
    pass


class CanceledException(Exception):
    pass


class TorchDevice:
    @classmethod
    def choose_torch_device(cls) -> torch.device:
        return torch.device("cpu")


class InvocationContext:
    """What a node is given: pictures and models in a folder, and what was shown and registered so far."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shown: list[tuple[str, float | None, Any]] = []
        self.cancel_at = ""
        """The beginning of a message after which the node is cancelled."""
        self.saved: dict[str, Any] = {}
        self.covers: dict[str, Any] = {}
        self.configs: dict[str, Any] = {}
        self.on_boards: dict[str, list[str]] = {}
        self.images = SimpleNamespace(get_path=self._path, get_pil=self._pil, save=self._save)
        self.boards = SimpleNamespace(get_all_image_names_for_board=lambda board_id: self.on_boards[board_id])
        self.models = SimpleNamespace(
            get_config=lambda identifier: self.configs[identifier.key],
            get_absolute_path=lambda config_or_path: folder / config_or_path.path,
            search_by_path=lambda path: [one for one in self.configs.values() if one.path == str(path)],
            make_room_in_vram=lambda vram_bytes_needed: 0,
        )
        self.config = SimpleNamespace(get=lambda: SimpleNamespace(models_path=folder, root_path=folder))
        self.util = SimpleNamespace(signal_progress=self._show, is_canceled=self._is_canceled)
        self.logger = SimpleNamespace(info=print, warning=print)
        store = SimpleNamespace(update_model=self._update)
        install = SimpleNamespace(
            heuristic_import=self._register, wait_for_job=lambda job, timeout: job, unregister=self._unregister
        )
        self._services = SimpleNamespace(
            model_manager=SimpleNamespace(install=install, store=store),
            model_images=SimpleNamespace(save=self._cover, get_path=self._cover_path),
        )

    def add_model(self, path: str, base: BaseModelType, type: ModelType, **words: Any) -> ModelIdentifierField:
        config = SimpleNamespace(key=uuid.uuid4().hex, path=path, name=Path(path).stem, base=base, type=type, **words)
        self.configs[config.key] = config
        return ModelIdentifierField.from_config(config)

    def _path(self, image_name: str) -> Path:
        if not (self.folder / image_name).exists():
            raise ImageRecordNotFoundException
        return self.folder / image_name

    def _pil(self, image_name: str, mode: str) -> Image.Image:
        return Image.open(self.folder / image_name).convert(mode)

    def _save(self, image: Image.Image, metadata: Any = None) -> Any:
        name, info = f"{uuid.uuid4().hex}.png", PngInfo()
        if metadata:
            info.add_text("invokeai_metadata", json.dumps(metadata.root, default=str))
        image.info = {}
        image.save(self.folder / name, pnginfo=info)
        self.saved[name] = metadata and metadata.root
        return SimpleNamespace(image_name=name)

    def _show(self, message: str, percentage: float | None, image: Any) -> None:
        self.shown.append((message, percentage, image))

    def _is_canceled(self) -> bool:
        return bool(self.cancel_at) and any(message.startswith(self.cancel_at) for message, *_ in self.shown)

    def _register(self, source: str, *, config: ModelRecordChanges, inplace: bool) -> Any:
        path = str(Path(source).relative_to(self.folder))
        made = self.add_model(path, BaseModelType.StableDiffusion1, ModelType.LoRA)
        return SimpleNamespace(config_out=self.configs[made.key], error=None)

    def _unregister(self, key: str) -> None:
        del self.configs[key]

    def _update(self, key: str, changes: ModelRecordChanges) -> None:
        self.configs[key].trigger_phrases = changes.trigger_phrases

    def _cover(self, image: Image.Image, model_key: str) -> None:
        self.covers[model_key] = image
        image.save(self._cover_path(model_key))

    def _cover_path(self, model_key: str) -> Path:
        return self.folder / f"{model_key}.webp"


MODULES: dict[str, dict[str, Any]] = {
    "invokeai.invocation_api": {
        one.__name__: one
        for one in (
            BaseInvocation, BaseInvocationOutput, BaseModelType, BoardField, ImageField, Input, InputField,
            InvocationContext, MetadataField, ModelIdentifierField, ModelType, OutputField, UIComponent, WithBoard,
            invocation, invocation_output,
        )
    } | {"__version__": "6.14.2"},
    "invokeai.app.invocations.load_custom_nodes": {},
    "invokeai.app.services.image_records.image_records_common": {
        "ImageRecordNotFoundException": ImageRecordNotFoundException
    },
    "invokeai.app.services.model_records.model_records_base": {"ModelRecordChanges": ModelRecordChanges},
    "invokeai.app.services.session_processor.session_processor_common": {"CanceledException": CanceledException},
    "invokeai.backend.util.devices": {"TorchDevice": TorchDevice},
}  # fmt: skip
"""The names of each module, but for the one of InvokeAI's configuration."""


def import_pack(root: Path) -> ModuleType:
    """The pack, imported as InvokeAI does it, whose root folder is `root`."""
    config = {"get_config": lambda: SimpleNamespace(root_path=root)}
    for name, values in (MODULES | {"invokeai.app.services.config.config_default": config}).items():
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            module = sys.modules.setdefault(".".join(parts[:count]), ModuleType(parts[count - 1]))
        vars(module).update(values)  # pyright: ignore[reportPossiblyUnboundVariable]
    spec = spec_from_file_location("ComfyUI-FaceLoRA", ROOT / "__init__.py")
    assert spec and spec.loader
    pack = module_from_spec(spec)
    sys.modules[spec.name] = pack
    spec.loader.exec_module(pack)
    return pack
