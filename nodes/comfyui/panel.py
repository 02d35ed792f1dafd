"""The live panel of a training run. Its state is sent to its user's open pages, and kept for pages that are opened later."""

# pyright: reportMissingImports=false

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from operator import itemgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

import folder_paths
from aiohttp import web
from comfy.cli_args import args
from comfy.model_management import get_torch_device
from comfy_execution.utils import get_executing_context
from PIL import Image
from server import PromptServer

from nodes import NODE_CLASS_MAPPINGS  # pyright: ignore  # those of ComfyUI

from ...core.doctor import examine, format_doctor
from ...core.errors import BadConfig, FaceLoraError
from ...core.photos import Photo
from ...core.pictures.gallery import SAME_PERSON, SOMEONE_ELSE
from ...core.pictures.style_pack import StyledPrompt
from ...core.progress import READING
from ...core.storage.cache_folder import content_key
from ...core.storage.drawn import DRAWN, jpeg_url
from . import people
from .folders import refusal, without_server_paths
from .runs import QueuedRun, Runs
from .save import renamed
from .style_pack import NOT_VARIED, listed

EVENT = "facelora.training"
SAMPLE_SIDE = 512
"""The longer side of a sample in pixels. It is more than the panel shows, because a click enlarges it."""
PHOTO_SIDE = 256
"""The longer side of a photo in the panel, in pixels."""
PHOTOS = 8
"""The number of photos that the panel shows beside the samples."""
LIMITS = (SOMEONE_ELSE, SAME_PERSON)
"""The limits of likeness: below the first, a picture shows someone else; above the second, the same person."""
LOAD_PHOTOS, TRAIN, LIKENESS = "FaceLoRALoadPhotos", "FaceLoRATrain", "FaceLoRALikeness"
STYLES = "FaceLoRAStylePack"
USER = "facelora_user"
"""The name of the user who queued a prompt, in its extra data."""

_runs = Runs()
_trained: dict[str, tuple[QueuedRun, str]] = {}
"""The last training run of each `_training_of`: its run and the key of its record."""
_scores: dict[str, dict[str, list[tuple[int, float]]]] = {}
"""The pictures that a Likeness Score has put in order, by its id, for a prompt until it ends: (number before, likeness)."""
_judged: dict[str, float] = {}
"""The likeness of the headshots so far, by digest. ComfyUI shows them again for a prompt that it doesn't need to run."""
_styled: dict[str, tuple[str, str]] = {}
"""The style pack and the style of the headshots so far, by digest."""
_seeds: dict[str, int] = {}
"""The seed of the headshots so far that are items of a style pack's list, by digest. Variations of these are not."""
_pages: dict[str, str] = {}
"""The user of each open page, by the client id that the page sent when it asked for the states."""
_asking: ContextVar[str | None] = ContextVar("asking", default=None)
"""The user whose request is being answered."""


def begin(node_id: str) -> QueuedRun:
    """Return the node's run in the prompt that is running now, with a new state."""
    run = _running(node_id)
    _runs.begin(run)
    publish(run, {"begin": True, "phase": READING, "limits": LIMITS})
    return run


def _running(node_id: str) -> QueuedRun:
    (_, prompt, _, extra, *_), *_ = list(PromptServer.instance.prompt_queue.currently_running.values())
    return QueuedRun(_user_in(extra), prompt, _workflow_of(extra), node_id)


def _user_in(extra: Mapping[str, Any]) -> str | None:
    """Return the user in a prompt's extra data. It has none if another pack has put the prompt into the queue."""
    return extra.get(USER, None if args.multi_user else "default")


def _workflow_of(extra: Any) -> str | None:
    """Return the id of the page's graph in a prompt's extra data; None for a prompt that no page has sent."""
    match extra:
        case {"extra_pnginfo": {"workflow": {"id": str(workflow)}}}:
            return workflow
    return None


def running_user() -> str | None:
    """Return the user who queued the prompt that is running now."""
    return _running("").user


