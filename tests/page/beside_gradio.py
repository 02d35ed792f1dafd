"""Run the tab beside a real gradio that asks for a login, and print what a browser meets: python beside_gradio.py FOLDER."""

# pyright: reportMissingImports=false, reportOptionalMemberAccess=false, reportArgumentType=false

import json
import os
import sys
import types
import urllib.parse
import urllib.request
from http.cookiejar import CookieJar
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Lock
from types import SimpleNamespace as Values
from urllib.error import HTTPError

import gradio

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.argv[1])
os.environ |= {"HOME": str(FOLDER), "USERPROFILE": str(FOLDER), "GRADIO_ANALYTICS_ENABLED": "False"}
callbacks = {"on_ui_tabs": [], "on_app_started": [], "on_script_unloaded": []}
parts = {
    "call_queue": Values(queue_lock=Lock()),
    "script_callbacks": Values(**{name: each.append for name, each in callbacks.items()}),
    "sd_models": Values(checkpoints_list={}, checkpoint_aliases={}),
    "shared": Values(cmd_opts=Values(lora_dir=str(FOLDER), listen=True), opts=Values(sd_model_checkpoint=None)),
}
sys.modules["modules"] = types.ModuleType("modules")
vars(sys.modules["modules"]).update(parts)
spec = spec_from_file_location("facelora.py", ROOT / "scripts" / "facelora.py")
spec.loader.exec_module(module_from_spec(spec))

with gradio.Blocks() as demo, gradio.Tabs():
    for tab, title, identifier in callbacks["on_ui_tabs"][0]():
        with gradio.TabItem(title, id=identifier):
            tab.render()
app, address, _ = demo.launch(auth=("anna", "secret"), prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
callbacks["on_app_started"][0](demo, app)

cookies = urllib.request.HTTPCookieProcessor(CookieJar())
browser = urllib.request.build_opener(cookies)


def status(path: str, data: bytes | None = None) -> int:
    try:
        return browser.open(address + path, data, timeout=30).status
    except HTTPError as problem:
        return problem.code


paths = ("facelora/", "facelora/now", "facelora/people/Anna/lora")
before = [status(path) for path in paths]
form = urllib.parse.urlencode({"username": "anna", "password": "secret"}).encode()
signed_in = status("login", form)
page = browser.open(f"{address}facelora/", timeout=30).read().decode()
shown = "frame" in json.dumps(demo.get_config_file())
print(json.dumps({"before": before, "login": signed_in, "page": page, "frame": shown}))
sys.stdout.flush()
os._exit(0)  # gradio's server would go on.
