"""What the server remembers while it runs: one `App`, made when the server starts. Nothing in it grows without limit."""

# pyright: reportMissingImports=false

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from server import PromptServer

from ....core.pictures.gallery import SAME_PERSON, SOMEONE_ELSE
from ....core.progress import READING
from ....core.training.job import TRAINING_VERSION
from ..style_pack import NOT_VARIED
from .people import RUNNING, People, digest_of
from .prompts import Prompt, running_prompt, running_prompts
from .runs import QueuedRun, Runs

EVENT = "facelora.training"
LIMITS = (SOMEONE_ELSE, SAME_PERSON)
"""The limits of likeness: below the first, a picture shows someone else; above the second, the same person."""
MOST_PICTURES = 10_000
"""How many headshots are remembered, those drawn last."""
MOST_RUNS = 1000
"""How many training runs are remembered, those that ran last."""
Key = TypeVar("Key")
Value = TypeVar("Value")


class Latest(dict[Key, Value]):
    """The values that were set last, at most `most`."""

    def __init__(self, most: int):
        super().__init__()
        self._most = most

    def __setitem__(self, key: Key, value: Value) -> None:
        self.pop(key, None)
        super().__setitem__(key, value)
        for old in list(self)[: -self._most]:
            self.pop(old, None)


@dataclass(frozen=True)
class HeadshotFacts:
    """What is known of a headshot. ComfyUI shows it again for a prompt that it doesn't need to run."""

    likeness: float | None = None
    style: tuple[str, str] | None = None
    """The style pack and the style."""
    seed: int | None = None
    """Its seed if it is an item of a style pack's list. Variations of such an item have none."""


