"""The tables of memory plans in docs/benchmarks.md: `python -m tools.memory_tables` predicts them and writes them there.

Nothing is trained: the published models' sizes are gone through with tensors that hold no numbers. It takes about a quarter of
an hour; `--model NAME`, once or more, does these models alone, and leaves the rows of the others as they are.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from core.config import TrainConfig
from core.models.base import Base
from core.models.families import FAMILIES
from core.models.memory_plan import PLANS, RESERVE, MemoryPlan, count_flops, drawing_plan, first_that_fits, plans_for
from core.models.quantised import dequantised
from core.models.spec import Component
from core.training.encode import EncodedImage, LatentCache
from core.training.inputs import TrainingInputs
from core.training.memory_prediction import StepPrediction
from tools.photo_tables import replace_table, table
from tools.random_models import denoiser_config

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


@dataclass(frozen=True)
class Model:
    """A published model: its denoiser's configuration, and how long and wide its texts are."""

    family: str
    resolution: int
    config: dict[str, Any]
    latent: tuple[int, int]
    """Channels, and pixels of a side of a latent's pixel."""
    tokens: int
    width: int
    pooled: int | None = None
    masked: bool = False
    """Whether there is a mask of the text's length."""


QWEN = {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 3584, "num_layers": 60}
MODELS = {
    "SD1.5": Model("sd15", 512, denoiser_config("sd15"), (4, 8), 77, 768),
    "SDXL": Model("sdxl", 1024, denoiser_config("sdxl"), (4, 8), 77, 2048, 1280),
    "SD3.5 medium": Model(
        "sd3", 1024,
        {"sample_size": 128, "num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536,
         "pos_embed_max_size": 384, "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm", "in_channels": 16},
        (16, 8), 333, 4096, 2048,
    ),
    "FLUX.1-dev": Model("flux1", 512, {"guidance_embeds": True, "in_channels": 64}, (16, 8), 512, 4096, 768),
    "FLUX.2 klein 4B": Model(
        "flux2", 1024,
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
         "guidance_embeds": False, "in_channels": 128},
        (128, 16), 512, 7680,
    ),
    "FLUX.2 dev": Model(
        "flux2", 1024,
        {"num_layers": 8, "num_single_layers": 48, "num_attention_heads": 48, "joint_attention_dim": 15360,
         "guidance_embeds": True, "in_channels": 128},
        (128, 16), 512, 15360,
    ),
    "FLUX.3 Klein": Model("flux3", 1024, {"in_channels": 128, "flow_map": False}, (128, 16), 160, 20480, masked=True),
    "Z-Image": Model("zimage", 1024, {"in_channels": 16}, (16, 8), 128, 2560, masked=True),
    "Qwen-Image": Model("qwen-image", 1024, {**QWEN, "in_channels": 64}, (16, 8), 128, 3584, masked=True),
    "Qwen-Image 2.1": Model("qwen-image-21", 1024, {"in_channels": 64}, (64, 16), 128, 4096, masked=True),
    "Krea 2": Model(
        "krea2", 1024, {"num_layers": 28, "num_text_layers": 12, "in_channels": 64}, (16, 8), 128, 12 * 2560, masked=True
    ),
    "ERNIE-Image": Model(
        "ernie-image", 1024,
        {"hidden_size": 4096, "num_attention_heads": 32, "num_layers": 36, "ffn_hidden_size": 12288, "text_in_dim": 3072,
         "in_channels": 128},
        (128, 16), 128, 3072, masked=True,
    ),
    "LongCat-Image": Model(
        "longcat-image", 1024, {"num_layers": 10, "num_single_layers": 20, "in_channels": 64}, (16, 8), 512, 3584
    ),
    "Ideogram 4": Model("ideogram4", 1024, {"in_channels": 128, "num_layers": 34}, (128, 16), 128, 13 * 4096, masked=True),
}  # fmt: skip


