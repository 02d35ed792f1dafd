"""The addresses that the pack's pages ask for training runs, people and photos. Those of one node are beside the node."""

# pyright: reportMissingImports=false

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Any
from urllib.parse import quote

import folder_paths
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from comfy.model_management import get_torch_device
from server import PromptServer

from nodes import EXTENSION_WEB_DIRS  # pyright: ignore  # those of ComfyUI

from ....core.doctor import examine, format_doctor
from ....core.errors import BadConfig, BadFile, BadPhoto, FaceLoraError
from ....core.storage.plain_values import parse_json
from ..folders import opened, refusal, without_server_paths
from ..save import renamed
from . import dropped
from .photos import (
    DEFAULT_RESOLUTION,
    NO_FOLDER,
    PHOTOS,
    USES,
    read_checked,
    thumbnail,
    with_own_names,
    write_caption,
)
from .prompts import aim, queued_photos, waiting_runs
from .runs import QueuedRun
from .state import app
from .users import note_user, sign, user_of

MOST_PIXELS = 16384
"""The highest resolution that photos are checked for."""
WEB = Path(__file__).resolve().parents[3] / "web"


def add_routes() -> None:
    """Add the addresses that docs/architecture.md lists, and begin to note users and the ends of prompts."""
    server = PromptServer.instance
    app().watch_ends()
    server.app.middlewares.append(note_user)
    server.add_on_prompt_handler(sign)
    server.add_on_prompt_handler(aim)
    # Where earlier versions kept small pictures of everybody's photos.
    (Path(folder_paths.get_user_directory()) / "facelora-training.json").unlink(missing_ok=True)
    _add_run_routes(server)
    _add_people_routes(server)
    _add_photo_routes(server)
    _add_help_route(server)


async def _sent(request: web.Request, **fields: type | UnionType) -> list[Any]:
    """Return these fields of the JSON object in a request, each of its type. The answer to a request without them is 400."""
    try:
        given = parse_json(await request.read())
        values = [given[name] for name in fields]
        if all(map(isinstance, values, fields.values())):
            return values
    except (KeyError, TypeError, ValueError):
        pass
    answer = {"error": f"send a JSON object with {' and '.join(fields)}"}
    raise web.HTTPBadRequest(text=json.dumps(answer), content_type="application/json")


def _add_run_routes(server: PromptServer) -> None:
    @server.routes.get("/facelora/training")
    async def training(request: web.Request) -> web.Response:
        user = user_of(request)
        app().open_page(request.query.get("client"), user)
        states = app().runs.of(user)
        keys = [state.get("person", "") for state in states]
        lost = await asyncio.to_thread(lambda: [app().people.lost(user, key) for key in keys])
        return web.json_response([state | {"lost": one} for state, one in zip(states, lost, strict=True)])

    @server.routes.get("/facelora/waiting")
    async def waiting(request: web.Request) -> web.Response:
        return web.json_response(waiting_runs(user_of(request)))

    @server.routes.post("/facelora/stop")
    async def stop(request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # a form on a page of another site can send other types
            return web.json_response({"error": "send JSON, as application/json"}, status=415)
        prompt, node = await _sent(request, prompt=str, node=str | int)
        run = app().runs.stop(user_of(request), prompt, str(node))
        if run is None:
            return web.json_response(
                {"error": f"you have no training run in node {node} of prompt {prompt}"}, status=404
            )
        app().publish(run, {"stopping": True})
        return web.json_response({"stopping": run.node})

    @server.routes.get("/facelora/machine")
    async def machine(request: web.Request) -> web.Response:
        report = await asyncio.to_thread(examine, get_torch_device())
        return web.Response(text=format_doctor(report))


def _add_people_routes(server: PromptServer) -> None:
    routes, records = server.routes, app().people

    @routes.get("/facelora/people")
    async def listed(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(records.of, user_of(request), app().running()))

    @routes.get("/facelora/people/{key}")
    async def graph(request: web.Request) -> web.Response:
        return web.json_response(records.graph_of(user_of(request), request.match_info["key"]))

    @routes.patch("/facelora/people/{key}")
    async def rename(request: web.Request) -> web.Response:
        user, key = user_of(request), request.match_info["key"]
        (name,) = await _sent(request, name=str)
        try:
            named = await asyncio.to_thread(records.rename, user, key, name, app().running(), renamed)
        except FaceLoraError as problem:
            return refusal(problem)
        for state in app().runs.of(user):
            if state.get("person") == key and "file" in state:
                run = QueuedRun(user, state["prompt"], state["workflow"], state["node"])
                app().publish(run, {"file": f"{Path(named).name}.safetensors"})
        return web.json_response({"name": named})

    @routes.get("/facelora/people/{key}/files")
    async def files(request: web.Request) -> web.Response:
        asked = user_of(request), request.match_info["key"], queued_photos()
        return web.json_response(await asyncio.to_thread(records.files_to_delete, *asked))

    @routes.get("/facelora/people/{key}/consent")
    async def consent(request: web.Request) -> web.Response:
        return await _consent(request, {})

    @routes.patch("/facelora/people/{key}/consent")
    async def write_consent(request: web.Request) -> web.Response:
        return await _consent(request, *await _sent(request, written=dict))

    async def _consent(request: web.Request, written: dict[str, Any]) -> web.Response:
        try:
            key = request.match_info["key"]
            return web.json_response(await asyncio.to_thread(records.consent, user_of(request), key, written))
        except FaceLoraError as problem:
            return refusal(problem)

    @routes.get("/facelora/people/{key}/headshots")
    async def headshots(request: web.Request) -> web.Response:
        name, content = await asyncio.to_thread(records.headshots_zip, user_of(request), request.match_info["key"])
        header = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(f'{name}.zip', '', errors='replace')}"}
        return web.Response(body=content, content_type="application/zip", headers=header)

    @routes.get("/facelora/people/{key}/styles")
    async def styles(request: web.Request) -> web.Response:
        key = request.match_info["key"]
        return web.json_response(await asyncio.to_thread(records.styles_of, user_of(request), key))

    @routes.delete("/facelora/people/{key}")
    async def delete(request: web.Request) -> web.Response:
        user, key = user_of(request), request.match_info["key"]
        try:
            place, deleted = await asyncio.to_thread(records.delete, user, key, app().running(), queued_photos())
        except BadConfig as problem:
            return refusal(problem, 409)
        except OSError as problem:  # on Windows, another program may read the file
            advice = "Close the program that uses it, then delete again"
            reason = f"{problem.filename}: cannot be deleted ({problem.strerror}). {advice}"
            return web.json_response({"error": without_server_paths(reason)}, status=409)
        app().runs.forget(QueuedRun(user, **place))
        return web.json_response({"deleted": deleted})


