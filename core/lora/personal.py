"""Find and remove data about a person or a computer in the metadata of a LoRA and in other texts."""

import getpass
import json
import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from .report import SETTINGS
from .words import PHRASE_KEY, WORD_KEY, trigger_words

_PEFT = "lora_adapter_metadata"
_MODELSPEC = (
    "sai_model_spec", "architecture", "implementation", "implementation_version", "title", "description",
    "trigger_phrase", "tags", "license", "usage_hint", "resolution", "prediction_type", "timestep_range", "encoder_layer",
)  # fmt: skip
_OTHERS = ("base_model_version", "new_sd_model_hash", "sd_model_hash", "network_args", "v2", "zero_terminal_snr")
_SETTINGS = tuple(f"ss_{name}" for name in (*SETTINGS, *_OTHERS))
_SHARED = {*(f"modelspec.{name}" for name in _MODELSPEC), *_SETTINGS, WORD_KEY, "format"}
"""The keys to keep. All others are removed, since other programs may have written anything into them."""
_PEFT_NUMBERS = re.compile(r"(?:.*\.)?(?:r|lora_alpha|alpha|rank_pattern|alpha_pattern|use_rslora)")
_PATH = re.compile(
    r"""(?<![\w/:.<>)])(?:[A-Za-z]:[\\/]|\\\\|~[\\/]|/(?=[^\s/,"']+/))[^\s,"']+|\bfile://[^\s,"']+""", re.ASCII
)
_ROOT = r"(?:[A-Za-z]:[\\/]|\\\\|~[\\/]|\.{1,2}[\\/]|/)"
_FIRST_PATH = re.compile(rf"^{_ROOT}[^\n]*?(?=: )")
_QUOTED_PATH = re.compile(rf"""(?<=['"]){_ROOT}[^'"]*(?=['"])""")
# The match must start at the beginning of a word. Otherwise, a long word would be searched from each of its characters.
_PHOTO = re.compile(
    r"""(?<![^\s\\/:,"'(<])[^\s\\/:,"'(<]+\.(?:jpe?g|jfif|png|webp|bmp|tiff?|gif|avif|hei[cf])\b""", re.IGNORECASE
)
_NOBODY = {"root", "user", "admin", "administrator", "ubuntu"}
"""User names that many computers have, and that identify nobody."""


def shared_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return only the metadata that are useful to other people and reveal nothing about a person or a computer.

    Settings, modelspec's texts and the trigger words are kept. Names of folders, files and authors, captions, times,
    unknown keys and settings that contain a path are removed. The texts are not checked.
    """
    shared = {key: value for key, value in metadata.items() if key in _SHARED}
    shared = {key: value for key, value in shared.items() if key not in _SETTINGS or not personal_part(value)}
    if _PEFT in metadata:  # This may be the only place with the scale of the modules.
        shared[_PEFT] = json.dumps(_numbers(metadata[_PEFT]))
    if words := trigger_words(metadata):
        # Each program reads the trigger words from one of these two keys.
        phrase = metadata.get(PHRASE_KEY) or words[0]
        shared |= {PHRASE_KEY: phrase, "ss_tag_frequency": json.dumps({words[0]: {words[0]: 1}})}
    return shared


def _numbers(config: str) -> dict[str, Any]:
    """Return only the ranks and alphas in peft's configuration, which also contains the base model's path."""
    with suppress(ValueError, RecursionError):
        known = json.loads(config)
        if isinstance(known, dict):
            return {key: value for key, value in known.items() if _PEFT_NUMBERS.fullmatch(key)}
    return {}


def personal_part(text: str, known: Collection[str] = ()) -> str | None:
    """Describe the first part of a text that reveals a computer or a photo, for a message; None if nothing does.

    This is a path, a picture's file name, or the name of this computer's user, unless it is one of the `known` words.
    """
    for what, pattern in (("the path", _PATH), ("the file name", _PHOTO)):
        if found := pattern.search(text):
            return f"{what} {found[0]!r}"
    for name in _users() - {word.lower() for word in known}:
        if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text.lower()):
            return f"the name of this computer's user, {name!r}"
    return None


def without_folders(text: str) -> str:
    """Shorten each recognisable path in a text to its last part.

    A path with spaces is recognised at the beginning of a text (`PATH: what is wrong`), or if it is quoted.
    """
    for pattern in (_FIRST_PATH, _QUOTED_PATH, _PATH):
        text = pattern.sub(lambda found: re.split(r"[\\/]", found[0].rstrip("\\/"))[-1], text)
    return text


def _users() -> set[str]:
    names = {os.path.basename(os.path.expanduser("~"))}
    with suppress(KeyError, OSError, ImportError):  # A computer may not know its user.
        names.add(getpass.getuser())
    return {name.lower() for name in names if len(name) > 2} - _NOBODY
