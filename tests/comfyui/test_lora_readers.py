"""What other programs make of the files that we write: the table of docs/formats.md.

Each file changes every Linear and convolution of a model (diffusers is asked about those in its numbered blocks only) with
ranks 1 and 2 and alpha 0.5. A reader's change of a weight is compared with alpha / rank * up * down, both times a vector.
"""

import inspect
import json
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from core.lora_file import SCHEMES, LoraFile, LoraModule
from core.lora_keys import FAMILIES, ModuleId, not_loaded_by_comfyui

from .setup_comfyui import COMFYUI, PYTHON

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"
EXACT = 1e-3
"""Relative deviation that float32 sums of rank 1 and 2 can have."""
UNET = {"attention_head_dim": 8}
XL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# diffusers' class, its configuration with few layers and full width, and the pipeline whose LoRA loader is used.
MODELS = {
    "sd15": ("UNet2DConditionModel", {**UNET, "cross_attention_dim": 768}, "StableDiffusionPipeline"),
    "sd2": (
        "UNet2DConditionModel",
        {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
        "StableDiffusionPipeline",
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {**XL_BLOCKS, "cross_attention_dim": 2048, "use_linear_projection": True},
        "StableDiffusionXLPipeline",
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
        "StableDiffusion3Pipeline",
    ),
    "flux1": (
        "FluxTransformer2DModel",
        {"num_layers": 2, "num_single_layers": 2, "guidance_embeds": True},
        "FluxPipeline",
    ),
    "chroma": ("ChromaTransformer2DModel", {"num_layers": 2, "num_single_layers": 2}, "ChromaPipeline"),
    "flux2": ("Flux2Transformer2DModel", {"num_layers": 2, "num_single_layers": 2}, "Flux2Pipeline"),
    "lumina2": ("Lumina2Transformer2DModel", {"num_layers": 2, "cap_feat_dim": 2304}, "Lumina2Pipeline"),
    "zimage": ("ZImageTransformer2DModel", {"n_layers": 2}, "ZImagePipeline"),
    "qwen-image": ("QwenImageTransformer2DModel", {"num_layers": 2}, "QwenImagePipeline"),
}
Changes = dict[str, Tensor]
"""Path of a module -> change of its weight times a fixed vector."""


def probe(inputs: int) -> Tensor:
    return torch.randn(inputs, generator=torch.Generator().manual_seed(inputs))


def probed(down: Tensor, up: Tensor, scale: float) -> Tensor:
    down, up = down.float().flatten(1), up.float().flatten(1)
    return scale * (up @ (down @ probe(down.shape[1])))


def model_of(family: str) -> nn.Module:
    """diffusers' model without any values: its memory is never touched."""
    import diffusers

    name, config, _ = MODELS[family]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    return model.to_empty(device="cpu")


def loras_of(model: nn.Module, blocks_only: bool) -> dict[ModuleId, LoraModule]:
    generator = torch.Generator().manual_seed(0)
    modules: dict[ModuleId, LoraModule] = {}
    for path, layer in model.named_modules():
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        if blocks_only and (not re.search(r"\.\d+\.", path) or path.startswith("distilled")):
            continue
        rank, shape = 1 + len(modules) % 2, layer.weight.shape
        down = torch.randn(rank, *shape[1:], generator=generator)
        up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator)
        modules["denoiser", path] = LoraModule(down, up, 0.5)
    return modules


def of_project(family: str, lora: LoraFile) -> Changes:
    # Of the same widths as FLUX.1 are Chroma's blocks: there the metadata decide.
    found = LoraFile.from_tensors(lora.tensors, {"ss_base_model_version": FAMILIES[family].base_versions[0]})
    assert found.family == family
    return {path: probed(m.down, m.up, m.scale) for (_, path), m in found.modules().items()}


def of_diffusers(family: str, lora: LoraFile) -> Changes:
    import diffusers

    model = model_of(family)
    pipeline = getattr(diffusers, MODELS[family][2])
    is_unet = lora.family in ("sd15", "sd2", "sdxl")
    options: dict[str, Any] = {"unet_config": model.config} if is_unet else {}
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
        options["return_alphas"] = True
    converted = pipeline.lora_state_dict(dict(lora.tensors), **options)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    load = pipeline.load_lora_into_unet if is_unet else pipeline.load_lora_into_transformer
    options = {"network_alphas": alphas} if "network_alphas" in inspect.signature(load).parameters else {}
    load(state, **{"unet" if is_unet else "transformer": model}, **options)
    return of_peft_layers(model)


def of_peft(family: str, lora: LoraFile) -> Changes:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    model = model_of(family)
    prefix = FAMILIES[family].diffusers_prefix
    state = {key.removeprefix(prefix): tensor for key, tensor in lora.tensors.items() if key.startswith(prefix)}
    ranks = {key.removesuffix(".lora_A.weight"): t.shape[0] for key, t in state.items() if ".lora_A." in key}
    if not ranks:
        return {}
    config = LoraConfig(
        r=1, lora_alpha=1, target_modules=list(ranks), rank_pattern=dict(ranks), alpha_pattern=dict(ranks)
    )
    inject_adapter_in_model(config, model)
    set_peft_model_state_dict(model, state)
    return of_peft_layers(model)


