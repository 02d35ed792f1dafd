"""Choose the device of a command that computes, and print what its work will cost."""

import json
from typing import TYPE_CHECKING

from .common import rough_span

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from ..config import TrainConfig
    from ..models.base import Base
    from ..studio import Ledger, Span


def device_from(name: str | None) -> "torch.device":
    """Return the device of that name, else the best one. Raises BadConfig if it cannot compute.

    On Windows and in WSL 2, the process's use of GPU memory is limited to what is free.
    """
    from ..device import stay_within_free_memory, usable_device

    device = usable_device(named_or_best(name))
    stay_within_free_memory(device)
    return device


def named_or_best(name: str | None) -> "torch.device":
    """Return the device of that name, else the best one, even if this torch has no kernels for it."""
    from ..device import best_device, named_device

    return best_device() if name is None else named_device(name)


def show_work(
    ledger: "Ledger", seconds: "Mapping[str, Span]", as_json: bool, config: "TrainConfig | None" = None, photos: int = 0
) -> None:
    """Print the work of a job part by part, and how long each part takes, from the least to the most.

    With the settings of one person and the number of photos to train on, also print how often a photo is seen. For a LoRA whose
    rate is set, print the travel too.
    """
    goes, lines = {}, []
    if config and photos:
        from ..training.methods import METHODS
        from ..training.recipes import travel

        goes = {"views": round(config.steps * config.batch_size * config.accumulation / photos, 1)}
        lines = [f"Each photo is seen {goes['views']:.0f} times."]
        if not config.finds_rate and METHODS[config.method].makes == "lora":
            goes["travel"] = round(travel(config), 4)
            lines[0] += f" Travel, alpha / rank times the sum of the learning rates: {travel(config):.3f}"
    if not as_json:
        print(*_table(ledger, seconds), *lines, "Nothing was trained or drawn.", sep="\n")
        return
    described = {
        "parts": {part: {"operations": ledger.operations.get(part, 0.0), "seconds": seconds[part]} for part in seconds},
        "operations": ledger.total,
        "seconds": total_span(seconds),
        "memory": ledger.memory,
        "memory_plan": str(ledger.plan),
        **goes,
    }
    print(json.dumps(described))


def work_in_short(ledger: "Ledger", seconds: "Mapping[str, Span]") -> str:
    """Return the total in one line."""
    return f"about {rough_span(total_span(seconds))} and {ledger.memory / 2**30:.1f} GiB of memory"


def speed_hint(base: "Base", seconds: "Mapping[str, Span]") -> list[str]:
    """Return a line on how much less time drawing on a base model would take with a well-known file. Empty if none is known.

    `seconds` is how long the parts of the job take; empty if they haven't been counted.
    """
    from ..pictures.sampling import predictions_per_step

    few = base.family.few_steps
    if base.few_steps or few is None or not few.known or not base.is_large:
        return []
    share = few.steps / (base.steps * predictions_per_step(base, base.guidance))
    least, most = total_span({part: seconds.get(part, (0.0, 0.0)) for part in ("headshots", "face pass")})
    how = f"download it and give it with {'--speed-lora' if few.lora else '--draw-on'}"
    if not most:
        return [f"drawing would take {share:.0%} of the time with {few.known}: {how}"]
    return [
        f"drawing takes {rough_span((least, most))} of this, "
        f"and would take {rough_span((share * least, share * most))} with {few.known}: {how}"
    ]


def total_span(seconds: "Mapping[str, Span]") -> "Span":
    """Return the sum of spans."""
    return sum(low for low, _ in seconds.values()), sum(high for _, high in seconds.values())


def _table(ledger: "Ledger", seconds: "Mapping[str, Span]") -> list[str]:
    total = total_span(seconds)
    lines = [f"{'':<17}{'TFLOP':>10}{'time':>18}{'share':>8}"]
    for part, span in (*seconds.items(), ("all", total)):
        if sum(span):
            tera = (ledger.total if part == "all" else ledger.operations.get(part, 0.0)) / 1e12
            shown = "" if not tera else f"{tera:,.0f}" if tera >= 100 else f"{tera:.2g}"
            lines.append(f"{part:<17}{shown:>10}{rough_span(span):>18}{sum(span) / sum(total):>8.0%}")
    return [*lines, f"memory: {ledger.memory / 2**30:.1f} GiB ({ledger.plan})"]
