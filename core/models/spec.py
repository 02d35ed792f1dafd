"""What a model family has to say of itself: the seam between the families and everything that is shared by them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import BadFile, UnmatchedKeys
from ..tensor_names import NameTable
from .objective import FlowSchedule, NoiseSchedule, Schedule
from .recipe import Recipe

PredictionType = Literal["epsilon", "v_prediction", "flow"]
Conditioning = dict[str, Tensor]
"""What steers the denoiser beside the timestep, first dimension the batch. Only its family knows what is in it."""
Pair = tuple[Conditioning, Conditioning]
"""That of a picture's prompt and of its negative prompt, padded to each other."""


@dataclass(frozen=True)
class Component:
    """One network of a base model as its library (diffusers, transformers) describes it."""

    config: dict[str, Any]
    """Arguments of the network's class."""
    tensors: Mapping[str, Tensor]
    """Weights under the library's names; text encoders always with the leading `text_model.`."""


@dataclass(frozen=True)
class LatentShape:
    """Latents as the denoiser sees them."""

    channels: int
    pixels: int
    """Pixels along a side of one latent."""
    multiple: int
    """Height and width in latents are multiples of this."""
    positions_side: int = 1
    """Latents along a side of one of the denoiser's positions (tokens)."""


DENOISER_PREFIX = "model.diffusion_model."
"""Of the denoiser's tensors in a checkpoint in original naming, wherever they came from."""


UNQUANTISED = "give the model in bf16, fp16 or fp8"
"""What to do about a model that is quantised in a way that cannot be read."""


