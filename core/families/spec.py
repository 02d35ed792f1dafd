"""What a model family has to say of itself: the seam between the families and everything that is shared by them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UnmatchedKeys

Conditioning = dict[str, Tensor]
"""What steers the denoiser beside the timestep, first dimension the batch. Only its family knows what is in it."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors under new names, each read (and reshaped) only when asked for."""

    def __init__(self, readers: Mapping[str, Callable[[], Tensor]]):
        self._readers = readers

    def __getitem__(self, name: str) -> Tensor:
        return self._readers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


@dataclass(frozen=True)
class Component:
    """One network of a base model as its library (diffusers, transformers) describes it."""

    config: dict[str, Any]
    """Arguments of the network's class."""
    tensors: Mapping[str, Tensor]
    """Weights under the library's names; text encoders always with the leading `text_model.`."""


@dataclass(frozen=True)
class FamilySpec:
    """A model family: data, and the functions that differ from family to family."""

    name: str
    """Short name in code and messages: sd15, sdxl."""
    title: str
    """Name that a person knows: Stable Diffusion 1.x."""
    base_model_version: str
    """`ss_base_model_version` of a LoRA's metadata, the string that LoRA managers go by."""
    architecture: str
    """`modelspec.architecture` of a checkpoint; a LoRA adds `/lora`."""
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
    latent_scale: float
    """VAE latents times this have unit deviation."""
    pipeline_class: str
    """Name of the diffusers pipeline, also in a folder's model_index.json."""
    text_encoders: tuple[str, ...]
    """Parts that encode text, in the order of their prompts: text_encoder, text_encoder_2."""

    denoiser_targets: Mapping[str, str]
    """Choice of TrainConfig.targets -> regular expression that a denoiser's module path must match in full."""
    text_encoder_targets: str
    """The same for the text encoders, on paths that begin with `text_model.`."""

    split: Callable[[Mapping[str, Tensor]], dict[str, Component]]
    """Original checkpoint naming -> part (denoiser, vae, text_encoder, ...) -> Component."""
    build: Callable[[str, dict[str, Any]], nn.Module]
    """(part, config) -> the network without weights; call it under the meta device."""
    encode_text: Callable[[Mapping[str, nn.Module], Sequence[str], int, int], Conditioning]
    """(text encoders, captions, clip skip, chunks of 77 tokens) -> conditioning of each caption."""
    image_conditioning: Callable[[tuple[int, int], tuple[int, int], tuple[int, int]], Conditioning]
    """(original size, crop's top left as x and y, target size; sizes as width and height) -> conditioning of one image."""
    predict: Callable[[nn.Module, Tensor, Tensor, Conditioning], Tensor]
    """(denoiser, noisy latents (B, C, H, W), timesteps (B,), conditioning) -> prediction (B, C, H, W).

    The denoiser works in the dtype of the latents; the conditioning comes in the dtype that it was made in.
    """


def materialise(
    module: nn.Module, tensors: Mapping[str, Tensor], what: str, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """`module` (built on the meta device) with the tensors as its frozen weights, in evaluation mode.

    A tensor that is already of that device and dtype is used as it is, memory-mapped or not: nothing is held twice (but
    for tensors made in inference mode, through which nothing could be trained).
    UnmatchedKeys when names or shapes are not exactly those of the module.
    """
    wanted = module.state_dict()
    missing = sorted(set(wanted) - set(tensors))
    surplus = sorted(set(tensors) - set(wanted))
    if missing or surplus:
        kind, names = ("lacks", missing) if missing else ("has unknown", surplus)
        raise UnmatchedKeys(f"{what} {kind} {len(names)} tensors, e.g. {', '.join(names[:3])}")
    state = {}
    for name, place in wanted.items():
        tensor = tensors[name]
        if tensor.shape != place.shape:
            raise UnmatchedKeys(f"{what}: {name} has shape {list(tensor.shape)}, expected {list(place.shape)}")
        tensor = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        trainable = torch.is_inference_mode_enabled() or not tensor.is_inference()
        state[name] = tensor if trainable else tensor.clone()
    module.load_state_dict(state, assign=True)
    # What is in no checkpoint (CLIP's position numbers) was made on the CPU.
    return module.to(device).requires_grad_(False).eval()