STORED = {
    "scaled fp8": ("float8_e4m3fn", torch.float8_e4m3fn, 1, {"weight_scale": (torch.float32, lambda rows, columns: ())}),
    "NVFP4": (
        "nvfp4", torch.uint8, 2,
        {
            "weight_scale": (torch.float8_e4m3fn, lambda rows, columns: (-(-rows // 128) * 128, columns // 16)),
            "weight_scale_2": (torch.float32, lambda rows, columns: ()),
        },
    ),
}  # fmt: skip
"""What quantised files have of a layer: the format's name, the dtype of a weight and how many numbers are in one of it, and the
dtype and the shape of each scale of a weight of (rows, columns)."""
QUANTISED = tuple((name, form) for name in ("FLUX.1-dev",) for form in STORED)


def stored_tensors(model: Model, form: str) -> Mapping[str, Tensor]:
    """The denoiser's tensors in a file in which the matrices of blocks are quantised, without numbers."""
    named, dtype, numbers, scales = STORED[form]
    said = torch.tensor(list(json.dumps({"format": named}).encode()), dtype=torch.uint8)
    tensors = FAMILIES[model.family].build_empty("denoiser", model.config).state_dict()
    for name, tensor in list(tensors.items()):
        if "blocks." in name and name.endswith(".weight") and tensor.ndim == 2:
            rows, columns = tensor.shape
            layer = name.removesuffix("weight")
            tensors[name] = torch.empty(rows, columns // numbers, dtype=dtype, device="meta")
            for end, (of_scale, shape) in scales.items():
                tensors[layer + end] = torch.empty(shape(rows, columns), dtype=of_scale, device="meta")
            tensors[f"{layer}comfy_quant"] = said
    return dequantised(tensors, form)


def base_of(model: Model, form: str = "") -> Base:
    """The model without numbers, in a form in which weights are stored if one is given."""
    family = FAMILIES[model.family]
    tensors = stored_tensors(model, form) if form else family.build_empty("denoiser", model.config).state_dict()
    return Base(
        family=family, name="published size", components={"denoiser": Component(model.config, tensors)},
        prediction_type=family.prediction_type("epsilon"), zero_terminal_snr=False, resolution=model.resolution,
    )  # fmt: skip


def weight_bytes(model: Model) -> int:
    """The bytes of the denoiser's weights in bf16."""
    state = FAMILIES[model.family].build_empty("denoiser", model.config).state_dict()
    return sum(2 * tensor.numel() for tensor in state.values())


def config_of(model: Model) -> TrainConfig:
    """The settings of a LoRA of rank 16 on one picture at a time, in bf16."""
    return TrainConfig(rank=16, precision="bf16", resolution=model.resolution)


def cache_of(model: Model, base: Base) -> LatentCache:
    """A picture of the model's resolution and its caption, without numbers of any meaning."""
    channels, pixels = model.latent
    latent = torch.zeros(channels, model.resolution // pixels, model.resolution // pixels)
    side = (model.resolution, model.resolution)
    caption = "a photo of sks person"
    image = EncodedImage(
        name="", mean=latent, deviation=latent, mask=None, conditioning=base.family.image_conditioning(side, (0, 0), side),
        caption=caption, class_caption="a photo of person", repeats=1, is_class=False,
    )  # fmt: skip
    text = {"context": torch.zeros(1, model.tokens, model.width)}
    if model.pooled:
        text["pooled"] = torch.zeros(1, model.pooled)
    if model.masked:
        text["context_mask"] = torch.ones(1, model.tokens)
    return LatentCache((image,), {caption: text}, chunks=1, digest="")


def prediction_of(model: Model, form: str = "", *, each_block: bool = False) -> StepPrediction:
    """The step of a LoRA of rank 16 on one picture, in bf16."""
    base, config = base_of(model, form), config_of(model)
    inputs = TrainingInputs(cache_of(model, base), base, config, torch.device("cpu"), torch.bfloat16)
    return StepPrediction(inputs, each_block=each_block)


def predictions(model: Model, form: str = "") -> dict[MemoryPlan, int]:
    """How many bytes each plan needs."""
    prediction = prediction_of(model, form)
    return {plan: prediction.bytes(plan) for plan in plans_for("auto", quantised=base_of(model, form).is_quantised)}


def column(plan: MemoryPlan) -> str:
    """The plan in few words."""
    brought = f", {plan.offload:.0%} brought in" if plan.offload else ""
    bits = "8 bits, " if plan.weights == "8 bits" else ""
    cheap = (" + cheap" if plan.recompute else "cheap") if plan.selective else ""
    share = f"{plan.recompute:.0%}" if plan.recompute or not cheap else ""
    return f"{bits}{share}{cheap} recomputed{brought}"


def training_on(card: Card, needs: dict[MemoryPlan, int]) -> str:
    """The plan that is chosen on a card, in few words, with the GiB that it needs."""
    plan = first_that_fits(list(needs), lambda plan: needs[plan] <= card.room)
    return f"{column(plan)} ({needs[plan] / GIB:.1f})" if needs[plan] <= card.room else "no plan fits"


def tables_of_quantised(rows: Sequence[tuple[str, str]]) -> dict[str, str]:
    """The tables of these models in these forms of storage."""
    titles = [f"{name}, {form}, {MODELS[name].resolution} px" for name, form in rows]
    needs = [predictions(MODELS[name], form) for name, form in rows]
    sizes = [
        base_of(MODELS[name], form).weight_bytes("denoiser", torch.bfloat16, as_stored=True) for name, form in rows
    ]
    return {
        "memory of quantised files": table(
            ["GiB", "weights", *map(column, needs[0])],
            [
                [title, f"{size / GIB:.1f}", *(f"{need / GIB:.1f}" for need in found.values())]
                for title, size, found in zip(titles, sizes, needs, strict=True)
            ],
        ),
        "training on quantised files": table(
            ["", *(card.name for card in CARDS)],
            [
                [title, *(training_on(card, found) for card in CARDS)]
                for title, found in zip(titles, needs, strict=True)
            ],
        ),
    }


def drawing_on(card: Card, weights: int) -> str:
    """How much of the denoiser is brought in at each of its passes on a card, and how many GiB that are."""
    away = drawing_plan(weights, (card.memory - TAKEN) * GIB).offload
    return f"{away:.0%} ({away * weights / GIB:.1f})" if away else "nothing"


def work(to_gpu: float = 0, back: float = 0, on_cpu: float = 0, on_gpu: float = 0, loads: int = 0) -> np.ndarray:
    """The bytes copied to the GPU and back, the multiplications on each, and how often a denoiser is loaded."""
    return np.array([to_gpu, back, on_cpu, on_gpu, loads], float)


def applied(model_name: str, rank: int, room: int | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What it takes to have LoRAs of that rank on a model in bf16, before and now, by what they are for.

    `room` is the free memory in bytes of a card that brings in the weights that don't fit. None means that all fit.
    """
    model = MODELS[model_name]
    family, whole = FAMILIES[model.family], weight_bytes(model)
    state = family.build_empty("denoiser", model.config).state_dict()
    target = family.denoiser_targets[TrainConfig().targets]
    layers = [
        state[f"{path}.weight"]
        for path in (name.removesuffix(".weight") for name in state)
        if re.fullmatch(target, path)
    ]
    numbers = sum(weight.numel() for weight in layers)
    matrices = sum(2 * rank * (len(weight) + weight[0].numel()) for weight in layers)
    away = drawing_plan(whole, room).offload
    here, brought = 2 * numbers * (1 - away), 2 * numbers * away
    load, restore = work((1 - away) * whole, loads=1), work(here)

    def before(kept: bool) -> np.ndarray:
        """The processor multiplied, scaled the product twice, and copied it in float32. Originals were `kept` or not."""
        return work(2 * here, here * kept, rank * numbers + 2 * numbers)

    def now(kept: bool) -> np.ndarray:
        return work(matrices + brought, here * kept + brought, on_gpu=rank * numbers)

    return {
        "applied once": (before(False), now(False)),
        # The face pass begins with the strength that the headshots end with.
        "headshots of 3 strengths and face pass": (
            2 * (load + 2 * (before(True) + restore) + before(False)), load + now(True) + 4 * (restore + now(False))
        ),
        # Everyone's changed weights are computed for the picture. Faces are redrawn up to three times.
        "picture of 3 people and face passes": (
            load + 3 * (before(True) + restore) + 9 * (load + before(False)),
            load + 3 * now(False) + now(True) + 2 * (restore + now(False)),
        ),
    }  # fmt: skip


def table_of_loras() -> str:
    """The table of what it takes to have LoRAs on a model."""
    room = (12 - TAKEN) * GIB
    found = {f"SDXL, rank 32, {what}": pair for what, pair in applied("SDXL", 32).items()}
    found["FLUX.1-dev, rank 16, applied once"] = applied("FLUX.1-dev", 16)["applied once"]
    on_card = {f"FLUX.1-dev on 12 GB, {what}": pair for what, pair in applied("FLUX.1-dev", 16, room).items()}
    found |= {title: pair for title, pair in on_card.items() if "people" not in title}
    units = np.array([GIB, GIB, 1e9, 1e9, 1])
    found = {title: (before / units, now / units) for title, (before, now) in found.items()}
    rows = [
        [
            title,
            *(
                " → ".join(f"{one:,.0f}" if one >= 100 else f"{one:.3g}" for one in both)
                for both in zip(*pair, strict=True)
            ),
        ]
        for title, pair in found.items()
    ]
    head = ["before → now", "GiB to the GPU", "GiB back", "10⁹ multiplications on the processor", "on the GPU", "loads"]
    return table(head, rows)


def rows_of(model_name: str) -> dict[str, list[str]]:
    """The model's row of each table, by the table's name."""
    model = MODELS[model_name]
    needs, weights, title = predictions(model), weight_bytes(model), titled(model_name)
    return {
        "memory": [title, *(f"{needs[plan] / GIB:.1f}" for plan in PLANS)],
        "training on cards": [
            title,
            f"{count_flops(partial(prediction_of(model, each_block=True).bytes, PLANS[0])) / 1e12:.3g}",
            *(training_on(card, needs) for card in CARDS),
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
    parser.add_argument("--loras", action="store_true", help="make only the table of applied LoRAs")
    options = parser.parse_args()
    given = options.model
    document = replace_table(DOCUMENT.read_text("utf-8"), "applying a LoRA", table_of_loras())
    if options.loras:
        DOCUMENT.write_text(document, "utf-8")
        return
    document = with_rows(document, {name: rows_of(name) for name in given or MODELS})
    for name, lines in {} if given else tables_of_quantised(QUANTISED).items():
        document = replace_table(document, name, lines)
    DOCUMENT.write_text(document, "utf-8")


if __name__ == "__main__":
    main()
