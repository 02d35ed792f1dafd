"""A real InvokeAI server for tests: started on a free port with a folder of its own, spoken to through its HTTP API."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .setup_invokeai import PYTHON

REPOSITORY = Path(__file__).resolve().parents[2]
ENDED = ("completed", "failed", "canceled")
PATIENCE = 300
"""Seconds for anything that takes some where nothing else is running."""
Nodes = Mapping[str, Mapping[str, Any]]
"""Node id -> type and fields."""
Edge = tuple[str, str, str, str]
"""The id and the output of a node, and the id and the field that it goes to."""


@dataclass(frozen=True)
class Item:
    """What became of a queued graph."""

    status: str
    """One of ENDED."""
    error: str
    """The error's type and message as the page shows them; empty where there is none."""
    outputs: Mapping[str, Mapping[str, Any]]
    """Node id -> its outputs by name; of the last time that the node ran."""


class InvokeServer:
    def __init__(self, folder: Path, process: subprocess.Popen, port: int, log_path: Path):
        self.folder = folder
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self._log_path = log_path

    def log(self) -> str:
        return self._log_path.read_text("utf-8", errors="replace")

    def read(self, method: str, path: str, body: bytes | None = None, kind: str = "application/json") -> bytes:
        request = urllib.request.Request(self.url + path, body, {"Content-Type": kind}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{path}: {error.code} {error.read().decode()[:2000]}") from None

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON."""
        answer = self.read(method, path, None if body is None else json.dumps(body).encode())
        return json.loads(answer) if answer else None

    def install_pack(self, source: Path) -> dict[str, Any]:
        return self.call("POST", "/api/v2/custom_nodes/install", {"source": str(source)})

    def add_model(self, path: Path, name: str) -> dict[str, Any]:
        """The identifier of a model that is registered where it is."""
        address = f"/api/v2/models/install?source={path}&inplace=true"
        job = self.call("POST", address, {"name": name})["id"]
        self.wait_for(lambda: self.call("GET", f"/api/v2/models/install/{job}")["status"] in ("completed", "error"))
        return self.model(name)

    def models(self) -> dict[str, dict[str, Any]]:
        """The models by name."""
        return {model["name"]: model for model in self.call("GET", "/api/v2/models/")["models"]}

    def model(self, name: str) -> dict[str, Any]:
        """The identifier of a model, as nodes take it."""
        return {field: self.models()[name][field] for field in ("key", "hash", "name", "base", "type")}

    def upload(self, photos: Iterable[Path], board: str = "") -> list[dict[str, str]]:
        """The uploaded pictures, as nodes take them."""
        names, target = [], f"&board_id={board}" if board else ""
        for photo in photos:
            boundary = uuid.uuid4().hex
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{photo.name}"\r\n'
            body = (
                f"{head}Content-Type: image/png\r\n\r\n".encode()
                + photo.read_bytes()
                + f"\r\n--{boundary}--\r\n".encode()
            )
            address = f"/api/v1/images/upload?image_category=user&is_intermediate=false{target}"
            answer = self.read("POST", address, body, f"multipart/form-data; boundary={boundary}")
            names.append(json.loads(answer)["image_name"])
        return [{"image_name": name} for name in names]

    def board(self, name: str) -> str:
        """The id of a new board."""
        return self.call("POST", f"/api/v1/boards/?board_name={name}")["board_id"]

    def picture(self, name: str) -> bytes:
        return self.read("GET", f"/api/v1/images/i/{name}/full")

    def queue(self, nodes: Nodes, edges: Sequence[Edge] = ()) -> int:
        """The id of the queued graph."""
        graph = {
            "id": uuid.uuid4().hex,
            "nodes": {name: {"id": name, **fields} for name, fields in nodes.items()},
            "edges": [
                {"source": {"node_id": a, "field": output}, "destination": {"node_id": b, "field": field}}
                for a, output, b, field in edges
            ],
        }
        batch = {"prepend": False, "batch": {"graph": graph, "runs": 1}}
        return self.call("POST", "/api/v1/queue/default/enqueue_batch", batch)["item_ids"][0]

    def run(self, nodes: Nodes, edges: Sequence[Edge] = ()) -> Item:
        return self.wait(self.queue(nodes, edges))

    def wait(self, item: int) -> Item:
        self.wait_for(lambda: self.call("GET", f"/api/v1/queue/default/i/{item}")["status"] in ENDED)
        found = self.call("GET", f"/api/v1/queue/default/i/{item}")
        error = f"{found['error_type']}: {found['error_message']}" if found.get("error_type") else ""
        session = found["session"]
        names = session["prepared_source_mapping"]
        return Item(found["status"], error, {names[one]: output for one, output in session["results"].items()})

    def wait_for(self, happened: Any) -> None:
        end = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.poll() is None, f"the server is gone:\n{self.log()[-4000:]}"
            assert time.monotonic() < end, f"still not so:\n{self.log()[-4000:]}"
            time.sleep(0.2)

    @contextmanager
    def events(self) -> Iterator[list[dict[str, Any]]]:
        """A list that fills with the progress of nodes as pages hear of it, over Socket.IO's slower transport."""
        address = "/ws/socket.io/?EIO=4&transport=polling"
        session = json.loads(self.read("GET", address)[1:])["sid"]
        address, heard, done = f"{address}&sid={session}", [], threading.Event()
        self.read("POST", address, b"40", "text/plain")
        self.read("GET", address)
        self.read("POST", address, b'42["subscribe_queue",{"queue_id":"default"}]', "text/plain")

        def listen() -> None:
            while not done.is_set():
                for packet in self.read("GET", address).decode().split("\x1e"):
                    if packet == "2":
                        self.read("POST", address, b"3", "text/plain")
                    elif packet.startswith('42["invocation_progress"'):
                        heard.append(json.loads(packet[2:])[1])

        thread = threading.Thread(target=listen, daemon=True)
        thread.start()
        try:
            yield heard
        finally:
            done.set()
            self.read("POST", address, b'42["unsubscribe_queue",{"queue_id":"default"}]', "text/plain")


@contextmanager
def running_server(folder: Path) -> Iterator[InvokeServer]:
    """An empty InvokeAI whose models, pictures and nodes are in `folder`."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"schema_version": "4.0.3", "device": "cpu", "precision": "float32", "host": "127.0.0.1", "port": port}
    (folder / "invokeai.yaml").write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    log_path = folder / f"server-{port}.log"
    environment = os.environ | {"FACELORA_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    command = [str(PYTHON), "-c", "from invokeai.app.run_app import run_app; run_app()", "--root", str(folder)]
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    server = InvokeServer(folder, process, port, log_path)
    try:
        server.wait_for(lambda: _answers(server))
        yield server
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(server: InvokeServer) -> bool:
    try:
        server.call("GET", "/api/v1/app/version")
    except OSError:
        return False
    return True
