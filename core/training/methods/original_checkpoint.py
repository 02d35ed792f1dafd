"""A whole base model as a checkpoint in the original naming of SD1.x and SDXL, which ComfyUI and other programs load."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from ...errors import BadConfig
from ...models.base import Base
from ...models.clip import OPENCLIP_LAYER, OPENCLIP_OUTSIDE
from ...models.ldm import ldm_vae_path
from ...progress import OnProgress, silent
from ...storage.safetensors_file import cast_tensor, layout_in, write_safetensors
from ...tensor_names.unet import blocks_in_a_level, inverse, ldm_unet_path


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A whole base model, with tensors named as in a checkpoint file in the original naming."""

    family: str
    metadata: dict[str, str]
    tensors: Mapping[str, Tensor] = field(repr=False)
    name: str = "checkpoint"
    """The name of the checkpoint in messages: the file's path, if it is from a file."""

    def save(
        self,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.float16,
        on_progress: OnProgress = silent,
    ) -> None:
        """Write the whole file or nothing, with floating-point tensors in that dtype. Raises BadFile when that fails."""
        layout = layout_in(self.tensors, dtype)

        def read(key: str) -> Tensor:
            return cast_tensor(key, self.tensors[key], layout[key][0])

        write_safetensors(path, layout, read, self.metadata, on_progress=on_progress)

    def with_metadata(self, metadata: Mapping[str, str]) -> "Checkpoint":
        """Return a checkpoint with the same tensors and other metadata."""
        return replace(self, metadata=dict(metadata))


def original_tensors(base: Base, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their original names.

    `parts` has the tensors of the denoiser, the VAE and the text encoders by their names in diffusers and transformers. Raises
    BadConfig for a UNet whose levels have different numbers of residual blocks.
    """
    result: dict[str, Tensor] = {}
    unet, levels = base.components["denoiser"].config, len(base.components["vae"].config["block_out_channels"])
    attention_above = [kind.startswith("CrossAttn") for kind in unet["up_block_types"]]
    blocks = blocks_in_a_level(unet)
    if blocks is None:
        raise BadConfig(f"{base.family.title}: the original names don't support a UNet whose levels have unlike blocks")
    in_unet = partial(ldm_unet_path, layers_per_block=blocks, attention_above=attention_above.__getitem__)
    for name, tensor in parts["denoiser"].items():
        result[f"model.diffusion_model.{in_unet(name)}"] = tensor
    for name, tensor in parts["vae"].items():
        path = ldm_vae_path(name, levels)
        # The original attention has 1x1 convolutions, and that of diffusers linear layers.
        is_convolution = ".attn_1." in path and tensor.ndim == 2
        result[f"first_stage_model.{path}"] = tensor[:, :, None, None] if is_convolution else tensor
    for part, prefix in base.family.names.checkpoint_prefixes.items():
        named = _openclip(parts[part]) if part == "text_encoder_2" else parts[part]
        result |= {prefix + name: tensor for name, tensor in named.items()}
    # Marker tensors tell readers of these files how the model predicts.
    if base.prediction_type == "v_prediction":
        result["v_pred"] = torch.zeros(0)
    if base.zero_terminal_snr:
        result["ztsnr"] = torch.zeros(0)
    return result


def _openclip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a text encoder to OpenCLIP's naming, which joins q, k and v and transposes the projection."""
    result: dict[str, Tensor] = {}
    outside, in_layer = inverse(OPENCLIP_OUTSIDE), inverse(OPENCLIP_LAYER)
    for name, tensor in tensors.items():
        if name in outside:
            result[outside[name]] = tensor
        elif name == "text_projection.weight":
            result["text_projection"] = tensor.T.contiguous()
        elif match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, module, kind = f"transformer.resblocks.{match[1]}.", match[2], match[3]
            if module == "self_attn.q_proj":
                whole = [tensors[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"]
                result[f"{layer}attn.in_proj_{kind}"] = torch.cat(whole)
            elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
                result[f"{layer}{in_layer[module]}.{kind}"] = tensor
    return result
