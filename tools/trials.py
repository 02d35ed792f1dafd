"""Measure how a device computes: its loss and gradient beside the CPU's, the steps of a memory plan, and products in 8 bits."""

import math
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import TrainConfig
from core.device import exact_arithmetic, is_out_of_memory, precision_name, release_memory
from core.models.base import Base
from core.models.memory_plan import MemoryPlan
from core.models.narrow_layers import narrowed
from core.models.products import time_in_eight_bits
from core.models.spec import on_device, placed
from core.storage.stored import FLOAT8, NarrowTensor, as_stored
from core.training.encode import LatentCache
from core.training.inputs import TrainingInputs
from core.training.memory_prediction import predicted_memory
from core.training.methods import attach
from core.training.step import Run
from tools.timing import peak_memory, seconds

SMALL_CHANNELS, SMALL_RESOLUTION = 64, 128
"""The size of the denoiser that is compared with the CPU."""
FLUX_WIDTH = 3072
"""The width of FLUX.1's weights."""
DIFFERENCES = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""The largest allowed distance of a gradient from the CPU's in float32, as a share of its norm, by its dtype.

Rounding all values to 10 or 7 bits causes differences of one or a few hundredths; an error in a kernel causes about 1."""


@dataclass(frozen=True)
class Agreement:
    """How far a device's loss and gradient are from the CPU's in float32, as shares of the CPU's."""

    precision: str
    loss: float
    gradient: float
    is_good: bool


@dataclass(frozen=True)
class Trial:
    """A few steps under a memory plan."""

    plan: str
    error: str
    """The class of the error that ended the steps, or "out of memory"; "" without one."""
    seconds: float | None
    """The seconds of a step."""
    predicted: int | None
    """The predicted bytes."""
    measured: int | None
    """The most bytes in use by the device's allocator; None on a CPU, whose process holds other data too."""


ROWS = 2048
"""The rows of products, about the positions of a picture of 768 px."""


def products(device: torch.device, dtype: torch.dtype, width: int) -> dict[str, float | None]:
    """Time products in 8 bits of `ROWS` rows with weights as wide as those of a transformer's block.

    Return the time for each dtype of the weights, as a share of the time with widened weights; None where the device has no
    such products.
    """
    shares = {
        name: time_in_eight_bits([(weight, ROWS) for weight in of_kind], device, dtype)
        for name, of_kind in eight_bit_weights(width).items()
    }
    return {name: share if math.isfinite(share) else None for name, share in shares.items()}


def eight_bit_weights(width: int) -> dict[str, list[NarrowTensor]]:
    """Return the weights of a block of a transformer of that width, in each kind of 8 bits, with random numbers."""
    shapes = ((width, width), (4 * width, width), (width, 4 * width))
    wide = [torch.randn(shape, generator=torch.Generator().manual_seed(1)) for shape in shapes]
    fp8 = [NarrowTensor((weight.to(FLOAT8[0]),), as_stored, tuple(weight.shape)) for weight in wide]
    return {"int8": [narrowed(weight) for weight in wide], "fp8": fp8}


def agreement(base: Base, cache: LatentCache, device: torch.device, dtype: torch.dtype) -> Agreement:
    """Compare the device in that dtype with the CPU in float32, on the same weights, inputs and adapter."""
    loss, gradient = loss_and_gradient(base, cache, torch.device("cpu"), torch.float32)
    with exact_arithmetic(tf32=dtype != torch.float32):
        other_loss, other = loss_and_gradient(base, cache, device, dtype)
    difference = float((other - gradient).norm() / gradient.norm())
    relative = abs(other_loss / loss - 1)
    return Agreement(precision_name(dtype), relative, difference, max(difference, relative) < DIFFERENCES[dtype])


def loss_and_gradient(base: Base, cache: LatentCache, device: torch.device, dtype: torch.dtype) -> tuple[float, Tensor]:
    """Return the loss of one prediction for the first picture, and the adapter's gradient (N,), float64 on the CPU."""
    image = cache.images[0]
    generator = torch.Generator().manual_seed(1)
    noisy, target = torch.randn(2, 1, *image.mean.shape, generator=generator)
    denoiser = base.load("denoiser", device, dtype)
    adapter = attach({"denoiser": denoiser}, base.family, TrainConfig(rank=4))
    for name, parameter in sorted(adapter.parameters().items()):
        if name.endswith(".up"):
            parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    conditioning = placed(cache.text[image.caption], device, dtype) | on_device(image.conditioning, device)
    timesteps = torch.tensor([500], device=device)
    prediction = base.family.predict(denoiser, noisy.to(device, dtype), timesteps, conditioning)
    loss = F.mse_loss(prediction.float(), target.to(device))
    loss.backward()
    parts = [p.grad.flatten() for _, p in sorted(adapter.parameters().items()) if p.grad is not None]
    return float(loss.detach()), torch.cat(parts).cpu().double()


def trial(
    cache: LatentCache, base: Base, config: TrainConfig, device: torch.device, dtype: torch.dtype, plan: MemoryPlan
) -> Trial:
    """Take a few steps under the plan, and return their time and memory beside the prediction."""
    try:
        predicted = predicted_memory(TrainingInputs(cache, base, config, device, dtype), plan)
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        run = Run(TrainingInputs.on(device, cache, base, config), plan=plan)
        run.train_step()
        peak = peak_memory(run.train_step, device) if device.type == "cuda" else None
        times = [seconds(run.train_step, device)[0] for _ in range(3)]
        return Trial(str(plan), "", median(times), predicted, None if peak is None else peak - before)
    except Exception as error:  # The report shows whatever a driver raises.
        name = "out of memory" if is_out_of_memory(error) else type(error).__name__
    release_memory()
    return Trial(str(plan), name, None, None, None)
