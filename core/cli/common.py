"""Shared parts of commands: opening the base model, LoRAs with a strength, and progress reports."""

import dataclasses
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .. import models, pictures, storage  # Their modules load only when a name is used.
from ..errors import BadConfig, one_line
from ..progress import SAMPLES, OnProgress
from .shared_options import BaseParts

if TYPE_CHECKING:
    from ..training import StepReport

DEMO = "demo"
"""The value of `--base` for the small base model that comes with the package."""


def base_from(
    name: str, parts: BaseParts, schedule: Mapping[str, Any] | None = None, *, other: str | None = None
) -> "models.Base":
    """Open the base model of that name. `schedule` are arguments of `load_base`.

    The additional files are for this base model and the `other` one. If only one of them is a diffusers folder, they are for
    the other.
    """
    files = {"vae": parts.vae, "text_encoders": parts.text_encoder, "tokenizer": parts.tokenizer}
    if other and models.has_all_parts(name) and not models.has_all_parts(other):
        files = {}
    return models.load_base(name, **files, **schedule or {})


def packs_for(base: str | None, folders: Sequence[Path]) -> "pictures.FoundPacks":
    """Find the style packs for a base model in the package and in the folders."""
    if base != DEMO:
        return pictures.find_style_packs(folders)
    from ..demo import FOLDER

    return pictures.find_style_packs([FOLDER, *folders])


def checkpoint(path: Path) -> Path:
    """Return the small base model's file for `demo`, else the given path."""
    return Path(models.named_file(str(path)))


def split_strength(text: str) -> tuple[str, float]:
    """Split "face.safetensors:0.8" into path and strength; without a number the strength is 1.

    Raises BadConfig for a strength that is not finite, and for text after a file's name that is not a number.
    """
    path, separator, number = text.rpartition(":")
    try:
        strength = float(number) if separator and path else None
    except ValueError:
        strength = None
    if strength is None:
        if os.path.isfile(path) and not os.path.exists(text):
            raise BadConfig(f"{text}: the strength {number!r} is not a number")
        return text, 1.0
    if not math.isfinite(strength):
        raise BadConfig(f"{text}: the strength of a LoRA must be finite")
    return path, strength


def terminal_width() -> int | None:
    """Return the columns of the output terminal; None for a file or a pipe, whose lines may have any length."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def rough_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def rough_span(seconds: tuple[float, float]) -> str:
    """Format a range of seconds in one unit, such as "12 to 20 min"."""
    most = rough_duration(seconds[1])
    number, unit = most.split()
    least = f"{seconds[0] / {'s': 1, 'min': 60, 'h': 3600}[unit]:.{1 if '.' in number else 0}f}"
    return most if least == number else f"{least} to {most}"


def print_warning(message: str) -> None:
    print(f"warning: {one_line(message)}", file=sys.stderr)


def print_whether_signed() -> None:
    """Print a line if the drawn pictures have only the mark."""
    if not storage.can_sign():
        print(f"pictures are marked as drawn, but not signed; to sign them: {storage.HOW_TO_SIGN}", file=sys.stderr)


def progress_bar(name: str) -> OnProgress:
    """Return a function that takes (done, total) and shows a bar on a terminal, unless the work ends within a second."""
    from tqdm import tqdm

    bar = tqdm(desc=name, dynamic_ncols=True, delay=1, disable=None)  # None disables it unless stderr is a terminal.

    def update(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return update


def end_bars() -> None:
    """End the lines of bars after an error, so that its message gets its own line."""
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


class Progress(Protocol):
    """Shows the progress of a command."""

    def phase(self, name: str, done: int, total: int) -> None: ...

    def step(self, report: "StepReport") -> None: ...

    def warning(self, message: str) -> None: ...


class BarProgress(AbstractContextManager["BarProgress"]):
    """Progress bars on stderr. They read the loss at most twice a second, since reading waits for the device."""

    def __init__(self) -> None:
        self._bar, self._name, self._shown = None, "", 0.0

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def _bar_for(self, name: str, total: int):
        from tqdm import tqdm

        if self._bar is None or self._name != name:
            self.__exit__()
            form = None if total else "{desc}: {elapsed}"
            self._bar = tqdm(total=total, desc=name, bar_format=form, dynamic_ncols=True, file=sys.stderr)
            self._name = name
        return self._bar

    def phase(self, name: str, done: int, total: int) -> None:
        if name == SAMPLES and self._bar is not None and self._name == "training":
            now = time.monotonic()
            if now - self._shown > 0.5 or done == total:
                self._shown = now
                self._bar.set_description_str("training" if done == total else f"training (samples {done / total:.0%})")
            return
        bar = self._bar_for(name, total)
        bar.update(done - bar.n)

    def step(self, report: "StepReport") -> None:
        bar = self._bar_for("training", report.steps)
        if bar.n == 0 and report.step > 1:
            bar.initial = bar.n = report.step - 1  # After resuming, the rate only counts this session's steps.
        now = time.monotonic()
        if now - self._shown > 0.5 or report.step == report.steps:
            self._shown = now
            alike = f", likeness {report.likeness.likeness:.2f}" if report.likeness else ""
            memory = f", {report.memory / 2**30:.1f} GiB" if report.memory else ""
            bar.set_postfix_str(f"loss {report.loss:.4f}, lr {report.learning_rate:.1e}{alike}{memory}", refresh=False)
            bar.update(report.step - bar.n)

    def warning(self, message: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print_warning(message)


class JsonProgress(AbstractContextManager["JsonProgress"]):
    """Progress as lines of JSON on stdout: at most two per second, and one for the last step."""

    def __init__(self) -> None:
        self._shown = 0.0
        self._file = sys.stdout
        """Where it prints, even while other output to stdout is redirected."""

    def __exit__(self, *_: object) -> None:
        pass

    def phase(self, name: str, done: int, total: int) -> None:
        self._print(done == total, phase=name, done=done, total=total)

    def step(self, report: "StepReport") -> None:
        now = time.monotonic()
        if report.step == report.steps or now - self._shown > 0.5:
            loss = report.loss if math.isfinite(report.loss) else None  # JSON has no NaN
            self._print(
                True, phase="training", step=report.step, steps=report.steps, loss=loss,
                learning_rate=report.learning_rate, seconds_per_step=report.seconds_per_step,
                seconds_left=report.seconds_left, memory=report.memory,
                likeness=report.likeness and dataclasses.asdict(report.likeness),
            )  # fmt: skip

    def warning(self, message: str) -> None:
        self._print(True, warning=message)

    def print(self, values: Mapping[str, Any]) -> None:
        print(json.dumps(values), file=self._file, flush=True)

    def _print(self, always: bool, **values: Any) -> None:
        if always or time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            self.print(values)
