"""What is kept of each training, and that a person is deleted with all that is theirs and nothing else."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.tooling import write_photos

from .graphs import drawing, load_photos, node, training
from .test_train_node import APPLY, CONNECTED, loras


def headshots_of(server, name: str, photos: list[str], **changes) -> dict:
    """The graph of photos to headshots on dropped photos."""
    ranked = {
        "photos": load_photos(pictures="\n".join(photos)),
        "apply": node("FaceLoRAApply", lora=["train", 0], lora_name=CONNECTED, **APPLY),
        "ranked": node("FaceLoRALikeness", images=["decoded", 0], reference=["photos", 0], required=False),
        "saved": node("SaveImage", images=["ranked", 0], filename_prefix=f"headshots/{name}"),
    }
    drawn = drawing(["apply", 0], ["apply", 1], ["base", 2], prompt=["apply", 3])
    del drawn["picture"]
    return training(name=name, **changes) | ranked | drawn


def trained(server, tmp_path: Path, name: str, person: int, **changes) -> dict:
    """The record of a person whose photos were dropped, and of whom a headshot was drawn."""
    files = sorted(write_photos(tmp_path / name, count=3, scale=2, person=person).glob("*.png"))
    first = server.drop(files[0], name)["name"]
    photos = [first, *(server.drop(file, name, first.rpartition("/")[0])["name"] for file in files[1:])]
    server.result(headshots_of(server, name, photos, **changes))
    return next(one for one in server.get("/facelora/people") if one["name"] == name)


def all_files(server) -> set[Path]:
    """All that is about people, but for the logs."""
    folders = ("input/photos", "output", "models/loras", "cache/runs", "cache/latents", "cache/panels")
    return {file for folder in folders for file in (server.folder / folder).rglob("*") if file.is_file()}


def test_a_training_is_listed_with_its_name_picture_date_and_headshots_and_opened_with_its_graph(server, tmp_path):
    graph = {"id": "of the page of lina", "nodes": []}
    files = sorted(write_photos(tmp_path / "lina", count=3, scale=2, person=2).glob("*.png"))
    photos = [server.drop(file, "lina", "photos/lina")["name"] for file in files[:1]]
    photos += [server.drop(file, "lina", photos[0].rpartition("/")[0])["name"] for file in files[1:]]
    prompt = headshots_of(server, "lina", photos, training_seed=51)
    server.result(prompt, workflow=graph)
    record, *_ = server.get("/facelora/people")
    assert (record["name"], record["phase"], record["file"]) == ("lina", "done", "lina.safetensors")
    assert record["picture"].startswith("data:image/jpeg") and record["begun"] > 1.6e9
    assert (record["photos"], record["headshots"], record["can_open"]) == (3, 1, True)
    assert server.get(f"/facelora/people/{record['key']}") == graph
    (state,) = [one for one in server.get("/facelora/training") if one["workflow"] == graph["id"]]
    (shot,) = state["headshots"]
    assert shot["filename"].startswith("lina_") and -1 <= shot["score"] <= 1

    server.result(prompt, workflow=graph)
    (again,) = [one for one in server.get("/facelora/training") if one["workflow"] == graph["id"]]
    assert again["headshots"] == [shot], "a run in which nothing was drawn again"


def test_headshots_of_a_prompt_that_reuses_the_training_of_an_earlier_one_belong_to_it(server, tmp_path):
    (file,) = write_photos(tmp_path / "tina", count=1, scale=2, person=14).glob("*.png")
    graph = headshots_of(server, "tina", [server.drop(file, "tina")["name"]], training_seed=62)
    server.run(graph)
    graph["sampler"]["inputs"]["seed"] += 1
    graph["another"] = graph.pop("photos")  # as of a node that was removed and added again
    graph = json.loads(json.dumps(graph).replace('["photos", ', '["another", '))
    assert "train" in server.run(graph).cached
    record, *_ = server.get("/facelora/people")
    assert (record["name"], record["headshots"]) == ("tina", 2)
    assert not record["can_open"], "it was queued without a page"

    graph["sampler"]["inputs"]["steps"] = 10_000
    mark, prompt_id = server.mark(), server.queue(graph)
    server.wait_for_log("10000 [", mark)
    assert server.get("/facelora/people")[0]["phase"] == "drawing"
    assert "headshots are being drawn" in server.delete(f"/facelora/people/{record['key']}")["error"]
    server.post("/interrupt", {})
    server.wait(prompt_id)
    server.delete(f"/facelora/people/{record['key']}")
    assert not [*(server.folder / "output" / "headshots").glob("tina_*")]


def test_no_likeness_is_shown_beside_pictures_that_are_not_in_its_order(server, tmp_path):
    files = sorted(write_photos(tmp_path / "lola", count=3, scale=2, person=2).glob("*.png"))
    graph = headshots_of(server, "lola", [server.drop(files[0], "lola")["name"]], training_seed=59)
    graph["empty"]["inputs"]["batch_size"] = 3
    graph["saved"]["inputs"]["images"] = ["decoded", 0]
    server.result(graph, workflow={"id": "of the page of lola", "nodes": []})
    (state,) = [one for one in server.get("/facelora/training") if one["workflow"] == "of the page of lola"]
    assert [shot["score"] for shot in state["headshots"]] == [None] * 3


def test_a_person_is_deleted_with_all_that_is_theirs_and_nothing_else(server, tmp_path):
    trained(server, tmp_path, "maria", 5, training_seed=52)
    before = all_files(server)
    record = trained(server, tmp_path, "nora", 6, training_seed=53)
    assert (loras(server) / "nora.safetensors").exists()
    assert len(all_files(server)) > len(before) + 8
    (loras(server) / ".nora.safetensors.lock").touch()  # as a killed server leaves it
    said = server.delete(f"/facelora/people/{record['key']}")
    assert {"nora.safetensors", "input/photos/nora/photo 01.png", "output/headshots/nora_00001_.png"} <= set(
        said["deleted"]
    )
    assert all_files(server) == before
    assert "you have no such training" in server.delete(f"/facelora/people/{record['key']}")["error"]


def test_the_headshots_of_a_renamed_person_are_neither_drawn_nor_saved_again(server, tmp_path):
    (file,) = write_photos(tmp_path / "uta", count=1, scale=2, person=18).glob("*.png")
    graph = headshots_of(server, "uta", [server.drop(file, "uta")["name"]], training_seed=65)
    graph["sampler"]["class_type"] = "FaceLoRASampler"
    del graph["sampler"]["inputs"]["denoise"]
    prefix = {"filename_prefix": "headshots/%lora_name%", "lora_name": ["train", 1]}
    graph["saved"] = node("FaceLoRASaveHeadshots", images=["ranked", 0], **prefix)
    first = server.result(graph).outputs["saved"]["images"]
    record, *_ = server.get("/facelora/people")
    assert server.send("PATCH", f"/facelora/people/{record['key']}", {"name": "uta-b"}) == {"name": "uta-b"}
    graph["train"]["inputs"]["name"] = "uta-b"
    again = server.result(graph)
    assert again.outputs["saved"]["images"] == first and "2/2 [" not in again.log
    record, *_ = server.get("/facelora/people")
    assert (record["name"], record["headshots"]) == ("uta-b", 1)
    server.delete(f"/facelora/people/{record['key']}")
    assert not [*(server.folder / "output" / "headshots").glob("uta*")]


def test_the_example_script_goes_from_photos_to_headshots_with_their_likeness(server, tmp_path):
    photos = sorted(write_photos(tmp_path / "photos", count=3, scale=2, person=21).glob("*.png"))
    graph = headshots_of(server, "nobody", ["nothing.png"], training_seed=69)
    prefix = {"filename_prefix": "headshots/%lora_name%", "lora_name": ["train", 1]}
    graph["saved"] = node("FaceLoRASaveHeadshots", images=["ranked", 0], **prefix)
    (tmp_path / "app.json").write_text(json.dumps(graph), encoding="utf-8")
    script = Path(__file__).parents[2] / "docs" / "examples" / "headshots_over_http.py"
    command = [sys.executable, script, server.url, "app.json", "ottokar", *photos]
    said = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    line = re.search(r"ottokar_00001_.png: likeness (\S+), drawn with ottokar.safetensors", said)
    assert line and -1 <= float(line[1]) <= 1, said
    with Image.open(tmp_path / "ottokar_00001_.png") as image:
        assert json.loads(image.info["facelora"]) == {"lora_name": "ottokar.safetensors", "likeness": float(line[1])}


def test_photos_that_a_waiting_run_needs_are_not_deleted(server, tmp_path):
    record = trained(server, tmp_path, "wilma", 19, training_seed=66)
    photos = [f"photos/wilma/photo {number:02}.png" for number in (1, 2, 3)]
    (file,) = write_photos(tmp_path / "zora", count=1, scale=2, person=20).glob("*.png")
    dropped = server.drop(file, "zora")["name"]
    long = {"base": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")} | drawing(
        ["base", 0], ["base", 1], ["base", 2]
    )
    long["sampler"]["inputs"]["steps"] = 10_000
    server.queue(long)
    waiting = headshots_of(server, "wilma-again", [f"./{name.replace('/', '//')}" for name in (*photos, dropped)])
    server.queue(waiting | {"unused": {"class_type": "FaceLoRALoadPhotos"}})
    assert server.get(f"/facelora/people/{record['key']}/files")["photos"] == 0
    said = server.delete(f"/facelora/people/{record['key']}")["deleted"]
    assert "wilma.safetensors" in said and not any(name.startswith("input/") for name in said)
    asked = {"names": [*photos, dropped]}
    assert server.send("DELETE", "/facelora/photos", asked) == {"deleted": []}
    server.rest()
    assert len(server.send("DELETE", "/facelora/photos", asked)["deleted"]) == 4


def test_photos_of_two_trainings_are_deleted_with_the_last_of_them(server, tmp_path):
    first = trained(server, tmp_path, "olga", 7, training_seed=54)
    photos = sorted((server.folder / "input" / "photos" / "olga").glob("*.png"))
    names = [f"photos/olga/{photo.name}" for photo in photos]
    assert server.run(headshots_of(server, "olga-again", names, training_seed=55)).status == "success"
    second, *_ = server.get("/facelora/people")
    server.delete(f"/facelora/people/{first['key']}")
    assert all(photo.exists() for photo in photos) and not (loras(server) / "olga.safetensors").exists()
    server.delete(f"/facelora/people/{second['key']}")
    assert not any(photo.exists() for photo in photos)


def test_a_file_that_cannot_be_deleted_is_named_and_the_next_attempt_deletes_it(server, tmp_path):
    """As on Windows while a program reads the file."""
    record = trained(server, tmp_path, "xenia", 17, training_seed=64)
    preview = loras(server) / "xenia.png"
    preview.touch()
    if not shutil.which("chattr") or subprocess.run(["chattr", "+i", preview], check=False).returncode:
        pytest.skip("this disk or user cannot forbid to delete a file")
    said = server.delete(f"/facelora/people/{record['key']}")
    subprocess.run(["chattr", "-i", preview], check=True)
    assert said["error"].startswith("loras/xenia.png: cannot be deleted (Operation not permitted)")
    assert {"xenia.png", "xenia.safetensors"} <= {*server.delete(f"/facelora/people/{record['key']}")["deleted"]}


def test_a_graph_whose_training_was_deleted_is_run_again_without_a_record(server, tmp_path):
    trained(server, tmp_path, "rosa", 8, training_seed=57)
    photos = [f"photos/rosa/photo {number:02}.png" for number in (1, 2, 3)]
    record, *_ = server.get("/facelora/people")
    graph = headshots_of(server, "rosa", photos, training_seed=57)
    server.delete(f"/facelora/people/{record['key']}")
    mark = server.mark()
    server.run(graph)
    assert server.run({"photos": load_photos("anna")}).status == "success", "ComfyUI still runs prompts"
    assert "not noted" not in server.log(mark)


def test_photos_of_a_folder_that_the_user_made_are_not_deleted(server):
    assert server.run(training(name="anna-of-a-folder", training_seed=56)).status == "success"
    record, *_ = server.get("/facelora/people")
    server.delete(f"/facelora/people/{record['key']}")
    assert len(list((server.folder / "input" / "anna").glob("*.png"))) == 3


def test_own_photos_in_the_folder_of_dropped_ones_are_neither_deleted_nor_replaced(server, tmp_path):
    own = server.folder / "input" / "photos" / "holiday"
    write_photos(own, count=3, scale=2, person=9)
    (own / "photo 01.png").write_bytes((own / "1.png").read_bytes())
    before = {file: file.read_bytes() for file in own.iterdir()}
    names = [f"photos/holiday/{file.name}" for file in sorted(own.iterdir())]
    other = sorted(write_photos(tmp_path, count=1, scale=2, person=10).glob("*.png"))[0]
    assert server.drop(other, "holiday", "photos/holiday")["name"] == "photos/holiday-2/photo 01.png"
    assert server.run(headshots_of(server, "holiday", names, training_seed=58)).status == "success"
    record, *_ = server.get("/facelora/people")
    server.delete(f"/facelora/people/{record['key']}")
    assert {file: file.read_bytes() for file in own.iterdir()} == before


def test_what_belongs_to_the_lora_is_deleted_with_it_and_what_does_not_stays(server, tmp_path):
    record = trained(server, tmp_path, "pia", 16, training_seed=63)
    lora, photos = loras(server) / "pia.safetensors", server.folder / "input" / "photos" / "pia"
    sidecars = [lora.with_suffix(ending) for ending in (".json", ".png", ".preview.png")]
    for file in (*sidecars, note := photos / "notes.txt", elsewhere := server.folder / "elsewhere.txt"):
        file.touch()
    names = photos / ".names.json"  # which a user may upload
    names.write_text(names.read_text().replace("{", '{"../../../elsewhere.txt": "4.png", ', 1))
    (shot,) = (server.folder / "output" / "headshots").glob("pia_*.png")
    shot.write_bytes(b"another picture of this name")
    assert "input/photos/pia/photo 01.png" in server.delete(f"/facelora/people/{record['key']}")["deleted"]
    assert not any(file.exists() for file in (lora, *sidecars))
    assert [*photos.iterdir()] == [note] and elsewhere.exists()
    assert shot.read_bytes() == b"another picture of this name"
    shot.unlink()


def test_a_lora_that_is_deleted_twice_is_made_again_twice(server):
    graph, made = training(name="twice-gone", training_seed=68), loras(server) / "twice-gone.safetensors"
    server.result(graph)
    for _ in range(2):
        made.unlink()
        server.result(graph)
        assert made.exists()


def test_what_an_older_version_trained_is_told_to_be_trained_again(server):
    """The record was written before TRAINING_VERSION 3, without its picture here."""
    (file,) = Path(__file__).with_name("saved_earlier").iterdir()
    shutil.copy(file, server.folder / "cache" / "panels")
    record = json.loads(file.read_text(encoding="utf-8"))
    for is_there, lost in ((False, "trained"), (True, "outdated")):
        if is_there:
            shutil.copy(next(loras(server).glob("*.safetensors")), loras(server) / record["file"])
        (shown,) = [one for one in server.get("/facelora/people") if one["key"] == record["key"]]
        assert (shown["name"], shown["phase"], shown["lost"]) == ("of-an-older-version", "done", lost)
    server.delete(f"/facelora/people/{record['key']}")