def running_use(names: Sequence[str]) -> str:
    """Return the first of the names that is an input which the running node's first output goes to; the first if none is."""
    running = list(PromptServer.instance.prompt_queue.currently_running.values())
    node = get_executing_context()
    graph = running[0][2] if running and node else {}
    inputs = {
        name
        for one in graph.values()
        for name, value in one["inputs"].items()
        if one["class_type"] in (TRAIN, LIKENESS) and node and value == [node.node_id, 0]
    }
    return next((name for name in names if name in inputs), names[0])


def asking_user() -> str | None:
    """Return the user whose request is being answered, or None outside a request."""
    return _asking.get()


def publish(run: QueuedRun, news: Mapping[str, Any]) -> None:
    """Send news about a run to its user's open pages, and keep it for pages that are opened later."""
    points = _runs.add(run, news)
    message = {"prompt": run.prompt, "workflow": run.workflow, "node": run.node, "points": points, **news}
    for page, user in list(_pages.items()):
        if user == run.user:
            PromptServer.instance.send_sync(EVENT, message, page)


stop_is_wanted, resumed = _runs.stop_is_wanted, _runs.resumed


def remember(run: QueuedRun, job: str, name: str, **facts: Any) -> str:
    """Begin the record of a training run under a name, by the key of its job, with the graph of its page. Return its key."""
    queued, *_ = list(PromptServer.instance.prompt_queue.currently_running.values())
    extra, key = queued[3], people.key_of(run.user, job, name)
    workflow = extra["extra_pnginfo"]["workflow"] if run.workflow else None
    place = {"prompt": run.prompt, "workflow": run.workflow, "node": run.node}
    facts |= {"job": job, "name": name, "graph": workflow, "run": place}
    people.note(run.user, key, phase=people.RUNNING, begun=time.time(), **facts)
    if training := _training_of(queued):
        _trained[training] = (run, key)
    return key


def _training_of(prompt: Sequence[Any]) -> str:
    """Return a hash of a prompt's user, its Train Face LoRA and all that the node depends on; "" unless there is one such node.

    ComfyUI may reuse the training of any earlier prompt with the same hash: its cache ignores the ids of other nodes, too.
    """
    _, _, graph, extra, *_ = prompt
    trains = [key for key, node in graph.items() if node["class_type"] == TRAIN]
    if len(trains) != 1:
        return ""
    keys, nodes = list(trains), []
    for key in keys:  # which grows
        node, inputs = graph.get(key, {}), []
        for name, value in sorted(node.get("inputs", {}).items()):
            if _is_link(value):
                keys += [value[0]] if value[0] not in keys else []
                value = (keys.index(value[0]), value[1])
            inputs.append((name, value))
        nodes.append((node.get("class_type"), inputs))
    return content_key(_user_in(extra), trains[0], nodes)


def scored(node_id: str, ranked: Sequence[tuple[int, float]]) -> None:
    """Note the pictures that a node of the running prompt has put in order: each one's number before, and its likeness."""
    _scores.setdefault(_running("").prompt, {})[node_id] = list(ranked)


def _note_headshots(prompt: Sequence[Any], outputs: Mapping[str, Any]) -> None:
    """Add the pictures that a prompt has saved to the training run whose LoRA drew them, and show them in its panel."""
    _, prompt_id, graph, extra, *_ = prompt
    scores = _scores.pop(prompt_id, {})
    run, key = _trained.get(_training_of(prompt), (None, None))
    if run is None or key is None:
        return
    headshots = []
    for node, shown in outputs.items():
        images = [one for one in shown.get("images", ()) if isinstance(one, dict) and one.get("type") == "output"]
        links = _links(graph, node)
        if not images or run.node not in {source for source, _ in links}:
            continue
        names = [f"{image['subfolder']}/{image['filename']}".lstrip("/") for image in images]
        digests = [people.digest_of(name) for name in names]
        # The order is only known of pictures that come from a node's sorted ones.
        for ranked in (found for judge, found in scores.items() if (judge, 0) in links and len(found) == len(images)):
            _judged.update((one, score) for one, (_, score) in zip(digests, ranked, strict=True) if one)
            pack, vary, items = _list_of(graph, {source for source, _ in links})
            if len(items) == len(images):
                drawn = [(one, items[number]) for one, (number, _) in zip(digests, ranked, strict=True) if one]
                _styled.update((one, (pack, item.style)) for one, item in drawn)
                _seeds.update((one, item.seed) for one, item in drawn if vary in (NOT_VARIED, item.seed))
        found = dict(zip(names, digests, strict=True))
        likeness = {name: _judged.get(one) for name, one in found.items()}
        styled = {name: _styled[one] for name, one in found.items() if one in _styled}
        people.add_headshots(run.user, key, found, likeness, styled)
        headshots += [
            image | {"score": _judged.get(one), "seed": _seeds.get(one)}
            for image, one in zip(images, digests, strict=True)
        ]
    # Another training run, or none if this one was deleted, may be shown in its place.
    is_shown = any(state["prompt"] == run.prompt for state in _runs.of(run.user))
    if headshots and is_shown and run.workflow == _workflow_of(extra):
        publish(run, {"headshots": headshots})


