"""Odd requests to the pages' routes."""

import hashlib
import io
import json
import math
import os
import zipfile
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from core.storage.cache_folder import content_key
from lab.soak.pages import KEYS, ask_often, furnish

from .graphs import load_photos


def test_odd_requests_are_answered_and_leave_no_traceback(server):
    mark = server.mark()
    statuses, faults = ask_often(server.url, server.folder / "input" / "soak", "make test", 300)
    assert faults == []
    assert statuses[200] > 60 and statuses[400] > 10 < statuses[404]
    assert "Traceback" not in server.log(mark)


def status_of(server, path: str, body: bytes, kind: str, **headers: str) -> tuple[int, str]:
    try:
        with urlopen(Request(server.url + path, body, {"Content-Type": kind} | headers)) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


DEEP = b"[" * 50_000 + b"]" * 50_000
MULTIPART = "multipart/form-data; boundary=a"
FILE = b'--a\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n\r\n--a--\r\n'
FOLDER = b'--a\r\nContent-Disposition: form-data; name="folder"\r\n\r\nphotos/%s\r\n'


@pytest.mark.parametrize(
    ("path", "body", "kind", "status", "words"),
    [
        ("check", DEEP, "application/json", 400, "send"),
        ("check", json.dumps({"folder": "anna", "resolution": math.inf}).encode(), "text/plain", 400, "send"),
        ("check", json.dumps({"folder": "anna", "resolution": 10**400}).encode(), "text/plain", 200, "verdict"),
        ("stop", DEEP, "application/json", 400, "send a JSON object with prompt and node"),
        ("stop", b'{"prompt": "p", "node": null}', "application/json", 400, "send a JSON object"),
        ("stop", b'{"prompt": "p", "node": 5}', "application/json", 404, "no training run in node 5 of prompt p"),
        ("stop", b"{}", "application/json; charset=none", 400, "send a JSON object"),
        ("photos", b"", MULTIPART, 400, "send a form"),
        ("photos", b"--a\r\nodd\x19\r\n\r\n\r\n--a--\r\n", MULTIPART, 400, "send a form"),
        ("photos", FILE % b"a\0.png", MULTIPART, 400, "send a form"),
        ("photos", FOLDER % (b"f" * 300) + FILE % b"a.png", MULTIPART, 200, "a.png: "),
    ],
)
def test_a_request_that_no_page_sends_is_refused(server, path, body, kind, status, words):
    mark = server.mark()
    given, text = status_of(server, f"/facelora/{path}", body, kind)
    assert (given, words in text, "Traceback" in server.log(mark)) == (status, True, False), text


def test_a_page_in_a_sandbox_may_not_add_photos(server):
    assert status_of(server, "/facelora/photos", FILE % b"a.png", MULTIPART, Origin="null")[0] == 403


def test_the_check_follows_no_link_out_of_the_input_folder(server):
    list(furnish(server.folder))
    for folder, words in {"": "whole input folder", ".": "whole input folder", "inside": "inside/out.png: not in ComfyUI",
                          "out": "not in ComfyUI", "loop": "doesn't exist"}.items():  # fmt: skip
        assert words in server.post("/facelora/check", {"folder": folder})["error"]
    caption = server.folder / "input" / "photos" / "anna" / "photo 01.txt"
    caption.symlink_to(secret := server.folder / "secret.txt")
    secret.write_text("a secret")
    for answer in (
        server.post("/facelora/check", {"folder": "photos/anna"}),
        server.post("/facelora/check", {"pictures": "photos/anna/photo 01.png"}),
        server.send("PUT", "/facelora/caption", {"name": "photos/anna/photo 01.png", "caption": "changed"}),
    ):
        assert "not in ComfyUI's input folder" in answer["error"]
    caption.unlink()
    for folder, words in {5: "5: this folder doesn't exist", 10**300: "not a valid file name"}.items():
        graph = {"photos": load_photos() | {"inputs": load_photos()["inputs"] | {"folder": folder}}}
        assert words in server.error(graph)
    assert secret.read_text() == "a secret" and "no photos" in server.post("/facelora/check", {})["error"]


def test_headshots_are_downloaded_whatever_their_names_and_times_are_and_whatever_the_record_contains(server):
    list(furnish(server.folder))
    files = [server.folder / "output" / os.fsdecode(name) for name in (b"old.png", b"\x80.png")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(file.name.encode("utf-8", "replace"))
    os.utime(files[0], (0, 0))
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    panel = server.folder / "cache" / "panels" / f"{content_key('person', 'default', KEYS['anna'])}.json"
    record, address = json.loads(panel.read_text()), f"/facelora/people/{KEYS['anna']}"
    record["headshots"] = digests | dict.fromkeys(("a\0b", "\ud800", "x" * 300, "../secret"), "0")
    panel.write_text(json.dumps(record | {"styles": {"old.png": ["corporate", "plain", 0.5]}}))
    with zipfile.ZipFile(io.BytesIO(server.read(f"{address}/headshots"))) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == {"old.png": b"old.png", "_.png": b"?.png"}
    assert [one["name"] for one in server.get(f"{address}/styles")] == ["old.png"]
    odd_files = ({"file": file} for file in (5, "\ud800"))
    for odd in ({"styles": 5}, {"styles": {"old.png": "x"}}, {"renaming": "x"}, {"name": "."}, *odd_files):
        panel.write_text(json.dumps(record | odd))
        for part in ("consent", "files", "headshots", "styles"):
            server.read(f"{address}/{part}")  # raises for an answer of 500
        assert server.read("/facelora/people") and server.read(address)
    for file in files:
        file.unlink()


def test_people_are_listed_renamed_and_deleted_among_odd_files(server):
    theirs = {path: path.read_bytes() for path in furnish(server.folder)}
    address = {name: f"/facelora/people/{key}" for name, key in KEYS.items()}
    assert {*KEYS, "kept"} <= {one["name"] for one in server.get("/facelora/people")}
    for name in ("maria", "anna-step000100", "b" * 250, None, ["bea"]):
        assert "error" in server.send("PATCH", address["anna"], {"name": name})
    assert server.send("PATCH", address["anna"], {"name": "bea"}) == {"name": "bea"}
    deleted = [sorted(server.delete(address[name])["deleted"]) for name in ("anna", "carl")]
    files = [[f"{name}-step000100.safetensors", f"{name}.safetensors"] for name in ("bea", "carl")]
    assert deleted == files
    mask = server.send("DELETE", "/facelora/photos", {"names": ["photos/kept/photo 01-masklabel.png"]})
    assert mask == {"deleted": []} and all(path.read_bytes() == data for path, data in theirs.items())
    server.delete(address["ben"])
    server.delete(f"/facelora/people/{'f' * 64}")
