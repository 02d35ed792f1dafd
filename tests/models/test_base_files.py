"""FLUX.1 from the files that ComfyUI users have: denoiser, text encoders and VAE apart or in one, plain or scaled fp8."""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
)

from core.cli import main
from core.errors import BadConfig, BadFile, FaceLoraError, UnknownFamily, UnmatchedKeys
from core.lora.file import LoraFile
from core.models import Base, ldm, load_base, text
from core.models.clip import TOKENIZER_FOLDER
from core.models.families.sd3 import CONTEXT_WIDTH
from core.models.quantised_layers import QuantisedLinear
from core.pictures.generate import PictureJob, generate
from core.storage.safetensors_file import save_safetensors
from tests.models.family_parts import in_original_names
from tests.models.quantised_weights import stored
from tests.models.test_base import assert_same_weights
from tests.tooling import (
    SMALL_FLOWS,
    UNETS,
    RandomTensors,
    mostly_slow,
    random_lora,
    small_flow_base,
    write_gguf,
)
from tests.whole_flows import WHOLE_FLOWS, whole_shapes, write_t5_tokenizer

CPU = torch.device("cpu")
WIDTH = 128
T5 = {"vocab_size": 32128, "d_model": 32, "d_kv": 64, "d_ff": 48, "num_layers": 2, "num_heads": 2,
      "feed_forward_proj": "gated-gelu"}  # fmt: skip
CLIP_L = {"vocab_size": 49408, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 1,
          "max_position_embeddings": 77, "hidden_act": "quick_gelu", "eos_token_id": 49407}  # fmt: skip
FLUX2_SHAPES = {
    "img_in.weight": (3072, 128), "txt_in.weight": (3072, 7680), "double_blocks.0.img_mlp.2.weight": (3072, 9216),
    "double_stream_modulation_img.lin.weight": (18432, 3072), "single_blocks.0.linear1.weight": (27648, 3072),
}  # fmt: skip
"""What tells FLUX.2 klein 4B."""
SD3_SHAPES = {
    name: torch.empty(shape, device="meta")
    for name, shape in {
        "x_embedder.proj.weight": (64, 16, 2, 2), "final_layer.linear.weight": (64, 64), "pos_embed": (1, 144, 64),
        "context_embedder.weight": (64, 256), "y_embedder.mlp.0.weight": (64, 152),
        "joint_blocks.0.x_block.attn.qkv.weight": (192, 64),
    }.items()
}  # fmt: skip
"""What tells an SD3 and its sizes, for what asks nothing more of the denoiser."""


def qwen3_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """What tells a Qwen3 of that width, as in its own files."""
    layer = "model.layers.0."
    return {
        "model.embed_tokens.weight": (151936, width), "model.norm.weight": (width,),
        f"{layer}self_attn.q_proj.weight": (4096, width), f"{layer}self_attn.k_proj.weight": (1024, width),
        f"{layer}self_attn.q_norm.weight": (128,), f"{layer}mlp.gate_proj.weight": (9728, width),
    }  # fmt: skip


def state_of(kind: str, config: dict[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = (ldm.build_vae(config) if kind == "vae" else text.build(kind, config)).state_dict()
    draw = RandomTensors({name: tuple(tensor.shape) for name, tensor in state.items()}, torch.float32, seed=2)
    return {name: draw(name) for name in state}


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, Tensor]]:
    """Part -> its tensors, as they stand in a file of its own."""
    t5_state = state_of("t5xxl", T5)
    del t5_state["encoder.embed_tokens.weight"]  # files have one of its two names
    vae_state = {
        ldm.ldm_vae_path(name, 2): tensor for name, tensor in state_of("vae", SMALL_FLOWS["flux1"].vae).items()
    }
    return {
        "flux": in_original_names(small_flow_base("flux1").components["denoiser"].tensors, "flux1"),
        "clip_l": state_of("clip_l", CLIP_L),
        "t5xxl": t5_state,
        "ae": vae_state,
    }


def others(parts: Mapping[str, Any]) -> dict[str, Any]:
    """What `load_base` is given beside the denoiser; the order of text encoders doesn't matter."""
    return {"vae": parts["ae"], "text_encoders": [parts["t5xxl"], parts["clip_l"]]}