def _list_of(graph: Mapping[str, Any], nodes: Collection[str]) -> tuple[str, int, Sequence[StyledPrompt]]:
    """Return the pack, `vary` and the items of the one Headshot Style Pack among the nodes; no items if unknown."""
    match [graph[key]["inputs"] for key in nodes if graph.get(key, {}).get("class_type") == STYLES]:
        case [{"pack": str(pack), "styles": str(names), "count": int(count), "first_seed": int(seed)} as inputs]:
            vary = inputs.get("vary", NOT_VARIED)
            with suppress(FaceLoraError):
                return pack, vary, listed(pack, names, count, seed, vary, inputs.get("variation_seed", 0))
    return "", NOT_VARIED, ()


def _note_end(prompt: Sequence[Any]) -> None:
    """Show in the panels of a prompt that all of its nodes have run."""
    _, prompt_id, _, extra, *_ = prompt
    user = _user_in(extra)
    for state in _runs.of(user):
        if state["prompt"] == prompt_id:
            publish(QueuedRun(user, prompt_id, state["workflow"], state["node"]), {"ended": True})


def _running_prompts() -> set[str]:
    """Return the ids of the prompts that run now, and of those whose training they reuse."""
    running = list(PromptServer.instance.prompt_queue.currently_running.values())
    reused = [_trained[training][0].prompt for one in running if (training := _training_of(one)) in _trained]
    return {*reused, *(prompt for _, prompt, *_ in running)}


def queued_photos() -> set[str]:
    """Return the photos and folders that running and waiting prompts load, by name below the input folder."""
    running, waiting = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    nodes = [node for _, _, graph, *_ in (*running, *waiting) for node in graph.values()]
    loads = [node["inputs"] for node in nodes if node["class_type"] == LOAD_PHOTOS]
    return {
        name.strip() for one in loads for text in ("folder", "pictures") for name in str(one.get(text)).splitlines()
    }


def _waiting(user: str | None) -> list[dict[str, Any]]:
    """Return what panels show of the user's training runs that are queued and have not begun: how many prompts are ahead."""
    running, queued = PromptServer.instance.prompt_queue.get_current_queue_volatile()
    shown = []
    for ahead, (_, prompt, graph, extra, *_) in enumerate(sorted(queued, key=itemgetter(0)), len(running)):
        place = {"prompt": prompt, "workflow": _workflow_of(extra), "phase": "waiting", "ahead": ahead}
        nodes = [key for key, node in graph.items() if node["class_type"] == TRAIN]
        shown += [place | {"node": node} for node in nodes if user is not None and _user_in(extra) == user]
    return shown


@contextmanager
def _never_raising() -> Iterator[None]:
    """Log a fault, which would end the thread in which ComfyUI runs prompts."""
    try:
        yield
    except Exception:
        logging.exception("FaceLoRA: the end of a prompt was not noted")


def _hear_of_ends() -> None:
    """Call the functions above with each prompt that ends, because ComfyUI tells only the page that queued it."""
    queue = PromptServer.instance.prompt_queue
    done = queue.task_done

    def task_done(item_id: int, history_result: Mapping[str, Any], *rest: Any, **named: Any) -> None:
        prompt = queue.currently_running[item_id]
        with _never_raising():  # before the prompt counts as done: whoever waits for it asks for its headshots next
            _note_headshots(prompt, history_result.get("outputs", {}))
        done(item_id, history_result, *rest, **named)
        with _never_raising():
            _note_end(prompt)

    queue.task_done = task_done


