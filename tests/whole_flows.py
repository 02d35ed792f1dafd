"""Rectified flows at their published widths, with two blocks of each kind and random weights: all parts in one file."""

from pathlib import Path
from typing import Any

import torch

from core.models.families import FAMILIES
from core.models.spec import DENOISER_PREFIX
from core.models.text import PREFIX
from core.storage.safetensors_file import write_safetensors
from tests.models.family_parts import in_original_names
from tests.small_flows import SMALL_FLOWS, WIDE_FLOW
from tests.tooling import FULL_SD15, RandomTensors

_VAE = {
    **SMALL_FLOWS["flux1"].vae, "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip


def _qwen(layers: int) -> dict[str, Any]:
    return {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 128, "num_hidden_layers": layers,
            "num_attention_heads": 1, "num_key_value_heads": 1}  # fmt: skip


WHOLE_FLOWS: dict[str, dict[str, dict[str, Any]]] = {
    "flux1": {
        "denoiser": {**WIDE_FLOW.denoiser, "num_layers": 2, "num_single_layers": 2},
        "vae": _VAE,
        "text_encoder": {**FULL_SD15.text["text_encoder"], "num_hidden_layers": 2},
        "text_encoder_2": {"vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 128, "num_layers": 2, "num_heads": 1,
                           "feed_forward_proj": "gated-gelu"},
    },
    "zimage": {"denoiser": {"n_layers": 2}, "vae": _VAE, "text_encoder": _qwen(layers=2)},
    "krea2": {"denoiser": {"num_layers": 2}, "vae": {}, "text_encoder": _qwen(layers=36)},
}  # fmt: skip
"""The configs of each part; what they lack is as published. Text encoders are as wide outside as published, but narrow inside,
and as deep as the family reads them."""


def whole_shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Original name -> shape of every tensor of a checkpoint, as ComfyUI saves it."""
    spec, shapes = FAMILIES[family], {}
    for part, config in WHOLE_FLOWS[family].items():
        state = spec.build_empty(part, config).state_dict()
        if part == "denoiser":
            prefix, state = DENOISER_PREFIX, in_original_names(state, family)
        else:
            prefix = "vae." if part == "vae" else PREFIX.format(spec.text_encoders[part])
            state.pop("encoder.embed_tokens.weight", None)  # T5's other name for `shared.weight`
        shapes |= {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}
    return shapes


def write_flow(path: Path, family: str) -> Path:
    """A checkpoint in bf16, which says that it draws at 512 px. The folder of its tokenizer is returned."""
    draw = RandomTensors(whole_shapes(family), torch.bfloat16, seed=1)
    write_safetensors(path, draw.layout, draw, {"modelspec.resolution": "512x512"})
    return (write_t5_tokenizer if family == "flux1" else write_qwen_tokenizer)(path.with_name(f"{path.stem}-tokenizer"))


def write_t5_tokenizer(folder: Path) -> Path:
    """A folder with a small T5-like tokenizer: the word photo, pieces of one letter, and the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + list("abcdefghijklmnopqrstuvwxyz,.")
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((piece, -5.0) for piece in letters), ("▁photo", -2.0)]
    made = Tokenizer(models.Unigram(words, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder


def write_qwen_tokenizer(folder: Path) -> Path:
    """A folder with a small Qwen-like tokenizer: a token for each word and sign, of which it knows those of a caption."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<unk>", "a", "photo", "of", "sks", "person"])}
    special = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    made = Tokenizer(models.WordLevel(words | special, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\|\w+\|>|\n|\w+|[^\w\s]"), "removed", invert=True)
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return folder
