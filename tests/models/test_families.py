"""Base models in the original naming: the same networks, with the same weights, as diffusers and transformers make of them."""

import json

import pytest
import torch
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from core.errors import BadFile, UnknownFamily, UnmatchedKeys
from core.models import clip, load_base
from core.models.families import FAMILIES
from core.storage.safetensors_file import SafetensorsFile
from core.tensor_names.unet import diffusers_unet_path
from tests.tooling import (
    FULL_SD15,
    FULL_SDXL,
    SMALL_SD15,
    SMALL_SDXL,
    UNETS,
    Shape,
    configs,
    original_shapes,
    write_checkpoint,
)

CPU = torch.device("cpu")


def meta_checkpoint(shape: Shape) -> dict[str, torch.Tensor]:
    return {name: torch.empty(size, device="meta") for name, size in original_shapes(shape).items()}


@pytest.mark.parametrize("family", UNETS)
@pytest.mark.parametrize(
    ("part", "convert"), [("denoiser", convert_ldm_unet_checkpoint), ("vae", convert_ldm_vae_checkpoint)]
)
def test_denoiser_and_vae_have_the_weights_that_diffusers_conversion_gives(bases, family, part, convert):
    base = bases[family]
    network = base.load(part, CPU, torch.float32)
    converted, state = convert(dict(base.file), dict(network.config)), network.state_dict()
    assert set(converted) == set(state)
    assert all(torch.equal(converted[name].reshape(state[name].shape), state[name]) for name in state)


