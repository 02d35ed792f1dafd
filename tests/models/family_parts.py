"""What the tests of single families share: networks of diffusers and transformers in small sizes, and files of both."""

import inspect
import json
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.models import text as model_text
from core.models.base import Base
from core.models.spec import Conditioning, stack_conditioning
from core.storage.safetensors_file import save_safetensors
from core.tensor_names import NAME_TABLES
from tests.tooling import random_lora

CPU = torch.device("cpu")


def error_of(ours: Tensor, expected: Tensor) -> float:
    """The relative difference of two tensors that are not almost zero."""
    assert expected.isfinite().all() and expected.norm() > 0
    return ((ours - expected).norm() / expected.norm()).item()


def pipeline_with(pipeline: type, **parts: Any) -> Any:
    """A pipeline of diffusers that has these parts alone."""
    names = [name for name, given in inspect.signature(pipeline.__init__).parameters.items()
             if given.default is given.empty and name != "self"]  # fmt: skip
    return pipeline(**dict.fromkeys(names, None) | parts)


@torch.no_grad()
def rough_weights(network: Any, scale: float = 0.1) -> Any:
    """The network with random weights, those of norms and of layers that begin at 0 too."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return network.eval()


_LONE_TENSORS = (
    (r"transformer_blocks\.(\d+)\.scale_shift_table", r"blocks.\1.mod.lin"),
    (r"final_layer\.scale_shift_table", "last.modulation.lin"),
    (r"(x|cap)_pad_token", r"\1_pad_token"),
)
"""The tensors outside layers of Krea 2 and Z-Image, under diffusers' names and the authors'."""


def in_original_names(weights: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """A denoiser's weights as in the authors' file, from those of diffusers: q, k and v may be in one."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        if lone := next((re.sub(old, new, name) for old, new in _LONE_TENSORS if re.fullmatch(old, name)), None):
            parts[lone] = {0: tensor.flatten() if lone.endswith(".mod.lin") else tensor}
            continue
        path, _, kind = name.rpartition(".")
        fusion = NAME_TABLES[family].of_diffusers(path)
        if fusion.halves_swapped:
            tensor = tensor.roll(len(tensor) // 2, 0)
        if fusion.original.endswith(("query_norm", "key_norm")):
            kind = "scale"
        whole = fusion.original if fusion.original.endswith(".scale") else f"{fusion.original}.{kind}"
        parts.setdefault(whole, {})[fusion.parts.index(path)] = tensor
    return {name: torch.cat([found[index] for index in sorted(found)]) for name, found in parts.items()}


def random_texts(lengths: Iterable[int], width: int, generator: torch.Generator) -> Conditioning:
    """Encoded captions of these lengths, filled up to the longest."""
    return stack_conditioning([
        {"context": torch.randn(1, length, width, generator=generator), "context_mask": torch.ones(1, length)}
        for length in lengths
    ])  # fmt: skip


def numbers_of(caption: str, most: int = 60, pattern: str = r"<\|\w+\|>|\w+|\W") -> list[int]:
    """A token for each word, each sign and each special token."""
    return [1 + zlib.crc32(word.encode()) % most for word in re.findall(pattern, caption)]


class Words:
    """A tokenizer with a number for each word, each sign and each special token, as pipelines call one or their processor."""

    def __init__(
        self, most: int = 60, pattern: str = r"<\|\w+\|>|\w+|\W", start: str = "", padding_side: str = "right"
    ):
        self.most, self.pattern, self.start, self.padding_side = most, pattern, start, padding_side
        self.tokenizer = self

    def __call__(
        self,
        texts: Any = None,
        text: Any = None,
        add_special_tokens: bool = True,
        return_tensors: str = "",
        **options: Any,
    ) -> Any:
        given = text if texts is None else texts
        start = self.start if add_special_tokens else ""
        rows = [
            numbers_of(start + one, self.most, self.pattern) for one in ([given] if isinstance(given, str) else given)
        ]
        if not return_tensors:
            return transformers.BatchEncoding({"input_ids": rows[0]})
        limit: int = options.get("max_length", 1 << 20)
        filled = limit if options.get("padding") == "max_length" else 0
        return self.pad({"input_ids": [row[:limit] for row in rows]}, filled)

    def pad(self, encoded: Any, max_length: int = 0, **_: Any) -> Any:
        rows: list[list[int]] = encoded["input_ids"]
        length = max_length or max(map(len, rows))
        padded = {"input_ids": [], "attention_mask": []}
        for row in rows:
            parts = {"input_ids": (row, [model_text._PAD_QWEN]), "attention_mask": ([1] * len(row), [0])}
            for name, (kept, filling) in parts.items():
                filled = filling * (length - len(row))
                padded[name].append(kept + filled if self.padding_side == "right" else filled + kept)
        return transformers.BatchEncoding({name: torch.tensor(values) for name, values in padded.items()})

    def apply_chat_template(
        self, messages: Any, tokenize: bool = True, add_generation_prompt: bool = False, **_: Any
    ) -> Any:
        (message,) = messages
        content = message["content"] if isinstance(message["content"], str) else message["content"][0]["text"]
        chat = f"<|im_start|>{message['role']}\n{content}<|im_end|>\n"
        chat += "<|im_start|>assistant\n" if add_generation_prompt else ""
        return [self(chat).input_ids] if tokenize else chat

    def encode(self, _: str) -> list[int]:
        return [0]


def small_qwen3vl(network: Any, width: int, layers: int) -> Any:
    """A network of transformers for Qwen3-VL, whose last norm shows in the states that it is applied to."""
    sizes = {"vocab_size": 64, "hidden_size": width, "intermediate_size": 32, "num_hidden_layers": layers,
             "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-6,
             "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": width,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    torch.manual_seed(0)
    model = network(transformers.Qwen3VLConfig(text_config=sizes, vision_config=vision)).eval()
    getattr(model, "model", model).language_model.norm.weight.data.uniform_(0.5, 3)
    return model


def write_folder(folder: Path, base: Base, encoder: Any, denoiser: Any = None, **index: Any) -> Path:
    """A diffusers folder of the base with that text encoder, and perhaps another denoiser."""
    networks: dict[str, Any] = {"transformer": denoiser or base.load("denoiser", CPU, torch.float32)}
    networks |= {"vae": base.load("vae", CPU, torch.float32), "text_encoder": encoder}
    for name, network in networks.items():
        if hasattr(network, "save_pretrained"):
            network.save_pretrained(folder / name)
            continue
        (folder / name).mkdir(parents=True)  # a network of this project
        (folder / name / "config.json").write_text(json.dumps(vars(network.config)))
        save_safetensors(folder / name / "model.safetensors", network.state_dict())
    written = {"_class_name": base.family.pipeline_class, **index}
    (folder / "model_index.json").write_text(json.dumps(written))
    return folder


def assert_diffusers_loads_whole(base: Base, theirs: Any, pipe: Any, path: Path, scheme: str, modules: int) -> None:
    """A LoRA that is written in that naming changes diffusers' denoiser by alpha / rank * B A in each of its modules."""
    random_lora(base, base.family.denoiser_targets["transformer"], scheme).save(path, torch.float32)
    read = LoraFile.read(path)
    assert read.family == base.family.name and len(read.entries) == modules and not read.unknown_keys
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    pipe.load_lora_weights(str(path))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    deltas = {f"{module}.weight": lora.scale * lora.up @ lora.down for (_, module), lora in read.modules().items()}
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + deltas.pop(name, 0))
    assert not deltas


def published_lora(path: Path, family: str, scheme: str, shapes: Mapping[str, tuple[int, int]]) -> LoraFile:
    """A LoRA that changes nothing, of modules of the published width."""
    modules = {
        ("denoiser", module): LoraModule(torch.zeros(1, inputs), torch.zeros(outputs, 1), 1.0)
        for module, (outputs, inputs) in shapes.items()
    }
    LoraFile.from_modules(family, modules, {}, scheme).save(path)
    return LoraFile.read(path)
