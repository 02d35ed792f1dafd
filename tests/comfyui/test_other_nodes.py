"""Load Face Photos, Headshot Style Pack and the helpers in a real server."""

import json
import re
import time
from io import BytesIO
from urllib.error import HTTPError
from urllib.parse import quote, urlencode

import pytest
from PIL import Image, ImageChops, ImageStat

from core.demo.people import person_photos
from core.lora.file import LoraFile
from core.pictures.style_pack import Subject, find_style_packs
from core.storage.drawn import DRAWN, MARK_KEYS, mark_of, read_mark
from core.version import __version__
from tests.marks import mark_in
from tests.photos.test_report import ONLY_PHOTO
from tests.tooling import write_photos

from .graphs import BASE, drawing, load_photos, node, training

STYLES = {
    "pack": "corporate", "styles": "", "subject": "sks person", "count": 3, "first_seed": 5, "family": "sd15",
    "resolution": 128,
}  # fmt: skip


def texts(result, name: str) -> list[str]:
    """What a PreviewAny node shows."""
    return result.outputs[name]["text"]


def test_a_style_pack_drives_a_batch_through_ksampler(server):
    graph = BASE | drawing(["base", 0], ["base", 1], ["base", 2], prompt=["styles", 0], seed=["styles", 2])
    graph["styles"] = node("FaceLoRAStylePack", **STYLES, extra=" smiling")
    graph["empty"]["inputs"] |= {"width": ["styles", 3], "height": ["styles", 4]}
    graph["prompts"] = node("PreviewAny", source=["styles", 0])
    result = server.result(graph)
    pictures = [server.picture(image) for image in result.outputs["picture"]["images"]]
    assert len(pictures) == 3
    expected = find_style_packs().pick("corporate").prompts(Subject("sks person", ""), "sd15", 3, 5, resolution=128)
    # The demo's VAE has 4 pixels a latent where ComfyUI's empty latents count 8.
    assert [picture.size for picture in pictures] == [(styled.width // 2, styled.height // 2) for styled in expected]
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert texts(result, "prompts") == [f"{styled.prompt}, smiling" for styled in expected]


def test_one_queue_draws_several_styles_each_as_its_style_says(server):
    settings = STYLES | {"styles": "Classic grey studio, Lobby with marble", "count": 4, "resolution": 64}
    graph = BASE | drawing(["base", 0], ["base", 1], ["base", 2], prompt=["styles", 0], seed=["styles", 2])
    graph["styles"] = node("FaceLoRAStylePack", **settings)
    graph["negative"]["inputs"]["text"] = ["styles", 1]
    graph["empty"]["inputs"] |= {"width": ["styles", 3], "height": ["styles", 4]}
    graph["sampler"]["inputs"]["cfg"] = ["styles", 5]
    graph["sheet"] = node(
        "FaceLoRAContactSheet", images=["decoded", 0], columns=2, height=64, title="", labels=["styles", 7]
    )
    graph["sheet_picture"] = node("PreviewImage", images=["sheet", 0])
    graph["names"] = node("PreviewAny", source=["styles", 7])
    graph["strengths"] = node("PreviewAny", source=["styles", 8])
    result = server.result(graph)
    styled = find_style_packs().pick("corporate").prompts(
        Subject("sks person", ""), "sd15", 4, 5, styles=settings["styles"].split(", "), resolution=64
    )  # fmt: skip
    assert len(result.outputs["picture"]["images"]) == 4
    assert texts(result, "names") == [item.style for item in styled]
    assert [float(text) for text in texts(result, "strengths")] == [item.strength for item in styled]
    assert set(texts(result, "names")) == set(settings["styles"].split(", "))
    assert server.drawn(result, "sheet_picture").height > 2 * 64


def test_a_users_pack_is_found_without_a_restart(server):
    folder = server.folder / "models" / "style_packs"
    folder.mkdir(exist_ok=True)
    pack = {
        "id": "ours", "title": "Ours", "version": "1", "licence": "CC0-1.0",
        "styles": [{"name": "Green wall", "prompts": {"tags": {"prompt": "photo of {subject}, green wall"}}}],
    }  # fmt: skip
    (folder / "ours.json").write_text(json.dumps(pack))
    (folder / "broken.json").write_text("{")
    graph = {
        "styles": node("FaceLoRAStylePack", **STYLES | {"pack": "ours"}),
        "show": node("PreviewAny", source=["styles", 0]),
    }
    result = server.result(graph)
    assert texts(result, "show") == ["photo of sks person, green wall"] * 3
    info = server.get("/object_info/FaceLoRAStylePack")["FaceLoRAStylePack"]
    assert "ours" in json.dumps(info["input"])
    assert "Not used: broken.json: not JSON" in info["description"]
    pack["styles"][0]["prompts"]["tags"]["prompt"] = "photo of {subject}, blue wall"
    (folder / "ours.json").write_text(json.dumps(pack))
    assert texts(server.run(graph), "show") == ["photo of sks person, blue wall"] * 3


def test_the_family_is_detected_from_the_model(server):
    settings = STYLES | {"family": "that of the model", "resolution": 0}
    graph = BASE | {
        "styles": node("FaceLoRAStylePack", model=["base", 0], **settings),
        "widths": node("PreviewAny", source=["styles", 3]),
    }
    result = server.result(graph)
    expected = find_style_packs().pick("corporate").prompts(Subject("sks person", ""), "sd15", 3, 5)
    assert [int(width) for width in texts(result, "widths")] == [styled.width for styled in expected]


def test_a_distilled_model_gets_its_steps_and_no_guidance(server):
    checkpoints = server.folder / "models" / "checkpoints"
    (checkpoints / "sd15_lightning_4step.safetensors").symlink_to(checkpoints / "sd15.safetensors")
    graph = {
        "base": node("CheckpointLoaderSimple", ckpt_name="sd15_lightning_4step.safetensors"),
        "styles": node("FaceLoRAStylePack", model=["base", 0], **STYLES),
        "guidance": node("PreviewAny", source=["styles", 5]),
        "steps": node("PreviewAny", source=["styles", 6]),
    }
    result = server.result(graph)
    assert (texts(result, "guidance"), texts(result, "steps")) == (["1.0"] * 3, ["4"] * 3)
    assert "speed LoRA" not in texts(result, "styles")[0]  # which may name broken packs of other tests
    graph["base"] = node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")
    (hint,) = texts(server.result(graph), "styles")
    assert "in 8 steps without guidance, with the speed LoRA Hyper-SD15-8steps-lora.safetensors" in hint


@pytest.mark.parametrize(
    ("changes", "words"), [({"styles": "baroque"}, "no style 'baroque'"), ({"pack": "x"}, "no style pack 'x'")]
)
def test_an_unknown_style_is_refused_with_the_choices(server, changes, words):
    graph = {"styles": node("FaceLoRAStylePack", **STYLES | changes), "show": node("PreviewAny", source=["styles", 0])}
    answer = server.refusal(graph)
    assert words in answer


def test_photos_are_reported_on_and_counted(server):
    folder = write_photos(server.folder / "input" / "clara", count=3, person=37)
    (folder / "broken.jpg").write_bytes(b"no picture")
    graph = {
        "photos": load_photos("clara", check=True),
        "report": node("PreviewAny", source=["photos", 3]),
        "captions": node("PreviewAny", source=["photos", 2]),
        "images": node("PreviewImage", images=["photos", 1]),
    }
    result = server.result(graph)
    report = texts(result, "report")[0]
    assert "3 photos" in report
    assert "broken.jpg" in report
    assert "verdict" in report
    assert "a photo of sks person, facing the camera" in texts(result, "captions")
    assert len(result.outputs["images"]["images"]) == 3
    (shown,) = result.outputs["photos"]["facelora_photos"]
    assert [tile["name"] for tile in shown["photos"]] == [f"clara/{index}.png" for index in range(3)]
    assert {tile["verdict"] for tile in shown["photos"]} <= {"good", "doubtful", "rejected"}
    assert re.search(r"of 3 usable.*; left out: broken\.jpg: ", shown["headline"])
    seen = server.post("/facelora/check", {"folder": "clara", "pictures": ""})
    assert seen["own_names"] == {f"clara/{number}.png": f"{number}.png" for number in range(3)}


def test_an_added_picture_that_cannot_be_read_is_rejected_with_the_reason(server):
    folder = write_photos(server.folder / "input" / "hugo", count=1, person=37)
    (folder / "broken.jpg").write_bytes(b"no picture")
    for check in (True, False):
        result = server.run({
            "photos": load_photos(pictures="hugo/broken.jpg\nhugo/0.png", check=check),
            "report": node("PreviewAny", source=["photos", 3]),
        })  # fmt: skip
        (shown,) = result.outputs["photos"]["facelora_photos"]
        assert [tile["name"] for tile in shown["photos"]] == ["hugo/0.png", "hugo/broken.jpg"]
        broken = shown["photos"][-1]
        assert broken["verdict"] == "rejected" and broken["reason"].startswith("left out: broken.jpg: ")
        assert broken["reason"] in shown["headline"]


def test_dropped_photos_have_a_folder_of_the_persons_name_numbers_and_their_own_names_on_the_page(server, tmp_path):
    photos = write_photos(tmp_path / "mine", count=3, person=37)
    Image.new("L", Image.open(photos / "0.png").size, 255).save(photos / "0-masklabel.png")
    order = ("0-masklabel.png", "1.png", "0.png", "1.png")  # a mask before its photo, and one photo twice
    names = [server.drop(photos / order[0], "Dora")["name"]]
    names += [server.drop(photos / name, "Dora", folder="photos/Dora")["name"] for name in order[1:]]
    kept = ["photo 01-masklabel.png", "photo 02.png", "photo 01.png", "photo 02.png"]
    assert names == [f"photos/Dora/{name}" for name in kept]
    assert server.drop(photos / "2.png", "Dora")["name"] == "photos/Dora-2/photo 01.png", "another Dora"
    seen = server.post("/facelora/check", {"folder": "(no folder)", "pictures": "\n".join(names[1:3])})
    assert [seen["own_names"][name] for name in names[1:3]] == ["1.png", "0.png"]
    twice = server.post("/facelora/check", {"folder": "photos/Dora", "pictures": "\n".join(names[1:3])})
    assert sorted(tile["name"] for tile in twice["photos"]) == sorted(names[1:3]), "once each"
    assert "0.png" not in json.dumps(server.run({"photos": load_photos("photos/Dora", check=True)}).outputs)
    Image.open(photos / "1.png").convert("RGB").save(photos / "copy.jpg", quality=95)
    copy = server.drop(photos / "copy.jpg", "Dora", folder="photos/Dora")["name"]
    seen = server.post("/facelora/check", {"folder": "(no folder)", "pictures": f"{names[1]}\n{copy}"})
    assert "the same picture as 1.png" in seen["photos"][1]["reason"]


def test_a_caption_is_kept_beside_its_photo_and_deleted_with_it(server, tmp_path):
    (file,) = write_photos(tmp_path, count=1).glob("*.png")
    name = server.drop(file, "Rita")["name"]
    asked = {"folder": "(no folder)", "pictures": name}
    for given, kept in (
        ("a  photo of\nsks woman, red hat", "a photo of sks woman, red hat"),
        ("", ""),
        ("a hat", "a hat"),
    ):
        assert server.send("PUT", "/facelora/caption", {"name": name, "caption": given}) == {"caption": kept}
        assert server.post("/facelora/check", asked)["captions"] == ({name: kept} if kept else {})
    graph = {"photos": load_photos(pictures=name), "shown": node("PreviewAny", source=["photos", 2])}
    assert texts(server.result(graph), "shown") == ["a hat"]
    for other in ("../up.png", "photos/Rita/no.png", "photos/Rita/.names.json"):
        assert "error" in server.send("PUT", "/facelora/caption", {"name": other, "caption": "x"})
    server.send("DELETE", "/facelora/photos", {"names": [name]})
    assert not (server.folder / "input" / name).parent.exists()


def test_the_panels_plan_has_the_inputs_and_the_settings(server):
    asked = {"name": "fast", "base": "sd15.safetensors", "rank": 7, "settings": "batch_size = 2"}
    plain, own = (
        server.get(f"/facelora/recipe?{urlencode(query)}") for query in ({**asked, "rank": 0, "settings": ""}, asked)
    )
    assert (own["batch_size"], own["rank"], plain["batch_size"]) == (2, 7, 1) and own["steps"] == plain["steps"] // 2
    spans = server.get(f"/facelora/forecast?{urlencode({**asked, 'resolution': 64, 'photos': 4, 'pictures': 2})}")
    assert all(0 < least < most for least, most in spans.values())
    assert spans["fast"][1] < spans["balanced"][1] < spans["best"][1]
    assert server.get("/facelora/forecast?base=nowhere&photos=many") == {}


def test_a_run_on_a_denoiser_alone_is_forecast(server, flow_models):
    spans = server.get("/facelora/forecast?base=zimage.safetensors&resolution=64&photos=9")
    assert 0 < spans["fast"][1] < spans["best"][1]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a.pdf", "not a photo"),
        ("garbage.jpg", "this picture cannot be read"),
        ("../up.png", "this picture cannot be read"),
    ],
)
def test_a_dropped_file_that_is_not_a_photo_is_refused_by_its_own_name_and_deleted(server, tmp_path, name, why):
    (tmp_path / "file").write_bytes(b"no picture")
    assert server.drop(tmp_path / "file", "Emil", name=name)["error"].startswith(f"{name.removeprefix('../')}: {why}")
    assert not (server.folder / "input" / "photos" / "Emil").exists()


