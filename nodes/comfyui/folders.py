"""Files in ComfyUI's folders: LoRAs under the names that users type, textual-inversion embeddings, and paths in messages.

A LoRA may contain the vectors of its trigger word (pivotal tuning). ComfyUI's prompts use them from a file in the embeddings
folder, by the file's name after `embedding:`.
"""

# pyright: reportMissingImports=false

import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import folder_paths
from aiohttp import web

from ...core.errors import FaceLoraError
from ...core.lora.embeddings import embedding_files, file_word
from ...core.lora.file import LoraFile
from ...core.models.base import Base
from ...core.models.opening import load_base
from ...core.storage.cache_folder import cache_folder
from ...core.storage.files import make_folder

Answer = TypeVar("Answer")


def embedding_name(lora: LoraFile, embedding: LoraFile) -> str:
    """Return the name of the embedding's file, without its ending.

    It contains no spaces, because a prompt's `embedding:NAME` ends at one. It contains a part of the hash, so that other
    vectors do not replace these.
    """
    return file_word(f"{Path(lora.name).stem}-{embedding.model_hash[:8]}")


def write_embedding(path: Path) -> None:
    """Write the embeddings bundled in the LoRA at `path` to the embeddings folder. Raises BadFile when that fails."""
    lora = LoraFile.read(path)
    for embedding in embedding_files(lora).values():
        folder = make_folder(Path(folder_paths.get_folder_paths("embeddings")[0]))
        embedding.save(folder / f"{embedding_name(lora, embedding)}.safetensors", lora.dtype)


def prompt_phrase(lora: LoraFile, phrase: str) -> tuple[str, str]:
    """Return the trigger phrase for ComfyUI's prompts, and a sentence about a missing embedding file, or ""."""
    files = embedding_files(lora)
    if len(files) != 1:
        return phrase, ""
    ((word, embedding),) = files.items()
    name = embedding_name(lora, embedding)
    if name not in {Path(file).stem for file in folder_paths.get_filename_list("embeddings")}:
        return phrase, f"{word} needs its own vectors, but {name}.safetensors is missing from the embeddings folder"
    spelled = re.escape(word).replace("_", r"[\W_]+")  # the word before file_word replaced its other characters
    return re.sub(rf"(?<!\w){spelled}(?!\w)", f"embedding:{name}", phrase), ""


def without_server_paths(text: str) -> str:
    """Return the text with paths that start at their folder, such as `input` or `loras`, so that server paths stay private."""
    for folder, name in sorted(_known_folders().items(), key=lambda known: len(known[0]), reverse=True):
        text = re.sub(rf"{re.escape(folder)}(?=[\\/\s:;,'\")]|$)", name, text)
    return text


def _known_folders() -> dict[str, str]:
    """Return the folders' names in messages, by path."""
    paths = {
        "input": [folder_paths.get_input_directory()], "output": [folder_paths.get_output_directory()],
        "temp": [folder_paths.get_temp_directory()], "user": [folder_paths.get_user_directory()],
        "models": [folder_paths.models_dir], "ComfyUI": [folder_paths.base_path], "the cache folder": [str(cache_folder())],
    } | {kind: folder_paths.get_folder_paths(kind) for kind in folder_paths.folder_names_and_paths}  # fmt: skip
    return {
        form: name for name, folders in paths.items() for path in folders for form in (path, os.path.realpath(path))
    }


def opened(base: str) -> Base | None:
    """Open a base model by its file's name in a loader; None if the file is missing or its family is unknown."""
    for kind in ("checkpoints", "diffusion_models"):
        if base in folder_paths.get_filename_list(kind):
            with suppress(FaceLoraError):
                return load_base(folder_paths.get_full_path_or_raise(kind, base))
    return None


def refusal(problem: Exception, status: int = 200) -> web.Response:
    """Return the answer that a request gets for an error. Browsers report a status other than 200 as a fault of the page."""
    return web.json_response({"error": without_server_paths(str(problem))}, status=status)


def says_no_server_paths(execute: Callable[..., Answer]) -> Callable[..., Answer]:
    """Wrap a node's `execute`, or another of its methods, so that its errors hide server paths."""

    @wraps(execute)
    def wrapped(*arguments: Any, **named: Any) -> Answer:
        try:
            return execute(*arguments, **named)
        except FaceLoraError as problem:
            problem.args = (without_server_paths(str(problem)),)
            raise

    return wrapped
