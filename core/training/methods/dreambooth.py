"""Full DreamBooth (arXiv:2208.12242): train all weights of the denoiser, and those of the text encoders if they have a rate.

The result is a full model file in the original naming, which ComfyUI can load. The same change is saved beside it as a LoRA.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ...config import OPTIMIZERS, OptimizerSettings, TrainConfig
from ...device import free_memory
from ...errors import BadConfig, LoraMisfit, OutOfMemory
from ...lora.changes import factorise
from ...lora.file import KEY, LoraFile
from ...lora.modules import LoraModule
from ...models.base import Base
from ...models.clip import OPENCLIP_LAYER, OPENCLIP_OUTSIDE
from ...models.ldm import ldm_vae_path
from ...models.opening import load_base
from ...models.spec import FamilySpec, Networks
from ...tensor_names import ModuleId, blocks_in_a_level
from ...tensor_names.unet import inverse, ldm_unet_path
from .method import Adapter, Checkpoint, Method, Trained, refuse_settings_of_lora, target_modules

_GIB = 2**30


@dataclass(frozen=True, eq=False)
class FullAdapter(Adapter):
    """An adapter whose parameters are the networks' own weights. The original weights are kept beside them."""

    networks: Networks
    originals: Mapping[str, Tensor]
    """The values of the parameters before training, by name.

    They are in the computer's memory unless prior prediction needs them in each step. On the CPU in float32 they share the
    base model's memory.
    """

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            f"{part}.{name}": parameter
            for part, network in self.networks.items()
            for name, parameter in network.named_parameters()
        }

    @contextmanager
    def disabled(self) -> Iterator[None]:
        parameters = self.parameters()
        trained = {name: parameter.data for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.data = self.originals[name].to(parameter.device)
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.data = trained[name]

    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> Checkpoint:
        parts = {part: dict(component.tensors) for part, component in base.components.items()}
        for name, value in values.items():
            part, _, path = name.partition(".")
            parts[part][path] = value.detach().float().cpu().clone()
        kept = {key: value for key, value in metadata.items() if not key.startswith("ss_network_")}
        kept["modelspec.architecture"] = base.family.architecture
        return Checkpoint(base.family.name, kept, original_tensors(base, parts))


def attach(networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None) -> FullAdapter:
    """Attach a FullAdapter to the networks, whose weights are replaced by trainable float32 copies.

    Raises OutOfMemory before copying if the copies would not fit. Raises BadConfig for a family or a setting that the method
    doesn't support, and LoraMisfit for a LoRA to continue from.
    """
    if not family.names.checkpoint_prefixes:
        raise BadConfig(f"method 'dreambooth': a checkpoint of {family.title} cannot be written. Use 'lora'")
    if blocks_in_a_level(networks["denoiser"].config) is None:  # pyright: ignore
        raise BadConfig(
            "method 'dreambooth': a checkpoint of a UNet whose levels have unlike blocks cannot be written. Use 'lora'"
        )
    if continue_from is not None:
        advice = "method 'dreambooth' continues from a checkpoint. Use that as base model"
        raise LoraMisfit(f"{continue_from.name}: {advice}")
    refuse_settings_of_lora(config)
    parameters = [parameter for network in networks.values() for parameter in network.parameters()]
    if (free := free_memory(parameters[0].device)) is not None:
        originals = parameters[0].dtype.itemsize if config.prior_prediction else 0
        check_memory(sum(parameter.numel() for parameter in parameters), config, free, originals)
    adapter = FullAdapter(networks, {})
    originals = {
        name: parameter.data if config.prior_prediction else parameter.data.cpu()
        for name, parameter in adapter.parameters().items()
    }
    for parameter in parameters:
        parameter.data = parameter.data.float().clone()
        parameter.requires_grad_(True)
    return FullAdapter(networks, originals)


def check_memory(count: int, config: OptimizerSettings, free: int, originals: int = 0) -> None:
    """Raise OutOfMemory, with advice, when training `count` weights needs more than `free` bytes.

    `originals` is the number of bytes kept per weight for its original value.
    """
    per_weight = 4 + 4 + (4 if config.ema_decay else 0) + originals  # a float32 weight, its gradient and its average
    needed = {name: count * (per_weight + kind.state_bytes) for name, kind in OPTIMIZERS.items()}
    if needed[config.optimizer] <= free:
        return
    fitting = max((name for name in needed if needed[name] <= free), key=lambda name: needed[name], default=None)
    advice = f"optimizer {fitting} needs {needed[fitting] / _GIB:.1f} GiB, or " if fitting else ""
    raise OutOfMemory(
        f"method 'dreambooth' needs {needed[config.optimizer] / _GIB:.1f} GiB for {count / 1e6:.0f} million weights, their "
        f"gradients and {config.optimizer}, but {free / _GIB:.1f} GiB are free. {advice}method 'lora' trains a hundredth of it"
    )


def lora_beside(file: Trained, base: Base, config: TrainConfig) -> LoraFile:
    """Approximate the change of linear layers and convolutions, not of norms and biases, by a LoRA of the settings' rank."""
    trained = load_base(file.tensors).components
    networks = {}
    for part in ("denoiser", *(base.family.text_encoders if config.text_encoder_lr else ())):
        networks[part] = base.family.build_empty(part, base.components[part].config)
    modules: dict[ModuleId, LoraModule] = {}
    targets = target_modules(base.family, replace(config, targets="transformer+conv"), networks)
    for (part, path), (rank, _) in targets.items():
        before, after = (parts[part].tensors[f"{path}.weight"].float() for parts in (base.components, trained))
        if (change := after - before).any():
            down, up, _ = factorise(change, rank, path)
            modules[part, path] = LoraModule(down, up, float(rank))
    metadata = file.metadata | {"modelspec.architecture": f"{base.family.architecture}/lora"}
    metadata.pop(KEY, None)  # This is the key of the checkpoint.
    return LoraFile.from_modules(base.family.name, modules, metadata, names=base.names)


def original_tensors(base: Base, parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by their original names.

    `parts` has the tensors of the denoiser, the VAE and the text encoders by their names in diffusers and transformers.
    """
    result: dict[str, Tensor] = {}
    unet, levels = base.components["denoiser"].config, len(base.components["vae"].config["block_out_channels"])
    attention_above = [kind.startswith("CrossAttn") for kind in unet["up_block_types"]]
    blocks = blocks_in_a_level(unet)
    assert blocks is not None, "`attach` refuses such a UNet"
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


METHOD = Method(
    "DreamBooth: all weights (arXiv:2208.12242)",
    attach,
    extra_files={"lora": lora_beside},
    makes="checkpoint",
    rate_factor=0.05,
    freezes_weights=False,
)
