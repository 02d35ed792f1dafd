"""The addresses of the local page, and the server that answers them.

All addresses are relative to the page's own, so that another program can mount the application anywhere.
"""

import asyncio
import json
import os
import secrets
import socket
import subprocess
import webbrowser
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from ...core.demo import FOLDER as DEMO_PACKS
from ...core.device import best_device
from ...core.doctor import examine, format_doctor
from ...core.errors import BadConfig, BadFile, FaceLoraError
from ...core.pictures.style_pack import FoundPacks, find_style_packs
from ...core.progress import silent
from ...core.storage.files import read_json, write_text
from ...core.storage.plain_values import parse_json, read_as
from ...core.training.recipes import recipes_of
from ..forecasts import forecast_for, spans_of
from ..settings import NodeSettings
from ..style_picture import style_picture
from . import people
from .bases import DEMO, check_folder, files_in, find_bases, opened
from .guard import Guard
from .jobs import COMMAND, ROOT

HERE = Path(__file__).parent
SHARED = ("chart.js", "elements.js", "facelora.css", "progress.js", "tiles.js", "words.js", "zh.json")
"""The files of web/ that the page shares with ComfyUI's."""
MOST_JSON = 2**16
"""The most bytes of a request, except of a photo."""
THUMBNAIL_SIDE = 320
PUBLISHING = 600.0
"""The most seconds that making a folder to upload may take."""


