"""Qwen-Image 2.1 against diffusers: the same weights under the published names, the same captions."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import convert_qwen_image21_transformer_checkpoint_to_diffusers
from torch import Tensor

from core.lora.file import LoraFile
from core.models import Base, load_base, text
from core.models.families import FAMILIES
from core.pictures.generate import PictureJob, generate
from tests.models.family_parts import (
    assert_diffusers_loads_whole,
    error_of,
    numbers_of,
    pipeline_with,
    random_texts,
    rough_weights,
    small_qwen3vl,
    write_folder,
)
from tests.tooling import small_flow_base

pytestmark = pytest.mark.ci

CPU = torch.device("cpu")
FAMILY = FAMILIES["qwen-image-21"]
WIDTH = 64
CAPTIONS = ["", "a photo of sks person", "sks person, outdoors, in the evening sun"]


def random_denoiser(**config: Any) -> Any:
    """The denoiser as diffusers has it, with all weights and norms random."""
    config = small_flow_base("qwen-image-21", **config).components["denoiser"].config
    return rough_weights(diffusers.QwenImage21Transformer2DModel.from_config(config))  # pyright: ignore


def published(denoiser: torch.nn.Module) -> dict[str, Tensor]:
    """The weights as ComfyUI's file has them, which diffusers' own converter reads."""
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in denoiser.state_dict().items()}
    for name in [name for name in state if name.endswith("gate_layer.weight")]:
        parts = state.pop(name), state.pop(name.replace("gate_layer", "proj"))
        state[name.replace("gate_layer", "gate_up")] = torch.cat(parts)
    converted = convert_qwen_image21_transformer_checkpoint_to_diffusers(dict(state))
    assert all(torch.equal(converted[name], tensor) for name, tensor in denoiser.state_dict().items())
    return state


def their_prediction(denoiser: Any, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
    """What diffusers' pipeline asks its denoiser for, with texts of one length."""
    batch, _, height, width = latents.shape
    slots = torch.arange(states.shape[1] + height * width // 4) >= states.shape[1]
    patches = diffusers.QwenImage21Pipeline._pack_latents(latents, batch, 64, height, width)
    prediction = denoiser(
        patches, states, times, [[(1, height, width)]] * batch, slots.expand(batch, -1), return_dict=False
    )[0]
    unpacked = diffusers.QwenImage21Pipeline._unpack_latents(
        prediction[:, -patches.shape[1] :], 16 * height, 16 * width, 16
    )
    return unpacked.squeeze(2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gate_layer", "gate_up"])
def test_a_published_file_predicts_what_diffusers_predicts_with_texts_of_any_length(name):
    theirs = random_denoiser()
    tensors = published(theirs)
    if name == "gate_layer":
        tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in theirs.state_dict().items()}
    base = load_base(tensors)
    assert base.family is FAMILY
    generator = torch.Generator().manual_seed(2)
    latents, times = torch.randn(3, 64, 4, 6, generator=generator), torch.tensor([0.2, 0.9, 0.5])
    text_states = random_texts((9, 4, 9), 32, generator)
    ours = FAMILY.predict(base.load("denoiser", CPU, torch.float32), latents, 1000 * times, text_states)
    for row, length in enumerate((9, 4, 9)):
        each = slice(row, row + 1)
        expected = their_prediction(theirs, latents[each], times[each], text_states["context"][each, :length])
        assert error_of(ours[each], expected) < 1e-5
    same = {part: value[::2] for part, value in text_states.items()}
    both = FAMILY.predict(base.load("denoiser", CPU, torch.float32), latents[::2], 1000 * times[::2], same)
    expected = their_prediction(theirs, latents[::2], times[::2], same["context"])
    assert error_of(both, expected) < 1e-5


def test_the_published_sizes_are_read_from_the_file():
    with torch.device("meta"):
        theirs: Any = diffusers.QwenImage21Transformer2DModel(num_layers=2)
    base = load_base({f"model.diffusion_model.{name}": tensor for name, tensor in theirs.state_dict().items()})
    assert base.components["denoiser"].config.items() <= {**theirs.config, "axes_dims_rope": (16, 56, 56)}.items()


class Words:
    """A tokenizer with a number for each word, each sign and each special token, and the one for diffusers' template."""

    def __call__(self, texts: Any = None, text: Any = None, **options: Any) -> Any:
        if isinstance(texts, str):
            return SimpleNamespace(input_ids=numbers_of(texts))
        rows = [self(each).input_ids for each in text]
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        given = SimpleNamespace(input_ids=ids, attention_mask=mask)
        given.to = lambda _: given
        return given

    def apply_chat_template(self, messages: Any, **_: Any) -> list[list[int]]:
        (message,) = messages
        return [self(f"<|im_start|>{message['role']}\n{message['content'][0]['text']}<|im_end|>\n").input_ids]

    @property
    def tokenizer(self) -> Any:
        return SimpleNamespace(encode=lambda _: [0])


@pytest.fixture(scope="module")
def network() -> Any:
    """The network that a diffusers folder has as its text encoder, narrow."""
    return small_qwen3vl(transformers.Qwen3VLForConditionalGeneration, WIDTH, 3)


@pytest.fixture
def folder(network, tmp_path):
    """A diffusers folder, whose tokenizer is in that of the processor."""
    (tmp_path / "processor").mkdir()
    return write_folder(tmp_path, small_flow_base("qwen-image-21", context_in_dim=WIDTH), network)


def check_captions(base: Base, network: Any) -> None:
    pipe = pipeline_with(diffusers.QwenImage21Pipeline, text_encoder=network, processor=Words())
    with torch.no_grad():
        states, mask, _ = pipe.encode_prompt(CAPTIONS, device=CPU)
        ours = FAMILY.encode_text(base.load_text_encoders(CPU, torch.float32), CAPTIONS, 1, 1)
    assert torch.equal(ours["context_mask"], mask)
    assert error_of(ours["context"], states) < 1e-5


@pytest.fixture
def words(monkeypatch) -> Words:
    """Tokens of words, of which the system's turn and what follows it have other numbers than Qwen's."""
    words = Words()
    system, user = text_before_caption(words)
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: words)
    monkeypatch.setattr("core.models.families.qwen_image21.SYSTEM_TOKENS", system)
    monkeypatch.setattr("core.models.families.qwen_image21._USER_TOKENS", user)
    return words


