"""The first LoRA format (cloneofsimo/lora), whose modules are numbered in the order in which diffusers built them."""

import json
from functools import cache

import pytest
import torch
from torch import nn

from core.errors import NoLora
from core.lora import LoraFile, convert_lora, merge_loras
from core.lora.embeddings import embeddings_of
from core.lora.readers import READERS, read_by

ATTENTION = {"Attention", "GEGLU"}


def numbered(model: nn.Module, classes: set[str]) -> dict[str, tuple[int, int]]:
    """The Linears in modules of these classes, as cloneofsimo/lora finds them: in the order in which they are registered."""
    return {
        f"{name}.{below}": (layer.out_features, layer.in_features)
        for name, parent in model.named_modules()
        if type(parent).__name__ in classes
        for below, layer in parent.named_modules()
        if isinstance(layer, nn.Linear)
    }


@cache
def unet(version: int) -> dict[str, tuple[int, int]]:
    from diffusers import UNet2DConditionModel

    width = {1: {"cross_attention_dim": 768}, 2: {"cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20)}}
    with torch.device("meta"):
        return numbered(UNet2DConditionModel(**width[version]), ATTENTION)


@cache
def clip() -> dict[str, tuple[int, int]]:
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        return numbered(CLIPTextModel(config), {"CLIPAttention"})


def old_order(layers: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """The order of early versions, which registered the feed-forward layer before the second attention."""
    place = {"attn1": 0, "ff": 1, "attn2": 2}
    blocks = list(dict.fromkeys(path.partition(".transformer_blocks.0.")[0] for path in layers))
    key = lambda path: (  # noqa: E731
        blocks.index(path.partition(".transformer_blocks.0.")[0]),
        place[path.partition(".transformer_blocks.0.")[2].partition(".")[0]],
    )
    return {path: layers[path] for path in sorted(layers, key=key)}


def written(layers: dict[str, tuple[int, int]], text: dict[str, tuple[int, int]]) -> tuple[dict, dict, dict]:
    """The tensors and metadata of a file as cloneofsimo/lora writes it, and the change of each module."""
    tensors, metadata, changes = {"<s1>": torch.randn(768)}, {"<s1>": "<embed>"}, {}
    for part, paths in (("unet", layers), ("text_encoder", text)):
        metadata[part] = json.dumps(sorted(ATTENTION))
        for number, (path, (outputs, inputs)) in enumerate(paths.items()):
            down, up = torch.randn(1, inputs), torch.randn(outputs, 1)
            tensors |= {f"{part}:{number}:up": up, f"{part}:{number}:down": down}
            metadata[f"{part}:{number}:rank"] = "1"
            name = path if part == "unet" else f"text_model.{path.removeprefix('text_model.')}"
            changes["denoiser" if part == "unet" else part, name] = (down, up)
    return tensors, metadata, changes


@pytest.mark.parametrize(("version", "family"), [(1, "sd15"), (2, "sd2")])
@pytest.mark.parametrize("order", [dict, old_order])
def test_each_number_is_the_module_that_diffusers_built_then(order, version, family):
    layers = order(unet(version))
    assert len(layers) == 144
    tensors, metadata, changes = written(layers, clip() if version == 1 else {})
    lora = LoraFile.from_tensors(tensors, metadata)
    assert (lora.family, lora.scheme) == (family, "numbered") and not lora.misfits
    found = lora.modules()
    assert found.keys() == changes.keys()
    for module, (down, up) in changes.items():
        assert torch.equal(found[module].down, down) and torch.equal(found[module].up, up) and found[module].scale == 1


def test_it_is_converted_with_its_word_and_without_its_own_metadata(tmp_path):
    tensors, metadata, changes = written(unet(1), clip())
    lora = LoraFile.from_tensors(tensors, metadata | {"modelspec.title": "A face"})
    assert {read_by(reader, lora).verdict for reader in READERS} == {"not at all", "not known"}
    converted, error = convert_lora(lora, "kohya")
    assert error == 0 and read_by("ComfyUI", converted).verdict == read_by("sd-scripts", converted).verdict == "loads"
    converted.save(tmp_path / "a.safetensors", torch.float32)
    again = LoraFile.read(tmp_path / "a.safetensors")
    assert all(
        torch.equal(module.delta(), changes[key][1] @ changes[key][0]) for key, module in again.modules().items()
    )
    assert torch.equal(embeddings_of(again)["<s1>"]["text_encoder"][0], tensors["<s1>"])
    assert again.metadata["modelspec.title"] == "A face" and not metadata.keys() & again.metadata.keys()
    merged = merge_loras([(lora, 1.0), (again, 1.0)])[0]
    assert embeddings_of(merged).keys() == {"<s1>"}


def test_one_with_convolutions_is_refused_as_what_it_is():
    tensors, metadata, _ = written(unet(1), {})
    convolution = {"unet:144:up": torch.zeros(320, 1, 1, 1), "unet:144:down": torch.zeros(1, 320, 3, 3)}
    with pytest.raises(NoLora, match=r"modules are numbered \(cloneofsimo/lora\), but don't fit"):
        LoraFile.from_tensors(tensors | convolution, metadata)
