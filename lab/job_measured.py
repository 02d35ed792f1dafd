"""Run a whole job, and print each part's predicted and measured time: `python -m lab.job_measured PHOTOS OUTPUT --base FILE`.

The prediction is that of `facelora headshots --dry-run`. With `--random`, FILE is written first, with random weights: SD1.5 or
SDXL in its published size, or a rectified flow in its published width, with a few blocks and a tokenizer. So is a speed LoRA
that isn't there. Times are processor seconds per thread, which other programs lengthen least.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from core.device import best_device, precision_name, processor
from core.models import load_base
from core.photos import read_photos
from core.pictures import with_speed_lora
from core.pictures.style_pack import find_style_packs
from core.studio.ledger import Ledger
from core.studio.person import Order, ledger_of, ready_photos, train_and_draw
from core.studio.speed import Speed, speed_of
from core.training import recipe_config
from core.training.callbacks import Callbacks
from lab.timing import peak_memory
from tests.tooling import FULL_SD15, FULL_SDXL, random_lora, write_checkpoint
from tests.whole_flows import WHOLE_FLOWS, write_flow
from tools.tables import table

SHAPES = {shape.family: shape for shape in (FULL_SD15, FULL_SDXL)}
PARTS = {
    "encoding": ("encoding",),
    # The last sample of a step is decoded after its report, so these can't be told apart.
    "training and likeness": ("training", "prior prediction", "recomputation", "likeness", "samples"),
    "headshots": ("headshots",),
    "face pass": ("face pass",),
}
"""The parts of a ledger in each part that is measured."""
PHASES = {
    "training": "training and likeness",
    "samples": "training and likeness",
    "pictures": "headshots",
    "faces": "face pass",
}
"""The part of each phase that callbacks report, if its name differs."""


class PartTimes:
    """Adds the processor seconds of each thread between two reports to the part that the second one is about."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def reported(self, phase: str) -> None:
        now, part = time.process_time(), PHASES.get(phase, phase)
        self.seconds[part] = self.seconds.get(part, 0.0) + (now - self._last) / torch.get_num_threads()
        self._last = now

    def callbacks(self) -> Callbacks:
        return Callbacks(
            on_step=lambda _: self.reported("training"),
            on_phase=lambda name, done, total: self.reported(name),
            on_warning=lambda line: print(line, flush=True),
        )


def rows(ledger: Ledger, times: PartTimes, speed: Speed) -> list[tuple[str, ...]]:
    """Return the rows of the table: TFLOP, predicted and measured seconds of each part, then of what isn't predicted."""
    found, predicted = [], ledger.seconds(speed)
    for part, counted in PARTS.items():
        operations, measured = sum(ledger.operations[one] for one in counted), times.seconds.get(part, 0.0)
        least, most = (sum(predicted[one][end] for one in counted) for end in (0, 1))
        reached = f"{operations / speed.rate / measured:.2f}" if measured else "–"
        found.append((part, f"{operations / 1e12:.1f}", f"{least:.0f} to {most:.0f}", f"{measured:.0f}", reached))
    others = {part: seconds for part, seconds in times.seconds.items() if part not in PARTS}
    return [*found, *((part, "–", "–", f"{seconds:.0f}", "–") for part, seconds in others.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="its folder, for models that come without one")
    parser.add_argument(
        "--random",
        choices=(*SHAPES, *WHOLE_FLOWS),
        help="write the base model of this family first, with random weights",
    )
    parser.add_argument("--speed-lora", type=Path, help="to draw with")
    parser.add_argument("--recipe", default="fast")
    parser.add_argument("--settings", type=json.loads, default={}, help="other settings, as JSON")
    parser.add_argument("--count", type=int, default=20, help="pictures to draw")
    options = parser.parse_args()
    if options.random in SHAPES:
        write_checkpoint(options.base, SHAPES[options.random])
    elif options.random:
        options.tokenizer = write_flow(options.base, options.random)
    base = load_base(options.base, tokenizer=options.tokenizer)
    if options.random and options.speed_lora and not options.speed_lora.exists():
        random_lora(base, base.family.denoiser_targets["attention"]).save(options.speed_lora)
    if options.speed_lora:
        base = with_speed_lora(base, options.speed_lora)
    photos, times = read_photos(options.photos), PartTimes()
    config = recipe_config(options.recipe, base, len(photos), options.settings, print)
    order = Order("me", config, find_style_packs().pick("corporate"), options.count)
    callbacks = times.callbacks()
    ready = ready_photos(photos, base, config, callbacks)
    times.reported("check")
    device, dtype = base.device_and_dtype(config.precision)
    ledger, speed = ledger_of(ready, base, order), speed_of(base, precision=config.precision)
    times.reported("prediction")
    began = time.monotonic()
    peak = peak_memory(lambda: train_and_draw(ready, base, order, options.output, callbacks=callbacks), device)
    times.reported("ranking and gallery")
    elapsed = time.monotonic() - began
    print(
        f"{base.family.title}, {config.resolution or base.resolution} px, {config.steps} steps of {config.batch_size}, "
        f"{options.count} pictures, {precision_name(dtype)}; {processor(best_device())}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}; rate {speed.rate / 1e9:.0f} GFLOP/s; {elapsed:.0f} s from photos to gallery; "
        f"{ledger.memory / 2**30:.2f} GiB predicted for training, peak of the job {(peak or 0) / 2**30:.2f} GiB"
    )
    print(table(("part", "TFLOP", "predicted, s", "measured, s", "share of the rate"), rows(ledger, times, speed)))


if __name__ == "__main__":
    main()