def text_before_caption(words: Words) -> tuple[int, int]:
    system, user = "Comprehend and analyze the provided prompt.", "<|im_start|>user\n"
    return len(words(f"<|im_start|>system\n{system}<|im_end|>\n").input_ids), len(words(user).input_ids)


def test_a_diffusers_folder_encodes_captions_as_diffusers_does(folder, network, words):
    base = load_base(folder)
    assert base.family is FAMILY and base.components["text_encoder"].config["tokenizer"] == str(folder / "processor")
    check_captions(base, network)


def test_a_file_of_the_text_encoder_is_known_by_its_other_half_and_its_width(network, words):
    tensors = {f"model.{name}": tensor for name, tensor in network.model.state_dict().items()}
    wide = tensors | {"model.language_model.norm.weight": torch.ones(4096)}
    assert list(text.encoders_of(wide)) == ["qwen3vl_8b"] and list(text.encoders_of(tensors)) == ["qwen3vl_4b"]
    in_one_file = {f"text_encoders.qwen3vl_8b.transformer.{name}": tensor for name, tensor in tensors.items()}
    denoiser = random_denoiser(context_in_dim=WIDTH)
    check_captions(load_base({**published(denoiser), **in_one_file}, tokenizer=None), network)


VAE_WORDS = (
    (r"^quant_conv\.", "conv1."), (r"^post_quant_conv\.", "conv2."), (r"coder\.conv_in\.", "coder.conv1."),
    (r"\.norm_out\.", ".head.0."), (r"\.conv_out\.", ".head.2."), (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."), (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.(\d)\.resnets\.(\d)\.", r".downsamples.\1.downsamples.\2."),
    (r"\.down_blocks\.(\d)\.downsampler\.", r".downsamples.\1.downsamples.2."),
    (r"\.up_blocks\.(\d)\.resnets\.(\d)\.", r".upsamples.\1.upsamples.\2."),
    (r"\.up_blocks\.(\d)\.upsampler\.", r".upsamples.\1.upsamples.3."),
    (r"\.norm1\.", ".residual.0."), (r"(?<=\.\d)\.conv1\.", ".residual.2."), (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."), (r"\.conv_shortcut\.", ".shortcut."),
)  # fmt: skip


def vae() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=12, dim_mult=[1, 2, 2], temperal_downsample=[False, True], scale_factor_spatial=4
    ).eval()  # fmt: skip


