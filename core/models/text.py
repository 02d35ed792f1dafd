"""The text encoders of diffusion transformers: CLIP, T5, Qwen and Mistral, from files in the naming of transformers.

The package includes CLIP's tokenizer. The others are too large, so users provide a folder that has one.
"""

import re
from collections.abc import Callable, Container, Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BadFile, MissingPackage, UnknownFamily
from ..storage.gguf_file import GgufTensors
from ..storage.stored import LazyTensors, Stored, shape_of, stored_under
from . import clip
from .ldm import VAE_PREFIXES, build_vae, count_children, shapes_in
from .spec import Component, Conditioning, FamilySpec, stack_conditioning
from .text_gguf import in_transformers_names

PREFIX = "text_encoders.{}.transformer."
"""The prefix of a text encoder's tensors in a checkpoint, by its kind, as ComfyUI writes it."""
_PREFIXES = {
    "clip_l": ("conditioner.embedders.0.transformer.", "cond_stage_model.transformer."),
    "clip_g": ("conditioner.embedders.1.model.",),
}
"""The prefixes in the original checkpoints of SDXL and SD1.x."""
KINDS = {
    "clip_l": "CLIP ViT-L/14",
    "clip_g": "OpenCLIP ViT-bigG/14",
    "t5xxl": "T5 v1.1 XXL",
    "qwen3_4b": "Qwen3-4B",
    "qwen3_8b": "Qwen3-8B",
    "qwen25_7b": "Qwen2.5-VL-7B",
    "qwen3vl_4b": "Qwen3-VL-4B",
    "qwen3vl_8b": "Qwen3-VL-8B",
    "mistral3_24b": "Mistral Small 3.2 (24B)",
    "ministral3_3b": "Ministral 3 3B",
    "qwen35_9b": "Qwen3.5-9B",
}
"""The kinds of text encoders, as named by ComfyUI, with the names that people know."""
_HEAD_WIDTH_T5, _HEAD_WIDTH_QWEN = 64, 128
_QWEN_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
               "num_key_value_heads")  # fmt: skip
_QWEN35_SIZES = (*_QWEN_SIZES, "linear_num_key_heads", "linear_num_value_heads")
_HEAD_WIDTH_QWEN35, _LINEAR_HEAD_WIDTH = 256, 128
_PAD_QWEN = 151643
MISTRAL_LAYERS = 30
"""The number of layers of Mistral Small 3 whose states are used. The last ten and the last norm are not loaded."""
_MINISTRAL_ROTARY = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
"""How Ministral 3's rotary frequencies differ from plain ones at all lengths (YaRN, arXiv:2309.00071)."""
_TEKKEN = (131072, {"<s>": 1, "<pad>": 11})
_VOCABULARIES = {
    "t5": (32128, {"<pad>": 0, "</s>": 1}),
    "qwen35": (248320, {"<|endoftext|>": 248044, "<|im_start|>": 248045}),
    "qwen": (151936, {"<|endoftext|>": _PAD_QWEN, "<|im_start|>": 151644}),
    "mistral": _TEKKEN,
    "ministral": _TEKKEN,
}
"""The number of rows in the models' token tables, and the numbers of some tokens, for recognising tokenizers."""


def encoders_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Stored]]:
    """Return the tensors of each text encoder in a file, under their names within the encoder, by kind.

    The file has one encoder, or several under prefixes. Raises UnknownFamily when it is not a known encoder.
    """
    sees_pictures = False
    if isinstance(tensors, GgufTensors):
        sees_pictures = tensors.architecture == "qwen3vl"
        tensors = in_transformers_names(tensors)
    found = {kind: stored for kind in KINDS if (stored := _stored(tensors, kind, f"{kind}.transformer."))}
    return found or {_kind_of(tensors, sees_pictures): {name: Stored(tensors, name) for name in tensors}}


def encoder_in(tensors: Mapping[str, Tensor]) -> str | None:
    """Name the text encoders in a file without a denoiser, as people call them. None if it contains no text encoder."""
    try:
        return " and ".join(KINDS[kind] for kind in encoders_of(tensors))
    except UnknownFamily:
        return None


