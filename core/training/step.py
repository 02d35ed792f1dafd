"""The step of a training run: forward, loss, backward and update, the same for every family and method.

    x_t   = add_noise(x_0, noise, t)                         a picture's latents with noise of a drawn timestep
    loss  = mean(weight(t) * |model(x_t, t, text) - target|²)   target: the noise, or noise - x_0 (arXiv:2403.03206)
          + prior_loss_weight * mean(weight(t) * |model(x_t, t, class text) - frozen model(x_t, t, class text)|²)
                                                                                                 on some passes
    A, B  = optimizer(A, B, gradient of loss)                with model(x) = W x + scale * B A x in each layer

What is around it has modules of its own: `Examples` draws what a pass sees, `AdaptedModel` holds the networks and their memory,
and the loop saves the state and measures likeness between steps.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..errors import TrainingDiverged
from ..models.memory_plan import MemoryPlan
from ..models.objective import sample_losses
from .adapted_model import AdaptedModel, CheckCancelled
from .examples import Examples, Pass
from .inputs import TrainingInputs
from .methods import peak_rate
from .optimizer import build_optimizer, learning_rate_factor

SMOOTHING = 0.98
"""The decay of the running mean of the loss."""


class Run:
    """A training run between two steps: the trained parameters, the optimizer, and the loss so far."""

    def __init__(
        self, inputs: TrainingInputs, plan: MemoryPlan | None = None, check_cancelled: CheckCancelled | None = None
    ):
        device = inputs.device
        self.config: TrainConfig = inputs.config
        self.model: AdaptedModel = AdaptedModel(inputs, plan, check_cancelled)
        self.examples: Examples = Examples(inputs, self.model)
        self.parameters: dict[str, nn.Parameter] = self.model.adapter.parameters()
        self.average: dict[str, Tensor] | None = None
        """The running average of the parameters, if the settings ask for it."""
        if self.config.ema_decay:
            self.average = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.optimizer: torch.optim.Optimizer = build_optimizer(self.model.adapter, self.config)
        self.scaler: torch.amp.GradScaler = torch.amp.GradScaler(device.type, enabled=inputs.dtype == torch.float16)
        self.step: int = 0
        """The number of completed steps."""
        self.quantised_after: int | None = None
        """The number of completed steps when the frozen weights were quantised to 8 bits. None if they never were."""
        self.loss: Tensor = torch.zeros((), device=device)
        self.first_bad_step: Tensor = torch.full((), -1, device=device)

    def train_step(self) -> None:
        """Perform one optimizer step, without waiting for the device."""
        self.update(self.accumulate())

    def accumulate(self) -> Tensor:
        """Return the next step's loss, a scalar, and accumulate its gradients. An interruption leaves the run between steps."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros_like(self.loss)
        first = self.step * self.config.accumulation
        with self.model.fast():
            for number in range(first, first + self.config.accumulation):
                for inputs in self.examples.passes(number):
                    loss = self.loss_of(inputs) / self.config.accumulation
                    self.scaler.scale(loss).backward()
                    self.model.adapter.take_gradients()
                    total += loss.detach()
        return total

    def loss_of(self, inputs: Pass) -> Tensor:
        """Return the weighted loss of a pass, a scalar."""
        schedule, model, config = self.examples.schedule, self.model, self.config
        frozen = None
        if inputs.kind == "prior":
            # Learning without forgetting (arXiv:1606.09282), which ai-toolkit calls differential output preservation. Both
            # models see the same noisy training pictures, so no class images are needed. A training adapter is part of both.
            with torch.no_grad(), model.adapter.disabled():
                conditioning = inputs.frozen_conditioning or inputs.conditioning
                frozen = model.predict(inputs.noisy_latents, inputs.timesteps, conditioning)
        prediction = model.predict(inputs.noisy_latents, inputs.timesteps, inputs.conditioning)
        # The target comes last: during the forward pass it would only take memory.
        target = schedule.target(inputs.latents, inputs.noise, inputs.timesteps) if frozen is None else frozen
        losses = sample_losses(prediction, target, inputs.masks, config)
        losses = losses * schedule.loss_weights(inputs.timesteps, config)
        weight = 1.0 if inputs.kind == "pictures" else config.prior_loss_weight
        return inputs.share * weight * losses.mean()

    def update(self, loss: Tensor) -> None:
        """Update the adapter with the accumulated gradients of that loss, and count the step."""
        config = self.config
        rate = learning_rate_factor(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        if config.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.parameters.values(), config.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.adapter.constrain()
        if self.average is not None:
            # The decay rises from 0.1, so that the average soon forgets the untrained adapter.
            decay = min(config.ema_decay, (1 + self.step) / (10 + self.step))
            values = [parameter.detach() for parameter in self.parameters.values()]
            torch._foreach_lerp_(list(self.average.values()), values, 1 - decay)
        bad = ~torch.isfinite(loss) & (self.first_bad_step < 0)
        self.first_bad_step = torch.where(bad, self.step, self.first_bad_step)
        # The running mean starts at the first loss and not at 0.
        self.loss = loss if self.step == 0 else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        if self.quantised_after is None and self.model.memory.plan.weights != "full":
            self.quantised_after = self.step
        self.step += 1

    def trained(self) -> Mapping[str, Tensor]:
        """Return the values to save: the running average if there is one, else the parameters."""
        return self.parameters if self.average is None else self.average

    def check_finite(self) -> None:
        """Raise TrainingDiverged if the loss of any step so far, or the current adapter, isn't finite. Waits for the device."""
        step = int(self.first_bad_step)
        if step < 0:
            values = [parameter.detach() for parameter in self.parameters.values()]
            if torch.stack(torch._foreach_norm(values)).isfinite().all():
                return
            step = self.step - 1
        advice = "Lower the learning rate"
        if int(self.first_bad_step) == 0:
            advice = "Nothing was trained yet, so the base model's file may be damaged: download it again"
        advice += ", or use precision bf16" if self.model.dtype == torch.float16 else ""
        raise TrainingDiverged(
            f"the training became NaN or infinite in step {step + 1} on {', '.join(self.examples.names(step))} at learning "
            f"rate {peak_rate(self.config) * learning_rate_factor(step, self.config):g}. {advice}"
        )
