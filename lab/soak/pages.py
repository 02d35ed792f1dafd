"""Odd HTTP requests to the routes of a real ComfyUI server."""

import http.client
import urllib.parse
from collections import Counter
from pathlib import Path
from random import Random

from .damage import ODD, damaged_bytes, json_bytes
from .desk import PHOTO_FORMATS, pictures

ROUTES = {
    "/facelora/training": (), "/facelora/stop": (), "/facelora/styles": ("pack",), "/facelora/style": ("pack", "style"),
    "/facelora/photo": ("name",), "/facelora/photos": (), "/facelora/check": (), "/facelora/people": (),
    "/facelora/lora": ("name",), "/facelora/recipe": ("name", "base"),
    "/facelora/forecast": ("base", "photos", "pictures"),
}  # fmt: skip
"""Route -> the names in its query."""
_WORDS = (
    *(f"soak/0.{ending}" for ending in PHOTO_FORMATS), "corporate", "anna/0.png", "..", "/etc/passwd", "../../../etc/passwd",
    "\0", "é" * 300, "a" * 5000, "%", "%00", "//", ".", "",
)  # fmt: skip


def ask(address: str, draw: Random) -> tuple[int, str]:
    """The status that an odd request is answered with, and what was asked. OSError where there is no answer."""
    route, names = draw.choice(list(ROUTES.items()))
    query = {draw.choice((*names, "x", "\0")): _word(draw) for _ in range(draw.randrange(4))}
    path = f"{route}?{urllib.parse.urlencode(query, errors='surrogatepass')}"
    if draw.random() < 0.2:
        path = urllib.parse.quote(damaged_bytes(path.encode(), draw)[:6000], safe="/?=&%") or "/"
        path = path if path.startswith("/facelora/") else "/facelora/"
    method = draw.choice(("GET", "GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS"))
    body = draw.choice(
        (
            None,
            b"",
            draw.randbytes(100),
            json_bytes(draw.choice(ODD)),
            json_bytes({"prompt": "p", "node": draw.choice(ODD)}),
        )
    )
    headers = {
        "Content-Type": draw.choice(("application/json", "text/plain", "application/x-www-form-urlencoded", ";"))
    }
    connection = http.client.HTTPConnection(urllib.parse.urlsplit(address).netloc, timeout=10)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status, f"{method} {path[:200]} {(body or b'')[:100]!r}"
    finally:
        connection.close()


def _word(draw: Random) -> str:
    return (
        str(draw.choice((*_WORDS, *ODD))) if draw.random() < 0.9 else "".join(map(chr, draw.sample(range(1, 3000), 20)))
    )


def ask_often(address: str, photos: Path, seed: str, count: int) -> tuple[Counter[int], list[str]]:
    """How often each status was answered, and a line for each request that was answered with an error of the server.

    `photos` is the folder `soak` in the server's input folder: damaged pictures are put into it.
    """
    photos.mkdir(parents=True, exist_ok=True)
    good = dict(pictures())
    statuses: Counter[int] = Counter()
    faults = []
    for number in range(count):
        draw = Random(f"{seed} {number}")
        if number % 10 == 0:
            for ending, data in good.items():
                (photos / f"0.{ending}").write_bytes(damaged_bytes(data, draw))
        try:
            status, asked = ask(address, draw)
        except (OSError, http.client.HTTPException) as error:
            status, asked = 0, f"{type(error).__name__}: {error}"
        statuses[status] += 1
        if status >= 500 or status == 0:
            faults.append(f"request {number}: {status} {asked}")
    return statuses, faults
