"""Other methods than LoRA through the nodes, in a real server."""

import json
import re

import pytest
import torch

from core.lora.embeddings import WORD_KEY, embedding_tensors, embeddings_of
from core.lora.file import LoraFile
from core.lora.modules import name_kinds
from core.models import load_base
from core.storage.safetensors_file import SafetensorsFile
from core.training.methods.dreambooth import original_tensors

from .graphs import BASE, drawing, node, training

STRENGTH = 0.6


def apply(lora: str) -> dict:
    return node(
        "FaceLoRAApply", model=["base", 0], clip=["base", 1], lora_name=lora, strength_model=STRENGTH, strength_clip=1.0
    )


@pytest.fixture(scope="module")
def base(server):
    return load_base(server.folder / "models" / "checkpoints" / "sd15.safetensors")


def check_applied(server, base, name: str) -> None:
    """The weights in ComfyUI with the LoRA of that name on them are core's."""
    graph = {"apply": apply(f"{name}.safetensors"), "write": node("TestPatchedWeights", model=["apply", 0], name=name)}
    result = server.result(BASE | graph)
    assert "not loaded" not in result.log and "ERROR" not in result.log
    file = LoraFile.read(server.folder / "models" / "loras" / f"{name}.safetensors")
    parts = {part: dict(component.tensors) for part, component in base.components.items()}
    before = dict(original_tensors(base, parts))
    for (part, path), change in file.changes(lambda module: parts[module[0]][f"{module[1]}.weight"].float()):
        weight = parts[part][f"{path}.weight"].float()
        parts[part][f"{path}.weight"] = weight + STRENGTH * change.reshape(weight.shape)
    wanted = original_tensors(base, parts)
    found = SafetensorsFile.open(server.folder / "output" / name)
    assert len(found) == len(file.entries)
    for key, weight in found.items():
        error = (weight.float() - wanted[f"model.{key}"]).norm()
        assert error <= 1e-3 * (wanted[f"model.{key}"] - before[f"model.{key}"].float()).norm() > 0, key


@pytest.mark.parametrize("method", ["dora", "loha", "lokr", "oft"])
def test_what_was_trained_is_applied_as_core_applies_it_at_any_strength(server, base, method):
    server.result(training(name=method, settings=f"method = '{method}'"))
    check_applied(server, base, method)


def test_a_butterfly_of_rotations_is_applied_as_core_applies_it(server, base):
    """BOFT (arXiv:2311.06243), which nothing here trains; without an alpha ComfyUI's own loader fails at it."""
    blocks = 0.1 * torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(1))  # of 128 rows
    module = ("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    file = LoraFile(
        "sd15", {"ss_base_model_version": "sd_v1"}, name_kinds(base.names, {module: {"oft_blocks": blocks}})
    )
    file.save(server.folder / "models" / "loras" / "boft.safetensors", torch.float32)
    check_applied(server, base, "boft")


TRANSFORMER = "mid_block.attentions.0"


@pytest.mark.parametrize(
    ("name", "path", "layout"),
    [
        ("inputs of a Linear", f"{TRANSFORMER}.transformer_blocks.0.attn1.to_q", (1, -1)),
        ("outputs of a Linear", f"{TRANSFORMER}.transformer_blocks.0.attn1.to_q", (-1, 1)),
        ("outputs of a convolution of one pixel, as sd-scripts writes it", f"{TRANSFORMER}.proj_in", (-1, 1)),
        ("outputs of a convolution", "mid_block.resnets.0.conv1", (-1, 1, 1, 1)),
    ],
)
def test_a_magnitude_in_any_layout_is_applied_as_core_applies_it(server, base, name, path, layout):
    roles = dora(base.components["denoiser"].tensors[f"{path}.weight"].float(), layout)
    file = LoraFile("sd15", {"ss_base_model_version": "sd_v1"}, name_kinds(base.names, {("denoiser", path): roles}))
    file.save(server.folder / "models" / "loras" / f"{name}.safetensors", torch.float32)
    check_applied(server, base, name)


