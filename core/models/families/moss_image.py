"""MOSS-Image (OpenMOSS, 2026, arXiv:2610.23374): a rectified flow with one stream of picture and text; 1024 to 2048 px.

One modulation serves all layers. The text encoder is Qwen3.5-9B, and the VAE is FLUX.2's. diffusers doesn't have the
denoiser, so it is built here. MOSS-Image-Base is for training. MOSS-Image-SFT has the same tensors and draws better.
"""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ...tensor_names.moss import MOSS_IMAGE as NAMES
from .. import attention, text, transformer
from ..ldm import count_children, kl_pixels
from ..spec import Component, Conditioning, FamilySpec, FewSteps, LatentShape, Networks
from . import flux2

TEXT = {"text_encoder": "qwen35_9b"}
CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n"
"""The form of a chat with one question in Qwen3.5, with thinking turned on."""
_ENDING_TOKENS = 7
"""The number of tokens in the chat after the caption."""
TEXT_TOKENS = 4096
"""The most tokens of the whole chat, as in the authors' pipeline."""
SKIPPED = 22
"""The layer that predictions for the negative prompt leave out, as in the authors' pipeline."""

_ATTENTION = r"layers\.\d+\.proj\.[qkvo]"
_TRANSFORMER = rf"{_ATTENTION}|layers\.\d+\.proj\.ffn_(up_gate|down)"
_EPSILON = 1e-6


def config_of(names: transformer.Names, shape: transformer.Shapes) -> dict[str, Any]:
    width, channels = shape("video_embedder.weight")
    return {
        "dim": width,
        "ffn_dim": shape("text_embedder.blocks.0.ffn_up.weight")[0],
        "num_heads": width // shape("layers.0.q_norm.weight", 1)[0],
        "num_layers": count_children(names, "layers"),
        "text_dim": shape("text_embedder.proj.weight")[1],
        "freq_dim": shape("time_embedding.0.weight")[1],
        "latent_channels": channels,
        "rope_base": 10000.0,
    }


def gated(states: Tensor, gate: Tensor) -> Tensor:
    """Return the product of a bounded SiLU of the gate and bounded states."""
    return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * (25 * torch.tanh(states / 25))


class Layer(nn.Module):
    """What layers of text and layers of the whole stream share: norms, and attention with rotated queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (transformer.RmsNorm(width, _EPSILON) for _ in range(2))
        self.q_norm, self.k_norm = (transformer.RmsNorm(width // heads, _EPSILON) for _ in range(2))

    def mixed(self, parts: Sequence[Tensor], tables: attention.Tables) -> Tensor:
        """Return the attention output (B, S, D) of queries, keys and values (B, S, D)."""
        query, key, value = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        return attention.attend([self.q_norm(query)], [self.k_norm(key)], [value], tables, halves=True)


class TextLayer(Layer):
    """A layer that only sees the text."""

    def __init__(self, width: int, inner: int, heads: int):
        super().__init__(width, heads)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn_gate, self.ffn_up = (nn.Linear(width, inner) for _ in range(2))
        self.ffn_down = nn.Linear(inner, width)

    def forward(self, states: Tensor, tables: attention.Tables) -> Tensor:
        states = states + self.proj(self.mixed(self.qkv(self.norm1(states)).chunk(3, -1), tables))
        normed = self.norm2(states)
        return states + self.ffn_down(gated(self.ffn_up(normed), self.ffn_gate(normed)))


class StreamLayer(Layer):
    """A layer of picture and text, modulated by the time."""

    def __init__(self, width: int, inner: int, heads: int):
        super().__init__(width, heads)
        sizes = dict.fromkeys("qkvo", (width, width)) | {"ffn_up_gate": (width, 2 * inner), "ffn_down": (inner, width)}
        self.proj = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    def forward(self, states: Tensor, tables: attention.Tables, modulation: Tensor, kept: Tensor | None) -> Tensor:
        """`modulation` is (B, 6, D). `kept` (B, 1, 1) is where the states stay as they were; None: nowhere."""
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unsqueeze(2).unbind(1)
        normed = torch.addcmul(shift, self.norm1(states), 1 + scale)
        output = self.proj["o"](self.mixed([self.proj[name](normed) for name in "qkv"], tables))
        made = torch.addcmul(states, output, gate)
        up, up_gate = self.proj["ffn_up_gate"](torch.addcmul(ffn_shift, self.norm2(made), 1 + ffn_scale)).chunk(2, -1)
        made = torch.addcmul(made, self.proj["ffn_down"](gated(up, up_gate)), ffn_gate)
        return made if kept is None else torch.where(kept, states, made)


class MossImage(nn.Module):
    """The denoiser. Its parts have the authors' names."""

    def __init__(self, config: Mapping[str, Any]):
        super().__init__()
        self.config = SimpleNamespace(**config)
        self.gradient_checkpointing = False
        width, inner, heads = config["dim"], config["ffn_dim"], config["num_heads"]
        self.video_embedder = nn.Linear(config["latent_channels"], width)
        self.text_embedder = nn.Module()
        self.text_embedder.proj = nn.Linear(config["text_dim"], width)
        self.text_embedder.blocks = nn.ModuleList(TextLayer(width, inner, heads) for _ in range(2))
        self.time_embedding = nn.Sequential(nn.Linear(config["freq_dim"], width), nn.SiLU(), nn.Linear(width, width))
        self.shared_block_modulation = nn.Linear(width, 6 * width)
        self.layers = nn.ModuleList(StreamLayer(width, inner, heads) for _ in range(config["num_layers"]))
        self.final_norm_video = transformer.RmsNorm(width, _EPSILON)
        self.final_linear_video = nn.Linear(width, config["latent_channels"], bias=False)
        self.video_head_modulation = nn.Linear(width, 2 * width)

    def forward(self, latents: Tensor, times: Tensor, context: Tensor, is_negative: Tensor | None) -> Tensor:
        """Predict (B, C, H, W) for latents of that shape, times (B,) from 0 to 1000 and texts (B, L, D) without padding.

        `is_negative` (B,) is 1 for the texts of negative prompts; None: there is none.
        """
        picture, count = latents.shape[2] * latents.shape[3], context.shape[1]
        cosines, sines = tables = self._tables(count, (latents.shape[2], latents.shape[3]), latents.device)
        words: Any = self.text_embedder.proj(context)  # pyright: ignore
        for layer in self.text_embedder.blocks:  # pyright: ignore
            words = layer(words, (cosines[picture:], sines[picture:]))
        states = torch.cat([self.video_embedder(latents.flatten(2).transpose(1, 2)), words], 1)
        time = self.time_embedding(self._waves(times).to(latents.dtype))
        modulation = self.shared_block_modulation(time).unflatten(1, (6, -1))
        kept = None if is_negative is None else is_negative.bool().view(-1, 1, 1)
        through = transformer.through_blocks
        states = through(self, self.layers[:SKIPPED], states, tables, modulation, None)
        states = through(self, self.layers[SKIPPED : SKIPPED + 1], states, tables, modulation, kept)
        states = through(self, self.layers[SKIPPED + 1 :], states, tables, modulation, None)
        shift, scale = self.video_head_modulation(time).unsqueeze(1).chunk(2, -1)
        normed = torch.addcmul(shift, self.final_norm_video(states[:, :picture]), 1 + scale)
        return self.final_linear_video(normed).transpose(1, 2).unflatten(2, latents.shape[2:])

    def _waves(self, times: Tensor) -> Tensor:
        """Return the cosines and sines (B, freq_dim) of the times."""
        exact = torch.float32 if times.device.type == "mps" else torch.float64
        half = self.config.freq_dim // 2
        frequencies = 10000 ** (-torch.arange(half, dtype=exact, device=times.device) / half)
        angles = times.to(exact).unsqueeze(1) * frequencies
        return torch.cat([angles.cos(), angles.sin()], 1)

    def _tables(self, count: int, size: tuple[int, int], device: torch.device) -> attention.Tables:
        """Return the tables (H W + L, D) of the picture's positions and then the text's.

        A position has four numbers: an input picture's, which is 0 here, its place in the text, its row and its column. A
        picture's place is after the text, and its rows and columns are counted from its centre.
        """
        bands = self.config.dim // self.config.num_heads // 8
        grid = transformer.grid_positions(*size, device)
        grid -= torch.cat(
            [torch.full((1,), value, device=device) for value in (-count, *((side - 1) / 2 for side in size))]
        )
        words = torch.arange(float(count), device=device).unsqueeze(1)
        places = torch.cat([grid, nn.functional.pad(words, (0, 2))])
        frequencies = 1 / self.config.rope_base ** (torch.arange(bands, device=device) / bands)
        angles = nn.functional.pad(places, (1, 0)).unsqueeze(2) * frequencies  # (S, 4, bands)
        return attention.tables_of_halves(angles.flatten(1).repeat(1, 2))