@pytest.fixture
def files(parts, tmp_path) -> dict[str, Path]:
    for name, tensors in parts.items():
        save_safetensors(tmp_path / f"{name}.safetensors", tensors, None)
    return {name: tmp_path / f"{name}.safetensors" for name in parts}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return write_t5_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_files_apart_and_one_checkpoint_are_the_same_base(parts, files, tokenizer, tmp_path):
    prefixes = {"flux": "model.diffusion_model.", "ae": "vae.", "clip_l": "text_encoders.clip_l.transformer.",
                "t5xxl": "text_encoders.t5xxl.transformer."}  # fmt: skip
    whole = {prefixes[part] + name: tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    save_safetensors(tmp_path / "whole.safetensors", whole, None)
    one = load_base(tmp_path / "whole.safetensors", tokenizer=tokenizer)
    apart = load_base(files["flux"], **others(files), tokenizer=tokenizer)
    assert_same_weights(apart, one)


@pytest.mark.parametrize("family", WHOLE_FLOWS)
def test_all_sizes_of_a_model_of_published_width_are_read_from_its_file(family):
    tensors = {name: torch.empty(shape, device="meta") for name, shape in whole_shapes(family).items()}
    base = load_base(tensors)
    assert base.family.name == family and base.components.keys() == WHOLE_FLOWS[family].keys()
    assert WHOLE_FLOWS[family]["denoiser"].items() <= base.components["denoiser"].config.items()
    for part, config in WHOLE_FLOWS[family].items():
        read = base.family.build_empty(part, base.components[part].config).state_dict()
        written = base.family.build_empty(part, config).state_dict()
        assert {name: one.shape for name, one in read.items()} == {name: one.shape for name, one in written.items()}
        assert base.components[part].tensors.keys() == written.keys()


def pipelines_clip(encoder: nn.Module, config: dict[str, Any], cls: type = CLIPTextModelWithProjection) -> Any:
    """transformers' own CLIP with the weights of ours."""
    theirs, state = cls(CLIPTextConfig(**config)).eval(), encoder.state_dict()
    flat = not hasattr(theirs, "text_model")
    state = {name.removeprefix("text_model.") if flat else name: tensor for name, tensor in state.items()}
    if cls is CLIPTextModelWithProjection:
        # SD3's CLIP-L has a projection in diffusers that changes nothing, and none in its file.
        state.setdefault("text_projection.weight", torch.eye(config["hidden_size"]))
    theirs.load_state_dict(state)
    return theirs


def pipelines_t5_tokenizer(folder: Path) -> Any:
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), pad_token="<pad>")


def test_captions_are_encoded_as_by_diffusers_pipeline(files, tokenizer):
    base = load_base(files["flux"], **others(files), tokenizer=tokenizer)
    encoders, pipeline = base.load_text_encoders(CPU, torch.float32), base.pipeline()
    assert isinstance(pipeline, FluxPipeline)
    prompts = ["a photo of sks person", "sks"]
    context, pooled, _ = pipeline.encode_prompt(prompts, prompts, max_sequence_length=512)
    ours = base.family.encode_text(encoders, prompts, 1, 1)
    torch.testing.assert_close(ours["context"], context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["pooled"], pooled, rtol=1e-4, atol=1e-5)
    expected = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    assert expected.items() <= pipeline.scheduler.config.items()  # those of FLUX.1-dev
    side = 4 * base.latent_shape.pixels
    settings: dict[str, Any] = {"num_inference_steps": 2, "height": side, "width": side, "output_type": "np"}
    drawn: Any = pipeline("sks", **settings, return_dict=False)[0]
    assert drawn.shape == (1, side, side, 3) and drawn.std() > 0


@pytest.mark.parametrize("with_t5", [True, False])
def test_sd3s_captions_are_encoded_as_by_diffusers_pipeline(parts, tokenizer, with_t5):
    big = {"vocab_size": 49408, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 3,
           "num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": "gelu", "projection_dim": 128,
           "eos_token_id": 49407}  # fmt: skip
    text_parts = {"clip_l": parts["clip_l"], "clip_g": state_of("clip_g", big)}
    if with_t5:
        text_parts["t5xxl"] = state_of("t5xxl", T5 | {"d_model": 256})
    whole = {f"model.diffusion_model.{name}": tensor for name, tensor in SD3_SHAPES.items()}
    for kind, state in text_parts.items():
        whole |= {f"text_encoders.{kind}.transformer.{name}": tensor for name, tensor in state.items()}
    base = load_base(whole, tokenizer=tokenizer)
    encoders = base.load_text_encoders(CPU, torch.float32)
    assert base.family.name == "sd3" and ("text_encoder_3" in encoders) == with_t5
    clips = [
        pipelines_clip(encoders[part], base.components[part].config) for part in ("text_encoder", "text_encoder_2")
    ]
    width = 256 if with_t5 else CONTEXT_WIDTH
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None,  # pyright: ignore
        transformer=SD3Transformer2DModel(num_layers=1, num_attention_heads=1, joint_attention_dim=width),
        text_encoder=clips[0], tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER),
        text_encoder_2=clips[1], tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER, pad_token="!"),
        text_encoder_3=encoders.get("text_encoder_3"), tokenizer_3=pipelines_t5_tokenizer(tokenizer),  # pyright: ignore
    )  # fmt: skip
    prompts = ["a photo of sks person", "sks"]
    context, _, pooled, _ = pipeline.encode_prompt(prompts, prompts, prompts, do_classifier_free_guidance=False)
    ours = base.family.encode_text(encoders, prompts, 1, 1)
    torch.testing.assert_close(ours["context"], context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["pooled"], pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (WIDTH,), (WIDTH, 1)])
