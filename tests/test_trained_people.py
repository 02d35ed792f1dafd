"""What belongs to whom (nodes/comfyui/app/): records, LoRAs and dropped photos. In a server: tests/comfyui."""

import json
import shutil
import signal
import sys
import threading
import types
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from core.lora.file import KEY, LoraFile
from core.storage.locks import locked
from core.storage.safetensors_file import SafetensorsFile
from tests.kills import child, die_at_change, where_forks_work
from tests.tooling import nodes_module

MODULE = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
RUN = {"prompt": "p1", "workflow": None, "node": "5"}


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """The little of ComfyUI that the modules import, with its folders in a folder of their own."""
    for name in ("input", "output", "user", "models/loras", "models/embeddings"):
        (tmp_path / name).mkdir(parents=True)

    def module(name: str, **values: object) -> None:
        monkeypatch.setitem(sys.modules, name, made := types.ModuleType(name))
        vars(made).update(values)

    module(
        "folder_paths",
        get_input_directory=lambda: str(tmp_path / "input"),
        get_output_directory=lambda: str(tmp_path / "output"),
        get_user_directory=lambda: str(tmp_path / "user"),
        get_folder_paths=lambda kind: [str(tmp_path / "models" / kind)],
    )
    args = types.SimpleNamespace(multi_user=False)
    for name in ("comfy", "comfy_api"):
        module(name)
    module("comfy.cli_args", args=args)
    module("comfy_api.latest", io=types.SimpleNamespace(NodeOutput=object))
    module("aiohttp", web=types.SimpleNamespace(Response=object))
    for name in [name for name in sys.modules if name.startswith("pack.nodes.comfyui.")]:
        monkeypatch.delitem(sys.modules, name)  # imported beside another test's folders
    monkeypatch.setenv("FACELORA_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def people(comfy):
    return nodes_module.__wrapped__("app.people").People()


def module_of(people) -> types.ModuleType:
    return sys.modules[type(people).__module__]


@pytest.fixture
def dropped(comfy):
    return nodes_module.__wrapped__("app.dropped")


def trained(
    comfy: Path, people, name: str, job: str = "a" * 64, steps: tuple[int, ...] = (), photos: tuple[str, ...] = ()
):
    """The key of the record of a finished training run under a name, and of the LoRAs of steps that were chosen."""
    tensors = {f"{MODULE}.lora_down.weight": torch.zeros(2, 64), f"{MODULE}.lora_up.weight": torch.zeros(64, 2)}
    for stem, key in [(name, job), *((f"{name}-step{step:06d}", f"{job}-step{step:06d}") for step in steps)]:
        lora = LoraFile.from_tensors(tensors, {"ss_base_model_version": "sd_v1", KEY: key})
        lora.save(comfy / "models" / "loras" / f"{stem}.safetensors")
    key = people.key_of("default", job, name)
    people.note(
        "default",
        key,
        phase="done",
        job=job,
        name=name,
        file=f"{name}.safetensors",
        photos=list(photos),
        digests=[],
        run=RUN,
    )
    return key


def listed(people) -> list[str]:
    return sorted(one["name"] for one in people.of("default", ()))


def loras(comfy: Path) -> list[str]:
    return sorted(path.stem for path in (comfy / "models" / "loras").glob("*.safetensors"))


def test_a_training_run_under_another_name_is_another_row_whose_delete_names_its_files_alone(comfy, people):
    anna, other = (trained(comfy, people, name, steps=(80,)) for name in ("Anna", "Anna B"))
    assert listed(people) == ["Anna", "Anna B"]
    names = people.files_to_delete("default", other, ())["loras"]
    assert sorted(names) == ["Anna B-step000080.safetensors", "Anna B.safetensors"]
    _, deleted = people.delete("default", other, (), ())
    assert sorted(deleted) == sorted(names)
    assert loras(comfy) == ["Anna", "Anna-step000080"] and listed(people) == ["Anna"]
    people.delete("default", anna, (), ())
    assert loras(comfy) == []


def test_a_training_run_and_its_loras_are_renamed_without_a_copy(comfy, people):
    anna, other = trained(comfy, people, "Anna", steps=(80,)), trained(comfy, people, "Ben")
    people.note(
        "default", anna, graph={"nodes": [{"id": 5, "type": "FaceLoRATrain", "widgets_values": ["Anna", "sks"]}]}
    )
    (comfy / "models" / "loras" / "Anna.preview.png").touch()
    told = []
    assert people.rename("default", anna, "Bea", (), lambda *names: told.append(names)) == "Bea"
    assert told == [("Anna", "Bea", {})], "the third are the headshots"
    assert loras(comfy) == ["Bea", "Bea-step000080", "Ben"] and listed(people) == ["Bea", "Ben"]
    assert (comfy / "models" / "loras" / "Bea.preview.png").exists()
    assert LoraFile.read(comfy / "models" / "loras" / "Bea.safetensors").metadata["ss_output_name"] == "Bea"
    assert people.graph_of("default", anna)["nodes"][0]["widgets_values"] == ["Bea", "sks"]
    assert people.key_of("default", "a" * 64, "Bea") == anna, "trained again, it has the same row"
    for name, words in (("Ben", "another LoRA has this name"), ("../x", "give a file name")):
        with pytest.raises(module_of(people).BadConfig, match=words):
            people.rename("default", anna, name, (), print)
    assert people.files_to_delete("default", other, ())["loras"] == ["Ben.safetensors"]


def rename(people, key: str, name: str) -> str:
    return people.rename("default", key, name, (), lambda *names: None)


def lora_folder(comfy: Path) -> dict[str, bytes]:
    """The files beside the LoRAs, by name."""
    return {path.name: path.read_bytes() for path in sorted((comfy / "models" / "loras").iterdir())}


def test_step_files_of_other_trainers_stay(comfy, people):
    anna, folder = trained(comfy, people, "Anna", steps=(1,)), comfy / "models" / "loras"
    other = LoraFile.read(folder / "Anna.safetensors").with_metadata({"ss_output_name": "Anna"})
    for name in ("Anna-step00000500", "Anna-step000002"):
        other.save(folder / f"{name}.safetensors")
    save_file({"unknown": torch.zeros(1)}, folder / "Anna-step000003.safetensors", {"ss_output_name": "Anna"})
    before = lora_folder(comfy)
    assert rename(people, anna, "Bea") == "Bea"
    assert sorted(people.files_to_delete("default", anna, ())["loras"]) == [
        "Bea-step000001.safetensors", "Bea.safetensors",
    ]  # fmt: skip
    people.delete("default", anna, (), ())
    theirs = [f"Anna-step{step}.safetensors" for step in ("00000500", "000002", "000003")]
    assert lora_folder(comfy) == {name: before[name] for name in theirs}


@pytest.mark.parametrize("file", ["Maria.json", "Maria.preview.png", "Maria.pt", "Maria-step000080.json"])
def test_a_rename_replaces_no_file_of_another_lora(comfy, people, file):
    anna = trained(comfy, people, "Anna", steps=(80,))
    for name in ("Anna.json", "Anna.preview.png", "Anna-step000080.json", file):
        (comfy / "models" / "loras" / name).write_text(name)
    before = lora_folder(comfy)
    with pytest.raises(module_of(people).BadConfig, match=f"^{file}: another LoRA has this name"):
        rename(people, anna, "Maria")
    assert lora_folder(comfy) == before and listed(people) == ["Anna"]


def test_the_sidecars_of_another_lora_of_the_name_are_not_deleted(comfy, people):
    anna = trained(comfy, people, "Anna")
    for name in ("Anna.pt", "Anna.json"):
        (comfy / "models" / "loras" / name).write_text(name)
    people.delete("default", anna, (), ())
    assert [*lora_folder(comfy)] == ["Anna.json", "Anna.pt"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("Anna-step000100", "intermediate LoRAs have such names"), ("b" * 250, "at most 200"), ("ä" * 101, "at most 200"),
     ("\ud800", "give a file name")],
)  # fmt: skip
def test_a_name_that_confuses_or_cannot_be_written_is_refused(comfy, people, name, words):
    anna = trained(comfy, people, "Anna")
    with pytest.raises(module_of(people).BadConfig, match=words) as refused:
        rename(people, anna, name)
    assert len(str(refused.value)) < 200 and loras(comfy) == ["Anna"] and listed(people) == ["Anna"]


