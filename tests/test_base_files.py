"""FLUX.1 from the files that ComfyUI users have: denoiser, text encoders and VAE apart or in one, plain or scaled fp8."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
)

from core.base import load_base
from core.cli import main
from core.errors import BadFile, UnknownFamily, UnmatchedKeys
from core.families import ldm, text
from core.families.clip import TOKENIZER_FOLDER
from core.families.sd3 import CONTEXT_WIDTH
from core.lora_file import LoraFile
from core.safetensors_file import save_safetensors
from core.sampling import encode_prompts
from tests.tooling import SMALL_FLOWS, RandomTensors

CPU = torch.device("cpu")
WIDTH = 128
T5 = {"vocab_size": 32128, "d_model": 32, "d_kv": 64, "d_ff": 48, "num_layers": 2, "num_heads": 2,
      "feed_forward_proj": "gated-gelu"}  # fmt: skip
SD3_SHAPES = {
    name: torch.empty(shape, device="meta")
    for name, shape in {
        "x_embedder.proj.weight": (64, 16, 2, 2), "final_layer.linear.weight": (64, 64), "pos_embed": (1, 144, 64),
        "context_embedder.weight": (64, 256), "y_embedder.mlp.0.weight": (64, 152),
        "joint_blocks.0.x_block.attn.qkv.weight": (192, 64),
    }.items()
}  # fmt: skip
"""What tells an SD3 and its sizes, for what asks nothing more of the denoiser."""


def flux1_shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of Black Forest Labs' model with one double and two single blocks of one head."""

    def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    shapes = linear("img_in", WIDTH, 64) | linear("txt_in", WIDTH, 32) | linear("final_layer.linear", 64, WIDTH)
    shapes |= linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    for name, inputs in (("time_in", 256), ("vector_in", 24), ("guidance_in", 256)):
        shapes |= linear(f"{name}.in_layer", WIDTH, inputs) | linear(f"{name}.out_layer", WIDTH, WIDTH)
    for stream in ("img", "txt"):
        block = f"double_blocks.0.{stream}"
        shapes |= linear(f"{block}_mod.lin", 6 * WIDTH, WIDTH) | linear(f"{block}_attn.qkv", 3 * WIDTH, WIDTH)
        shapes |= linear(f"{block}_attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}_mlp.0", 4 * WIDTH, WIDTH) | linear(f"{block}_mlp.2", WIDTH, 4 * WIDTH)
        shapes |= {f"{block}_attn.norm.{x}_norm.scale": (WIDTH,) for x in ("query", "key")}
    for number in range(2):
        block = f"single_blocks.{number}"
        shapes |= linear(f"{block}.linear1", 7 * WIDTH, WIDTH) | linear(f"{block}.linear2", WIDTH, 5 * WIDTH)
        shapes |= linear(f"{block}.modulation.lin", 3 * WIDTH, WIDTH)
        shapes |= {f"{block}.norm.{x}_norm.scale": (WIDTH,) for x in ("query", "key")}
    return shapes


def state_of(kind: str, config: dict[str, Any]) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = (ldm.build_vae(config) if kind == "vae" else text.build(kind, config)).state_dict()
    draw = RandomTensors({name: tuple(tensor.shape) for name, tensor in state.items()}, torch.float32, seed=2)
    return {name: draw(name) for name in state}


@pytest.fixture(scope="module")
def parts() -> dict[str, dict[str, Tensor]]:
    """Part -> its tensors, as they stand in a file of its own."""
    draw = RandomTensors(flux1_shapes(), torch.float32, seed=1)
    clip = {"vocab_size": 49408, "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 1, "max_position_embeddings": 77, "hidden_act": "quick_gelu",
            "eos_token_id": 49407}  # fmt: skip
    t5_state = state_of("t5xxl", T5)
    del t5_state["encoder.embed_tokens.weight"]  # files have one of its two names
    vae_state = {
        ldm.ldm_vae_path(name, 2): tensor for name, tensor in state_of("vae", SMALL_FLOWS["flux1"].vae).items()
    }
    return {
        "flux": {name: draw(name) for name in draw.layout},
        "clip_l": state_of("clip_l", clip),
        "t5xxl": t5_state,
        "ae": vae_state,
    }


