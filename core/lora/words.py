"""Find the words of a LoRA file: its trigger words, and the words of its bundled embeddings."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..tensor_names import bundled_embedding, bundled_name
from .names import LoraNames

PHRASE_KEY = "modelspec.trigger_phrase"
"""The metadata key of a LoRA's trigger words."""
WORD_KEY = "facelora.word"
"""The metadata key of an embedding's word in prompts."""


def word_of(lora: LoraNames, key: str) -> str:
    """Return the word of an embedding's tensor, one of the file's `embedding_keys`."""
    return bundled_embedding(bundled_name(key)) or lora.metadata.get(WORD_KEY) or Path(lora.name).stem


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Return the trigger words in the metadata, best first: from modelspec and the subsets, then frequent tags."""
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
    """Return the JSON value of type `kind` in a metadata value; an empty one if it is damaged or of another type."""
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()
