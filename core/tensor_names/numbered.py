"""Names of the first LoRA format (cloneofsimo/lora), such as `unet:0:up`. The numbers follow diffusers' module order."""

import re
from collections.abc import Iterator

NUMBERED = re.compile(r"(unet|text_encoder):(\d+):(up|down)")
"""The name of a tensor: the part of the model, the number of the module and the role."""
# diffusers registered the middle block last at that time.
_TRANSFORMERS = (
    *(f"down_blocks.{level}.attentions.{block}" for level in range(3) for block in range(2)),
    *(f"up_blocks.{level}.attentions.{block}" for level in range(1, 4) for block in range(3)),
    "mid_block.attentions.0",
)
_ATTN1, _ATTN2 = (tuple(f"{attn}.to_{x}" for x in ("q", "k", "v", "out.0")) for attn in ("attn1", "attn2"))
_FF = ("ff.net.0.proj",)
_ORDERS = ((*_ATTN1, *_FF, *_ATTN2), (*_ATTN1, *_ATTN2, *_FF), (*_ATTN1, *_ATTN2))
"""The modules of a transformer block: in old and in newer versions of diffusers, and without the feed-forward layer."""
_CLIP = ("k_proj", "v_proj", "q_proj", "out_proj")
"""The modules of CLIP's attention, in transformers' order."""


def numbered_paths() -> Iterator[dict[tuple[str, int], str]]:
    """Yield the path of each module by part and number, for each known order. The sizes show which one a file has."""
    of_text = {
        ("text_encoder", 4 * layer + number): f"text_model.encoder.layers.{layer}.self_attn.{name}"
        for layer in range(24)
        for number, name in enumerate(_CLIP)
    }
    for order in _ORDERS:
        paths = (f"{block}.transformer_blocks.0.{name}" for block in _TRANSFORMERS for name in order)
        yield {("unet", number): path for number, path in enumerate(paths)} | of_text