@pytest.mark.parametrize("folder", ["photos/../clara", "photos/..", r"photos/a\\..\\clara", "clara", "/tmp"])
def test_a_dropped_photo_stays_out_of_folders_with_other_photos(server, tmp_path, folder):
    photos = write_photos(tmp_path / "mine", count=1, person=37)
    assert server.drop(photos / "0.png", "Fritz", folder=folder)["name"].startswith("photos/Fritz")


def test_uploaded_pictures_are_photos_too(server):
    folder = write_photos(server.folder / "input" / "gina", count=2, person=36)
    uploaded = [server.upload(folder / f"{index}.png", f"gina {index}.png") for index in range(2)]
    graph = {
        "photos": load_photos(pictures="\n".join(uploaded)),
        "images": node("PreviewImage", images=["photos", 1]),
    }
    result = server.result(graph)
    assert [server.picture(image).size for image in result.outputs["images"]["images"]] == [(92, 112)] * 2
    graph["photos"] = load_photos(pictures=uploaded[0])
    assert len(server.run(graph).outputs["images"]["images"]) == 1


def test_a_folder_that_is_not_there_does_not_matter_where_pictures_were_added(server):
    """As on the first run of a template: it names a folder, and the user has dropped photos."""
    folder = write_photos(server.folder / "input" / "hanna", count=1, person=36)
    uploaded = server.upload(folder / "0.png", "hanna.png")
    graph = {"photos": load_photos("not-made-yet", uploaded), "report": node("PreviewAny", source=["photos", 3])}
    result = server.result(graph)
    (report,) = texts(result, "report")
    assert "1 photo" in report and "not-made-yet: this folder doesn't exist" in report


