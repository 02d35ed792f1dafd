"""Names of ERNIE-Image. They are the same in the original model and in diffusers."""

from . import loaded_names
from .signs import Sign
from .table import Listing, NameTable

ERNIE_IMAGE = NameTable(
    name="ernie-image",
    base_versions=("ernie_image",),
    architecture="ernie-image",
    comfyui_classes=("ErnieImage",),
    scheme="comfy",
    signs=(
        # Two structural signs outweigh the single one that all layers of Lumina 2 and Z-Image match.
        Sign(r"^layers\.\d+\.(self_attention|mlp)\."),
        Sign(r"^layers\.\d+\.(self_attention\.to_|mlp\.(gate_proj|up_proj|linear_fc2)$)"),
        Sign(r"^layers\.\d+\.(self_attention\.to_([qkv]|out\.0)|mlp\.(gate_proj|up_proj))$", frozenset({4096})),
    ),
    kernel=lambda path: 1 if path == "x_embedder.proj" else None,
    listings={"ERNIE-Image": Listing("Ernie", "Apache-2.0")},
    loaded=loaded_names.ERNIE_IMAGE,
)
