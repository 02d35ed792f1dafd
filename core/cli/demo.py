"""The command `demo`, which does the whole job on the small base model that comes with the package."""

import argparse
import dataclasses

from ..demo import CONFIG, run
from ..training.callbacks import Callbacks
from .common import BarProgress


def run_demo(options: argparse.Namespace) -> None:
    steps = CONFIG.steps if options.steps is None else options.steps
    config = dataclasses.replace(CONFIG, steps=steps, warmup_steps=max(0, min(CONFIG.warmup_steps, steps - 1)))
    with BarProgress() as bar:
        callbacks = Callbacks(on_step=bar.step, on_phase=bar.phase)
        report = run(options.output, person=options.person, config=config, callbacks=callbacks)
    print(report.text)
    print(f"pictures: {options.output / 'contact_sheet.png'}")