def test_a_thumbnail_of_an_uploaded_picture_is_the_right_way_up(server):
    lying = Image.new("RGB", (640, 320), "red")
    exif = lying.getexif()
    exif[0x0112] = 6  # EXIF orientation: to be turned by a quarter
    lying.save(server.folder / "input" / "turned.jpg", exif=exif)
    small = Image.open(BytesIO(server.read("/facelora/photo?name=turned.jpg")))
    assert small.size == (80, 160)
    for name in ("gone.jpg", "../server.log", "", "a%00.jpg", 5000 * "a"):
        with pytest.raises(HTTPError, match="404"):
            server.read(f"/facelora/photo?name={name}")


def test_every_style_has_a_picture_from_its_pack_or_a_drawn_one(server):
    names = server.get("/facelora/styles?pack=corporate")
    assert names == find_style_packs().pick("corporate").names
    drawn = server.read(f"/facelora/style?pack=corporate&style={quote(names[0])}").decode()
    assert drawn.startswith("<svg") and names[0] in drawn
    folder = server.folder / "models" / "style_packs"
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (8, 10), "blue").save(folder / "blue.png")
    style = {"name": "Blue", "picture": "blue.png", "prompts": {"tags": {"prompt": "photo of {subject}"}}}
    pack = {"id": "pictured", "title": "Pictured", "version": "1", "licence": "CC0-1.0", "styles": [style]}
    (folder / "pictured.json").write_text(json.dumps(pack))
    assert server.read("/facelora/style?pack=pictured&style=Blue") == (folder / "blue.png").read_bytes()
    with pytest.raises(HTTPError, match="404"):
        server.read("/facelora/style?pack=pictured&style=Red")


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({}, "no photos: add 10 to 20 photos of one person, or choose a folder of them"),
        ({"folder": "nowhere"}, "nowhere: this folder doesn't exist"),
        ({"pictures": "gone.png"}, "gone.png: this picture doesn't exist"),
        ({"pictures": "alone.jpg"}, "alone.jpg: this picture cannot be read"),
        ({"pictures": "../../secret.png"}, "not in ComfyUI's input folder"),
    ],
)
def test_missing_photos_are_one_error(server, choice, words):
    (server.folder / "input" / "alone.jpg").write_bytes(b"no picture")
    assert words in server.error({"photos": load_photos(**choice), "show": node("PreviewAny", source=["photos", 3])})


