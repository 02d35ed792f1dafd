"""`base.pipeline()`: what diffusers itself loads of the same weights."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from core.errors import BadConfig, FaceLoraError, MissingPackage
from core.models import load_base
from core.models.clip import TOKENIZER_FOLDER
from core.models.spec import Component
from tests.models.test_base_files import state_of
from tests.tooling import SMALL_SD15, SMALL_SDXL, Shape, configs, small_flow_base

CPU = torch.device("cpu")
DRAW = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "np"}


def write_folder(folder: Path, shape: Shape, prediction: Literal["epsilon", "v_prediction"]) -> None:
    """What diffusers and transformers save of networks that they have made themselves, with first weights."""
    torch.manual_seed(1)
    parts, networks = configs(shape), {}
    for part, padding in (("text_encoder", "<|endoftext|>"), ("text_encoder_2", "!")):
        if part in parts:
            network = CLIPTextModelWithProjection if part == "text_encoder_2" else CLIPTextModel
            networks[part] = network(CLIPTextConfig(**parts[part]))
            tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER, pad_token=padding)
            networks[part.replace("text_encoder", "tokenizer")] = tokenizer
    if shape.family == "sd15":
        networks |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    made = {"sd15": diffusers.StableDiffusionPipeline, "sdxl": diffusers.StableDiffusionXLPipeline}[shape.family]
    made(
        unet=diffusers.UNet2DConditionModel(**parts["denoiser"], sample_size=32),  # pyright: ignore
        vae=diffusers.AutoencoderKL(**parts["vae"]),  # pyright: ignore
        scheduler=diffusers.DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type=prediction,
        ),
        **networks,
    ).save_pretrained(folder)  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "prediction"),
    [(SMALL_SD15, "v_prediction"), pytest.param(SMALL_SDXL, "epsilon", marks=pytest.mark.slow)],
)
def test_its_pictures_are_those_of_the_pipeline_that_diffusers_loads(tmp_path, shape, prediction):
    write_folder(tmp_path, shape, prediction)
    pictures = []
    loaded: Any = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    for pipeline in (load_base(tmp_path).pipeline(), loaded):
        assert type(pipeline).__name__ == json.loads((tmp_path / "model_index.json").read_text())["_class_name"]
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(7)
        pictures.append(pipeline("a photo of sks person", negative_prompt="blurry", generator=generator, **DRAW).images)
    ours, theirs = pictures
    assert ours.shape == (1, 64, 64, 3) and ours.std() > 0.01
    assert np.array_equal(ours, theirs)


def test_its_weights_are_those_of_the_file_where_they_have_the_dtype(small_sd15):
    base = load_base(small_sd15)
    name, tensor = next(iter(base.components["denoiser"].tensors.items()))
    pipeline = base.pipeline(dtype=tensor.dtype)
    assert pipeline.unet.get_parameter(name).data_ptr() == tensor.data_ptr()
    assert pipeline.text_encoder.dtype == pipeline.vae.dtype == tensor.dtype


def test_sd3s_first_text_encoder_has_a_projection_and_t5_may_be_missing():
    base, clips = small_flow_base("sd3"), {}
    for part, kind, width in (("text_encoder", "clip_l", 64), ("text_encoder_2", "clip_g", 128)):
        config = SMALL_SDXL.text[part]
        clips[part] = Component(config, state_of(kind, config))
        assert ("text_projection.weight" in clips[part].tensors) == (kind == "clip_g") and config[
            "hidden_size"
        ] == width
    base = replace(base, components={**base.components, **clips}, caption_encoder=None)
    pipeline = base.pipeline()
    assert isinstance(pipeline, diffusers.StableDiffusion3Pipeline) and pipeline.text_encoder_3 is None
    assert pipeline.scheduler.config["shift"] == 3.0 and not pipeline.scheduler.config["use_dynamic_shifting"]
    prompts = ["a photo of sks person", "sks"]
    with torch.no_grad():
        _, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
        ours = base.family.encode_text(base.load_text_encoders(CPU, torch.float32), prompts, 1, 1)
    torch.testing.assert_close(ours["pooled"], pooled, rtol=1e-4, atol=1e-5)


def test_of_a_family_without_a_pipeline_one_line_names_it(small_sd15):
    base = load_base(small_sd15)
    unknown = replace(base, family=replace(base.family, pipeline_class="NoSuchPipeline"))
    for asked, dtype, error, words in (
        (unknown, torch.float32, MissingPackage, "Stable Diffusion 1.x: diffusers .* lacks NoSuchPipeline"),
        (small_flow_base("zimage"), torch.float32, BadConfig, "Z-Image: .* ZImagePipeline needs the whole of Qwen3-4B"),
        (small_flow_base("flux1"), torch.float16, BadConfig, "FLUX.1: .*T5 overflows in it"),
        (small_flow_base("flux1"), torch.bfloat16, FaceLoraError, "has no text encoder. Give its file too"),
    ):
        with pytest.raises(error, match=words):
            asked.pipeline(dtype=dtype)
