"""DoRA (arXiv:2402.09353): a LoRA for the direction of each column of a weight, and a trained magnitude of the column.

`W' = m * (W + s B A) / |W + s B A|`, with the norm of each column (input feature), as in the paper. peft instead has a
magnitude for each row, which ComfyUI reads as a different change. Here `dora_scale` in the file is (1, in), which all readers
interpret the same way.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...config import TrainConfig
from ...errors import LoraMisfit
from ...lora.file import LoraFile
from ...lora.modules import LoraModule, name_kinds, scheme_of_kinds
from ...models.base import Base
from ...models.spec import FamilySpec, Networks
from ...tensor_names import NAME_TABLES, ModuleId
from .lora import LoraAdapter, attach_layers
from .lora_layer import LoraLayer
from .method import Method, switched_off, target_modules


class MagnitudeLayer(nn.Module):
    """A LoRA layer with a trained magnitude of each column. It scales the inputs, which is the same as scaling the columns."""

    def __init__(self, lora_layer: LoraLayer):
        super().__init__()
        self.lora_layer = lora_layer
        self.magnitude: nn.Parameter = nn.Parameter(column_norms(lora_layer.weight.detach()))
        self.enabled = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.lora_layer(x)
        # Read in every pass, since a memory plan may quantise the weight to 8 bits or move it to another device.
        weight, down, up = self.lora_layer.weight, self.lora_layer.down, self.lora_layer.up
        with torch.no_grad():  # the norm gets no gradient (section 4.3 of the paper)
            change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            norms = column_norms(weight + self.lora_layer.scale * change)
        factors = (self.magnitude / norms).to(x.dtype)
        return self.lora_layer(x * (factors[:, None, None] if weight.ndim == 4 else factors))


def column_norms(weight: Tensor) -> Tensor:
    """Return the norm of each column of a weight (out, in, ...), i.e. over all dimensions but its inputs: (in,) float32."""
    others = [dimension for dimension in range(weight.ndim) if dimension != 1]
    if weight.device.type == "cpu":  # whose norms of columns take four times as long, and are less exact
        norms = weight.float().square().sum(others).sqrt()
    else:
        norms = torch.linalg.vector_norm(weight, dim=others, dtype=torch.float32)
    return norms.clamp_min(torch.finfo(torch.float32).eps)


@dataclass(frozen=True, eq=False)
class DoraAdapter(LoraAdapter):
    """A LoRA adapter with a magnitude layer around each of its layers."""

    magnitudes: Mapping[ModuleId, MagnitudeLayer] = field(kw_only=True)

    def parameters(self) -> dict[str, nn.Parameter]:
        magnitudes = {f"{part}.{path}.dora": layer.magnitude for (part, path), layer in self.magnitudes.items()}
        return super().parameters() | magnitudes

    def export(self, values: Mapping[str, Tensor], base: Base, metadata: Mapping[str, str]) -> LoraFile:
        tensors = {}
        for (part, path), module in self.modules(values).items():
            magnitude = values[f"{part}.{path}.dora"].detach().float().cpu()
            tensors[part, path] = {
                "down": module.down,
                "up": module.up,
                "alpha": torch.tensor(module.alpha),
                "dora": magnitude.reshape(1, -1, *[1] * (module.down.ndim - 2)).clone(),
            }
        described = {
            "ss_network_module": "lycoris.kohya",
            "ss_network_args": json.dumps({"algo": "lora", "dora_wd": True, "wd_on_out": False}),
        }
        return LoraFile(base.family.name, {**metadata, **described}, name_kinds(base.names, tensors))

    def disabled(self) -> AbstractContextManager[None]:
        return switched_off([*self.layers.values(), *self.magnitudes.values()])

    @torch.no_grad()
    def load_file(self, file: LoraFile) -> None:
        """Start from a file. Raises LoraMisfit unless it is a DoRA of the same modules and ranks with column magnitudes."""
        modules = {}
        for entry in file.entries:
            tensors = file.tensors_of(entry)
            layer = self.magnitudes.get(entry.modules[0])
            if entry.kind != "dora" or layer is None or tensors["dora"].shape[:2] != (1, len(layer.magnitude)):
                raise LoraMisfit(
                    f"{file.name}: {entry.name} (kind {entry.kind}) is not a DoRA with a length for each column of a module "
                    "that these settings train. Choose the same method and targets"
                )
            layer.magnitude.copy_(tensors["dora"].flatten())
            alpha = tensors["alpha"].item() if "alpha" in tensors else float(len(tensors["down"]))
            modules[entry.modules[0]] = LoraModule(tensors["down"], tensors["up"], alpha)
        self.load(modules)


def attach(networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None) -> DoraAdapter:
    """Attach a DoraAdapter to the networks, which are changed in place.

    A new one doesn't change any prediction: B is 0, and the magnitudes are the norms of the frozen columns.
    """
    targets = target_modules(family, config, networks, METHOD.joins_modules)
    lora = attach_layers(networks, family, config, targets, scheme_of_kinds(NAME_TABLES[family.name], targets))
    magnitudes = {module: MagnitudeLayer(layer) for module, layer in lora.layers.items()}
    for (part, path), layer in magnitudes.items():
        networks[part].set_submodule(path, layer)
    dora = DoraAdapter(networks, lora.layers, lora.shared, magnitudes=magnitudes)
    if continue_from is not None:
        dora.load_file(continue_from)
    return dora


METHOD = Method("DoRA, a LoRA with a trained length of each column (arXiv:2402.09353)", attach, joins_modules=False)
