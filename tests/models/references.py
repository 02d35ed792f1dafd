"""What diffusers makes of a family's weights and captions: each family's network, its authors' names, its text encoder.

tests/models/test_references.py compares every family here with it. A new family is an entry in REFERENCES.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils
from diffusers.modular_pipelines.flux3 import before_denoise, encoders
from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids
from torch import Tensor

from core.lora.file import LoraFile
from core.models.families import longcat_image
from tests.models.family_parts import (
    CPU,
    Words,
    in_original_names,
    pipeline_with,
    rough_weights,
    small_qwen3vl,
)
from tests.tooling import small_flow_base

SENTENCE = "sks person, outdoors, in the evening sun, smiling at the camera. "
CAPTIONS = ("", "a photo of sks person", 4 * SENTENCE)


@dataclass(frozen=True)
class Reference:
    """A family in diffusers."""

    network: str
    """The class of its denoiser."""
    predict: Callable[[Any, Tensor, Tensor, Tensor], Tensor]
    """What the pipeline asks (denoiser, latents (1, C, H, W), times (1,) from 0 to 1, states of a text (1, L, D)) for."""
    takes: Mapping[str, int]
    """What the denoiser's config has if it takes the states of `encoder`."""
    encoder: Callable[[], Any]
    """Makes the network of transformers that a diffusers folder has as its text encoder, small."""
    states: Callable[[Any, Words, Sequence[str]], list[Tensor]]
    """The states (L, D) of captions by the pipeline, from the text encoder, without those that are no text's."""
    kind: str
    """The kind of the text encoder, a key of `text.KINDS`."""
    language_model: Callable[[Any], Any] = lambda encoder: encoder.language_model
    """Returns what a file of the text encoder has the tensors of."""
    captions: Sequence[str] = CAPTIONS
    words: Words = field(default_factory=Words)
    constants: Mapping[str, Any] = field(default_factory=dict)
    """What the family knows by the published tokenizer's numbers of tokens, as it is with `words`."""
    converter: str = ""
    """diffusers' own function that reads the authors' names, of single_file_utils."""
    lengths: tuple[int, int, int] = (9, 4, 9)
    """The lengths of three texts to predict for."""
    published: Mapping[str, Any] = field(default_factory=lambda: {"num_layers": 2})
    """The config of a model as wide as the published ones, where it differs from the defaults of the class."""
    index: str = "model_index.json"
    """The file of a folder that names the pipeline."""
    lora: tuple[Callable[[Any], Any], str, int] | None = None
    """Makes from the denoiser what loads LoRAs; the naming of one, and the number of its modules in the small model."""

    def denoiser(self, family: str, **config: Any) -> Any:
        """Make the small denoiser with random weights, those of norms too."""
        config = dict(small_flow_base(family, **config).components["denoiser"].config)
        return rough_weights(getattr(diffusers, self.network).from_config(config))

    def original(self, family: str, denoiser: Any) -> dict[str, Tensor]:
        """Return the weights under the authors' names, which diffusers' own converter reads."""
        state = denoiser.state_dict()
        renamed = in_original_names(state, family)
        if self.converter:
            converted = getattr(single_file_utils, self.converter)(dict(renamed))
            assert {name: tensor.shape for name, tensor in converted.items()} == {n: t.shape for n, t in state.items()}
            # What Krea 2's converter makes of norms differs by rounding.
            assert family == "krea2" or all(torch.equal(converted[name], tensor) for name, tensor in state.items())
        return renamed


def flux3(denoiser: Any, latents: Tensor, times: Tensor, states: Tensor, target: Tensor | None = None) -> Tensor:
    """Return what the pipeline asks for; `target` are the times that a flow map's step leads to."""
    height, width = latents.shape[2:]
    step = before_denoise.Flux3PrepareLatentsStep()
    tokens = denoiser(
        hidden_states=latents.flatten(2).transpose(1, 2), encoder_hidden_states=states, timestep=times,
        target_timestep=target, img_ids=before_denoise._prepare_image_ids(height, width, step.image_rope_scale),
        txt_ids=before_denoise.Flux3TextRoPEInputsStep._prepare_text_ids(states), return_dict=False,
    )[0]  # fmt: skip
    return tokens.view(len(latents), height, width, -1).permute(0, 3, 1, 2)


def _flux3_states(network: Any, words: Words, captions: Sequence[str]) -> list[Tensor]:
    step = encoders.Flux3TextEncoderStep()
    layers = next(given.default for given in step.inputs if given.name == "text_encoder_out_layers")
    return [
        step._get_qwen3_vl_prompt_embeds(
            network, words, caption, pad_multiple=step.pad_multiple, hidden_states_layers=layers  # pyright: ignore
        )[0]
        for caption in captions
    ]  # fmt: skip


