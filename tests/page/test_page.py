"""The local page: who may reach it, what it takes, and its jobs, whose command is a short script. A browser: tests/browser."""

import asyncio
import json
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from core.photos import read_person_file
from core.studio import Result
from core.studio.report import write_report
from tests.pictures.test_publication import write_lora
from tests.tooling import nodes_module, write_photos

SERVER, JOBS, PEOPLE = (nodes_module(name, "nodes.page") for name in ("server", "jobs", "people"))
GUARD = nodes_module("guard", "nodes.page")
TOKEN = "a-token"
STEPS = [
    {"phase": "training", "step": 1, "steps": 2, "loss": 0.5, "learning_rate": 0.1, "seconds_left": 9, "likeness": None}
]
MADE = {"name": "Anna", "status": "made", "reason": "", "lora": "Anna/Anna.safetensors", "kept": 1, "likeness": 0.6}


class Client:
    """Asks the page as a browser does, without a network."""

    def __init__(self, folder: Path) -> None:
        self.app = SERVER.application(SERVER.Page(folder))
        self.guarded = GUARD.Guard(self.app, TOKEN)

    def ask(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str = TOKEN,
        client: Any = ("127.0.0.1", 5),
        **headers: str,
    ) -> tuple[int, Any]:
        """Return the status and what was answered. Dictionaries are sent as JSON."""
        content = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given = {"host": "127.0.0.1:8190", "content-type": "application/json"}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        scope = {
            "type": "http", "method": method, "path": f"/{token}{path.partition('?')[0]}", "root_path": "", "scheme": "http",
            "query_string": path.partition("?")[2].encode(), "headers": [(k.encode(), v.encode()) for k, v in given.items()],
            "http_version": "1.1", "client": client, "server": None,
        }  # fmt: skip
        sent: list[Any] = []
        asked: list[bool] = []

        async def receive() -> dict[str, Any]:
            if asked.append(True) or len(asked) > 1:
                await asyncio.Event().wait()  # The browser stays.
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.guarded(scope, receive, send))
        answer = b"".join(message.get("body", b"") for message in sent)
        return sent[0]["status"], json.loads(answer) if answer[:1] in (b"{", b"[") else answer