def encode_kl(vae: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of diffusers' AutoencoderKL, scaled by its config."""
    distribution = vae.encode(pixels).latent_dist  # pyright: ignore
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0  # pyright: ignore
    return (distribution.mean - shift) * scale, distribution.std * scale


def decode_kl(vae: nn.Module, latents: Tensor) -> Tensor:
    """Pixels of scaled latents by diffusers' AutoencoderKL."""
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0  # pyright: ignore
    return vae.decode(latents / scale + shift).sample  # pyright: ignore


def holds_numbers(tensor: Tensor) -> bool:
    """False while the memory of a step is predicted (core/models/memory_plan.py), where only shapes are known."""
    return not hasattr(tensor, "fake_mode")


def stack_conditioning(parts: Sequence[Conditioning]) -> Conditioning:
    """The conditioning of a batch. Texts of different lengths are filled up with zeros: their family then carries a mask."""
    joined = {}
    for name, first in parts[0].items():
        tensors = [part[name] for part in parts]
        if first.ndim > 1 and len({tensor.shape[1] for tensor in tensors}) > 1:
            longest = max(tensor.shape[1] for tensor in tensors)
            tensors = [torch.cat([t, t.new_zeros(t.shape[0], longest - t.shape[1], *t.shape[2:])], 1) for t in tensors]
        joined[name] = torch.cat(tensors)
    return joined


def stacked_with(conditioning: Conditioning) -> tuple[torch.Size, ...]:
    """Equal for texts that can be in one batch without filling up, or with it where a mask says so."""
    return () if "context_mask" in conditioning else tuple(value.shape for value in conditioning.values())


def on_device(conditioning: Conditioning, device: torch.device) -> Conditioning:
    """The conditioning on the device, but `context_mask` on the CPU: a family asks it how long its texts are, for which a
    GPU would have to be waited for at every step."""
    return {name: value.to("cpu" if name == "context_mask" else device) for name, value in conditioning.items()}


@dataclass(frozen=True)
class FamilySpec:
    """A model family: data, and the functions that differ from family to family."""

    names: NameTable
    """What it is called in code and in files, and what its modules are called."""
    title: str
    """Name that a person knows: Stable Diffusion 1.x."""
    resolution: int
    """Side of the square that the published models were trained at, in pixels."""
    size_multiple: int
    """Width and height of the pictures that they were trained on are multiples of this, in pixels."""
    wording: Literal["tags", "sentences"]
    """What prompts should be made of."""
    guidance: float
    """Scale of classifier-free guidance that suits photographs of people."""
    steps: int
    """Sampling steps that are enough."""
    recipes: Mapping[str, Recipe]
    """Each of `recipe.RECIPES` -> how much is trained for it, and how."""
    pipeline_class: str
    """Name of the diffusers pipeline, also in a folder's model_index.json."""
    text_encoders: tuple[str, ...]
    """Parts that encode text, in the order of their prompts: text_encoder, text_encoder_2."""

    text_kinds: tuple[str, ...]
    """The kinds of those that its models have, see `text.KINDS`."""
    context_from: Mapping[str, int]
    """Parts whose states the denoiser takes side by side -> how many layers' states."""
    pooled_from: Mapping[str, int]
    """The same of the pooled states."""

    denoiser_targets: Mapping[str, str]
    """Choice of TrainConfig.targets -> regular expression that a denoiser's module path must match in full."""
    text_encoder_targets: str | None
    """The same for the text encoders, on paths that begin with `text_model.`; None: they cannot be trained."""

    in_channels: int
    """Channels of the denoiser's input in its config: other numbers are inpainting and edit models."""
    recognise: Callable[[Mapping[str, Tensor]], bool]
    """Whether a checkpoint's denoiser, its tensors under their original names without a prefix, is of this family."""
    split: Callable[[Mapping[str, Tensor]], dict[str, Component]]
    """Original checkpoint naming -> part (denoiser, vae, text_encoder, ...) -> Component."""
    build: Callable[[str, dict[str, Any]], nn.Module]
    """(part, config) -> the network without weights; call it under the meta device."""
    latent_shape: Callable[[Mapping[str, Component]], LatentShape]
    """Parts -> what they say of the latents; the VAE may be missing."""
    encode_text: Callable[[Mapping[str, nn.Module], Sequence[str], int, int], Conditioning]
    """(text encoders, captions, clip skip, chunks of 77 tokens) -> conditioning of each caption."""
    image_conditioning: Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], Conditioning]
    """(original size, crop's top left as x and y, target size; sizes as width and height) -> conditioning of one image."""
    predict: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    """(denoiser, noisy latents (B, C, H, W), timesteps (B,), conditioning) -> prediction (B, C, H, W).

    The denoiser works in the dtype of the latents; the conditioning comes in the dtype that it was made in, and on the
    device of the latents but for a `context_mask`, which is on the CPU. Timesteps run
    from 0 (picture) to 1000 (noise), whole numbers unless the family is a rectified flow.
    """
    flow_shift: Callable[[int], float] | None = None
    """Positions of the denoiser in a picture -> how far the times of a rectified flow are shifted towards noise, see
    `objective.FlowSchedule`. None: the family predicts noise or velocity on SD's schedule."""
    encode_image: Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]] = encode_kl
    """(VAE, pixels (B, 3, H, W) in [-1, 1]) -> mean and deviation of their latents (B, C, h, w) as the denoiser sees them."""
    decode_latents: Callable[[nn.Module, Tensor], Tensor] = decode_kl
    """(VAE, latents (B, C, h, w) as the denoiser sees them) -> pixels (B, 3, H, W) in about [-1, 1]."""
    embeds_guidance: Callable[[dict[str, Any]], bool] = lambda config: False
    """The denoiser's config -> whether guidance is a number that it takes (`guidance` in the conditioning, distilled), so
    that no prediction without the prompt is needed."""
    has_clip_skip: bool = False
    """Whether the layer of the text encoder whose states are used can be chosen."""
    optional_encoders: tuple[str, ...] = ()
    """Those of `text_encoders` that a base may lack."""
    is_distilled: Callable[[dict[str, Any]], bool] = lambda config: False
    """The denoiser's config -> whether it says that the model was distilled to a few steps, which training would undo."""
    distilled_names: str = "turbo|lightning|schnell"
    """Regular expression of what the file names of such models contain, where nothing in the file tells them from others."""
    other_model: Callable[[dict[str, Any]], str | None] = lambda config: None
    """The denoiser's config -> another model that it is of, which diffusers' folders have under the same pipeline."""
    other_pipelines: tuple[str, ...] = ()
    """Names of diffusers' pipelines, beside `pipeline_class`, that have the same networks and so take the same LoRAs."""
    lookalikes: Mapping[str, str] = field(default_factory=dict)
    """A tensor in a checkpoint in original naming -> title of the model that is known by it, which looks like this family or
    was made from it and cannot be trained as it. The first match counts."""
    tokenizer: str | None = None
    """Kind (one of `text.KINDS`) of the text encoder whose tokenizer does not travel with the package."""
    lora_scheme: Literal["kohya", "comfy"] = "kohya"
    """Names that its LoRA files are written with: those that most programs load."""

    @property
    def name(self) -> str:
        """Short name in code and messages: sd15, sdxl."""
        return self.names.name

    @property
    def base_model_version(self) -> str:
        """`ss_base_model_version` of a LoRA's metadata, the string that LoRA managers go by."""
        return self.names.base_versions[0]

    @property
    def architecture(self) -> str:
        """`modelspec.architecture` of a checkpoint; a LoRA adds `/lora`."""
        return self.names.architecture

    @property
    def predicts_noise(self) -> bool:
        """Whether its models predict noise or velocity on SD's schedule; the others are rectified flows."""
        return self.flow_shift is None

    @property
    def trains_text_encoders(self) -> bool:
        """Whether its text encoders can be trained, so that their weights are needed and not their conditioning alone."""
        return self.text_encoder_targets is not None

    @property
    def denoiser_folder(self) -> str:
        """Name of the denoiser's folder in a pipeline that diffusers has saved: unet or transformer."""
        return "unet" if self.names.is_unet else "transformer"

    def prediction_type(self, named: str) -> PredictionType:
        """What a model of the family predicts, by what its file or a setting says of it. Rectified flows have no choice."""
        if not self.predicts_noise:
            return "flow"
        return "v_prediction" if named in ("v", "v_prediction") else "epsilon"

    def schedule(
        self, prediction_type: PredictionType, zero_terminal_snr: bool, components: Mapping[str, Component]
    ) -> Schedule:
        """How noise is mixed into the pictures of a model of these components, and what it is asked to predict."""
        if self.flow_shift is not None:
            return FlowSchedule(self.flow_shift, self.latent_shape(components).positions_side)
        assert prediction_type != "flow"
        return NoiseSchedule.scaled_linear(prediction_type, zero_terminal_snr)


