"""What other programs make of the files that we write: the table of docs/formats.md.

Each file changes every Linear and convolution of a denoiser (diffusers is asked about those in its numbered blocks only), or
the layers of the text encoders, with ranks 1 and 2 and alpha 0.5. A reader's change of a weight is compared with
alpha / rank * up * down, both times a vector.
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

from core.lora_file import LoraFile
from core.lora_inspect import not_loaded_by
from core.lora_keys import NAME_TABLES as FAMILIES
from core.lora_keys import ModuleId
from core.lora_modules import SCHEMES, LoraModule

from .setup_comfyui import COMFYUI, PYTHON

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"
EXACT = 1e-3
"""Relative deviation that float32 sums of thousands of products can have, where they cancel."""
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
CLIP_L, CLIP_H, CLIP_G = (12, 768), (23, 1024), (32, 1280)
TEXT_ENCODERS: dict[str, dict[str, tuple[int, int] | str]] = {
    "sd15": {"text_encoder": CLIP_L},
    "sd2": {"text_encoder": CLIP_H},
    "sdxl": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G},
    "sd3": {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": "T5"},
    "flux1": {"text_encoder": CLIP_L, "text_encoder_2": "T5"},
    "chroma": {"text_encoder": "T5"},
}
"""Family -> part -> layers and width of a CLIP, or T5 (two layers of it)."""
# Prefix, and whether the rest is flattened, of the schemes that are only read.
OTHER_SCHEMES = {
    "onetrainer": ("lora_transformer_", True),
    "lycoris": ("lycoris_", True),
    "peft": ("base_model.model.", False),
    "bare": ("", False),
}
# Prefix, whether the rest is flattened, and whether it is the original model's path.
LOKR_NAMES = {
    "comfy": ("diffusion_model.", False, True),
    "comfy with diffusers' paths": ("diffusion_model.", False, False),
    "kohya": ("lora_unet_", True, True),
    "diffusers": ("transformer.", False, False),
    "bare": ("", False, False),
    "lycoris": ("lycoris_", True, False),
    "peft": ("base_model.model.", False, True),
    "peft with diffusers' paths": ("base_model.model.", False, False),
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


def text_model_of(family: str, part: str) -> nn.Module:
    """transformers' text encoder without any values."""
    import transformers

    size = TEXT_ENCODERS[family][part]
    with torch.device("meta"):
        if isinstance(size, str):
            config = transformers.T5Config(
                d_model=4096, d_ff=10240, num_layers=2, num_heads=64, feed_forward_proj="gated-gelu"
            )
            return transformers.T5EncoderModel(config).to_empty(device="cpu")
        layers, width = size
        config = transformers.CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64
        )
        return transformers.CLIPTextModel(config).to_empty(device="cpu")


def text_loras_of(family: str) -> dict[ModuleId, LoraModule]:
    generator = torch.Generator().manual_seed(1)
    modules: dict[ModuleId, LoraModule] = {}
    for part in TEXT_ENCODERS[family]:
        for path, layer in text_model_of(family, part).named_modules():
            if isinstance(layer, nn.Linear):
                rank = 1 + len(modules) % 2
                down = torch.randn(rank, layer.in_features, generator=generator)
                up = torch.randn(layer.out_features, rank, generator=generator)
                modules[part, project_path(path)] = LoraModule(down, up, 0.5)
    return modules


def project_path(path: str) -> str:
    """transformers 5 has CLIP's paths without the `text_model.` that all LoRA files have."""
    return f"text_model.{path}" if path.startswith("encoder.layers.") else path


def in_other_scheme(modules: Mapping[ModuleId, LoraModule], scheme: str) -> dict[str, Tensor]:
    prefix, is_flat = OTHER_SCHEMES[scheme]
    tensors = {}
    for (_, path), module in modules.items():
        name = prefix + (path.replace(".", "_") if is_flat else path)
        if is_flat:
            tensors |= {f"{name}.lora_down.weight": module.down, f"{name}.lora_up.weight": module.up}
            tensors[f"{name}.alpha"] = torch.tensor(module.alpha)
        else:
            tensors |= {f"{name}.lora_A.weight": module.down, f"{name}.lora_B.weight": module.up * module.scale}
    return tensors


def of_project(family: str, lora: LoraFile) -> Changes:
    # Of the same widths as FLUX.1 are Chroma's blocks: there the metadata decide.
    found = LoraFile.from_tensors(lora.tensors, {"ss_base_model_version": FAMILIES[family].base_versions[0]})
    assert found.family == family
    return changes_of(found.modules())


def changes_of(modules: Mapping[ModuleId, LoraModule]) -> Changes:
    """Of the denoiser by path, of text encoders by part and path."""
    return {
        path if part == "denoiser" else f"{part}.{path}": probed(module.down, module.up, module.scale)
        for (part, path), module in modules.items()
    }


