"""Count the operations of single passes through published models, and write them to core/studio/passes.json.

`python -m lab.count_passes` counts on the models' shapes, with tensors without values: a few minutes. `--model NAME`, once or
more, counts these alone and keeps the rows of the others.
"""

import argparse
import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from core.config import TrainConfig
from core.demo import BASE_FILE
from core.models.base import Base
from core.models.families import FAMILIES
from core.models.memory_plan import blocks_of
from core.models.opening import load_base
from core.models.spec import Component, Conditioning
from core.models.text import blank_caption
from core.photos.dataset import Size
from core.pictures.sampling import guided_prediction
from core.studio.passes import FILE, Row
from core.training.memory_prediction import FakeMode
from lab.flops import count_flops
from tests.published_models import MODELS, cache_of, with_vae

PARTS = ("denoiser", "vae")
CPU = torch.device("cpu")
DEMO, CHROMA = "the demo's", "Chroma"
NAMES = (*MODELS, CHROMA, DEMO)
TOKENS = {CHROMA: 512}


def base_of(name: str) -> Base:
    if name == DEMO:
        return load_base(BASE_FILE)
    if name != CHROMA:
        return with_vae(name)
    family, config = FAMILIES["chroma"], {"in_channels": 64, "joint_attention_dim": 4096}
    tensors = family.build_empty("denoiser", config).state_dict()
    like = with_vae("FLUX.1-dev")
    return replace(like, family=family, components={**like.components, "denoiser": Component(config, tensors)})


def count(name: str) -> Row:
    """Return the row of a model."""
    base = base_of(name)
    sides = [base.resolution * quarters // (4 * base.size_multiple) * base.size_multiple for quarters in (2, 3, 4)]
    sizes = [(side, side) for side in sides]
    if name in MODELS:
        (text,) = cache_of(MODELS[name], base).text.values()
    else:
        text = blank_caption(
            base.family, base.components["denoiser"].config, TOKENS.get(name, base.family.usual_tokens)
        )
    with FakeMode(allow_non_fake_inputs=True):
        faked = without_values(base)
        found = [count_prediction(faked, size, text) | count_vae(faked, size) for size in sizes]
        weights = {part: sum(map(torch.numel, one.tensors.values())) for part, one in faked.components.items()}
    factors = {work: polynomial(sizes, [one[work] for one in found]) for work in found[0]}
    return {
        "family": base.family.name,
        "model": name,
        "tokens": text["context"].shape[1],
        "weights": weights,
        "factors": factors,
    }


def without_values(base: Base) -> Base:
    """Return the base model with empty tensors as weights: called with fake tensors, they use no memory."""
    components = {}
    for part in (part for part in PARTS if part in base.components):
        config = base.components[part].config
        shapes = base.family.build_empty(part, config).state_dict()
        components[part] = Component(config, {name: torch.empty(tensor.shape) for name, tensor in shapes.items()})
    return replace(base, components=components)


def count_prediction(base: Base, size: Size, text: Conditioning) -> dict[str, float]:
    """Return the operations of a prediction, and those that training adds.

    They are those of its gradients, of all blocks when they are recomputed, of the layers that a LoRA adapts, and of a LoRA per
    rank.
    """
    denoiser, shape = base.load("denoiser", CPU, torch.float32), base.latent_shape
    target = base.family.denoiser_targets[TrainConfig().targets]
    layers, before, lora, adapted, kept = 0.0, 0.0, 0.0, 0.0, 0.0
    last = math.nan
    """The operations of the current block's last layer, if nothing computes it again; NaN outside blocks."""

    def add(path: str, layer: Any, _: Any, output: Tensor) -> None:
        nonlocal layers, before, lora, adapted, kept, last
        outputs, inputs = len(layer.weight), layer.weight[0].numel()
        operations = 2 * inputs * output.numel()
        if re.fullmatch(target, path):
            before = before if adapted else layers  # What comes before the first adapted layer has no gradients.
            adapted += operations
            lora += 3 * 2 * (outputs + inputs) * output.numel() / outputs
        layers += operations
        if math.isnan(last):
            kept += operations
        else:  # A LoRA's own products come after those of its layer, and need what comes before them.
            last = 0.0 if re.fullmatch(target, path) else operations

    def enter(*_: Any) -> None:
        nonlocal last
        last = 0.0

    def leave(*_: Any) -> None:
        nonlocal kept, last
        # Blocks before the first adapted layer have no gradients, so nothing in them is computed again.
        kept, last = kept + last if adapted else layers, math.nan

    for block in blocks_of(denoiser):
        block.register_forward_pre_hook(enter)
        block.register_forward_hook(leave)
    for path, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(partial(add, path))
    predict = guided_prediction(
        base, denoiser, [text], [text], device=CPU, dtype=torch.float32, size=size, guidance=1.0
    )
    latents = torch.zeros(1, shape.channels, size[1] // shape.pixels, size[0] // shape.pixels)
    time = torch.zeros(())
    with torch.no_grad():
        total = count_flops(lambda: predict(latents, time, time))
    # Attention has two products, and its gradients have five.
    gradients = layers - before + 2.5 * (total - layers)
    return {"predict": total, "gradients": gradients, "recompute": total - kept, "adapted": adapted, "lora": lora}


def count_vae(base: Base, size: Size) -> dict[str, float]:
    """Return the operations of the VAE's encoder and decoder; none if the base model has no VAE."""
    if "vae" not in base.components:
        return {}
    network, shape = base.load("vae", CPU, torch.float32), base.latent_shape
    pixels = torch.zeros(1, 3, size[1], size[0])
    latents = torch.zeros(1, shape.channels, size[1] // shape.pixels, size[0] // shape.pixels)
    with torch.no_grad():
        encode = count_flops(lambda: base.family.encode_image(network, pixels))
        return {"encode": encode, "decode": count_flops(lambda: base.family.decode_latents(network, latents))}


def polynomial(sizes: Sequence[Size], operations: Sequence[float]) -> list[float]:
    """Return the factors of 1, the pixels, and their square: layers grow with the pixels, and attention with their square."""
    pixels = [math.prod(size) for size in sizes]
    factors = np.polyfit(pixels, operations, 2)[::-1]
    # What isn't there is left of rounding.
    shares = [factor * pixels[-1] ** power / max(1, operations[-1]) for power, factor in enumerate(factors)]
    return [float(f"{one:.5g}") if abs(share) > 1e-6 else 0.0 for one, share in zip(factors, shares, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=NAMES, help="a model to count; default all")
    options = parser.parse_args()
    known = {row["model"]: row for row in json.loads(FILE.read_text("utf-8"))} if FILE.exists() else {}
    for name in options.model or NAMES:
        known[name] = count(name)
        print(name)
    lines = ",\n".join(json.dumps(known[name]) for name in NAMES if name in known)
    FILE.write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    main()
