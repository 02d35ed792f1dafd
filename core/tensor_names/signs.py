"""`Sign`: what a family's modules are recognised by."""

import re
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Sign:
    """A module path and widths that are characteristic of a family."""

    path: str
    """A regular expression to search for in the dotted path of the module in the file."""
    inputs: frozenset[int] | None = None
    """The allowed numbers of input features; None for any, if the sign is only about the structure."""
    ratio: float | None = None
    """The number of output rows per input feature; None for any."""
    part: str = "denoiser"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(self.path)

    def matches(self, part: str, path: str, shape: tuple[int, ...] | None) -> bool:
        """Check that a module has the sign. `shape` is its weight's (out, in, ...), or None if unknown."""
        if part != self.part or not self._pattern.search(path):
            return False
        if not self.decisive:
            return True
        if shape is None or len(shape) < 2:
            return False
        return (self.inputs is None or shape[1] in self.inputs) and (
            self.ratio is None or shape[0] == round(self.ratio * shape[1])
        )

    @property
    def decisive(self) -> bool:
        """Whether the sign compares widths, so that a match is evidence for this family only."""
        return self.inputs is not None or self.ratio is not None


_CLIP_LAYER = r"^(text_model\.)?encoder\.layers\.\d+\."


def clip_signs(width: int) -> tuple[Sign, ...]:
    """Return the signs of a CLIP of that width as the first text encoder."""
    return (
        Sign(_CLIP_LAYER, part="text_encoder"),
        Sign(rf"{_CLIP_LAYER}(self_attn\.\w+|mlp\.fc1)$", frozenset({width}), part="text_encoder"),
    )


CLIP_G_SIGN = Sign(r"(self_attn\.\w+|mlp\.fc1)$", frozenset({1280}), part="text_encoder_2")
