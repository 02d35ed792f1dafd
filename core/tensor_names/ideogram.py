"""Names of Ideogram 4. The original model's layers fuse q, k and v in one Linear."""

from . import loaded_names
from .signs import Sign
from .table import Fusion, Listing, NameTable, by_rules

_RULES = by_rules(
    Fusion("layers.{}.attention.qkv", tuple(f"layers.{{}}.attention.to_{x}" for x in "qkv"), (1, 1, 1)),
    Fusion("layers.{}.attention.o", ("layers.{}.attention.to_out.0",)),
)

IDEOGRAM4 = NameTable(
    name="ideogram4",
    base_versions=("ideogram4",),
    architecture="ideogram-4",
    comfyui_classes=("Ideogram4",),
    scheme="comfy",
    signs=(
        # Z-Image's layers have the same names, except for the attention's output and the modulation.
        Sign(r"^layers\.\d+\."),
        Sign(r"^layers\.\d+\.(attention\.o|adaln_modulation)$"),
        Sign(r"^layers\.\d+\.(attention\.(qkv|o|to_([qkv]|out\.0))|feed_forward\.w[13])$", frozenset({4608})),
    ),
    **_RULES,
    listings={"Ideogram 4": Listing("Ideogram 4.0", "Ideogram Non-Commercial Model Agreement")},
    loaded=loaded_names.IDEOGRAM4,
)