@pytest.mark.parametrize("layout", ["first", "second"])
def test_scaled_fp8_is_read_as_the_weights_that_it_stands_for(parts, layout, shape):
    """ComfyUI's two layouts: `scale_weight` with a marker, and `weight_scale` with a description of the layer.

    Other programs write a scale for each row in their place.
    """
    name, of_rows = "double_blocks.0.img_attn.proj", torch.full((WIDTH, 1), 0.02)
    if WIDTH in shape:
        of_rows *= torch.linspace(0.1, 1, WIDTH)[:, None]
    scale = of_rows[: max(1, math.prod(shape))].reshape(shape)
    tensors = dict(parts["flux"])
    weight = (tensors[f"{name}.weight"] / of_rows).to(torch.float8_e4m3fn)
    tensors[f"{name}.weight"] = weight
    if layout == "first":
        tensors |= {f"{name}.scale_weight": scale, f"{name}.scale_input": scale, "scaled_fp8": torch.zeros(2)}
    else:
        description = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
        tensors |= {f"{name}.weight_scale": scale, f"{name}.comfy_quant": description}
    read = load_base(tensors).components["denoiser"].tensors
    expected = weight.to(torch.bfloat16) * of_rows.to(torch.bfloat16)
    assert torch.equal(read["transformer_blocks.0.attn.to_out.0.weight"], expected)
    assert not any("scale" in key or "quant" in key for key in read)


def test_a_denoiser_in_gguf_is_the_base_of_its_dequantised_weights(parts, tmp_path):
    kinds = {name: gguf.GGMLQuantizationType.Q8_0 if name.endswith("attn.proj.weight") else gguf.GGMLQuantizationType.F32
             for name in parts["flux"]}  # fmt: skip
    path = write_gguf(
        tmp_path / "flux1-q8.gguf", {name: (tensor, kinds[name]) for name, tensor in parts["flux"].items()}
    )
    base = load_base(path, **others(parts))
    assert (base.family.name, base.name) == ("flux1", "flux1-q8.gguf")
    assert base.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    base.hash_files()
    read, plain = (one.load("denoiser", CPU, torch.float32) for one in (base, load_base(parts["flux"])))
    for name, parameter in read.named_parameters():
        weight = plain.get_parameter(name)
        is_quantised = name.endswith(("attn.to_out.0.weight", "attn.to_add_out.weight"))
        assert torch.equal(parameter, weight) != is_quantised, name
        assert (parameter - weight).norm() <= 0.01 * weight.norm(), name
    kept = base.load("denoiser", CPU, torch.float32, as_stored=True)
    layers = {path: layer for path, layer in kept.named_modules() if isinstance(layer, QuantisedLinear)}
    assert set(layers) == {f"transformer_blocks.0.attn.{path}" for path in ("to_out.0", "to_add_out")}
    for path, layer in layers.items():
        assert torch.equal(layer.weight, read.get_parameter(f"{path}.weight"))


@pytest.fixture
def gguf_t5(parts, tmp_path) -> Path:
    """The T5 in Q8_0, as llama.cpp's converter writes it."""
    kinds = gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.T5ENCODER, T5["num_layers"])
    tensors = {
        str(names.get_name(name, (".weight",))): (
            tensor,
            kinds.F32 if tensor.shape[-1] % 32 or tensor.ndim == 1 else kinds.Q8_0,
        )
        for name, tensor in parts["t5xxl"].items()
    }
    return write_gguf(tmp_path / "t5xxl-encoder-Q8_0.gguf", tensors, "t5encoder")


def test_a_t5_in_gguf_is_loaded_in_bf16_though_its_norms_have_more_bits(parts, gguf_t5, tokenizer, monkeypatch):
    monkeypatch.setattr("core.models.base.LARGE_ENCODER", 0)
    states = []
    for t5, dtype in ((gguf_t5, torch.bfloat16), (parts["t5xxl"], torch.float32)):
        base = load_base(parts["flux"], text_encoders=[parts["clip_l"], t5], tokenizer=tokenizer)
        encoders = base.load_text_encoders(CPU, torch.float32)
        assert {weight.dtype for weight in encoders["text_encoder_2"].parameters()} == {dtype}
        with torch.no_grad():
            states.append(base.family.encode_text(encoders, ["a photo"], 1, 1)["context"].float())
    assert 0 < (states[0] - states[1]).norm() < 0.05 * states[1].norm()


def test_a_quantised_t5_is_dequantised_layer_by_layer_where_it_would_not_fit(parts, gguf_t5, tokenizer, monkeypatch):
    monkeypatch.setattr("core.models.base.LARGE_ENCODER", 0)
    base = load_base(parts["flux"], text_encoders=[parts["clip_l"], gguf_t5], tokenizer=tokenizer)
    states = []
    for free, asked, expected in ((2**40, True, False), (0, False, False), (0, True, True)):
        monkeypatch.setattr("core.models.base.free_memory", lambda device, free=free: free)
        encoders = base.load_text_encoders(CPU, torch.float32, asked)
        layers = [layer for layer in encoders["text_encoder_2"].modules() if isinstance(layer, QuantisedLinear)]
        assert bool(layers) == expected
        with torch.no_grad():
            states.append(base.family.encode_text(encoders, ["a photo"], 1, 1)["context"])
    assert torch.equal(states[0], states[1]) and torch.equal(states[0], states[2])