def test_reference_photos_and_class_images_are_judged_as_what_they_are(server):
    write_photos(server.folder / "input" / "lara", count=3, scale=2, person=38)

    def headline(photos: dict, **more: dict) -> str:
        (shown,) = server.result({"photos": photos, **more}).outputs["photos"]["facelora_photos"]
        return shown["headline"]

    compared = {"score": node("FaceLoRALikeness", images=["photos", 1], reference=["photos", 0])}
    photos = load_photos("lara", check=True)
    assert headline(photos).startswith("0 of 3 usable"), "to train at 1,024 pixels"
    assert headline(photos, **compared) == "3 of 3 usable"
    for use, said in (("photos", "0 of 3 usable"), ("reference", "3 of 3 usable"), ("class_photos", "")):
        asked = {"folder": "lara", "pictures": "", "use": use}
        assert server.post("/facelora/check", asked)["headline"].startswith(said)
    assert "no reference photos: add photos of the person" in server.error({"photos": load_photos(), **compared})
    graph = training() | {"class": load_photos()}
    graph["train"]["inputs"]["class_photos"] = ["class", 0]
    assert "no class images: add pictures of other people" in server.error(graph)


def test_photos_without_a_face_are_refused(server):
    folder = server.folder / "input" / "walls"
    folder.mkdir()
    for shade in (80, 160):
        Image.new("RGB", (256, 256), (shade, shade, shade)).save(folder / f"{shade}.png")
    error = server.error(training(folder="walls") | {"photos": load_photos("walls", check=True)})
    assert "none of the 2 photos shows a face" in error


