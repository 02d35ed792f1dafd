"""The interface between the model families and the code that they share: `FamilySpec`, which describes one family."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..device import keeps_narrow_weights
from ..errors import BadFile, UnmatchedKeys, counted
from ..storage.lazy import narrow_in
from ..storage.narrow import NarrowTensor
from ..tensor_names import NameTable
from .narrow_layers import can_be_narrow, make_narrow
from .objective import FlowSchedule, NoiseSchedule, Schedule
from .recipe import Recipe

PredictionType = Literal["epsilon", "v_prediction", "flow"]
Conditioning = dict[str, Tensor]
"""The inputs of the denoiser beside latents and timestep, each with the batch as its first dimension.

Only its family knows what is in it."""
Pair = tuple[Conditioning, Conditioning]
"""The conditioning of a picture's prompt and of its negative prompt, padded to one length."""


@dataclass(frozen=True)
class Component:
    """A network of a base model, as its library (diffusers, transformers) describes it."""

    config: dict[str, Any]
    """The arguments of the network's class."""
    tensors: Mapping[str, Tensor]
    """The weights by the library's names, which for CLIP always begin with `text_model.`."""


@dataclass(frozen=True)
class LatentShape:
    """The shape of latents in the form that the denoiser takes."""

    channels: int
    pixels: int
    """The number of pixels along a side of one latent."""
    multiple: int
    """The height and the width in latents must be multiples of this."""
    positions_side: int = 1
    """The number of latents along a side of one of the denoiser's positions (tokens)."""


DENOISER_PREFIX = "model.diffusion_model."
"""The prefix of the denoiser's tensors in a checkpoint in original naming."""


UNQUANTISED = "give the model in bf16, fp16 or fp8"
"""The advice in errors about a model that is quantised in a way that cannot be read."""