@pytest.fixture
def client(tmp_path) -> Client:
    return Client(tmp_path / "home")


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Replaces the command by one that prints these events and waits `seconds`."""

    def replace(events: list[dict[str, Any]], seconds: float = 0, error: str = "") -> None:
        code = "import sys, time\n" + "".join(f"print({json.dumps(event)!r}, flush=True)\n" for event in events)
        code += f"time.sleep({seconds})\n" + (f"sys.exit({error!r})\n" if error else "")
        monkeypatch.setattr(JOBS, "COMMAND", (sys.executable, "-c", code))

    yield replace
    for child in psutil.Process().children():
        child.kill()


def picture() -> bytes:
    stream = BytesIO()
    Image.effect_noise((80, 80), 60).save(stream, "PNG")
    return stream.getvalue()


def begin(client: Client, name: str = "Anna", **other: Any) -> tuple[int, Any]:
    assert client.ask("PUT", "/photos/me.png", picture())[0] == 200
    return client.ask("POST", "/people", {"name": name, "base": "demo", "agreed": True, **other})


def person(client: Client, name: str = "Anna") -> dict[str, Any]:
    return client.ask("GET", f"/now?person={name}")[1]["person"]


def until(client: Client, phase: str, name: str = "Anna") -> dict[str, Any]:
    end = time.monotonic() + 30
    while (shown := person(client, name))["phase"] != phase or (phase != "training" and shown["active"]):
        assert time.monotonic() < end, shown
        time.sleep(0.05)
    return shown


def write_results(home: Path, name: str = "Anna") -> None:
    """What the studio leaves of a trained person."""
    folder = home / name
    (folder / "more-1").mkdir(parents=True)
    (folder / "studio.json").write_text("{}")
    for place, file, likeness in (("", "001-1.png", 0.3), ("", "002-2.png", None), ("more-1", "001-3.png", 0.6)):
        (folder / place / file).write_bytes(picture())
        shot = {
            "file": file,
            "likeness": likeness,
            "kept": False,
            "style": "Photo",
            "seed": 7,
            "prompt": "a",
            "negative": "",
        }
        about = folder / place / "headshots.json"
        known = json.loads(about.read_text())["headshots"] if about.exists() else []
        about.write_text(json.dumps({"headshots": [*known, shot | {"size": [64, 80], "steps": 2, "guidance": 2.5}]}))


# Who may reach it


def test_no_address_answers_without_the_token(client):
    routes = [(method, route.path) for route in client.app.routes for method in route.methods or ()]
    assert len(routes) > 30
    for token in ("", "another", TOKEN[:-1], TOKEN + "x"):
        answers = {client.ask(method, path, token=token)[0] for method, path in routes}
        assert answers == {403}
    assert client.ask("GET", "/now")[0] == client.ask("GET", "/")[0] == client.ask("GET", "/page.js")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8190"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},
        {"sec_fetch_site": "cross-site"},
        {"sec_fetch_site": "same-site"},
    ],
)
def test_another_site_can_do_nothing_even_with_the_token(client, headers):
    for method, path in (("GET", "/now"), ("POST", "/people"), ("PUT", "/photos/a.png")):
        assert client.ask(method, path, {}, **headers)[0] == 403


def test_whoever_has_the_token_can_follow_a_link_to_the_page(client):
    link = {"sec_fetch_site": "cross-site", "sec_fetch_dest": "document"}
    assert client.ask("GET", "/", **link)[0] == 200 and client.ask("GET", "/", token="bad", **link)[0] == 403
    assert client.ask("POST", "/people", {}, **link)[0] == 403


def test_a_form_and_a_large_request_are_refused(client):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.ask("POST", "/people", {}, content_type=kind)[0] == 415
    assert client.ask("POST", "/people", {"name": "a" * 2**17})[0] == 413
    assert client.ask("POST", "/people", b"{not json")[0] == client.ask("POST", "/people", [1])[0] == 400


def test_only_this_user_can_read_the_token_and_it_stays(tmp_path):
    token = SERVER.token_in(tmp_path)
    assert token == SERVER.token_in(tmp_path) and len(token) > 30
    assert sys.platform == "win32" or (tmp_path / "token.txt").stat().st_mode & 0o077 == 0


# What it takes


def test_photos_are_checked_and_other_files_refused(client, tmp_path, monkeypatch):
    photos = sorted(write_photos(tmp_path / "photos", count=3, scale=2).glob("*.png"))
    for photo in photos:
        assert client.ask("PUT", f"/photos/{photo.name}", photo.read_bytes())[0] == 200
    assert client.ask("PUT", "/photos/again.png", photos[0].read_bytes()) == (200, {"name": "0.png"})
    checked = client.ask("GET", "/check?base=demo")[1]
    assert [tile["verdict"] for tile in checked["photos"]] == ["good"] * 3 and "3 of 3 usable" in checked["headline"]
    for name, content in (("a.txt", b"hello"), ("a.png", b"hello"), ("a.html", b"<script>"), ("a.svg", b"<svg/>")):
        status, answer = client.ask("PUT", f"/photos/{name}", content)
        assert status == 400 and answer["error"].startswith(name)
    monkeypatch.setattr(PEOPLE, "MAX_BYTES", 1000)
    assert "larger than" in client.ask("PUT", "/photos/large.png", picture())[1]["error"]
    monkeypatch.setattr(PEOPLE, "MOST_PHOTOS", 3)
    assert "already" in client.ask("PUT", "/photos/fourth.png", b"")[1]["error"]
    assert client.ask("GET", "/now")[1]["photos"] == ["0.png", "1.png", "2.png"]
    assert [path.name for path in (tmp_path / "home/.page/.next/part").iterdir()] == []
    assert client.ask("GET", "/photos/0.png")[1][:2] == b"\xff\xd8"
    assert client.ask("DELETE", "/photos/0.png")[0] == 200 and len(client.ask("GET", "/now")[1]["photos"]) == 2


@pytest.mark.parametrize("name", ["../secret.png", "..", "/etc/passwd", "a/../../secret.png", "..\\secret.png"])
def test_no_path_leaves_the_folders(client, script, tmp_path, name):
    (tmp_path / "secret.png").write_bytes(picture())
    script([MADE])
    assert begin(client)[0] == 200
    until(client, "done")
    write_results(tmp_path / "home")
    for kind in ("photos", "samples", "headshots"):
        assert client.ask("GET", f"/people/Anna/{kind}/{name}")[0] in (400, 404)
    assert client.ask("PUT", f"/people/Anna/headshots/{name}", {"favourite": True})[0] in (400, 404)
    assert client.ask("GET", f"/check?base={tmp_path / 'base.safetensors'}")[0] == 400
    assert begin(client, name)[0] == 400 and client.ask("PATCH", "/people/Anna", {"name": name})[0] == 400
    assert client.ask("DELETE", f"/people/{name}")[0] in (400, 404, 405) and (tmp_path / "secret.png").exists()
    stored = client.ask("PUT", f"/photos/{name}", picture())
    assert stored[0] in (400, 404) or ("/" not in stored[1]["name"] and "\\" not in stored[1]["name"])


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"agreed": False}, "agreed"), ({"name": ""}, "valid"), ({"name": "con"}, "valid"), ({"base": "/etc"}, "base model"),
        ({"count": 0}, "count"), ({"recipe": "x"}, "recipe"), ({"count": "1"}, "count"), ({"unknown": 1}, "unknown"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused_in_words(client, asked, word):
    status, answer = begin(client, **asked)
    assert status == 400 and word in answer["error"]
    assert client.ask("GET", "/now")[1] == {"people": [], "person": None, "photos": ["me.png"]}


def test_base_models_are_found_in_named_folders_only(client, tmp_path, small_sd15):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/sd15.safetensors").write_bytes(small_sd15.read_bytes())
    (tmp_path / "models/outside.safetensors").symlink_to(small_sd15)
    (tmp_path / "models/broken.safetensors").write_bytes(b"nothing")
    assert client.ask("PUT", "/folders", {"folders": ["relative"]})[0] == 400
    setup = client.ask("PUT", "/folders", {"folders": [str(tmp_path / "models"), ""]})[1]
    assert [(one["title"], one["lacks"]) for one in setup["bases"]] == [("demo", ""), ("sd15.safetensors", "")]
    assert client.ask("GET", "/forecast?base=demo&photos=10&pictures=4")[1]["spans"].keys() == {
        "fast",
        "balanced",
        "best",
    }


# Its jobs


def test_a_job_shows_its_progress_and_a_page_that_starts_later_finds_it(client, script, tmp_path):
    script(STEPS, seconds=60)
    assert begin(client)[0] == 200
    shown = until(client, "training")
    assert shown["active"] and shown["history"] == [[1, 0.5]] and 0 < shown["seconds_left"] <= 9
    assert client.ask("GET", "/forecast?base=demo")[1] == b"null"
    later = Client(tmp_path / "home")
    assert person(later)["phase"] == "training" and person(later)["active"]
    assert later.ask("POST", "/people/Anna/continue", {})[0] == 400  # It runs already.
    assert later.ask("DELETE", "/people/Anna")[0] == later.ask("PATCH", "/people/Anna", {"name": "B"})[0] == 400
    assert later.ask("POST", "/people/Anna/stop", {})[0] == 200
    assert until(later, "stopped")["history"] == [[1, 0.5]]


def test_a_killed_job_continues_with_its_curves(client, script, tmp_path):
    script(STEPS, seconds=60)
    begin(client)
    until(client, "training")
    psutil.Process(json.loads((tmp_path / "home/.page/Anna/train.json").read_text())["pid"]).kill()
    assert until(client, "stopped")["error"] == ""
    script([STEPS[0] | {"step": 2, "loss": 0.4}, MADE])
    assert client.ask("POST", "/people/Anna/continue", {})[0] == 200
    assert until(client, "done")["history"] == [[1, 0.5], [2, 0.4]]


def test_a_failed_job_says_why(client, script):
    script([], error="facelora: the disk is full")
    begin(client)
    assert until(client, "failed")["error"] == "the disk is full"


def test_jobs_run_one_after_the_other_and_a_waiting_one_can_be_cancelled(client, script):
    script(STEPS, seconds=60)
    for name in ("Anna", "Berta", "Carla"):
        assert begin(client, name)[0] == 200
    until(client, "training")
    assert [person(client, name)["phase"] for name in ("Berta", "Carla")] == ["waiting"] * 2
    assert person(client, "Carla")["ahead"] == 2
    client.ask("POST", "/people/Berta/stop", {})
    assert person(client, "Berta")["phase"] == "stopped" and person(client, "Carla")["ahead"] == 1
    client.ask("POST", "/people/Anna/stop", {})
    until(client, "training", "Carla")


def test_a_name_is_taken_once(client, script):
    script([MADE])
    begin(client)
    until(client, "done")
    assert "taken" in begin(client, "anna")[1]["error"]


# What people have


def test_the_note_of_consent_is_only_among_the_photos_and_follows_a_new_name(client, script, tmp_path):
    script([MADE])
    note = {"agreed_by": "Zora Quist", "agreed_for": "the jubilee book"}
    assert "agreed_until need each other" in begin(client, **note)[1]["error"]
    assert begin(client, **note, agreed_until="2031-12-31")[0] == 200
    until(client, "done")
    home, file = tmp_path / "home", tmp_path / "home" / ".page" / "Anna" / "photos" / "person.toml"
    assert read_person_file(file)[0].agreed_by == "Zora Quist" and person(client)["photos"] == 2
    assert [path for path in home.rglob("*") if path.is_file() and b"Zora" in path.read_bytes()] == [file]
    write_results(home)
    write_lora(home / "Anna" / "Anna.safetensors")
    (home / "Anna" / "Anna.person.toml").write_text("agreed = true")
    assert client.ask("PATCH", "/people/Anna", {"name": "Ben"})[0] == 200
    assert [path.name for path in (home / "Ben").glob("*.toml")] == ["Ben.person.toml"]


def test_headshots_are_ranked_marked_renamed_and_deleted_with_everything_else(client, script, tmp_path):
    script([MADE])
    begin(client)
    until(client, "done")
    write_results(tmp_path / "home")
    shots = person(client)["headshots"]
    assert [(one["file"], one["likeness"]) for one in shots] == [
        ("more-1/001-3.png", 0.6), ("001-1.png", 0.3), ("002-2.png", -1.0),
    ]  # fmt: skip
    assert client.ask("GET", "/people/Anna/headshots/more-1/001-3.png")[1][:4] == b"\x89PNG"
    for favourite in (True, False, True):
        client.ask("PUT", "/people/Anna/headshots/001-1.png", {"favourite": favourite})
        assert [one["file"] for one in person(client)["headshots"] if one["favourite"]] == ["001-1.png"] * favourite
    assert client.ask("GET", "/people/Anna/zip")[1][:2] == b"PK"
    assert client.ask("POST", "/people/Anna/publish", {"title": "A", "agreed": False})[0] == 400
    write_report(tmp_path / "home", [Result("Anna", "made")])
    assert (
        client.ask("PATCH", "/people/Anna", {"name": "Berta"})[0] == 200
        and len(person(client, "Berta")["headshots"]) == 3
    )
    assert "Anna" not in (tmp_path / "home/report.json").read_text()
    assert client.ask("DELETE", "/people/Berta")[0] == 200
    for report in ("report.json", "report.html"):
        (tmp_path / "home" / report).unlink()
    left = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    assert left == [] and client.ask("GET", "/now")[1]["people"] == []


def test_more_are_drawn_like_one_or_in_chosen_styles(client, script, tmp_path, monkeypatch):
    script([MADE])
    begin(client)
    until(client, "done")
    assert "no LoRA" in client.ask("POST", "/people/Anna/draw", {"like": "001-1.png"})[1]["error"]
    write_results(tmp_path / "home")
    (tmp_path / "home/Anna/Anna.safetensors").touch()
    asked: list[list[str]] = []
    monkeypatch.setattr(JOBS.Jobs, "ask", lambda self, place, kind, words: asked.append(words))
    assert client.ask("POST", "/people/Anna/draw", {"like": "001-1.png"})[0] == 200
    assert client.ask("POST", "/people/Anna/draw", {"pack": "corporate", "styles": ["Lobby"], "count": 3})[0] == 200
    assert {"--seed=8", "--prompt=a", "--size=64x80", "--count=4"} <= {*asked[0]}
    assert {"--style-pack=corporate", "--style=Lobby", "--count=3"} <= {*asked[1]}
    for wrong in ({"like": "../x"}, {"like": "001-1.png", "other": 1}, {"pack": "a", "count": 0}):
        assert client.ask("POST", "/people/Anna/draw", wrong)[0] == 400
