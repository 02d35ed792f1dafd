"""A generated picture dropped on ComfyUI's page becomes the graph that makes it."""

import base64
from pathlib import Path

import pytest
import torch
from PIL import Image

from core import GenerateConfig, LoraFile, PictureJob, load_base
from core.demo import BASE_FILE
from core.pictures.generate import Picture, parameters_text

OPEN_FILE = """async ([name, data]) => {
    const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))
    await window.app.handleFile(new File([bytes], name, { type: "image/png" }))
}"""


@pytest.mark.parametrize("negative", ["", "blurry, café"])
def test_prompt_seed_sampler_and_lora_are_read_from_a_picture(page, server, tmp_path: Path, negative: str) -> None:
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.zeros(2, 64), f"{name}.lora_up.weight": torch.zeros(64, 2)}
    path = server.folder / "models" / "loras" / "zoe.safetensors"
    LoraFile.from_tensors(tensors, {"ss_base_model_version": "sd_v1"}).save(path)
    job = PictureJob("a photo of sks person, late sun", 7, negative, (64, 128), steps=2, guidance=3.5, strength=0.5)
    text = parameters_text(load_base(BASE_FILE), [(LoraFile.read(path), 0.8)], job, GenerateConfig())
    Picture(Image.new("RGB", (64, 128)), job, text).save(tmp_path / "a.png")

    page.reload()  # so that the loader's list has the new file
    page.run(OPEN_FILE, ["a.png", base64.b64encode((tmp_path / "a.png").read_bytes()).decode()])
    page.wait_for("() => window.app.graph.nodes.some((node) => node.type === 'LoraLoader')")
    nodes = list(page.prompt().values())
    inputs = {node["class_type"]: node["inputs"] for node in nodes}
    expected = {
        "KSampler": {"seed": 7, "steps": 2, "cfg": 3.5, "sampler_name": "dpmpp_2m", "scheduler": "karras"},
        "EmptyLatentImage": {"width": 64, "height": 128},
        "LoraLoader": {"lora_name": "zoe.safetensors", "strength_model": 0.4, "strength_clip": 0.4},
    }
    assert {kind: {key: inputs[kind][key] for key in values} for kind, values in expected.items()} == expected
    texts = {node["inputs"]["text"].strip() for node in nodes if node["class_type"] == "CLIPTextEncode"}
    assert texts == {job.prompt, negative}
