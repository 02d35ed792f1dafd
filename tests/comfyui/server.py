"""A real ComfyUI server for tests: started on a free port with a folder of its own, spoken to through its HTTP API."""

import io
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from .setup_comfyui import COMFYUI, PYTHON

PACK = Path(__file__).resolve().parents[2]
TEST_PACK = Path(__file__).with_name("pack_for_tests.py")
"""Custom nodes for tests, and narrow models; for the custom_nodes folder of a server."""
Graph = Mapping[str, Mapping[str, Any]]
"""A prompt in ComfyUI's API format: node id -> class_type and inputs."""


@dataclass(frozen=True)
class Result:
    """What became of a queued graph."""

    status: str
    """success, error or interrupted."""
    outputs: Mapping[str, Any]
    """Node id -> what the node shows: images, text, ..."""
    cached: frozenset[str]
    """Nodes that did not run, since their results were still there."""
    error: str
    """Message of the node that failed; empty when none did."""
    seconds: float
    log: str
    """What the server printed meanwhile."""


class ComfyServer:
    def __init__(self, folder: Path, process: subprocess.Popen, port: int, log_path: Path):
        self.folder = folder
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self._log_path = log_path
        self._user: dict[str, str] = {}  # in the head of each request

    def as_user(self, user: str) -> "ComfyServer":
        """The same server for a user of --multi-user, by the id that it has given."""
        other = ComfyServer(self.folder, self.process, int(self.url.rpartition(":")[2]), self._log_path)
        other._user = {"Comfy-User": user}
        return other

    def log(self, start: int = 0) -> str:
        return self._log_path.read_bytes()[start:].decode("utf-8", "replace")

    def get(self, path: str) -> Any:
        return json.loads(self.read(path))

    def read(self, path: str) -> bytes:
        return self._answer(path)

    def post(self, path: str, body: Any) -> Any:
        """The answer's JSON, also of a refusal."""
        try:
            answer = self._answer(path, json.dumps(body).encode(), "application/json")
        except urllib.error.HTTPError as error:
            answer = error.read()
        return json.loads(answer) if answer else None

    def delete(self, path: str) -> Any:
        return self.send("DELETE", path)

    def send(self, method: str, path: str, body: Any = None) -> Any:
        """The answer's JSON, also of a refusal."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._user, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            return json.loads(error.read())

    def upload(self, file: Path, name: str) -> str:
        """The name in the input folder, after an upload as the frontend does it."""
        return self._form("/upload/image", {}, "image", file, name)["name"]

    def drop(self, file: Path, person: str, folder: str = "", name: str = "") -> dict[str, str]:
        """The answer to a photo that is dropped on a page."""
        return self._form("/facelora/photos", {"person": person, "folder": folder}, "file", file, name or file.name)

    def _form(self, path: str, fields: Mapping[str, str], key: str, file: Path, name: str) -> Any:
        boundary, disposition = uuid.uuid4().hex, 'Content-Disposition: form-data; name="'
        head = "".join(f'--{boundary}\r\n{disposition}{field}"\r\n\r\n{value}\r\n' for field, value in fields.items())
        head += f'--{boundary}\r\n{disposition}{key}"; filename="{name}"\r\n\r\n'
        body = head.encode() + file.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
        return json.loads(self._answer(path, body, f"multipart/form-data; boundary={boundary}"))

    def _answer(self, path: str, body: bytes | None = None, kind: str = "") -> bytes:
        request = urllib.request.Request(self.url + path, body, self._user | ({"Content-Type": kind} if kind else {}))
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.read()
        except urllib.error.HTTPError:
            raise
        except OSError:
            assert self.process.poll() is None, f"the server is gone:\n{self.log()[-4000:]}"
            raise

    def queue(self, graph: Graph, workflow: Any = None) -> str:
        """The id of the queued prompt; a page sends the workflow with it."""
        page = {"extra_data": {"extra_pnginfo": {"workflow": workflow}}} if workflow else {}
        answer = self.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex, **page})
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def refusal(self, graph: Graph) -> str:
        """What the server says to a graph that it does not even start."""
        answer = self.post("/prompt", {"prompt": graph})
        assert "prompt_id" not in answer, "the graph was accepted"
        return json.dumps(answer, ensure_ascii=False)

    def run(self, graph: Graph, seconds: float = 600) -> Result:
        mark, started = len(self._log_path.read_bytes()), time.monotonic()
        return self.wait(self.queue(graph), seconds, mark, started)

    def result(self, graph: Graph, workflow: Any = None) -> Result:
        """That of a graph which must succeed."""
        result = self.wait(self.queue(graph, workflow), mark=self.mark())
        assert result.status == "success", result.error + result.log
        return result

    def error(self, graph: Graph) -> str:
        """The message of a graph which must fail."""
        result = self.run(graph)
        assert result.status == "error", result.log
        return result.error

    def wait(self, prompt_id: str, seconds: float = 600, mark: int = 0, started: float | None = None) -> Result:
        started = started or time.monotonic()
        while time.monotonic() - started < seconds:
            history = self.get(f"/history/{prompt_id}")
            if prompt_id in history:
                return self._result(history[prompt_id], time.monotonic() - started, mark)
            assert self.process.poll() is None, f"the server is gone:\n{self.log()[-4000:]}"
            time.sleep(0.05)
        raise TimeoutError(f"{prompt_id} is not done after {seconds} s:\n{self.log()[-4000:]}")

    def wait_for_log(self, text: str, mark: int, seconds: float = 300) -> None:
        end = time.monotonic() + seconds
        while text not in self.log(mark):
            assert time.monotonic() < end, f"{text!r} was not logged:\n{self.log(mark)[-4000:]}"
            time.sleep(0.05)

    def mark(self) -> int:
        """A place in the log."""
        return len(self._log_path.read_bytes())

    def _result(self, entry: dict[str, Any], seconds: float, mark: int) -> Result:
        messages = {name: data for name, data in entry["status"]["messages"]}
        status = entry["status"]["status_str"]
        if "execution_interrupted" in messages:
            status = "interrupted"
        failure = messages.get("execution_error", {})
        error = f"{failure['exception_type']}: {failure['exception_message']}" if failure else ""
        cached = frozenset(messages.get("execution_cached", {}).get("nodes", ()))
        return Result(status, entry["outputs"], cached, error, seconds, self.log(mark))

    def picture(self, image: Mapping[str, str]) -> Image.Image:
        """The picture of an entry of a node's `images`. (Its file also holds the graph, so files always differ.)"""
        address = f"/view?filename={image['filename']}&subfolder={image['subfolder']}&type={image['type']}"
        return Image.open(io.BytesIO(self.read(address))).convert("RGB")

    def drawn(self, result: Result, node: str = "picture") -> Image.Image:
        """The first picture that a node showed."""
        return self.picture(result.outputs[node]["images"][0])

    def rest(self) -> None:
        """Ends what a test has left running or waiting."""
        while any(self.get("/queue").values()):
            self.post("/queue", {"clear": True})
            self.post("/interrupt", {})
            time.sleep(0.05)

    def kill(self) -> None:
        """As if the machine lost power."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def running_server(folder: Path, *options: str, pack_name: str = "ComfyUI-FaceLoRA") -> Iterator[ComfyServer]:
    """A server whose models, inputs, outputs and custom nodes (this pack alone, by link) are in `folder`."""
    pack = folder / "custom_nodes" / pack_name
    if not pack.is_symlink():
        pack.parent.mkdir(parents=True, exist_ok=True)
        pack.symlink_to(PACK, target_is_directory=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log_path = folder / f"server-{port}.log"
    command = [
        PYTHON, COMFYUI / "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(port),
        "--base-directory", folder, "--database-url", "sqlite:///:memory:", "--disable-api-nodes", *options,
    ]  # fmt: skip
    environment = os.environ | {"FACELORA_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=log, stderr=log, env=environment, start_new_session=True
        )
    server = ComfyServer(folder, process, port, log_path)
    try:
        _wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            server.kill()


def _wait_until_ready(server: ComfyServer, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.process.poll() is None, f"the server did not start:\n{server.log()[-4000:]}"
        try:
            server.get("/system_stats")
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"the server is not ready:\n{server.log()[-4000:]}")