def encode_kl(vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the deviation (B, C, h, w) of AutoencoderKL's latents, scaled by its config, of pixels (B, 3, H, W)."""
    distribution = vae.encode(pixels).latent_dist  # pyright: ignore
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0  # pyright: ignore
    return (distribution.mean - shift) * scale, distribution.std * scale


def decode_kl(vae: nn.Module, latents: Tensor) -> Tensor:
    """The pixels (B, 3, H, W), about -1 to 1, that diffusers' AutoencoderKL decodes from scaled latents (B, C, h, w)."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0  # pyright: ignore
    return vae.decode(latents / scale + shift).sample  # pyright: ignore


def holds_numbers(tensor: Tensor) -> bool:
    """Whether the tensor has values; the fake tensors by which memory is predicted have only shapes."""
    return not hasattr(tensor, "fake_mode")


def stack_conditioning(parts: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of a batch. Texts of different lengths are padded with zeros; their family has a `context_mask`."""
    joined = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        if first.ndim > 1 and len({tensor.shape[1] for tensor in tensors}) > 1:
            longest = max(tensor.shape[1] for tensor in tensors)
            tensors = [torch.cat([t, t.new_zeros(t.shape[0], longest - t.shape[1], *t.shape[2:])], 1) for t in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def stacked_with(conditioning: Conditioning) -> tuple[torch.Size, ...]:
    """A key that is equal for conditionings that can be stacked into one batch: of equal shapes, or with a `context_mask`."""
    return () if "context_mask" in conditioning else tuple(value.shape for value in conditioning.values())


def on_device(conditioning: Conditioning, device: torch.device) -> Conditioning:
    """The conditioning on the device, except for `context_mask`, which stays on the CPU.

    Families read the lengths of texts from it, which on a GPU would wait for the device at every step.
    """
    return {name: value.to("cpu" if name == "context_mask" else device) for name, value in conditioning.items()}


def placed(text: Conditioning, device: torch.device, dtype: torch.dtype) -> Conditioning:
    """The conditioning of a text on the device, in the dtype of the denoiser.

    A `context_mask` keeps its own: masks are summed to count tokens, for which 16-bit floats are too coarse.
    """
    there = on_device(text, device)
    return {name: value if name == "context_mask" else value.to(dtype) for name, value in there.items()}


@dataclass(frozen=True)
class FewSteps:
    """How a model that was distilled to a few steps draws. Its guidance is in its weights, so that the scale is 1."""

    steps: int
    shift: float | None = None
    """The shift of the times for pictures of all sizes; None where it is that of the family."""


def states_width(denoiser: Mapping[str, Any]) -> int:
    """The width of the text states that a denoiser takes, by a name that it has in the diffusers config of several families."""
    names = (
        "cross_attention_dim", "joint_attention_dim", "cap_feat_dim", "text_hidden_dim", "text_in_dim", "context_in_dim",
    )  # fmt: skip
    return next(denoiser[name] for name in names if name in denoiser) * denoiser.get("num_text_layers", 1)


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A model family: its data, and the functions that differ between families."""

    names: NameTable
    """Its names in code and in files, and the names of its modules."""
    title: str
    """The name that people know, such as Stable Diffusion 1.x."""
    resolution: int
    """The side of the square that the published models were trained at, in pixels."""
    size_multiple: int
    """The multiple, in pixels, of the widths and heights of pictures that they were trained on."""
    wording: Literal["tags", "sentences"]
    """The form of good prompts."""
    guidance: float
    """The scale of classifier-free guidance that suits photographs of people."""
    steps: int
    """The number of sampling steps that is enough."""
    recipes: Mapping[str, Recipe]
    """A recipe for each name in `recipe.RECIPES`."""
    pipeline_class: str
    """The name of its diffusers pipeline, which is also in a folder's model_index.json."""

    text_encoders: Mapping[str, str]
    """The kind, a key of `text.KINDS`, of each part that encodes text, in the order of the pipeline: text_encoder, ..."""
    other_text_kinds: tuple[str, ...] = ()
    """The kinds of text encoder that other models of the family have instead."""
    context_from: Mapping[str, int] = field(default_factory=lambda: {"text_encoder": 1})
    """The text encoders whose hidden states the denoiser takes side by side, with the number of layers from each."""
    context_width: Callable[[Mapping[str, Any]], int] = states_width
    """The width of the text states that the denoiser takes, by its config."""
    pooled_from: Mapping[str, int] = field(default_factory=dict)
    """The text encoders whose pooled states the denoiser takes, with 1 for each."""

    denoiser_targets: Mapping[str, str]
    """A regular expression for each value of TrainConfig.targets, which paths of adapted denoiser modules match in full."""
    text_encoder_targets: str | None = None
    """A regular expression for adapted modules of text encoders, from `text_model.` on; None: they cannot be trained."""

    in_channels: int
    """The channels of the denoiser's input in its config. Inpainting and edit models have more."""
    recognise: Callable[[Mapping[str, Tensor]], bool]
    """Tells whether a checkpoint's denoiser, given by original names without a prefix, is of this family."""
    split: Callable[[Mapping[str, Tensor]], dict[str, Component]]
    """Splits a checkpoint in original naming into components by part (denoiser, vae, text_encoder, ...)."""
    build: Callable[[str, dict[str, Any]], nn.Module]
    """Builds the network of (part, config) without weights. Call it under the meta device."""
    latent_shape: Callable[[Mapping[str, Component]], LatentShape]
    """The shape of the latents, by the components, of which the VAE may be missing."""
    encode_text: Callable[[Mapping[str, nn.Module], Sequence[str], int, int], Conditioning]
    """Encodes (text encoders, captions, clip skip, chunks of 77 tokens) to a conditioning with a row for each caption."""
    image_conditioning: Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], Conditioning] = lambda *sizes: {}
    """The conditioning of one image on (original size, top left of its crop, size after cropping).

    Sizes are (width, height) and the corner is (x, y), in pixels. Most families have none."""
    predict: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    """The prediction (B, C, H, W) for (denoiser, noisy latents (B, C, H, W), timesteps (B,), conditioning).

    The denoiser computes in the dtype of the latents. The conditioning has the dtype that it was made in, and is on the
    device of the latents except for a `context_mask`, which is on the CPU. Timesteps run from 0 (picture) to 1000 (noise),
    and are whole numbers unless the family is a rectified flow.
    """
    flow_shift: Callable[[int], float] | None = None
    """The shift of a rectified flow's times towards noise for a number of positions, see `objective.FlowSchedule`.

    None: the family predicts noise or velocity on SD's schedule."""
    encode_image: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = encode_kl
    """The mean and the deviation of latents (B, C, h, w) for the denoiser, of (VAE, pixels (B, 3, H, W) in [-1, 1])."""
    decode_latents: Callable[[nn.Module, Tensor], Tensor] = decode_kl
    """The pixels (B, 3, H, W), about -1 to 1, of (VAE, latents (B, C, h, w) for the denoiser)."""
    embeds_guidance: Callable[[dict[str, Any]], bool] = lambda config: False
    """Tells by the denoiser's config whether guidance was distilled into it.

    It then takes the scale as `guidance` in the conditioning, and needs no prediction without the prompt."""
    has_clip_skip: bool = False
    """Whether users can choose the layer of the text encoder whose states are used."""
    optional_encoders: tuple[str, ...] = ()
    """The text encoders that a base model may lack."""
    is_distilled: Callable[[dict[str, Any]], bool] = lambda config: False
    """Tells by the denoiser's config whether the model was distilled to a few steps, which training would undo."""
    is_flow_map: Callable[[dict[str, Any]], bool] = lambda config: False
    """Tells by the denoiser's config whether it is a flow map (arXiv:2505.13447).

    It then predicts the mean velocity over a step, and takes the timestep (B,) that the step leads to as `target` in the
    conditioning; without it, the velocity at the timestep itself, which is what is trained."""
    distilled_names: str = "turbo|lightning|schnell"
    """A regular expression for file names of distilled models, for those that nothing in the file tells from others."""
    training_adapter: str = ""
    """The usual training adapter for its distilled models, by its name on Hugging Face; empty where none is known."""
    few_steps: FewSteps | None = None
    """How its distilled models draw; None where they are not known, and draw like the others."""
    other_model: Callable[[dict[str, Any]], str | None] = lambda config: None
    """The name of another model with the same diffusers pipeline, by the denoiser's config; None if it is of this family."""
    other_pipelines: tuple[str, ...] = ()
    """Other diffusers pipelines with the same networks, which take the same LoRAs."""
    other_folders: tuple[str, ...] = ()
    """Other diffusers pipelines whose folders are base models of the family."""
    lookalikes: Mapping[str, str] = field(default_factory=dict)
    """The titles of models that look like this family but cannot be trained as it, by a tensor that only they have.

    Names are those of original checkpoints, and the first match counts."""
    unused: str = r"$^"
    """A regular expression that is found in the paths of the denoiser's modules that nothing here uses.

    They are not loaded, and a LoRA's change of them is left out where it is put on what is loaded."""
    overflows_in_fp16: bool = False
    """Whether the denoiser's states exceed what fp16 holds (65504), so that it is computed in bf16 or float32 alone."""

    @property
    def name(self) -> str:
        """The short name in code and messages, such as sd15."""
        return self.names.name

    @property
    def base_model_version(self) -> str:
        """The `ss_base_model_version` in a LoRA's metadata, by which LoRA managers know the family."""
        return self.names.base_versions[0]

    @property
    def architecture(self) -> str:
        """The `modelspec.architecture` of a checkpoint; a LoRA adds `/lora`."""
        return self.names.architecture

    @property
    def text_kinds(self) -> tuple[str, ...]:
        """The kinds of text encoder that its models have, keys of `text.KINDS`."""
        return (*self.text_encoders.values(), *self.other_text_kinds)

    @property
    def tokenizer(self) -> str | None:
        """The kind of the text encoder whose tokenizer the package does not include; it has CLIP's alone."""
        return next((kind for kind in self.text_encoders.values() if not kind.startswith("clip")), None)

    @property
    def predicts_noise(self) -> bool:
        """Whether its models predict noise or velocity on SD's schedule; otherwise they are rectified flows."""
        return self.flow_shift is None

    @property
    def trains_text_encoders(self) -> bool:
        """Whether its text encoders can be trained, so that their weights are needed beside the conditioning."""
        return self.text_encoder_targets is not None

    @property
    def denoiser_folder(self) -> str:
        """The name of the denoiser's folder in a pipeline saved by diffusers: unet or transformer."""
        return "unet" if self.names.is_unet else "transformer"

    def build_empty(self, part: str, config: dict[str, Any]) -> nn.Module:
        """The network of a part on the meta device: shapes without numbers, which `materialise` gives it."""
        with torch.device("meta"), _Uninitialised():
            network = self.build(part, config)
        if part == "denoiser":
            _leave_out(network, self.unused)
        return network

    def prediction_type(self, named: str) -> PredictionType:
        """The prediction type of a model whose file or settings name it so; always "flow" for a rectified flow."""
        if not self.predicts_noise:
            return "flow"
        return "v_prediction" if named in ("v", "v_prediction") else "epsilon"

    def schedule(
        self, prediction_type: PredictionType, zero_terminal_snr: bool, components: Mapping[str, Component]
    ) -> Schedule:
        """The noise schedule of a model with these components, which also knows what it predicts."""
        if self.flow_shift is not None:
            return FlowSchedule(self.flow_shift, self.latent_shape(components).positions_side)
        assert prediction_type != "flow"
        return NoiseSchedule.scaled_linear(prediction_type, zero_terminal_snr)


