"""LoHa (arXiv:2108.06098): the change is the element-wise product of two low-rank matrices. The layers are peft's."""

from functools import partial

from ...config import TrainConfig
from ...lora.file import LoraFile
from ...models.spec import FamilySpec, Networks
from .lycoris import LycorisAdapter
from .method import PEFT_NAME, Adapter, Method, peft_layers, target_modules

ROLES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def attach(networks: Networks, family: FamilySpec, config: TrainConfig, continue_from: LoraFile | None) -> Adapter:
    from peft import LoHaConfig

    targets = target_modules(family, config, networks, METHOD.joins_modules)
    layers = peft_layers(networks, targets, config, partial(LoHaConfig, use_effective_conv2d=False))
    adapter = LycorisAdapter(
        networks,
        "loha",
        layers,
        roles_of=lambda layer: {role: getattr(layer, role)[PEFT_NAME] for role in ROLES},
        alphas={module: alpha for module, (_, alpha) in targets.items()},
        network_arguments={"algo": "loha"},
    )
    # Start as in LyCORIS: one factor is 0, and the others are large enough for the first step to have an effect.
    deviations = {"hada_w1_a": 0.1, "hada_w1_b": 1.0, "hada_w2_a": 0.0, "hada_w2_b": 1.0}
    adapter.start(family.name, config, deviations, continue_from)
    return adapter


METHOD = Method(
    "LoHa, the product of two LoRAs element by element (arXiv:2108.06098)",
    attach,
    rate_factor=0.15,
    joins_modules=False,
    package="peft",
)
