"""The file that an interrupted run goes on from: when it is written, and how a run is brought back from it."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import BadConfig
from .callbacks import StopAndKeep
from .checkpoints import Checkpoints
from .state import read_state


class StateFile:
    """Where the state of a run is kept while the run is unfinished. Without a path nothing is written or restored."""

    def __init__(self, path: Path | None, identity: Mapping[str, str], checkpoints: Checkpoints):
        """`identity` is what `run_identity` gives: a run can only go on from a state that has an equal one."""
        self._path = path
        self._identity, self._checkpoints = identity, checkpoints
        self._last = time.monotonic()

    def restore(self) -> None:
        """Brings the run to where the file has it, if there is one. BadConfig where it belongs to another or longer run."""
        if self._path is None or not self._path.exists():
            return
        state, steps = read_state(self._path, self._identity), self._checkpoints.config.steps
        if state.step > steps:
            raise BadConfig(f"{self._path.name}: is at step {state.step} already, beyond steps = {steps}")
        self._checkpoints.restore(state)

    def save(self) -> None:
        """Writes the state, once there has been a step. TrainingDiverged, and no file, when it is not finite."""
        run = self._checkpoints.run
        if self._path is not None and run.step:
            run.check_finite()
            self._checkpoints.state(self._identity).save(self._path)

    def save_when_due(self) -> None:
        """Writes the state between two steps when it was last written `state_interval` seconds ago."""
        config = self._checkpoints.config
        if self._checkpoints.run.step < config.steps and time.monotonic() - self._last >= config.state_interval:
            self.save()
            self._last = time.monotonic()

    @contextlib.contextmanager
    def saved_when_cancelled(self) -> Iterator[None]:
        """Within it a cancel leaves a state: whatever is raised, apart from StopAndKeep, goes on once that is written."""
        try:
            yield
        except StopAndKeep:
            raise
        except BaseException:
            # A cancel, also ComfyUI's and Ctrl-C's, which are no Exceptions.
            self.save()
            raise
