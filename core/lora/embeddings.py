"""Textual-inversion embeddings (arXiv:2208.01618): the vectors of new words for CLIP text encoders, and their tensors in files.

An embedding file holds `emb_params` (SD1.x, SD2.x) or `clip_l` and `clip_g` (SDXL), each (vectors, width). A1111 and ComfyUI
read this format. In a LoRA file the same tensors have the prefix `bundle_emb.<word>.`.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from ..errors import BadFile
from ..models.clip import add_word, remove_words
from ..storage.files import RESERVED
from ..tensor_names import NAME_TABLES, vectors_in
from .file import LoraFile
from .names import word_of
from .stated import WORD_KEY


def embedding_tensors(family: str, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an embedding file, from the vectors (count, width) by part."""
    return {NAME_TABLES[family].embedding_names[part]: tensor for part, tensor in vectors.items()}


def bundled_tensors(family: str, word: str, vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of an embedding that is bundled in a LoRA file, from the vectors (count, width) by part."""
    name = file_word(word)
    return {
        f"bundle_emb.{name}.{'string_to_param.*' if key == 'emb_params' else key}": tensor
        for key, tensor in embedding_tensors(family, vectors).items()
    }


def file_word(word: str) -> str:
    """Return the word with _ for all characters that are not allowed in the names of files and tensors."""
    name = re.sub(r"[^\w-]+", "_", word)
    return f"{name}_" if RESERVED.fullmatch(name) else name


def embeddings_of(lora: LoraFile) -> dict[str, dict[str, Tensor]]:
    """Return the vectors (count, width) of each embedding in a file, by word and by part. Raises BadFile for other shapes."""
    parts = {key: part for part, key in NAME_TABLES[lora.family].embedding_names.items()}
    words: dict[str, dict[str, Tensor]] = {}
    for key in lora.embedding_keys:
        part = parts.get(vectors_in(key) or "")
        if part is None:
            continue
        tensor = lora.sound_vectors(key)
        if tensor.ndim not in (1, 2) or not tensor.numel():
            raise BadFile(
                f"{lora.name}: {key} has the shape {list(tensor.shape)}, but an embedding must have [vectors, width]"
            )
        words.setdefault(word_of(lora, key), {})[part] = tensor.reshape(-1, tensor.shape[-1])
    return words


def embedding_files(lora: LoraFile) -> dict[str, LoraFile]:
    """Return each embedding bundled in a LoRA file as a separate file, by word."""
    keep = ("modelspec.", "ss_base_model_version", "ss_sd_model_", "ss_new_sd_model_hash", "ss_output_name")
    metadata = {key: value for key, value in lora.metadata.items() if key.startswith(keep)}
    return {
        word: LoraFile(lora.family, metadata | {WORD_KEY: word}, embedding_tensors(lora.family, vectors))
        for word, vectors in embeddings_of(lora).items()
    }


@contextmanager
def new_words(encoders: Mapping[str, nn.Module], loras: list[LoraFile]) -> Iterator[None]:
    """Add the files' embeddings to text encoders within the context. Prompts name them as `word` or `embedding:word`."""
    changed = []
    try:
        for lora in loras:
            names = {Path(lora.name).stem}
            for word, vectors in embeddings_of(lora).items():
                for part, tensor in vectors.items():
                    if part in encoders:
                        changed.append(encoders[part])
                        for name in {word, *(names if not lora.entries else ())}:
                            add_word(encoders[part], name, tensor)
        yield
    finally:
        for encoder in changed:
            remove_words(encoder)
