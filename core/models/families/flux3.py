"""FLUX.3 Klein (Black Forest Labs, 2026): a rectified flow; text and picture have separate blocks, then shared ones; 1024 px.

The text encoder is Qwen3-VL-4B, eight of whose layers are used side by side. The VAE is FLUX.2's. Klein Base is for training.
Klein itself was distilled to 16 steps without guidance as a flow map: its network also takes the time that a step leads to.
Both have additional blocks for input pictures. Here they are trained and drawn with from texts alone, and these blocks are not
loaded.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...tensor_names.flux import FLUX3 as NAMES
from .. import text, transformer
from ..ldm import count_children
from ..spec import DENOISER_PREFIX, Conditioning, FamilySpec, FewSteps, Networks
from . import flux2

TEXT = {"text_encoder": "qwen3vl_4b"}
TEXT_LAYERS = (4, 8, 12, 16, 20, 24, 28, 32)
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TEXT_TOKENS = 8192
"""The most tokens of the whole chat, as in the authors' code."""
WINDOW = 80
"""The whole chat is padded to a multiple of this many tokens. The denoiser sees the padding."""

UNUSED = r"\.image_cond\b"
"""Matches the names of all modules for input pictures."""

_BLOCK = r"(mode_blocks\.image|txt_mode_blocks|single_transformer_blocks)\.\d+"
_ATTENTION = rf"{_BLOCK}\.attn\.to_([qkv]|out\.0)"
# All blocks of a kind share one modulation, which is not adapted, like those of the other families.
_TRANSFORMER = rf"{_ATTENTION}|{_BLOCK}\.ff\.linear_(in|out)"


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, channels = shape("emb_in.image.weight")
    (head,) = shape("single_blocks.0.norm.query_norm.scale", 1)
    return {
        "in_channels": channels,
        "cond_in_channels": shape("emb_in.image_cond.weight")[1],
        "num_layers": count_children(names, "txt_mode_blocks"),
        "num_single_layers": count_children(names, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shape("txt_in.weight")[1],
        "timestep_channels": shape("time_in.in_layer.weight")[1],
        "mlp_ratio": shape("single_blocks.0.mlp_out.weight")[1] / width,
        "axes_dims_rope": flux2.ROTARY_AXES,
        "flow_map": "ref_time_in.in_layer.weight" in names,
    }


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    states = text.encode_qwen(
        encoders["text_encoder"],
        TEXT["text_encoder"],
        [CHAT.format(caption) for caption in captions],
        TEXT_TOKENS,
        layers=TEXT_LAYERS,
        multiple=WINDOW,
        padding_at=1,  # as in transformers 4.57, which the model was trained with
    )
    mask = states["context_mask"]
    ends = (mask.sum(1, keepdim=True) + WINDOW - 1) // WINDOW * WINDOW
    is_seen = torch.arange(mask.shape[1], device=mask.device) < ends
    return {"context": states["context"], "context_mask": is_seen.to(mask.dtype)}


@transformer.without_padding  # which the denoiser can't mask
def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    # A flow map predicts the mean velocity from a time to its target. If they are equal, that is a rectified flow's velocity.
    target = conditioning.get("target", timesteps) / 1000 if denoiser.config.flow_map else None  # pyright: ignore
    context = conditioning["context"]
    return flux2.predicted(denoiser, noisy_latents, timesteps, context, picture_scale=0.5, target_timestep=target)


def is_flow_map(config: dict[str, Any]) -> bool:
    return config.get("flow_map", False)


FLUX3 = FamilySpec(
    names=NAMES,
    title="FLUX.3 Klein",
    guidance=4.0,  # the authors', as are the steps; diffusers has 3.5
    steps=50,
    pipeline_class="Flux3ModularPipeline",
    other_pipelines=("Flux3DistilledModularPipeline",),
    other_folders=("Flux3DistilledModularPipeline",),
    text_encoders=TEXT,
    context_from={"text_encoder": len(TEXT_LAYERS)},
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=128,
    denoiser_has=("early_stream_modulations.image.lin.weight", "single_blocks.0.q_proj.weight"),
    # A file may also have projectors that the authors' training used to compare the states of blocks.
    split=transformer.splitter(config_of, NAMES, TEXT, flux2.vae, left_out=rf"^repa_projectors\.|{UNUSED}"),
    build=text.builder(partial(transformer.build, "Flux3Transformer2DModel", (0, 42)), TEXT, vae=flux2.build_vae),
    latent_shape=flux2.latent_shape,
    encode_text=encode_text,
    predict=predict,
    flow_shift=lambda positions: 6.93,  # the authors', for pictures of all sizes
    # No trainer's was found. With the authors', 3 % of the steps would see more picture than noise.
    training_shift=lambda positions: 3.0,
    encode_image=flux2.encode_image,
    decode_latents=flux2.decode_latents,
    is_distilled=is_flow_map,
    is_flow_map=is_flow_map,
    distilled_names=r"$^",  # recognised by its tensors
    few_steps=FewSteps(16),
    lookalikes={DENOISER_PREFIX + "emb_in.video.weight": "FLUX.3 for video"},
    unused=UNUSED,
)