def test_a_name_that_a_training_run_is_about_to_write_is_refused(comfy, people):
    anna, before = trained(comfy, people, "Anna"), lora_folder(comfy)
    held, done = threading.Event(), threading.Event()

    def train() -> None:
        with locked(comfy / "models" / "loras" / "Bea.safetensors"):
            held.set()
            done.wait()

    training = threading.Thread(target=train)
    training.start()
    held.wait()
    try:
        with pytest.raises(module_of(people).InUse, match=r"Bea.safetensors: another process is writing this file"):
            rename(people, anna, "Bea")
    finally:
        done.set()
        training.join()
    assert lora_folder(comfy) == before and listed(people) == ["Anna"]


def with_word(comfy: Path, people) -> str:
    """The key of the record of Anna, whose LoRAs have a word of their own and sidecars."""
    key, folder = trained(comfy, people, "Anna", steps=(80, 90)), comfy / "models" / "loras"
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        lora = LoraFile.read(path)
        word = {"bundle_emb.sks.string_to_param.*": torch.full((2, 64), float(number))}
        LoraFile.from_tensors({**lora.tensors, **word}, lora.metadata).save(path)
        module_of(people).write_embedding(path)
        for ending in (".json", ".preview.png"):
            path.with_suffix(ending).write_text(path.stem)
    (comfy / "models" / "loras" / "Annabel.json").write_text("of somebody else")
    return key


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".lock", ".tmp"))


