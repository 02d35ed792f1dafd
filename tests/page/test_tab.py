"""The tab of Forge Neo and SD.Next beside a stand-in of these programs. tests/page/with_gradio.py has their gradio."""

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
import types
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from starlette.applications import Starlette

from core.models import load_base
from tests.page.test_page import MADE, STEPS, Client, begin, client, person, script, until, write_results  # noqa: F401
from tests.setup_gradio import FOLDER, GRADIOS
from tests.tooling import random_lora

ROOT = Path(__file__).parents[2]


class Program(Client):
    """A stand-in of Forge Neo: what the tab uses of its `modules`, and a browser that asks its application."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.callbacks: dict[str, list[Any]] = {"on_ui_tabs": [], "on_app_started": [], "on_script_unloaded": []}
        self.lock, self.loras, self.home = threading.Lock(), folder / "Lora", folder / "facelora"
        self.loras.mkdir()
        self.state = SimpleNamespace(
            begin=lambda job: self.done.append(f"begin {job}"), end=lambda: self.done.append("end"), interrupted=False
        )
        self.options = SimpleNamespace(
            lora_dir=str(self.loras), share=False, listen=False, ngrok=None, server_name=None
        )
        self.models: dict[str, Any] = {}
        listed: Any = SimpleNamespace(
            unload_model_weights=lambda: self.done.append(f"unload, locked {self.lock.locked()}"),
            checkpoints_list=self.models, checkpoint_aliases=self.models,
        )  # fmt: skip
        parts = {
            "modules": types.ModuleType("modules"), "modules.sd_models": listed,
            "modules.call_queue": SimpleNamespace(queue_lock=self.lock),
            "modules.script_callbacks": SimpleNamespace(**{name: each.append for name, each in self.callbacks.items()}),
            "modules.shared": SimpleNamespace(
                cmd_opts=self.options, state=self.state, opts=SimpleNamespace(sd_model_checkpoint="b")
            ),
            "networks": SimpleNamespace(list_available_networks=lambda: self.done.append("refresh")),
            "gradio": SimpleNamespace(Blocks=Blocks, HTML=lambda text: Blocks.shown.append(text)),
        }  # fmt: skip
        for name, part in parts.items():
            monkeypatch.setitem(sys.modules, name, part)
            if name.startswith("modules."):
                setattr(parts["modules"], name.partition(".")[2], part)
        monkeypatch.setenv("HOME", str(folder))
        monkeypatch.setenv("USERPROFILE", str(folder))
        self.guarded = self.served = Starlette()

    def start(self) -> Any:
        """Run the script as these programs do, and return its module."""
        spec = importlib.util.spec_from_file_location("facelora.py", ROOT / "scripts/facelora.py")
        assert spec and spec.loader
        tab = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tab)
        jobs = sys.modules.get("facelora_in_a_tab.nodes.page.jobs")
        self.callbacks["on_app_started"][0](None, self.served)
        return jobs or sys.modules.get("facelora_in_a_tab.nodes.page.jobs")

    def ask(self, method: str, path: str, body: Any = None, *, token: str = "facelora", **more: Any) -> tuple[int, Any]:
        return super().ask(method, path, body, token=token, **more)


class Blocks:
    shown: ClassVar[list[str]] = []

    def __init__(self, **_: Any) -> None:
        self.shown.clear()

    def __enter__(self) -> "Blocks":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def program(tmp_path, monkeypatch):
    program = Program(tmp_path, monkeypatch)
    yield program
    for end in program.callbacks["on_script_unloaded"]:
        end()


def test_the_tab_is_the_page_in_a_frame(program):
    program.start()
    ((_, title, identifier),) = program.callbacks["on_ui_tabs"][0]()
    assert (title, identifier) == ("FaceLoRA", "facelora") and 'src="facelora/"' in Blocks.shown[0]
    assert program.ask("GET", "/")[0] == program.ask("GET", "/page.js")[0] == program.ask("GET", "/now")[0] == 200
    assert program.home.is_dir()


@pytest.mark.parametrize("auth", [None, {"anna": "secret"}])
@pytest.mark.parametrize(
    "headers",
    [{"origin": "http://evil.example"}, {"origin": "null"}, {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}],
)  # fmt: skip
def test_another_site_can_do_nothing_even_with_a_login(program, auth, headers):
    program.served.auth, program.served.tokens = auth, {"good": "anna"}
    program.start()
    for method, path in (("GET", "/now"), ("POST", "/people"), ("PUT", "/photos/a.png"), ("PUT", "/folders")):
        assert program.ask(method, path, {}, cookie="access-token=good", **headers)[0] == 403


def test_without_a_login_only_this_computer_is_answered(program):
    program.start()
    for remote in (
        {"host": "evil.example"},
        {"host": "192.168.0.7:7860"},
        {"client": ("192.168.0.7", 5)},
        {"client": None},
    ):
        assert program.ask("GET", "/now", **remote)[0] == 403


def test_with_a_login_only_who_has_signed_in_is_answered(program):
    routes = [(method, route.path) for route in client_routes(program) for method in route.methods or ()]
    assert len(routes) > 30
    program.served.auth, program.served.tokens = {"anna": "secret"}, {"good": "anna"}
    for cookie in ("", "access-token=", "access-token=bad", "other=good", "access-token-x=None"):
        assert {program.ask(method, path, cookie=cookie)[0] for method, path in routes} == {403}
    for name in ("access-token", "access-token-unsecure", "access-token-aB3"):  # gradio 3, and 4 with its cookie_id
        assert (
            program.ask("GET", "/now", cookie=f"{name}=good", host="studio.example", client=("10.0.0.2", 5))[0] == 200
        )
    del program.served.tokens["good"]
    assert program.ask("GET", "/now", cookie="access-token=good")[0] == 403


def client_routes(program: Program) -> list[Any]:
    program.start()
    guard: Any = program.served.routes[0]
    return guard.app._app.routes


@pytest.mark.parametrize("option", ["share", "listen", "ngrok", "server_name"])
def test_a_program_that_others_reach_without_a_login_has_no_page(program, option):
    setattr(program.options, option, "1")
    program.start()
    for path in ("/", "/now", "/people/Anna/lora"):
        assert b"asks for no login" in program.ask("GET", path)[1]
    assert not program.home.exists()


def test_base_models_are_those_of_the_program_and_the_chosen_one_comes_first(program, small_sd15, tmp_path):
    (tmp_path / "b.safetensors").write_bytes(small_sd15.read_bytes())
    for name, path in (("a", small_sd15), ("b", tmp_path / "b.safetensors"), ("hub", "owner/name")):
        program.models[name] = SimpleNamespace(filename=str(path), name=name)
    program.start()
    setup = program.ask("GET", "/setup")[1]
    assert [one["title"] for one in setup["bases"]] == ["demo", "b", "a"] and setup["folders"] is None
    assert setup["chosen"] == str(tmp_path / "b.safetensors")
    assert "program" in program.ask("PUT", "/folders", {"folders": [str(tmp_path)]})[1]["error"]
    assert "base model" in program.ask("GET", "/check?base=owner/name")[1]["error"]


def test_no_model_is_made_for_a_forecast_while_the_program_draws(program):
    program.start()
    with program.lock:
        assert program.ask("GET", "/forecast?base=demo")[1] == b"null"
    assert program.ask("GET", "/forecast?base=demo")[1]["spans"] and not program.lock.locked()


def test_a_job_waits_for_the_drawing_makes_room_and_can_be_interrupted(program, script, monkeypatch):  # noqa: F811
    script(STEPS, seconds=60)
    monkeypatch.setattr(program.start(), "COMMAND", sys.modules["pack.nodes.page.jobs"].COMMAND)
    with program.lock:
        assert begin(program)[0] == 200
        time.sleep(1.5)
        assert person(program)["phase"] == "waiting" and program.done == []
    until(program, "training")
    assert program.done == ["begin FaceLoRA", "unload, locked True"] and program.lock.locked()
    program.state.interrupted = True
    until(program, "stopped")
    wait_for(lambda: program.done[-1] == "end" and not program.lock.locked())


def test_a_lora_comes_into_the_programs_list_and_goes_with_its_person(program, script, monkeypatch):  # noqa: F811
    script([MADE])
    monkeypatch.setattr(program.start(), "COMMAND", sys.modules["pack.nodes.page.jobs"].COMMAND)
    (program.loras / "Anna.safetensors").write_text("another one")
    begin(program)
    until(program, "done")
    write_results(program.home)
    random_lora(load_base("demo")).save(program.home / "Anna/Anna.safetensors")
    wait_for(lambda: program.done[-1] == "refresh")
    assert {path.name for path in program.loras.glob("Anna-2.*")} >= {"Anna-2.safetensors", "Anna-2.json", "Anna-2.png"}
    assert program.ask("PATCH", "/people/Anna", {"name": "Berta"})[0] == 200
    wait_for(lambda: (program.loras / "Berta.png").exists())
    (program.loras / "Berta.safetensors").unlink()
    time.sleep(1.5)
    assert not (program.loras / "Berta.safetensors").exists()  # The user has deleted it.
    assert program.ask("DELETE", "/people/Berta")[0] == 200
    assert [path.name for path in program.loras.iterdir()] == ["Anna.safetensors"]


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_old_and_missing_packages_are_named_with_commands(program, monkeypatch):
    versions = dict.fromkeys(("torch", "Pillow"), "2.1.2")
    found = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: versions.get(name) or found(name))
    program.start()
    text = program.ask("GET", "/")[1].decode()
    assert "torch 2.1.2 (FaceLoRA needs 2.5)" in text and "FACELORA_PYTHON" in text and "[faces,page]" in text
    assert not program.home.exists() and program.done == []


def test_another_python_serves_the_page_and_a_link_leads_to_it(program, monkeypatch):
    asked: list[list[str]] = []

    def start(command: list[str], **_: Any) -> Any:
        asked.append(command)
        return SimpleNamespace(stdout=StringIO("FaceLoRA is at http://127.0.0.1:5/token/\n"), terminate=lambda: None)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setenv("FACELORA_PYTHON", "another-python")
    program.start()
    assert asked[0][:4] == ["another-python", "-m", "facelora", "page"] and f"--folder={program.home}" in asked[0]
    assert b'href="open"' in program.ask("GET", "/")[1] and program.ask("GET", "/open")[0] == 307
    assert program.ask("GET", "/open", sec_fetch_site="cross-site")[0] == 403


@pytest.mark.slow
@pytest.mark.parametrize("version", GRADIOS)
def test_with_its_gradio_only_who_has_signed_in_sees_the_page(version, tmp_path):
    folder = FOLDER / f"gradio-{version}"
    if not folder.exists():
        pytest.skip("no gradio: python tests/setup_gradio.py")
    command = [sys.executable, ROOT / "tests/page/beside_gradio.py", tmp_path]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(folder)}, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["before"] == [403] * 3 and found["login"] == 200 and found["frame"]
    # A1111's packages are too old for the page.
    assert ("too old" in found["page"]) if version == "3.41.2" else ("page.js" in found["page"])
