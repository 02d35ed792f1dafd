"""FLUX.3 Klein against diffusers and the authors' mathematics: the same weights under published names, the same captions."""

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.loaders.single_file_utils import convert_flux3_transformer_checkpoint_to_diffusers
from diffusers.modular_pipelines.flux3 import before_denoise, decoders, encoders
from torch import Tensor

from core.config import TrainConfig
from core.errors import BadConfig, LoraMisfit, UnknownFamily
from core.lora.apply import apply
from core.lora.file import LoraFile
from core.lora.inspect import verify_lora
from core.lora.modules import LoraModule
from core.lora.readers import not_loaded_by
from core.models import Base, load_base, text
from core.models.families import FAMILIES
from core.models.memory_plan import blocks_of
from core.models.spec import Conditioning, stack_conditioning
from core.pictures.sampling import sample_latents, sampler_name
from core.tensor_names import NAME_TABLES
from core.training.callbacks import Callbacks
from core.training.job import check_base_options
from core.training.loop import train_lora
from tests.tooling import encoded_cache, encoded_image, random_lora, small_flow_base

CPU = torch.device("cpu")
FAMILY = FAMILIES["flux3"]
WIDTH = 16
"""The width of the small text encoder, of whose states eight are side by side."""
SENTENCE = "sks person, outdoors, in the evening sun, smiling at the camera. "
CAPTIONS = ["", "a photo of sks person", 4 * SENTENCE]
KINDS = pytest.mark.parametrize("flow_map", [False, True], ids=["base", "distilled"])


def rough_weights(base: Base) -> Any:
    """The denoiser as diffusers has it, with all weights and norms random."""
    theirs: Any = diffusers.Flux3Transformer2DModel.from_config(base.components["denoiser"].config)  # pyright: ignore
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return theirs.eval()