@where_forks_work
def test_a_rename_that_is_killed_is_whole_or_not_at_all(comfy, people):
    folders = [comfy / "models" / name for name in ("loras", "embeddings")]
    key = with_word(comfy, people)
    before = [names_of(folder) for folder in folders]
    after = [[name.replace("Anna", "Bea") if "Annabel" not in name else name for name in names] for names in before]
    backup = shutil.copytree(comfy, comfy.parent / "backup")
    ends, number = set[str](), 0
    while True:
        number += 1
        status = child(lambda number=number: die_at_change(number) or bool(rename(people, key, "Bea")))
        assert status in (1, -signal.SIGKILL)
        (name,) = listed(people)  # the next look
        ends.add(name)
        found = [names_of(folder) for folder in folders]
        assert found == ([sorted(names) for names in after] if name == "Bea" else before), number
        assert (comfy / "models" / "loras" / f"{name}-step000080.json").read_text() == "Anna-step000080"
        written = LoraFile.read(comfy / "models" / "loras" / f"{name}.safetensors").metadata.get(
            "ss_output_name", "Anna"
        )
        assert written == name
        if status == 1:
            break
        shutil.rmtree(comfy)
        shutil.copytree(backup, comfy)
    assert ends == {"Anna", "Bea"} and number > 15


def test_a_rename_for_which_the_disk_is_too_small_changes_nothing(comfy, people, monkeypatch):
    key = with_word(comfy, people)
    folders = [comfy / "models" / name for name in ("loras", "embeddings")]
    before, copy = [names_of(folder) for folder in folders], module_of(people).copy_with_metadata

    def fill(file: SafetensorsFile, path: Path, metadata: dict[str, str]) -> None:
        if "step" in path.name:
            raise module_of(people).BadFile(f"{path}: cannot be written: No space left on device")
        copy(file, path, metadata)

    monkeypatch.setattr(module_of(people), "copy_with_metadata", fill)
    with pytest.raises(module_of(people).BadFile, match="No space left"):
        rename(people, key, "Bea")
    assert [names_of(folder) for folder in folders] == before and listed(people) == ["Anna"]