def _kind_of(tensors: Mapping[str, Tensor], sees_pictures: bool) -> str:
    if "encoder.block.0.layer.0.SelfAttention.q.weight" in tensors:
        return "t5xxl"
    for name in ("text_model.final_layer_norm.weight", "final_layer_norm.weight"):
        if name in tensors:
            return "clip_g" if shape_of(tensors, name) == (1280,) else "clip_l"
    if "transformer.resblocks.0.ln_1.weight" in tensors:
        return "clip_l" if shape_of(tensors, "transformer.resblocks.0.ln_1.weight") == (768,) else "clip_g"
    qwen = {_qwen_name(name): name for name in tensors}
    if "layers.0.self_attn.q_norm.weight" in qwen:
        is_large = "norm.weight" in qwen and shape_of(tensors, qwen["norm.weight"]) == (4096,)
        # Its language model equals Qwen3's. Only the half that sees pictures, or a declaration in the file, distinguishes
        # them.
        sees_pictures = sees_pictures or any("visual.deepstack_merger_list." in name for name in tensors)
        kind = "qwen3vl" if sees_pictures else "qwen3"
        return f"{kind}_8b" if is_large else f"{kind}_4b"
    if "layers.0.self_attn.q_proj.bias" in qwen:
        return "qwen25_7b"
    if "layers.0.linear_attn.A_log" in qwen and shape_of(tensors, qwen["layers.0.input_layernorm.weight"]) == (4096,):
        return "qwen35_9b"
    table = qwen.get("embed_tokens.weight")
    if table and _is_mistral(qwen) and shape_of(tensors, table)[:1] == _VOCABULARIES["mistral"][:1]:
        return "ministral3_3b" if shape_of(tensors, table)[1:] == (3072,) else "mistral3_24b"
    raise UnknownFamily(
        f"unknown text encoder, e.g. {next(iter(tensors), 'no tensor')!r}. Supported: {', '.join(KINDS.values())}"
    )


def _stored(tensors: Mapping[str, Tensor], kind: str, *prefixes: str) -> dict[str, Stored]:
    """Return the tensors of a text encoder of that kind, without the first prefix that occurs. Empty if none occurs."""
    return stored_under(tensors, PREFIX.format(kind), *_PREFIXES.get(kind, ()), *prefixes)


def has(tensors: Mapping[str, Tensor], kind: str) -> bool:
    """Return whether a checkpoint holds a text encoder of that kind."""
    return bool(_stored(tensors, kind))


def other_parts(
    tensors: Mapping[str, Tensor], vae: Callable[[Mapping[str, Tensor]], Component], kinds: Mapping[str, str]
) -> dict[str, Component]:
    """Return the VAE and the text encoders that a checkpoint has, by part.

    `vae` makes the VAE from its tensors, without the prefix of their names. `kinds` has the kind of each encoder.
    """
    found = {part: (kind, _stored(tensors, kind)) for part, kind in kinds.items()}
    parts = {part: _component(kind, stored) for part, (kind, stored) in found.items() if stored}
    if of_vae := stored_under(tensors, *VAE_PREFIXES):
        parts["vae"] = vae(LazyTensors(of_vae))
    return parts


def builder(
    denoiser: Callable[[dict[str, Any]], nn.Module],
    kinds: Mapping[str, str],
    vae: Callable[[dict[str, Any]], nn.Module] = build_vae,
    last_norm: bool = True,
) -> Callable[[str, dict[str, Any]], nn.Module]:
    """Return a family's `build`. The functions build a denoiser and a VAE from a config; `kinds` has text encoders by part.

    `last_norm` is whether a text encoder norms its last states.
    """

    def build_part(part: str, config: dict[str, Any]) -> nn.Module:
        networks = {"denoiser": denoiser, "vae": vae}
        if part in networks:
            return networks[part](config)
        encoder: Any = build(kinds[part], config)
        if not last_norm:
            encoder.norm.register_forward_hook(lambda _, inputs, __: inputs[0])
        return encoder

    return build_part


def _component(kind: str, stored: Mapping[str, Stored]) -> Component:
    if kind.startswith("clip"):
        projection = kind == "clip_g"
        return clip.text_component(stored, KINDS[kind], "gelu" if projection else "quick_gelu", projection)
    tensors = LazyTensors(library_tensors(stored))
    config_of = {"t5xxl": _t5_config, "qwen35_9b": _qwen35_config}.get(kind, _qwen_config)
    return Component(config_of(tensors), tensors)


