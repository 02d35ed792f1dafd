"""LoKr (arXiv:2309.14859): the change is a Kronecker product of a small matrix and a larger one, which may be low-rank.

The layers are peft's.
"""

from functools import partial

from torch import nn

from ...config import TrainConfig
from ...lora.file import LoraFile
from ...models.spec import FamilySpec, Networks
from .lycoris import KAIMING, LycorisAdapter, Roles
from .method import PEFT_NAME, Adapter, Method, peft_layers, target_modules

ROLES = ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
_WHOLE = "lokr_w2"


def attach(networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None) -> Adapter:
    from peft import LoKrConfig

    targets = target_modules(family, config, networks, METHOD.joins_modules)
    peft_config = partial(LoKrConfig, decompose_factor=config.lokr_factor, use_effective_conv2d=False)
    layers = peft_layers(networks, targets, config, peft_config)
    alphas = {module: alpha for module, (_, alpha) in targets.items()}
    for module, layer in layers.items():
        if _WHOLE in _roles_of(layer):
            # Neither factor has a rank to divide by, so LyCORIS and ComfyUI don't scale the product.
            layer.scaling[PEFT_NAME] = 1.0  # pyright: ignore
            alphas[module] = float(targets[module][0])
    arguments = {"algo": "lokr", "factor": config.lokr_factor}
    adapter = LycorisAdapter(networks, "lokr", layers, _roles_of, alphas, arguments)
    deviations = {"lokr_w1": KAIMING, "lokr_w2": 0.0, "lokr_w2_a": KAIMING, "lokr_w2_b": 0.0}
    adapter.start(family.name, config, deviations, continue_from)
    return adapter


def _roles_of(layer: nn.Module) -> Roles:
    return {role: getattr(layer, role)[PEFT_NAME] for role in ROLES if PEFT_NAME in getattr(layer, role)}


METHOD = Method(
    "LoKr, a Kronecker product (arXiv:2309.14859)", attach, rate_factor=3.0, joins_modules=False, package="peft"
)
