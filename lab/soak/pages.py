"""Odd HTTP requests to the routes of a real ComfyUI server, among files that none of them may change."""

import http.client
import json
import shutil
import urllib.parse
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from safetensors.torch import save_file

from core.lora.file import KEY
from core.storage.cache_folder import content_key

from .damage import ODD, damaged_bytes, json_bytes
from .desk import PHOTO_FORMATS, pictures

ROUTES = {
    "/facelora/training": "GET", "/facelora/waiting": "GET", "/facelora/stop": "POST", "/facelora/styles": "GET pack",
    "/facelora/style": "GET pack style", "/facelora/photo": "GET name", "/facelora/photos": "POST DELETE",
    "/facelora/caption": "PUT", "/facelora/check": "POST", "/facelora/people": "GET",
    "/facelora/people/KEY": "GET PATCH PATCH DELETE", "/facelora/people/KEY/files": "GET",
    "/facelora/people/KEY/consent": "GET PATCH", "/facelora/people/KEY/headshots": "GET",
    "/facelora/people/KEY/styles": "GET", "/facelora/lora": "GET name",
    "/facelora/recipe": "GET name base", "/facelora/forecast": "GET base photos pictures",
}  # fmt: skip
"""Route -> its methods, and the names in its query."""
KEYS = {name: f"{number:064x}" for number, name in enumerate(("anna", "ben", "carl"), start=1)}
"""The people whose records are made anew all the time, and the keys of their training runs."""
_DEEP = b"[" * 50_000 + b"]" * 50_000
_WORDS = (
    *(f"soak/0.{ending}" for ending in PHOTO_FORMATS), "corporate", "anna/0.png", "..", "/etc/passwd", "../../../etc/passwd",
    "\0", "é" * 300, "a" * 5000, "%", "%00", "//", ".", "",
)  # fmt: skip
_NAMES = (
    "maria", "ben", "anna", "anna-step000100", "anna-step000100-2", "b" * 199, "b" * 250, "b" * 300, "ü" * 120, "con", "a/b",
    "../a", "a\0b", "\ud800", "Anna", "a b", "a_b", ".", "", " ", "anna.safetensors", "step-000100", "%s", "<b>",
)  # fmt: skip
_FOLDERS = (
    "", ".", "./", "photos", "photos/anna", "photos//anna", "./photos/anna", "photos/anna/", "photos/anna/../anna", "out",
    "inside", "loop", "..", "/", "/etc", "photos/" + "f" * 300, "photos/a\0", "(no folder)", "photos/.names.json", "output",
)  # fmt: skip
_FILES = (
    "photo 01.png", "photo 01-masklabel.png", "photo 01.txt", "photo 02.png", "other.png", ".names.json", "x" * 300 + ".png",
    "a\0.png", "", ".", "..", "a/b.png", "-masklabel.png", ".png", "photo 1.png", "\ud800.png",
)  # fmt: skip


def ask(address: str, draw: Random) -> tuple[int, str]:
    """The status that an odd request is answered with, and what was asked. OSError where there is no answer."""
    route, words = draw.choice(list(ROUTES.items()))
    methods, names = ([word for word in words.split() if word.isupper() == are] for are in (True, False))
    key = draw.choice((*KEYS.values(), *KEYS.values(), "0", "\0", "é" * 300, "..", "\ud800"))
    route = route.replace("KEY", urllib.parse.quote(key, safe="", errors="surrogatepass"))
    query = {draw.choice((*names, "x", "\0")): _word(draw) for _ in range(draw.randrange(4))}
    path = f"{route}?{urllib.parse.urlencode(query, errors='surrogatepass')}"[:8000]  # aiohttp logs longer ones
    if draw.random() < 0.1:
        path = urllib.parse.quote(damaged_bytes(path.encode(), draw)[:6000], safe="/?=&%") or "/"
        path = path if path.startswith("/facelora/") else "/facelora/"
    method = draw.choice((*methods * 4, "GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"))
    kind = draw.choice(("application/json", "application/json", "application/json; charset=utf-7", "text/plain", ";"))
    body = draw.choice((None, b"", draw.randbytes(100), _DEEP, *[_json(draw) for _ in range(9)]))
    if "photos" in route and method == "POST" and draw.random() < 0.9:
        kind = "multipart/form-data; boundary=a"
        body = draw.choice((b"", damaged_bytes(_form(draw), draw), *[_form(draw)] * 4))
    headers = {"Content-Type": kind} | draw.choice(({}, {}, {"Origin": "null"}, {"Comfy-User": "__system"}))
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=30)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status, f"{method} {path[:200]} {headers} {(body or b'')[:300]!r}"
    finally:
        connection.close()


def _word(draw: Random) -> str:
    return (
        str(draw.choice((*_WORDS, *ODD))) if draw.random() < 0.9 else "".join(map(chr, draw.sample(range(1, 3000), 20)))
    )


def _photo(draw: Random) -> str:
    return f"{draw.choice(_FOLDERS)}/{draw.choice(_FILES)}"


