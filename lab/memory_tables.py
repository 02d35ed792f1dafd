"""The tables of memory plans in docs/benchmarks.md: `python -m lab.memory_tables` predicts them and writes them there.

Nothing is trained: the published models' sizes are gone through with tensors that hold no numbers. It takes about a quarter of
an hour; `--model NAME`, once or more, does these models alone, and leaves the rows of the others as they are.
"""

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from core.models.families import FAMILIES
from core.models.memory_plan import PLANS, RESERVE, MemoryPlan, drawing_plan, first_that_fits, plans_for
from core.storage.files import write_text
from core.training.inputs import TrainingInputs
from core.training.memory_prediction import StepPrediction
from lab.flops import count_flops
from tests.published_models import MODELS, STORED, Model, base_of, cache_of, config_of
from tools.tables import replace_table, table, write_tables

DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
GIB = 2**30
TAKEN = 1
"""GiB of a card that the screen, other programs and CUDA itself have."""


@dataclass(frozen=True)
class Card:
    """A graphics card."""

    name: str
    memory: int
    """GiB."""
    rate: float
    """Floating-point operations a second of products in bf16 that are added up in float32: twice those in float32."""
    copies: float
    """Bytes a second from the computer's memory: of 16 or 32 GB/s over 8 or 16 lanes of PCIe 4, three quarters."""

    @property
    def room(self) -> float:
        """The bytes that a training plans with."""
        return (self.memory - TAKEN) * GIB * RESERVE


CARDS = (
    Card("RTX 4060, 8 GB", 8, 30e12, 12e9),
    Card("RTX 3060, 12 GB", 12, 25e12, 24e9),
    Card("RTX 4060 Ti, 16 GB", 16, 44e12, 12e9),
    Card("RTX 4090, 24 GB", 24, 165e12, 24e9),
)


QUANTISED = tuple((name, form) for name in ("FLUX.1-dev",) for form in STORED)


def weight_bytes(model: Model) -> int:
    """The bytes of the denoiser's weights in bf16."""
    state = FAMILIES[model.family].build_empty("denoiser", model.config).state_dict()
    return sum(2 * tensor.numel() for tensor in state.values())


def prediction_of(model: Model, form: str = "", *, each_block: bool = False) -> StepPrediction:
    """The step of a LoRA of rank 16 on one picture, in bf16."""
    base, config = base_of(model, form), config_of(model)
    inputs = TrainingInputs(cache_of(model, base), base, config, torch.device("cpu"), torch.bfloat16)
    return StepPrediction(inputs, each_block=each_block)


class Needs:
    """What the plans of a model need of a card and of the computer, in GiB."""

    def __init__(self, model: Model, form: str = ""):
        base = base_of(model, form)
        self.weights: float = base.weight_bytes("denoiser", torch.int8, as_stored=bool(form)) / GIB
        """The size of weights that are brought in."""
        self.plans: tuple[MemoryPlan, ...] = plans_for("auto", quantised=bool(form))
        self.of: Callable[[MemoryPlan], int] = functools.cache(prediction_of(model, form).bytes)
        """The bytes of the card."""
        self.row: list[str] = list(map(self.cell, self.plans))

    def cell(self, plan: MemoryPlan) -> str:
        """The GiB of the card, with those of page-locked memory."""
        locked = f" + {plan.offload * self.weights:.1f}" if plan.offload else ""
        return f"{self.of(plan) / GIB:.1f}{locked}"

    def on(self, card: Card) -> str:
        """The plan that is chosen on a card with enough of the computer's memory, in few words, with its GiB."""
        plan = first_that_fits(self.plans, lambda plan: self.of(plan) <= card.room)
        return f"{column(plan)} ({self.cell(plan)})" if self.of(plan) <= card.room else "no plan fits"


def column(plan: MemoryPlan) -> str:
    """The plan in few words."""
    brought = f", {plan.offload:.0%} brought in" if plan.offload else ""
    bits = "8 bits, " if plan.weights == "8 bits" else ""
    cheap = (" + cheap" if plan.recompute else "cheap") if plan.selective else ""
    share = f"{plan.recompute:.0%}" if plan.recompute or not cheap else ""
    return f"{bits}{share}{cheap} recomputed{brought}"


def tables_of_quantised(rows: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The tables of these models in these forms of storage."""
    titles = [f"{name}, {form}, {MODELS[name].resolution} px" for name, form in rows]
    needs = [Needs(MODELS[name], form) for name, form in rows]
    return {
        "memory of quantised files": table(
            ["GiB", "weights", *map(column, needs[0].plans)],
            [[title, f"{found.weights:.1f}", *found.row] for title, found in zip(titles, needs, strict=True)],
        ),
        "training on quantised files": table(
            ["", *(card.name for card in CARDS)],
            [[title, *map(found.on, CARDS)] for title, found in zip(titles, needs, strict=True)],
        ),
    }


def drawing_on(card: Card, weights: int) -> str:
    """How much of the denoiser is brought in at each of its passes on a card, and how many GiB that are."""
    away = drawing_plan(weights, (card.memory - TAKEN) * GIB).offload
    return f"{away:.0%} ({away * weights / GIB:.1f})" if away else "nothing"


def rows_of(model_name: str) -> dict[str, list[str]]:
    """The model's row of each table, by the table's name."""
    model = MODELS[model_name]
    needs, weights, title = Needs(model), weight_bytes(model), titled(model_name)
    return {
        "memory": [title, *needs.row],
        "training on cards": [
            title,
            f"{count_flops(partial(prediction_of(model, each_block=True).bytes, PLANS[0])) / 1e12:.3g}",
            *map(needs.on, CARDS),
        ],
        "drawing on cards": [model_name, f"{weights / GIB:.1f}", *(drawing_on(card, weights) for card in CARDS)],
    }


def titled(model_name: str) -> str:
    """What the model's rows begin with where a picture's size matters."""
    return f"{model_name}, {MODELS[model_name].resolution} px"


HEADERS = {
    "memory": ["GiB", *map(column, PLANS)],
    "training on cards": ["", "TFLOP", *(card.name for card in CARDS)],
    "drawing on cards": ["", "weights, GiB", *(f"{card.memory} GB" for card in CARDS)],
}


def with_rows(document: str, found: Mapping[str, Mapping[str, Sequence[str]]]) -> str:
    """The document with these rows, by model and table, in its tables; those of other models stay as they are."""
    for name, header in HEADERS.items():
        rows = {cells[0]: cells for cells in rows_in(document, name) if cells[0] in {*MODELS, *map(titled, MODELS)}} | {
            rows[name][0]: rows[name] for rows in found.values()
        }
        order = [title for model in MODELS for title in (model, titled(model)) if title in rows]
        document = replace_table(document, name, table(header, [rows[title] for title in order]))
    return document


def rows_in(document: str, name: str) -> list[list[str]]:
    """The rows of a table of the document."""
    lines = document.split(f"<!-- table: {name} -->\n")[1].split("<!-- end -->", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", action="append", choices=MODELS, help="a model whose rows are predicted; default all"
    )
    given = parser.parse_args().model
    document = with_rows(DOCUMENT.read_text("utf-8"), {name: rows_of(name) for name in given or MODELS})
    write_text(DOCUMENT, document)
    if not given:
        write_tables(DOCUMENT, tables_of_quantised(QUANTISED))


if __name__ == "__main__":
    main()