@pytest.fixture
def files(parts, tmp_path) -> dict[str, Path]:
    for name, tensors in parts.items():
        save_safetensors(tmp_path / f"{name}.safetensors", tensors, None)
    return {name: tmp_path / f"{name}.safetensors" for name in parts}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    """A folder with a small T5-like tokenizer: words of this test, pieces of one letter, and the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    letters = [f"▁{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"] + list("abcdefghijklmnopqrstuvwxyz,.")
    words = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), *((piece, -5.0) for piece in letters), ("▁photo", -2.0)]
    made = Tokenizer(models.Unigram(words, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_files_apart_and_one_checkpoint_are_the_same_base(parts, files, tokenizer, tmp_path):
    prefixes = {"flux": "model.diffusion_model.", "ae": "vae.", "clip_l": "text_encoders.clip_l.transformer.",
                "t5xxl": "text_encoders.t5xxl.transformer."}  # fmt: skip
    whole = {prefixes[part] + name: tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
    save_safetensors(tmp_path / "whole.safetensors", whole, None)
    one = load_base(tmp_path / "whole.safetensors", tokenizer=tokenizer)
    apart = load_base(
        files["flux"], vae=files["ae"], text_encoders=[files["t5xxl"], files["clip_l"]], tokenizer=tokenizer
    )
    for part in ("denoiser", "vae", "text_encoder", "text_encoder_2"):
        expected = one.load(part, CPU, torch.float32).state_dict()
        for name, tensor in apart.load(part, CPU, torch.float32).state_dict().items():
            assert torch.equal(tensor, expected[name]), name


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
    base = load_base(files["flux"], text_encoders=[files["t5xxl"], files["clip_l"]], tokenizer=tokenizer)
    encoders = base.load_text_encoders(CPU, torch.float32)
    clip = pipelines_clip(encoders["text_encoder"], base.components["text_encoder"].config, CLIPTextModel)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, transformer=None,  # pyright: ignore
        text_encoder=clip, tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER),
        text_encoder_2=encoders["text_encoder_2"], tokenizer_2=pipelines_t5_tokenizer(tokenizer),  # pyright: ignore
    )  # fmt: skip
    prompts = ["a photo of sks person", "sks"]
    context, pooled, _ = pipeline.encode_prompt(prompts, prompts, max_sequence_length=512)
    ours = base.family.encode_text(encoders, prompts, 1, 1)
    torch.testing.assert_close(ours["context"], context, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours["pooled"], pooled, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("shape", [(), (1,), (WIDTH,), (WIDTH, 1)])
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
    expected = (weight.float() * of_rows).to(torch.bfloat16)
    assert torch.equal(read["transformer_blocks.0.attn.to_out.0.weight"], expected)
    assert not any("scale" in key or "quant" in key for key in read)


def test_other_quantisations_are_refused_by_name(parts, tmp_path):
    flux = parts["flux"]

    def refused(extra: dict[str, Tensor], said: str, metadata: dict[str, str] | None = None) -> None:
        save_safetensors(tmp_path / "q.safetensors", {**flux, **extra}, metadata)
        with pytest.raises(BadFile, match=rf"^q\.safetensors: .*{said}.*; give the model in bf16, fp16 or fp8"):
            load_base(tmp_path / "q.safetensors")

    def description(text: str) -> Tensor:
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    fp8 = flux["img_in.weight"].to(torch.float8_e4m3fn)
    scale = {"img_in.weight_scale": torch.ones(())}
    refused({"img_in.comfy_quant": description('{"format": "nvfp4"}'), **scale}, "img_in is quantised as nvfp4")
    refused({"img_in.comfy_quant": description("[]"), **scale}, "what it says of how its layers are quantised")
    refused(
        scale, "img_in is quantised as mxfp8", {"_quantization_metadata": '{"layers": {"img_in": {"format": "mxfp8"}}}'}
    )
    refused({}, "what it says of how", {"_quantization_metadata": '{"layers": 3}'})
    refused({"img_in.weight.absmax": torch.ones(4)}, r"cannot be read here, e\.g\. 'img_in\.weight\.absmax'")
    refused({"img_in.weight": fp8.to(torch.int8), **scale}, r"is quantised, e\.g\. 'img_in\.weight' to torch\.int8")
    refused(
        {"img_in.weight": fp8, "img_in.weight_scale": torch.ones(WIDTH, 2)}, r"img_in\.weight .* a scale of \[128, 2\]"
    )
    refused({"img_in.weight": fp8, "img_in.scale_weight": torch.ones(1, 64)}, r"img_in\.weight .* a scale of \[1, 64\]")
    with pytest.raises(BadFile, match=r"img_in\.weight .* in torch\.int8 has a scale"):
        load_base({**flux, "img_in.weight": fp8.to(torch.int8), **scale})
    with pytest.raises(BadFile, match=r"the denoiser is quantised, e\.g\. x_embedder\.weight to torch\.int8; give"):
        load_base({**flux, "img_in.weight": fp8.to(torch.int8)}).load("denoiser", CPU, torch.float32)


def test_what_is_missing_is_said_when_it_is_needed(files, parts):
    base = load_base(files["flux"])
    with pytest.raises(BadFile, match=r"flux\.safetensors: has no vae; give its file too \(vae\)"):
        base.load("vae", CPU, torch.float32)
    with pytest.raises(BadFile, match=r"has no text encoder; give its file too \(text_encoders\)"):
        base.load_text_encoders(CPU, torch.float32)
    whole = load_base(files["flux"], text_encoders=[files["clip_l"], files["t5xxl"]])
    with pytest.raises(BadFile, match=r"captions need the tokenizer of T5 v1\.1 XXL"):
        whole.family.encode_text(whole.load_text_encoders(CPU, torch.float32), ["x"], 1, 1)
    with pytest.raises(UnknownFamily, match=r"ae\.safetensors: no text encoder that is known"):
        load_base(files["flux"], text_encoders=[files["ae"]])


def test_the_tokenizer_of_another_model_is_refused_before_anything_is_encoded(files, tokenizer, tmp_path):
    with pytest.raises(BadFile, match=r"another model than T5 v1\.1 XXL: in its 49408 tokens <pad> is 49407"):
        load_base(files["flux"], tokenizer=TOKENIZER_FOLDER)
    with pytest.raises(BadFile, match=r"than Qwen3-4B: in its \d+ tokens .* expected .* <\|im_start\|> is 151644"):
        text.load_tokenizer(str(tokenizer), "qwen3_4b")
    # mT5's has T5's special tokens, and eight times as many words.
    mt5 = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer / "tokenizer.json"))
    mt5.add_tokens([f"word{number}" for number in range(32128)])
    mt5.save_pretrained(tmp_path / "mt5")
    with pytest.raises(BadFile, match=r"in its 32\d+ tokens <pad> is 0, </s> is 1, expected at most 32128"):
        load_base(files["flux"], tokenizer=tmp_path / "mt5")


@pytest.mark.parametrize(
    ("part", "without"),
    [
        ("ae", "encoder.down.0.block.0.conv1.weight"),
        ("ae", "decoder.conv_in.weight"),
        ("t5xxl", "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"),
        ("t5xxl", "shared.weight"),
    ],
)
def test_a_file_without_a_tensor_that_its_sizes_are_read_from_is_refused_by_name(parts, part, without):
    spoiled = {name: tensor for name, tensor in parts[part].items() if name != without}
    files: dict[str, Any] = {"vae": spoiled} if part == "ae" else {"text_encoders": [spoiled]}
    with pytest.raises(UnmatchedKeys, match=rf"^given tensors: the (VAE|text encoder) lacks .*{without[-12:]}"):
        load_base(parts["flux"], **files)


def test_a_text_encoder_of_another_width_is_refused_by_name(files, tokenizer):
    other = state_of("t5xxl", T5 | {"d_model": 48})
    base = load_base(files["flux"], text_encoders=[other, files["clip_l"]], tokenizer=tokenizer)
    with pytest.raises(
        BadFile, match=r"^flux\.safetensors: its text encoder is another model's: texts are 32 wide .* 48;"
    ):
        encode_prompts(base, base.load_text_encoders(CPU, torch.float32), ["a photo"])


def test_a_variant_with_other_inputs_is_refused(parts):
    with pytest.raises(UnknownFamily, match=r"this is a fill \(inpainting\) model \(its denoiser takes 384 channels\)"):
        load_base({**parts["flux"], "img_in.weight": torch.zeros(WIDTH, 384)})


def test_the_command_line_trains_and_draws_from_files_apart(files, tokenizer, photo_folder, tmp_path):
    base = ["--base", files["flux"], "--vae", files["ae"], "--text-encoder", files["clip_l"],
            "--text-encoder", files["t5xxl"], "--tokenizer", tokenizer, "--device", "cpu"]  # fmt: skip
    output = tmp_path / "me.safetensors"
    train = ["train", photo_folder, *base, "--output", output, "--steps", 2, "--rank", 2, "--resolution", 64]
    assert main([str(argument) for argument in train]) in (0, None)
    lora = LoraFile.read(output)
    assert lora.family == "flux1" and "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in lora.tensors
    pictures = tmp_path / "pictures"
    generate = [
        "generate",
        *base,
        "--lora",
        output,
        "--output",
        pictures,
        "--count",
        1,
        "--steps",
        2,
        "--size",
        "64x64",
    ]
    assert main([str(argument) for argument in generate]) in (0, None)
    assert len(list(pictures.glob("*.png"))) >= 1
