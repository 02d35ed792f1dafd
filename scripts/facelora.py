"""The tab of Forge Neo and SD.Next: the local page in a frame. They run this file, and none of their packages is changed."""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportArgumentType=false

import atexit
import html
import os
import re
import subprocess
import sys
import threading
from asyncio import wrap_future
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import gradio
from modules import call_queue, script_callbacks, sd_models, shared
from packaging.version import Version
from starlette.responses import HTMLResponse, RedirectResponse
from starlette.routing import Route

ROOT, PACK, FOLDER = Path(__file__).resolve().parents[1], "facelora_in_a_tab", Path("~/facelora").expanduser()
PYTHON = os.environ.get("FACELORA_PYTHON", "")  # Not a setting of the program, which others may change.
OPEN = ("share", "listen", "ngrok", "server_name")  # The options that let other computers reach the program.


def module(name: str):
    """Import a module of this pack, whose folder may have any name."""
    if PACK not in sys.modules:
        spec = spec_from_file_location(PACK, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
        spec.loader.exec_module(sys.modules.setdefault(PACK, module_from_spec(spec)))
    return import_module(f"{PACK}.{name}")


def explanation() -> str:
    """Return what to do about packages that are missing or too old; empty if none is."""
    missing, old = list[str](), list[str]()
    needed = re.findall(r"(?ms)^dependencies = \[.*?^\]|^page = [^\n]*", (ROOT / "pyproject.toml").read_text("utf-8"))
    for name, least in re.findall(r'"([\w-]+)>=([\d.]+)"', "".join(needed)):
        try:
            if Version(found := version(name)) < Version(least):
                old.append(f"{name} {found} (FaceLoRA needs {least})")
        except PackageNotFoundError:
            missing.append(f'"{name}>={least}"')
    own = FOLDER / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (old or missing):
        return ""
    why, then = "FaceLoRA needs packages that this program doesn't have. To install them:", "Then restart this program."
    commands = f'"{sys.executable}" -m pip install --no-deps {" ".join(missing)}'
    if old:
        why = f"These packages of this program are too old: {', '.join(old)}. Give FaceLoRA a Python of its own:"
        commands = f'"{sys.executable}" -m venv "{own.parents[1]}"\n"{own}" -m pip install "{ROOT}[faces,page]"'
        then = f"Then set the environment variable FACELORA_PYTHON to {own}, and restart this program."
    return f"<p>{html.escape(why)}</p><pre>{html.escape(commands)}</pre><p>{html.escape(then)}</p>"


def login(app, cookies) -> "bool | None":
    """Return whether cookies are those of somebody who has signed in; None if the program asks for no login."""
    if getattr(app, "auth", None) is None:
        return None
    return any(name.startswith("access-token") and value in app.tokens for name, value in cookies.items())


def bases() -> "dict[str, str]":
    """Return the titles of the program's base models by their paths, the chosen one first."""
    names = sd_models if hasattr(sd_models, "checkpoint_aliases") else import_module("modules.sd_checkpoint")
    chosen = names.checkpoint_aliases.get(shared.opts.sd_model_checkpoint)
    found = [*([chosen] if chosen else []), *sd_models.checkpoints_list.values()]
    return {os.path.abspath(one.filename): one.name for one in found if os.path.exists(one.filename)}


def own_page():
    """Return a link to the page of another Python, for programs whose packages are too old, such as A1111."""
    command = [PYTHON, "-m", "facelora", "page", "--no-browser", "--port=0", f"--folder={FOLDER}"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": ""})
    atexit.register(process.terminate)
    script_callbacks.on_script_unloaded(process.terminate)
    address = ThreadPoolExecutor(1).submit(lambda: process.stdout.readline().split()[-1])

    async def answer(scope, receive, send) -> None:
        link = HTMLResponse('<a href="open" target="_blank">FaceLoRA</a>')
        shown = RedirectResponse(await wrap_future(address)) if scope["path"] == "/open" else link
        await shown(scope, receive, send)

    return answer


def work(people, ended: threading.Event) -> None:
    """Run the page's jobs while the program draws nothing, and give it the LoRAs, until it unloads this script."""
    said = ""
    while not ended.wait(1):
        try:
            if people.jobs.running() or people.jobs.waiting():
                with call_queue.queue_lock:
                    run_job(people.jobs, ended)
            if people.copy_loras(Path(os.path.abspath(shared.cmd_opts.lora_dir))):
                networks = sys.modules.get("networks") or import_module("modules.lora.lora_load")
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
            step, steps = map(jobs.state(*found).get, ("step", "steps"))
            shared.state.sampling_step, shared.state.sampling_steps = step or 0, steps or 0
            if shared.state.interrupted:
                shared.state.interrupted = False
                jobs.stop(found[0])
    finally:
        shared.state.end(*([task] if task else []))


def page():
    """Return the page as an application, and start its work."""
    server, ended = module("nodes.page.server"), threading.Event()
    made = server.Page(FOLDER, bases, call_queue.queue_lock)
    script_callbacks.on_script_unloaded(ended.set)
    threading.Thread(target=work, args=(made.people, ended), daemon=True).start()
    return server.application(made)


def mount(_: object, app) -> None:
    """Answer below /facelora/. The program's login does not cover other routes than its own."""
    if login(app, {}) is None and any(getattr(shared.cmd_opts, name, None) for name in OPEN):
        inner = HTMLResponse("Other computers can reach this program, which asks for no login. FaceLoRA is off.")
    else:
        inner = own_page() if PYTHON else HTMLResponse(why) if (why := explanation()) else page()
        inner = module("nodes.page.guard").LoginGuard(inner, lambda cookies: login(app, cookies))
    app.router.routes.insert(0, Route("/facelora/{path:path}", inner))


def tabs() -> list:
    with gradio.Blocks(analytics_enabled=False) as tab:
        gradio.HTML(
            '<iframe src="facelora/" title="FaceLoRA" style="width: 100%; height: calc(100vh - 9em); border: 0">'
        )
    return [(tab, "FaceLoRA", "facelora")]


script_callbacks.on_ui_tabs(tabs)
script_callbacks.on_app_started(mount)
