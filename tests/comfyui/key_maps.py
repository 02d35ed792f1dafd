"""Run in a process of its own, with ComfyUI on its path: which names in LoRA files does ComfyUI know?

Prints a JSON object: for each published model of a family, by its title in core/tensor_names/model_tables.json, the names
that ComfyUI's own key maps have for a tensor that the model has, and the tensor's shape (of q, k and v in one, the rows that
the name stands for).
"""

# pyright: reportMissingImports=false
import json
from typing import Any

from lora_reader import MODELS, names_of, text_encoders_of

LARGE = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 2432}}
# Of each model in model_tables.json the family whose small model lora_reader.py has, and what is otherwise.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "SD 1.5": ("sd15", {}),
    "SD 2": ("sd2", {}),
    "SDXL": ("sdxl", {}),
    "SD3": ("sd3", {"qk_norm": None, "x_block_self_attn_layers": []}),
    "SD3.5 Medium": ("sd3", {}),
    "SD3.5 Large": ("sd3", {"depth": 38, "x_block_self_attn_layers": [], "context_embedder_config": LARGE}),
    "FLUX.1": ("flux1", {"depth": 19, "depth_single_blocks": 38}),
    "Chroma": ("chroma", {"depth": 19, "depth_single_blocks": 38}),
    "FLUX.2 dev": ("flux2", {"depth": 8, "depth_single_blocks": 48}),
    "FLUX.2 klein 4B": ("flux2", {"depth": 5, "depth_single_blocks": 20, "guidance_embed": False, "num_heads": 24,
                                  "hidden_size": 3072, "context_in_dim": 7680}),
    "FLUX.2 klein 9B": ("flux2", {"depth": 8, "depth_single_blocks": 24, "guidance_embed": False, "num_heads": 32,
                                  "hidden_size": 4096, "context_in_dim": 12288}),
    "Lumina 2": ("lumina2", {"n_layers": 26}),
    "Z-Image": ("zimage", {"n_layers": 30}),
    "Qwen-Image": ("qwen-image", {"num_layers": 60}),
    "Krea 2": ("krea2", {"layers": 28}),
    "ERNIE-Image": ("ernie-image", {"num_layers": 36}),
    "LongCat-Image": ("longcat-image", {"depth": 10, "depth_single_blocks": 20}),
    "Ideogram 4": ("ideogram4", {"num_layers": 34}),
}  # fmt: skip


def names(title: str) -> dict[str, list[int]]:
    family, others = PUBLISHED[title]
    cls, config = MODELS[family]
    shapes, key_map = names_of(cls, config | others, text_encoders_of(family, {}))
    found = {}
    for name, target in key_map.items():
        key, rows = (target, None) if isinstance(target, str) else target[:2]
        if key in shapes:
            shape = shapes[key]
            found[name] = list(shape if rows is None else (min(rows[2], max(shape[0] - rows[1], 0)), *shape[1:]))
    return found


print(json.dumps({title: names(title) for title in PUBLISHED}))
