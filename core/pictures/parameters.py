"""A1111's text for describing a picture, which ComfyUI, Forge and Civitai also read."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

_NAME = re.compile(r"\s*(\w[\w /-]*):\s*")
_VALUE = re.compile(r'("(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class Parameters:
    """What a picture was drawn from. `str()` returns the text that A1111 writes."""

    prompt: str
    negative: str
    settings: Mapping[str, str]
    """The other settings by A1111's names, in the order written."""

    def __str__(self) -> str:
        lines = [
            self.prompt,
            # The line is written even when it is empty: ComfyUI reads nothing from a text without it.
            f"Negative prompt: {self.negative}",
            ", ".join(f"{name}: {_quoted(value)}" for name, value in self.settings.items()),
        ]
        # File names may not be valid Unicode.
        return "\n".join(lines).encode("utf-8", "replace").decode()

    @classmethod
    def read(cls, text: str) -> "Parameters | None":
        """Read the parameters from such a text; None for any other text, whose last line doesn't start with the steps."""
        *lines, last = text.strip().split("\n")
        if not last.startswith("Steps: "):
            return None
        settings, end = {}, 0
        while end < len(last):
            if (name := _NAME.match(last, end)) is None or (found := _value(last, name.end())) is None:
                return None
            settings[name[1]], end = found
        prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
        return cls(prompt, negative.strip(), settings)


def _quoted(value: str) -> str:
    """Quote the value as A1111 does if it would otherwise be read as several values."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _value(text: str, start: int) -> tuple[str, int] | None:
    """Return the value that starts there, and where the next setting starts; None if it isn't a value.

    It may be in quotes, or a JSON object or list without them, as Civitai's programs write it.
    """
    with suppress(ValueError, RecursionError):
        if text.startswith(("{", "["), start):
            _, end = json.JSONDecoder().raw_decode(text, start)
            if text[end : end + 1] in ("", ","):
                return text[start:end], end + 1
    if not (match := _VALUE.match(text, start)):
        return None
    try:
        return json.loads(match[1]) if match[1].startswith('"') else match[1], match.end()
    except ValueError:
        return match[1].strip('"'), match.end()
