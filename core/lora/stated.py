"""What the metadata of a LoRA file state: its base model, its trigger words, and peft's configuration."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import BadFile
from ..storage.files import read_json
from ..storage.plain_values import parse_json
from ..tensor_names import model_named

PHRASE_KEY = "modelspec.trigger_phrase"
"""The metadata key of a LoRA's trigger words."""
WORD_KEY = "facelora.word"
"""The metadata key of an embedding's word in prompts."""
SUBJECT_KEY, AGREED = "facelora.subject", "real person, agreed"
"""The metadata key and value which state that a LoRA is of a real person who has agreed, as the user has confirmed."""
UNTIL_KEY = "facelora.agreed_until"
"""The metadata key of the last day of the agreement, such as 2036-11-30."""
PEFT_KEY = "lora_adapter_metadata"
"""The metadata key of peft's configuration."""


def claims_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the family that each metadata value names, by key, the best evidence first. Unknown names are left out.

    For a model without a family, it is the model's title.
    """
    return {key: family for key, name in bases_in(metadata).items() if (family := model_named(name))}


def bases_in(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the name of the base model in each metadata value that has one, by key."""
    bases = (base for key, base in json_in(metadata, PEFT_KEY, dict).items() if key.endswith("base_model_name_or_path"))
    return {
        "ss_base_model_version": metadata.get("ss_base_model_version", ""),
        "modelspec.architecture": metadata.get("modelspec.architecture", "").partition("/")[0],
        PEFT_KEY: str(next(bases, "")),
    }


def json_in(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """Return the JSON value of type `kind` in a metadata value; an empty one if it is missing, damaged or of another type."""
    try:
        value = parse_json(metadata.get(key, ""))
    except ValueError:
        return kind()
    return value if isinstance(value, kind) else kind()


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """Return the trigger words in the metadata, best first: from modelspec and the subsets, then frequent tags."""
    words = trigger_phrases(metadata)
    for dataset in json_in(metadata, "ss_datasets", list):
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        for subset in subsets if isinstance(subsets, list) else []:
            if isinstance(subset, dict):
                words.append(str(subset.get("class_tokens") or ""))
    for tags in json_in(metadata, "ss_tag_frequency", dict).values():
        if isinstance(tags, dict):
            counts = [(tag, count) for tag, count in tags.items() if isinstance(count, int)]
            words += [tag.strip() for tag, _ in sorted(counts, key=lambda pair: -pair[1])[:5]]
    return [word for word in dict.fromkeys(words) if word and word != "None"]


def trigger_phrases(metadata: Mapping[str, str]) -> list[str]:
    """Return the trigger phrases in modelspec's metadata. A merged LoRA has several."""
    return [phrase for word in metadata.get(PHRASE_KEY, "").split(",") if (phrase := word.strip())]


def peft_metadata(path: Path) -> dict[str, str]:
    """Read the configuration that peft writes beside its file, in diffusers' metadata format; empty for other files."""
    beside = path.with_name("adapter_config.json")
    if path.name != "adapter_model.safetensors" or not beside.exists():
        return {}
    try:
        config = read_json(beside)
    except BadFile as error:
        raise BadFile(f"{error}; it contains the alpha of {path.name}") from None
    named = {f"base_model.{key}": value for key, value in config.items()} if isinstance(config, dict) else {}
    return {PEFT_KEY: json.dumps(named)}