def latent_shape(components: Mapping[str, Component]) -> LatentShape:
    channels = components["denoiser"].config["latent_channels"]
    return LatentShape(channels, flux2.PATCH * kl_pixels(components), multiple=1)


def encode_text(encoders: Networks, captions: Sequence[str], clip_skip: int, chunks: int) -> Conditioning:
    texts, limit = [caption.strip() for caption in captions], TEXT_TOKENS - _ENDING_TOKENS
    return text.encode_qwen(encoders["text_encoder"], TEXT["text_encoder"], texts, limit, template=CHAT)


@transformer.without_padding  # since the place of a picture depends on the length of its text
def predict(denoiser: nn.Module, noisy_latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
    context = conditioning["context"].to(noisy_latents.dtype)
    return denoiser(noisy_latents, timesteps, context, conditioning.get("is_negative"))


MOSS_IMAGE = FamilySpec(
    names=NAMES,
    title="MOSS-Image",
    overflows_in_fp16=True,
    guidance=3.0,  # the authors', as are the steps
    steps=50,
    draws_slowly=True,
    pipeline_class="MOSSImagePipeline",
    text_encoders=TEXT,
    denoiser_targets=transformer.targets(_ATTENTION, _TRANSFORMER),
    in_channels=128,
    denoiser_has=("video_embedder.weight", "layers.0.proj.ffn_up_gate.weight"),
    # Files have the frequencies of the rotary embedding, which are always the same.
    split=transformer.splitter(config_of, NAMES, TEXT, flux2.vae, left_out=r"^rope\."),
    build=text.builder(MossImage, TEXT, vae=flux2.build_vae),
    latent_shape=latent_shape,
    encode_text=encode_text,
    predict=predict,
    flow_shift=lambda positions: 5.0,  # the authors', for pictures of all sizes
    training_shift=lambda positions: 1.0,  # as in SimpleTuner, KohakuMossTrainer and the authors' last stages
    marks_negative=True,
    few_steps=FewSteps(4, lora="akhaliq/MOSS-Image-SFT-4-steps/lora.safetensors"),
    encode_image=flux2.encode_image,
    decode_latents=flux2.decode_latents,
    unused=r"^rope\.",
)