@pytest.mark.parametrize("family", UNETS)
def test_attention_computes_what_diffusers_own_does_to_the_bit(bases, family):
    base = bases[family]
    unet = base.load("denoiser", CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    context = torch.randn(2, 5, base.components["denoiser"].config["cross_attention_dim"], generator=generator)
    checked = 0
    for attention in unet.modules():
        if not isinstance(attention, Attention):
            continue
        states = torch.randn(2, 9, attention.to_q.in_features, generator=generator)
        given = context if attention.is_cross_attention else None
        outputs = []
        for processor in (attention.processor, AttnProcessor2_0()):
            attention.set_processor(processor)  # pyright: ignore
            outputs.append(attention(states, encoder_hidden_states=given))
        assert torch.equal(*outputs)
        checked += 1
    assert checked


def test_sdxls_second_text_encoder_has_the_weights_that_diffusers_conversion_gives(bases):
    base = bases["sdxl"]
    encoder = base.load("text_encoder_2", CPU, torch.float32)
    converted = convert_open_clip_checkpoint(encoder, dict(base.file), prefix="conditioner.embedders.1.model.")
    state = encoder.state_dict()
    shared = set(state) & set(converted)
    assert len(shared) >= len(state) - 1
    assert all(torch.equal(converted[name], state[name]) for name in shared)


@pytest.mark.parametrize(("shape", "reference"), [(FULL_SD15, "sd15"), (FULL_SDXL, "sdxl")], ids=["sd15", "sdxl"])
def test_a_full_size_checkpoint_has_the_published_models_configuration_and_names(shape, reference):
    components = FAMILIES[reference].split(meta_checkpoint(shape))
    for part, expected in configs(shape).items():
        found = components[part].config
        assert {name: found[name] for name in expected if name in found} == {
            name: value for name, value in expected.items() if name in found
        }
    with torch.device("meta"):
        networks = {part: FAMILIES[reference].build(part, component.config) for part, component in components.items()}
    for part in ("denoiser", "vae"):  # whose names went to the original ones and came back
        assert set(components[part].tensors) == set(networks[part].state_dict())
    # 859.5 and 2567.5 million: the parameter counts of the published UNets.
    millions = sum(parameter.numel() for parameter in networks["denoiser"].parameters()) / 1e6
    assert millions == pytest.approx({"sd15": 859.5, "sdxl": 2567.5}[reference], abs=0.1)


@pytest.mark.parametrize("skip", [1, 2])
def test_prompts_are_encoded_as_diffusers_sd15_pipeline_does(bases, skip, monkeypatch):
    pipeline, base = bases["sd15"].pipeline(), bases["sd15"]
    encoders = base.load_text_encoders(CPU, torch.float32)
    if not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers 0.42 looks for it in transformers 5, which has dropped it.
        monkeypatch.setattr(type(pipeline.text_encoder), "text_model", property(lambda encoder: encoder), raising=False)
    with torch.no_grad():
        ours = base.family.encode_text(encoders, ["a photo of sks person"], skip, 1)
        theirs, _ = pipeline.encode_prompt("a photo of sks person", CPU, 1, False, clip_skip=skip - 1 or None)
    torch.testing.assert_close(ours["context"], theirs, rtol=1e-5, atol=1e-5)


def test_prompts_are_encoded_as_diffusers_sdxl_pipeline_does(bases):
    pipeline, base = bases["sdxl"].pipeline(), bases["sdxl"]
    encoders = base.load_text_encoders(CPU, torch.float32)
    with torch.no_grad():
        ours = base.family.encode_text(encoders, ["a photo of sks person"], 1, 1)
        context, _, pooled, _ = pipeline.encode_prompt(
            "a photo of sks person", device=CPU, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    torch.testing.assert_close(ours["context"], context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours["pooled"], pooled, rtol=1e-5, atol=1e-5)


def test_the_pooled_state_is_at_the_end_of_the_text_whatever_the_config_says():
    """Published configs say that the end is 2, for which transformers takes the largest number: an added word's."""
    config = configs(SMALL_SDXL)["text_encoder_2"] | {"eos_token_id": 2}
    torch.manual_seed(0)
    encoder = clip.build_text_encoder(config, projection=True).eval()
    tokens = torch.tensor([[[clip.START, 320, clip.END, *[0] * 74]]])

    def pooled(tokens: torch.Tensor) -> torch.Tensor:
        return clip.pooled(clip.encode_chunks(encoder, tokens, layer=2, final_norm=False)[1])

    plain = pooled(tokens)
    clip.add_word(encoder, "sks", encoder.get_submodule("text_model.embeddings.token_embedding").weight[320:321])  # pyright: ignore
    tokens[tokens == 320] = clip.words_of(encoder)["sks"][0]
    torch.testing.assert_close(pooled(tokens), plain)


def test_a_long_caption_is_encoded_in_chunks_of_75_tokens_without_loss():
    caption = " ".join(f"word{number}" for number in range(100))
    chunks = clip.chunk_count([caption])
    tokens = clip.token_chunks([caption, "short"], chunks, padding=clip.END)
    assert tokens.shape == (2, chunks, 77)
    inner = [token for chunk in tokens[0].tolist() for token in chunk[1:76] if token != clip.END]
    assert inner == clip.caption_tokens(caption)
    assert tokens[1, 1].tolist() == [clip.START, *[clip.END] * 76]


def test_size_conditioning_is_height_first_and_in_full_precision(bases):
    family = FAMILIES["sdxl"]
    conditioning = family.image_conditioning((1003, 1501), (17, 5), (832, 1216))
    assert conditioning["time_ids"].tolist() == [[1501, 1003, 5, 17, 1216, 832]]
    seen = {}

    def denoiser(latents, timesteps, encoder_hidden_states, added_cond_kwargs, return_dict):
        seen.update(added_cond_kwargs)
        return (latents,)

    text = {"context": torch.zeros(1, 77, 192), "pooled": torch.zeros(1, 128)}
    family.predict(denoiser, torch.zeros(1, 4, 8, 8, dtype=torch.bfloat16), torch.zeros(1), text | conditioning)  # pyright: ignore
    assert seen["time_ids"].tolist() == [[1501, 1003, 5, 17, 1216, 832]]
    assert seen["text_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("marker", "name"),
    [
        ("conditioner.embedders.0.model.transformer.resblocks.0.ln_1.weight", "refiner"),
        ("cond_stage_model.model.transformer.resblocks.0.ln_1.weight", "Stable Diffusion 2"),
        ("edm_mean", "Playground v2.5"),
        ("edm_vpred.sigma_max", "CosXL"),
        ("nerf_blocks.0.norm.scale", "Chroma Radiance"),
        ("txt_in.individual_token_refiner.blocks.0.norm1.weight", "HunyuanVideo"),
        ("patchify_proj.weight", "LTX-Video"),
        ("emb_in.video.weight", "FLUX.3 for video"),
        ("double_blocks.0.img_mlp.gate_proj.weight", "Ovis-Image"),
        ("noise_refiner.0.adaLN_modulation.1.weight", "Lumina 2"),
        ("siglip_embedder.1.weight", "Z-Image-Omni"),
        ("__index_timestep_zero__", "Qwen-Image-Edit"),
        ("time_text_embed.addition_t_embedding.weight", "Qwen-Image-Layered"),
    ],
)
def test_models_of_other_families_are_refused_by_name(marker, name):
    tensors = {marker: torch.zeros(1)}
    if marker.startswith("edm_"):
        tensors |= meta_checkpoint(SMALL_SDXL)
    if name == "Chroma Radiance":
        tensors["double_blocks.0.img_attn.norm.key_norm.scale"] = torch.zeros(1)  # it has FLUX.1's blocks too
    with pytest.raises(UnknownFamily, match=f"this is .*{name}.* not supported yet\\. Supported: Stable Diffusion 1"):
        load_base(tensors)


def test_a_transformer_in_diffusers_naming_is_refused_with_what_to_give():
    with pytest.raises(UnknownFamily, match=r"a denoiser in diffusers naming\. Use the whole diffusers folder"):
        load_base({"transformer_blocks.0.attn.to_q.weight": torch.zeros(1)})


@pytest.mark.parametrize(("channels", "name"), [(9, "inpainting"), (8, "InstructPix2Pix"), (5, "unknown variant")])
def test_variants_with_other_inputs_are_refused_by_name(channels, name):
    tensors = meta_checkpoint(SMALL_SD15)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.empty(32, channels, 3, 3)
    with pytest.raises(UnknownFamily, match=f"{name}.*{channels} channels"):
        load_base(tensors)


def test_unets_that_look_like_a_known_one_are_refused_by_name():
    unet = "model.diffusion_model."
    pruned = {
        name: t for name, t in meta_checkpoint(SMALL_SDXL).items() if not name.startswith(f"{unet}middle_block.1.")
    }
    with pytest.raises(
        UnknownFamily, match="this is a pruned UNet, like SSD-1B or Segmind-Vega, which is not supported"
    ):
        load_base(pruned)
    checkpoint = meta_checkpoint(SMALL_SDXL)
    consistency = checkpoint | {f"{unet}time_embed.cond_proj.weight": torch.empty(256, 64, device="meta")}
    alone = {name.removeprefix(unet): t for name, t in consistency.items() if name.startswith(unet)}
    layers = SMALL_SDXL.unet["layers_per_block"]
    in_diffusers_names = {diffusers_unet_path(name, layers): t for name, t in alone.items()}
    for model in (consistency, alone, in_diffusers_names):
        with pytest.raises(
            UnknownFamily, match="this is a latent consistency model, distilled to a few steps, which is not"
        ):
            load_base(model)


def test_a_unet_alone_says_how_it_predicts_and_what_is_missing(bases):
    unet = "model.diffusion_model."
    alone = {name.removeprefix(unet): t for name, t in bases["sdxl"].file.items() if name.startswith(unet)}
    first = bases["sdxl"].components["text_encoder"].tensors
    base = load_base(alone | {"v_pred": torch.zeros(0)}, text_encoders=[first])
    assert (base.family.name, base.prediction_type) == ("sdxl", "v_prediction")
    with pytest.raises(BadFile, match=r"has no text encoder 2\. Give its file too \(text_encoders\)"):
        base.load_text_encoders(CPU, torch.float32)


def test_a_checkpoint_without_a_tensor_is_refused_with_its_name(tmp_path):
    path = write_checkpoint(tmp_path / "holes.safetensors", SMALL_SD15, without="out_layers.3.bias")
    base = load_base(path)
    with pytest.raises(UnmatchedKeys, match=r"^holes\.safetensors: the denoiser lacks \d+ tensors, e\.g\. down_blocks"):
        base.load("denoiser", CPU, torch.float32)


def test_a_text_encoder_on_another_device_is_there_with_all_of_it(bases):
    """CLIP's position numbers are in no checkpoint; once they stayed on the CPU."""
    for part in ("text_encoder", "text_encoder_2"):
        encoder = bases["sdxl"].load(part, torch.device("meta"), torch.float16)
        assert {buffer.device.type for buffer in encoder.buffers()} | {p.device.type for p in encoder.parameters()} == {
            "meta"
        }


def test_reading_a_base_holds_no_weight_twice(small_sd15):
    base = load_base(small_sd15)
    denoiser = base.load("denoiser", CPU, torch.float32)
    assert isinstance(base.file, SafetensorsFile)
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    assert denoiser.get_submodule("mid_block.resnets.0.conv1").weight.data_ptr() == base.file[name].data_ptr()  # pyright: ignore


def test_the_tokenizers_licence_and_origin_are_stated():
    vocabulary = json.loads((clip.TOKENIZER_FOLDER / "vocab.json").read_text(encoding="utf-8"))
    assert len(vocabulary) == 49408
    assert vocabulary["<|endoftext|>"] == clip.END
    notice = (clip.TOKENIZER_FOLDER.parents[2] / "NOTICE").read_text(encoding="utf-8")
    assert "CLIP" in notice and "MIT" in notice
