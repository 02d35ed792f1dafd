"""The live panel of a training: its state is sent to every open page, and kept for pages that are opened later."""

# pyright: reportMissingImports=false

import base64
import io
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web
from PIL import Image
from server import PromptServer

from ..core.errors import BadFile
from ..core.photos import Photo
from ..core.storage.files import make_folder, read_json, write_text

EVENT = "facelora.training"
SAMPLE_SIDE = 256
"""Longest side of a sample in the panel, in pixels."""

PHOTOS = 8
"""The number of photos that the panel shows beside the samples."""
SERIES = {"history": "loss", "learning_rates": "learning_rate", "likenesses": "likeness"}
"""The curves in a state, lists of (step, value), with the name of the value that each step's news has for it."""
TRAINING = ("training", "samples")
"""Phases in which a training can be stopped and its LoRA kept."""
ENDED = ("done", "stopped", "failed")
"""Phases that a training ends with."""
SAVE_INTERVAL = 10.0
"""Seconds between two saves of the states while a training goes on."""
KEPT = 20
"""The number of states kept on disk: those of the nodes that trained last."""

_states: dict[str, dict[str, Any]] = {}
"""The state of each node's last training, by node id, in the order in which the trainings began."""
_wanted_stops: set[str] = set()


def begin(node_id: str, photos: Sequence[Photo]) -> None:
    """Starts a new state for the node, which shows the photos, and drops a stop request that came too late for the last one."""
    shown = [photo.image(shorter_side=SAMPLE_SIDE) for photo in photos[:PHOTOS]]
    _states.pop(node_id, None)
    _states[node_id] = {}
    _wanted_stops.discard(node_id)
    news = {"workflow": _workflow_id(), "phase": "reading the model", "photos": data_urls(shown)}
    publish(node_id, {"begin": True, **news})


def _workflow_id() -> str | None:
    """The id of the running workflow, as in a page's graph; None for a prompt that was sent without a page."""
    for _, _, _, extra, *_ in list(PromptServer.instance.prompt_queue.currently_running.values()):
        match extra:
            case {"extra_pnginfo": {"workflow": {"id": str(workflow_id)}}}:
                return workflow_id
    return None


def publish(node_id: str, news: Mapping[str, Any]) -> None:
    """Sends what is new about a training to every open page, and keeps it for pages that are opened later."""
    global _saved
    state = _states[node_id]
    points = {series: (news["step"], news[value]) for series, value in SERIES.items() if value in news}
    for series, (step, value) in points.items():
        # Where the server was killed, steps after the last saved state are done again.
        state[series] = [*(point for point in state.get(series, ()) if point[0] < step), (step, value)]
    state.update(news)
    PromptServer.instance.send_sync(EVENT, {"node": node_id, "points": points, **news})
    if "begin" in news or state.get("phase") in ENDED or time.monotonic() - _saved > SAVE_INTERVAL:
        _saved = time.monotonic()
        kept = dict(list(_states.items())[-KEPT:])
        with suppress(BadFile):  # a full disk is no reason to end a training
            write_text(_states_file(), json.dumps(kept))


_saved = 0.0
"""The time of the last save of the states, by time.monotonic()."""


def _states_file() -> Path:
    return make_folder(Path(folder_paths.get_user_directory())) / "facelora-training.json"


def _read_states() -> None:
    """Reads the states saved before the server was restarted; a training that was running then counts as stopped."""
    try:
        states = read_json(_states_file())
    except BadFile:  # none yet, or not readable
        return
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        return
    for node_id, state in states.items():
        _states[node_id] = state if state.get("phase") in ENDED else state | {"phase": "stopped"}


def stop_is_wanted(node_id: str) -> bool:
    """Whether a user has asked for the node's training to stop and keep its LoRA."""
    return node_id in _wanted_stops


def data_urls(images: Sequence[Image.Image]) -> list[str]:
    """The pictures as `data:` URLs of JPEGs whose longer side is at most SAMPLE_SIDE pixels."""
    urls = []
    for image in images:
        small = image.convert("RGB")
        small.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        urls.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return urls


def add_routes() -> None:
    """Adds two addresses to the server.

    GET /facelora/training answers with the states of all trainings, by node id. POST /facelora/stop with {"node": ID} as
    JSON ends a training after the step that it is in and keeps its LoRA.
    """
    routes = PromptServer.instance.routes
    _read_states()

    @routes.get("/facelora/training")
    async def training(_: web.Request) -> web.Response:
        return web.json_response({node_id: dict(state) for node_id, state in list(_states.items())})

    @routes.post("/facelora/stop")
    async def stop(request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # a page of another site can post a form, but not JSON
            return web.json_response({"error": "send JSON, as application/json"}, status=415)
        try:
            node_id = str((await request.json())["node"])
        except (ValueError, TypeError, KeyError):
            return web.json_response({"error": 'send {"node": ID}'}, status=400)
        if _states.get(node_id, {}).get("phase") not in TRAINING:
            return web.json_response({"error": f"node {node_id} is not training"}, status=404)
        _wanted_stops.add(node_id)
        publish(node_id, {"stopping": True})
        return web.json_response({"stopping": node_id})