def check_encoders(
    family: FamilySpec, components: Mapping[str, Component], given: Sequence[tuple[str, Sequence[str]]]
) -> None:
    """Raise UnknownFamily when the text encoders do not belong to the denoiser, judging by their kinds or widths.

    `given` has the name of each file of text encoders with the kinds in it.
    """
    kinds = ", ".join(KINDS[kind] for kind in family.text_kinds)
    for what, of_file in given:
        if not set(of_file) & set(family.text_kinds):
            raise UnknownFamily(
                f"{what} is {', '.join(KINDS[kind] for kind in of_file)}, but {family.title} takes {kinds}"
            )
    denoiser = components["denoiser"].config
    for name, parts, width_of, taken in (
        ("states", family.context_from, _width, context_width(denoiser)),
        ("pooled states", family.pooled_from, itemgetter("projection_dim"), pooled_width(denoiser)),
    ):
        if parts and all(part in components for part in parts):
            made = sum(count * width_of(components[part].config) for part, count in parts.items())
            if made != taken:
                raise UnknownFamily(
                    f"the text encoder is not the one of this model, which takes {name} of width {taken}. These have width "
                    f"{made} (text encoders of {family.title}: {kinds})"
                )


def context_width(denoiser: Mapping[str, Any]) -> int:
    """Return the width of the text states that a denoiser takes, from its diffusers config."""
    names = ("cross_attention_dim", "joint_attention_dim", "cap_feat_dim", "text_hidden_dim", "text_in_dim", "context_in_dim",
             "llm_features_dim", "text_dim")  # fmt: skip
    return next(denoiser[name] for name in names if denoiser.get(name)) * denoiser.get("num_text_layers", 1)


def pooled_width(denoiser: Mapping[str, Any]) -> int | None:
    """Return the width of the pooled text that a denoiser takes, from its diffusers config. None if it takes none."""
    if denoiser.get("projection_class_embeddings_input_dim"):  # the input also has six embedded sizes
        return denoiser["projection_class_embeddings_input_dim"] - 6 * denoiser["addition_time_embed_dim"]
    return denoiser.get("pooled_projection_dim")


def blank_caption(family: FamilySpec, denoiser: Mapping[str, Any], tokens: int) -> Conditioning:
    """Return a conditioning (1, ...) of zeros in the shapes of a caption's, from the denoiser's diffusers config."""
    width = pooled_width(denoiser)
    pooled = {"pooled": torch.zeros(1, width)} if width else {}
    return {"context": torch.zeros(1, tokens, context_width(denoiser)), "context_mask": torch.ones(1, tokens)} | pooled


def _width(encoder: Mapping[str, Any]) -> int:
    return encoder["d_model"] if "d_model" in encoder else encoder["hidden_size"]


def library_tensors(readers: Mapping[str, Callable[[], Tensor]]) -> dict[str, Callable[[], Tensor]]:
    """Rename the tensors of a text encoder, written by any version of transformers, to the names of its network here."""
    # Unused: the parts of a language model that write words or see pictures, and T5's decoder.
    left_out = r"decoder\.|(.*\.)?(lm_head|mtp|visual|vision_tower|multi_modal_projector)\.|tekken_model$"
    named = {
        _qwen_name(name): read for name, read in clip.library_readers(readers).items() if not re.match(left_out, name)
    }
    if _is_mistral(named):
        named = {name: read for name, read in named.items() if name != "norm.weight" and _layer(name) < MISTRAL_LAYERS}
    # T5's embedding has two names, and files have one of them.
    tied = ("shared.weight", "encoder.embed_tokens.weight")
    embedding = next((named[name] for name in tied if name in named), None)
    return named if embedding is None else named | dict.fromkeys(tied, embedding)


def _is_mistral(names: Container[str]) -> bool:
    """Return whether a language model is a Mistral. Its attention has neither a Qwen's norms nor its bias."""
    attention = "layers.0.self_attn.q_"
    others = (f"{attention}norm.weight", f"{attention}proj.bias")
    return f"{attention}proj.weight" in names and not any(name in names for name in others)


def _layer(name: str) -> int:
    """Return the number of the layer that a tensor is in, or -1 outside layers."""
    match = re.match(r"layers\.(\d+)\.", name)
    return int(match[1]) if match else -1


def _qwen_name(name: str) -> str:
    """Return the name within the language model, without the prefixes of larger models that contain it."""
    return re.sub(r"^(model\.)?(language_model\.)?(model\.)?", "", name)


def _t5_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    shape = shapes_in(tensors, "the text encoder")
    first = "encoder.block.0.layer"
    vocabulary, width = shape("shared.weight")
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": _HEAD_WIDTH_T5,
        "d_ff": shape(f"{first}.1.DenseReluDense.wi_0.weight")[0],
        "num_layers": count_children(tensors, "encoder.block"),
        "num_heads": shape(f"{first}.0.SelfAttention.q.weight")[0] // _HEAD_WIDTH_T5,
        "relative_attention_num_buckets": shape(f"{first}.0.SelfAttention.relative_attention_bias.weight")[0],
        "feed_forward_proj": "gated-gelu",
    }


