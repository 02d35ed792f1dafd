"""The file for resuming an interrupted run: when it is written, and how the run is restored."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from ..errors import BadConfig
from .callbacks import StopAndKeep
from .checkpoints import Checkpoints
from .state import read_state


class StateFile:
    """The file for the state of an unfinished run. Without a path, nothing is written or restored."""

    def __init__(self, path: Path | None, identity: Mapping[str, str], checkpoints: Checkpoints):
        """`identity` is the result of `run_identity`. A run can only continue from a state with an equal identity."""
        self._path = path
        self._identity, self._checkpoints = identity, checkpoints
        self._last = time.monotonic()

    def restore(self) -> None:
        """Restore the run from the file, if it exists. Raises BadConfig for the state of a different or longer run."""
        if self._path is None or not self._path.exists():
            return
        state, steps = read_state(self._path, self._identity), self._checkpoints.config.steps
        if state.step > steps:
            raise BadConfig(
                f"{self._path.name}: is already at step {state.step}, beyond steps = {steps}. Raise steps, or restart"
            )
        self._checkpoints.restore(state)

    def save(self) -> None:
        """Write the state, except before the first step. Raises TrainingDiverged without writing when it is not finite."""
        run = self._checkpoints.run
        if self._path is not None and run.step:
            run.check_finite()
            self._checkpoints.state(self._identity).save(self._path)

    def save_when_due(self) -> None:
        """Write the state between two steps if the last write was at least `state_interval` seconds ago."""
        config = self._checkpoints.config
        if self._checkpoints.run.step < config.steps and time.monotonic() - self._last >= config.state_interval:
            self.save()
            self._last = time.monotonic()

    @contextlib.contextmanager
    def saved_when_cancelled(self) -> Iterator[None]:
        """Write the state when anything but StopAndKeep is raised in this context, and raise it again."""
        try:
            yield
        except StopAndKeep:
            raise
        except BaseException:
            # BaseException, since ComfyUI's cancel and Ctrl-C are not Exceptions.
            self.save()
            raise