def sample_urls(images: Sequence[Image.Image]) -> list[str]:
    """Return the samples as `data:` URLs of small JPEGs."""
    return [jpeg_url(image, SAMPLE_SIDE, DRAWN) for image in images]


def photo_urls(photos: Sequence[Photo]) -> list[str]:
    """Return the first photos, as many as the panel shows, as `data:` URLs."""
    return [jpeg_url(photo.image(shorter_side=PHOTO_SIDE), PHOTO_SIDE, mark=None) for photo in photos[:PHOTOS]]


def user_of(request: web.Request) -> str | None:
    """Return ComfyUI's id of the user; None for an unknown user. Without --multi-user, everyone is the same user."""
    try:
        return PromptServer.instance.user_manager.get_request_user_id(request)
    except KeyError:
        return None


@web.middleware
async def _note_user(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    _asking.set(user_of(request))
    return await handler(request)


def _sign(queued: dict[str, Any]) -> dict[str, Any]:
    """Add the user to a queued prompt, because ComfyUI doesn't record who queued it."""
    match queued.setdefault("extra_data", {}):
        case dict(extra):
            extra[USER] = _asking.get()
    return queued


def _aim(queued: dict[str, Any]) -> dict[str, Any]:
    """Remove a prompt's targets that other targets depend on, so that it is refused if none of those can be made.

    Train Face LoRA is a target itself. ComfyUI would run it, and leave out the headshots if their style is invalid.
    """
    graph = queued.get("prompt")
    if not isinstance(graph, dict) or "partial_execution_targets" in queued:
        return queued
    kinds = {
        key: NODE_CLASS_MAPPINGS.get(node.get("class_type")) for key, node in graph.items() if isinstance(node, dict)
    }
    outputs = {key for key, kind in kinds.items() if getattr(kind, "OUTPUT_NODE", False)}
    before = {source for key in outputs for source, _ in _links(graph, key)}
    if any(graph[key]["class_type"] in (LOAD_PHOTOS, TRAIN) for key in outputs & before):
        queued["partial_execution_targets"] = sorted(outputs - before)
    return queued


def _is_link(value: object) -> bool:
    return isinstance(value, list) and [*map(type, value)] == [str, int]


def _links(graph: Mapping[str, Any], key: str) -> set[tuple[str, int]]:
    """Return all that a node depends on: (id of a node, number of its output)."""
    found: set[tuple[str, int]] = set()
    waiting, seen = [key], {key}
    while waiting:
        match graph.get(waiting.pop()):
            case {"inputs": dict(inputs)}:
                links = {(one[0], one[1]) for one in inputs.values() if _is_link(one)}
                found |= links
                new = {source for source, _ in links} - seen
                waiting += new
                seen |= new
    return found


def add_routes() -> None:
    """Add the routes of the panel.

    - GET /facelora/training: the user's runs. GET /facelora/waiting: queued ones that have not begun.
    - POST /facelora/stop {"prompt": id, "node": id}: end now, keep the result.
    - GET /facelora/people: a record of each of the user's training runs. With /KEY the graph of one; DELETE deletes it, and
      /KEY/files says what that deletes. PATCH {"name": NAME} renames it. /KEY/headshots is a ZIP file, and /KEY/styles lists
      the best headshot of each style.
    - GET /facelora/machine: the text of `facelora doctor`.
    """
    server = PromptServer.instance
    _add_people_routes()
    _hear_of_ends()
    server.app.middlewares.append(_note_user)
    server.add_on_prompt_handler(_sign)
    server.add_on_prompt_handler(_aim)
    # Where earlier versions kept small pictures of everybody's photos.
    (Path(folder_paths.get_user_directory()) / "facelora-training.json").unlink(missing_ok=True)

    @server.routes.get("/facelora/training")
    async def training(request: web.Request) -> web.Response:
        user, page = user_of(request), request.query.get("client")
        if user is not None and page in server.sockets:
            for gone in _pages.keys() - server.sockets.keys():
                del _pages[gone]
            _pages[page] = user
        return web.json_response(_runs.of(user))

    @server.routes.get("/facelora/waiting")
    async def waiting(request: web.Request) -> web.Response:
        return web.json_response(_waiting(user_of(request)))

    @server.routes.post("/facelora/stop")
    async def stop(request: web.Request) -> web.Response:
        if request.content_type != "application/json":  # a form on a page of another site can send other types
            return web.json_response({"error": "send JSON, as application/json"}, status=415)
        try:
            asked = await request.json()
            prompt, node = str(asked["prompt"]), str(asked["node"])
        except (ValueError, TypeError, KeyError):
            return web.json_response({"error": 'send {"prompt": ID, "node": ID}'}, status=400)
        run = _runs.stop(user_of(request), prompt, node)
        if run is None:
            return web.json_response(
                {"error": f"you have no training run in node {node} of prompt {prompt}"}, status=404
            )
        publish(run, {"stopping": True})
        return web.json_response({"stopping": node})

    @server.routes.get("/facelora/machine")
    async def machine(request: web.Request) -> web.Response:
        report = await asyncio.to_thread(examine, get_torch_device())
        return web.Response(text=format_doctor(report))


def _add_people_routes() -> None:
    """Add the routes of Trained people."""
    routes = PromptServer.instance.routes

    @routes.get("/facelora/people")
    async def trained(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.to_thread(people.of, user_of(request), _running_prompts()))

    @routes.get("/facelora/people/{key}")
    async def graph(request: web.Request) -> web.Response:
        return web.json_response(people.graph_of(user_of(request), request.match_info["key"]))

    @routes.patch("/facelora/people/{key}")
    async def rename(request: web.Request) -> web.Response:
        user, key = user_of(request), request.match_info["key"]
        try:
            name = str((await request.json())["name"])
            named = await asyncio.to_thread(people.rename, user, key, name, _running_prompts(), renamed)
            for state in _runs.of(user):
                if state.get("person") == key and "file" in state:
                    run = QueuedRun(user, state["prompt"], state["workflow"], state["node"])
                    publish(run, {"file": f"{Path(named).name}.safetensors"})
            return web.json_response({"name": named})
        except (KeyError, TypeError, ValueError):
            return web.json_response({"error": 'send {"name": NAME}'}, status=400)
        except FaceLoraError as problem:
            return refusal(problem, 200)  # browsers report other answers as faults of the page

    @routes.get("/facelora/people/{key}/files")
    async def files(request: web.Request) -> web.Response:
        key = request.match_info["key"]
        return web.json_response(
            await asyncio.to_thread(people.files_to_delete, user_of(request), key, queued_photos())
        )

    @routes.get("/facelora/people/{key}/headshots")
    async def headshots(request: web.Request) -> web.Response:
        name, content = await asyncio.to_thread(people.headshots_zip, user_of(request), request.match_info["key"])
        header = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(f'{name}.zip', safe='')}"}
        return web.Response(body=content, content_type="application/zip", headers=header)

    @routes.get("/facelora/people/{key}/styles")
    async def styles(request: web.Request) -> web.Response:
        key = request.match_info["key"]
        return web.json_response(await asyncio.to_thread(people.styles_of, user_of(request), key))

    @routes.delete("/facelora/people/{key}")
    async def delete(request: web.Request) -> web.Response:
        user, key = user_of(request), request.match_info["key"]
        try:
            place, deleted = await asyncio.to_thread(people.delete, user, key, _running_prompts(), queued_photos())
        except BadConfig as problem:
            return refusal(problem, 409)
        except OSError as problem:  # on Windows, another program may read the file
            advice = "Close the program that uses it, then delete again"
            said = f"{problem.filename}: cannot be deleted ({problem.strerror}). {advice}"
            return web.json_response({"error": without_server_paths(said)}, status=409)
        _runs.forget(QueuedRun(user, **place))
        return web.json_response({"deleted": deleted})
