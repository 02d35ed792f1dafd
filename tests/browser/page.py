"""ComfyUI's real frontend in headless chromium: workflows opened, prompts made and queued as a user's page does it."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page, TimeoutError, sync_playwright

from core.errors import MissingPackage
from tests.comfyui.server import ComfyServer

from .setup_chromium import BY_HAND, find_chromium

SWITCHES = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--force-color-profile=srgb",
]  # fmt: skip
SETTINGS = {
    "Comfy.TutorialCompleted": True,  # else the template browser opens by itself
    "Comfy.OnboardingCoachmarks.Seen": ["appMode", "firstRun"],  # the same for apps
    "Comfy.Validation.Workflows": True,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Minimap.Visible": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # texts stay readable on a screenshot of a whole graph
}
SIZE = {"width": 1600, "height": 1000}
EMPTY = {
    "version": 0.4, "last_node_id": 0, "last_link_id": 0, "nodes": [], "links": [], "groups": [], "config": {}, "extra": {},
}  # fmt: skip


def prepare(server: ComfyServer) -> None:
    """Settings of a user who has seen the tour, and wants workflow files to be checked."""
    for name, value in SETTINGS.items():
        server.post(f"/settings/{name}", value)


@contextmanager
def running_browser() -> Iterator[Browser]:
    """A chromium with a profile of its own that is thrown away. MissingPackage where there is none."""
    program = find_chromium()
    if program is None:
        raise MissingPackage(f"the browser tests need a chromium: {BY_HAND}")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=SWITCHES)
        try:
            yield browser
        finally:
            browser.close()


def drop_files(page: Page, place: Callable[[], tuple[float, float]], files: list[Path]) -> None:
    """Drags files from the desktop to a place on the page, and lets them go. The hand follows a place that moves."""
    session = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
    for event in ("dragEnter", "dragOver", "dragOver", "drop"):
        x, y = place()
        session.send("Input.dispatchDragEvent", {"type": event, "x": x, "y": y, "data": data})
        page.wait_for_timeout(150)


class ComfyPage:
    """One open page. `problems` are the errors and toasts that a user would have seen."""

    def __init__(self, browser: Browser, server: ComfyServer, address: str = "/", user: str = ""):
        """`user` is the id of one who has logged in, with --multi-user."""
        self.server = server
        self.problems: list[str] = []
        self._loads = 0
        self._page = browser.new_context(viewport=SIZE).new_page()  # pyright: ignore
        if user:
            self._page.add_init_script(f"localStorage['Comfy.userId'] = localStorage['Comfy.userName'] = '{user}'")
        self._page.on("console", self._heard)
        self._page.on("pageerror", lambda error: self.problems.append(f"page error: {error}"))
        self.go(address)

    @property
    def page(self) -> Page:
        return self._page

    def _heard(self, message: ConsoleMessage) -> None:
        address = message.location.get("url", "")
        # At any time after a page is opened, the frontend asks how large the models of its own first graph are.
        if message.type == "error" and "missingModelDownload" not in address:
            self.problems.append(f"console: {message.text} ({address})")

    def reload(self) -> None:
        """As if the user pressed F5."""
        self.go("/")

    def go(self, address: str) -> None:
        self._loads += 1
        self._page.goto(self.server.url + address)
        self.wait_until_ready()
        self.problems.clear()

    def wait_for(self, condition: str, seconds: float = 120) -> None:
        """Until a function in the page returns something true. AssertionError with what the page shows instead."""
        try:
            self._page.wait_for_function(condition, timeout=1000 * seconds)
        except TimeoutError as problem:
            shown = self._page.inner_text("body")
            raise AssertionError(f"not within {seconds} s: {condition}\n{self.complaints()}\n{shown}") from problem

    def wait_until_ready(self) -> None:
        ready = "() => window.app?.graph && window.LiteGraph?.registered_node_types?.FaceLoRATrain"
        self._page.wait_for_function(ready, timeout=300_000)
        self._page.wait_for_selector("#graph-canvas, canvas", timeout=300_000)
        self._page.wait_for_timeout(500)

    def is_as_opened(self) -> bool:
        """Whether `start_over` is all that it needs for another test: it was not loaded again, and shows no message."""
        return self._loads == 1 and not self.complaints()

    def run(self, script: str, argument: Any = None) -> Any:
        """What a function in the page returns."""
        return self._page.evaluate(script, argument)

    def clear(self) -> None:
        """An empty graph, and nothing wrong so far."""
        self._load(EMPTY, "")
        self.problems.clear()

    def start_over(self) -> None:
        """An empty graph in the only tab."""
        self.clear()
        self.run("""async () => {
            const tabs = window.app.extensionManager.workflow
            for (const tab of [...tabs.openWorkflows]) if (tab !== tabs.activeWorkflow) await tabs.closeWorkflow(tab)
        }""")

    def open(self, workflow: dict[str, Any], name: str) -> None:
        self._load(workflow, name)
        self._page.wait_for_timeout(800)

    def _load(self, workflow: dict[str, Any], name: str) -> None:
        self.run("([workflow, name]) => window.app.loadGraphData(workflow, true, true, name || null)", [workflow, name])

    def saved(self) -> dict[str, Any]:
        """The graph as the frontend would write it into a file."""
        return json.loads(self.run("() => JSON.stringify(window.app.graph.serialize())"))

    def prompt(self) -> dict[str, Any]:
        """The graph as the frontend would send it to the server."""
        return self.run("async () => (await window.app.graphToPrompt()).output")

    def set_widgets(self, values: dict[str, dict[str, Any]]) -> None:
        """Node type -> widget -> value, on every node of the type."""
        missing = self.run(
            """(values) => {
                const missing = []
                for (const [type, widgets] of Object.entries(values))
                    for (const node of window.app.graph.nodes.filter((node) => node.type === type))
                        for (const [name, value] of Object.entries(widgets)) {
                            const widget = node.widgets.find((widget) => widget.name === name)
                            if (!widget) missing.push(`${type}.${name}`)
                            else { widget.value = value; widget.callback?.(value) }
                        }
                return missing
            }""",
            values,
        )
        assert not missing, missing

    def add(self, node_type: str, position: tuple[int, int] = (100, 100)) -> None:
        """Puts a node on the canvas, as wide as the workflows have it."""
        self.run(
            """([type, position]) => {
                const node = LiteGraph.createNode(type)
                app.graph.add(node)
                node.pos = position
                node.setSize([400, node.computeSize()[1]])
            }""",
            [node_type, position],
        )
        self._page.wait_for_timeout(300)

    def widgets(self, node_type: str) -> dict[str, Any]:
        """Name -> value, of the first node of a type."""
        return self.run(
            """(type) => Object.fromEntries(window.app.graph.nodes.find((node) => node.type === type)
                .widgets.map((widget) => [widget.name, widget.value]))""",
            node_type,
        )

    def drop(self, node_type: str, files: list[Path]) -> None:
        """Drags files from the desktop onto the title of a node, and lets them go."""
        title = """(type) => {
            const node = window.app.graph.nodes.find((node) => node.type === type)
            const { scale, offset } = window.app.canvas.ds
            return [(node.pos[0] + node.size[0] / 2 + offset[0]) * scale, (node.pos[1] + 15 + offset[1]) * scale]
        }"""
        drop_files(self._page, lambda: self.run(title, node_type), files)

    def queue(self) -> str:
        """The id of the prompt that the frontend has queued."""
        with self._page.expect_response(lambda answer: answer.url.endswith("/prompt"), timeout=60_000) as answered:
            self.run("() => { window.app.queuePrompt(0) }")
        answer = answered.value.json()
        assert "prompt_id" in answer, answer
        return answer["prompt_id"]

    def toasts(self) -> list[str]:
        return self._page.eval_on_selector_all(".p-toast-message", "(all) => all.map((one) => one.innerText)")

    def dialogs(self) -> list[str]:
        return self._page.eval_on_selector_all("[role=dialog]", "(all) => all.map((one) => one.innerText)")

    def complaints(self) -> list[str]:
        """All that a user would call a warning."""
        return self.problems + [f"toast: {text}" for text in self.toasts()] + [f"dialog: {d}" for d in self.dialogs()]

    def close(self) -> None:
        self._page.context.close()