@pytest.mark.parametrize(("kind", "stays"), [("lora", True), ("loha", False)])
def test_pictures_are_drawn_with_a_dequantised_t5_where_a_lora_needs_it(parts, tokenizer, monkeypatch, kind, stays):
    base = load_base(parts["flux"], **others(parts), tokenizer=tokenizer)
    layer = "lora_te3_encoder_block_0_layer_0_SelfAttention_q"
    down, up = torch.ones(2, T5["d_model"]), torch.full((128, 2), 0.01)
    tensors = {"lora": {"lora_down.weight": down, "lora_up.weight": up},
               "loha": {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}}[kind]  # fmt: skip
    of_denoiser = random_lora(base, r"transformer_blocks\..+", "kohya")
    of_t5 = {f"{layer}.{end}": tensor for end, tensor in {**tensors, "alpha": torch.tensor(2.0)}.items()}
    lora = LoraFile.from_tensors({**of_denoiser.tensors, **of_t5}, of_denoiser.metadata, "a LoRA")
    asked, load = [], Base.load_text_encoders
    monkeypatch.setattr(Base, "load_text_encoders", lambda *given: asked.append(given[3]) or load(*given))
    assert list(
        generate(base, [(lora, 1.0)], [PictureJob("a photo", seed=1, size=(64, 64), steps=1)], device=CPU)
    ) and asked == [stays]


@pytest.mark.parametrize(
    "said", [{"convrot": True, "convrot_groupsize": 64}, {"params": {"convrot": True, "convrot_groupsize": 16}}]
)
def test_int8_weights_that_were_rotated_are_turned_back(parts, said, tmp_path):
    name, size = "double_blocks.0.img_attn.proj", said.get("params", said)["convrot_groupsize"]
    weight = parts["flux"][f"{name}.weight"].float()
    rotated = weight.clone().reshape(WIDTH, -1, size)
    step = 1
    while step < size:  # four numbers at a time: half their sum, less one of them
        part = rotated.reshape(WIDTH, -1, 4, step)
        rotated, step = (part.sum(dim=2, keepdim=True) / 2 - part.flip(2)).reshape(rotated.shape), 4 * step
    rotated = rotated.reshape(weight.shape)
    scale = rotated.abs().amax(dim=1, keepdim=True) / 127
    description = json.dumps({"format": "int8_tensorwise", **said}).encode()
    tensors = parts["flux"] | {
        f"{name}.weight": (rotated / scale).round().to(torch.int8), f"{name}.weight_scale": scale,
        f"{name}.comfy_quant": torch.tensor(list(description), dtype=torch.uint8),
    }  # fmt: skip
    save_safetensors(tmp_path / "int8.safetensors", tensors)
    base = load_base(tmp_path / "int8.safetensors")
    read = base.load("denoiser", CPU, torch.float32).get_parameter("transformer_blocks.0.attn.to_out.0.weight")
    assert (read - weight).norm() < 0.02 * weight.norm()


def test_other_quantisations_are_refused_by_name(parts, tmp_path):
    flux = parts["flux"]

    def refused(extra: dict[str, Tensor], said: str, metadata: dict[str, str] | None = None) -> None:
        save_safetensors(tmp_path / "q.safetensors", {**flux, **extra}, metadata)
        with pytest.raises(BadFile, match=rf"^q\.safetensors: .*{said}.*; use the model in bf16, fp16 or fp8"):
            load_base(tmp_path / "q.safetensors")

    def description(text: str) -> Tensor:
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    fp8 = flux["img_in.weight"].to(torch.float8_e4m3fn)
    scale = {"img_in.weight_scale": torch.ones(())}
    refused({"img_in.comfy_quant": description('{"format": "int4"}'), **scale}, "img_in is quantised as int4, which")
    refused(
        {"img_in.comfy_quant": description('{"format": "nvfp4"}'), **scale},
        r"img_in\.weight is quantised as nvfp4 and lacks its scales",
    )
    odd_groups = description('{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 48}')
    refused(
        {"img_in.comfy_quant": odd_groups, "img_in.weight": fp8.to(torch.int8), **scale},
        r"img_in\.weight .* has scales of \[\], which do not fit it as int8_tensorwise",
    )
    refused({"img_in.comfy_quant": description("[]"), **scale}, "the description of its quantised layers")
    mxfp8 = {"_quantization_metadata": '{"layers": {"img_in": {"format": "mxfp8"}}}'}
    refused(scale, r"img_in\.weight .* has scales of \[\], which do not fit it as mxfp8", mxfp8)
    refused({}, "the description of its", {"_quantization_metadata": '{"layers": 3}'})
    refused({"img_in.weight.absmax": torch.ones(4)}, r"cannot be read here, e\.g\. 'img_in\.weight\.absmax'")
    refused({"img_in.weight": fp8.to(torch.int8)}, r"is quantised, e\.g\. 'img_in\.weight' to torch\.int8")
    refused(
        {"img_in.weight": fp8, "img_in.weight_scale": torch.ones(WIDTH, 2)},
        r"img_in\.weight .* has scales of \[128, 2\]",
    )
    refused(
        {"img_in.weight": fp8, "img_in.scale_weight": torch.ones(1, 64)}, r"img_in\.weight .* has scales of \[1, 64\]"
    )
    with pytest.raises(BadFile, match=r"img_in\.weight .* in torch\.int8 has scales .* do not fit it as float8"):
        load_base({**flux, "img_in.weight": fp8.to(torch.int8), **scale})
    with pytest.raises(BadFile, match=r"the denoiser is quantised, e\.g\. x_embedder\.weight to torch\.int8; use"):
        load_base({**flux, "img_in.weight": fp8.to(torch.int8)}).load("denoiser", CPU, torch.float32)


