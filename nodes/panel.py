"""What a training tells the browser: its state, for the live panel."""

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
"""Photos that the panel shows beside the samples."""
SERIES = {"history": "loss", "learning_rates": "learning_rate", "likenesses": "likeness"}
"""Name in a state -> the value of the news of a step whose course it is, as a list of (step, value)."""
TRAINING = ("training", "samples")
"""Phases in which there is something to keep."""
ENDED = ("done", "stopped", "failed")
"""Phases after which nothing more comes."""
SAVE_INTERVAL = 10.0
"""Seconds between two times that the states are saved while a training goes on."""
KEPT = 20
"""States that are kept on disk, of the nodes that trained last."""

_states: dict[str, dict[str, Any]] = {}
"""Node id -> the last state of its training, for pages that are opened later. The last one begun is the last here."""
_wanted_stops: set[str] = set()


def begin(node_id: str, photos: Sequence[Photo]) -> None:
    """Forgets the node's last training, and a stop that came too late for it."""
    shown = [photo.image(shorter_side=SAMPLE_SIDE) for photo in photos[:PHOTOS]]
    _states.pop(node_id, None)
    _states[node_id] = {}
    _wanted_stops.discard(node_id)
    news = {"workflow": _workflow_id(), "phase": "reading the model", "photos": data_urls(shown)}
    publish(node_id, {"begin": True, **news})


def _workflow_id() -> str | None:
    """The id of the workflow that is running, as a page's graph has it; None for a prompt that no page has sent."""
    for _, _, _, extra, *_ in list(PromptServer.instance.prompt_queue.currently_running.values()):
        match extra:
            case {"extra_pnginfo": {"workflow": {"id": str(workflow_id)}}}:
                return workflow_id
    return None


def publish(node_id: str, news: Mapping[str, Any]) -> None:
    """Sends what is new of a training to every open page, and keeps it for those that open later."""
    global _saved
    state = _states[node_id]
    points = {series: (news["step"], news[value]) for series, value in SERIES.items() if value in news}
    for series, (step, value) in points.items():
        # Steps from before the server was killed are taken again.
        state[series] = [*(point for point in state.get(series, ()) if point[0] < step), (step, value)]
    state.update(news)
    PromptServer.instance.send_sync(EVENT, {"node": node_id, "points": points, **news})
    if "begin" in news or state.get("phase") in ENDED or time.monotonic() - _saved > SAVE_INTERVAL:
        _saved = time.monotonic()
        kept = dict(list(_states.items())[-KEPT:])
        with suppress(BadFile):  # a full disk is no reason to end a training
            write_text(_states_file(), json.dumps(kept))


_saved = 0.0
"""When the states were saved last, on time.monotonic()."""


def _states_file() -> Path:
    return make_folder(Path(folder_paths.get_user_directory())) / "facelora-training.json"


def _read_states() -> None:
    """Takes up the states from before the server was restarted; a training that was running then is not any more."""
    try:
        states = read_json(_states_file())
    except BadFile:  # none yet, or not readable
        return
    if not isinstance(states, dict) or not all(isinstance(state, dict) for state in states.values()):
        return
    for node_id, state in states.items():
        _states[node_id] = state if state.get("phase") in ENDED else state | {"phase": "stopped"}


def stop_is_wanted(node_id: str) -> bool:
    """Whether somebody has pressed the stop-and-keep button."""
    return node_id in _wanted_stops


def data_urls(images: Sequence[Image.Image]) -> list[str]:
    """The pictures as small JPEGs that travel inside a message."""
    urls = []
    for image in images:
        small = image.convert("RGB")
        small.thumbnail((SAMPLE_SIDE, SAMPLE_SIDE))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        urls.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return urls


def add_routes() -> None:
    """GET /facelora/training: the states of all trainings; POST /facelora/stop {"node": id}: end now, keep the result."""
    routes = PromptServer.instance.routes
    _read_states()

    @routes.get("/facelora/training")
    async def training(_: web.Request) -> web.Response:
        return web.json_response({node_id: dict(state) for node_id, state in list(_states.items())})

    @routes.post("/facelora/stop")
    async def stop(request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # a form on a page of another site can send other types
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