def _json(draw: Random) -> bytes:
    """A body of any route that takes JSON, with good, odd and hostile values."""
    odd = draw.choice(ODD)
    return json_bytes(
        draw.choice((
            odd, {"prompt": "p", "node": odd}, {"name": draw.choice((*_NAMES, *_NAMES, odd))}, {"names": odd},
            {"names": [_photo(draw), odd, *(_photo(draw) for _ in range(3))]}, {"name": _photo(draw), "caption": odd},
            {"name": _photo(draw), "caption": draw.choice(_NAMES)},
            {"written": {draw.choice(("agreed_by", "agreed_until", "withdrawn", "x")): draw.choice((odd, "2030-01-01"))}},
            {"folder": draw.choice(_FOLDERS), "pictures": draw.choice(("", odd, _photo(draw))), "base": odd,
             "resolution": draw.choice((64, odd, 10**4000, -1)), "use": odd},
        ))
    )  # fmt: skip


def _form(draw: Random) -> bytes:
    """A photo that is dropped on a page, as a form."""
    fields = {"person": draw.choice((*_NAMES, *_FOLDERS)), "folder": draw.choice(_FOLDERS)}
    parts = [f'--a\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{text}\r\n' for name, text in fields.items()]
    parts.append(f'--a\r\nContent-Disposition: form-data; name="file"; filename="{draw.choice(_FILES)}"\r\n\r\n')
    good = draw.choice(list(dict(pictures()).values()))
    return "".join(parts).encode("utf-8", "surrogatepass") + damaged_bytes(good, draw) + b"\r\n--a--\r\n"


def furnish(folder: Path) -> Iterator[Path]:
    """Make the people of KEYS in a server's folder, and yield the files beside theirs that no request may change."""
    loras, panels, photos = (folder / name for name in ("models/loras", "cache/panels", "input/photos"))
    for place in (loras, panels, photos / "anna", photos / "kept", folder / "input" / "inside", folder / "outside"):
        place.mkdir(parents=True, exist_ok=True)
    good = dict(pictures())["png"]
    names = {
        "photo 01.png": "a.png",
        "photo 01-masklabel.png": "a-masklabel.png",
        "x" * 300: "b.png",
        "../../x": "c.png",
    }
    for person in ("anna", "kept"):
        (photos / person / ".names.json").write_text(json.dumps(names))
        for name in ("photo 01.png", "photo 01-masklabel.png"):
            (photos / person / name).write_bytes(good)
    for name, key in {**KEYS, "kept": "f" * 64}.items():
        parts = {f"{part}.weight": torch.zeros(2, 2) for part in ("lora_down", "lora_up")}
        tensors = {f"lora_unet_down_blocks_0_attentions_0_proj_in.{part}": tensor for part, tensor in parts.items()}
        for ending in ("", "-step000100"):
            metadata = {"ss_base_model_version": "sd_v1", KEY: key + ending, "ss_output_name": name}
            save_file(tensors, loras / f"{name}{ending}.safetensors", metadata)
        record = {
            "user": "default", "key": key, "begun": 1.0, "headshots": {}, "digests": [], "phase": "done", "name": name,
            "file": f"{name}.safetensors", "photos": ["photos/kept/photo 01.png"] if name == "kept" else [],
            "run": {"prompt": "p", "workflow": None, "node": "1"},
        }  # fmt: skip
        (panels / f"{content_key('person', 'default', key)}.json").write_text(json.dumps(record))
    (loras / "carl.safetensors").write_bytes(b"truncated")
    theirs = [loras / name for name in ("maria.pt", "maria.json", "maria.preview.png", "anna-step00000500.safetensors")]
    for file in (*theirs, folder / "outside" / "0.png"):
        file.write_bytes(good)
    for link, target in {"inside/out.png": "outside/0.png", "out": "outside", "loop": "input/loop"}.items():
        if not (folder / "input" / link).is_symlink():
            (folder / "input" / link).symlink_to(folder / target)
    save_file({"unknown": torch.zeros(1)}, theirs[-1], {"ss_output_name": "anna"})
    yield from (
        *theirs,
        folder / "outside" / "0.png",
        loras / "kept.safetensors",
        loras / "kept-step000100.safetensors",
    )
    yield from (photos / "kept" / name for name in names if len(name) < 30 and "/" not in name)


def ask_often(address: str, photos: Path, seed: str, count: int) -> tuple[Counter[int], list[str]]:
    """How often each status was answered, and a line for each request that was answered with an error of the server.

    `photos` is the folder `soak` in the server's input folder: damaged pictures are put into it. A file of somebody else's that
    is changed is a fault, too.
    """
    photos.mkdir(parents=True, exist_ok=True)
    good, folder = dict(pictures()), photos.parents[1]
    statuses: Counter[int] = Counter()
    faults = []
    before: dict[Path, bytes] = {}
    for number in range(count):
        draw = Random(f"{seed} {number}")
        if number % 10 == 0:
            for ending, data in good.items():
                (photos / f"0.{ending}").write_bytes(damaged_bytes(data, draw))
            shutil.rmtree(folder / "input" / "photos" / "anna", ignore_errors=True)
            before = {path: path.read_bytes() for path in furnish(folder)}
        try:
            status, asked = ask(address, draw)
        except (OSError, http.client.HTTPException) as error:
            status, asked = 0, f"{type(error).__name__}: {error}"
        statuses[status] += 1
        if status >= 500 or status == 0:
            faults.append(f"request {number}: {status} {asked}")
        lost = [path.name for path, data in before.items() if not path.is_file() or path.read_bytes() != data]
        faults += [f"request {number}: {name} is lost: {asked}" for name in lost]
        before = {path: data for path, data in before.items() if path.name not in lost}
    return statuses, faults
