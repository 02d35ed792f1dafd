"""The interface between the model families and the code that they share: `FamilySpec`, which describes one family."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..device import keeps_quantised_weights
from ..errors import BadFile, UnmatchedKeys, counted
from ..storage.stored import QuantisedTensor, quantised_in
from ..tensor_names import NameTable
from .objective import FlowSchedule, NoiseSchedule, Schedule
from .quantised_layers import can_be_quantised, make_quantised
from .recipe import STARTING_POINTS, Recipe

PredictionType = Literal["epsilon", "v_prediction", "flow"]
Conditioning = dict[str, Tensor]
"""The inputs of the denoiser other than latents and timestep, each with the batch as its first dimension.

Only its family knows the keys.
"""
Networks = Mapping[str, nn.Module]
"""Some networks of a base model, by part."""
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
UNQUANTISED = "use the model in bf16, fp16 or fp8"
"""The advice in errors about a model whose quantisation is not supported."""


def encode_kl(vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Encode pixels (B, 3, H, W) with AutoencoderKL to the mean and deviation (B, C, h, w) of scaled latents."""
    distribution = vae.encode(pixels).latent_dist  # pyright: ignore
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0  # pyright: ignore
    return (distribution.mean - shift) * scale, distribution.std * scale


def decode_kl(vae: nn.Module, latents: Tensor) -> Tensor:
    """Decode scaled latents (B, C, h, w) with diffusers' AutoencoderKL to pixels (B, 3, H, W), about -1 to 1."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0  # pyright: ignore
    return vae.decode(latents / scale + shift).sample  # pyright: ignore


def stack_conditioning(parts: Sequence[Conditioning]) -> Conditioning:
    """Join conditionings into a batch. Texts of different lengths are padded with zeros; their family has a `context_mask`."""
    joined = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        if first.ndim > 1 and len({tensor.shape[1] for tensor in tensors}) > 1:
            longest = max(tensor.shape[1] for tensor in tensors)
            tensors = [torch.cat([t, t.new_zeros(t.shape[0], longest - t.shape[1], *t.shape[2:])], 1) for t in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def stacked_with(conditioning: Conditioning) -> tuple[torch.Size, ...]:
    """Return a key that is equal for conditionings that can be stacked: of equal shapes, or with a `context_mask`."""
    return () if "context_mask" in conditioning else tuple(value.shape for value in conditioning.values())


def on_device(conditioning: Conditioning, device: torch.device) -> Conditioning:
    """Move the conditioning to the device, except for `context_mask`, which stays on the CPU.

    Families read the lengths of texts from it. On a GPU, that would wait for the device at every step.
    """
    return {name: value.to("cpu" if name == "context_mask" else device) for name, value in conditioning.items()}


def placed(text: Conditioning, device: torch.device, dtype: torch.dtype) -> Conditioning:
    """Move the conditioning of a text to the device, in the dtype of the denoiser.

    A `context_mask` keeps its dtype: masks are summed to count tokens, and 16-bit floats are too coarse for that.
    """
    there = on_device(text, device)
    return {name: value if name == "context_mask" else value.to(dtype) for name, value in there.items()}


@dataclass(frozen=True)
class FewSteps:
    """How a model that was distilled to a few steps draws. Its guidance is in its weights, so the scale is 1."""

    steps: int
    shift: float | None = None
    """The shift of the times for pictures of all sizes. None means the family's."""
    model: str = ""
    """A well-known model that draws so, by its name on Hugging Face. Empty if none is known, or its speed LoRA is enough."""
    lora: str = ""
    """A well-known speed LoRA: a repository on Hugging Face and the name of a file in it. Empty if none is known."""

    @property
    def known(self) -> str:
        """The well-known file in words; empty if there is none."""
        if self.lora:
            repository, _, file = self.lora.rpartition("/")
            return f"the speed LoRA {file} (Hugging Face: {repository})"
        return self.model and f"the distilled model {self.model.rpartition('/')[2]} (Hugging Face: {self.model})"


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A model family: its data, and the functions that differ between families."""

    names: NameTable
    """Its names in code and in files, and the names of its modules."""
    title: str
    """The name that people know, such as Stable Diffusion 1.x."""
    resolution: int = 1024
    """The side of the square that the published models were trained at, in pixels."""
    size_multiple: int = 16
    """The widths and heights of their training pictures are multiples of this number of pixels."""
    smallest_picture: int = 0
    """The side, in pixels, of the smallest square that its models draw well. 0: no limit is known."""
    draws_slowly: bool = False
    """Whether a good picture takes its undistilled models about 50 steps, more than anybody waits for while training."""
    wording: Literal["tags", "sentences"] = "sentences"
    """The form of good prompts."""
    guidance: float
    """The scale of classifier-free guidance that suits photographs of people."""
    steps: int
    """A sufficient number of sampling steps."""
    recipes: Mapping[str, Recipe] = field(default_factory=lambda: STARTING_POINTS)
    """A recipe for each name in `recipe.RECIPES`."""
    pipeline_class: str
    """The name of its diffusers pipeline, which is also in a folder's model_index.json."""

    text_encoders: Mapping[str, str]
    """The kind, a key of `text.KINDS`, of each part that encodes text, in the order of the pipeline: text_encoder, ..."""
    other_text_kinds: tuple[str, ...] = ()
    """The kinds of text encoder that other models of the family use instead."""
    context_from: Mapping[str, int] = field(default_factory=lambda: {"text_encoder": 1})
    """The text encoders whose hidden states the denoiser takes side by side, with the number of layers from each."""
    pooled_from: Mapping[str, int] = field(default_factory=dict)
    """The text encoders whose pooled states the denoiser takes, with 1 for each."""

    usual_tokens: int = 77
    """The usual number of tokens of a caption's states with their padding in ComfyUI, to forecast without text encoders."""

    denoiser_targets: Mapping[str, str]
    """A regular expression for each value of TrainConfig.targets. It matches the full paths of adapted denoiser modules."""
    text_encoder_targets: str | None = None
    """A regular expression for adapted modules of text encoders, from `text_model.` on. None means they can't be trained."""

    in_channels: int
    """The channels of the denoiser's input in its config. Inpainting and edit models have more."""
    denoiser_has: tuple[str, ...]
    """Tensors of every denoiser of the family, by their original names without a prefix. They distinguish it from others."""
    denoiser_lacks: tuple[str, ...] = ()
    """Tensors of another family that also has the others."""
    split: Callable[[Mapping[str, Tensor]], dict[str, Component]]
    """Splits a checkpoint in original naming into components by part (denoiser, vae, text_encoder, ...)."""
    build: Callable[[str, dict[str, Any]], nn.Module]
    """Builds the network of (part, config) without weights. Call it under the meta device."""
    latent_shape: Callable[[Mapping[str, Component]], LatentShape]
    """Returns the shape of the latents from the components. The VAE may be missing."""
    encode_text: Callable[[Networks, Sequence[str], int, int], Conditioning]
    """Encodes (text encoders, captions, clip skip, chunks of 77 tokens) to a conditioning with a row for each caption."""
    image_conditioning: Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], Conditioning] = lambda *sizes: {}
    """Returns the conditioning of one image on (original size, top left of its crop, size after cropping).

    Sizes are (width, height) and the corner is (x, y), in pixels. It is empty for most families.
    """
    predict: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    """Predicts (B, C, H, W) from (denoiser, noisy latents (B, C, H, W), timesteps (B,), conditioning).

    The denoiser computes in the dtype of the latents. The conditioning keeps the dtype it was created with. It is on the
    device of the latents except for a `context_mask`, which is on the CPU. Timesteps run from 0 (picture) to 1000 (noise), and
    are whole numbers unless the family is a rectified flow.
    """
    flow_shift: Callable[[int], float] | None = None
    """The shift of a rectified flow's times towards noise for a number of positions, see `objective.FlowSchedule`.

    None means that the family predicts noise or velocity on SD's schedule.
    """
    training_shift: Callable[[int], float] | None = None
    """The shift to train with, if it isn't that to draw with."""
    marks_negative: bool = False
    """Whether `predict` is told which texts are negative prompts, as `is_negative` (B,) in the conditioning: 1 for these."""
    encode_image: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = encode_kl
    """Encodes (VAE, pixels (B, 3, H, W) in [-1, 1]) to the mean and deviation of the denoiser's latents (B, C, h, w)."""
    decode_latents: Callable[[nn.Module, Tensor], Tensor] = decode_kl
    """Decodes (VAE, the denoiser's latents (B, C, h, w)) to pixels (B, 3, H, W), about -1 to 1."""
    embeds_guidance: Callable[[dict[str, Any]], bool] = lambda config: False
    """Returns, from the denoiser's config, whether guidance was distilled into it.

    It then takes the scale as `guidance` in the conditioning, and doesn't need a prediction without the prompt.
    """
    has_clip_skip: bool = False
    """Whether users can choose the layer of the text encoder whose states are used."""
    optional_encoders: tuple[str, ...] = ()
    """The text encoders that a base model may lack."""
    is_distilled: Callable[[dict[str, Any]], bool] = lambda config: False
    """Returns, from the denoiser's config, whether the model was distilled to a few steps, which training would undo."""
    is_flow_map: Callable[[dict[str, Any]], bool] = lambda config: False
    """Returns, from the denoiser's config, whether it is a flow map (arXiv:2505.13447).

    It then predicts the mean velocity over a step. It takes the timestep (B,) that the step leads to as `target` in the
    conditioning. Without `target`, it predicts the velocity at the timestep itself, which is what training uses.
    """
    distilled_names: str = "turbo|lightning|schnell"
    """A regular expression for file names of distilled models, if nothing in the file distinguishes them from others."""
    training_adapter: str = ""
    """The usual training adapter for its distilled models, by its name on Hugging Face. Empty if none is known."""
    needs_adapter: bool = False
    """Whether LoRAs of all its models tend to collapse without the usual training adapter, although none is distilled."""
    few_steps: FewSteps | None = None
    """How its distilled models draw. None if that is not known, and they draw like the others."""
    other_model: Callable[[dict[str, Any]], str | None] = lambda config: None
    """Returns, from the denoiser's config, the name of a different model with the same diffusers pipeline, or None."""
    other_pipelines: tuple[str, ...] = ()
    """Other diffusers pipelines with the same networks, which take the same LoRAs."""
    other_folders: tuple[str, ...] = ()
    """Other diffusers pipelines whose folders are base models of the family."""
    lookalikes: Mapping[str, str] = field(default_factory=dict)
    """The titles of models that look like this family but cannot be trained as it, by a tensor that only they have.

    Names are those of original checkpoints, and the first match counts.
    """
    unused: str = r"$^"
    """A regular expression found in the paths of the denoiser's modules that are not used here.

    They are not loaded. When a LoRA is applied to the loaded network, its changes of them are left out.
    """
    overflows_in_fp16: bool = False
    """Whether the denoiser's states exceed the range of fp16 (65504), so that it only runs in bf16 or float32."""

    @property
    def name(self) -> str:
        """The short name in code and messages, such as sd15."""
        return self.names.name

    def recognise(self, denoiser: Mapping[str, Tensor]) -> bool:
        """Return whether a checkpoint's denoiser, given by original names without a prefix, is of this family."""
        has_all = all(name in denoiser for name in self.denoiser_has)
        return has_all and not any(name in denoiser for name in self.denoiser_lacks)

    def is_named_distilled(self, name: str) -> bool:
        """Return whether a model's name indicates distillation to a few steps."""
        return re.search(self.distilled_names, name, re.IGNORECASE) is not None

    def few_steps_named(self, name: str) -> FewSteps | None:
        """Return how a distilled model of that name draws. Some names, such as `sdxl_lightning_4step`, give the steps."""
        steps = re.search(r"(?<!\d)([1-9]|1[0-6])[-_ ]?step", name, re.IGNORECASE)
        return replace(self.few_steps, steps=int(steps[1])) if self.few_steps and steps else self.few_steps

    @property
    def base_model_version(self) -> str:
        """The `ss_base_model_version` in a LoRA's metadata. LoRA managers recognise the family from it."""
        return self.names.base_versions[0]

    @property
    def architecture(self) -> str:
        """The `modelspec.architecture` of a checkpoint. A LoRA adds `/lora`."""
        return self.names.architecture

    @property
    def text_kinds(self) -> tuple[str, ...]:
        """The kinds of text encoder that its models have, keys of `text.KINDS`."""
        return (*self.text_encoders.values(), *self.other_text_kinds)

    @property
    def tokenizer(self) -> str | None:
        """The kind of the text encoder whose tokenizer the package does not include, or None. Only CLIP's is included."""
        return next((kind for kind in self.text_encoders.values() if not kind.startswith("clip")), None)

    @property
    def predicts_noise(self) -> bool:
        """Whether its models predict noise or velocity on SD's schedule. Otherwise they are rectified flows."""
        return self.flow_shift is None

    @property
    def trains_text_encoders(self) -> bool:
        """Whether its text encoders can be trained, so that their weights are needed in addition to the conditioning."""
        return self.text_encoder_targets is not None

    @property
    def denoiser_folder(self) -> str:
        """The name of the denoiser's folder in a pipeline saved by diffusers: unet or transformer."""
        return "unet" if self.names.is_unet else "transformer"

    def build_empty(self, part: str, config: dict[str, Any]) -> nn.Module:
        """Build the network of a part on the meta device: shapes without numbers, which `materialise` adds."""
        with torch.device("meta"), _Uninitialised():
            network = self.build(part, config)
        for path, module in list(network.named_modules()) if part == "denoiser" else ():
            for name, _ in list(module.named_children()):
                if re.search(self.unused, f"{path}.{name}"):
                    delattr(module, name)
        return network

    def prediction_type(self, named: str) -> PredictionType:
        """Return the prediction type that a file or settings name. Always "flow" for a rectified flow."""
        if not self.predicts_noise:
            return "flow"
        return "v_prediction" if named in ("v", "v_prediction") else "epsilon"

    def schedule(
        self, prediction_type: PredictionType, zero_terminal_snr: bool, components: Mapping[str, Component]
    ) -> Schedule:
        """Return the noise schedule of a model with these components. It also defines what the model predicts."""
        if self.flow_shift is not None:
            side = self.latent_shape(components).positions_side
            return FlowSchedule(self.flow_shift, side, self.training_shift or self.flow_shift)
        assert prediction_type != "flow"
        return NoiseSchedule.scaled_linear(prediction_type, zero_terminal_snr)


