"""What the nodes tell the browser: lines of text under a node, and the state of a training for its live panel."""

# pyright: reportMissingImports=false

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web
from PIL import Image
from server import PromptServer

from ..core.photos import Photo

EVENT = "facelora.training"
SAMPLE_SIDE = 256
"""Longest side of a sample in the panel, in pixels."""

PHOTOS = 8
"""Photos that the panel shows beside the samples."""
SERIES = {"history": "loss", "learning_rates": "learning_rate", "likenesses": "likeness"}
"""Name in a state -> the value of the news of a step whose course it is, as a list of (step, value). web/ has the same."""

_states: dict[str, dict[str, Any]] = {}
"""Node id -> the last state of its training, for a page that is opened in the middle of it."""
_wanted_stops: set[str] = set()


def show_text(node: Any, text: str) -> None:
    """Shows a few lines under a node class that asked for its hidden unique_id."""
    if PromptServer.instance is not None and node.hidden.unique_id is not None:
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def begin(node_id: str, history: Sequence[tuple[int, float]], photos: Sequence[Photo]) -> None:
    """Forgets the node's last training, and a stop that came too late for it. `history` is the loss before this run."""
    shown = [photo.image(shorter_side=SAMPLE_SIDE) for photo in photos[:PHOTOS]]
    _states[node_id] = {}
    _wanted_stops.discard(node_id)
    news = {"workflow": _workflow_id(), "history": list(history), "photos": data_urls(shown)}
    publish(node_id, {"begin": True, **news})


def _workflow_id() -> str | None:
    """The id of the workflow that is running, as a page's graph has it; None for a prompt that no page has sent."""
    for _, _, _, extra, *_ in list(PromptServer.instance.prompt_queue.currently_running.values()):
        return extra.get("extra_pnginfo", {}).get("workflow", {}).get("id")
    return None


def publish(node_id: str, news: Mapping[str, Any]) -> None:
    """Sends what is new of a training to every open page, and keeps it for those that open later."""
    state = _states[node_id]
    for series, value in SERIES.items():
        if value in news and "step" in news:
            # Steps from before the server was killed are taken again.
            earlier = [point for point in state.get(series, ()) if point[0] < news["step"]]
            state[series] = [*earlier, (news["step"], news[value])]
    state.update(news)
    PromptServer.instance.send_sync(EVENT, {"node": node_id, **news})


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

    @routes.get("/facelora/training")
    async def training(_: web.Request) -> web.Response:
        return web.json_response({node_id: dict(state) for node_id, state in list(_states.items())})

    @routes.post("/facelora/stop")
    async def stop(request: web.Request) -> web.Response:
        node_id = str((await request.json()).get("node"))
        if _states.get(node_id, {}).get("phase") != "training":
            return web.json_response({"error": f"node {node_id} is not training"}, status=404)
        _wanted_stops.add(node_id)
        publish(node_id, {"stopping": True})
        return web.json_response({"stopping": node_id})
