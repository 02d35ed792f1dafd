"""The live panel of a training: its state is sent to the open pages of its user, and kept for pages that are opened later."""

# pyright: reportMissingImports=false

import asyncio
import base64
import io
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web
from comfy.cli_args import args
from comfy.model_management import get_torch_device
from PIL import Image
from server import PromptServer

from ...core import __version__
from ...core.bench import examine, format_doctor
from ...core.photos import Photo
from ...core.pictures.gallery import SAME_PERSON, SOMEONE_ELSE
from .runs import Run, Runs

EVENT = "facelora.training"
SAMPLE_SIDE = 512
"""The longer side of a sample in pixels: more than the panel shows, since a click enlarges it."""
PHOTO_SIDE = 256
"""The longer side of a photo in the panel, in pixels."""
PHOTOS = 8
"""The number of photos that the panel shows beside the samples."""
LIMITS = (SOMEONE_ELSE, SAME_PERSON)
"""The likeness below which a picture is of someone else, and that from which it is of the same person."""
USER = "facelora_user"
"""The name, in a prompt's extra data, of the user who has queued it."""

_runs = Runs()
_pages: dict[str, str] = {}
"""The user of each open page, by the page's client id: what it said when it asked for the states."""
_asking: ContextVar[str | None] = ContextVar("asking", default=None)
"""The user whose request is being answered."""


def begin(node_id: str) -> Run:
    """The node's run in the prompt that is running now, with a new state."""
    run = _running(node_id)
    _runs.begin(run)
    publish(run, {"begin": True, "phase": "reading the model", "limits": LIMITS})
    return run


def _running(node_id: str) -> Run:
    (_, prompt, _, extra, *_), *_ = list(PromptServer.instance.prompt_queue.currently_running.values())
    workflow = None
    match extra:
        case {"extra_pnginfo": {"workflow": {"id": str(workflow)}}}:
            pass
    nobody = None if args.multi_user else "default"  # of a prompt that another pack has put into the queue
    return Run(extra.get(USER, nobody), prompt, workflow, node_id)


def publish(run: Run, news: Mapping[str, Any]) -> None:
    """Sends what is new about a run to its user's open pages, and keeps it for pages that are opened later."""
    points = _runs.add(run, news)
    message = {"prompt": run.prompt, "workflow": run.workflow, "node": run.node, "points": points, **news}
    for page, user in list(_pages.items()):
        if user == run.user:
            PromptServer.instance.send_sync(EVENT, message, page)


stop_is_wanted = _runs.stop_is_wanted


def data_urls(images: Sequence[Image.Image], side: int) -> list[str]:
    """The pictures as `data:` URLs of JPEGs whose longer side is at most `side` pixels."""
    urls = []
    for image in images:
        small = image.convert("RGB")
        small.thumbnail((side, side))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        urls.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return urls


def photo_urls(photos: Sequence[Photo]) -> list[str]:
    """The first of the photos, as many as the panel shows, as `data_urls` gives them."""
    return data_urls([photo.image(shorter_side=PHOTO_SIDE) for photo in photos[:PHOTOS]], PHOTO_SIDE)


def _user_of(request: web.Request) -> str | None:
    """The user as ComfyUI knows them, without --multi-user always the same one; None for a stranger."""
    try:
        return PromptServer.instance.user_manager.get_request_user_id(request)
    except KeyError:
        return None


@web.middleware
async def _note_user(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    _asking.set(_user_of(request))
    return await handler(request)


def _sign(queued: dict[str, Any]) -> dict[str, Any]:
    """The prompt as it was queued, with the user who has queued it, which ComfyUI does not note."""
    match queued.setdefault("extra_data", {}):
        case dict(extra):
            extra[USER] = _asking.get()
    return queued


def add_routes() -> None:
    """Adds what the panel asks for.

    GET /facelora/training: the user's runs; POST /facelora/stop {"prompt": id, "node": id}: end now, keep the result;
    GET /facelora/machine: the text of `facelora doctor`.
    """
    server = PromptServer.instance
    server.app.middlewares.append(_note_user)
    server.add_on_prompt_handler(_sign)
    # Where earlier versions kept small pictures of everybody's photos.
    (Path(folder_paths.get_user_directory()) / "facelora-training.json").unlink(missing_ok=True)

    @server.routes.get("/facelora/training")
    async def training(request: web.Request) -> web.Response:
        user, page = _user_of(request), request.query.get("client")
        if user is not None and page in server.sockets:
            for gone in _pages.keys() - server.sockets.keys():
                del _pages[gone]
            _pages[page] = user
        return web.json_response(_runs.of(user))

    @server.routes.post("/facelora/stop")
    async def stop(request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # a form on a page of another site can send other types
            return web.json_response({"error": "send JSON, as application/json"}, status=415)
        try:
            asked = await request.json()
            prompt, node = str(asked["prompt"]), str(asked["node"])
        except (ValueError, TypeError, KeyError):
            return web.json_response({"error": 'send {"prompt": ID, "node": ID}'}, status=400)
        run = _runs.stop(_user_of(request), prompt, node)
        if run is None:
            return web.json_response({"error": f"you have no training in node {node} of prompt {prompt}"}, status=404)
        publish(run, {"stopping": True})
        return web.json_response({"stopping": node})

    @server.routes.get("/facelora/machine")
    async def machine(request: web.Request) -> web.Response:
        report = await asyncio.to_thread(examine, get_torch_device(), False, __version__)
        return web.Response(text=format_doctor(report))