class _Uninitialised(TorchFunctionMode):
    """Creates layers without initial weights in this context. On the meta device that takes a third of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs else args[0]
        return func(*args, **(kwargs or {}))


def materialise(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    what: str,
    device: torch.device,
    dtype: torch.dtype,
    as_stored: bool = False,
) -> nn.Module:
    """Load the tensors as frozen weights into a module that was built on the meta device, and switch to evaluation mode.

    A tensor that already has the device and the dtype is used without a copy, memory-mapped or not. A tensor made in inference
    mode is copied, since autograd could not use it. Tensors are read in the order of the mapping, where parts of one tensor
    follow each other. With `as_stored`, layers keep weights that are stored in fewer bits, and dequantise them when used. The
    numbers are the same. Raises UnmatchedKeys when names or shapes are not exactly those of the module. Raises BadFile
    when a weight is stored as whole numbers. The messages contain `what`.
    """
    wanted = module.state_dict(keep_vars=True)
    missing = sorted(set(wanted) - set(tensors))
    surplus = sorted(set(tensors) - set(wanted))
    if missing or surplus:
        kind, names = ("lacks", missing) if missing else ("has unknown", surplus)
        raise UnmatchedKeys(f"{what} {kind} {counted(len(names), 'tensor')}, e.g. {', '.join(names[:3])}")

    def usable(tensor: Tensor) -> Tensor:
        return tensor if torch.is_inference_mode_enabled() or not tensor.is_inference() else tensor.clone()

    def placed_as(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(device)
        # torch converts on the processor what it copies and converts in one call. A GPU is faster, unless it gets more bytes
        # or can't hold the stored type.
        first_moved = tensor.itemsize <= dtype.itemsize and keeps_quantised_weights(device)
        return tensor.to(device).to(dtype) if first_moved else tensor.to(dtype).to(device)

    state = {}
    quantised: dict[str, QuantisedTensor] = {}
    first_names: dict[int, str] = {}  # by weight, since T5's embedding has two names
    for name in tensors:
        place = wanted[name]
        first = first_names.setdefault(id(place), name)
        if first != name:
            state[name] = state[first]
            continue
        path, _, kind = name.rpartition(".")
        if as_stored and kind == "weight" and can_be_quantised(module.get_submodule(path)):
            weight = quantised_in(tensors, name)
            if weight and weight.shape == place.shape:
                quantised[path] = weight.map(lambda part: usable(part.to(device)))
                continue
        tensor = tensors[name]
        if (1, *tensor.shape) == place.shape:
            tensor = tensor[None]  # Some GGUF files lack a first side of 1.
        if tensor.shape != place.shape:
            raise UnmatchedKeys(f"{what}: {name} has shape {list(tensor.shape)}, expected {list(place.shape)}")
        if place.is_floating_point() and not tensor.is_floating_point():
            raise BadFile(f"{what} is quantised, e.g. {name} to {tensor.dtype}; {UNQUANTISED}")
        state[name] = usable(placed_as(tensor))
    module.load_state_dict(state, assign=True, strict=False)  # strict requires those too that are added next
    for path, weight in quantised.items():
        make_quantised(module, path, weight, dtype)
    # Buffers that are not in checkpoints (CLIP's position numbers) were created on the CPU.
    if any(buffer.device != device for buffer in module.buffers()):
        module.to(device)
    return module.requires_grad_(False).eval()