def in_comfyui(name: str) -> str:
    for pattern, new in VAE_WORDS:
        name = re.sub(pattern, new, name)
    return name


@torch.no_grad()
@pytest.mark.parametrize("naming", ["diffusers", "ComfyUI"])
def test_pictures_are_encoded_and_decoded_as_by_diffusers_with_an_opacity_of_one(naming):
    theirs = vae()
    tensors = theirs.state_dict()
    if naming == "ComfyUI":  # a VAE for videos of one frame
        tensors = {
            in_comfyui(name): tensor.unsqueeze(2) if tensor.ndim == 4 and ".to_qkv" not in name and ".proj" not in name
            and ".resample." not in name and "gamma" not in name else tensor
            for name, tensor in tensors.items()
        }  # fmt: skip
        assert "decoder.upsamples.1.upsamples.3.resample.1.weight" in tensors
    base = load_base(published(random_denoiser()), vae=tensors)
    assert base.latent_shape.pixels == 4 and base.size_multiple == 8
    ours = base.load("vae", CPU, torch.float32)
    pixels = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, deviation = FAMILY.encode_image(ours, pixels)
    opaque = torch.cat([pixels, torch.ones(2, 1, 16, 24)], 1).unsqueeze(2)
    pipe = SimpleNamespace(vae=theirs, latent_channels=64)
    expected = diffusers.QwenImage21Pipeline._encode_vae_image(pipe, opaque, torch.Generator())  # pyright: ignore
    assert mean.shape == deviation.shape == (2, 64, 4, 6)
    torch.testing.assert_close(mean, expected.squeeze(2))
    shape = (1, -1, 1, 1, 1)
    latents = mean.unsqueeze(2) * torch.tensor(theirs.config.latents_std).view(shape)
    decoded = theirs.decode(latents + torch.tensor(theirs.config.latents_mean).view(shape)).sample[:, :3, 0]
    torch.testing.assert_close(FAMILY.decode_latents(ours, mean), decoded)


def test_a_lora_loads_whole_in_diffusers_and_is_read_back(tmp_path):
    theirs, path = random_denoiser(), tmp_path / "a.safetensors"
    pipe = pipeline_with(diffusers.QwenImage21Pipeline, processor=Words(), transformer=theirs)
    assert_diffusers_loads_whole(small_flow_base("qwen-image-21"), theirs, pipe, path, "diffusers", modules=2 * 7)
    assert all(key.startswith("transformer.") for key in LoraFile.read(path).tensors)


def test_the_joined_layers_of_comfyuis_model_are_split_where_a_lora_is_read(tmp_path):
    base, down, up = "diffusion_model.transformer_blocks.0.img_mlp.gate_up", torch.randn(2, 8), torch.randn(48, 2)
    tensors = {f"{base}.lora_A.weight": down, f"{base}.lora_B.weight": up}
    modules = LoraFile(FAMILY.name, {}, tensors).modules()
    assert [path.rpartition(".")[2] for _, path in modules] == ["gate_layer", "proj"]
    assert torch.equal(torch.cat([module.delta() for module in modules.values()]), up @ down)


def test_pictures_are_drawn_through_its_own_vae_without_a_second_prediction():
    base, calls = small_flow_base("qwen-image-21"), []

    def counted(*given: Any) -> Tensor:
        calls.append(given)
        return FAMILY.predict(*given)

    base = replace(base, family=replace(FAMILY, predict=counted))
    job = PictureJob("a photo of sks person", seed=1, steps=2, guidance=base.guidance, size=(64, 32))
    (shot,) = generate(base, [], [job], device=CPU)
    assert shot.image.size == (64, 32) and shot.image.mode == "RGB" and len(calls) == 2