def test_a_folder_without_photos_is_one_clear_line(server):
    (server.folder / "input" / "empty folder").mkdir(exist_ok=True)
    error = server.error(training(folder="empty folder"))
    assert "empty folder: no readable photo" in error
    assert str(server.folder) not in error.partition(":")[2]


def test_pictures_of_the_person_score_above_those_of_someone_else(server):
    write_photos(server.folder / "input" / "dora", count=3, person=38, scale=2)
    write_photos(server.folder / "input" / "emil", count=2, person=39, scale=2)
    graph = {
        name: load_photos(name) for name in ("dora", "emil")
    } | {
        "score": node("FaceLoRALikeness", images=["emil", 1], reference=["dora", 0], labels="emil at 0.6"),
        "own": node("FaceLoRALikeness", images=["dora", 1], reference=["dora", 1]),
        "other_scores": node("PreviewAny", source=["score", 1]),
        "own_scores": node("PreviewAny", source=["own", 1]),
        "other_labels": node("PreviewAny", source=["score", 4]),
        "labelled": node(
            "FaceLoRAContactSheet", images=["own", 0], columns=2, height=100, title="scores", labels=["dora", 2]
        ),
        "sheet": node("PreviewImage", images=["labelled", 0]),
        "plot": node("PreviewImage", images=["own", 3]),
    }  # fmt: skip
    result = server.result(graph)
    own, others = ([float(score) for score in texts(result, name)] for name in ("own_scores", "other_scores"))
    assert min(own) > 0.55 > 0.40 > max(others)  # SFace's thresholds, docs/photos.md
    assert own == sorted(own, reverse=True)
    assert texts(result, "other_labels") == [f"{score:.2f}, emil at 0.6" for score in others]
    assert server.drawn(result, "sheet").height > 200
    shown = [result.outputs[name]["images"][0] for name in ("score", "own", "labelled")]
    assert [one["type"] for one in shown] == ["temp"] * 3
    assert {read_mark(server.folder / "temp" / one["filename"]) for one in shown} == {DRAWN}
    assert server.drawn(result, "plot").size == (640, 400)


def test_a_lora_is_saved_in_another_scheme_with_a_picture_and_inspected(server):
    save = {"lora": ["train", 0], "name": "by_facelora", "scheme": "comfy", "precision": "bf16", "preview": True}
    told = {"lora": ["train", 0], "name": "as_usual", "scheme": "automatic", "precision": "fp16", "sidecars": True}
    graph = training(name="saved", samples=1, training_seed=11)
    graph |= {"save": node("FaceLoRASave", **save), "told": node("FaceLoRASave", **told)}
    result = server.result(graph)
    beside = {path.name.partition(".")[2] for path in (server.folder / "output" / "loras").glob("as_usual*")}
    assert beside == {"safetensors", "json", "metadata.json", "cm-info.json"}, "and no picture: nobody was asked"
    (usual,) = (server.folder / "output" / "loras").glob("as_usual*.safetensors")
    assert LoraFile.read(usual).scheme == "kohya", "SD1.5's"
    assert json.loads(usual.with_suffix(".json").read_text())["activation text"] == "sks person"
    (file,) = (server.folder / "output" / "loras").glob("by_facelora*.safetensors")
    lora = LoraFile.read(file)
    assert lora.scheme == "comfy"
    assert lora.metadata["modelspec.trigger_phrase"] == "sks person"
    inspect = server.result({"inspect": node("FaceLoRAInspect", lora_name=file.name)})
    assert "sks person" in inspect.outputs["inspect"]["text"][0]
    assert server.read(f"/facelora/lora?name={file.name}").decode() == inspect.outputs["inspect"]["text"][0]
    with Image.open(file.with_suffix(".preview.png")) as picture:
        assert mark_of(picture) == DRAWN and {*picture.info} <= MARK_KEYS and min(picture.size) >= 32
        size = picture.size
    listed = next(one for one in json.loads(server.read("/experiment/models/loras")) if one["name"] == file.name)
    shown = server.read(f"/experiment/models/preview/loras/{listed['pathIndex']}/{file.name}")
    with Image.open(BytesIO(shown)) as picture:
        assert picture.size == size, "what ComfyUI's own list of models shows"
    assert result.outputs["save"]["text"] == [f"saved: output/loras/{file.name}\npreview: {file.stem}.preview.png"]


