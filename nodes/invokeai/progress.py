"""The progress of a node on InvokeAI's page, and its cancel button."""

# pyright: reportMissingImports=false

import math
import time
from collections.abc import Sequence

from invokeai.invocation_api import InvocationContext
from PIL import Image

from ...core.pictures.sheet import contact_sheet
from ...core.training.callbacks import Callbacks, StepReport, step_line
from .services import raise_if_cancelled

SHOW_INTERVAL = 0.5
"""Seconds between two messages of one phase: each goes to every open page."""
SAMPLE_SIDE = 384
"""The height of a sample in the preview, in pixels."""


class NodeProgress:
    """Shows the progress of a node. Each of its methods raises when the user cancels."""

    def __init__(self, context: InvocationContext):
        self._context = context
        self._begun = time.monotonic()
        self._shown = -math.inf
        self._phase = ""
        self._preview: Image.Image | None = None
        self.notes: list[str] = []
        """The warnings so far."""

    def callbacks(self) -> Callbacks:
        """The callbacks of a training run."""
        return Callbacks(
            on_phase=self.phase, on_sample=self.sample, on_warning=self.warning, check_cancelled=self.check_cancelled
        )

    def check_cancelled(self) -> None:
        raise_if_cancelled(self._context)

    def show(self, message: str, share: float | None = None) -> None:
        """Show a message, the finished share of the work, and the last samples."""
        self.check_cancelled()
        self._shown = time.monotonic()
        self._context.util.signal_progress(message, share, self._preview)

    def phase(self, name: str, done: int, total: int) -> None:
        """Show the progress of a phase, at most every SHOW_INTERVAL seconds between its start and end."""
        self.check_cancelled()
        if name != self._phase or done == total or time.monotonic() - self._shown > SHOW_INTERVAL:
            self._phase = name
            self.show(f"{name}: {done} of {total}" if total else name, done / total if total else None)

    def point(self, report: StepReport) -> None:
        """Show a step of the training run."""
        line = step_line(report, time.monotonic() - self._begun)
        if report.measured:
            self._context.logger.info(line)
        self.show(line, report.step / report.steps)

    def sample(self, step: int, images: Sequence[Image.Image]) -> None:
        """Show the samples of a step, from now on with every message."""
        self._preview = contact_sheet([(f"step {step}", images)], tile=SAMPLE_SIDE)
        self.show(f"samples of step {step}")

    def warning(self, message: str) -> None:
        """Keep a warning, and write it to the log."""
        self.notes.append(message)
        self._context.logger.warning(message)