def _flux3_pipeline(denoiser: Any) -> Any:
    pipe = diffusers.Flux3AutoBlocks().init_pipeline()
    pipe.update_components(transformer=denoiser)
    return pipe


def _qwen_image_21(denoiser: Any, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
    batch, _, height, width = latents.shape
    slots = torch.arange(states.shape[1] + height * width // 4) >= states.shape[1]
    patches = diffusers.QwenImage21Pipeline._pack_latents(latents, batch, 64, height, width)
    tokens = denoiser(
        patches, states, times, [[(1, height, width)]] * batch, slots.expand(batch, -1), return_dict=False
    )[0][:, -patches.shape[1] :]
    return diffusers.QwenImage21Pipeline._unpack_latents(tokens, 16 * height, 16 * width, 16).squeeze(2)


def _qwen_image_21_states(network: Any, words: Words, captions: Sequence[str]) -> list[Tensor]:
    pipe = pipeline_with(diffusers.QwenImage21Pipeline, text_encoder=network, processor=words)
    states, mask, _ = pipe.encode_prompt(list(captions), device=CPU)
    return [row[real.bool()] for row, real in zip(states, mask, strict=True)]


def _krea2(denoiser: Any, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    pipe = pipeline_with(diffusers.Krea2Pipeline, transformer=denoiser)
    layers = states.unflatten(2, (denoiser.config.num_text_layers, -1))
    ids = pipe.prepare_position_ids(states.shape[1], height // 2, width // 2, CPU)
    packed = pipe._pack_latents(latents, batch, channels, height, width)
    tokens = denoiser(packed, layers, times, ids, torch.ones(states.shape[:2], dtype=torch.bool)).sample
    return pipe._unpack_latents(tokens, 8 * height, 8 * width).squeeze(2)


def _krea2_states(network: Any, words: Words, captions: Sequence[str]) -> list[Tensor]:
    pipe = pipeline_with(diffusers.Krea2Pipeline, text_encoder=network, tokenizer=words)
    states, mask = pipe.get_text_hidden_states(list(captions), device=CPU)
    return [row[real].flatten(1) for row, real in zip(states, mask, strict=True)]


def _ernie_image(denoiser: Any, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
    pipe = pipeline_with(diffusers.ErnieImagePipeline, transformer=denoiser)
    return denoiser(latents, 1000 * times, *pipe._pad_text([*states], CPU, torch.float32, states.shape[2])).sample


def _ernie_image_encoder() -> Any:
    sizes = {"model_type": "ministral3", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128}  # fmt: skip
    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 1, "head_dim": 16}  # fmt: skip
    torch.manual_seed(0)
    return transformers.Mistral3Model(transformers.Mistral3Config(text_config=sizes, vision_config=vision)).eval()


def _ernie_image_states(network: Any, words: Words, captions: Sequence[str]) -> list[Tensor]:
    pipe = pipeline_with(diffusers.ErnieImagePipeline, text_encoder=network, tokenizer=words)
    return pipe.encode_prompt(list(captions), CPU)


def _longcat_image(denoiser: Any, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    pipe, count = pipeline_with(diffusers.LongCatImagePipeline), states.shape[1]
    tokens = denoiser(
        pipe._pack_latents(latents, batch, channels, height, width), encoder_hidden_states=states, timestep=times,
        txt_ids=prepare_pos_ids(0, "text", num_token=count),
        img_ids=prepare_pos_ids(1, "image", (count, count), height=height // 2, width=width // 2),
    ).sample  # fmt: skip
    return pipe._unpack_latents(tokens, 8 * height, 8 * width, 8)


def _longcat_image_encoder() -> Any:
    sizes = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1e6, "rms_norm_eps": 1e-6,
             "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 1, "out_hidden_size": 256}
    torch.manual_seed(0)
    config = transformers.Qwen2_5_VLConfig(text_config=sizes, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config).eval()


def _longcat_image_states(network: Any, words: Words, captions: Sequence[str]) -> list[Tensor]:
    """As with transformers 4.57, the authors' version, which gave other positions to texts with padding."""

    def encode(input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        positions = (attention_mask.cumsum(1) - 1).masked_fill(attention_mask == 0, 1).expand(3, -1, -1)
        return network(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, **options)

    encode.dtype = torch.float32  # pyright: ignore
    pipe = pipeline_with(diffusers.LongCatImagePipeline, tokenizer=words)
    pipe.text_encoder = encode
    states, positions = pipe.encode_prompt(list(captions))
    assert states.shape[1] == len(positions) == longcat_image.TEXT_TOKENS
    return [*states]


def _longcat_image_loader(denoiser: Any) -> Any:
    return SimpleNamespace(
        load_lora_weights=lambda path: denoiser.load_lora_adapter(dict(LoraFile.read(path).tensors)),
        fuse_lora=denoiser.fuse_lora, unload_lora_weights=denoiser.unload_lora,
    )  # fmt: skip


def _ideogram4(denoiser: Any, latents: Tensor, times: Tensor, states: Tensor) -> Tensor:
    batch, channels, height, width = latents.shape
    length = states.shape[1]
    ids = diffusers.Ideogram4Pipeline._prepare_ids([length] * batch, height, width, length, CPU)
    # (B, H W, 4 x 32), where a VAE's channel runs the fastest.
    patches = latents.unflatten(1, (32, 4)).permute(0, 3, 4, 2, 1).reshape(batch, height * width, channels)
    packed = torch.cat([torch.zeros(batch, length, channels), patches], 1)
    texts = torch.cat([states, torch.zeros(batch, height * width, states.shape[2])], 1)
    velocity = denoiser(packed, 1 - times, texts, *ids, return_dict=False)[0][:, length:]
    return -velocity.view(batch, height, width, 4, 32).permute(0, 4, 3, 1, 2).reshape(latents.shape)


def _ideogram4_states(network: Any, words: Words, captions: Sequence[str]) -> list[Tensor]:
    pipe = pipeline_with(diffusers.Ideogram4Pipeline, text_encoder=network, tokenizer=words)
    states, _, _, indicator = pipe.encode_prompt(list(captions), 1, 1, 200, CPU)
    return [row[kinds == 3] for row, kinds in zip(states, indicator, strict=True)]


_SYSTEM, _USER = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n", "<|im_start|>user\n"
_SPACED = Words(pattern=r"<\|\w+\|>| ?\w+|\W")  # which puts a caption's spaces before the words
REFERENCES = {
    "flux3": Reference(
        "Flux3Transformer2DModel", flux3, {"joint_attention_dim": 8 * 16},
        partial(small_qwen3vl, transformers.Qwen3VLForConditionalGeneration, 16, 33), _flux3_states, "qwen3vl_4b",
        language_model=lambda encoder: encoder.model, converter="convert_flux3_transformer_checkpoint_to_diffusers",
        published={"num_layers": 1, "num_single_layers": 2}, index="modular_model_index.json",
        lora=(_flux3_pipeline, "comfy", 4 * 6),
    ),
    "qwen-image-21": Reference(
        "QwenImage21Transformer2DModel", _qwen_image_21, {"context_in_dim": 64},
        partial(small_qwen3vl, transformers.Qwen3VLForConditionalGeneration, 64, 3), _qwen_image_21_states, "qwen3vl_8b",
        language_model=lambda encoder: encoder.model, words=Words(padding_side="left"),
        constants={"SYSTEM_TOKENS": len(Words()(_SYSTEM).input_ids), "_USER_TOKENS": len(Words()(_USER).input_ids)},
        converter="convert_qwen_image21_transformer_checkpoint_to_diffusers",
        lora=(lambda denoiser: pipeline_with(
            diffusers.QwenImage21Pipeline, processor=Words(), transformer=denoiser), "diffusers", 2 * 7),
    ),
    "krea2": Reference(
        "Krea2Transformer2DModel", _krea2, {"text_hidden_dim": 64, "num_text_layers": 12},
        partial(small_qwen3vl, transformers.Qwen3VLModel, 64, 36), _krea2_states, "qwen3vl_4b",
        captions=("", "a photo of sks person", "long " * 300),  # the last is cut
        converter="convert_krea2_transformer_checkpoint_to_diffusers",
    ),
    "ernie-image": Reference(
        "ErnieImageTransformer2DModel", _ernie_image, {"text_in_dim": 32}, _ernie_image_encoder, _ernie_image_states,
        "ministral3_3b", words=Words(pattern=r"<s>|\w+|\W", start="<s>"),
    ),
    "longcat-image": Reference(
        "LongCatImageTransformer2DModel", _longcat_image, {"joint_attention_dim": 256}, _longcat_image_encoder,
        _longcat_image_states, "qwen25_7b", language_model=lambda encoder: encoder, words=_SPACED,
        captions=(
            "", "a photo of sks person", "sks person's shop, 'open' and \"24 hours\" on its door, dogs' toys, ‘晚安’ and "
            "“早安” " + 130 * "in the evening sun ",
        ),
        constants={"TEMPLATE_TOKENS": len(_SPACED(longcat_image.TEMPLATE).input_ids)}, lengths=(512, 512, 512),
        published={"num_layers": 1, "num_single_layers": 2}, lora=(_longcat_image_loader, "diffusers", 26),
    ),
    "ideogram4": Reference(
        "Ideogram4Transformer2DModel", _ideogram4, {"llm_features_dim": 13 * 8},
        partial(small_qwen3vl, transformers.Qwen3VLModel, 8, 36), _ideogram4_states, "qwen3vl_8b",
    ),
}  # fmt: skip
