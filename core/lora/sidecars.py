"""Write files beside a LoRA for programs that read its words and picture from there. docs/formats.md lists who reads which."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadFile
from ..photos.agreement import NOTE
from ..progress import OnProgress, silent, steps
from ..storage.drawn import read_mark, save_png
from ..storage.files import read_json, write_text
from ..tensor_names import NAME_TABLES
from .hashes import chunks, file_hashes
from .metadata import opened_picture
from .names import LoraHeader
from .stated import PHRASE_KEY, trigger_words

PICTURE_SIDE = 768
"""The longest side of a picture beside a LoRA in pixels."""
_TEXTS = (".json", ".metadata.json", ".cm-info.json")
_PICTURES = (".png", ".preview.png")
"""InvokeAI only reads the first, Stability Matrix the second. All others accept either."""
SIDECARS = (*_TEXTS, *_PICTURES, NOTE)
"""The endings of the files beside a LoRA, instead of its own. The note of the agreement is written with the LoRA."""
_MODELS = (".safetensors", ".sft", ".gguf", ".ckpt", ".pt", ".pt2", ".pth", ".bin", ".pkl")
"""The endings of models, whose sidecars have the same names."""


def sidecars_of(path: Path) -> list[Path]:
    """Return the files beside a LoRA that belong to it; none if they may belong to another model of that name."""
    is_alone = not any(os.path.lexists(path.with_suffix(one)) for one in _MODELS if one != path.suffix)
    return [file for file in map(path.with_suffix, SIDECARS) if is_alone and file.is_file()]


def taken_by(path: Path) -> Path | None:
    """Return the first model or sidecar with the name of a LoRA that is to be written to `path`; None if the name is free."""
    return next((file for file in map(path.with_suffix, (*_MODELS, *SIDECARS)) if os.path.lexists(file)), None)


def write_sidecars(
    path: str | os.PathLike[str],
    picture: str | os.PathLike[str] | None = None,
    *,
    on_progress: OnProgress = silent,
) -> list[Path]:
    """Write a LoRA's metadata to the files beside it that other programs read, and return their paths.

    An existing file is kept, unless it was written here for an older LoRA of that name and nobody has edited it.

    `picture` shows the person, so no picture is written unless you give one. It is saved as PNG with sides of at most
    PICTURE_SIDE pixels. Of its metadata, only the mark of a drawn picture is kept. Raises BadFile when a file cannot be read or
    written, UnknownFamily when it is not a LoRA.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise BadFile(
            f"{path}: the name must end in .safetensors, so that other programs find the files beside the LoRA"
        )
    lora = LoraHeader.read(path)
    hashes = file_hashes(path, steps(on_progress, chunks(path)))
    written = []
    for suffix, values in _texts(lora, path, hashes).items():
        beside, marked = path.with_suffix(suffix), values | {_MARK: _digest_of(values)}
        if not os.path.lexists(beside) or ((before := _unedited(beside)) and before != marked):
            write_text(beside, json.dumps(marked, indent=2, ensure_ascii=False) + "\n")
            written.append(beside)
    if picture is not None:
        image = opened_picture(picture, PICTURE_SIDE)
        for beside in map(path.with_suffix, _PICTURES):
            if not os.path.lexists(beside):
                save_png(beside, image, mark=read_mark(picture), is_copy=True)
                written.append(beside)
    return written


_MARK = "facelora"
"""The key of the digest of all other values. It shows whether a file was written here and has not been edited."""


def _digest_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _unedited(path: Path) -> dict[str, Any] | None:
    """Return the values of an unedited file from `write_sidecars`; None for any other file."""
    try:
        values = read_json(path)
    except BadFile:
        return None
    others = {key: value for key, value in values.items() if key != _MARK} if isinstance(values, dict) else {}
    return values if others and values.get(_MARK) == _digest_of(others) else None


def _texts(lora: LoraHeader, path: Path, hashes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Return the values for each program's file, by the ending of its name."""
    metadata = lora.metadata
    phrase = metadata.get(PHRASE_KEY) or next(iter(trigger_words(metadata)), "")
    title = metadata.get("modelspec.title") or path.stem
    description = metadata.get("modelspec.description", "")
    tags = [tag.strip() for tag in metadata.get("modelspec.tags", "").split(",") if tag.strip()]
    listings = lora.listings
    base, words = listings[0].civitai if len(listings) == 1 else "Other", [phrase] if phrase else []
    status = path.stat()
    # For A1111, Forge, SD.Next, InvokeAI and SwarmUI. Only SD.Next reads the last two values.
    a1111 = {
        "description": description,
        "sd version": NAME_TABLES[lora.family].a1111_version if lora.identity.models else "Unknown",
        "activation text": phrase,
        "notes": metadata.get("modelspec.usage_hint", ""),
        "tags": tags,
        "modelVersions": [{"trainedWords": words}],
    }
    lora_manager = {
        "file_name": path.stem,
        "model_name": title,
        "file_path": "",  # The program fills this in. A path from here would reveal this computer's folders.
        "size": status.st_size,
        "modified": status.st_mtime,
        "sha256": hashes["sha256"],
        "base_model": base,
        "preview_url": "",
        "from_civitai": False,
        "civitai": {"trainedWords": words},
        "tags": tags,
        "modelDescription": description,
    }
    stability_matrix = {
        "ModelName": title,
        "ModelDescription": description,
        "Nsfw": False,
        "Tags": tags,
        "ModelType": "LORA",
        "VersionName": "",
        "BaseModel": base,
        "ImportedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(status.st_mtime)),
        "Hashes": {name: hashes[name.lower()] for name in ("SHA256", "CRC32", "BLAKE3") if name.lower() in hashes},
        "TrainedWords": words,
        "Source": 3,  # "Other" in ConnectedModelSource (Stability Matrix, July 2026). Without it, Civitai is taken for it.
    }
    return dict(zip(_TEXTS, (a1111, lora_manager, stability_matrix), strict=True))
