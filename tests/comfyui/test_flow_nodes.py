"""Train Face LoRA and Apply LoRA on small diffusion transformers in a real server."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.lora.convert import convert_lora
from core.lora.file import LoraFile
from core.models import load_base
from core.tensor_names import NAME_TABLES

from .flow_files import CLIPS, VAES
from .graphs import BASE, Node, drawing, node, training
from .lora_changes import (
    EXACT,
    Changes,
    changes_of,
    comfyui_changes,
    compare,
    in_original_names,
    of_diffusers,
    run_comfyui,
)


def loaders(family: str) -> dict[str, Node]:
    return {
        "unet": node("UNETLoader", unet_name=f"{family}.safetensors", weight_dtype="default"),
        "clip": CLIPS[family],
        "vae": node("VAELoader", vae_name=VAES[family]),
    }


LINKS: dict[str, Any] = {"model": ["unet", 0], "clip": ["clip", 0], "vae": ["vae", 0]}


def picture(family: str, model: list) -> dict[str, Node]:
    graph = drawing(model, ["clip", 0], ["vae", 0])
    of_flux2 = VAES[family].startswith("flux2")
    graph["empty"]["class_type"] = "EmptyFlux2LatentImage" if of_flux2 else "EmptySD3LatentImage"
    return graph


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ("sdxl.safetensors", "texts are 64 wide there, this CLIP has 192"),
        ("sd15.safetensors", "pooled texts are 48 wide there, this CLIP has 64"),
    ],
)
def test_the_clip_of_another_family_is_refused(server, flow_models, checkpoint, words):
    changes: dict[str, Any] = {**LINKS, "name": "wrong", "clip": ["base", 1]}
    graph = training(**changes) | loaders("flux1") | {"base": node("CheckpointLoaderSimple", ckpt_name=checkpoint)}
    error = server.error(graph)
    assert f"CLIP does not belong to MODEL, which is FLUX.1: {words}" in error


def test_the_vae_of_another_family_is_refused(server, flow_models):
    changes: dict[str, Any] = {"name": "wrong", "vae": ["vae", 0]}
    error = server.error(training(**changes) | BASE | {"vae": loaders("flux2")["vae"]})
    assert "vae: it makes latents with 128 channels, but MODEL needs 4" in error


def training_of(family: str) -> dict[str, Node]:
    return training(name=f"anna-{family}", steps=3, settings="sample_steps = 2", samples=1, **LINKS) | loaders(family)


@pytest.fixture(scope="module")
def trained(server, flow_models) -> dict[str, Path]:
    """Family -> the LoRA that Train Face LoRA has made."""
    files = {}
    for family in CLIPS:
        server.result(training_of(family))
        files[family] = server.folder / "models" / "loras" / f"anna-{family}.safetensors"
    return files


@pytest.mark.parametrize("family", CLIPS)
def test_photos_become_a_lora_that_comfyui_loads_whole_and_that_changes_the_picture(server, trained, family):
    lora = LoraFile.read(trained[family])
    assert lora.family == family
    assert lora.metadata["ss_sd_model_name"] == f"{family}.safetensors"

    apply = node("FaceLoRAApply", model=["unet", 0], lora=["train", 0], lora_name="(the connected LoRA)",
                 strength_model=1.0, strength_clip=1.0)  # fmt: skip
    result = server.result(training_of(family) | {"apply": apply} | picture(family, ["apply", 0]))
    theirs = node("LoraLoaderModelOnly", model=["unet", 0], lora_name=f"anna-{family}.safetensors", strength_model=1.0)
    by_comfyui = server.run(loaders(family) | {"theirs": theirs} | picture(family, ["theirs", 0]))
    assert "not loaded" not in by_comfyui.log and "ERROR" not in by_comfyui.log
    plain = server.run(loaders(family) | picture(family, ["unet", 0]))
    assert server.drawn(by_comfyui).tobytes() == server.drawn(result).tobytes() != server.drawn(plain).tobytes()


@pytest.mark.parametrize(
    ("family", "method"), [("flux1", "dora"), pytest.param("zimage", "lokr", marks=pytest.mark.slow)]
)
def test_another_kind_of_adapter_is_applied_as_comfyui_applies_it(server, flow_models, family, method):
    name = f"{method}-{family}"
    settings = f"method = '{method}'\nlearning_rate = 0.05"
    run = training(name=name, steps=3, settings=settings, samples=0, **LINKS)
    apply = node("FaceLoRAApply", model=["unet", 0], lora=["train", 0], lora_name="(the connected LoRA)",
                 strength_model=1.0, strength_clip=1.0)  # fmt: skip
    ours = server.result(loaders(family) | run | {"apply": apply} | picture(family, ["apply", 0]))
    theirs = node("LoraLoaderModelOnly", model=["unet", 0], lora_name=f"{name}.safetensors", strength_model=1.0)
    by_comfyui = server.run(loaders(family) | {"theirs": theirs} | picture(family, ["theirs", 0]))
    assert "not loaded" not in by_comfyui.log and "ERROR" not in by_comfyui.log
    plain = server.run(loaders(family) | picture(family, ["unet", 0]))
    found, expected, before = (np.asarray(server.drawn(result), int) for result in (ours, by_comfyui, plain))
    assert abs(found - expected).max() <= 2
    assert abs(found - before).max() > 8


def test_comfyui_and_diffusers_change_every_weight_as_the_trained_files_say(server, trained):
    assert trained
    by_comfyui = run_comfyui([(f"small-{family}", path) for family, path in trained.items()])
    for (family, path), result in zip(trained.items(), by_comfyui, strict=True):
        lora = LoraFile.read(path)
        modules = lora.modules()
        assert result["not_loaded"] == []
        assert_exact(comfyui_changes(result, "diffusion_model."), in_original_names(family, modules))

        # In Kohya's names diffusers reads nothing of SD3, and FLUX.1 at its real width alone.
        if lora.scheme == "kohya":
            lora, _ = convert_lora(lora, "diffusers")
        if "diffusers" not in NAME_TABLES[family].loaded.diffusers:  # LongCat-Image's pipeline loads no LoRAs
            continue
        base = load_base(server.folder / "models" / "diffusion_models" / f"{family}.safetensors")
        denoiser = base.load("denoiser", torch.device("cpu"), torch.float32)
        assert_exact(of_diffusers(family, lora, denoiser), changes_of(modules))


def assert_exact(found: Changes, wanted: Changes) -> None:
    assert set(found) == set(wanted)
    assert compare(found, wanted).deviation < EXACT