def _leave_out(network: nn.Module, unused: str) -> None:
    """Takes out of a network the modules in whose paths the regular expression is found."""
    for path, module in list(network.named_modules()):
        for name, _ in list(module.named_children()):
            if re.search(unused, f"{path}.{name}"):
                delattr(module, name)


class _Uninitialised(TorchFunctionMode):
    """A context in which layers are made without their first weights: for tensors on the meta device, a third of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Replaces the module of a network at a path by `module`."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def materialise(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
    device: torch.device,
    dtype: torch.dtype,
    as_stored: bool = False,
) -> nn.Module:
    """The module, built on the meta device, with the tensors as its frozen weights, in evaluation mode.

    A tensor that already has the device and the dtype is used without a copy, memory-mapped or not, unless it was made in
    inference mode, where autograd could not use it. Tensors are read in the order of the mapping, in which parts of one
    tensor follow each other. With `as_stored`, layers keep weights that are stored in fewer bits as they are, and widen them
    when they are used; the numbers are the same. Raises UnmatchedKeys when names or shapes are not exactly those of the module,
    and BadFile when a weight is stored as whole numbers, with `what` in the message.
    """
    wanted = module.state_dict(keep_vars=True)
    missing = sorted(set(wanted) - set(tensors))
    surplus = sorted(set(tensors) - set(wanted))
    if missing or surplus:
        kind, names = ("lacks", missing) if missing else ("has unknown", surplus)
        raise UnmatchedKeys(f"{what} {kind} {counted(len(names), 'tensor')}, e.g. {', '.join(names[:3])}")

    def usable(tensor: Tensor) -> Tensor:
        return tensor if torch.is_inference_mode_enabled() or not tensor.is_inference() else tensor.clone()

    state = {}
    narrow: dict[str, NarrowTensor] = {}
    first_names: dict[int, str] = {}  # by weight, since T5's embedding has two names
    for name in tensors:
        place = wanted[name]
        first = first_names.setdefault(id(place), name)
        if first != name:
            state[name] = state[first]
            continue
        path, _, kind = name.rpartition(".")
        if as_stored and kind == "weight" and can_be_narrow(module.get_submodule(path)):
            weight = narrow_in(tensors, name)
            if weight and weight.shape == place.shape:
                narrow[path] = weight.map(lambda part: usable(part.to(device)))
                continue
        tensor = tensors[name]
        if tensor.shape != place.shape:
            raise UnmatchedKeys(f"{what}: {name} has shape {list(tensor.shape)}, expected {list(place.shape)}")
        if place.is_floating_point() and not tensor.is_floating_point():
            raise BadFile(f"{what} is quantised, e.g. {name} to {tensor.dtype}; {UNQUANTISED}")
        if not keeps_narrow_weights(device):  # nor can it be the place where they are widened
            tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
        state[name] = usable(tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))
    module.load_state_dict(state, assign=True, strict=False)  # strict means narrow weights too, which come now
    for path, weight in narrow.items():
        make_narrow(module, path, weight, dtype)
    # Buffers that no checkpoint has (CLIP's position numbers) were made on the CPU.
    if any(buffer.device != device for buffer in module.buffers()):
        module.to(device)
    return module.requires_grad_(False).eval()
