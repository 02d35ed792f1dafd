"""The states of training runs that panels show. Only the user who queued a run sees it and can end it. Doesn't need ComfyUI."""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ....core.errors import BadFile
from ....core.photos import Photo
from ....core.storage.cache_folder import content_key, made_folder
from ....core.storage.drawn import DRAWN, jpeg_url
from ....core.storage.files import read_json, write_text
from ...shown import DONE, ENDED, SERIES, STEPPING, STOPPED, add_news

TRAINING = (STEPPING, "samples")
"""Phases in which a training run can be stopped and its LoRA kept."""
SAVE_INTERVAL = 10.0
"""Seconds between two saves of the states during a training run."""
KEPT = 20
"""The number of states kept for each user: those of the nodes that trained last."""
SAMPLE_SIDE = 512
"""The longer side of a sample in pixels. It is more than the panel shows, because a click enlarges it."""
PHOTO_SIDE = 256
"""The longer side of a photo in the panel, in pixels."""
PHOTOS = 8
"""The number of photos that the panel shows beside the samples."""

State = dict[str, Any]
"""What a panel shows of a run, with the run's own fields."""


@dataclass(frozen=True)
class QueuedRun:
    """A training node in a queued prompt."""

    user: str | None
    """The user who queued it; None if unknown. Then the run is shown to nobody."""
    prompt: str
    workflow: str | None
    """The id of the page's graph; None for a prompt that no page has sent."""
    node: str

    @property
    def place(self) -> tuple[str | None, str]:
        """The workflow and node in which the run is shown, until a later run of the same node replaces it."""
        return self.workflow, self.node


class Runs:
    """The states of the runs that were shown last, by user. They are kept in the cache folder when the server ends."""

    def __init__(self) -> None:
        self._states: dict[str | None, dict[tuple[str | None, str], State]] = {None: {}}
        self._before: State = {}  # what the last `begin` has replaced
        self._wanted_stops: set[tuple[str, str]] = set()
        self._saved = 0.0  # on time.monotonic()
        self._lock = threading.RLock()  # the node and the routes run in two threads

    def of(self, user: str | None) -> list[State]:
        """Return the user's states in the order in which the runs began, with clocks that show the present. [] for None."""
        if user is None:
            return []
        with self._lock:
            return [_at_present(state) for state in self._of(user).values()]

    def begin(self, run: QueuedRun) -> None:
        """Start a new state for the run, and drop a stop request that was too late for the last run."""
        with self._lock:
            states = self._of(run.user)
            self._before = states.pop(run.place, {})
            states[run.place] = {name: value for name, value in asdict(run).items() if name != "user"}
            for place in list(states)[:-KEPT]:
                del states[place]
            self._wanted_stops.clear()  # one run at a time

    def resumed(self, job: str) -> State:
        """Return what the run that was begun last continues: curves and seconds of the run before it in its place.

        It is empty unless both are of the job with that key. A finished run has no seconds to continue.
        """
        if self._before.get("job") != job:
            return {}
        shown = [*SERIES, *(["seconds"] if self._before.get("phase") != DONE else [])]
        return {name: self._before[name] for name in shown if name in self._before}

    def add(self, run: QueuedRun, news: Mapping[str, Any]) -> dict[str, tuple[int, float]]:
        """Add the news to the state, and return the new points of its curves, by the curve's name."""
        with self._lock:
            state = self._of(run.user)[run.place]
            points = add_news(state, news)
            if "seconds" in news:
                state["news_time"] = time.monotonic()
            if (
                news.keys() & {"begin", "photos"}
                or state.get("phase") in ENDED
                or time.monotonic() - self._saved > SAVE_INTERVAL
            ):
                self._saved = time.monotonic()
                self._save(run.user)
        return points

    def forget(self, run: QueuedRun) -> None:
        """Drop the state of a run if it is still the last one in its place."""
        with self._lock:
            states = self._of(run.user)
            if states.get(run.place, {}).get("prompt") == run.prompt:
                del states[run.place]
                self._save(run.user)

    def stop(self, user: str | None, prompt: str, node: str) -> QueuedRun | None:
        """Ask a run to stop and keep its LoRA, and return it; None if the user has no such run, or it is not training."""
        for state in self.of(user):
            if (state["prompt"], state["node"]) == (prompt, node) and state.get("phase") in TRAINING:
                self._wanted_stops.add((prompt, node))
                return QueuedRun(user, prompt, state["workflow"], node)
        return None

    def stop_is_wanted(self, run: QueuedRun) -> bool:
        """Return whether the run's user has asked for it to stop and keep its LoRA."""
        return (run.prompt, run.node) in self._wanted_stops

    def _of(self, user: str | None) -> dict[tuple[str | None, str], State]:
        if user is not None and user not in self._states:
            self._states[user] = _saved_states(user)
        return self._states[user]

    def _save(self, user: str | None) -> None:
        if user is not None:
            with suppress(BadFile):  # a full disk must not end a training run
                write_text(_file(user), json.dumps(list(self._of(user).values())))


def sample_urls(images: Sequence[Image.Image]) -> list[str]:
    """Return the samples as `data:` URLs of small JPEGs."""
    return [jpeg_url(image, SAMPLE_SIDE, DRAWN) for image in images]


def photo_urls(photos: Sequence[Photo]) -> list[str]:
    """Return the first photos, as many as the panel shows, as `data:` URLs."""
    return [jpeg_url(photo.image(shorter_side=PHOTO_SIDE), PHOTO_SIDE, mark=None) for photo in photos[:PHOTOS]]


def _at_present(state: State) -> State:
    """Return the state with the time since its last news added to its clock, if the run has not ended."""
    shown = {name: value for name, value in state.items() if name != "news_time"}
    if "news_time" in state and state.get("phase") not in ENDED:
        passed = time.monotonic() - state["news_time"]
        shown["seconds"] += passed
        if "seconds_left" in shown:
            shown["seconds_left"] = max(0, shown["seconds_left"] - passed)
    return shown


def _file(user: str) -> Path:
    """Return the file of a user's states. They contain small pictures, so the folder is private and the name hides the user."""
    return made_folder("panels") / f"{content_key('panels', user)}.json"


def _saved_states(user: str) -> dict[tuple[str | None, str], State]:
    """Return the states saved before the server was restarted. A training run that was running then counts as stopped."""
    try:
        states = {
            QueuedRun(user, state["prompt"], state["workflow"], state["node"]).place: state
            for state in read_json(_file(user))
        }
    except (BadFile, TypeError, KeyError):  # no file yet, or one that was not written here
        return {}
    return {
        place: state | {"ended": True} | ({} if state.get("phase") in ENDED else {"phase": STOPPED})
        for place, state in states.items()
    }
