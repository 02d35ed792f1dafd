"""The words that a LoRA file names: those that call it up, and those whose vectors it brings along."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..tensor_names import bundled_embedding, bundled_name
from .names import LoraNames

PHRASE_KEY = "modelspec.trigger_phrase"
"""The key in a LoRA's metadata of the words that call it up."""
WORD_KEY = "facelora.word"
"""The key in an embedding file's metadata of the word by which prompts name it."""


def word_of(lora: LoraNames, key: str) -> str:
    """The word that a tensor of a file, one of its `embedding_keys`, has the vectors of."""
    return bundled_embedding(bundled_name(key)) or lora.metadata.get(WORD_KEY) or Path(lora.name).stem


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger words that the metadata name, best first: those of modelspec and the subsets, then frequent tags."""
    words = [word.strip() for word in metadata.get(PHRASE_KEY, "").split(",")]
    for dataset in _json(metadata, "ss_datasets", list):
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        for subset in subsets if isinstance(subsets, list) else []:
            if isinstance(subset, dict):
                words.append(str(subset.get("class_tokens") or ""))
    for tags in _json(metadata, "ss_tag_frequency", dict).values():
        if isinstance(tags, dict):
            counts = [(tag, count) for tag, count in tags.items() if isinstance(count, int)]
            words += [tag.strip() for tag, _ in sorted(counts, key=lambda pair: -pair[1])[:5]]
    return [word for word in dict.fromkeys(words) if word and word != "None"]


def _json(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """The JSON value of type `kind` that a metadata value holds, an empty one where it is damaged or of another type."""
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()
