"""What ComfyUI makes of the files of our methods: weight changes, embeddings and checkpoints are those that were trained."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from core.config import TrainConfig
from core.lora.embeddings import bundled_tensors, embedding_tensors
from core.lora.file import LoraFile
from core.models import Base, load_base
from core.models.families import FAMILIES
from core.models.spec import Component
from core.storage.safetensors_file import SafetensorsFile
from core.tensor_names import NAME_TABLES as KEYS
from core.training.methods import METHODS
from tests.tooling import write_checkpoint

from .lora_changes import EXACT, family_of, probe, run_comfyui
from .real_widths import COMFY_SD15
from .scripts import printed_by

CPU = torch.device("cpu")
KINDS = ("dora", "loha", "lokr", "oft")
BLOCK = "mid_block.attentions.0."


def layers_of(family: str, width: int) -> dict[str, nn.Module]:
    """Path -> layer of some modules, as UNets have them whose first level is so wide: no squares, both convolutions."""
    middle, is_linear = 4 * width, family == "sdxl"
    layers = {
        f"{BLOCK}proj_in": nn.Linear(middle, middle) if is_linear else nn.Conv2d(middle, middle, 1),
        f"{BLOCK}transformer_blocks.0.attn2.to_k": nn.Linear(2048 if is_linear else 768, middle, bias=False),
        "down_blocks.1.resnets.0.conv1": nn.Conv2d(width, 2 * width, 3, padding=1),
    }
    return layers if is_linear else {**layers, f"{BLOCK}transformer_blocks.0.ff.net.2": nn.Linear(4 * middle, middle)}


# Some are one module in ComfyUI: q, k and v, and with them the MLP of FLUX's single blocks.
OF_FLOWS = {
    "sd3": (
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.1.attn.add_v_proj",
        "transformer_blocks.1.attn.to_out.0",
    ),
    "flux1": (
        "transformer_blocks.1.attn.to_k",
        "single_transformer_blocks.0.attn.to_v",
        "transformer_blocks.0.attn.to_out.0",
    ),
    "chroma": ("transformer_blocks.0.attn.to_v", "single_transformer_blocks.1.attn.to_q"),
    "flux2": ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_k_proj"),
    "zimage": ("layers.1.attention.to_k", "layers.1.attention.to_out.0"),
}
SMALL_WIDTHS = {"sd15": 32, "sdxl": 32, "sd3": 192, "flux1": 256, "chroma": 128, "flux2": 256, "zimage": 1152}
"""Of the models that lora_reader.py calls small."""
WIDTHS = {"sd15": 320, "sdxl": 320, "sd3": 1536, "flux1": 3072, "chroma": 3072, "flux2": 6144, "zimage": 3840}
WIDE, SMALL = tuple(WIDTHS), tuple(f"small-{family}" for family in SMALL_WIDTHS)


def layers_in(family: str, width: int) -> dict[str, nn.Module]:
    if family not in OF_FLOWS:
        return layers_of(family, width)
    return {path: nn.Linear(width, width, bias=False) for path in OF_FLOWS[family]}


LAYERS = {name: layers_in(name, WIDTHS[name]) for name in WIDE}
LAYERS |= {name: layers_in(family_of(name), SMALL_WIDTHS[family_of(name)]) for name in SMALL}


def base_weight(shape) -> torch.Tensor:
    """As in lora_reader.py."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    return torch.randn(shape, generator=generator) / math.prod(shape[1:]) ** 0.5


def weight_of(model: str, path: str) -> torch.Tensor:
    """The weight of a layer: its rows of the weight that it is a part of in ComfyUI's model."""
    shape: torch.Size = LAYERS[model][path].weight.shape  # pyright: ignore
    fusion = KEYS[family_of(model)].of_diffusers(path)
    if len(fusion.parts) == 1:
        return base_weight(shape)
    rows = [round(size * shape[1]) for size in fusion.sizes]
    return base_weight((sum(rows), shape[1])).split(rows)[fusion.parts.index(path)].clone()


def network_of(model: str) -> nn.Module:
    """A network with nothing but these layers, at their paths."""
    network = nn.Module()
    for path, layer in LAYERS[model].items():
        *parents, name = path.split(".")
        parent = network
        for component in parents:
            if not hasattr(parent, component):
                parent.add_module(component, nn.Module())
            parent = getattr(parent, component)
        parent.add_module(name, type(layer)(**options_of(layer)))
        parent.get_submodule(name).weight.data = weight_of(model, path)
    return network.requires_grad_(False)


def options_of(layer: nn.Module) -> dict:
    names = (
        ("in_features", "out_features")
        if isinstance(layer, nn.Linear)
        else ("in_channels", "out_channels", "kernel_size")
    )
    return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


def read_all(models: tuple[str, ...], folder: Path) -> dict[tuple[str, str], tuple[LoraFile, dict]]:
    """(method, model) -> the file, and what ComfyUI reports of it."""
    files = {}
    for method in KINDS:
        for model in models:
            family = FAMILIES[family_of(model)]
            config = TrainConfig(method=method, rank=8, alpha=4.0, targets="transformer+conv")
            adapter = METHODS[method].attach({"denoiser": network_of(model)}, family, config, None)
            generator = torch.Generator().manual_seed(5)
            for parameter in adapter.parameters().values():
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            base = Base(family, "base", {"denoiser": Component({}, {})}, "epsilon", False, 512)
            path = folder / f"{method}-{model}.safetensors"
            metadata = {"ss_base_model_version": family.base_model_version}
            adapter.export(adapter.parameters(), base, metadata).save(path, torch.float32)
            files[method, model] = LoraFile.read(path)
    reports = run_comfyui([(model, Path(file.name)) for (_, model), file in files.items()], base="random")
    return {key: (file, report) for (key, file), report in zip(files.items(), reports, strict=True)}