def test_the_lora_route_serves_only_files_of_the_list(server):
    broken = server.folder / "models" / "loras" / "no_lora.safetensors"
    broken.write_text("<html>")
    for name, said in (
        ("../../x.safetensors", "doesn't contain this file"),
        (broken.name, "truncated"),
        ("%00", "doesn't contain this file"),
    ):
        with pytest.raises(HTTPError) as refused:
            server.read(f"/facelora/lora?name={name}")
        answer = refused.value.read().decode()
        assert said in answer and str(server.folder) not in answer
    broken.unlink()


def test_a_saved_lora_stays_below_its_folder_and_has_one_ending(server):
    graph = training(name="named")
    for name, number in (("by_name/one.safetensors", 1), ("by_name\\one", 2)):
        save = node("FaceLoRASave", lora=["train", 0], name=name, scheme="kohya", precision="fp16")
        result = server.result(graph | {"save": save, "shown": node("PreviewAny", source=["save", 0])})
        assert texts(result, "shown") == [f"by_name/one_0000{number}_.safetensors"]
        assert (server.folder / "output" / "loras" / texts(result, "shown")[0]).exists()
    assert not list((server.folder / "output" / "loras" / "by_name").glob("*.png")), "nobody was asked"
    for name in ("../one", "", "a:b"):
        save = node("FaceLoRASave", lora=["train", 0], name=name, scheme="kohya", precision="fp16")
        assert f"name {name!r}: give a file name" in server.run(graph | {"save": save}).error


def test_more_headshots_draw_and_save_only_the_missing_ones(server):
    graph = BASE | drawing(["base", 0], ["base", 1], ["base", 2], prompt=["styles", 0], seed=["styles", 2])
    graph["styles"] = node("FaceLoRAStylePack", **STYLES | {"resolution": 64, "count": 2})
    graph["empty"]["inputs"] |= {"width": ["styles", 3], "height": ["styles", 4]}
    del graph["sampler"]["inputs"]["denoise"], graph["picture"]
    graph["sampler"]["class_type"] = "FaceLoRASampler"
    graph["saved"] = node(
        "FaceLoRASaveHeadshots",
        images=["decoded", 0],
        filename_prefix="more/%lora_name%",
        lora_name="anna-2.safetensors",
    )
    first = server.result(graph).outputs["saved"]["images"]
    graph["styles"]["inputs"]["count"] = 3
    result = server.result(graph)
    assert result.outputs["saved"]["images"][:2] == first
    names = sorted(file.name for file in (server.folder / "output" / "more").iterdir())
    assert names == [f"anna-2_0000{number}_.png" for number in (1, 2, 3)]
    assert result.log.count("| 0/2 [") == 1, "one picture was drawn, in two steps"