def of_diffusers(family: str, lora: LoraFile, model: nn.Module | None = None) -> Changes:
    import diffusers

    model = model or model_of(family)
    pipeline = getattr(diffusers, MODELS[family][2])
    is_unet = lora.family in ("sd15", "sd2", "sdxl")
    options: dict[str, Any] = {"unet_config": model.config} if is_unet else {}
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
        options["return_alphas"] = True
    converted = pipeline.lora_state_dict(copied(lora), **options)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    load = pipeline.load_lora_into_unet if is_unet else pipeline.load_lora_into_transformer
    options = {"network_alphas": alphas} if "network_alphas" in inspect.signature(load).parameters else {}
    load(state, **{"unet" if is_unet else "transformer": model}, **options)
    return of_peft_layers(model)


def copied(lora: LoraFile) -> dict[str, Tensor]:
    """Copies: diffusers multiplies some tensors in place."""
    return {key: tensor.clone() for key, tensor in lora.tensors.items()}


def text_of_diffusers(family: str, lora: LoraFile) -> Changes:
    import diffusers

    pipeline = getattr(diffusers, MODELS[family][2])
    changes: Changes = {}
    if not hasattr(pipeline, "load_lora_into_text_encoder"):
        return changes
    options: dict[str, Any] = {"unet_config": model_of(family).config} if family == "sdxl" else {}
    if "return_alphas" in inspect.signature(pipeline.lora_state_dict).parameters:
        options["return_alphas"] = True
    converted = pipeline.lora_state_dict(copied(lora), **options)
    state, alphas = converted if isinstance(converted, tuple) else (converted, None)
    for part, size in TEXT_ENCODERS[family].items():
        if size != "T5":
            model = text_model_of(family, part)
            pipeline.load_lora_into_text_encoder(state, alphas, text_encoder=model, prefix=part)
            changes |= {f"{part}.{project_path(path)}": change for path, change in of_peft_layers(model).items()}
    return changes


def text_of_peft(family: str, lora: LoraFile) -> Changes:
    changes: Changes = {}
    for part in TEXT_ENCODERS[family]:
        found = into_peft(text_model_of(family, part), lora, f"{part}.")
        changes |= {f"{part}.{project_path(path)}": change for path, change in found.items()}
    return changes


def of_peft(family: str, lora: LoraFile) -> Changes:
    return into_peft(model_of(family), lora, FAMILIES[family].diffusers_prefix)


def into_peft(model: nn.Module, lora: LoraFile, prefix: str) -> Changes:
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    state = {key.removeprefix(prefix): tensor for key, tensor in lora.tensors.items() if key.startswith(prefix)}
    ranks = {key.removesuffix(".lora_A.weight"): t.shape[0] for key, t in state.items() if ".lora_A." in key}
    if not ranks:
        return {}
    if not hasattr(model, "text_model"):
        # As diffusers does it.
        state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        ranks = {path.removeprefix("text_model."): rank for path, rank in ranks.items()}
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
        deviation = f"{self.deviation:.0e}" if self.deviation else "0"
        return f"{self.matched}/{self.total} {deviation}" if self.matched else "-"


def compare(found: Changes, wanted: Changes) -> Cell:
    common = [path for path in wanted if path in found]
    deviations = [((found[p] - wanted[p]).norm() / wanted[p].norm()).item() for p in common]
    return Cell(len(common), len(wanted), max(deviations, default=0.0))


def cell_of(read: Callable[[str, LoraFile], Changes], family: str, lora: LoraFile, wanted: Changes) -> str:
    try:
        return str(compare(read(family, lora), wanted))
    except (RuntimeError, ValueError, KeyError) as error:
        return f"fails: {type(error).__name__}"


def comfyui_changes(result: dict, prefix: str = "") -> Changes:
    return {
        name.removeprefix(prefix).removesuffix(".weight"): torch.tensor(change)
        for name, change in result["changes"].items()
    }


def assert_predicted(lora: LoraFile, result: dict) -> None:
    """That core/lora_keys/readers.py and ComfyUI agree on what is not loaded."""
    reported = {re.sub(r"\.(lora_\w+\.weight|alpha)$", "", m.split(": ")[-1]) for m in result["not_loaded"]}
    assert reported == set(not_loaded_by("ComfyUI", lora)), lora.scheme


def assert_diffusers_predicted(lora: LoraFile, found: Changes) -> None:
    refused = not_loaded_by("diffusers", lora)
    loaded = {module for entry in lora.entries if entry.name not in refused for module in entry.modules}
    names = {path if part == "denoiser" else f"{part}.{path}" for part, path in loaded}
    assert set(found) == names, lora.scheme


def changes_or_none(read: Callable[[str, LoraFile], Changes], family: str, lora: LoraFile) -> Changes:
    try:
        return read(family, lora)
    except (RuntimeError, ValueError, KeyError):
        return {}


