"""The tables of whole jobs in docs/benchmarks.md: `python -m lab.job_tables` counts them and writes them there.

A job is what `facelora headshots` does: a LoRA of a recipe on 15 photos, and 20 headshots, each with a face pass. Nothing is
computed: passes are counted on the published models' shapes, at the published shares of a card's rate (core/studio/speed.py).
It takes about 20 seconds a model and core, most of them to predict the memory of plans.
`--model NAME`, once or more, writes tables of these models alone; `--json` prints the seconds of each part instead, as
{model: {recipe: {card: {part: [least, most]}}}}.
"""

import argparse
import functools
import gc
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import torch
from PIL import Image

from core.config import TrainConfig
from core.models.base import Base
from core.models.memory_plan import MemoryPlan, first_that_fits
from core.models.recipe import RECIPES
from core.models.spec import Component
from core.photos import Photo
from core.pictures import find_style_packs
from core.studio import PARTS, Order, Span, Speed
from core.studio.ledger import Basis
from core.studio.passes import Passes
from core.training.adapted_model import memory_plans
from core.training.inputs import TrainingInputs
from core.training.memory_prediction import StepPrediction
from core.training.recipes import recipe_config
from lab.memory_tables import CARDS, DOCUMENT, GIB, TAKEN, Card, column
from tests.published_models import MODELS, cache_of, with_vae
from tools.tables import table, write_tables

PHOTOS, HEADSHOTS, PACK = 15, 20, "corporate"
DISTILLED = {
    "SD1.5": "SD1.5, with Hyper-SD's LoRA", "SDXL": "SDXL, with SDXL-Lightning's LoRA",
    "FLUX.1-dev": "FLUX.1-dev, drawn on FLUX.1-schnell", "FLUX.2 klein 4B": "FLUX.2 klein 4B, drawn on the distilled one",
    "Z-Image": "Z-Image-Turbo, with its training adapter", "Qwen-Image": "Qwen-Image, with Qwen-Image-Lightning's LoRA",
    "Krea 2": "Krea 2, with Krea 2 Turbo's LoRA", "ERNIE-Image": "ERNIE-Image, drawn on ERNIE-Image-Turbo",
}  # fmt: skip
"""How pictures are drawn in a few steps. A speed LoRA draws those that measure likeness too."""
Seconds = dict[str, Span]
"""How long each part of a job takes, from the least to the most."""


class Counted(NamedTuple):
    total: float
    """Operations of the whole job."""
    plan: MemoryPlan
    seconds: Seconds


Found = dict[str, dict[str, dict[str, Counted]]]
"""What was counted, by model, recipe and card."""
SHOWN = ("SD1.5", "SDXL", "FLUX.1-dev", "Z-Image", "Krea 2")
"""The models whose parts have columns."""


TEXT_WEIGHTS = {
    "clip_l": 123, "clip_g": 695, "t5xxl": 4762, "qwen3_4b": 4022, "qwen3_8b": 7568, "qwen25_7b": 7071, "qwen3vl_4b": 4022,
    "qwen3vl_8b": 7568, "mistral3_24b": 17530, "ministral3_3b": 3429, "qwen35_9b": 7937,
}  # fmt: skip
"""Millions of weights that are loaded of each kind of text encoder (core/models/text.py): no vision, and no output layer."""


def text_encoders(base: Base) -> dict[str, Component]:
    """The text encoders by part, as one tensor of their size, since only their loading is counted."""
    kinds = base.family.text_encoders
    return {
        part: Component({}, {"weights": torch.empty(TEXT_WEIGHTS[kind] * 10**6, device="meta")})
        for part, kind in kinds.items()
    }


