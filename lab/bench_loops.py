"""The training loops that the benchmark times on the same weights: ours, a plain diffusers and peft loop, and ComfyUI's.

They train a denoiser with random weights (tests/random_models.py).
"""

import contextlib
import json
import subprocess
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from core.config import TrainConfig
from core.device import device_and_dtype, precision_name
from core.errors import BadConfig
from core.models.base import Base
from core.models.spec import Conditioning, FamilySpec
from core.training.encode import LatentCache
from core.training.inputs import TrainingInputs
from core.training.methods import peak_rate
from core.training.step import Run
from tests.random_models import CAPTION

TRAINER = Path(__file__).with_name("comfyui_trainer.py")
"""The program that runs ComfyUI's own trainer."""


class Loop(Protocol):
    """A training loop that the benchmark can time."""

    def step(self) -> None:
        """Take a whole optimizer step."""

    def gradients(self) -> None:
        """Compute the forward and backward pass of a step."""

    def forward(self) -> None:
        """Compute the forward pass of a step up to its loss, with the adapter and without gradients."""


class OurLoop:
    """The loop of this project, as `train_lora` runs it."""

    def __init__(self, cache: LatentCache, base: Base, config: TrainConfig, device: torch.device):
        self.run: Run = Run(TrainingInputs.on(device, cache, base, config))
        if self.run.model.why_not_compiled:
            raise BadConfig(f"--compile: not possible here: {self.run.model.why_not_compiled}")
        self.generator: torch.Generator = torch.Generator(device).manual_seed(0)

    def step(self) -> None:
        self.run.train_step()

    def gradients(self) -> None:
        self.run.accumulate()

    @torch.no_grad()
    def forward(self) -> None:
        with self.run.model.fast():
            self.run.loss_of(
                self.run.examples.picture_pass(
                    self.run.examples.images, [CAPTION] * len(self.run.examples.images), self.generator
                )
            )


def of_diffusers(base: Base) -> Base:
    """Return the base model with diffusers' own denoiser: ours has faster parts."""
    network: Any = type(base.family.build_empty("denoiser", base.components["denoiser"].config))
    return replace(base, family=replace(base.family, build=lambda _, config: network.from_config(config)))


class PlainLoop:
    """A loop with the steps of diffusers' DreamBooth-LoRA script, using only diffusers and peft.

    For a fair comparison, its latents are encoded in advance, and it adapts the same layers with the same rank.
    """

    def __init__(self, cache: LatentCache, base: Base, config: TrainConfig, device: torch.device):
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from peft import LoraConfig

        self.device: torch.device
        self.dtype: torch.dtype
        self.device, self.dtype = device_and_dtype(config.precision, device)
        self.family: FamilySpec = base.family
        self.max_grad_norm: float = config.max_grad_norm
        self.denoiser: Any = of_diffusers(base).load("denoiser", self.device, self.dtype)
        self.denoiser.add_adapter(
            LoraConfig(
                r=config.rank,
                lora_alpha=config.rank,
                init_lora_weights="gaussian",
                target_modules=base.family.denoiser_targets[config.targets],
            )
        )
        self.denoiser.train()
        self.parameters: list[nn.Parameter] = [
            parameter for parameter in self.denoiser.parameters() if parameter.requires_grad
        ]
        for parameter in self.parameters:
            parameter.data = parameter.data.float()
        self.optimizer: torch.optim.AdamW = torch.optim.AdamW(
            self.parameters, lr=peak_rate(config), weight_decay=config.weight_decay
        )
        self.lr_scheduler: torch.optim.lr_scheduler.LambdaLR = get_scheduler("constant", self.optimizer)
        self.scaler: torch.amp.GradScaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.noise_scheduler: Any = DDPMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
        )
        self.latents: Tensor = torch.stack([image.mean for image in cache.images]).to(self.device)
        parts = [{**cache.text[image.caption], **image.conditioning} for image in cache.images]
        self.conditioning: Conditioning = {
            name: torch.cat([part[name] for part in parts]).to(self.device, self.dtype) for name in parts[0]
        }
        self.shown_loss: float = 0.0

    def batch(self) -> tuple[Tensor, Conditioning]:
        return self.latents, self.conditioning

    def loss(self) -> Tensor:
        latents, conditioning = self.batch()
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (len(latents),), device=self.device)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps).to(self.dtype)
        autocast = torch.autocast(self.device.type, self.dtype) if self.dtype != torch.float32 else None
        with autocast or contextlib.nullcontext():
            prediction = self.family.predict(self.denoiser, noisy_latents, timesteps, conditioning)
        return F.mse_loss(prediction.float(), noise.float())

    def gradients(self) -> None:
        self.optimizer.zero_grad()
        loss = self.loss()
        self.scaler.scale(loss).backward()
        self.last_loss: Tensor = loss.detach()

    def step(self) -> None:
        self.gradients()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lr_scheduler.step()
        self.shown_loss = self.last_loss.item()

    @torch.no_grad()
    def forward(self) -> None:
        self.loss()


class ComfyLoop:
    """ComfyUI's own trainer on the same weights and inputs, in a process that takes one step per request.

    It adapts all weights of the denoiser, whatever the targets. `step` raises BadConfig if the process ends. The
    weights of a base model that hasn't the published sizes have to be in the original names.
    """

    def __init__(
        self,
        cache: LatentCache,
        base: Base,
        config: TrainConfig,
        device: torch.device,
        comfyui: Path,
        python: Path,
    ):
        _, dtype = device_and_dtype(config.precision, device)
        # Windows cannot delete a file while a process has it mapped.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
            folder = Path(name)
            save_file(dict(base.components["denoiser"].tensors), folder / "weights.safetensors")
            text = cache.text[cache.images[0].caption]
            inputs = {"latents": torch.stack([image.mean for image in cache.images]), **text}
            save_file(inputs, folder / "inputs.safetensors")
            shape = base.components["denoiser"].config
            task = {
                "device": device.type, "precision": precision_name(dtype), "rank": config.rank,
                "learning_rate": peak_rate(config), "batch_size": config.batch_size, "seed": config.seed,
                "widths": {
                    "model_channels": shape["block_out_channels"][0], "context_dim": shape["cross_attention_dim"]
                } if "block_out_channels" in shape else {},
            }  # fmt: skip
            (folder / "task.json").write_text(json.dumps(task))
            self._process = subprocess.Popen(
                [python, TRAINER, comfyui.resolve(), folder],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            self._log: list[str] = []
            self._reader = threading.Thread(target=self._read_log, daemon=True)
            self._reader.start()
            self.first: dict[str, Any] = self.step()  # After a step it has read the files, so they can be deleted.

    def _read_log(self) -> None:
        assert self._process.stderr
        self._log.extend(self._process.stderr)

    def step(self) -> dict[str, Any]:
        """Take a whole optimizer step, and return its seconds, its processor seconds and the process's peak bytes."""
        return self._ask("")

    def save(self, path: Path) -> None:
        """Save the LoRA of all steps so far in the file, as the node Save LoRA Weights would."""
        self._ask(str(path.resolve()))

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(OSError):  # The pipe is broken if the process has ended.
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("STEP "):
                return json.loads(line[5:])
        status = self._process.wait()
        self._reader.join()  # The last line may not have been read yet.
        killed = " (killed: too little memory?)" if status == -9 else ""
        last = "".join(self._log[-1:]).strip()
        raise BadConfig(f"--comfyui: its trainer ended with exit status {status}{killed}; its last line: {last}")

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
