"""Tell pictures that this program has drawn from photos."""

import re

from PIL import Image

from ..storage.drawn import DRAWN, PARTLY_DRAWN, PROGRAM, mark_of, tool_of

_OURS = re.compile(r", Size: \d+x\d+, Model: [^\n]*$")
"""Matches the end of the parameters that we write: A1111 writes the model's hash before its name."""


def is_our_drawing(image: Image.Image) -> bool:
    """Return whether this program has drawn a picture, which must be loaded, or a part of it, judging by its file."""
    parameters = image.info.get("parameters")
    is_marked = mark_of(image) in (DRAWN, PARTLY_DRAWN) and (tool_of(image) or "").startswith(PROGRAM)
    return is_marked or (isinstance(parameters, str) and _OURS.search(parameters) is not None)