class Page:
    """What the addresses answer. Its methods that take a request are handlers.

    A program that shows the page gives its base models: a function that returns the title of each file, the chosen one first.
    It starts the jobs too, and holds its lock while it draws.
    """

    def __init__(self, folder: Path, files: Callable[[], Mapping[str, str]] | None = None, lock: Any = None) -> None:
        self.people = people.Home(folder)
        self.people.jobs.starts = files is None
        self._settings, self._given, self._lock = self.people.own / "settings.json", files, lock

    @property
    def folders(self) -> list[str]:
        """The folders of base models that the user has named."""
        with suppress(BadFile, TypeError, KeyError):
            return list(map(str, read_json(self._settings)["folders"]))
        return []

    @property
    def files(self) -> Mapping[str, str]:
        """The titles of the files that may be base models."""
        return files_in(self.folders) if self._given is None else self._given()

    # What is looked at.

    async def setup(self, request: Request) -> Any:
        """What the form offers."""

        def offered() -> dict[str, Any]:
            files, folders = self.files, self.folders if self._given is None else None
            chosen = next(iter(files), DEMO) if folders is None else DEMO
            return {
                "bases": find_bases(files), "chosen": chosen, "folders": folders, "packs": _packs(DEMO), "demo": DEMO,
            }  # fmt: skip

        return await asyncio.to_thread(offered)

    async def now(self, request: Request) -> Any:
        """Everyone in short, and one person whole. Pages ask for it all the time."""

        def shown() -> dict[str, Any]:
            if self.people.jobs.starts:
                self.people.jobs.start_next()
            names, name = self.people.names(), request.query_params.get("person", "")
            person = self.people.shown(name) if name in names else None
            everyone = [self.people.shown(one, whole=False) for one in names]
            return {"people": everyone, "person": person, "photos": self.people.photo_names()}

        return await asyncio.to_thread(shown)

    async def check(self, request: Request) -> Any:
        def checked() -> dict[str, Any]:
            return self.people.check(opened(request.query_params.get("base", DEMO), self.files).resolution)

        return await asyncio.to_thread(checked)

    async def forecast(self, request: Request) -> Any:
        """How long each recipe takes, and the memory it needs. Unknown while a job runs, which has the memory."""
        if any(self.people.jobs.is_active(self.people.own / name) for name in self.people.names()):
            return None
        asked = request.query_params
        try:
            photos, pictures, steps = (int(asked.get(name) or 0) for name in ("photos", "pictures", "steps"))
        except ValueError:
            raise BadConfig("photos, pictures and steps are numbers") from None

        def spans() -> dict[str, Any] | None:
            # While Forge Neo reads a model, its classes replace those of torch.nn, and a forecast would use them.
            if self._lock and not self._lock.acquire(blocking=False):
                return None
            try:
                base = opened(asked.get("base", DEMO), self.files)
                recipes, settings = recipes_of(base, silent), NodeSettings(steps=steps, samples=0)
                forecast = forecast_for(base, settings, recipes, best_device())
                found = spans_of(forecast, settings, recipes, min(photos, people.MOST_PHOTOS), min(pictures, 1000))
                return {"spans": found, "memory": forecast.shared.memory}
            finally:
                if self._lock:
                    self._lock.release()

        return await asyncio.to_thread(spans)

    async def machine(self, request: Request) -> Any:
        return {"text": format_doctor(await asyncio.to_thread(examine, best_device()))}

    async def style(self, request: Request) -> Response:
        pack = _found_packs(DEMO).pick(request.query_params.get("pack", ""))
        style = pack.style(request.query_params.get("style", ""))
        picture = pack.picture(style)
        return FileResponse(picture) if picture else Response(style_picture(style), media_type="image/svg+xml")

    async def photo(self, request: Request) -> Response:
        photo = await asyncio.to_thread(self.people.photo, request.path_params["file"], request.path_params.get("name"))
        image, stream = photo.image(shorter_side=THUMBNAIL_SIDE), BytesIO()
        image.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
        image.save(stream, "JPEG", quality=85)
        return Response(stream.getvalue(), media_type="image/jpeg")

    async def headshot(self, request: Request) -> Response:
        return FileResponse(self.people.headshot(request.path_params["name"], request.path_params["file"]))

    async def sample(self, request: Request) -> Response:
        return FileResponse(self.people.sample(request.path_params["name"], request.path_params["file"]))

    async def lora(self, request: Request) -> Response:
        path = self.people.lora(request.path_params["name"])
        return FileResponse(path, filename=path.name)

    async def archive(self, request: Request) -> Response:
        """The headshots as a ZIP file: the favourites, or all of them if there are none."""
        name = request.path_params["name"]
        path = await asyncio.to_thread(self.people.archive, name)
        header = {"Content-Disposition": f"attachment; filename*=UTF-8''{quote(f'{name}.zip', '')}"}
        done = BackgroundTask(os.unlink, path)
        return FileResponse(path, media_type="application/zip", headers=header, background=done)

    # What is changed.

    async def set_folders(self, request: Request) -> Any:
        (folders,) = await _sent(request, folders=list)
        if self._given is not None:
            raise BadConfig("the base models are those of the program")
        chosen = [str(check_folder(str(folder))) for folder in folders if str(folder).strip()]
        write_text(self._settings, json.dumps({"folders": list(dict.fromkeys(chosen))}))
        return await self.setup(request)

    async def add_photo(self, request: Request) -> Any:
        return {"name": await self.people.add_photo(request.path_params["file"], request.stream())}

    async def delete_photo(self, request: Request) -> Any:
        return await self._changed(self.people.delete_photo, request.path_params["file"])

    async def begin(self, request: Request) -> Any:
        asked = read_as(people.Request, await _read(request))

        def begin() -> None:
            opened(asked.base, self.files)
            self.people.begin(asked)

        return await self._changed(begin)

    async def go_on(self, request: Request) -> Any:
        return await self._changed(lambda: self.people.train(request.path_params["name"], again=True))

    async def stop(self, request: Request) -> Any:
        return await self._changed(self.people.stop, request.path_params["name"])

    async def draw(self, request: Request) -> Any:
        asked = await _read(request)
        try:
            return await self._changed(lambda: self.people.draw(request.path_params["name"], **asked))
        except TypeError:
            raise BadConfig("send like, or pack with styles and count") from None

    async def favourite(self, request: Request) -> Any:
        (favourite,) = await _sent(request, favourite=bool)
        name, file = request.path_params["name"], request.path_params["file"]
        return await self._changed(self.people.set_favourite, name, file, favourite)

    async def rename(self, request: Request) -> Any:
        (name,) = await _sent(request, name=str)
        return await self._changed(self.people.rename, request.path_params["name"], name.strip())

    async def delete(self, request: Request) -> Any:
        return await self._changed(self.people.delete, request.path_params["name"])

    async def publish(self, request: Request) -> Any:
        """Makes the folder to upload, and returns its path."""
        title, agreed = await _sent(request, title=str, agreed=bool)
        if not agreed:
            raise BadConfig("publish only with the person's agreement. Tick the box if this person has agreed")

        def publish() -> dict[str, str]:
            arguments, output = self.people.published(request.path_params["name"], title)
            done = subprocess.run(
                [*COMMAND, *arguments], env=os.environ | {"PYTHONPATH": str(ROOT)},
                capture_output=True, text=True, encoding="utf-8", errors="replace", timeout=PUBLISHING,
            )  # fmt: skip
            if done.returncode:
                raise BadConfig(done.stderr.strip().splitlines()[-1].removeprefix("facelora: "))
            return {"folder": str(output)}

        return await asyncio.to_thread(publish)

    async def _changed(self, change: Callable[..., None], *arguments: Any) -> dict[str, bool]:
        await asyncio.to_thread(change, *arguments)
        return {"done": True}


