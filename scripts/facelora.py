"""The tab of Forge Neo and SD.Next: the local page in a frame. These programs run this file; none of their packages is changed.

Where packages are too old, as in A1111, the page runs in a Python of its own, which FACELORA_PYTHON names.
"""

# pyright: reportMissingImports=false

import asyncio
import atexit
import html
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import threading
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gradio
from modules import call_queue, script_callbacks, sd_models, shared
from packaging.version import Version
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Route

ROOT, PACK, FOLDER = Path(__file__).resolve().parents[1], "facelora_in_a_tab", Path("~/facelora").expanduser()
FRAME = '<iframe src="facelora/" title="FaceLoRA" style="width: 100%; height: calc(100vh - 9em); border: 0"></iframe>'
PYTHON = os.environ.get("FACELORA_PYTHON", "")
"""Not a setting of the program, because other people may change those."""
OPEN = ("share", "listen", "ngrok", "server_name")
"""The options that let other computers reach the program."""


def module(name: str):
    """Import a module of this pack, whose folder may have any name."""
    if PACK not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        assert spec and spec.loader
        sys.modules[PACK] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[PACK])
    return importlib.import_module(f"{PACK}.{name}")


def explanation() -> str:
    """Return what to do about packages that are missing or too old; empty if none is."""
    missing, old = list[str](), list[str]()
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    needed = re.findall(r"^dependencies = \[.*?^\]|^page = [^\n]*", project, re.MULTILINE | re.DOTALL)
    for name, least in re.findall(r'"([\w-]+)>=([\d.]+)"', "".join(needed)):
        try:
            if Version(found := version(name)) < Version(least):
                old.append(f"{name} {found} (FaceLoRA needs {least})")
        except PackageNotFoundError:
            missing.append(f'"{name}>={least}"')
    own = FOLDER / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if old:
        why = f"These packages of this program are too old: {', '.join(old)}. Give FaceLoRA a Python of its own:"
        commands = [f'"{sys.executable}" -m venv "{FOLDER / "venv"}"', f'"{own}" -m pip install "{ROOT}[faces,page]"']
        then = f"Then set the environment variable FACELORA_PYTHON to {own}, and restart this program."
    elif missing:
        why, then = "FaceLoRA needs packages that this program doesn't have:", "Then restart this program."
        commands = [f'"{sys.executable}" -m pip install --no-deps {" ".join(missing)}']
    else:
        return ""
    return f"<p>{html.escape(why)}</p><pre>{html.escape(chr(10).join(commands))}</pre><p>{html.escape(then)}</p>"


def login(app, cookies) -> "bool | None":
    """Return whether cookies are those of somebody who has signed in; None if the program asks for no login."""
    if getattr(app, "auth", None) is None:
        return None
    return any(name.startswith("access-token") and value in app.tokens for name, value in cookies.items())


def bases() -> "dict[str, str]":
    """Return the titles of the program's base models by their paths, the chosen one first."""
    has_names = hasattr(sd_models, "checkpoint_aliases")
    known = (sd_models if has_names else importlib.import_module("modules.sd_checkpoint")).checkpoint_aliases
    chosen = known.get(shared.opts.sd_model_checkpoint)
    found = [*([chosen] if chosen else []), *sd_models.checkpoints_list.values()]
    return {os.path.abspath(one.filename): one.name for one in found if os.path.exists(one.filename)}


class OwnPython:
    """The page as a process of another Python, which the browser opens in a window of its own."""

    def __init__(self) -> None:
        self._address, self._process, self._lock = "", None, threading.Lock()

    async def __call__(self, scope, receive, send) -> None:
        answer = HTMLResponse('<a href="open" target="_blank">FaceLoRA</a>')
        if scope["path"] == "/open":
            answer = RedirectResponse(await asyncio.to_thread(self._start))
        await answer(scope, receive, send)

    def _start(self) -> str:
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                command = [PYTHON, "-m", "facelora", "page", "--no-browser", "--port=0", f"--folder={FOLDER}"]
                others = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
                self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=others)
                atexit.register(self._process.terminate)
                self._address = self._process.stdout.readline().split()[-1]
            return self._address


def work(people, ended: threading.Event) -> None:
    """Run the page's jobs while the program draws nothing, and give it the LoRAs, until it unloads this script."""
    said = ""
    while not ended.wait(1):
        try:
            if people.jobs.running() or people.jobs.waiting():
                with call_queue.queue_lock:
                    run_job(people.jobs, ended)
            if people.copy_loras(Path(shared.cmd_opts.lora_dir)):
                networks = sys.modules.get("networks") or importlib.import_module("modules.lora.lora_load")
                networks.list_available_networks()
        except Exception as problem:  # The next second may be better.
            if said != (said := f"FaceLoRA: {type(problem).__name__}: {problem}"):
                print(said, file=sys.stderr)


def run_job(jobs, ended: threading.Event) -> None:
    task = shared.state.begin("FaceLoRA")
    try:
        sd_models.unload_model_weights()
        jobs.start_next()
        while (found := jobs.running()) and not ended.wait(0.5):
            shown = jobs.state(*found)
            shared.state.sampling_step, shared.state.sampling_steps = shown.get("step", 0), shown.get("steps", 0)
            if shared.state.interrupted:
                shared.state.interrupted = False
                jobs.stop(found[0])
    finally:
        shared.state.end(*([task] if task else []))


def mount(_: object, app) -> None:
    """Answer below /facelora/. The program's login does not cover other routes than its own."""
    signed_in = partial(login, app)
    if signed_in({}) is None and any(getattr(shared.cmd_opts, name, None) for name in OPEN):
        inner = HTMLResponse(
            "Other computers can reach this program, which asks for no login. FaceLoRA shows photos to nobody then."
        )
    else:
        if PYTHON or (why := explanation()):
            inner = OwnPython() if PYTHON else HTMLResponse(why)
        else:
            server = module("nodes.page.server")
            page = server.Page(FOLDER, bases)
            page.people.jobs.starts = False
            inner, ended = server.application(page), threading.Event()
            script_callbacks.on_script_unloaded(ended.set)
            threading.Thread(target=work, args=(page.people, ended), daemon=True).start()
        inner = module("nodes.page.guard").LoginGuard(inner, signed_in)
    app.router.routes.insert(0, Route("/facelora/{path:path}", inner))


def tabs() -> list:
    with gradio.Blocks(analytics_enabled=False) as tab:
        gradio.HTML(FRAME)
    return [(tab, "FaceLoRA", "facelora")]


script_callbacks.on_ui_tabs(tabs)
script_callbacks.on_app_started(mount)