def test_a_new_name_whose_embedding_has_the_same_name_keeps_it(comfy, people):
    key = with_word(comfy, people)
    rename(people, key, "Anna B")
    before = names_of(comfy / "models" / "embeddings")
    rename(people, key, "Anna_B")
    assert names_of(comfy / "models" / "embeddings") == before and len(before) == 3


@pytest.mark.parametrize("size", [5, 100, -8])
def test_damaged_loras_of_a_person_are_deleted_and_others_stay(comfy, people, size):
    anna, folder = trained(comfy, people, "Anna", steps=(80,)), comfy / "models" / "loras"
    for name in ("Anna", "Anna-step000080"):
        path = folder / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:size])
    (folder / "others").mkdir()
    others = [folder / name for name in ("Annabel.safetensors", "others/Anna.safetensors")]
    for path in others:
        path.write_bytes(b"damaged")
    with pytest.raises(module_of(people).BadFile, match=r"Anna(-step000080)?.safetensors: "):
        rename(people, anna, "Bea")
    named = ["Anna-step000080.safetensors", "Anna.safetensors"]
    assert sorted(people.files_to_delete("default", anna, ())["loras"]) == named
    assert sorted(people.delete("default", anna, (), ())[1]) == named
    assert sorted(folder.rglob("*.safetensors")) == sorted(others)


def test_a_lora_in_two_folders_of_loras_is_renamed_and_deleted_once(comfy, people):
    anna, folder = trained(comfy, people, "Anna"), comfy / "output" / "loras"
    folder.symlink_to(comfy / "models" / "loras")
    rename(people, anna, "Bea")
    assert people.delete("default", anna, (), ())[1] == ["Bea.safetensors"]


def test_a_person_without_a_lora_gets_no_name_of_another_one(comfy, people):
    anna, _ = trained(comfy, people, "Anna"), trained(comfy, people, "Ben", job="b" * 64)
    (comfy / "models" / "loras" / "Anna.safetensors").unlink()
    with pytest.raises(module_of(people).BadConfig, match=r"Ben.safetensors: another LoRA has this name"):
        rename(people, anna, "Ben")
    assert rename(people, anna, "Bea") == "Bea"


@pytest.mark.parametrize(
    "change", [{"photos": [None]}, {"headshots": None}, {"run": {}}, {"name": 5}, {"begun": "a"}, []]
)
def test_a_damaged_record_breaks_no_other(comfy, people, change):
    for name in ("Anna", "Ben"):
        trained(comfy, people, name)
    file = next(file for file in (comfy / "cache" / "panels").iterdir() if '"Ben"' in file.read_text())
    file.write_text(json.dumps(change and json.loads(file.read_text()) | change))
    assert listed(people) == ["Anna"]


@pytest.mark.parametrize(
    "graph",
    [[], "a", {"nodes": None}, {"definitions": []}, {"nodes": [None, {"id": 5}], "definitions": {"subgraphs": [None]}},
     {"nodes": [{"id": 5, "type": "FaceLoRATrain", "widgets_values": odd} for odd in ("a", {}, [], None)]}],
)  # fmt: skip
def test_a_person_whose_graph_is_odd_is_renamed(comfy, people, graph):
    anna = trained(comfy, people, "Anna")
    people.note("default", anna, graph=graph)
    assert rename(people, anna, "Bea") == "Bea" and people.graph_of("default", anna) == graph


def test_a_record_without_a_job_deletes_no_lora(comfy, people):
    anna = trained(comfy, people, "Anna")
    people.note("default", anna, job="", file=None)
    people.delete("default", anna, (), ())
    assert loras(comfy) == ["Anna"]


