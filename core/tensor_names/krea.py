"""Names of Krea 2: single-stream blocks, after a small transformer that fuses the text encoder's hidden states."""

from . import loaded_names
from .signs import Sign
from .table import Fusion, Listing, NameTable, by_rules

_BLOCKS = {
    "blocks.{}": "transformer_blocks.{}",
    "txtfusion.layerwise_blocks.{}": "text_fusion.layerwise_blocks.{}",
    "txtfusion.refiner_blocks.{}": "text_fusion.refiner_blocks.{}",
}
_LAYERS = {
    "attn.wq": "attn.to_q", "attn.wk": "attn.to_k", "attn.wv": "attn.to_v", "attn.wo": "attn.to_out.0",
    "attn.gate": "attn.to_gate", "mlp.gate": "ff.gate", "mlp.up": "ff.up", "mlp.down": "ff.down",
    # The original model's norms have no weight. Their scale is a separate tensor.
    "prenorm.scale": "norm1", "postnorm.scale": "norm2",
    "attn.qknorm.qnorm.scale": "attn.norm_q", "attn.qknorm.knorm.scale": "attn.norm_k",
}  # fmt: skip
_RULES = by_rules(
    *(
        Fusion(f"{block}.{layer}", (f"{new_block}.{new_layer}",))
        for block, new_block in _BLOCKS.items()
        for layer, new_layer in _LAYERS.items()
    ),
    Fusion("first", ("img_in",)),
    Fusion("tmlp.0", ("time_embed.linear_1",)),
    Fusion("tmlp.2", ("time_embed.linear_2",)),
    Fusion("tproj.1", ("time_mod_proj",)),
    Fusion("txtfusion.projector", ("text_fusion.projector",)),
    Fusion("txtmlp.0.scale", ("txt_in.norm",)),
    Fusion("txtmlp.1", ("txt_in.linear_1",)),
    Fusion("txtmlp.3", ("txt_in.linear_2",)),
    Fusion("last.norm.scale", ("final_layer.norm",)),
    Fusion("last.linear", ("final_layer.linear",)),
)
_WIDTH = frozenset({6144})
# In diffusers, FLUX.2 dev has the same width and attention names. Only Krea 2 has the gate, and fewer heads for k and v.
_WIDE = (
    r"^(blocks\.\d+\.(attn\.(w[qo]|gate)|mlp\.(gate|up))"
    r"|transformer_blocks\.\d+\.(attn\.to_(q|gate|out\.0)|ff\.(gate|up)))$"
)

KREA2 = NameTable(
    name="krea2",
    base_versions=("krea2",),
    architecture="krea-2",
    comfyui_classes=("Krea2",),
    scheme="comfy",
    signs=(
        Sign(r"^blocks\.\d+\.attn\.(w[qkvo]|gate)$|^transformer_blocks\.\d+\.(attn\.to_gate|ff\.(gate|up|down))$"),
        Sign(r"^(txtfusion|text_fusion)\."),
        Sign(_WIDE, _WIDTH),
        Sign(r"^(blocks\.\d+\.attn\.w|transformer_blocks\.\d+\.attn\.to_)[kv]$", _WIDTH, ratio=1 / 4),
    ),
    **_RULES,
    listings={"Krea 2": Listing("Krea 2", "Krea 2 Community License")},
    loaded=loaded_names.KREA2,
)
