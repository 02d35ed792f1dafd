"""OFT (arXiv:2306.07280): blocks of a weight's output rows are rotated, which keeps the angles within a block.

The layers are not peft's, because those rotate the inputs, which readers of LoRA files don't support.
"""

import torch
from torch import Tensor, nn

from ...config import TrainConfig
from ...errors import BadConfig
from ...lora.file import LoraFile
from ...lora.kinds import UNBOUND
from ...models.spec import FamilySpec, Networks
from .lycoris import LycorisAdapter
from .method import Adapter, Method, target_modules


class RotatedLayer(nn.Module):
    """A frozen Linear or convolution with rotated outputs: W' = R^T W, R = (I + Q)(I - Q)^-1, Q = B - B^T, in each block."""

    def __init__(self, base_layer: nn.Module, size: int):
        super().__init__()
        self.base_layer = base_layer
        weight: Tensor = base_layer.weight  # pyright: ignore
        self.oft_blocks: nn.Parameter = nn.Parameter(weight.new_zeros(weight.shape[0] // size, size, size))
        self._enabled = True

    def enable_adapters(self, enabled: bool) -> None:
        self._enabled = enabled

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.base_layer(x)
        if not self._enabled:
            return outputs
        channels = 1 if outputs.ndim == 4 else outputs.ndim - 1
        bias: Tensor | None = self.base_layer.bias  # pyright: ignore
        outputs = outputs.movedim(channels, -1)
        if bias is not None:
            outputs = outputs - bias
        blocks = outputs.unflatten(-1, self.oft_blocks.shape[:2])
        outputs = torch.einsum("knm,...kn->...km", self.rotations().to(outputs.dtype), blocks).flatten(-2)
        if bias is not None:
            outputs = outputs + bias
        return outputs.movedim(-1, channels)

    def rotations(self) -> Tensor:
        """Compute the rotation R of each block by the Cayley transform, (blocks, size, size)."""
        skew = self.oft_blocks - self.oft_blocks.transpose(1, 2)
        identity = torch.eye(skew.shape[-1], device=skew.device)
        # Errors are not checked, because the host would wait for that. The matrix cannot be singular.
        return torch.linalg.solve_ex(identity - skew, identity + skew, left=False).result


def attach(networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None) -> Adapter:
    targets = target_modules(family, config, networks, METHOD.joins_modules)
    layers = {}
    for (part, path), (rank, _) in targets.items():
        layer = networks[part].get_submodule(path)
        rows: int = layer.weight.shape[0]  # pyright: ignore
        size = next(size for size in range(min(rank, rows), 0, -1) if rows % size == 0)
        if size == 1:
            raise BadConfig(f"rank = {rank}: {path} has {rows} rows, which blocks of 2 to {rank} don't divide evenly")
        layers[part, path] = RotatedLayer(layer, size)
        networks[part].set_submodule(path, layers[part, path])
    # In this kind, alpha is a bound on the rotation and not a scale.
    adapter = LycorisAdapter(
        networks, "oft", layers, dict.fromkeys(layers, UNBOUND), {"algo": "diag-oft"},
        roles_of=lambda layer: {"oft_blocks": layer.oft_blocks},  # pyright: ignore
    )  # fmt: skip
    adapter.start(family.name, config, continue_from)
    return adapter


METHOD = Method("OFT, blocks of rows are rotated (arXiv:2306.07280)", attach, rate_factor=0.3, joins_modules=False)
