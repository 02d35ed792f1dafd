"""Files in ComfyUI's folders: the names that users type for LoRAs, and the vectors of new words that prompts find by name.

A LoRA may bring along the vectors of its trigger word (pivotal tuning). ComfyUI's prompts find them in a file of the
embeddings folder, by the file's name after `embedding:`.
"""

# pyright: reportMissingImports=false

import re
from pathlib import Path

import folder_paths

from ..core.errors import BadConfig
from ..core.lora.embeddings import embedding_files, file_word
from ..core.lora.file import LoraFile
from ..core.storage.files import make_folder


def lora_path(name: str) -> str:
    """The name, or FOLDER/NAME, without an ending of its own. BadConfig for what is no file below a folder, on any system."""
    parts = re.split(r"[\\/]", name.removesuffix(".safetensors"))
    if any(part.strip() in ("", ".", "..") for part in parts) or re.search(r'[<>:"|?*\x00-\x1f]', name):
        raise BadConfig(f"name {name!r}: give a file name, or FOLDER/NAME below the loras folder")
    return "/".join(parts)


def embedding_name(lora: LoraFile, embedding: LoraFile) -> str:
    """The name of the file, without its ending. No spaces: a prompt's name ends there. Other vectors have another name."""
    return file_word(f"{Path(lora.name).stem}-{embedding.model_hash[:8]}")


def write_embedding(path: Path) -> None:
    """Writes the vectors that the LoRA at `path` brings along, if any, into the embeddings folder. BadFile if it cannot."""
    lora = LoraFile.read(path)
    for embedding in embedding_files(lora).values():
        folder = make_folder(Path(folder_paths.get_folder_paths("embeddings")[0]))
        embedding.save(folder / f"{embedding_name(lora, embedding)}.safetensors", lora.dtype)


def prompt_phrase(lora: LoraFile, phrase: str) -> tuple[str, str]:
    """The trigger phrase as a prompt has to have it, and what is missing for it, for people; empty when nothing is."""
    files = embedding_files(lora)
    if len(files) != 1:
        return phrase, ""
    ((word, embedding),) = files.items()
    name = embedding_name(lora, embedding)
    if name not in {Path(file).stem for file in folder_paths.get_filename_list("embeddings")}:
        return phrase, f"{word} has vectors of its own, and the embeddings folder has no {name}.safetensors"
    spelled = re.escape(word).replace("_", r"[\W_]+")  # file_word undone
    return re.sub(rf"(?<!\w){spelled}(?!\w)", f"embedding:{name}", phrase), ""