def test_the_same_name_again_is_the_same_row(comfy, people):
    for name in ("Anna", "Anna B", "Anna", "Anna B"):
        trained(comfy, people, name)
    assert listed(people) == ["Anna", "Anna B"]
    people.delete("default", "a" * 64, (), ())
    trained(comfy, people, "Anna B")
    assert listed(people) == ["Anna B"]


def photo(number: int, path: Path) -> bytes:
    Image.new("RGB", (64, 80), (number, 90, 120)).save(path / "photo.png")
    return (path / "photo.png").read_bytes()


def test_dropped_photos_without_a_training_run_are_listed_and_deleted(comfy, people, dropped):
    mine = [dropped.add("default", "only", "", "a.png", photo(1, comfy))]
    mine += [dropped.add("default", "only", "photos/only", "b.png", photo(2, comfy))]
    used = dropped.add("default", "Anna", "", "c.png", photo(3, comfy))
    trained(comfy, people, "Anna", photos=(used,))
    *_, left = people.of("default", ())
    assert (left["name"], left["phase"], left["files"]) == ("only", "untrained", mine)
    assert people.delete_photos("default", mine, ("photos/only",)) == [], "a waiting run loads the folder"
    assert people.delete_photos("default", [mine[0], used, "../x.png"], ()) == [f"input/{mine[0]}"]
    assert dropped.own_name(mine[1]) == "b.png", "the names of others stay"
    assert people.delete_photos("default", mine[1:], ()) == [f"input/{mine[1]}"]
    assert listed(people) == ["Anna"] and not (comfy / "input" / "photos" / "only").exists()


def test_a_mask_is_deleted_with_its_photo(comfy, people, dropped):
    name = dropped.add("default", "only", "", "a.png", photo(1, comfy))
    dropped.add("default", "only", "photos/only", "a-masklabel.png", photo(2, comfy))
    assert sorted(people.delete_photos("default", [name], ())) == [f"input/photos/only/{file}" for file in (
        "photo 01-masklabel.png", "photo 01.png")]  # fmt: skip


def test_a_mask_of_a_photo_that_a_training_run_has_is_not_deleted(comfy, people, dropped):
    name = dropped.add("default", "Anna", "", "a.png", photo(1, comfy))
    mask = dropped.add("default", "Anna", "photos/Anna", "a-masklabel.png", photo(2, comfy))
    assert people.delete_photos("default", [mask], [name]) == [], "a waiting prompt loads it"
    trained(comfy, people, "Anna", photos=(name,))
    assert people.delete_photos("default", [mask], ()) == []
    assert dropped.photos_in("photos/Anna") == ["photo 01.png", "photo 01-masklabel.png"]


def test_photos_below_a_folder_that_a_waiting_prompt_loads_are_not_deleted(comfy, people, dropped):
    name = dropped.add("default", "Anna", "", "a.png", photo(1, comfy))
    anna = trained(comfy, people, "Anna", photos=(name,))
    assert people.files_to_delete("default", anna, ["photos"])["photos"] == 0
    people.delete("default", anna, (), ["photos"])
    assert people.delete_photos("default", [name], ["photos"]) == []
    assert people.delete_photos("default", [name], ["photo"]) == [f"input/{name}"]


@pytest.mark.parametrize(
    "name", ["x" * 300, "a\0.png", "\ud800.png", f"photo {'9' * 5000}.png", "../../Anna.png", "photo 01"]
)
def test_names_of_photos_that_anyone_may_upload_are_ignored(comfy, people, dropped, name):
    mine = dropped.add("default", "Anna", "", "a.png", photo(1, comfy))
    (comfy / "input" / "photos" / "Anna" / ".names.json").write_text(
        json.dumps({"photo 01.png": "a.png", name: "b.png"})
    )
    (row,) = people.of("default", ())
    assert row["files"] == [mine]
    assert dropped.add("default", "Anna", "photos/Anna", "c.png", photo(3, comfy)) == "photos/Anna/photo 02.png"


