"""The file that an interrupted run goes on from: when it is written, and how the run is restored."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import BadConfig
from .callbacks import StopAndKeep
from .checkpoints import Checkpoints
from .state import read_state


class StateFile:
    """The file for the state of an unfinished run. Without a path nothing is written or restored."""

    def __init__(self, path: Path | None, identity: Mapping[str, str], checkpoints: Checkpoints):
        """`identity` is the result of `run_identity`; a run can only go on from a state with an equal one."""
        self._path = path
        self._identity, self._checkpoints = identity, checkpoints
        self._last = time.monotonic()

    def restore(self) -> None:
        """Restores the run from the file, if there is one. Raises BadConfig for the state of another or longer run."""
        if self._path is None or not self._path.exists():
            return
        state, steps = read_state(self._path, self._identity), self._checkpoints.config.steps
        if state.step > steps:
            raise BadConfig(f"{self._path.name}: is at step {state.step} already, beyond steps = {steps}")
        self._checkpoints.restore(state)

    def save(self) -> None:
        """Writes the state, unless no step was made yet. Raises TrainingDiverged, and writes nothing, when it is not finite."""
        run = self._checkpoints.run
        if self._path is not None and run.step:
            run.check_finite()
            self._checkpoints.state(self._identity).save(self._path)

    def save_when_due(self) -> None:
        """Writes the state between two steps when the last time was at least `state_interval` seconds ago."""
        config = self._checkpoints.config
        if self._checkpoints.run.step < config.steps and time.monotonic() - self._last >= config.state_interval:
            self.save()
            self._last = time.monotonic()

    @contextlib.contextmanager
    def saved_when_cancelled(self) -> Iterator[None]:
        """A context that writes the state when anything but StopAndKeep is raised in it, and raises it again."""
        try:
            yield
        except StopAndKeep:
            raise
        except BaseException:
            # BaseException, since ComfyUI's cancel and Ctrl-C are not Exceptions.
            self.save()
            raise