def ledgers(name: str) -> Found:
    """The work of jobs that draw on the model, and on its distilled version; without cards that no memory plan fits."""
    gc.disable()  # traversing torch's objects takes a fifth of the time
    base = with_vae(name)
    loaded = replace(base, components={**base.components, **text_encoders(base)})
    drawn_on = {name: base} | ({DISTILLED[name]: base.as_distilled()} if name in DISTILLED else {})
    measured_on = {
        title: loaded if "drawn on" in title or title == name else loaded.as_distilled() for title in drawn_on
    }
    found: Found = {title: {recipe: {} for recipe in RECIPES} for title in drawn_on}

    @functools.cache
    def step(rank: int, side: int, batch: int) -> tuple[TrainingInputs, Callable[[MemoryPlan], int]]:
        """The inputs of a step and the memory of plans. Only the largest picture, the rank and the batch decide on it."""
        config = TrainConfig(rank=rank, batch_size=batch, precision="bf16", prior_prediction=1.0)
        cache = cache_of(replace(MODELS[name], resolution=side), base)
        (text,), (image,) = cache.text.values(), cache.images
        cache = replace(cache, text=dict.fromkeys(("", image.caption, image.class_caption), text))
        inputs = TrainingInputs(cache, base, config, torch.device("cpu"), torch.bfloat16)
        return inputs, functools.cache(StepPrediction(inputs).bytes)

    for recipe in RECIPES:
        config = replace(recipe_config(recipe, base, PHOTOS), precision="bf16")
        side = config.resolution or base.resolution
        photos = [Photo.from_image(Image.new("RGB", (side, side)), f"{number}.png") for number in range(PHOTOS)]
        order = Order("anna", config, find_style_packs().pick(PACK), HEADSHOTS)
        inputs, needs = step(config.rank, side, config.batch_size)
        passes = Passes.of(loaded, config)
        for card in CARDS:
            plan = first_that_fits(
                memory_plans(config, base, torch.device("cuda")),
                lambda plan, room=card.room, needs=needs: needs(plan) <= room,
            )
            if needs(plan) <= card.room:
                shared = Basis(loaded, passes, inputs, plan, torch.bfloat16, (card.memory - TAKEN) * GIB)
                speed = Speed.published("cuda", base, card.rate, (card.copies / 1.2, card.copies * 1.1))
                for title, drawing in drawn_on.items():
                    jobs = replace(order, drawn_on=drawing).jobs(base)
                    ledger = replace(shared, base=measured_on[title]).ledger(photos, config, jobs)
                    found[title][recipe][card.name] = Counted(ledger.total, ledger.plan, ledger.seconds(speed))
    return found


def hours(taken: Span) -> str:
    unit, name = (60, "min") if taken[1] < 5400 else (3600, "h")
    least, most = (f"{one / unit:.0f}" if unit == 60 else f"{one / unit:.2g}" for one in taken)
    return f"{most if least == most else f'{least}–{most}'} {name}"


def whole(seconds: Seconds) -> Span:
    return sum(least for least, _ in seconds.values()), sum(most for _, most in seconds.values())


def tables(found: Found) -> dict[str, str]:
    """The tables by name: the parts of jobs on one card, and the sums on all cards, also of drawing on distilled models."""
    (card,) = (card for card in CARDS if card.memory == 12)
    shown = {name: found[name]["balanced"][card.name] for name in SHOWN if name in found}
    rows = [[part, *(hours(one.seconds[part]) for one in shown.values())] for part in PARTS]
    rows = [row for row in rows if set(row[1:]) != {"0 min"}]
    rows += [
        ["all", *(hours(whole(one.seconds)) for one in shown.values())],
        ["TFLOP", *(f"{one.total / 1e12:,.0f}" for one in shown.values())],
        ["memory plan", *(column(one.plan) for one in shown.values())],
    ]

    def sums(recipes: Mapping[str, Mapping[str, Counted]], card: Card) -> str:
        there = [recipes[recipe].get(card.name) for recipe in RECIPES]
        return ", ".join(hours(whole(one.seconds)) if one else "–" for one in there)

    jobs = {name: [sums(recipes, card) for card in CARDS] for name, recipes in found.items()}
    head = [", ".join(RECIPES), *(card.name for card in CARDS)]
    return {
        "a job by part": table([f"balanced, {card.name}", *shown], rows),
        "whole jobs": table(head, [[name, *jobs[name]] for name in MODELS if name in jobs]),
        "drawn on distilled models": table(
            head, [[title, *jobs[title]] for title in DISTILLED.values() if title in jobs]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=MODELS, help="a model of the tables; default all")
    parser.add_argument("--json", action="store_true", help="print seconds instead of writing tables")
    options = parser.parse_args()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = {title: one for each in pool.map(ledgers, options.model or MODELS) for title, one in each.items()}
    if options.json:
        values = {
            name: {
                recipe: {card: one.seconds for card, one in on_cards.items()} for recipe, on_cards in recipes.items()
            }
            for name, recipes in found.items()
        }
        print(json.dumps(values, indent=1))
        return
    write_tables(DOCUMENT, tables(found))


if __name__ == "__main__":
    main()
