"""What the nodes tell the browser: lines of text under a node, and the state of a training for its live panel."""

# pyright: reportMissingImports=false

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from aiohttp import web
from PIL import Image
from server import PromptServer

EVENT = "facelora.training"
SAMPLE_SIDE = 256
"""Longest side of a sample in the panel, in pixels."""

_states: dict[str, dict[str, Any]] = {}
"""Node id -> the last state of its training, for a page that is opened in the middle of it."""
_wanted_stops: set[str] = set()


def show_text(node: Any, text: str) -> None:
    """Shows a few lines under a node class that asked for its hidden unique_id."""
    if PromptServer.instance is not None and node.hidden.unique_id is not None:
        PromptServer.instance.send_progress_text(text, node.hidden.unique_id)


def begin(node_id: str, history: Sequence[tuple[int, float]]) -> None:
    """Forgets the node's last training, and a stop that came too late for it. `history` grows while it trains."""
    _states[node_id] = {"history": history}
    _wanted_stops.discard(node_id)


def publish(node_id: str, news: Mapping[str, Any]) -> None:
    """Sends what is new of a training to every open page, and keeps it for those that open later."""
    _states[node_id].update(news)
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
        return web.json_response(_states)

    @routes.post("/facelora/stop")
    async def stop(request: web.Request) -> web.Response:
        node_id = str((await request.json()).get("node"))
        if _states.get(node_id, {}).get("phase") != "training":
            return web.json_response({"error": f"node {node_id} is not training"}, status=404)
        _wanted_stops.add(node_id)
        return web.json_response({"stopping": node_id})