@pytest.fixture(scope="module", params=FAMILIES)
def rows(request, tmp_path_factory) -> dict[str, list[str]]:
    """Family and scheme -> cells: this project, ComfyUI, diffusers, peft."""
    family = request.param
    warnings.simplefilter("ignore")
    folder = tmp_path_factory.mktemp(family)
    return denoiser_rows(family, folder) | (text_rows(family, folder) if family in TEXT_ENCODERS else {})


def denoiser_rows(family: str, folder: Path) -> dict[str, list[str]]:
    everything = loras_of(model_of(family), blocks_only=False)
    blocks = loras_of(model_of(family), blocks_only=True)
    for scheme in SCHEMES:
        LoraFile.from_modules(family, everything, {}, scheme).save(folder / scheme, torch.float32)
    original, wanted = in_original_names(family, everything), changes_of(blocks)
    results = run_comfyui([(family, folder / scheme) for scheme in SCHEMES])
    table = {}
    for scheme, result in zip(SCHEMES, results, strict=True):
        some = LoraFile.from_modules(family, blocks, {}, scheme)
        assert_predicted(LoraFile(family, {}, LoraFile.read(folder / scheme).tensors), result)
        assert_diffusers_predicted(some, changes_or_none(of_diffusers, family, some))
        table[f"{family} | {scheme}"] = [
            cell_of(of_project, family, some, wanted),
            str(compare(comfyui_changes(result, "diffusion_model."), original)),
            cell_of(of_diffusers, family, some, wanted),
            cell_of(of_peft, family, some, wanted),
        ]
    return table


def text_rows(family: str, folder: Path) -> dict[str, list[str]]:
    modules = text_loras_of(family)
    wanted = changes_of(modules)
    # Some programs go by the denoiser's names, so that a file without any would be no fair question.
    denoiser = dict(list(loras_of(model_of(family), blocks_only=True).items())[-1:])
    for scheme in SCHEMES:
        LoraFile.from_modules(family, denoiser | modules, {}, scheme).save(folder / f"text {scheme}", torch.float32)
    results = run_comfyui([(family, folder / f"text {scheme}") for scheme in SCHEMES])
    names = {part: prefix.removeprefix("text_encoders.") for part, prefix in FAMILIES[family].comfy_prefixes.items()}
    in_comfyui = {names[part] + path: probed(m.down, m.up, m.scale) for (part, path), m in modules.items()}
    table = {}
    for scheme, result in zip(SCHEMES, results, strict=True):
        lora = LoraFile(family, {}, LoraFile.read(folder / f"text {scheme}").tensors)
        assert_predicted(lora, result)
        of_text = {key for e in lora.entries if e.part != "denoiser" for key in e.keys.values()}
        text_only = LoraFile(family, {}, {key: lora.tensors[key] for key in of_text})
        assert_diffusers_predicted(text_only, changes_or_none(text_of_diffusers, family, lora))
        table[f"{family} text | {scheme}"] = [
            str(compare(changes_of(lora.modules()), wanted)),
            str(compare(comfyui_changes(result), in_comfyui)),
            cell_of(text_of_diffusers, family, lora, wanted),
            cell_of(text_of_peft, family, lora, wanted),
        ]
    return table


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_known_what_comfyui_and_diffusers_make_of_other_schemes(family, tmp_path):
    warnings.simplefilter("ignore")
    blocks = loras_of(model_of(family), blocks_only=True)
    loras = [LoraFile(family, {}, in_other_scheme(blocks, scheme)) for scheme in OTHER_SCHEMES]
    for lora in loras:
        lora.save(tmp_path / lora.scheme, torch.float32)
    results = run_comfyui([(family, tmp_path / lora.scheme) for lora in loras])
    for lora, result in zip(loras, results, strict=True):
        assert_predicted(lora, result)
        assert_diffusers_predicted(lora, changes_or_none(of_diffusers, family, lora))


