"""Ideogram 4 against diffusers' pipeline: the same steps and picture; names of its LoRAs, and what methods leave out."""

from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_ideogram4 import Ideogram4MRoPE
from diffusers.pipelines.ideogram4 import pipeline_ideogram4
from torch import Tensor

from core.config import TrainConfig
from core.errors import UnknownFamily
from core.lora.file import LoraFile
from core.models import load_base, text
from core.models.families import FAMILIES, detect_family, ideogram4
from core.pictures.sampling import decode_latents, encode_prompts, sample_latents
from core.training.callbacks import Callbacks
from core.training.loop import train_lora
from core.training.methods import METHODS
from core.training.methods.method import target_modules
from tests.models.family_parts import CPU, error_of, pipeline_with, write_folder
from tests.models.references import REFERENCES
from tests.tooling import cache_of, small_flow_base

pytestmark = pytest.mark.ci

FAMILY, REFERENCE = FAMILIES["ideogram4"], REFERENCES["ideogram4"]


@pytest.fixture
def network(monkeypatch) -> Any:
    """The text encoder of a folder, small, with a tokenizer of few words."""
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: REFERENCE.words)
    return REFERENCE.encoder()


@pytest.fixture
def folder(tmp_path, network):
    """A diffusers folder with both denoisers."""
    denoiser = REFERENCE.denoiser("ideogram4")
    denoiser.save_pretrained(tmp_path / "unconditional_transformer")
    return write_folder(tmp_path, small_flow_base("ideogram4"), network, denoiser)


