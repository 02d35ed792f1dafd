"""Names of MOSS-Image, the same in the published model and here. ComfyUI's files fuse q, k and v in one Linear."""

from .loaded_names import LoadedNames
from .signs import Sign
from .table import Fusion, Listing, NameTable, by_rules

_RULES = by_rules(Fusion("layers.{}.proj.qkv", tuple(f"layers.{{}}.proj.{x}" for x in "qkv"), (1, 1, 1)))

MOSS_IMAGE = NameTable(
    name="moss-image",
    base_versions=("moss_image",),
    architecture="moss-image",
    scheme="comfy",
    signs=(
        # Lumina 2, Z-Image and ERNIE-Image have layers of this name too.
        Sign(r"^layers\.\d+\."),
        Sign(r"^layers\.\d+\.proj\.(qkv|[qkvo]|ffn_up_gate|ffn_down)$"),
    ),
    **_RULES,
    original_in_kohya=False,
    original_in_comfy=False,
    listings={"MOSS-Image": Listing("MOSS Image", "Apache-2.0")},
    loaded=LoadedNames(comfyui_later=frozenset({("comfy", "diffusers"), ("comfy", "original"), ("kohya", "original")})),
)
