"""The diffusion transformers against ComfyUI's own classes: the same weights in original naming give the same.

Their text encoders and VAEs as well, where these are no older families'.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from core.models import Base, load_base, text
from core.models.families import FAMILIES, longcat_image, sd3
from core.models.spec import Conditioning, stack_conditioning
from core.storage.safetensors_file import SafetensorsFile

from .flow_files import run_model_writer
from .setup_comfyui import COMFYUI

CPU = torch.device("cpu")
MODELS = [name for name, family in FAMILIES.items() if family.flow_shift and family.names.loaded.comfyui] + [
    "sd3.large",
    "sd3.medium",
    "flux2.9b",
    "flux2.dev",
]
"""Families that ComfyUI 0.30 has, and other kinds of them."""
TEXTS = ["chroma", "zimage", "qwen-image", "krea2", "ideogram4"]
"""Families whose texts keep their length, so that a mask says what is padding."""
QWEN_TOKENIZER, T5_TOKENIZER = (COMFYUI / "comfy" / "text_encoders" / f"{name}_tokenizer" for name in ("qwen25", "t5"))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Name of a model -> what ComfyUI's own is made of and predicts."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: folder / f"{name}.safetensors" for name in MODELS}
    run_model_writer(paths)
    return paths


def part_of(file: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): file[name] for name in file if name.startswith(f"{prefix}.")}


def denoiser_base(file: Mapping[str, Tensor], prefix: str = "", **others: Any) -> Base:
    return load_base({prefix + name: tensor for name, tensor in part_of(file, "weights").items()}, **others)


def whole_base(file: Mapping[str, Tensor], **others: Any) -> Base:
    """Of one checkpoint that holds denoiser and text encoders."""
    denoiser = {f"model.diffusion_model.{name}": tensor for name, tensor in part_of(file, "weights").items()}
    return load_base(denoiser | part_of(file, "text.weights"), **others)


def cases_of(file: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    return [part_of(file, f"case{number}") for number in range(4)]


def conditioning_of(base: Base, case: Mapping[str, Tensor]) -> Conditioning:
    height, width = (side * base.latent_shape.pixels for side in case["latents"].shape[2:])
    conditioning = base.family.image_conditioning((width, height), (0, 0), (width, height))
    conditioning |= {name: case[name] for name in ("context", "pooled", "guidance") if name in case}
    return conditioning | {"context_mask": torch.ones(case["context"].shape[:2])}


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    # The most that was found: 2.3e-5 for FLUX.2, 5.6e-6 for Z-Image, 1.4e-6 for what is compared of all others.
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("model", MODELS)
def test_a_model_predicts_what_comfyuis_own_class_predicts(files, model, prefix):
    file = SafetensorsFile.open(files[model])
    base = denoiser_base(file, prefix)
    assert base.family.name == model.partition(".")[0]
    denoiser = base.load("denoiser", CPU, torch.float32)
    for case in cases_of(file):
        with torch.no_grad():
            prediction = base.family.predict(
                denoiser, case["latents"], 1000 * case["time"], conditioning_of(base, case)
            )
        assert_same(prediction, case["prediction"])


@pytest.mark.parametrize("family", [*TEXTS, "flux2.dev", "ernie-image"])
def test_texts_of_different_lengths_in_a_batch_give_what_each_gives_alone(files, family):
    file = SafetensorsFile.open(files[family])
    base, cases = denoiser_base(file), cases_of(file)[:3]
    latents, times, predictions = (
        torch.cat([case[name] for case in cases]) for name in ("latents", "time", "prediction")
    )
    together = stack_conditioning([conditioning_of(base, case) for case in cases])
    with torch.no_grad():
        ours = base.family.predict(base.load("denoiser", CPU, torch.float32), latents, 1000 * times, together)
    assert_same(ours, predictions)


def encode_captions(file: SafetensorsFile, base: Base) -> tuple[Conditioning, list[dict[str, Tensor]]]:
    """What our text encoders make of the file's captions, and what ComfyUI's makes of each."""
    captions = json.loads(file.metadata["captions"])
    with torch.no_grad():
        ours = base.family.encode_text(base.load_text_encoders(CPU, torch.float32), captions, 1, 1)
    return ours, [part_of(file, f"text.case{number}") for number in range(len(captions))]


@pytest.mark.parametrize("family", TEXTS)
def test_captions_have_the_states_that_comfyuis_text_encoder_gives(files, family):
    file = SafetensorsFile.open(files[family])
    tokenizer = T5_TOKENIZER if family == "chroma" else QWEN_TOKENIZER
    if family == "ideogram4":  # whose text encoder is known by its width, or by its name in a checkpoint
        norm = "text.weights.text_encoders.qwen3vl_8b.transformer.model.norm.weight"  # which is not used
        base = whole_base({name: file[name] for name in file} | {norm: torch.ones(16)}, tokenizer=tokenizer)
    else:
        kind = {"chroma": "t5xxl", "zimage": "qwen3_4b", "qwen-image": "qwen25_7b", "krea2": "qwen3vl_4b"}[family]
        encoder = part_of(file, f"text.weights.text_encoders.{kind}.transformer")
        if family != "chroma":
            encoder |= {"lm_head.weight": torch.zeros(1), "visual.proj.weight": torch.zeros(1)}
        if family == "krea2":  # the half that sees pictures tells Qwen3-VL from Qwen3
            encoder["visual.deepstack_merger_list.0.norm.weight"] = torch.zeros(1)
        base = denoiser_base(file, text_encoders=[encoder], tokenizer=tokenizer)
    together, cases = encode_captions(file, base)
    assert cases
    padding = int(family == "chroma")  # the authors' one token, which ComfyUI leaves out
    for states, mask, case in zip(together["context"], together["context_mask"], cases, strict=True):
        assert_same(states[: int(mask.sum()) - padding], case["context"][0])
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)


@pytest.mark.parametrize("model", ["flux2", "flux2.9b"])
def test_flux2s_captions_fill_512_tokens_as_in_comfyui(files, model):
    file = SafetensorsFile.open(files[model])
    ours, cases = encode_captions(file, whole_base(file, tokenizer=QWEN_TOKENIZER))
    assert_same(ours["context"], torch.cat([case["context"] for case in cases]))


def test_longcat_images_captions_fill_512_tokens_as_in_comfyui(files, monkeypatch):
    monkeypatch.setattr(longcat_image, "_PADDING_AT", None)  # ComfyUI counts the positions on
    file = SafetensorsFile.open(files["longcat-image"])
    ours, cases = encode_captions(file, whole_base(file, tokenizer=QWEN_TOKENIZER))
    # In the place of no caption ComfyUI has a space.
    assert_same(ours["context"][1:], torch.cat([case["context"] for case in cases[1:]]))


def test_sd3s_captions_have_the_states_of_both_clips_and_of_t5_as_in_comfyui(files, monkeypatch):
    monkeypatch.setattr(sd3, "TEXT_TOKENS", 77)  # ComfyUI fills up to so many, diffusers and sd-scripts to 256
    # ComfyUI's denoiser takes 4096 wide states, for which T5's table of tokens would have half a gigabyte.
    monkeypatch.setattr(text, "check_encoders", lambda *_: None)
    file = SafetensorsFile.open(files["sd3"])
    ours, cases = encode_captions(file, whole_base(file, tokenizer=T5_TOKENIZER))
    of_clips, of_t5 = ours["context"].split(77, dim=1)
    assert_same(of_clips, torch.cat([case["context"] for case in cases])[..., : of_clips.shape[2]])
    assert_same(of_t5, torch.cat([case["of_t5"] for case in cases]))
    assert_same(ours["pooled"], torch.cat([case["pooled"] for case in cases]))


@pytest.mark.parametrize("family", ["sd3", "flux2", "qwen-image"])
def test_a_vae_gives_what_comfyuis_gives(files, family):
    file = SafetensorsFile.open(files[family])
    base, case = denoiser_base(file, vae=part_of(file, "vae.weights")), part_of(file, "vae.case0")
    vae = base.load("vae", CPU, torch.float32)
    assert case["latents"].shape[3] * base.latent_shape.pixels == case["pixels"].shape[3]
    with torch.no_grad():
        assert_same(base.family.encode_image(vae, case["pixels"])[0], case["latents"])
        decoded = base.family.decode_latents(vae, case["latents"])
        assert_same(decoded.clamp(-1, 1), case["decoded"].clamp(-1, 1))
    in_diffusers_names = denoiser_base(file, vae=vae.state_dict())
    assert in_diffusers_names.components["vae"].config == base.components["vae"].config
    torch.testing.assert_close(in_diffusers_names.load("vae", CPU, torch.float32).state_dict(), vae.state_dict())