def test_positions_beyond_65536_are_told_apart_in_16_bits_too():
    """The published model's rotary embedding, of which bf16 knows no two positions of a picture of 512 px."""
    theirs = Ideogram4MRoPE(256, 5_000_000, ideogram4.ROTARY_SECTIONS)
    ids, *_ = diffusers.Ideogram4Pipeline._prepare_ids([5], 3, 4, 5, CPU)
    cosines, sines = theirs(ids)
    sizes = type("Config", (), {"attention_head_dim": 256, "rope_theta": 5_000_000, "mrope_section": (24, 20, 20)})
    with torch.autocast("cpu", torch.bfloat16):
        ours = ideogram4._rotations(5, (3, 4), sizes, CPU)
    assert {table.dtype for table in ours} == {torch.float32}
    torch.testing.assert_close(ours[0], cosines[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[1][:, 128:], sines[0, :, 128:], rtol=0, atol=1e-5)
    assert len(ours[0].unique(dim=0)) == 5 + 3 * 4


def test_a_caption_that_is_too_long_keeps_the_end_of_the_chat(folder, monkeypatch):
    monkeypatch.setattr(ideogram4, "TEXT_TOKENS", 12)
    encoders = load_base(folder).load_text_encoders(CPU, torch.float32)
    with torch.no_grad():
        ours = FAMILY.encode_text(encoders, ["word " * 30, "word word"], 1, 1)
    assert ours["context_mask"].sum(1).tolist() == [12, 11]


def by_patch(values: tuple[float, ...]) -> Tensor:
    """Numbers of the channels of our latents in the order of the authors', which is by the place in a patch."""
    return torch.tensor(values).view(32, 4).T.flatten()


@torch.no_grad()
def test_the_steps_and_the_picture_are_those_of_diffusers_pipeline(folder, network, monkeypatch):
    """The folder's VAE has the authors' statistics in the order of their patches, FLUX.2's has others; none are read here."""
    base = load_base(folder)
    vae = base.load("vae", CPU, torch.float32)
    their_vae: Any = base.load("vae", CPU, torch.float32)
    their_vae.bn.running_mean.copy_(by_patch(ideogram4._MEANS))
    their_vae.bn.running_var.copy_(by_patch(ideogram4._DEVIATIONS) ** 2)
    their_vae.register_to_config(batch_norm_eps=0.0)
    encoders = base.load_text_encoders(CPU, torch.float32)
    positive, negative = (
        encode_prompts(base, encoders, [caption]) for caption in ("a photo of sks person", "sks person")
    )
    denoiser = base.load("denoiser", CPU, torch.float32)
    latents = sample_latents(
        base, denoiser, positive, negative, device=CPU, dtype=torch.float32, seeds=[3], size=(32, 48), steps=3, guidance=1.0
    )  # fmt: skip
    (picture,) = decode_latents(base, vae, latents)
    scale = 32 // base.latent_shape.pixels, 48 // base.latent_shape.pixels
    noise = torch.randn(128, scale[1], scale[0], generator=torch.Generator().manual_seed(3))
    pipe = pipeline_with(
        diffusers.Ideogram4Pipeline, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=their_vae,
        text_encoder=network, tokenizer=REFERENCE.words, transformer=REFERENCE.denoiser("ideogram4"),
        unconditional_transformer=REFERENCE.denoiser("ideogram4"),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    times = base.schedule().sampling_times(3, noise[None])[:-1]  # pyright: ignore
    monkeypatch.setattr(pipeline_ideogram4, "_logit_normal_sigmas", lambda *_, **__: times)
    tokens = noise.view(32, 4, -1).permute(2, 1, 0).reshape(1, -1, 128)
    settings = {"height": 48, "width": 32, "num_inference_steps": 3, "guidance_scale": 1.0, "guidance_schedule": None,
                "max_sequence_length": 40, "latents": tokens}  # fmt: skip
    (theirs,) = pipe("a photo of sks person", **settings, output_type="latent").images
    theirs = theirs.view(scale[1], scale[0], 4, 32).permute(3, 2, 0, 1).reshape(latents[0].shape)
    assert error_of(latents[0], theirs) < 1e-4
    (expected,) = pipe("a photo of sks person", **settings, output_type="pt").images
    found = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(48, 32, 3).permute(2, 0, 1) / 255
    assert (found - expected).abs().max() < 0.02 and expected.std() > 0.02


def test_latents_are_normalised_by_the_authors_numbers():
    """The first and last of `LATENT_SHIFT` and `LATENT_SCALE` in the authors' code, where a VAE's channel runs the fastest."""
    means, deviations = by_patch(ideogram4._MEANS), by_patch(ideogram4._DEVIATIONS)
    assert means[[0, 1, 127]].tolist() == pytest.approx([0.01984364, 0.10149707, -0.01760592], abs=5e-5)
    assert deviations[[0, 1, 127]].tolist() == pytest.approx([1.63933691, 1.70204478, 1.68533454], abs=5e-5)


@torch.no_grad()
def test_a_decoded_picture_is_encoded_to_its_latents():
    vae = small_flow_base("ideogram4").load("vae", CPU, torch.float32)
    pixels = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(3)) * 2 - 1
    mean, deviation = FAMILY.encode_image(vae, pixels)
    distribution: Any = vae.encode(pixels).latent_dist  # pyright: ignore
    torch.testing.assert_close(FAMILY.decode_latents(vae, mean), vae.decode(distribution.mean).sample)  # pyright: ignore
    other, _ = FAMILY.encode_image(vae, pixels.flip(3))
    assert deviation.shape == mean.shape and not torch.allclose(mean, other)


@pytest.mark.parametrize("side", [512, 1024, 2048])
def test_times_are_close_to_those_of_the_authors_preset_of_20_steps(side):
    base = small_flow_base("ideogram4")
    positions = side // 16
    ours = base.schedule().sampling_times(20, torch.zeros(1, 128, positions, positions))  # pyright: ignore
    mu = 0.5 * torch.log(torch.tensor(side * side / 512**2)).item()
    theirs = pipeline_ideogram4._logit_normal_sigmas(20, mu, std=1.75)  # the deviation of V4_DEFAULT_20
    assert (ours[:-1] - theirs).abs().max() < 0.025


@pytest.mark.parametrize("other", ["zimage", "ernie-image", "krea2"])
def test_files_of_neighbours_are_not_taken_for_it(other):
    names = small_flow_base(other).load("denoiser", CPU, torch.float32).state_dict()
    try:
        found = detect_family({f"model.diffusion_model.{name}": tensor for name, tensor in names.items()})
    except UnknownFamily:
        return
    assert found is not FAMILY


def lora_of(names: dict[str, int], suffixes: tuple[str, str], alpha: bool) -> dict[str, Tensor]:
    """A LoRA of rank 2 on modules of the published width, by name -> outputs."""
    tensors = {}
    for name, outputs in names.items():
        tensors[name + suffixes[0]] = torch.randn(2, 4608)
        tensors[name + suffixes[1]] = torch.randn(outputs, 2)
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
    return tensors


NAMINGS = {
    "ai-toolkit": (
        {"diffusion_model.layers.3.attention.qkv": 3 * 4608, "diffusion_model.layers.3.attention.o": 4608},
        (".lora_A.weight", ".lora_B.weight"), False,
    ),
    "musubi-tuner": (
        {"lora_unet_layers_3_attention_qkv": 3 * 4608, "lora_unet_layers_3_attention_o": 4608},
        (".lora_down.weight", ".lora_up.weight"), True,
    ),
    "OneTrainer": (
        {f"transformer.layers.3.attention.{name}": 4608 for name in ("to_q", "to_k", "to_v", "to_out.0")},
        (".lora_down.weight", ".lora_up.weight"), True,
    ),
    "diffusers": (
        {f"transformer.layers.3.attention.{name}": 4608 for name in ("to_q", "to_k", "to_v", "to_out.0")},
        (".lora_A.weight", ".lora_B.weight"), False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("naming", NAMINGS)
def test_loras_of_other_trainers_are_known_by_their_width_and_have_the_same_modules(naming):
    lora = LoraFile.from_tensors(lora_of(*NAMINGS[naming]), {}, naming)
    assert lora.family == "ideogram4" and not lora.unknown_keys
    paths = {path for entry in lora.entries for _, path in entry.modules}
    assert paths == {f"layers.3.attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}


@pytest.mark.parametrize("method", ["dora", "loha", "lokr", "oft"])
def test_other_kinds_of_adapter_leave_out_q_k_and_v_which_comfyui_knows_as_one(method):
    denoiser = small_flow_base("ideogram4").load("denoiser", CPU, torch.float32)
    ends = {}
    for kind in ("lora", method):
        config = TrainConfig(method=kind, rank=2, targets="attention")
        adapted = target_modules(FAMILY, config, {"denoiser": denoiser}, METHODS[kind].joins_modules)
        ends[kind] = {path.rpartition("attention.")[2] for _, path in adapted}
    assert ends == {"lora": {"to_q", "to_k", "to_v", "to_out.0"}, method: {"to_out.0"}}


@pytest.mark.parametrize("method", ["lora", "lokr"])
def test_a_training_says_once_what_its_method_leaves_out(method):
    base, warnings = small_flow_base("ideogram4"), []
    config = TrainConfig(method=method, rank=2, steps=2, targets="attention", precision="fp32")
    train_lora(cache_of(base, side=4), base, config, device=CPU, callbacks=Callbacks(on_warning=warnings.append))
    left_out = (
        "method 'lokr' leaves out 6 modules of targets = 'attention', such as layers.0.attention.to_q: they are parts of one "
        "layer in files of ideogram4, where only method 'lora' fits"
    )
    assert warnings == ([] if method == "lora" else [left_out])