@pytest.mark.parametrize(
    "folder", ["photos/" + "f" * 300, "photos/a\0b", "photos/..", "photos/", "photos//Anna", "/etc"]
)
def test_a_folder_that_cannot_be_one_of_dropped_photos_is_not_used(comfy, dropped, folder):
    assert dropped.add("default", "Anna", folder, "a\0.png", photo(1, comfy)) == "photos/Anna/photo 01.png"


def test_a_photo_that_is_added_while_others_are_deleted_is_listed(comfy, dropped, monkeypatch):
    mine = [dropped.add("default", "Anna", folder, f"{number}.png", photo(number, comfy))
            for number, folder in ((1, ""), (2, "photos/Anna"))]  # fmt: skip
    deleting = threading.Thread(target=dropped.delete_dropped, args=("photos/Anna", {"photo 01.png"}))
    check = dropped.read_photo_files
    monkeypatch.setattr(
        dropped,
        "read_photo_files",
        lambda *given, **named: (deleting.start(), deleting.join(0.2), check(*given, **named)),
    )
    third = dropped.add("default", "Anna", "photos/Anna", "3.png", photo(3, comfy))
    deleting.join()
    assert dropped.photos_in("photos/Anna") == [Path(mine[1]).name, Path(third).name]
    names = json.loads((comfy / "input" / "photos" / "Anna" / ".names.json").read_text())
    assert names == {Path(mine[1]).name: "2.png", Path(third).name: "3.png"}


def test_the_note_of_consent_is_deleted_with_the_last_photo(comfy, dropped):
    for number, folder in ((1, ""), (2, "photos/Anna")):
        dropped.add("default", "Anna", folder, f"{number}.png", photo(number, comfy))
    note = comfy / "input" / "photos" / "Anna" / "person.toml"
    note.write_text("agreed = true")
    dropped.delete_dropped("photos/Anna", {"photo 01.png"})
    assert note.exists()
    dropped.delete_dropped("photos/Anna")
    assert not note.parent.exists()


def test_the_same_photos_dropped_again_are_not_copied_again(comfy, dropped):
    first = [dropped.add("default", "Anna", folder, f"{number}.png", photo(number, comfy))
             for number, folder in ((1, ""), (2, "photos/Anna"))]  # fmt: skip
    again = [dropped.add("default", "Anna", folder, f"{number}.png", photo(number, comfy))
             for number, folder in ((1, ""), (2, "photos/Anna"))]  # fmt: skip
    assert first == again == ["photos/Anna/photo 01.png", "photos/Anna/photo 02.png"]
    assert dropped.add("default", "Anna", "", "x.png", photo(9, comfy)) == "photos/Anna-2/photo 01.png"


def test_the_list_shows_the_headshot_with_the_highest_likeness(comfy, people):
    key = trained(comfy, people, "Anna")
    people.note("default", key, picture="a photo")
    shown = []
    for scores in ({"0.png": -1.0}, {"1.png": 0.4, "2.png": 0.6}, {"3.png": 0.5}, {"4.png": None}):
        for name in scores:
            Image.new("RGB", (8, 8), (60 * int(name[0]), 0, 0)).save(comfy / "output" / name)
        people.add_headshots("default", key, dict.fromkeys(scores, "digest"), scores, {})
        people.note("default", key, picture="a photo")  # as a run that begins again
        shown += people.of("default", ())
    pictures = [one["picture"] for one in shown]
    assert pictures[0] == "a photo", "the headshot has no face"
    assert pictures[1].startswith("data:image/jpeg") and len(set(pictures[1:])) == 1
    assert shown[-1]["headshots"] == 5


