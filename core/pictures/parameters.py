"""The text by which A1111 describes a picture, which ComfyUI, Forge and Civitai read too, and PNG files that have it."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from PIL import Image, PngImagePlugin

from ..storage.files import write_file

_SETTING = re.compile(r'\s*(?P<name>\w[\w /-]*):\s*(?P<value>"(?:[^"\\]|\\.)*"|[^,]*)(?:,|$)')


@dataclass(frozen=True)
class Parameters:
    """What a picture was drawn from. `str()` of it is the text that A1111 writes."""

    prompt: str
    negative: str
    settings: Mapping[str, str]
    """The other settings by A1111's names, in the order in which they are written."""

    def __str__(self) -> str:
        lines = [
            self.prompt,
            # The line stands there even when it is empty: ComfyUI reads nothing from a text without it.
            f"Negative prompt: {self.negative}",
            ", ".join(f"{name}: {_quoted(value)}" for name, value in self.settings.items()),
        ]
        # File names need not be Unicode text.
        return "\n".join(lines).encode("utf-8", "replace").decode()

    @classmethod
    def read(cls, text: str) -> "Parameters | None":
        """What such a text says; None where it is none, which its last line tells: it begins with the steps."""
        *lines, last = text.strip().split("\n")
        if not last.startswith("Steps: "):
            return None
        settings = {}
        while last:
            match = _SETTING.match(last)
            if match is None:
                return None
            settings[match["name"]] = _unquoted(match["value"])
            last = last[match.end() :]
        prompt, _, negative = "\n".join(lines).partition("\nNegative prompt:")
        return cls(prompt, negative.strip(), settings)


def _quoted(value: str) -> str:
    """The value as A1111 writes it: in quotes where it would be taken for several values."""
    return json.dumps(value, ensure_ascii=False) if re.search(r'[,:\n"]', value) else value


def _unquoted(value: str) -> str:
    try:
        return json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value.strip('"')


def save_png(path: str | os.PathLike[str], image: Image.Image, texts: Mapping[str, str]) -> None:
    """Writes the picture as a PNG, whole or not at all, with these texts by name in it and nothing else.

    Raises BadFile when it cannot be written.
    """
    info = PngImagePlugin.PngInfo()
    for name, text in texts.items():
        # iTXt, which is UTF-8, is written only where it must be: not every program reads it.
        (info.add_text if text.isascii() else info.add_itxt)(name, text)
    bare = image.copy()
    bare.info = {}  # else a colour profile or EXIF data would come along
    write_file(path, lambda file: bare.save(file, "PNG", pnginfo=info))