def _add_photo_routes(server: PromptServer) -> None:
    routes = server.routes

    @routes.get("/facelora/photo")
    async def photo(request: web.Request) -> web.Response:
        try:
            small = await asyncio.to_thread(thumbnail, request.query.get("name", ""), user_of(request))
        except BadPhoto as problem:
            return refusal(problem, 404)
        return web.Response(body=small, content_type="image/jpeg")

    @routes.post("/facelora/photos")
    async def add(request: web.Request) -> web.Response:
        if request.headers.get("Origin") == "null":  # a page in a sandbox, of any site
            return web.json_response({"error": "this page may not add photos"}, status=403)
        user = user_of(request)
        form: Any = {}
        with suppress(AssertionError, HttpProcessingError, LookupError, RuntimeError, ValueError):  # not a form
            form = await request.post()
        if user is None or not isinstance(file := form.get("file"), web.FileField):
            return web.json_response({"error": "send a form with the fields person, folder and file"}, status=400)
        person, folder = (str(form.get(name, "")) for name in ("person", "folder"))
        try:
            name = await asyncio.to_thread(
                dropped.add, user, person, folder, Path(file.filename).name, file.file.read()
            )
        except (BadFile, BadPhoto) as problem:
            return refusal(problem)
        return web.json_response({"name": name})

    @routes.delete("/facelora/photos")
    async def delete(request: web.Request) -> web.Response:
        (names,) = await _sent(request, names=list)
        user, chosen = user_of(request), [name for name in names if isinstance(name, str)]
        deleted = await asyncio.to_thread(app().people.delete_photos, user, chosen, queued_photos())
        return web.json_response({"deleted": deleted})

    @routes.put("/facelora/caption")
    async def caption(request: web.Request) -> web.Response:
        name, given = await _sent(request, name=str, caption=str)
        text = " ".join(given.replace("\0", " ").split())
        try:
            await asyncio.to_thread(write_caption, name, text, user_of(request))
        except (BadFile, BadPhoto) as problem:
            return refusal(problem)
        return web.json_response({"caption": text})

    @routes.post("/facelora/check")
    async def check(request: web.Request) -> web.Response:
        user = user_of(request)
        try:
            asked = {"folder": NO_FOLDER} | parse_json(await request.read())
            folder, pictures, base = (str(asked.get(name, "")) for name in ("folder", "pictures", "base"))
            given, use = min(max(int(asked.get("resolution", 0)), 0), MOST_PIXELS), str(asked.get("use", PHOTOS))
        except (OverflowError, RecursionError, TypeError, ValueError):
            return web.json_response({"error": 'send {"folder", "pictures", "base", "resolution", "use"}'}, status=400)
        try:
            model = None if given else await asyncio.to_thread(opened, base)
            resolution = model.resolution if model else given or DEFAULT_RESOLUTION
            use = use if use in USES else PHOTOS
            checked = await asyncio.to_thread(read_checked, folder, pictures, user, resolution, use)
        except FaceLoraError as problem:
            return refusal(problem)
        return web.json_response(with_own_names(checked))


def _add_help_route(server: PromptServer) -> None:
    """Serve the English help page of a node in each language that it is not translated into."""

    async def help_page(request: web.Request) -> web.FileResponse:
        node, language = request.match_info["node"], request.match_info["language"]
        translated = WEB / "docs" / node / f"{language}.md"
        return web.FileResponse(translated if translated.is_file() else WEB / "docs" / f"{node}.md")

    for name in (name for name, folder in EXTENSION_WEB_DIRS.items() if Path(folder).resolve() == WEB):
        server.routes.get(rf"/extensions/{name}/docs/{{node:\w+}}/{{language:[\w-]+}}.md")(help_page)
