"""A base model in a folder written by diffusers' `save_pretrained`, or on the Hugging Face hub."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import BadFile, UnknownFamily
from ..storage.files import read_json
from ..storage.safetensors_file import SafetensorsFile
from ..storage.stored import LazyTensors, Stored
from . import text
from .families import FAMILIES
from .ldm import current_vae_path
from .spec import UNQUANTISED, Component, FamilySpec

_INDEXES = ("model_index.json", "modular_model_index.json")
"""The files that name a folder's pipeline. The second belongs to pipelines assembled from blocks."""

_COPIES = (".fp16", ".non_ema", ".ema")
"""Parts of the names of files with the same weights in fp16, or with a running average, beside the plain weights."""


class DiffusersFolder(NamedTuple):
    """The content of a folder."""

    family: FamilySpec
    components: dict[str, Component]
    """The networks by part, as in Base."""
    scheduler: dict[str, Any]
    """The config of its scheduler. Empty if it doesn't have one."""
    says_distilled: bool


def is_hub_id(source: str) -> bool:
    """Return whether the text has the form of a hub id, `owner/name`."""
    parts = source.split("/")
    files = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".bin")
    return len(parts) == 2 and all(parts) and not source.lower().endswith(files)


def download(hub_id: str) -> Path:
    """Download a model from the hub, unless it is cached, and return its folder. Raises BadFile when that fails.

    Copies in fp16, and running averages, are only downloaded if a part has no other weights.
    """
    from huggingface_hub import snapshot_download

    # Only these folders, since a repository may also hold the same weights in a single file.
    networks = ("unet", "transformer", "vae", "text_encoder*")
    parts = (*networks, "scheduler", "tokenizer*", "processor")
    files = [f"{part}/*.{ending}" for part in parts for ending in ("json", "safetensors", "txt", "model")]
    wanted = [*_INDEXES, *files]
    try:
        copies = [f"*{word}*" for word in _COPIES]
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, ignore_patterns=copies))
        found = [config.parent for network in networks for config in folder.glob(f"{network}/config.json")]
        if not all(any(network.glob("*.safetensors")) for network in found):
            folder = Path(snapshot_download(hub_id, allow_patterns=wanted))
        return folder
    except Exception as error:  # the hub client raises many kinds of errors, down to those of its HTTP library
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadFile(f"{hub_id}: not found as a file or folder, and not available on the hub: {reason}") from error


def read_folder(folder: Path) -> DiffusersFolder:
    """Read a folder. Only safetensors weights are read.

    Raises BadFile when something is missing or quantised, UnknownFamily for a pipeline or a scheduler that is not supported.
    """
    index_name = next((name for name in _INDEXES if os.path.exists(folder / name)), _INDEXES[0])
    index = _read_config(folder / index_name)
    class_name = index.get("_class_name")
    families = FAMILIES.values()
    family = next((f for f in families if class_name in (f.pipeline_class, *f.other_folders)), None)
    if family is None:
        known = ", ".join(family.pipeline_class for family in families)
        raise UnknownFamily(
            f"{folder.name}: {index_name} names the pipeline {class_name}, which is not supported. Supported: {known}"
        )
    components = {}
    for part in ("denoiser", "vae", *family.text_encoders):
        subfolder = folder / (family.denoiser_folder if part == "denoiser" else part)
        if part in family.optional_encoders and not os.path.exists(subfolder):
            continue
        config = _read_config(subfolder / "config.json")
        if quantisation := config.get("quantization_config"):
            raise BadFile(
                f"{folder.name}: its {subfolder.name} is quantised ({json.dumps(quantisation)[:80]}); {UNQUANTISED}"
            )
        if part.startswith("text_encoder"):
            tokenizer, processor = folder / part.replace("text_encoder", "tokenizer"), folder / "processor"
            # A model that also sees pictures may have its tokenizer in the folder of its processor.
            beside = os.path.exists(processor) and not os.path.exists(tokenizer)
            config["tokenizer"] = str(processor if beside else tokenizer)
        left_out = family.unused if part == "denoiser" else r"$^"
        components[part] = Component(config, _folder_tensors(subfolder, part, left_out))
    scheduler_path = folder / "scheduler" / "scheduler_config.json"
    scheduler = _read_config(scheduler_path) if os.path.exists(scheduler_path) else {}
    name, predicted = str(scheduler.get("_class_name")), scheduler.get("prediction_type", "epsilon")
    on_other_noise = name.startswith(("EDM", "FlowMatch"))  # EDM: Playground v2.5, CosXL
    if family.predicts_noise and (on_other_noise or predicted not in ("epsilon", "v_prediction")):
        raise UnknownFamily(
            f"{folder.name}: its scheduler is {name} with prediction_type {predicted!r}, which is not supported. "
            "Supported: epsilon and v_prediction on the noise of Stable Diffusion"
        )
    return DiffusersFolder(family, components, scheduler, index.get("is_distilled") is True)


def _read_config(path: Path) -> dict[str, Any]:
    """Read a JSON file in a diffusers folder. Raises BadFile when it is missing."""
    if not os.path.exists(path):
        raise BadFile(f"{path.parent.name}: is not a complete diffusers folder. {path.name} is missing")
    config = read_json(path)
    if not isinstance(config, dict):
        raise BadFile(f"{path}: is not a JSON object")
    return config


def _folder_tensors(folder: Path, part: str, left_out: str) -> Mapping[str, Tensor]:
    paths = sorted(folder.glob("*.safetensors"))
    plain = [path for path in paths if not any(word in path.name for word in _COPIES)] or paths
    if not plain:
        others = ", ".join(path.name for path in folder.glob("*.bin")) or "no weights"
        raise BadFile(
            f"{folder.name}: has no .safetensors files ({others}). Pickled weights are not read. Convert them first"
        )
    readers: dict[str, Callable[[], Tensor]] = {}
    for path in _in_index(folder, plain):
        file = SafetensorsFile.open(path)
        for name in file:
            if name.endswith(("position_ids", "logit_scale")) or re.search(left_out, name):
                continue
            readers[current_vae_path(name) if part == "vae" else name] = Stored(file, name)
    return LazyTensors(text.library_tensors(readers) if part.startswith("text_encoder") else readers)


def _in_index(folder: Path, paths: list[Path]) -> list[Path]:
    """Return the files that the folder's index lists, because earlier weights may be left beside them.

    Without an index, or without any file in it, return all. Like transformers, prefer a single file of a text encoder. Raises
    BadFile when only some of the listed files are there.
    """
    if (single := folder / "model.safetensors") in paths:
        return [single]
    for index in folder.glob("*.safetensors.index.json"):
        files = _read_config(index).get("weight_map")
        named = {folder / str(name) for name in files.values()} if isinstance(files, dict) else set()
        if named.isdisjoint(paths):
            continue  # The index of weights that were not downloaded, beside a copy in fp16.
        if missing := sorted(path.name for path in named.difference(paths)):
            raise BadFile(f"{folder.name}: {index.name} lists {missing[0]}, which is missing. Download it again")
        return sorted(named)
    return paths
