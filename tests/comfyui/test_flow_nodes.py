"""Train Face LoRA and Apply LoRA on small diffusion transformers in a real server."""

from typing import Any

import pytest

import core.families
from core.lora_file import LoraFile

from .flow_files import write_denoisers, write_text_encoders, write_vae
from .graphs import Node, drawing, node, training

pytestmark = pytest.mark.comfyui

# Family -> loader of the text encoders, latents, guidance of the sampler.
CLIPS: dict[str, Node] = {
    "flux1": node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux"),
    "flux2": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="flux2"),
    "zimage": node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2"),
}
VAES = {"flux1": "ae.safetensors", "flux2": "flux2-vae.safetensors", "zimage": "ae.safetensors"}
FAMILIES = [family for family in CLIPS if family in core.families.FAMILIES]


@pytest.fixture(scope="module")
def models(comfy_folder):
    folder = comfy_folder / "models"
    write_denoisers(folder / "diffusion_models", {family: f"{family}.safetensors" for family in FAMILIES})
    for name in set(VAES.values()):
        write_vae(folder / "vae" / name)
    write_text_encoders(
        folder / "text_encoders", ["clip_l.safetensors", "t5xxl_fp16.safetensors", "qwen_3_4b.safetensors"]
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
    graph["empty"]["class_type"] = "EmptyFlux2LatentImage" if family == "flux2" else "EmptySD3LatentImage"
    return graph


def test_the_clip_of_another_family_is_refused(server, models):
    changes: dict[str, Any] = {**LINKS, "name": "wrong", "clip": ["base", 1]}
    checkpoint = {"base": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")}
    result = server.run(training(**changes) | loaders("flux1") | checkpoint)
    assert result.status == "error"
    assert "CLIP does not belong to MODEL, which is FLUX.1: texts are 64 wide there, this CLIP's 768" in result.error


@pytest.mark.parametrize("family", FAMILIES)
def test_photos_become_a_lora_that_comfyui_loads_whole_and_that_changes_the_picture(server, models, family):
    name = f"anna-{family}"
    train = training(name=name, steps=3, settings="sample_steps = 2", samples=1, **LINKS) | loaders(family)
    apply = node("FaceLoRAApply", model=["unet", 0], lora=["train", 0], lora_name="(the connected LoRA)",
                 strength_model=1.0, strength_clip=1.0)  # fmt: skip
    result = server.run(train | {"apply": apply} | picture(family, ["apply", 0]))
    assert result.status == "success", result.error + result.log
    lora = LoraFile.read(server.folder / "models" / "loras" / f"{name}.safetensors")
    assert lora.family == family
    assert lora.metadata["ss_sd_model_name"] == f"{family}.safetensors"

    theirs = node("LoraLoaderModelOnly", model=["unet", 0], lora_name=f"{name}.safetensors", strength_model=1.0)
    by_comfyui = server.run(loaders(family) | {"theirs": theirs} | picture(family, ["theirs", 0]))
    assert "not loaded" not in by_comfyui.log and "ERROR" not in by_comfyui.log
    plain = server.run(loaders(family) | picture(family, ["unet", 0]))
    assert server.drawn(by_comfyui).tobytes() == server.drawn(result).tobytes() != server.drawn(plain).tobytes()