@pytest.mark.parametrize("family", ["flux2", "zimage", "qwen-image"])
@pytest.mark.parametrize("has_alpha", [True, False])
def test_it_is_known_of_which_lokr_files_diffusers_loads_what(family, has_alpha):
    warnings.simplefilter("ignore")
    for scheme, (prefix, is_flat, original) in LOKR_NAMES.items():
        shapes: dict[str, tuple[int, int]] = {}
        for (_, path), module in loras_of(model_of(family), blocks_only=True).items():
            fusion, inputs = FAMILIES[family].of_diffusers(path), module.down.shape[1]
            is_whole = original and len(fusion.parts) > 1
            name = prefix + (fusion.original if original else path)
            rows = round(sum(fusion.sizes) * inputs) if is_whole else module.up.shape[0]
            shapes[name.replace(".", "_") if is_flat else name] = (rows, inputs)
        tensors = {}
        for name, (outputs, inputs) in shapes.items():
            tensors[f"{name}.lokr_w1"] = torch.ones(4, 4)
            tensors |= {
                f"{name}.lokr_w2_a": torch.ones(outputs // 4, 2),
                f"{name}.lokr_w2_b": torch.ones(2, inputs // 4),
            }
            tensors |= {f"{name}.alpha": torch.tensor(1.0)} if has_alpha else {}
        lora = LoraFile(family, {}, tensors)
        assert len(lora.entries) == len(shapes) and {entry.kind for entry in lora.entries} == {"lokr"}
        expected = len(shapes) - len(not_loaded_by("diffusers", lora))
        assert lokr_layers_in_diffusers(family, lora) == expected, scheme


def lokr_layers_in_diffusers(family: str, lora: LoraFile) -> int:
    """How many modules diffusers puts a LoKr on; 0 when it refuses the file."""
    import diffusers
    from peft.tuners.lokr import LoKrLayer

    pipeline, model = getattr(diffusers, MODELS[family][2]), model_of(family)
    try:
        state = pipeline.lora_state_dict(copied(lora))
        words = ("lora", "lokr") if family in ("flux2", "zimage") else ("lora",)
        if not all(any(word in key for word in words) for key in state):  # as load_lora_weights begins
            return 0
        pipeline.load_lora_into_transformer(state, transformer=model)
    except ValueError:
        return 0
    return sum(isinstance(layer, LoKrLayer) for layer in model.modules())


def test_it_is_known_what_comfyui_makes_of_other_kinds(tmp_path):
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
    # Without alpha ComfyUI fails at a BOFT.
    down_up = {"lora_down.weight": torch.ones(2, 1280), "lora_up.weight": torch.ones(1280, 2)}
    modules = {
        f"{block}attn1_to_q": {f"hada_w{n}_{x}": torch.ones(1280, 2) for n in "12" for x in "a"}
        | {f"hada_w{n}_b": torch.ones(2, 1280) for n in "12"},
        f"{block}attn1_to_k": {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(320, 320)},
        f"{block}attn1_to_v": {**down_up, "dora_scale": torch.ones(1280, 1)},
        "unet.mid_block.attentions.0.proj_in": {
            "lora_A.weight": torch.ones(2, 1280, 1, 1),
            "lora_B.weight": torch.ones(1280, 2, 1, 1),
            "lora_magnitude_vector": torch.ones(1, 1280, 1, 1),
        },
        f"{block}attn1_to_out_0": {"diff": torch.ones(1280, 1280), "diff_b": torch.ones(1280)},
        f"{block}attn2_to_q": {"oft_blocks": torch.zeros(16, 80, 80), "alpha": torch.ones(())},
        f"{block}attn2_to_out_0": {"oft_blocks": torch.zeros(4, 16, 80, 80), "alpha": torch.ones(())},
        f"{block.replace('lora', 'oft')}ff_net_2": {"oft_blocks": torch.zeros(16, 80, 80), "alpha": torch.ones(())},
    }
    tensors = {f"{name}.{role}": tensor for name, roles in modules.items() for role, tensor in roles.items()}
    lora = LoraFile("sd15", {}, tensors)
    assert len(lora.entries) == len(modules)
    lora.save(tmp_path / "kinds")
    (result,) = run_comfyui([("sd15", tmp_path / "kinds")])
    reported = {message.split(": ")[-1].rpartition(".")[0] for message in result["not_loaded"]}
    assert reported == set(not_loaded_by("ComfyUI", lora))


def test_other_programs_read_our_files_as_the_document_says(rows):
    documented = {}
    for line in DOCUMENT.read_text().splitlines():
        if line.count("|") == 7:
            family, scheme, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            documented[f"{family} | {scheme}"] = cells
    wrong = {name: cells for name, cells in rows.items() if not alike(cells, documented.get(name, []))}
    table = "\n".join(f"| {name} | {' | '.join(cells)} |" for name, cells in wrong.items())
    assert not wrong, "rows for docs/formats.md:\n" + table


def alike(cells: list[str], documented: list[str]) -> bool:
    """Whether the cells are equal, but for deviations so small that they are rounding, which is the processor's own."""
    return [rounded(cell) for cell in cells] == [rounded(cell) for cell in documented]


def rounded(cell: str) -> str:
    modules, _, deviation = cell.partition(" ")
    return f"{modules} exact" if "/" in modules and float(deviation) < EXACT else cell


def test_comfyui_loads_every_module_of_two_schemes_exactly(rows):
    for name, (_, comfyui, _, _) in rows.items():
        if not name.endswith("diffusers"):
            matched, _, rest = rounded(comfyui).partition("/")
            assert rest == f"{matched} exact", name
