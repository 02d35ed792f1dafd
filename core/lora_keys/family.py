"""What a model family says about names: one `FamilyKeys` per family."""

from collections.abc import Callable
from dataclasses import dataclass

ModuleId = tuple[str, str]
"""(part, path): the identity of a module in the whole project, see the package's docstring."""


@dataclass(frozen=True)
class Fusion:
    """A module of the original model and the diffusers modules that its output rows belong to.

    Mostly one to one; where the original has one Linear for q, k and v, diffusers has three.
    """

    original: str
    parts: tuple[str, ...]
    sizes: tuple[float, ...] = (1,)
    """Output rows of each part, in multiples of the module's input features; unused when there is one part."""


@dataclass(frozen=True)
class FamilyKeys:
    """The names of one family's modules in every scheme."""

    name: str
    kohya_prefixes: dict[str, str]
    """Part -> prefix of its Kohya names."""
    kohya_names_are_original: bool
    """Whether Kohya names are made from the original model's paths; else from diffusers' paths."""
    of_original: Callable[[str], Fusion | None]
    """The fusion of an original denoiser path, None when the path is not an original one."""
    of_diffusers: Callable[[str], Fusion]
    """The fusion that a diffusers denoiser path belongs to."""

    def locate(self, part: str, path: str) -> tuple[Fusion, int | None]:
        """The fusion that a path found in a file belongs to, and which of its parts it is: None means all of it."""
        if part != "denoiser":
            path = _with_text_model(path)
            return Fusion(path, (path,)), None
        fusion = self.of_original(path)
        if fusion is not None:
            return fusion, None
        fusion = self.of_diffusers(path)
        return fusion, (fusion.parts.index(path) if len(fusion.parts) > 1 else None)

    def kohya_name(self, part: str, path: str) -> str:
        """The Kohya name of an unfused module."""
        if part == "denoiser" and self.kohya_names_are_original:
            path = self.of_diffusers(path).original
        return self.kohya_prefixes[part] + path.replace(".", "_")


def _with_text_model(path: str) -> str:
    # transformers 5 dropped "text_model." from CLIP's paths, so files written with it lack it; everybody else has it.
    return f"text_model.{path}" if path.startswith(("encoder.layers.", "embeddings.", "final_layer_norm")) else path