def test_all_headshots_of_a_person_are_one_file(comfy, people):
    key = trained(comfy, people, "Anna")
    (comfy / "output" / "headshots").mkdir()
    names = ["headshots/Anna_00001_.png", "headshots/Anna_00002_.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(comfy / "output" / name)
    digests = {name: module_of(people).digest_of(name) for name in names}
    styles = {name: ("corporate", "Bright open office") for name in (*names, "gone.png")}
    likeness = {names[0]: 0.3, names[1]: None, "gone.png": 0.9}
    people.add_headshots("default", key, {**digests, "gone.png": "digest"}, likeness, styles)
    name, content = people.headshots_zip("default", key)
    assert (name, zipfile.ZipFile(content).namelist()) == ("Anna", ["Anna_00001_.png", "Anna_00002_.png"])
    assert zipfile.ZipFile(people.headshots_zip("somebody else", key)[1]).namelist() == []
    best = {"pack": "corporate", "style": "Bright open office", "name": names[0]}
    assert people.styles_of("default", key) == [best], "the one with the highest likeness that is still there"
    assert people.styles_of("somebody else", key) == []


def headshots(comfy: Path, people, key: str, *names: str) -> None:
    """Pictures in the output folder that the record has."""
    for name in names:
        (comfy / "output" / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(comfy / "output" / name)
    people.add_headshots(
        "default", key, {name: module_of(people).digest_of(name) for name in names}, dict.fromkeys(names, 0.6), {}
    )


def test_a_headshot_that_two_training_runs_have_is_deleted_with_the_last_of_them(comfy, people):
    keys = [trained(comfy, people, name) for name in ("Anna", "Anna B")]
    for key in keys:  # Save Headshots saves the same picture once
        headshots(comfy, people, key, "shared.png")
    headshots(comfy, people, keys[1], "own.png")
    assert people.files_to_delete("default", keys[1], ())["headshots"] == 1
    people.delete("default", keys[1], (), ())
    assert [path.name for path in (comfy / "output").iterdir()] == ["shared.png"]
    people.delete("default", keys[0], (), ())
    assert [*(comfy / "output").iterdir()] == []


def test_headshots_of_the_same_name_in_two_folders_keep_their_folders_in_the_file_of_all(comfy, people):
    key, names = trained(comfy, people, "Anna"), ["2026-11-30/Anna_00001_.png", "2026-12-01/Anna_00001_.png"]
    headshots(comfy, people, key, *names)
    _, content = people.headshots_zip("default", key)
    assert zipfile.ZipFile(content).namelist() == names


def test_only_the_node_of_a_renamed_run_has_the_new_name_in_a_graph_with_two_also_in_a_subgraph(comfy, people):
    anna = trained(comfy, people, "Anna")
    nodes = [
        {"id": number, "type": "FaceLoRATrain", "widgets_values": [name]} for number, name in ((5, "Anna"), (6, "Ben"))
    ]
    inside = {"definitions": {"subgraphs": [{"nodes": nodes}]}, "nodes": []}
    for graph, place in (({"nodes": nodes}, "5"), (inside, "12:5")):
        people.note("default", anna, graph=graph, run=RUN | {"node": place})
        people.rename("default", anna, f"Bea {len(place)}", (), lambda *names: None)
        graph = people.graph_of("default", anna)
        found = graph["nodes"] or graph["definitions"]["subgraphs"][0]["nodes"]
        assert [node["widgets_values"] for node in found] == [[f"Bea {len(place)}"], ["Ben"]]


def test_a_renamed_run_stays_in_its_folder_of_loras(comfy, people):
    (comfy / "models" / "loras" / "family").mkdir()
    anna = trained(comfy, people, "family/Anna")
    assert people.rename("default", anna, "Bea", (), lambda *names: None) == "family/Bea"
    assert (comfy / "models" / "loras" / "family" / "Bea.safetensors").exists()
    assert listed(people) == ["family/Bea"], "Run would make a copy under another name"


@pytest.fixture
def queue(comfy, monkeypatch) -> MagicMock:
    """ComfyUI's queue, for the modules that need a server."""
    server, queue = MagicMock(), MagicMock(currently_running={})
    server.PromptServer.instance.prompt_queue, server.PromptServer.instance.sockets = queue, {}
    for name in ("aiohttp", "comfy_execution.utils", "nodes", "pack.nodes.comfyui.style_pack"):
        monkeypatch.setitem(sys.modules, name, MagicMock())
    monkeypatch.setitem(sys.modules, "server", server)
    return queue


def test_photos_of_waiting_prompts_are_found_however_they_are_written(comfy, queue):
    def load(folder: object, pictures: object) -> dict[str, object]:
        return {"class_type": "FaceLoRALoadPhotos", "inputs": {"folder": folder, "pictures": pictures}}

    text = {"class_type": "PrimitiveString", "inputs": {"value": "photos/gina/photo 01.png"}}
    graph = {"1": load("photos//fred", "./photos/ben/photo 01.png\n\0\n../x"), "2": {"class_type": "FaceLoRALoadPhotos"},
             "3": load(".", ["5", 0]), "4": {"class_type": ["a"]}, "5": text, "6": None,
             "7": {"class_type": "a", "inputs": []}}  # fmt: skip
    (comfy / "input" / "photos" / "fred").mkdir(parents=True)
    (comfy / "input" / "link").symlink_to("photos/fred")
    module = nodes_module.__wrapped__("app.prompts")
    for graph_, found in (
        (graph, {"photos/fred", "photos/ben/photo 01.png", "photos/gina/photo 01.png"}),
        ({"1": load("link", "x" * 300)}, {"photos/fred"}),
    ):
        queue.get_current_queue_volatile = lambda graph=graph_: ([], [(1, "p", graph, {}, [])])
        assert module.queued_photos() == found
    for odd in ([], {"prompt": []}, {"prompt": graph}, {"prompt": {"1": {"class_type": []}}}):
        assert module.aim(odd) is odd


def test_the_server_remembers_a_limited_number_of_headshots_and_training_runs(comfy, queue, monkeypatch):
    """However many prompts have ended."""
    module = nodes_module.__wrapped__("app.state")
    monkeypatch.setattr(module, "MOST_PICTURES", 5)
    monkeypatch.setattr(module, "MOST_RUNS", 3)
    app = module.App(sys.modules["server"].PromptServer.instance)
    app.watch_ends()
    for number in range(20):
        graph = {
            "train": {"class_type": "FaceLoRATrain", "inputs": {"training_seed": number}},
            "ranked": {"class_type": "FaceLoRALikeness", "inputs": {"model": ["train", 0]}},
            "saved": {"class_type": "SaveImage", "inputs": {"images": ["ranked", 0]}},
        }
        queue.currently_running[0] = (number, f"p{number}", graph, {})
        Image.new("RGB", (8, 8), (number, 0, 0)).save(comfy / "output" / f"{number}.png")
        run = app.begin("train")
        key = app.remember(run, f"job {number}", "Anna", photos=[], digests=[])
        app.rank("ranked", [(0, number / 20)])
        images = [{"filename": f"{number}.png", "subfolder": "", "type": "output"}]
        queue.task_done(0, {"outputs": {"saved": {"images": images}}})
        (state,) = app.runs.of("default")
        assert [shot["score"] for shot in state["headshots"]] == [number / 20] and state["ended"]
        assert len(app.people.of("default", ())) == number + 1 and key.endswith(f"{number}")
    kept = {name: len(value) for name, value in vars(app).items() if isinstance(value, dict)}
    assert kept == {
        "saved": 0,
        "likenesses": 0,
        "outputs": 0,
        "_trained": 3,
        "_headshots": 5,
        "_ranked": 0,
        "_pages": 0,
    }