def test_a_magnitude_and_an_alpha_as_peft_writes_them_are_applied_as_core_applies_them(server, base):
    """ComfyUI has the name of this module, but knows neither `lora_magnitude_vector` nor an alpha in the metadata."""
    path = f"{TRANSFORMER}.proj_in"
    roles = dora(base.components["denoiser"].tensors[f"{path}.weight"].float(), (-1,))
    names = {"down": "lora_A.weight", "up": "lora_B.weight", "dora": "lora_magnitude_vector"}
    tensors = {f"unet.{path}.{suffix}": roles[role] for role, suffix in names.items()}
    config = json.dumps({"unet.r": 4, "unet.lora_alpha": 2, "unet.use_dora": True})
    file = LoraFile.from_tensors(tensors, {"lora_adapter_metadata": config})
    file.save(server.folder / "models" / "loras" / "peft.safetensors", torch.float32)
    check_applied(server, base, "peft")


def dora(weight: torch.Tensor, layout: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Role -> tensor of a DoRA of rank 4, alpha 2, whose magnitude is for each input where the layout begins with 1."""
    random = torch.Generator().manual_seed(1)
    rows, columns, *kernel = weight.shape
    norms = (weight.transpose(0, 1) if layout[0] == 1 else weight).flatten(1).norm(dim=1)
    return {
        "down": torch.randn(4, columns, *kernel, generator=random) / columns,
        "up": torch.randn(rows, 4, *[1] * len(kernel), generator=random),
        "alpha": torch.tensor(2.0),
        "dora": (norms * (1 + 0.1 * torch.randn(len(norms), generator=random))).reshape(layout),
    }


def test_pivotal_tuning_writes_its_word_where_prompts_find_it(server):
    server.result(training(name="my anna", settings="method = 'pivotal'\nembedding_lr = 0.5"))
    file = LoraFile.read(server.folder / "models" / "loras" / "my anna.safetensors")
    (embedding,) = (server.folder / "models" / "embeddings").glob("my_anna-????????.safetensors")
    written = LoraFile.read(embedding)
    assert written.metadata[WORD_KEY] == "sks"
    (vectors,), (bundled,) = ([one["text_encoder"] for one in embeddings_of(lora).values()] for lora in (written, file))
    assert vectors.equal(bundled)

    graph = BASE | {"apply": apply("my anna.safetensors"), "show": node("PreviewAny", source=["apply", 3])}
    pictures = []
    for prompt in (["apply", 3], "a photo of sks person"):
        result = server.result(graph | drawing(["apply", 0], ["apply", 1], ["base", 2], prompt=prompt))
        assert "warning, embedding" not in result.log, "what ComfyUI says where it has no such embedding"
        pictures.append(server.drawn(result).tobytes())
    assert result.outputs["show"]["text"] == [f"a photo of embedding:{embedding.stem} person"]
    assert pictures[0] != pictures[1]

    other = server.run(training(name="my anna", settings="method = 'pivotal'\nembedding_lr = 0.25"))
    assert other.status == "success" and LoraFile.read(embedding).model_hash == written.model_hash, "not overwritten"

    embedding.unlink()
    server.post("/free", {"free_memory": True, "unload_models": True})
    again = server.run(training(name="my anna", settings="method = 'pivotal'\nembedding_lr = 0.5"))
    assert again.status == "success" and embedding.exists(), "the file is found again, and its word with it"


def test_a_word_that_the_embeddings_folder_does_not_have_is_named(server):
    loras = server.folder / "models" / "loras"
    server.result(training(name="frida", settings="method = 'pivotal'"))
    (loras / "frida.safetensors").rename(loras / "carl.safetensors")
    result = server.run(BASE | {"apply": apply("carl.safetensors"), "show": node("PreviewAny", source=["apply", 2])})
    assert result.outputs["show"]["text"] == ["sks person"]
    (text,) = result.outputs["apply"]["text"]
    assert re.search(
        r"sks needs its own vectors, but carl-\w{8}\.safetensors is missing from the embeddings folder", text
    )


def test_apply_refuses_a_file_of_embeddings_and_names_the_folder_for_it(server):
    tensors = embedding_tensors("sd15", {"text_encoder": torch.zeros(2, 768)})
    LoraFile("sd15", {}, tensors).save(server.folder / "models" / "loras" / "word.safetensors")
    error = server.error(BASE | {"apply": apply("word.safetensors"), "show": node("PreviewAny", source=["apply", 2])})
    assert "word.safetensors: changes no weight" in error and "embeddings folder" in error


@pytest.mark.parametrize("method", ["textual-inversion", "dreambooth"])
def test_a_method_that_does_not_make_a_lora_is_refused_and_facelora_train_named(server, method):
    error = server.error(training(settings=f"method = '{method}'"))
    assert f"method = '{method}' doesn't make a LoRA" in error
    assert "facelora train" in error
