"""Strengths of the blocks of a LoRA."""

import re
from pathlib import Path

import pytest
import torch

from core.errors import BadConfig
from core.lora.blocks import BLOCK_LISTS, block_strengths
from core.lora.convert import convert_lora
from core.lora.file import LoraFile
from core.lora.modules import LoraModule

PATHS = {
    "down": ("denoiser", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"),
    "down, second": ("denoiser", "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k"),
    "middle": ("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
    "up": ("denoiser", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"),
    "text": ("text_encoder", "text_model.encoder.layers.3.self_attn.q_proj"),
}


def lora(family: str = "sd15") -> LoraFile:
    modules = {path: LoraModule(torch.randn(4, 768), torch.randn(640, 4), 4.0) for path in PATHS.values()}
    return LoraFile.from_modules(family, modules, {})


def strengths(text: str, lora: LoraFile) -> dict[str, float]:
    """Name in PATHS -> strength."""
    found = block_strengths(lora, text)
    modules = {entry.modules[0]: found[entry.name] for entry in lora.entries}
    return {name: modules[path] for name, path in PATHS.items()}


def test_the_longest_name_counts():
    found = strengths("down_blocks=0.5, down_blocks.1.attentions.1 = 0\ntext_encoder=0.25", lora())
    assert found == {"down": 0.5, "down, second": 0, "middle": 1, "up": 1, "text": 0.25}


def test_a_part_that_the_lora_does_not_change_may_be_named():
    """docs/comfyui.md names one that most LoRAs don't change."""
    (text,) = re.findall(r"It takes `(up_blocks=.*?)`", Path("docs/comfyui.md").read_text())
    modules = {path: LoraModule(torch.randn(4, 768), torch.randn(640, 4), 4.0) for path in list(PATHS.values())[:-1]}
    found = block_strengths(LoraFile.from_modules("sd15", modules, {}), text)
    assert sorted(found.values()) == [0, 0, 0.5, 1]


@pytest.mark.parametrize("scheme", ["kohya", "diffusers", "comfy"])
def test_the_labels_of_the_lists_are_those_of_the_original_model(scheme):
    """SD1.5 in the original code: down_blocks.1.attentions.0 is input block 4, up_blocks.1.attentions.0 output block 3."""
    named = convert_lora(lora(), scheme)[0]
    found = strengths("IN04=0.1, IN05=0.2, M00=0.3, OUT03=0.4, BASE=0.5", named)
    assert found == {"down": 0.1, "down, second": 0.2, "middle": 0.3, "up": 0.4, "text": 0.5}


def test_a_list_has_a_number_for_each_block():
    numbers = dict.fromkeys(BLOCK_LISTS[17, "sd15"], 0.0) | {"BASE": 1, "IN05": 0.7, "M00": 0.5}
    text = ",".join(map(str, numbers.values()))
    assert strengths(text, lora()) == {"down": 0, "down, second": 0.7, "middle": 0.5, "up": 0, "text": 1}
    assert {len(labels) == count for (count, _), labels in BLOCK_LISTS.items()} == {True}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sideways=1", ["'sideways'", "down_blocks.1", "text_encoder", "IN04"]),
        ("down_blocks=much", ["'down_blocks=much'", "BLOCK=NUMBER"]),
        ("1,0,1", ["3 numbers", "17 or 26"]),
    ],
)
def test_what_is_not_understood_is_named_with_the_choices(text, words):
    with pytest.raises(BadConfig) as problem:
        block_strengths(lora(), text)
    assert all(word in str(problem.value) for word in words), problem.value
