"""What the measurements of a GPU share: the device, the base models, and other processes."""

import functools
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import torch

from core.config import TrainConfig
from core.device import precision_name
from core.models.base import Base, CaptionEncoder
from core.photos import bucket_sizes
from core.training.inputs import TrainingInputs
from lab.gpu.agreement import SMALL_CHANNELS
from lab.timing import synchronize
from tests.random_models import REAL_CHANNELS, SHAPES, random_base, random_cache, random_component
from tests.small_flows import FLOW, SMALL_FLOWS, WIDE_FLOW, random_flow

T = TypeVar("T")
Measurements = Iterator[tuple[str, Callable[[], Mapping[str, Any]]]]
"""Names of measurements, each with the function that makes it."""
Send = Callable[[Mapping[str, Any]], None]
CPU = torch.device("cpu")
SMALL_UNET, SDXL = SHAPES
PIXELS, RANK = 768, 32
"""The unit of a job: what the recipe `balanced` trains SDXL with."""
VAE = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4, "layers_per_block": 2,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "latent_channels": 4, "scaling_factor": 0.13025,
}  # fmt: skip
"""SDXL's VAE in its published size."""
MOST_SIZES = 11
"""The number of sizes that fifteen photos are trained at."""


@dataclass
class Session:
    """The GPU to measure, and the folder for the results."""

    device: torch.device
    dtype: torch.dtype
    folder: Path
    small: bool = False
    """Whether models are small and cases few, for tests."""

    @property
    def times(self) -> int:
        """How often short work is timed."""
        return 1 if self.small else 8

    def some(self, cases: Sequence[T]) -> Sequence[T]:
        """Return all cases, or only the first if `small`."""
        return cases[:1] if self.small else cases

    def config(self, **changes: Any) -> TrainConfig:
        """Return the settings of SDXL's recipe, with a pass of prior prediction in each step, and these `changes`."""
        unit = {"resolution": 128 if self.small else PIXELS, "rank": RANK, "prior_prediction": 1.0}
        return TrainConfig(**({**unit, "precision": precision_name(self.dtype)} | changes))

    def inputs(self, base: Base, config: TrainConfig, sizes: Sequence[tuple[int, int]] = ()) -> TrainingInputs:
        """Return random inputs of a training run on the GPU, with a picture of each size, by default the square."""
        return TrainingInputs(random_cache(base, config, sizes), base, config, self.device, self.dtype)

    @functools.cached_property
    def sdxl(self) -> Base:
        """SDXL in its published size with random weights on the CPU: the denoiser and the VAE."""
        family, channels = (SMALL_UNET, SMALL_CHANNELS) if self.small else (SDXL, REAL_CHANNELS)
        base = random_base(family, channels, self.device, self.dtype)
        vae = {**VAE, "block_out_channels": (32,) * 4} if self.small else VAE
        components = {**base.components, "vae": random_component(base.family, "vae", vae, self.device, self.dtype)}
        text = next(iter(random_cache(base, TrainConfig(resolution=64)).text.values()))
        encoder = CaptionEncoder(lambda _: text, "random")
        return replace(_at_home(replace(base, components=components)), caption_encoder=encoder)

    @functools.cached_property
    def flux(self) -> Base:
        """A transformer of FLUX.1's width with a quarter of its blocks, with random weights on the CPU."""
        return _at_home(random_flow(FLOW, SMALL_FLOWS[FLOW] if self.small else WIDE_FLOW, self.device, self.dtype))

    def photo_sizes(self, base: Base) -> list[tuple[int, int]]:
        """Return the sizes that fifteen photos are trained at: some photos are smaller than the resolution."""
        side, step = self.config().resolution or base.resolution, base.size_multiple
        sizes = [size for smaller in range(4) for size in bucket_sizes(side - smaller * step, step)]
        return list(dict.fromkeys(sizes))[: 3 if self.small else MOST_SIZES]


def _at_home(base: Base) -> Base:
    """Move the weights to the CPU. The GPU draws random ones much faster."""
    return replace(
        base,
        components={
            part: replace(component, tensors={name: tensor.cpu() for name, tensor in component.tensors.items()})
            for part, component in base.components.items()
        },
    )


def elsewhere(work: Callable[..., None], *args: Any) -> Iterator[Mapping[str, Any]]:
    """Call `work(send, *args)` in a new process, and yield what it sends. Raises RuntimeError if the process ends early."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_sending, args=(there, work, *args), daemon=True)
    process.start()
    there.close()
    try:
        while (sent := here.recv()) is not None:
            yield sent
        process.join()
    except EOFError:
        process.join()
        raise RuntimeError(f"the other process ended with exit status {process.exitcode}") from None
    finally:
        process.kill()


def _sending(there: Connection, work: Callable[..., None], *args: Any) -> None:
    try:
        work(there.send, *args)
    except Exception as error:
        with suppress(OSError):  # The first process may have been killed.
            there.send({"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"})
    with suppress(OSError):
        there.send(None)


def profiled(work: Callable[[], object], device: torch.device) -> list[tuple[str, float, int]]:
    """Return the kernels that `work` starts on a GPU, on a CPU the operations: names, seconds and calls, the longest first."""
    from torch.profiler import ProfilerActivity, profile, supported_activities

    has_kernels = device.type == "cuda" and ProfilerActivity.CUDA in supported_activities()
    with profile(activities=[ProfilerActivity.CUDA if has_kernels else ProfilerActivity.CPU]) as trace:
        work()
        synchronize(device)
    found = []
    for event in trace.key_averages():
        taken = event.self_device_time_total if has_kernels else event.self_cpu_time_total
        found.append((event.key, taken / 1e6, event.count))
    return sorted(found, key=lambda kernel: kernel[1], reverse=True)