def test_pictures_like_one_of_the_list_are_nearer_to_it_than_others(server):
    graph = BASE | drawing(["base", 0], ["base", 1], ["base", 2], prompt=["styles", 0], seed=["styles", 2])
    graph["styles"] = node("FaceLoRAStylePack", **STYLES | {"resolution": 128})
    graph["empty"]["inputs"] |= {"width": ["styles", 3], "height": ["styles", 4]}
    del graph["sampler"]["inputs"]["denoise"]
    graph["sampler"] = node("FaceLoRASampler", **graph["sampler"]["inputs"] | {"steps": 10, "cfg": 2.5})

    def drawn() -> list[Image.Image]:
        result = server.result(graph)
        return [server.picture(image).convert("L") for image in result.outputs["picture"]["images"]]

    def apart(*pair: Image.Image) -> float:
        return ImageStat.Stat(ImageChops.difference(*pair)).mean[0]

    usual = drawn()
    graph["sampler"]["inputs"]["vary"] = 99
    assert "vary = 99: set the same seed in Headshot Style Pack, or -1" in server.error(graph)
    graph["sampler"]["inputs"]["vary"] = 6
    graph["styles"]["inputs"] |= {"vary": 6, "variation_seed": 5}
    same, *like = drawn()
    assert same.tobytes() == usual[1].tobytes() and len(like) == 3
    assert max(apart(one, same) for one in like) < min(
        apart(one.resize(same.size), same) for one in (usual[0], usual[2])
    )
    assert len({one.tobytes() for one in (same, *like)}) == 4, "seed 6 is not drawn twice"
    graph["styles"]["inputs"]["vary"] = 99
    assert "vary = 99: no picture of the list has this seed" in server.error(graph)


def test_saved_headshots_are_marked_and_contain_the_graph_as_save_image_writes_it(server):
    graph = BASE | drawing(["base", 0], ["base", 1], ["base", 2])
    graph["empty"]["inputs"]["batch_size"] = 2
    graph["saved"] = node("FaceLoRASaveHeadshots", images=["decoded", 0], filename_prefix="marked/anna")
    graph["as_usual"] = node("SaveImage", images=["decoded", 0], filename_prefix="unmarked/anna")
    result = server.result(graph, workflow={"name": "Zoë"})
    assert [image["filename"] for image in result.outputs["saved"]["images"]] == ["anna_00001_.png", "anna_00002_.png"]
    for number in (1, 2):
        marked, usual = (server.folder / "output" / name / f"anna_0000{number}_.png" for name in ("marked", "unmarked"))
        assert mark_in(marked) == (DRAWN, f"FaceLoRA {__version__}") and mark_in(usual) is None
        with Image.open(marked) as ours, Image.open(usual) as theirs:
            assert ours.size == theirs.size
            assert {name: ours.info[name] for name in ("prompt", "workflow")} == theirs.info


@pytest.mark.parametrize("prefix", ["apart/%batch_num%", "apart/a/"])
def test_no_headshot_is_saved_over_another(server, prefix):
    colours = [node("EmptyImage", width=64, height=64, batch_size=1, color=colour) for colour in (0, 255)]
    saved = node("FaceLoRASaveHeadshots", images=["picture", 0], filename_prefix=prefix)
    results = [server.result({"picture": one, "saved": saved}) for one in colours]
    first, second = (result.outputs["saved"]["images"][0]["filename"] for result in results)
    assert first != second


def test_a_prefix_that_leads_out_of_the_output_folder_is_refused_without_a_path_of_the_server(server):
    picture = node("EmptyImage", width=64, height=64, batch_size=1, color=0)
    saved = node("FaceLoRASaveHeadshots", images=["picture", 0], filename_prefix="../outside/anna")
    error = server.error({"picture": picture, "saved": saved})
    assert error.strip().endswith("filename_prefix = '../outside/anna': must not lead out of ComfyUI's output folder")
    assert str(server.folder) not in error


@pytest.mark.parametrize("of", ["photos", "alike", "ranked"])
def test_a_check_of_many_pictures_can_be_cancelled(server, of):
    folder, many = server.folder / "input" / "cancelled", server.folder / "input" / "many"
    write_photos(folder, count=2, person=38, scale=2)
    many.mkdir(exist_ok=True)
    for number in range(250):
        Image.new("RGB", (700, 700), (number, 0, 0)).save(many / f"{of}{number}.png")
    graph = {
        "photos": load_photos("cancelled" if of != "photos" else "many"),
        "pictures": node("EmptyImage", width=700, height=700, batch_size=250, color=0),
        "alike": node("FaceLoRAChooseAlike", images=["pictures", 0], photos=["photos", 0], count=2),
        "ranked": node("FaceLoRALikeness", images=["pictures", 0], reference=["photos", 0]),
    }
    graph["photos"]["inputs"]["check"] = of == "photos"
    wanted = ("photos",) if of == "photos" else ("photos", "pictures", of)
    prompt_id = server.queue({name: graph[name] for name in wanted})
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    time.sleep(2)
    server.post("/interrupt", {})
    assert server.wait(prompt_id).status == "interrupted"


