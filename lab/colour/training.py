"""A training run that can be stopped at any step and goes on exactly from its file, and what its pictures are jittered by."""

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Training:
    """Weights, their running averages, Adam's state, the random numbers and the step: all that a run goes on from."""

    def __init__(self, file: Path, modules: dict[str, nn.Module], rate: float, decay: float):
        self.file, self.rate, self.decay = file, rate, decay
        self.weights: dict[str, Tensor] = {
            f"{part}.{name}": value
            for part, module in modules.items()
            for name, value in module.named_parameters()
            if value.requires_grad
        }
        self.average = {name: value.detach().clone() for name, value in self.weights.items()}
        self.optimizer = torch.optim.AdamW(self.weights.values(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.random = torch.Generator().manual_seed(1)
        self.step, self.seconds = 0, 0.0
        if file.exists():
            saved = torch.load(file, weights_only=True)
            with torch.no_grad():
                for name, value in self.weights.items():
                    value.copy_(saved["weights"][name])
            self.average, self.step, self.seconds = saved["average"], saved["step"], saved["seconds"]
            self.optimizer.load_state_dict(saved["optimizer"])
            self.random.set_state(saved["random"])
        for group in self.optimizer.param_groups:
            group["fused"] = True  # a seventh of a step's time; a state saved without it also goes on with it

    def save(self) -> None:
        """Replace the file at once, so that a kill leaves the old or the new one."""
        state = {
            "weights": {name: value.detach() for name, value in self.weights.items()}, "average": self.average,
            "optimizer": self.optimizer.state_dict(), "random": self.random.get_state(), "step": self.step,
            "seconds": self.seconds,
        }  # fmt: skip
        self.file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.file.with_suffix(".new"))
        os.replace(self.file.with_suffix(".new"), self.file)

    def run(
        self, loss: Callable[[], Tensor], minutes: float, steps: int, every: float, report: Callable[[], None]
    ) -> None:
        """Train to `steps`, or to so many minutes of a processor in all; report and save every so many, and at the end.

        The rate rises for 200 steps, stays, and falls over the last quarter of `steps`. A signal also ends it.
        """
        stopped: list[int] = []
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, lambda number, _: stopped.append(number))
        first, before, last, running = self.step, self.seconds - time.process_time(), self.seconds, 0.0
        while self.step < steps and not stopped and self.seconds < 60 * minutes:
            rate = self.rate * min(1.0, (self.step + 1) / 200, max(0.02, 4 * (1 - self.step / steps)))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            value = loss()
            self.optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(self.weights.values(), 1.0)
            self.optimizer.step()
            decay = min(self.decay, (self.step + 1) / (self.step + 10))
            torch._foreach_lerp_(
                list(self.average.values()), [value.detach() for value in self.weights.values()], 1 - decay
            )
            self.step += 1
            self.seconds = before + time.process_time()
            running = value.item() if not running else 0.98 * running + 0.02 * value.item()
            if self.step % 50 == 0:
                print(f"{self.step} loss {running:.4f} rate {rate:.1e} {self.seconds / 60:.1f} min", flush=True)
            if self.seconds - last > 60 * every:
                self.save()
                report()
                last = self.seconds
        if self.step > first:
            self.save()
            report()


def load_average(file: Path, modules: dict[str, nn.Module]) -> int:
    """Set the modules to the running averages of a run, and return its step."""
    saved = torch.load(file, weights_only=True)
    with torch.no_grad():
        for part, module in modules.items():
            for name, value in module.named_parameters():
                if f"{part}.{name}" in saved["average"]:
                    value.copy_(saved["average"][f"{part}.{name}"])
    return saved["step"]


def jitter(crops: Tensor, size: tuple[int, int], random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pixels in [-1, 1] of `size` (width, height) from uint8 crops (B, H, W, 3), and which were mirrored (B,)."""
    count = len(crops)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=random)

    mirrored, zoom = uniform(0, 1) < 0.5, uniform(0.86, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = torch.where(mirrored, -zoom, zoom)
    theta[:, 1, 1] = zoom
    theta[:, 0, 2], theta[:, 1, 2] = ((1 - zoom) * uniform(-1, 1) for _ in range(2))
    grid = F.affine_grid(theta, [count, 3, 2 * size[1], 2 * size[0]], align_corners=False)
    # Sampled at twice the size and averaged down, since a plain bilinear sample would alias.
    pixels = F.grid_sample(crops.permute(0, 3, 1, 2).float() / 127.5 - 1, grid, "bilinear", "reflection", False)
    light = uniform(0.9, 1.1, 1, 1, 1) * uniform(0.97, 1.03, 3, 1, 1)
    return ((F.avg_pool2d(pixels, 2) + 1) * light - 1).clamp(-1, 1), mirrored


def plain(crops: Tensor, size: tuple[int, int]) -> Tensor:
    """Pixels in [-1, 1] of `size` from uint8 crops, as they are."""
    pixels = crops.permute(0, 3, 1, 2).float() / 127.5 - 1
    return F.interpolate(pixels, (size[1], size[0]), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def draw_rows(rows: Sequence[int], weights: Tensor, count: int, random: torch.Generator) -> list[int]:
    """Row numbers drawn with replacement, each as often as its weight."""
    return [rows[i] for i in torch.multinomial(weights, count, replacement=True, generator=random).tolist()]