class App:
    """The training runs, people and headshots that pages show, and the pages that are open."""

    def __init__(self, server: PromptServer) -> None:
        self.runs = Runs()
        self.people = People()
        # Files that Save Headshots has saved, with their digests: by start of the name, LoRA and picture.
        self.saved: Latest[tuple[str, str, str], tuple[Any, str]] = Latest(MOST_PICTURES)
        # What Likeness Score has found, by `picture_key`: None for a picture without a face.
        self.likenesses: Latest[str, float | None] = Latest(MOST_PICTURES)
        # The files that Train Face LoRA has returned, by the name given in the node.
        self.outputs: Latest[str, set[Path]] = Latest(MOST_RUNS)
        self._server = server
        # The last training run of each `Prompt.training`: its run and the key of its record.
        self._trained: Latest[str, tuple[QueuedRun, str]] = Latest(MOST_RUNS)
        self._headshots: Latest[str, HeadshotFacts] = Latest(MOST_PICTURES)  # by digest
        # What each Likeness Score of the running prompt has put in order: numbers before, and likeness.
        self._ranked: dict[str, Sequence[tuple[int, float]]] = {}
        # The user of each open page, by the client id that the page sent when it asked for the states.
        self._pages: dict[str, str] = {}

    def begin(self, node_id: str) -> QueuedRun:
        """Return the node's run in the prompt that is running now, with a new state."""
        prompt = running_prompt()
        run = QueuedRun(prompt.user, prompt.id, prompt.workflow, node_id)
        self.runs.begin(run)
        self.publish(run, {"begin": True, "phase": READING, "limits": LIMITS})
        return run

    def open_page(self, page: str | None, user: str | None) -> None:
        """Send a user's news to an open page from now on."""
        if user is not None and page is not None and page in self._server.sockets:
            self._pages = {one: its for one, its in self._pages.items() if one in self._server.sockets} | {page: user}

    def publish(self, run: QueuedRun, news: Mapping[str, Any]) -> None:
        """Send news about a run to its user's open pages, and keep it for pages that are opened later."""
        points = self.runs.add(run, news)
        message = {"prompt": run.prompt, "workflow": run.workflow, "node": run.node, "points": points, **news}
        for page, user in self._pages.items():
            if user == run.user:
                self._server.send_sync(EVENT, message, page)

    def remember(self, run: QueuedRun, job: str, name: str, **facts: Any) -> str:
        """Begin the record of a training run under a name, by its job's key, with the graph of its page. Return its key."""
        prompt, key = running_prompt(), self.people.key_of(run.user, job, name)
        place = {"prompt": run.prompt, "workflow": run.workflow, "node": run.node}
        facts |= {"job": job, "name": name, "graph": prompt.page, "run": place, "training": TRAINING_VERSION}
        self.people.note(run.user, key, phase=RUNNING, begun=time.time(), **facts)
        if prompt.training:
            self._trained[prompt.training] = (run, key)
        return key

    def rank(self, node_id: str, ranked: Sequence[tuple[int, float]]) -> None:
        """Note the pictures that a node of the running prompt has put in order: each one's number before, and its likeness."""
        self._ranked[node_id] = ranked

    def running(self) -> set[str]:
        """Return the ids of the prompts that run now, and of those whose training they reuse."""
        running = running_prompts()
        reused = [self._trained[one.training][0].prompt for one in running if one.training in self._trained]
        return {*reused, *(one.id for one in running)}

    def watch_ends(self) -> None:
        """Note each prompt that ends.

        This replaces a method of ComfyUI's queue. Its events go only to the page that queued a prompt. Its hook
        `CacheProvider.on_prompt_end` is called before the history has the prompt's outputs, and doesn't get them.
        """
        queue = self._server.prompt_queue
        done = queue.task_done

        def task_done(item_id: int, history_result: Mapping[str, Any], *rest: Any, **named: Any) -> None:
            prompt = Prompt.of(queue.currently_running[item_id])
            with _never_raising():  # before the prompt counts as done: whoever waits for it asks for its headshots next
                self.note_headshots(prompt, history_result.get("outputs", {}))
            done(item_id, history_result, *rest, **named)
            with _never_raising():
                self._note_end(prompt)

        queue.task_done = task_done

    def note_headshots(self, prompt: Prompt, outputs: Mapping[str, Any]) -> None:
        """Add the pictures that a prompt has saved to the training run whose LoRA drew them, and show them in its panel."""
        ranked, self._ranked = self._ranked, {}
        run, key = self._trained.get(prompt.training, (None, None))
        if run is None or key is None:
            return
        headshots = []
        for images, sources in prompt.saved(outputs, run.node):
            names = [f"{image['subfolder']}/{image['filename']}".lstrip("/") for image in images]
            digests = [digest_of(name) for name in names]
            # The order is only known of pictures that come from a node's sorted ones.
            for judge, order in ranked.items():
                if (judge, 0) in sources and len(order) == len(images):
                    self._judge(prompt, digests, order, {node for node, _ in sources})
            facts = {
                name: self._headshots.get(digest, HeadshotFacts()) for name, digest in zip(names, digests, strict=True)
            }
            likeness = {name: one.likeness for name, one in facts.items()}
            styles = {name: one.style for name, one in facts.items() if one.style}
            self.people.add_headshots(run.user, key, dict(zip(names, digests, strict=True)), likeness, styles)
            headshots += [
                image
                | {"score": facts[name].likeness, "seed": facts[name].seed, "style": (facts[name].style or [None])[-1]}
                for image, name in zip(images, names, strict=True)
            ]
        # Another training run, or none if this one was deleted, may be shown in its place.
        is_shown = any(state["prompt"] == run.prompt for state in self.runs.of(run.user))
        if headshots and is_shown and run.workflow == prompt.workflow:
            self.publish(run, {"headshots": headshots})

    def _judge(
        self, prompt: Prompt, digests: Sequence[str], order: Sequence[tuple[int, float]], sources: set[str]
    ) -> None:
        """Note the likeness of pictures in that order, and their styles and seeds if a style pack has an item for each."""
        pack, vary, items = prompt.styles(sources)
        for digest, (number, likeness) in zip(digests, order, strict=True):
            facts = replace(self._headshots.get(digest, HeadshotFacts()), likeness=likeness)
            if len(items) == len(digests):
                item = items[number]
                seed = item.seed if vary in (NOT_VARIED, item.seed) else facts.seed
                facts = replace(facts, style=(pack, item.style), seed=seed)
            if digest:
                self._headshots[digest] = facts

    def _note_end(self, prompt: Prompt) -> None:
        """Show in the panels of a prompt that all of its nodes have run."""
        for state in self.runs.of(prompt.user):
            if state["prompt"] == prompt.id:
                self.publish(QueuedRun(prompt.user, prompt.id, state["workflow"], state["node"]), {"ended": True})


@contextmanager
def _never_raising() -> Iterator[None]:
    """Log a fault, which would end the thread in which ComfyUI runs prompts."""
    try:
        yield
    except Exception:
        logging.exception("FaceLoRA: the end of a prompt was not noted")


@cache
def app() -> App:
    """Return the server's one App. The first call makes it."""
    return App(PromptServer.instance)