def _qwen_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    shape = shapes_in(tensors, "the text encoder")

    def rows(name: str) -> int:
        return shape(f"layers.0.{name}.weight")[0]

    vocabulary, width = shape("embed_tokens.weight")
    heads, shared_heads = (rows(f"self_attn.{part}_proj") // _HEAD_WIDTH_QWEN for part in "qk")
    sizes = (vocabulary, width, rows("mlp.gate_proj"), count_children(tensors, "layers"), heads, shared_heads)
    kind = {"model_type": "mistral"} if _is_mistral(tensors) else {}
    return kind | dict(zip(_QWEN_SIZES, sizes, strict=True))


def _qwen35_config(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the sizes from a layer with linear attention and from one with attention, which is every fourth."""
    shape = shapes_in(tensors, "the text encoder")

    def rows(name: str) -> int:
        return shape(f"layers.{name}.weight")[0]

    vocabulary, width = shape("embed_tokens.weight")
    heads, shared_heads = rows("3.self_attn.q_proj") // 2, rows("3.self_attn.k_proj")  # queries have gates beside them
    values = rows("0.linear_attn.in_proj_z")
    keys = (rows("0.linear_attn.in_proj_qkv") - values) // 2
    sizes = (vocabulary, width, rows("0.mlp.gate_proj"), count_children(tensors, "layers"), heads // _HEAD_WIDTH_QWEN35,
             shared_heads // _HEAD_WIDTH_QWEN35, keys // _LINEAR_HEAD_WIDTH, values // _LINEAR_HEAD_WIDTH)  # fmt: skip
    return dict(zip(_QWEN35_SIZES, sizes, strict=True))


def build(kind: str, config: dict[str, Any]) -> nn.Module:
    """Build a text encoder without weights. `config["tokenizer"]` becomes its `tokenizer_folder`, except for CLIP."""
    if kind.startswith("clip"):
        with_projection = kind == "clip_g" or "CLIPTextModelWithProjection" in config.get("architectures", ())
        return clip.build_text_encoder(config, with_projection)
    if kind != "t5xxl":
        return _build_qwen(kind, config)
    from transformers import T5Config, T5EncoderModel

    keep = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets",
            "feed_forward_proj")  # fmt: skip
    encoder = T5EncoderModel(T5Config(**{name: config[name] for name in keep if name in config}))
    encoder.tokenizer_folder = config.get("tokenizer")  # pyright: ignore
    return encoder


def _build_qwen(kind: str, config: dict[str, Any]) -> nn.Module:
    given = config.get("text_config", config)
    encoder = _qwen35(given) if kind == "qwen35_9b" else _qwen(kind, given)
    with torch.device("cpu"):
        # Files don't contain the rotary frequencies, so they must not stay on the meta device.
        encoder.rotary_emb = type(encoder.rotary_emb)(encoder.config)
    encoder.tokenizer_folder = config.get("tokenizer")
    return encoder


def _qwen35(given: Mapping[str, Any]) -> Any:
    try:
        from transformers import Qwen3_5TextConfig, Qwen3_5TextModel
    except ImportError:
        raise MissingPackage(
            "Qwen3.5-9B needs transformers 5.2 or later. Run: pip install 'transformers>=5.2'"
        ) from None
    rotary = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    sizes = {name: given[name] for name in _QWEN35_SIZES}
    return Qwen3_5TextModel(Qwen3_5TextConfig(**sizes, head_dim=_HEAD_WIDTH_QWEN35, rope_parameters=rotary))


def _qwen(kind: str, given: Mapping[str, Any]) -> Any:
    from transformers import MistralModel, Qwen2Model, Qwen3Model

    # For text alone, models that see pictures equal those that don't, since their three kinds of positions are the same.
    network: Any = Qwen3Model if kind.startswith("qwen3") else Qwen2Model
    # rope_theta and epsilon are the same in all models of a kind, but transformers 4 and 5 write them to different places.
    theta = 5e6 if kind.startswith("qwen3vl") else 1e6
    settings = {name: given[name] for name in _QWEN_SIZES} | {"rope_theta": theta, "rms_norm_eps": 1e-6}
    # FLUX.2 dev has a Mistral where klein has a Qwen, so the kind is not enough.
    if is_mistral := given.get("model_type") in ("mistral", "ministral3"):
        network = MistralModel
        layers = min(settings["num_hidden_layers"], MISTRAL_LAYERS)
        settings |= {"rope_theta": 1e9, "rms_norm_eps": 1e-5, "sliding_window": None, "num_hidden_layers": layers}
    if kind.startswith("ministral"):
        settings |= {"rope_theta": 1e6, "rope_scaling": _MINISTRAL_ROTARY}
    encoder = network(network.config_class(**settings, head_dim=_HEAD_WIDTH_QWEN))
    if is_mistral:
        encoder.norm = nn.Identity()  # it would normalise the states of the last remaining layer
    return encoder


@lru_cache(maxsize=4)
def load_tokenizer(folder: str | None, kind: str) -> Any:
    """Load the tokenizer in a folder with transformers. Raises BadFile when it is missing or another model's."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if folder is None:
        raise BadFile(
            f"captions need the tokenizer of {KINDS[kind]}, which is not included. Give its folder "
            "(`tokenizer`), from a diffusers folder or from ComfyUI's comfy/text_encoders"
        )
    file = Path(folder) / "tokenizer.json"
    try:
        if file.exists():
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the library raises many kinds of errors for missing or damaged files
        raise BadFile(
            f"{folder}: does not contain the tokenizer of {KINDS[kind]}: {str(error).splitlines()[0]}"
        ) from None
    rows, special = _VOCABULARIES[next(name for name in _VOCABULARIES if kind.startswith(name))]
    numbers = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    if numbers != special or len(tokenizer) > rows:
        raise BadFile(
            f"{folder}: this is not the tokenizer of {KINDS[kind]}. It has {len(tokenizer)} tokens, and "
            f"{_listed(numbers)}. Expected at most {rows}, where {_listed(special)}"
        )
    return tokenizer


def _listed(numbers: Mapping[str, Any]) -> str:
    return ", ".join(f"{token} is {number}" for token, number in numbers.items())


def encode_t5(encoder: nn.Module, captions: Sequence[str], length: int) -> Tensor:
    """Return the hidden states (B, length, D) of T5. The padding of captions is not masked, as in the models' training."""
    tokenizer = load_tokenizer(encoder.tokenizer_folder, "t5xxl")  # pyright: ignore
    rows = [tokenizer(caption, add_special_tokens=True).input_ids[:length] for caption in captions]
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return encoder(tokens.to(next(encoder.parameters()).device)).last_hidden_state


def encode_qwen(
    encoder: nn.Module,
    kind: str,
    texts: Sequence[str],
    limit: int,
    *,
    layers: Sequence[int] = (),
    multiple: int = 0,
    padding_at: int | None = None,
    template: str = "{}",
    pieces: Callable[[str], Sequence[str]] = lambda text: (text,),
) -> Conditioning:
    """Return a Qwen model's states as `context` (B, L, D), and `context_mask` (B, L) with 1 for text and 0 for padding.

    The states are the normed ones of the last layer, or those after each of `layers` (1 is the first, -2 the last but one)
    side by side. Texts are cut to `limit` tokens. With a `multiple`, they are padded to one with masked tokens, which have
    states too. With `padding_at`, all of these have that position; otherwise positions continue. Remaining differences in
    length within a batch are padded with zeros. `template` has "{}" for a text; what is after it is added after cutting.
    `pieces` cuts a text into pieces that are tokenised separately.
    """
    tokenizer = load_tokenizer(encoder.tokenizer_folder, kind)  # pyright: ignore
    device = next(encoder.parameters()).device
    parts = []
    before, after = template.split("{}")
    last = tokenizer(after, add_special_tokens=False).input_ids
    for text in texts:
        tokens_of = (tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces(before + text))
        row = [*chain.from_iterable(tokens_of)][:limit] + last
        padding = min(-len(row) % multiple, limit - len(row)) if multiple else 0
        tokens = torch.tensor([row + [_PAD_QWEN] * padding], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * padding], device=device)
        at = None if padding_at is None else mask.cumsum(1).sub(1).masked_fill(mask == 0, padding_at)
        output = encoder(
            tokens, attention_mask=mask, position_ids=at, output_hidden_states=bool(layers), use_cache=False
        )
        states = [output.hidden_states[layer] for layer in layers] or [output.last_hidden_state]
        parts.append({"context": torch.cat(states, -1), "context_mask": mask})
    return stack_conditioning(parts)
