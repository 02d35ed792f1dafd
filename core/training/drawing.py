"""Pictures with the networks of a training run, drawn between two of its steps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

from PIL import Image
from torch import Tensor, nn

from ..device import until_it_fits
from ..errors import OutOfMemory
from ..lora.file import LoraFile
from ..models.memory_plan import MemoryPlan
from ..progress import OnWarning
from .methods import METHODS
from .step import Run
from .training_adapter import AttachedAdapter, layer_changes

Shot = tuple[str, int]
"""The prompt and the seed of a picture."""
DrawShots = Callable[[nn.Module, Mapping[str, nn.Module], Sequence[Shot]], list[Image.Image]]
"""A function of (denoiser, text encoders, shots) that draws an image of each shot with the current adapter."""


class Drawing:
    """Draws pictures with a run's networks. What they need in memory does not change how the run trains."""

    def __init__(self, run: Run):
        self._run = run
        self._offload: float = 0.0
        """The share of the blocks that were brought in for the last picture, the least that is tried for the next one."""

    def draw(
        self,
        draw_shots: DrawShots,
        shots: Sequence[Shot],
        on_warning: OnWarning,
        values: Mapping[str, Tensor] | None = None,
    ) -> list[Image.Image]:
        """Draw an image of each shot with the adapter as it would be saved now, or with other `values` in it.

        The training adapter is off, because the LoRA will be used without it, and the base model's speed LoRA is on. If memory
        runs out, more blocks are brought in until the images are drawn, which changes neither them nor the training, and
        `on_warning` is called.
        """
        run, model = self._run, self._run.model
        run.optimizer.zero_grad(set_to_none=True)  # The last step has used its gradients.
        plan, adapter = model.memory.plan, model.training_adapter
        self._offload = max(plan.offload, self._offload)
        with (
            model.holding(run.trained() if values is None else values),
            model.adapter.cast_once(model.dtype),
            adapter.off() if adapter else nullcontext(),
        ):
            try:
                if self._offload > plan.offload:
                    model.adopt(replace(plan, offload=self._offload))
                return until_it_fits(partial(self._drawn, draw_shots, shots), self._bringing_in(plan, on_warning))
            finally:
                if model.memory.plan != plan:
                    model.adopt(plan)

    def _drawn(self, draw_shots: DrawShots, shots: Sequence[Shot]) -> list[Image.Image]:
        model, file = self._run.model, self._run.model.base.speed_lora
        if file is None:
            return draw_shots(model.denoiser, model.encoders, shots)
        # Read again each time, so that it takes no memory in the steps.
        changes = layer_changes(LoraFile.read(file.path).of_parts({"denoiser"}), model.base)
        speed = AttachedAdapter(changes, model.denoiser, model.device, model.dtype, "speed LoRA")
        try:
            return draw_shots(model.denoiser, model.encoders, shots)
        finally:
            speed.detach()

    def _bringing_in(self, plan: MemoryPlan, on_warning: OnWarning) -> Iterator[Callable[[], None]]:
        """Yield the adoption of each plan that brings in more blocks. Then raise OutOfMemory."""
        for share in (0.5, 1.0) if METHODS[self._run.config.method].freezes_weights else ():
            if share > self._offload:
                self._offload, plan = share, replace(plan, offload=share)
                on_warning(f"out of memory: a sample does not fit. Drawing it with {plan}")
                yield partial(self._run.model.adopt, plan)
        raise OutOfMemory(
            f"a sample does not fit into the device's memory ({plan}). Use a lower resolution, or sample_every 0"
        )