def test_a_single_photo_of_several_people_is_refused_before_training_and_before_pictures_of_them_are_drawn(server):
    (server.folder / "input" / "pair").mkdir()
    ONLY_PHOTO["two people"][0]().save(server.folder / "input" / "pair" / "two.png")
    reason = "0 of 1 usable: 2 people, and no other photo to tell who is meant: crop it"
    seen = server.post("/facelora/check", {"folder": "pair", "pictures": "", "resolution": 64})
    assert (seen["headline"], seen["verdict"]) == (reason, "rejected")
    graph = training(folder="pair")
    graph["train"]["inputs"]["settings"] = "batch_size = 1"
    assert f"{reason}. To train on all photos anyway: choose 'all photos'" in server.error(graph)
    edits = {
        "latents": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),  # The VAE can't decode these.
        "edits": node("VAEDecode", samples=["latents", 0], vae=["base", 2]),
        "alike": node("FaceLoRAChooseAlike", images=["edits", 0], photos=["photos", 0], count=2),
    }
    assert f"the photos to compare with: {reason}" in server.error({**graph, **edits, "train": graph["train"] | {
        "inputs": graph["train"]["inputs"] | {"drawn_photos": ["alike", 0]}}})  # fmt: skip


def test_only_small_faces_are_redrawn_and_only_where_likeness_does_not_fall(server):
    folder = server.folder / "input" / "sizes"
    folder.mkdir()
    for name, width in (("large", 60), ("small 1", 26), ("small 2", 28)):
        canvas = Image.new("RGB", (96, 120), (90, 90, 90))
        canvas.paste(person_photos(4)[0].resize((width, width * 112 // 92)), (16, 16))
        canvas.save(folder / f"{name}.png")
    graph = BASE | drawing(["base", 0], ["base", 1], ["base", 2], seed=["styles", 2])
    graph["styles"] = node("FaceLoRAStylePack", **STYLES)
    graph["empty"]["inputs"] |= {"width": 128, "height": 160}
    graph["sampler"]["inputs"] |= {"steps": 10, "cfg": 2.5}
    same = {
        name: graph["sampler"]["inputs"][name]
        for name in ("model", "positive", "negative", "seed", "steps", "cfg", "sampler_name", "scheduler")
    }
    graph["sizes"], graph["shown"] = load_photos("sizes"), node("PreviewImage", images=["redrawn", 0])
    given = {"images": ["sizes", 1], "vae": ["base", 2], "denoise": 0.8}
    for reference, changed in (["decoded", 0], [1, 2]), (["sizes", 0], []):  # what the model draws, and who is there
        graph["redrawn"] = node("FaceLoRARedraw", reference=reference, **given, **same)
        images = [server.picture(image) for image in server.result(graph).outputs["shown"]["images"]]
        before = [Image.open(file) for file in sorted(folder.glob("*.png"))]
        boxes = [ImageChops.difference(*pair).getbbox() for pair in zip(images, before, strict=True)]
        assert [index for index, box in enumerate(boxes) if box] == changed
        assert all(box is None or (box[2] < 60 and box[3] < 70) for box in boxes), "all else is as it was"


def test_only_drawn_pictures_of_the_person_are_passed_on_and_trained_on(server):
    folder = server.folder / "input"
    write_photos(folder / "ida", count=1, person=38, scale=2)
    write_photos(folder / "edits", count=4, person=38, scale=2)
    person_photos(39)[0].resize((184, 224)).save(folder / "edits" / "else.png")
    (folder / "edits" / "0.txt").unlink()
    graph = training(folder="ida", name="ida") | {
        "edits": load_photos("edits"),
        "alike": node("FaceLoRAChooseAlike", images=["edits", 1], photos=["photos", 0], count=2),
        "report": node("PreviewAny", source=["alike", 1]),
        "chosen": node("PreviewImage", images=["alike", 0]),
    }
    graph["train"]["inputs"]["drawn_photos"] = ["alike", 0]
    result = server.result(graph)
    said = texts(result, "report")[0].splitlines()
    assert said[0].startswith("2 pictures of 5 chosen by sface") and len(result.outputs["chosen"]["images"]) == 2
    assert (
        "picture 1: almost the same picture as 0.png" in said[1]
        and "picture 5: this seems to be someone else" in said[5]
    )
    assert server.drawn(result, "alike").height > 2 * 256
    (name,) = result.outputs["train"]["lora_name"]
    lora = LoraFile.read(server.folder / "models" / "loras" / name)
    assert lora.metadata["ss_num_train_images"] == "4", "two drawn ones, and the photo twice"
    graph["alike"]["inputs"] |= {"images": ["photos", 1], "photos": ["edits", 0]}
    write_photos(folder / "ida", count=1, person=39, scale=2)
    assert "none of the 1 picture can be used: 1 of someone else" in server.error(graph)