def published(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the authors' file has them, from those of diffusers, which its own converter makes of them again."""
    names = NAME_TABLES["flux3"]
    original = {}
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        fusion = names.of_diffusers(path)
        norm = fusion.original.endswith("_norm")
        value = tensor.roll(len(tensor) // 2, 0) if fusion.halves_swapped else tensor
        original[f"{fusion.original}.{'scale' if norm else kind}"] = value
    converted = convert_flux3_transformer_checkpoint_to_diffusers(dict(original))
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())
    return original


def conditioning(lengths: tuple[int, ...], width: int, generator: torch.Generator) -> Conditioning:
    return stack_conditioning(
        [
            {"context": torch.randn(1, length, width, generator=generator), "context_mask": torch.ones(1, length)}
            for length in lengths
        ]
    )


def their_prediction(denoiser: Any, latents: Tensor, times: Tensor, states: Tensor, target: Tensor | None) -> Tensor:
    """What the blocks of diffusers' pipeline ask its denoiser for."""
    height, width = latents.shape[2:]
    tokens = denoiser(
        hidden_states=latents.flatten(2).transpose(1, 2),
        encoder_hidden_states=states,
        timestep=times,
        target_timestep=target,
        img_ids=before_denoise._prepare_image_ids(
            height, width, before_denoise.Flux3PrepareLatentsStep().image_rope_scale
        ),
        txt_ids=before_denoise.Flux3TextRoPEInputsStep._prepare_text_ids(states),
        return_dict=False,
    )[0]
    return tokens.view(len(latents), height, width, -1).permute(0, 3, 1, 2)


def plain_prediction(
    weights: Mapping[str, Tensor], latents: Tensor, times: Tensor, states: Tensor, target: Tensor | None
) -> Tensor:
    """The prediction in plain torch, of weights with the authors' names."""
    hidden = weights["txt_in.weight"].shape[0]
    height, width = latents.shape[2:]

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    def embedded(name: str, times: Tensor) -> Tensor:
        angles = 1000 * times[:, None] * 10000 ** -(torch.arange(128) / 128)
        return linear(
            f"{name}.out_layer", F.silu(linear(f"{name}.in_layer", torch.cat([angles.cos(), angles.sin()], 1)))
        )

    def turned(x: Tensor, positions: Tensor) -> Tensor:
        """Heads (B, L, N, 128), whose pairs of neighbours are turned by four numbers of a position, 16 pairs by each."""
        rates = 10000.0 ** -(torch.arange(16) / 16)
        angles = (positions[:, :, None] * rates).flatten(1)[:, None]
        numbers = torch.view_as_complex(x.unflatten(-1, (-1, 2))) * torch.polar(torch.ones(()), angles)
        return torch.view_as_real(numbers).flatten(-2)

    def block(name: str, x: Tensor, positions: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> Tensor:
        inner = F.layer_norm(x, (hidden,), eps=1e-6) * (1 + scale) + shift
        q, k, v = (linear(f"{name}.{part}_proj", inner).unflatten(2, (-1, 128)) for part in "qkv")
        q, k = (
            turned(F.rms_norm(part, (128,), weights[f"{name}.norm.{norm}_norm.scale"], 1e-6), positions)
            for part, norm in ((q, "query"), (k, "key"))
        )
        likeness = torch.einsum("bqnd,bknd->bnqk", q, k) / math.sqrt(128)
        seen = torch.einsum("bnqk,bknd->bqnd", likeness.softmax(-1), v).flatten(2)
        first, second = linear(f"{name}.mlp_in", inner).chunk(2, -1)
        return x + gate * (linear(f"{name}.attn_out", seen) + linear(f"{name}.mlp_out", F.silu(first) * second))

    jump = 0 if target is None else embedded("ref_time_in", target)
    time, still = embedded("time_in", times) + jump, embedded("time_in", torch.zeros_like(times)) + jump
    picture, words = linear("emb_in.image", latents.flatten(2).mT), linear("txt_in", states)
    at = {
        "image": torch.tensor([[0, row / 2, column / 2, 0] for row in range(height) for column in range(width)]),
        "txt": torch.tensor([[0.0, 0, 0, number] for number in range(states.shape[1])]),
    }
    both = {"txt": (words, still), "image": (picture, time)}
    found = {}
    for stream, (x, vector) in both.items():
        parts = linear(f"early_stream_modulations.{stream}.lin", F.silu(vector))[:, None].chunk(3, -1)
        blocks = "txt_mode_blocks" if stream == "txt" else "content_mode_blocks.image"
        for index in range(sum(f"{blocks}.{i}.q_proj.weight" in weights for i in range(9))):
            x = block(f"{blocks}.{index}", x, at[stream], *parts)
        found[stream] = x
    joined = torch.cat([found["txt"], found["image"]], 1)
    modulation = torch.cat(
        [
            linear(f"single_stream_modulations.{stream}.lin", F.silu(vector))[:, None].expand(-1, len(at[stream]), -1)
            for stream, (_, vector) in both.items()
        ],
        1,
    ).chunk(3, -1)
    for index in range(sum(f"single_blocks.{i}.q_proj.weight" in weights for i in range(40))):
        joined = block(f"single_blocks.{index}", joined, torch.cat([at["txt"], at["image"]]), *modulation)
    shift, scale = linear("final_layer.image.adaLN_modulation.1", F.silu(time))[:, None].chunk(2, -1)
    last = F.layer_norm(joined[:, states.shape[1] :], (hidden,), eps=1e-6) * (1 + scale) + shift
    return linear("final_layer.image.linear", last).mT.unflatten(2, (height, width))


def error_of(ours: Tensor, expected: Tensor) -> float:
    assert expected.isfinite().all() and expected.std() > 0.01
    return ((ours - expected).norm() / expected.norm()).item()


@torch.no_grad()
@KINDS
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_published_file_predicts_what_diffusers_and_plain_torch_predict_with_texts_of_any_length(flow_map, prefix):
    theirs = rough_weights(small_flow_base("flux3", flow_map=flow_map))
    tensors = published(theirs.state_dict())
    trained_with = {"repa_projectors.0.weight": torch.zeros(3, 3)}
    base = load_base({prefix + name: tensor for name, tensor in (tensors | trained_with).items()})
    assert base.family is FAMILY and base.is_distilled == flow_map
    assert base.components["denoiser"].config.items() <= theirs.config.items()
    ours, generator = base.load("denoiser", CPU, torch.float32), torch.Generator().manual_seed(2)
    latents, times = torch.randn(3, 128, 4, 6, generator=generator), torch.tensor([0.2, 0.9, 0.5])
    target = torch.tensor([0.1, 0.8, 0.0]) if flow_map else None
    states = conditioning((9, 4, 9), 32, generator)
    given = states | ({"target": 1000 * target} if target is not None else {})
    prediction = FAMILY.predict(ours, latents, 1000 * times, given)
    for row, length in enumerate((9, 4, 9)):
        each = slice(row, row + 1)
        inputs = (
            latents[each],
            times[each],
            states["context"][each, :length],
            None if target is None else target[each],
        )
        assert error_of(prediction[each], their_prediction(theirs, *inputs)) < 1e-5
        assert error_of(prediction[each], plain_prediction(tensors, *inputs)) < 1e-4  # angles in float32
    same = {name: value[::2] for name, value in given.items()}
    both = FAMILY.predict(ours, latents[::2], 1000 * times[::2], same)
    assert error_of(both, prediction[::2]) < 1e-5


def wide_weights(network: Any) -> dict[str, Tensor]:
    """Weights of the published width, which share the memory of the largest: each begins elsewhere in it."""
    state = network.state_dict()
    largest = max(tensor.numel() for tensor in state.values())
    pool = torch.randn(largest + 1009 * len(state), generator=torch.Generator().manual_seed(1)).mul_(0.7 / 3072**0.5)
    # Scales of norms about 1, and times large enough that the blocks change the states.
    return {
        name: weight * (3072**0.5 if weight.ndim == 1 else 8) if weight.ndim == 1 or "time" in name else weight
        for number, (name, tensor) in enumerate(state.items())
        for weight in [pool[1009 * number :][: tensor.numel()].view(tensor.shape)]
    }


@pytest.mark.slow
@torch.no_grad()
def test_at_the_published_width_it_predicts_what_diffusers_and_plain_torch_predict():
    with torch.device("meta"):
        theirs: Any = diffusers.Flux3Transformer2DModel(num_layers=1, num_single_layers=2)
    tensors = wide_weights(theirs)
    theirs.load_state_dict(tensors, assign=True)
    original = published(tensors)
    base = load_base({f"model.diffusion_model.{name}": tensor for name, tensor in original.items()})
    assert base.components["denoiser"].config.items() <= theirs.config.items()
    ours, generator = base.load("denoiser", CPU, torch.float32), torch.Generator().manual_seed(2)
    count = sum(parameter.numel() for parameter in ours.parameters())
    for length, size, time in ((80, (8, 12), 0.9), (160, (20, 6), 0.2)):
        latents = torch.randn(1, 128, *size, generator=generator)
        states = torch.randn(1, length, 20480, generator=generator)
        given = {"context": states, "context_mask": torch.ones(1, length)}
        prediction = FAMILY.predict(ours, latents, torch.tensor([1000 * time]), given)
        inputs = (latents, torch.tensor([time]), states, None)
        errors = [
            error_of(prediction, their_prediction(theirs, *inputs)),
            error_of(prediction, plain_prediction(original, *inputs)),
        ]
        print(f"{count / 1e6:.0f} million, {length} tokens, {size}: diffusers {errors[0]:.1e}, plain {errors[1]:.1e}")
        assert max(errors) < 1e-4


class Words:
    """A tokenizer with a number for each word, each sign and each special token, and the processor that has it."""

    def __init__(self) -> None:
        self.tokenizer = self.padded

    def __call__(self, caption: str, add_special_tokens: bool = True) -> Any:
        words = re.findall(r"<\|\w+\|>|\w+|\W", caption)
        return SimpleNamespace(input_ids=[1 + zlib.crc32(word.encode()) % 60 for word in words])

    def padded(self, caption: str, max_length: int, padding: str | None = None, **_: Any) -> dict[str, Tensor]:
        row = self(caption).input_ids[:max_length]
        count = max_length - len(row) if padding else 0
        mask = [1] * len(row) + [0] * count
        return {"input_ids": torch.tensor([row + [text._PAD_QWEN] * count]), "attention_mask": torch.tensor([mask])}

    def apply_chat_template(self, messages: Any, **_: Any) -> str:
        (message,) = messages  # as in the template of Qwen3-VL
        return f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def network() -> Any:
    """The network that a diffusers folder has as its text encoder, narrow, with a norm that changes its states."""
    sizes = {"vocab_size": 64, "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 33,
             "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-6,
             "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": WIDTH,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(text_config=sizes, vision_config=vision)
    model: Any = transformers.Qwen3VLForConditionalGeneration(config).eval()
    model.model.language_model.norm.weight.data.uniform_(0.5, 3)
    return model


@pytest.fixture
def words(monkeypatch) -> Words:
    words = Words()
    monkeypatch.setattr(text, "load_tokenizer", lambda *_: words)
    monkeypatch.setattr(text, "_PAD_QWEN", 63)
    return words


def their_states(network: Any, words: Words, caption: str) -> Tensor:
    """By diffusers' block, with its own numbers."""
    step = encoders.Flux3TextEncoderStep()
    layers = next(given.default for given in step.inputs if given.name == "text_encoder_out_layers")
    return step._get_qwen3_vl_prompt_embeds(
        network, words, caption, pad_multiple=step.pad_multiple, hidden_states_layers=layers  # pyright: ignore
    )  # fmt: skip


@pytest.fixture
def folder(network, tmp_path) -> Path:
    """A folder of diffusers, with the index of a pipeline that is put together of blocks."""
    base = small_flow_base("flux3", joint_attention_dim=8 * WIDTH)
    rough_weights(base).save_pretrained(tmp_path / "transformer")
    base.load("vae", CPU, torch.float32).save_pretrained(tmp_path / "vae")  # pyright: ignore
    network.save_pretrained(tmp_path / "text_encoder")
    index = {"_class_name": "Flux3ModularPipeline", "_blocks_class_name": "Flux3AutoBlocks"}
    (tmp_path / "modular_model_index.json").write_text(json.dumps(index))
    return tmp_path


@torch.no_grad()
@pytest.mark.parametrize("source", ["folder", "file"])
def test_captions_have_the_states_of_diffusers_pipeline_with_those_of_the_padding(source, folder, network, words):
    if source == "folder":
        base = load_base(folder)
    else:
        denoiser = published(rough_weights(small_flow_base("flux3", joint_attention_dim=8 * WIDTH)).state_dict())
        encoder = {f"model.{name}": tensor for name, tensor in network.model.state_dict().items()}
        base = load_base(denoiser, text_encoders=[encoder])
    assert base.family is FAMILY
    ours = FAMILY.encode_text(base.load_text_encoders(CPU, torch.float32), CAPTIONS, 1, 1)
    assert ours["context_mask"].sum(1).tolist() == [80, 80, 160]
    for states, caption in zip(ours["context"], CAPTIONS, strict=True):
        expected = their_states(network, words, caption)[0]
        assert error_of(states[: len(expected)], expected) < 1e-5
        assert not states[len(expected) :].any()


def test_the_text_encoder_of_flux_2_klein_is_refused():
    denoiser = published(rough_weights(small_flow_base("flux3")).state_dict())
    encoder = {"model.layers.0.self_attn.q_norm.weight": torch.zeros(128), "model.norm.weight": torch.zeros(2560)}
    with pytest.raises(UnknownFamily, match=r"is Qwen3-4B, but FLUX\.3 Klein takes Qwen3-VL-4B"):
        load_base(denoiser, text_encoders=[encoder])


@torch.no_grad()
def test_pictures_are_encoded_and_decoded_as_by_diffusers_blocks():
    base = small_flow_base("flux3")
    vae: Any = base.load("vae", CPU, torch.float32)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    pixels = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    state = SimpleNamespace(condition_images=[pixels])
    step = encoders.Flux3VaeEncoderStep()
    step.get_block_state, step.set_block_state = lambda _: state, lambda *_: None  # pyright: ignore
    step(SimpleNamespace(vae=vae, _execution_device=CPU), None)  # pyright: ignore
    mean, _ = FAMILY.encode_image(vae, pixels)
    torch.testing.assert_close(mean, state.image_cond_latents[0])
    mean_of, deviation_of = (
        vae.bn.running_mean.view(1, -1, 1, 1),
        (vae.bn.running_var + vae.bn.eps).sqrt().view(1, -1, 1, 1),
    )
    expected = vae.decode(decoders.Flux3DecodeStep._unpatchify_latents(mean * deviation_of + mean_of)).sample
    torch.testing.assert_close(FAMILY.decode_latents(vae, mean), expected)


@torch.no_grad()
@KINDS
def test_pictures_are_drawn_along_diffusers_steps(flow_map):
    """diffusers' scheduler with the shift and the steps of its blocks, and its guidance; two texts of different lengths."""
    base = small_flow_base("flux3", flow_map=flow_map)
    denoiser = rough_weights(base)
    generator = torch.Generator().manual_seed(1)
    positive, negative = (conditioning((length,), 32, generator) for length in (9, 4))
    ours = sample_latents(
        base, denoiser, [positive], [negative], device=CPU, dtype=torch.float32, seeds=[5], size=(24, 16),
        steps=base.steps, guidance=base.guidance,
    )  # fmt: skip
    steps = before_denoise.Flux3SetTimestepsStep()
    scheduler: Any = diffusers.FlowMatchEulerDiscreteScheduler(shift=steps.shift)
    count = 16 if flow_map else steps.num_inference_steps
    scheduler.set_timesteps(sigmas=[1 - index / count for index in range(count)])
    guider: Any = diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    latents = torch.randn(128, *ours.shape[2:], generator=torch.Generator().manual_seed(5))[None]
    times = scheduler.timesteps
    assert len(times) == base.steps
    for index, time in enumerate(times):
        following = times[index + 1 : index + 2] if index + 1 < len(times) else torch.zeros(1)
        target = following / 1000 if flow_map else None
        found = [
            their_prediction(denoiser, latents, time[None] / 1000, states["context"], target)
            for states in (positive, negative)
        ]
        guider.set_state(step=index, num_inference_steps=count, timestep=time)
        velocity = found[0] if flow_map else guider.forward(*found).pred
        latents = scheduler.step(velocity, time, latents, return_dict=False)[0]  # pyright: ignore
    assert error_of(ours, latents) < 1e-4


def test_a_flow_map_is_drawn_with_eulers_method_alone():
    base = small_flow_base("flux3", flow_map=True)
    assert sampler_name(None, base) == "euler" and sampler_name("unipc", small_flow_base("flux3")) == "unipc"
    with pytest.raises(BadConfig, match="is a flow map, which only supports euler"):
        sampler_name("unipc", base)


def test_a_flow_map_is_refused_for_training_and_learns_the_velocity_at_a_time_where_it_is_allowed():
    base = small_flow_base("flux3", flow_map=True)
    with pytest.raises(BadConfig, match=r"distilled to a few steps, .* set allow_distilled"):
        check_base_options(base, TrainConfig())
    check_base_options(base, TrainConfig(allow_distilled=True))
    denoiser, generator = rough_weights(base), torch.Generator().manual_seed(1)
    latents, times = torch.randn(1, 128, 4, 4, generator=generator), torch.tensor([0.3])
    states = conditioning((9,), 32, generator)
    with torch.no_grad():
        ours = FAMILY.predict(denoiser, latents, 1000 * times, states)
        assert error_of(ours, their_prediction(denoiser, latents, times, states["context"], times)) < 1e-5


def test_blocks_of_the_picture_are_in_memory_plans_too():
    denoiser = small_flow_base("flux3", num_layers=2, num_single_layers=3).load("denoiser", CPU, torch.float32)
    paths = [path for path, module in denoiser.named_modules() if module in blocks_of(denoiser)]
    kinds = ("mode_blocks.image", "txt_mode_blocks", "single_transformer_blocks")
    assert paths == [f"{kind}.{index}" for kind in kinds for index in range(3 if kind.startswith("single") else 2)]


def test_a_lora_loads_whole_in_diffusers_and_is_read_back(tmp_path):
    base = small_flow_base("flux3")
    lora = random_lora(base, FAMILY.denoiser_targets["transformer"], scheme="comfy")
    lora.save(tmp_path / "a.safetensors", torch.float32)
    read = LoraFile.read(tmp_path / "a.safetensors")
    assert read.family == FAMILY.name and len(read.entries) == 4 * 6 and not read.unknown_keys
    assert all(key.startswith("diffusion_model.") for key in read.tensors)
    theirs = rough_weights(base)
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    pipe: Any = diffusers.Flux3AutoBlocks().init_pipeline()
    pipe.update_components(transformer=theirs)
    pipe.load_lora_weights(str(tmp_path / "a.safetensors"))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    after = theirs.state_dict()
    modules = {path: module for (_, path), module in read.modules().items()}
    for name, tensor in before.items():
        module = modules.get(name.removesuffix(".weight"))
        change = 0 if module is None else module.scale * module.up @ module.down
        torch.testing.assert_close(after[name], tensor + change)


def test_blocks_for_shown_pictures_are_not_loaded_and_a_loras_change_of_them_is_left_out_there():
    base = small_flow_base("flux3")
    lora = random_lora(base, FAMILY.denoiser_targets["attention"])
    of_shown = {
        ("denoiser", path.replace(".image.", ".image_cond.")): module
        for (_, path), module in lora.modules().items()
        if ".image." in path
    }
    whole = LoraFile.from_modules(FAMILY.name, lora.modules() | of_shown, {}, "comfy")

    def weights(network: Any, file: LoraFile) -> dict[str, Tensor]:
        with apply(file, {"family": FAMILY.name, "denoiser": network}):
            return {name: tensor.clone() for name, tensor in network.state_dict().items()}

    loaded: Any = base.load("denoiser", CPU, torch.float32)
    found, expected = weights(loaded, whole), weights(loaded, lora)
    assert not any("image_cond" in name for name in found) and all(torch.equal(found[n], expected[n]) for n in expected)
    theirs, changed = rough_weights(base), "mode_blocks.image_cond.0.attn.to_q.weight"
    assert not torch.equal(weights(theirs, whole)[changed], theirs.state_dict()[changed])
    with pytest.raises(LoraMisfit, match=r"has no mode_blocks\.image_cond"):
        weights(loaded, LoraFile.from_modules(FAMILY.name, of_shown, {}, "comfy"))


def published_lora(folder: Path, scheme: str, modules: Iterable[str]) -> LoraFile:
    """A LoRA that changes nothing, of modules of the published width."""
    shapes = {"linear_in": (18432, 3072), "linear_out": (3072, 9216)}
    made = {
        ("denoiser", path): LoraModule(torch.zeros(1, inputs), torch.zeros(outputs, 1), 1.0)
        for path in modules
        for outputs, inputs in [shapes.get(path.rpartition(".")[2], (3072, 3072))]
    }
    file = folder / f"{scheme}.safetensors"
    LoraFile.from_modules(FAMILY.name, made, {}, scheme).save(file)
    return LoraFile.read(file)


@pytest.mark.parametrize("scheme", ["kohya", "diffusers", "comfy"])
def test_inspect_says_that_comfyui_030_does_not_have_it_and_what_diffusers_loads(scheme, tmp_path):
    names = [
        "mode_blocks.image.4.attn.to_q",
        "txt_mode_blocks.0.ff.linear_in",
        "single_transformer_blocks.27.attn.to_out.0",
    ]
    lora = published_lora(tmp_path, scheme, names)
    assert (lora.family, lora.identity.models) == (FAMILY.name, ("FLUX.3 Klein",))
    assert set(not_loaded_by("ComfyUI", lora).values()) == {"flux3 at all"}
    assert len(not_loaded_by("diffusers", lora)) == (3 if scheme == "kohya" else 0)
    faults = [fault.text for fault in verify_lora(tmp_path / f"{scheme}.safetensors")]
    assert "ComfyUI 0.30 does not support flux3; later versions may" in faults
    assert not any("convert it" in fault for fault in faults)


def test_attention_that_flux_1_has_too_is_of_the_model_that_the_metadata_say(tmp_path):
    lora = published_lora(tmp_path, "diffusers", ["single_transformer_blocks.0.attn.to_q"])
    assert {"FLUX.1", "FLUX.3 Klein"} <= set(lora.identity.models)
    for family in ("flux1", FAMILY.name):
        version = {"ss_base_model_version": NAME_TABLES[family].base_versions[0]}
        assert LoraFile.from_tensors(lora.tensors, version).family == family


def test_a_run_that_is_cancelled_goes_on_to_the_same_tensors_and_learns(tmp_path):
    def cancel(report):
        if report.step == 2:
            raise KeyboardInterrupt

    base, state = small_flow_base("flux3"), tmp_path / "run.state.safetensors"
    captions = ("a photo of sks person", "sks person, outdoors in the evening sun")
    cache = encoded_cache(base, [encoded_image(base, f"{i}.png", captions[i], i, shape=(128, 4, 6)) for i in range(2)])
    losses = []
    config = TrainConfig(steps=8, rank=8, precision="fp32", batch_size=2, learning_rate=5e-2)
    run = partial(train_lora, cache, base, config, device=CPU)
    whole = run(callbacks=Callbacks(on_step=lambda report: losses.append(report.loss)))
    assert sum(losses[4:]) < sum(losses[:4])
    assert not any("image_cond" in name for name in whole.tensors)
    with pytest.raises(KeyboardInterrupt):
        run(state_path=state, callbacks=Callbacks(on_step=cancel))
    resumed = run(state_path=state, resume=True)
    assert whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in whole.tensors.items())