@pytest.mark.parametrize(
    ("form", "scale", "wrong", "expected"),
    [
        ("scaled fp8", "weight_scale", torch.int32, "float8_e4m3fn must be in float32 or"),
        ("int8", "weight_scale", torch.uint8, "int8_tensorwise must be in float32 or"),
        ("convrot_w4a4", "weight_scale", torch.int64, "convrot_w4a4 must be in float32 or"),
        ("mxfp8", "weight_scale", torch.float32, "mxfp8 must be in uint8 or float8_e8m0fnu"),
        ("nvfp4", "weight_scale", torch.bfloat16, "nvfp4 must be in float8_e4m3fn or uint8"),
        ("nvfp4", "weight_scale_2", torch.int32, "nvfp4 must be in float32 or"),
    ],
)
def test_scales_in_another_dtype_are_refused_with_what_they_should_have(parts, tmp_path, form, scale, wrong, expected):
    layer = "double_blocks.0.img_attn.proj"
    weights = stored(layer, parts["flux"][f"{layer}.weight"], form)
    save_safetensors(tmp_path / "good.safetensors", parts["flux"] | weights)
    assert load_base(tmp_path / "good.safetensors").is_quantised
    weights[f"{layer}.{scale}"] = weights[f"{layer}.{scale}"].float().to(wrong)
    save_safetensors(tmp_path / "odd.safetensors", parts["flux"] | weights)
    said = re.escape(f"odd.safetensors: {layer}.{scale} is in {wrong}, but such scales of {expected}")
    with pytest.raises(BadFile, match=rf"^{said}.*; use the model in bf16, fp16 or fp8"):
        load_base(tmp_path / "odd.safetensors")


def test_what_is_missing_is_said_when_it_is_needed(files, parts):
    base = load_base(files["flux"])
    with pytest.raises(BadFile, match=r"flux\.safetensors: has no vae\. Give its file too \(vae\)"):
        base.load("vae", CPU, torch.float32)
    with pytest.raises(BadFile, match=r"has no text encoder\. Give its file too \(text_encoders\)"):
        base.load_text_encoders(CPU, torch.float32)
    whole = load_base(files["flux"], text_encoders=[files["clip_l"], files["t5xxl"]])
    with pytest.raises(BadFile, match=r"captions need the tokenizer of T5 v1\.1 XXL"):
        whole.family.encode_text(whole.load_text_encoders(CPU, torch.float32), ["x"], 1, 1)
    with pytest.raises(UnknownFamily, match=r"ae\.safetensors: unknown text encoder"):
        load_base(files["flux"], text_encoders=[files["ae"]])


def test_what_is_no_base_model_is_said_to_be_what_it_is(files, tmp_path):
    with pytest.raises(
        UnknownFamily, match=r"this is a text encoder \(T5 v1\.1 XXL\)\. Use it together with a base model"
    ):
        load_base(files["t5xxl"])
    save_safetensors(tmp_path / "odd.safetensors", {"some.weight": torch.ones(1)})
    with pytest.raises(UnknownFamily, match=r"no family matches its 1 tensor, e\.g\. 'some\.weight'\. Supported: "):
        load_base(tmp_path / "odd.safetensors")
    with pytest.raises(BadFile, match=r"^sdxl: not found as a file or folder\. For a model on the hub, use owner/name"):
        load_base("sdxl")


def test_the_tokenizer_of_another_model_is_refused_before_anything_is_encoded(files, tokenizer, tmp_path):
    with pytest.raises(BadFile, match=r"not the tokenizer of T5 v1\.1 XXL\. It has 49408 tokens, and <pad> is 49407"):
        load_base(files["flux"], tokenizer=TOKENIZER_FOLDER)
    with pytest.raises(BadFile, match=r"not the tokenizer of Qwen3-4B\. It has \d+ tokens.* <\|im_start\|> is 151644"):
        text.load_tokenizer(str(tokenizer), "qwen3_4b")
    # mT5's has T5's special tokens, and eight times as many words.
    mt5 = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    mt5.add_tokens([f"word{number}" for number in range(32128)])
    mt5.save_pretrained(tmp_path / "mt5")
    with pytest.raises(BadFile, match=r"has 32\d+ tokens, and <pad> is 0, </s> is 1\. Expected at most 32128"):
        load_base(files["flux"], tokenizer=tmp_path / "mt5")


def test_a_variant_with_other_inputs_is_refused(parts):
    with pytest.raises(UnknownFamily, match=r"this is a fill \(inpainting\) model \(its denoiser takes 384 channels\)"):
        load_base({**parts["flux"], "img_in.weight": torch.zeros(WIDTH, 384)})


def test_a_fused_layer_with_unknown_or_missing_tensors_is_refused_by_name(parts):
    """As of quantisations that are not known here."""
    layer = "double_blocks.0.img_attn.qkv"
    base = load_base({**parts["flux"], f"{layer}.output_scale": torch.ones(())})
    base.compute_hashes()
    assert base.weight_bytes("denoiser", torch.int8)
    with pytest.raises(UnmatchedKeys, match=rf"has unknown 1 tensor, e\.g\. {layer}\.output_scale"):
        base.load("denoiser", CPU, torch.float32)
    without = {name: tensor for name, tensor in parts["flux"].items() if name != f"{layer}.weight"}
    with pytest.raises(UnmatchedKeys, match=r"lacks 6 tensors, e\.g\. transformer_blocks\.0\.attn\.to_k\.bias"):
        load_base(without).load("denoiser", CPU, torch.float32)