def of_peft_layers(model: nn.Module) -> Changes:
    from peft.tuners.lora import LoraLayer

    changes: Changes = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = next(iter(layer.lora_A))
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            assert isinstance(down, Tensor) and isinstance(up, Tensor)
            changes[path] = probed(down.detach(), up.detach(), layer.scaling[name])
    return changes


def run_comfyui(files: list[tuple[str, Path]]) -> list[dict]:
    arguments = [str(value) for pair in files for value in pair]
    result = subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("lora_reader.py")), *arguments],
        env={**os.environ, "PYTHONPATH": str(COMFYUI), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line[7:]) for line in result.stdout.splitlines() if line.startswith("RESULT ")]


def in_original_names(family: str, modules: Mapping[ModuleId, LoraModule]) -> Changes:
    """What each weight of the original model should change by."""
    parts: dict[str, dict[int, Tensor]] = {}
    swapped = set()
    for (_, path), module in modules.items():
        fusion = FAMILIES[family].of_diffusers(path)
        change = probed(module.down, module.up, module.scale)
        parts.setdefault(fusion.original, {})[fusion.parts.index(path)] = change
        if fusion.halves_swapped and len(change) == 2 * module.down.shape[1]:
            swapped.add(fusion.original)
    whole = {name: torch.cat([found[i] for i in sorted(found)]) for name, found in parts.items()}
    return {name: c.roll(len(c) // 2) if name in swapped else c for name, c in whole.items()}


@dataclass(frozen=True)
class Cell:
    matched: int
    total: int
    deviation: float

    def __str__(self) -> str:
        if self.matched == 0:
            return "-"
        deviation = "exact" if self.deviation < EXACT else f"off by {self.deviation:.0%}"
        return f"{self.matched}/{self.total} {deviation}"


def compare(found: Changes, wanted: Changes) -> Cell:
    common = [path for path in wanted if path in found]
    deviations = [((found[p] - wanted[p]).norm() / wanted[p].norm()).item() for p in common]
    return Cell(len(common), len(wanted), max(deviations, default=0.0))


def cell_of(read: Callable[[str, LoraFile], Changes], family: str, lora: LoraFile, wanted: Changes) -> str:
    try:
        return str(compare(read(family, lora), wanted))
    except (RuntimeError, ValueError, KeyError) as error:
        return f"fails: {type(error).__name__}"


@pytest.fixture(scope="module", params=FAMILIES)
def rows(request, tmp_path_factory) -> dict[str, list[str]]:
    """Scheme -> cells of one family: this project, ComfyUI, diffusers, peft."""
    family = request.param
    warnings.simplefilter("ignore")
    folder = tmp_path_factory.mktemp(family)
    everything = loras_of(model_of(family), blocks_only=False)
    blocks = loras_of(model_of(family), blocks_only=True)
    for scheme in SCHEMES:
        LoraFile.from_modules(family, everything, {}, scheme).save(folder / scheme, torch.float32)
    original = in_original_names(family, everything)
    results = run_comfyui([(family, folder / scheme) for scheme in SCHEMES])
    table = {}
    for scheme, result in zip(SCHEMES, results, strict=True):
        lora = LoraFile.read(folder / scheme)
        refused = {entry.name for entry in lora.entries if not_loaded_by_comfyui(FAMILIES[family], entry.name)}
        reported = {re.sub(r"\.(lora_\w+\.weight|alpha)$", "", m.split(": ")[-1]) for m in result["not_loaded"]}
        assert reported == refused, "core/lora_keys/readers.py and ComfyUI do not agree"
        changes = {
            name.removeprefix("diffusion_model.").removesuffix(".weight"): torch.tensor(change)
            for name, change in result["changes"].items()
        }
        some = LoraFile.from_modules(family, blocks, {}, scheme)
        wanted = {path: probed(module.down, module.up, module.scale) for (_, path), module in blocks.items()}
        table[scheme] = [
            cell_of(of_project, family, some, wanted),
            str(compare(changes, original)),
            cell_of(of_diffusers, family, some, wanted),
            cell_of(of_peft, family, some, wanted),
        ]
    return {f"{family} | {scheme}": cells for scheme, cells in table.items()}


def test_other_programs_read_our_files_as_the_document_says(rows):
    lines = [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    document = DOCUMENT.read_text()
    missing = [line for line in lines if line not in document]
    assert not missing, "rows for docs/formats.md:\n" + "\n".join(lines)


def test_comfyui_loads_every_module_of_two_schemes_exactly(rows):
    for name, (_, comfyui, _, _) in rows.items():
        if not name.endswith("diffusers"):
            matched, _, rest = comfyui.partition("/")
            assert rest == f"{matched} exact", name
