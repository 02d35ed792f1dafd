"""The command `demo`, which does the whole job on the small base model that comes with the package."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .. import training  # Its modules load only when a name is used.
from .common import BarProgress
from .options import Options, option
from .values import Folder


@dataclass(frozen=True)
class DemoOptions(Options):
    output: Folder = option("Folder for the results (default: demo_output)", default=Path("demo_output"))
    person: int = option("Person that the base model has not seen, 35 to 40 (default: 35)", default=35)
    steps: int | None = option("Optimizer steps (default: the demo's own)")


def run(options: DemoOptions) -> None:
    from ..demo import CONFIG
    from ..demo import run as run_demo

    steps = CONFIG.steps if options.steps is None else options.steps
    config = dataclasses.replace(CONFIG, steps=steps, warmup_steps=max(0, min(CONFIG.warmup_steps, steps - 1)))
    with BarProgress() as bar:
        callbacks = training.Callbacks(on_step=bar.step, on_phase=bar.phase)
        report = run_demo(options.output, person=options.person, config=config, callbacks=callbacks)
    print(report.text)
    print(f"pictures: {options.output / 'contact_sheet.png'}")