def test_the_command_line_trains_and_draws_from_files_apart(files, tokenizer, photo_folder, tmp_path):
    base = ["--base", files["flux"], "--vae", files["ae"], "--text-encoder", files["clip_l"],
            "--text-encoder", files["t5xxl"], "--tokenizer", tokenizer, "--device", "cpu"]  # fmt: skip
    output = tmp_path / "me.safetensors"
    options = ["--steps", "2", "--rank", "2", "--resolution", "64", "--no-check-photos"]
    train = ["train", photo_folder, *base, "--output", output, *options]
    assert main([str(argument) for argument in train]) in (0, None)
    lora = LoraFile.read(output)
    assert lora.family == "flux1" and "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in lora.tensors
    pictures = tmp_path / "pictures"
    options = ["--count", "1", "--steps", "2", "--size", "64x64"]
    generate = ["generate", *base, "--lora", output, "--output", pictures, *options]
    assert main([str(argument) for argument in generate]) in (0, None)
    assert len(list(pictures.glob("*.png"))) >= 1


CHECKPOINT_PREFIXES = {
    "sd15": {"text_encoder": "cond_stage_model.transformer."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@pytest.fixture
def sd_files(small_sd15, small_sdxl, tmp_path) -> Callable[[str, str], dict[str, Any]]:
    """(family, naming of the UNet) -> arguments of `load_base`: the small checkpoint's parts in files of their own."""

    def write(name: str, tensors: dict[str, Tensor]) -> Path:
        save_safetensors(tmp_path / name, {key: tensor.contiguous() for key, tensor in tensors.items()}, None)
        return tmp_path / name

    def files(family: str, unet_naming: str) -> dict[str, Any]:
        whole = load_base({"sd15": small_sd15, "sdxl": small_sdxl}[family])
        assert whole.file is not None
        unet = under(whole.file, "model.diffusion_model.")
        if unet_naming == "diffusers":
            unet = whole.load("denoiser", CPU, torch.float32).state_dict()
        elif unet_naming == "prefixed":
            unet = {f"model.diffusion_model.{name}": tensor for name, tensor in unet.items()}
        encoders = [under(whole.file, prefix) for prefix in CHECKPOINT_PREFIXES[family].values()]
        return {
            "source": write("unet.safetensors", unet),
            "vae": write("vae.safetensors", under(whole.file, "first_stage_model.")),
            "text_encoders": [write(f"clip_{i}.safetensors", encoder) for i, encoder in enumerate(encoders)],
        }

    return files


@pytest.mark.parametrize("naming", ["bare", "prefixed", "diffusers"])
@pytest.mark.parametrize("family", mostly_slow(UNETS, "sd15"))
def test_stable_diffusions_files_apart_are_the_same_base(sd_files, small_sd15, small_sdxl, family, naming):
    whole = load_base({"sd15": small_sd15, "sdxl": small_sdxl}[family])
    apart = load_base(**sd_files(family, naming))
    assert_same_weights(apart, whole)
    assert apart.family is whole.family and apart.identity == whole.identity
    assert {part: one.config for part, one in apart.components.items()} == {
        part: one.config for part, one in whole.components.items()
    }


def test_a_text_encoder_that_is_given_takes_the_place_of_the_checkpoints(small_sd15):
    whole = load_base(small_sd15)
    other = {name: 2 * tensor for name, tensor in whole.components["text_encoder"].tensors.items()}
    base = load_base(small_sd15, text_encoders=[other])
    name = "text_model.final_layer_norm.weight"
    assert torch.equal(base.components["text_encoder"].tensors[name], other[name])
    assert base.identity != whole.identity


def saved_by_comfyui(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """All text encoders in one file under ComfyUI's own prefixes, with what it keeps beside them."""
    tensors = {f"{kind}.transformer.{name}": tensor for kind, part in parts.items() for name, tensor in part.items()}
    return tensors | {f"{kind}.logit_scale": torch.tensor(4.6) for kind in parts}


def the_whole_clip(text_part: Mapping[str, Tensor]) -> dict[str, Tensor]:
    others = ("vision_model.embeddings.class_embedding", "visual_projection.weight", "text_projection.weight",
              "text_model.embeddings.position_ids", "logit_scale")  # fmt: skip
    return {**text_part, **{name: torch.zeros(1) for name in others}}


@pytest.mark.parametrize(
    "saved",
    [
        lambda clip, t5: [saved_by_comfyui({"clip_l": clip, "t5xxl": t5})],
        lambda clip, t5: [{f"text_encoders.{name}": tensor for name, tensor in saved_by_comfyui({"clip_l": clip}).items()}, t5],
        lambda clip, t5: [{**clip, "logit_scale": torch.tensor(4.6)}, t5],
        lambda clip, t5: [the_whole_clip(clip), t5],
        lambda clip, t5: [{name.removeprefix("text_model."): tensor for name, tensor in clip.items()}, t5],
        lambda clip, t5: [clip, {**t5, "decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1),
                                 "decoder.embed_tokens.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}],
    ],
    ids=["one file of both", "with the checkpoint's prefix", "with a scale", "the whole CLIP", "without text_model",
         "T5 with its decoder"],
)  # fmt: skip
def test_text_encoders_are_read_as_programs_save_them(parts, saved):
    clip, t5 = parts["clip_l"], parts["t5xxl"]
    base = load_base(parts["flux"], text_encoders=saved(clip, t5))
    assert base.text_fingerprint == load_base(parts["flux"], text_encoders=[clip, t5]).text_fingerprint
    assert set(base.load_text_encoders(CPU, torch.float32)) == {"text_encoder", "text_encoder_2"}


def test_sdxls_second_text_encoder_is_read_in_each_naming(small_sdxl):
    whole = load_base(small_sdxl)
    assert whole.file is not None
    first, second = (dict(whole.components[part].tensors) for part in whole.text_encoders)
    openclip = under(whole.file, "conditioner.embedders.1.model.")
    openclip |= {"visual.transformer.resblocks.0.ln_1.weight": torch.zeros(1), "logit_scale": torch.tensor(4.6)}
    for file in ([openclip, first], [saved_by_comfyui({"clip_l": first, "clip_g": second})], [dict(whole.file)]):
        unet = under(whole.file, "model.diffusion_model.")
        base = load_base(unet, text_encoders=file)
        assert base.text_fingerprint == whole.text_fingerprint
        assert base.components["text_encoder_2"].config == whole.components["text_encoder_2"].config


def test_clip_g_is_known_by_its_width_where_its_names_are_those_of_clip_l():
    with torch.device("meta"):
        tensors = {
            "text_model.final_layer_norm.weight": torch.empty(1280),
            "text_projection.weight": torch.empty(1280, 1280),
        }
    assert list(text.encoders_of(tensors)) == ["clip_g"]


def test_a_text_encoder_that_the_family_does_not_have_is_refused(parts, small_sd15):
    with pytest.raises(
        UnknownFamily, match=r"small\.safetensors: given tensors is T5 v1\.1 XXL, but .* 1\.x takes CLIP ViT-L/14$"
    ):
        load_base(small_sd15, text_encoders=[parts["t5xxl"]])


@pytest.mark.parametrize("shape", [(), (2, 3, 5)])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("flux", "img_in.weight"), ("flux", "txt_in.weight"), ("flux", "double_blocks.0.img_attn.qkv.weight"),
        ("flux", "double_blocks.0.img_attn.qkv.bias"), ("ae", "decoder.conv_in.weight"), ("t5xxl", "shared.weight"),
        ("clip_l", "text_model.final_layer_norm.weight"),
    ],
)  # fmt: skip
def test_a_tensor_with_other_dimensions_than_its_layer_s_is_refused_by_its_name(
    files, parts, tokenizer, part, name, shape
):
    save_safetensors(files[part], parts[part] | {name: torch.zeros(shape)})
    with pytest.raises(UnmatchedKeys) as refused:
        base = load_base(files["flux"], **others(files), tokenizer=tokenizer)
        base.load_text_encoders(CPU, torch.float32)
    message = str(refused.value)
    assert message.startswith("flux.safetensors") and f"{name} has shape {list(shape)}, " in message


def test_a_gguf_with_other_rows_than_its_fused_layer_s_is_refused_by_its_name(files, parts, tokenizer, tmp_path):
    name = "double_blocks.0.img_attn.qkv.bias"
    kind = gguf.GGMLQuantizationType.F32
    tensors = {key: (tensor, kind) for key, tensor in (parts["flux"] | {name: torch.zeros(7)}).items()}
    path = write_gguf(tmp_path / "flux-F32.gguf", tensors)
    with pytest.raises(UnmatchedKeys, match=rf"^flux-F32\.gguf.*{re.escape(name)} has shape \[7\]"):
        load_base(path, **others(files), tokenizer=tokenizer)


def test_a_text_encoder_that_is_not_whole_is_refused_with_what_it_lacks(parts):
    t5 = {name: tensor for name, tensor in parts["t5xxl"].items() if ".wi_0." not in name}  # as the first T5 is
    with pytest.raises(
        UnmatchedKeys, match=r"the text encoder lacks encoder\.block\.0\.layer\.1\.DenseReluDense\.wi_0"
    ):
        load_base(parts["flux"], text_encoders=[t5])
    qwen = {name: torch.empty(shape, device="meta") for name, shape in qwen3_shapes(2560).items()}
    del qwen["model.norm.weight"], qwen["model.embed_tokens.weight"]
    flux2 = {name: torch.empty(shape, device="meta") for name, shape in FLUX2_SHAPES.items()}
    with pytest.raises(UnmatchedKeys, match=r"the text encoder lacks embed_tokens\.weight"):
        load_base(flux2, text_encoders=[qwen])


@pytest.mark.parametrize("family", ["flux1", "sd15"])
def test_a_text_encoder_of_the_wrong_width_is_refused(parts, small_sd15, family):
    wide = state_of("clip_l", CLIP_L | {"hidden_size": 40, "vocab_size": 8})
    with pytest.raises(
        UnknownFamily, match=r"takes (pooled )?states of width (24|64)\. These have width 40 \(text encoders of .*CLIP"
    ):
        load_base(parts["flux"] if family == "flux1" else small_sd15, text_encoders=[wide])


@pytest.mark.parametrize("without", ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"])
def test_a_vae_without_a_tensor_that_its_sizes_are_read_from_is_refused_by_name(parts, without):
    vae = {name: tensor for name, tensor in parts["ae"].items() if name != without}
    with pytest.raises(
        UnmatchedKeys, match=rf"^given tensors with the VAE of given tensors: the VAE lacks .*{without[-12:]}"
    ):
        load_base(parts["flux"], vae=vae)


def test_klein_with_the_qwen3_of_the_other_size_is_refused():
    with torch.device("meta"):
        denoiser = {f"model.diffusion_model.{name}": torch.empty(shape) for name, shape in FLUX2_SHAPES.items()}
        right, wrong = (
            {name: torch.empty(shape) for name, shape in qwen3_shapes(width).items()} for width in (2560, 4096)
        )
    assert load_base(denoiser, text_encoders=[right]).components["text_encoder"].config["hidden_size"] == 2560
    with pytest.raises(
        UnknownFamily, match=r"takes states of width 7680\. These have width 12288 \(text encoders of FLUX\.2: Qwen3-4B"
    ):
        load_base(denoiser, text_encoders=[wrong])


class CountedReads(dict[str, Tensor]):
    """Tensors, and how often each was asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.reads: Counter[str] = Counter()

    def __getitem__(self, name: str) -> Tensor:
        self.reads[name] += 1
        return super().__getitem__(name)


@pytest.mark.parametrize("read", ["loaded", "hashed"])
def test_a_scaled_weight_is_computed_once_though_several_are_cut_from_it(parts, read):
    tensors = CountedReads(parts["flux"])
    for name in [name for name in tensors if name.endswith(("qkv.weight", "linear1.weight"))]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".scale_weight")] = torch.tensor(0.5)
    base = load_base(tensors)
    tensors.reads.clear()
    if read == "loaded":
        base.load("denoiser", CPU, torch.float32)
    else:
        base.fingerprint("denoiser")
    assert {count for name, count in tensors.reads.items() if name.endswith("scale_weight")} == {1}


def test_one_file_of_more_text_encoders_than_the_family_has_is_taken(parts, small_sd15):
    encoder = dict(load_base(small_sd15).components["text_encoder"].tensors)
    file = saved_by_comfyui({"clip_l": encoder, "t5xxl": parts["t5xxl"]})
    assert load_base(small_sd15, text_encoders=[file]).identity == load_base(small_sd15).identity


def test_t5s_embedding_is_in_memory_once(parts):
    base = load_base(parts["flux"], text_encoders=[parts["clip_l"], parts["t5xxl"]])
    state = base.load("text_encoder_2", CPU, torch.bfloat16).state_dict()
    assert state["shared.weight"].data_ptr() == state["encoder.embed_tokens.weight"].data_ptr()


@pytest.mark.parametrize(
    ("part", "odd"),
    [
        ("vae", {"act_fn": "x"}), ("vae", {"layers_per_block": 2**40}), ("unet", {"in_channels": []}),
        ("unet", {"block_out_channels": None}), ("unet", []), ("unet", {"transformer_layers_per_block": [[1, 2**31], 1]}),
    ],
)  # fmt: skip
def test_a_config_that_makes_no_sense_is_named(tmp_path, small_sd15, part, odd):
    """What diffusers and transformers raise for one can be anything."""
    base = load_base(small_sd15)
    configs = {name: dict(base.components[name].config) for name in ("denoiser", "vae", "text_encoder")}
    classes = {"denoiser": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}
    for name, config in configs.items():
        folder = tmp_path / {"denoiser": "unet"}.get(name, name)
        folder.mkdir()
        given = {"_class_name": classes[name], **config}
        broken = (given | odd if odd else odd) if folder.name == part else given
        (folder / "config.json").write_text(json.dumps(broken))
        save_safetensors(folder / "model.safetensors", base.load(name, torch.device("cpu"), torch.float32).state_dict())
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(FaceLoraError, match=r"config of the|is not a JSON object|takes \[\] channels"):
        load_base(tmp_path).load("denoiser" if part == "unet" else part, torch.device("cpu"), torch.float32)


def test_a_file_that_seems_to_have_billions_of_layers_is_refused_at_once(parts):
    name = next(name for name in parts["flux"] if "single_blocks.0." in name)
    odd = {**parts["flux"], name.replace(".0.", f".{2**31}."): parts["flux"][name]}
    with pytest.raises(BadFile, match=f"the denoiser has {2**31 + 1} layers, but there are only"):
        load_base(odd, text_encoders=[parts["clip_l"], parts["t5xxl"]])


def test_a_pipeline_as_a_base_model_is_refused_with_what_to_do():
    with pytest.raises(BadConfig, match=r"the base model is a object: .* pipeline\.save_pretrained\(folder\)"):
        load_base(object())  # pyright: ignore[reportArgumentType]