def replace_module(network: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` in the place of the one at the path."""
    parent, _, name = path.rpartition(".")
    setattr(network.get_submodule(parent), name, module)


def materialise(
    module: nn.Module, tensors: Mapping[str, Tensor], what: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """`module` (built on the meta device) with the tensors as its frozen weights, in evaluation mode.

    A tensor that is already of that device and dtype is used as it is, memory-mapped or not: nothing is held twice (but
    for tensors made in inference mode, through which nothing could be trained). They are read in their own order, in which
    parts of one tensor follow each other.
    UnmatchedKeys when names or shapes are not exactly those of the module, BadFile when weights are whole numbers.
    """
    wanted = module.state_dict(keep_vars=True)
    missing = sorted(set(wanted) - set(tensors))
    surplus = sorted(set(tensors) - set(wanted))
    if missing or surplus:
        kind, names = ("lacks", missing) if missing else ("has unknown", surplus)
        raise UnmatchedKeys(f"{what} {kind} {len(names)} tensors, e.g. {', '.join(names[:3])}")
    state = {}
    first_names: dict[int, str] = {}  # of each weight: T5's embedding has two names
    for name in tensors:
        place = wanted[name]
        first = first_names.setdefault(id(place), name)
        if first != name:
            state[name] = state[first]
            continue
        tensor = tensors[name]
        if tensor.shape != place.shape:
            raise UnmatchedKeys(f"{what}: {name} has shape {list(tensor.shape)}, expected {list(place.shape)}")
        if place.is_floating_point() and not tensor.is_floating_point():
            raise BadFile(f"{what} is quantised, e.g. {name} to {tensor.dtype}; {UNQUANTISED}")
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        trainable = torch.is_inference_mode_enabled() or not tensor.is_inference()
        state[name] = tensor if trainable else tensor.clone()
    module.load_state_dict(state, assign=True)
    # What is in no checkpoint (CLIP's position numbers) was made on the CPU.
    if any(buffer.device != device for buffer in module.buffers()):
        module.to(device)
    return module.requires_grad_(False).eval()
