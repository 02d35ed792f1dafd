"""Dropped photos on a server with --multi-user: one user's are as if they did not exist for all others."""

import json
from urllib.error import HTTPError

import pytest

from core.storage.cache_folder import content_key
from tests.tooling import write_photos

from .graphs import load_photos
from .server import running_server


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """The server as each of two users knows it, and as somebody unknown."""
    folder = tmp_path_factory.mktemp("users")
    write_photos(folder / "input" / "for-all", count=1)
    with running_server(folder, "--multi-user") as server:
        ids = [server.post("/users", {"username": name}) for name in ("anna", "berta")]
        yield [server.as_user(user) for user in (*ids, "nobody")]


@pytest.fixture(scope="module")
def dropped(users, tmp_path_factory) -> str:
    """The name of a photo of anna's."""
    photos = write_photos(tmp_path_factory.mktemp("photos") / "mine", count=1)
    return users[0].drop(photos / "0.png", "Carla")["name"]


def listed(server) -> list[str]:
    return server.get("/object_info/FaceLoRALoadPhotos")["FaceLoRALoadPhotos"]["input"]["required"]["folder"][1][
        "options"
    ]


def test_a_folder_of_dropped_photos_is_listed_for_its_user_alone(users, dropped):
    anna, berta, nobody = users
    folder = dropped.rpartition("/")[0]
    assert folder in listed(anna)
    for other in (berta, nobody):
        assert "for-all" in listed(other) and not any(name.startswith("photos") for name in listed(other))


def test_a_thumbnail_and_a_verdict_are_served_to_the_photos_user_alone(users, dropped):
    anna, *others = users
    address, asked = (
        f"/facelora/photo?name={dropped.replace(' ', '%20')}",
        {"folder": "(no folder)", "pictures": dropped},
    )
    assert anna.read(address)
    assert len(anna.post("/facelora/check", asked)["photos"]) == 1
    for folder in (".", "./", "", "photos", "photos/", "for-all/.."):
        assert "photos" not in anna.post("/facelora/check", {"folder": folder})
    for other in others:
        for disguise in (address, address.replace("photos/", "for-all/../photos/")):
            with pytest.raises(HTTPError, match="404"):
                other.read(disguise)
        assert "this picture doesn't exist" in other.post("/facelora/check", asked)["error"]


def test_a_graph_cannot_load_photos_of_another_user(users, dropped):
    anna, berta, _ = users
    for graph in (load_photos(dropped.rpartition("/")[0]), load_photos(pictures=dropped)):
        assert anna.run({"photos": graph}).status == "success"
        assert "doesn't exist" in berta.run({"photos": graph}).error


def test_a_stranger_cannot_drop_photos_and_a_user_none_into_anothers_folder(users, dropped, tmp_path):
    anna, berta, nobody = users
    photos = write_photos(tmp_path / "more", count=1, person=36)
    with pytest.raises(HTTPError, match="400"):
        nobody.drop(photos / "0.png", "Carla")
    taken = berta.drop(photos / "0.png", "Carla", folder=dropped.rpartition("/")[0])["name"]
    assert taken.rpartition("/")[0] not in listed(anna) and taken.rpartition("/")[0] in listed(berta)


def test_a_note_of_consent_is_its_users_alone_and_is_not_written_beside_photos_for_all(users, dropped):
    anna, berta, nobody = users
    (user,) = (one for one, name in anna.get("/users")["users"].items() if name == "anna")
    record = {
        "user": user, "key": "a" * 64, "begun": 1.0, "headshots": {}, "digests": [], "phase": "done", "name": "carla",
        "file": "carla.safetensors", "photos": ["for-all/0.png", dropped],
        "run": {"prompt": "p", "workflow": None, "node": "1"},
    }  # fmt: skip
    for folder in ("cache/panels", "models/loras"):
        (anna.folder / folder).mkdir(parents=True, exist_ok=True)
    name = f"{content_key('person', user, record['key'])}.json"
    (anna.folder / "cache" / "panels" / name).write_text(json.dumps(record))
    address, withdrawn = f"/facelora/people/{record['key']}/consent", {"written": {"withdrawn": "2026-12-01"}}
    for other in (berta, nobody):
        assert "you have no such training run" in other.get(address)["error"]
        assert "you have no such training run" in other.send("PATCH", address, withdrawn)["error"]
    assert anna.get(address)["withdrawn"] == ""
    answer = anna.send("PATCH", address, withdrawn)
    assert answer.get("withdrawn") == "2026-12-01", answer
    beside_photos = (anna.folder / "input" / dropped).with_name("person.toml")
    written = {anna.folder / "models" / "loras" / "carla.person.toml", beside_photos}
    assert {*anna.folder.rglob("*person.toml")} == written