@pytest.fixture(scope="module")
def of_small_models(tmp_path_factory):
    return read_all(SMALL, tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def of_published_widths(tmp_path_factory):
    return read_all(WIDE, tmp_path_factory.mktemp("wide"))


def assert_changes_as_trained(model: str, file: LoraFile, report: dict) -> None:
    assert report["not_loaded"] == []
    assert len(file.entries) == len(LAYERS[model])
    assert len(report["changes"]) == len({KEYS[family_of(model)].of_diffusers(path).original for path in LAYERS[model]})
    for (_, path), change in file.changes(lambda module: weight_of(model, module[1])):
        fusion = KEYS[family_of(model)].of_diffusers(path)
        found = torch.tensor(report["changes"][f"diffusion_model.{fusion.original}.weight"])
        matrix = change.flatten(1) if change.ndim > 1 else change
        wanted = matrix @ probe(matrix.shape[1])
        if len(fusion.parts) > 1:
            found = found.split([round(size * matrix.shape[1]) for size in fusion.sizes])[fusion.parts.index(path)]
        assert (found - wanted).norm() <= EXACT * wanted.norm(), path


@pytest.mark.parametrize("model", SMALL)
@pytest.mark.parametrize("method", KINDS)
def test_comfyui_changes_every_weight_of_a_small_model_as_it_was_trained(of_small_models, method, model):
    assert_changes_as_trained(model, *of_small_models[method, model])


@pytest.mark.slow
@pytest.mark.parametrize("model", WIDE)
@pytest.mark.parametrize("method", KINDS)
def test_comfyui_changes_every_weight_of_published_width_as_it_was_trained(of_published_widths, method, model):
    assert_changes_as_trained(model, *of_published_widths[method, model])


def read_in_comfyui(requests: list[tuple[str, Path, Path, dict]]) -> list[dict[str, torch.Tensor]]:
    printed_by("method_reader.py", json.dumps(requests, default=str))
    files = [SafetensorsFile.open(output) for _, _, output, _ in requests]
    assert [json.loads(file.metadata["log"]) for file in files] == [[]] * len(files)
    return [dict(file) for file in files]


def test_comfyui_reads_embeddings_alone_and_within_a_lora(tmp_path):
    vectors = {part: torch.randn(3, width) for part, width in (("text_encoder", 768), ("text_encoder_2", 1280))}
    alone, bundled = {}, {}
    for family in ("sd15", "sdxl"):
        of_family = {part: vectors[part] for part in FAMILIES[family].text_encoders}
        alone[family], bundled[family] = tmp_path / f"sks-{family}.safetensors", tmp_path / f"lora-{family}.safetensors"
        LoraFile(family, {}, embedding_tensors(family, of_family)).save(alone[family], torch.float32)
        LoraFile(family, {}, bundled_tensors(family, "sks", of_family)).save(bundled[family], torch.float32)
    requests, wanted = [], []
    for files in (alone, bundled):
        for family, part, key in (("sd15", "text_encoder", "clip_l"), ("sdxl", "text_encoder", "clip_l"),
                                  ("sdxl", "text_encoder_2", "clip_g")):  # fmt: skip
            options = {"width": vectors[part].shape[1], "key": key}
            requests.append(("embedding", files[family], tmp_path / f"{len(requests)}.out", options))
            wanted.append(vectors[part])
    found = [one["vectors"] for one in read_in_comfyui(requests)]
    assert len(found) == 6 and all(map(torch.equal, found, wanted))


@pytest.mark.slow
def test_comfyui_draws_with_a_dreambooth_checkpoint_what_was_trained(tmp_path):
    base = load_base(write_checkpoint(tmp_path / "base.safetensors", COMFY_SD15, torch.float32))
    config = TrainConfig(method="dreambooth", text_encoder_lr=1e-4)
    networks = {"denoiser": base.load("denoiser", CPU, torch.float32), **base.load_text_encoders(CPU, torch.float32)}
    adapter = METHODS["dreambooth"].attach(networks, base.family, config, None)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in sorted(adapter.parameters().items()):
        parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
    tuned = tmp_path / "tuned.safetensors"
    adapter.export(adapter.parameters(), base, {}).save(tuned, torch.float32)
    (found,) = read_in_comfyui([("checkpoint", tuned, tmp_path / "out", {"seed": 2})])
    with torch.no_grad():
        text = base.family.encode_text(networks, ["a photo of sks person"], 1, 1)
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
        wanted = base.family.predict(networks["denoiser"], latents, found["timestep"], {"context": found["context"]})
    assert (found["context"] - text["context"]).norm() < 1e-2 * text["context"].norm()
    assert (found["prediction"] - wanted).norm() < 1e-2 * wanted.norm()
    with adapter.disabled(), torch.no_grad():
        before = base.family.predict(networks["denoiser"], latents, found["timestep"], {"context": found["context"]})
    assert (before - wanted).norm() > 0.1 * wanted.norm()