def application(page: Page) -> Starlette:
    """Return the page as an application. Who may reach it is up to what mounts it."""
    person = "/people/{name}"
    routes = [
        Route("/", lambda request: FileResponse(HERE / "page.html")),
        *(Route(f"/{name}", _file(HERE / name)) for name in ("page.js", "page.css")),
        *(Route(f"/web/{name}", _file(ROOT / "web" / name)) for name in SHARED),
        *(
            Route(path, _answered(handler), methods=[method])
            for method, path, handler in (
                ("GET", "/setup", page.setup), ("PUT", "/folders", page.set_folders), ("GET", "/now", page.now),
                ("GET", "/check", page.check), ("GET", "/forecast", page.forecast), ("GET", "/machine", page.machine),
                ("GET", "/style", page.style), ("GET", "/photos/{file}", page.photo),
                ("PUT", "/photos/{file}", page.add_photo), ("DELETE", "/photos/{file}", page.delete_photo),
                ("POST", "/people", page.begin), ("PATCH", person, page.rename), ("DELETE", person, page.delete),
                ("POST", f"{person}/stop", page.stop), ("POST", f"{person}/continue", page.go_on),
                ("POST", f"{person}/draw", page.draw), ("POST", f"{person}/publish", page.publish),
                ("GET", f"{person}/photos/{{file}}", page.photo), ("GET", f"{person}/samples/{{file}}", page.sample),
                ("GET", f"{person}/headshots/{{file:path}}", page.headshot), ("GET", f"{person}/lora", page.lora),
                ("PUT", f"{person}/headshots/{{file:path}}", page.favourite), ("GET", f"{person}/zip", page.archive),
            )
        ),
    ]  # fmt: skip

    @asynccontextmanager
    async def lifespan(_: Starlette):
        async def start_waiting() -> None:
            while True:
                with suppress(FaceLoraError, OSError):
                    await asyncio.to_thread(page.people.jobs.start_next)
                await asyncio.sleep(1)

        task = asyncio.create_task(start_waiting())
        yield
        task.cancel()

    return Starlette(routes=routes, lifespan=lifespan)


def _file(path: Path) -> Callable[[Request], Response]:
    return lambda _: FileResponse(path)


def _answered(handler: Callable[[Request], Awaitable[Any]]) -> Callable[[Request], Awaitable[Response]]:
    """Wrap a handler so that it may return what becomes JSON. Its errors become a message with the status 400."""

    async def answered(request: Request) -> Response:
        try:
            answer = await handler(request)
        except (FaceLoraError, OSError, subprocess.TimeoutExpired) as problem:
            return JSONResponse({"error": str(problem)}, 400)
        return answer if isinstance(answer, Response) else JSONResponse(answer)

    return answered


async def _read(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request. One of another type, such as a form on another site can send, is refused."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "send JSON, as application/json")
    content = b""
    async for piece in request.stream():
        content += piece
        if len(content) > MOST_JSON:
            raise HTTPException(413, "the request is too large")
    with suppress(ValueError):
        if isinstance(given := parse_json(content), Mapping):
            return dict(given)
    raise BadConfig("send a JSON object")


async def _sent(request: Request, **fields: type) -> list[Any]:
    """Return these fields of the JSON object in a request, each of its type."""
    given = await _read(request)
    if not all(isinstance(given.get(name), kind) for name, kind in fields.items()):
        raise BadConfig(f"send {' and '.join(fields)}")
    return [given[name] for name in fields]


def _found_packs(base: str) -> FoundPacks:
    return find_style_packs([DEMO_PACKS] if base == DEMO else [])


def _packs(base: str) -> dict[str, list[str]]:
    """Return the names of the styles of each pack. That of the demo is only for its base model."""
    packs = _found_packs(base).packs
    return {name: packs[name].names for name in sorted(packs)}


def token_in(folder: Path) -> str:
    """Return the secret part of the page's address, which only this user can read. It stays, and so do addresses."""
    file = folder / "token.txt"
    if not file.exists():
        write_text(file, secrets.token_urlsafe(24))
        file.chmod(0o600)
    return file.read_text("utf-8")


def serve(folder: Path, port: int, *, shows: bool) -> None:
    """Serve the page on this computer until Ctrl-C. `shows`: open it in the user's browser."""
    import uvicorn

    guarded = Guard(application(Page(folder)), token_in(folder / people.OWN))
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, os.name != "nt")
        try:
            own.bind(("127.0.0.1", port))
            own.listen()  # A browser that is opened now waits until the server answers.
        except OSError as error:
            raise BadConfig(f"port {port}: {error.strerror}. Choose another one with --port") from None
        address = f"http://127.0.0.1:{own.getsockname()[1]}/{token_in(folder / people.OWN)}/"
        print(f"FaceLoRA is at {address}\nKeep this address to yourself. Press Ctrl-C to end the page.", flush=True)
        if shows:
            webbrowser.open(address)
        server = uvicorn.Server(uvicorn.Config(guarded, log_level="warning", access_log=False))
        server.run(sockets=[own])
