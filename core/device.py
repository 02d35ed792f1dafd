"""Where is computed, and in which precision."""

import torch

from .config import TrainConfig

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_and_dtype(config: TrainConfig, device: torch.device | None = None) -> tuple[torch.device, torch.dtype]:
    """Where to train and in which precision: CUDA (or another accelerator) and bf16 where there is one, else CPU and fp32."""
    if device is None:
        device = torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    if config.precision != "auto":
        return device, PRECISIONS[config.precision]
    if device.type == "cuda":
        # Older cards only emulate bf16, and torch.cuda.is_bf16_supported() says yes to that.
        capable = torch.cuda.get_device_capability(device) >= (8, 0)
        return device, torch.bfloat16 if capable else torch.float16
    return device, torch.float32
