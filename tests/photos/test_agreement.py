"""core/photos/agreement.py: nobody is trained or published who hasn't agreed, or no longer does."""

import re
from datetime import date
from pathlib import Path

import pytest

from core.cli import main
from core.config import TrainConfig
from core.demo import BASE_FILE
from core.errors import BadConfig
from core.lora import LoraFile, edit_metadata, inspect_header, merge_loras, write_sidecars
from core.lora.metadata import shared_metadata
from core.lora.stated import AGREED, SUBJECT_KEY, UNTIL_KEY
from core.models import load_base
from core.photos import agreement_of, check_agreed, read_person_file, read_photos, write_agreement
from core.pictures import find_style_packs
from core.pictures.publication import publish
from core.studio import Person, Terms, forget, make_people
from core.studio.result import check_person
from core.training import LoraFolders, TrainingJob, find_or_train, train
from tests.pictures.test_publication import write_lora, write_picture
from tests.tooling import write_photos, write_quick_pack

UNTIL = f"{date.today().year + 5}-06-30"
NOTE = f"""agreed = true
agreed_by = "Zora Quist"
agreed_on = {date.today()}
agreed_for = "the jubilee book"
agreed_until = {UNTIL}
"""
ENDED = "agreed_on = 2016-01-01\nagreed_until = 2020-02-29\n"
WITHDRAWN = NOTE + "withdrawn = 2026-12-01\n"
QUICK = {"steps": 1, "rank": 2, "resolution": 32, "batch_size": 1, "check_photos": False}
CONFIG = TrainConfig(**QUICK)


def noted(folder: Path, text: str) -> Path:
    """A folder of photos with this person.toml."""
    write_photos(folder, count=4)
    (folder / "person.toml").write_text(text)
    return folder


@pytest.mark.parametrize("text", ["agreed = false", "agreed = 'no'", "agreed = 0", "agreed = 'perhaps'"])
@pytest.mark.parametrize("command", ["train", "headshots"])
def test_a_folder_of_a_person_who_has_not_agreed_is_refused(tmp_path, capsys, command, text):
    photos = write_photos(tmp_path / "photos", count=4)
    (photos / "person.toml").write_text(text)
    output = tmp_path / "out" / "a.safetensors"
    assert main([command, str(photos), "--base", "demo", "--output", str(output), "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert f"facelora: {photos / 'person.toml'}: the person has not agreed" in said and said.count("\n") == 1


def test_scripts_and_lists_of_people_obey_the_file_too(tmp_path, small_sd15):
    photos = write_photos(tmp_path / "photos", count=4)
    (photos / "person.toml").write_text("agreed = false")
    with pytest.raises(BadConfig, match=r"person\.toml: the person has not agreed"):
        train(photos, small_sd15)
    with pytest.raises(BadConfig, match=r"person\.toml: the person has not agreed"):
        check_person(Person("anna", photos, agreed=True), tmp_path)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("agreed = ", "Invalid value"),
        ("agreed_on = 2026-02-30", "'agreed_on = 2026-02-30'"),
        ("agreed_on = 'soon'\nagreed_until = 2030-01-01", "agreed_on = 'soon': expected a day, such as 2026-12-31"),
        ("agreed_on = 2026-12-01T10:00:00", "agreed_on = '2026-12-01 10:00:00': expected a day"),
        (
            "agreed_on = 2024-02-29\nagreed_until = 2034-03-01",
            "agreed_until = 2034-03-01: must be at most 10 years after",
        ),
        (
            "agreed_on = 2026-02-28\nagreed_until = 2037-02-28",
            "agreed_until = 2037-02-28: must be at most 10 years after",
        ),
        (
            "agreed_on = 2026-02-28\nagreed_until = 2026-02-27",
            "agreed_until = 2026-02-27: must be at most 10 years after",
        ),
        ("agreed_on = 2026-02-28", "agreed_on and agreed_until need each other"),
        ("agreed_by = 3", "agreed_by = 3: expected str"),
        (
            "agreed_untill = 2030-01-01",
            "agreed_untill = datetime.date(2030, 1, 1): unknown; choose from agreed, agreed_by",
        ),
    ],
)
def test_a_fault_is_one_line_with_the_file_and_the_value(tmp_path, capsys, text, fault):
    photos = noted(tmp_path / "photos", text)
    with pytest.raises(BadConfig) as error:
        check_agreed(photos)
    assert str(error.value).startswith(f"{photos / 'person.toml'}: ") and fault in str(error.value)
    assert main(["train", str(photos), "--base", "demo", "--output", str(tmp_path / "a.safetensors")]) == 1
    assert capsys.readouterr().err == f"facelora: {error.value}\n"


def test_a_folder_in_its_place_is_named(tmp_path):
    (tmp_path / "person.toml").mkdir()
    with pytest.raises(BadConfig, match=rf"^{re.escape(str(tmp_path))}.person\.toml: "):
        check_agreed(tmp_path)


@pytest.mark.parametrize("text", ["agreed = true", "agreed = 'Yes'", "class_word = 'woman'"])
def test_a_person_toml_without_a_refusal_is_accepted(tmp_path, text):
    (tmp_path / "person.toml").write_text(text)
    check_agreed(tmp_path)


@pytest.mark.parametrize(("text", "reason"), [(ENDED, "has ended"), (WITHDRAWN, "has withdrawn the agreement")])
def test_nobody_is_trained_after_the_end_or_a_withdrawal(tmp_path, capsys, small_sd15, text, reason):
    photos = noted(tmp_path / "photos", text)
    for command in ("train", "headshots"):
        assert main([command, str(photos), "--base=demo", f"--output={tmp_path / 'a.safetensors'}"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"facelora: {photos / 'person.toml'}: the ") and reason in said and said.count("\n") == 1
    with pytest.raises(BadConfig, match=reason):
        check_person(Person("anna", photos, agreed=True), tmp_path)
    (photos / "10_anna").mkdir()
    for photo in photos.glob("*.png"):
        photo.rename(photos / "10_anna" / photo.name)
    with pytest.raises(BadConfig, match=reason):  # as the nodes call it
        TrainingJob.of(read_photos(photos), load_base(small_sd15), CONFIG)


@pytest.mark.parametrize("way", ["file", "folders", "value"])
def test_a_lora_states_the_end_and_has_the_note_beside_it(tmp_path, small_sd15, way):
    photos, path = noted(tmp_path / "photos", NOTE), tmp_path / "out" / "anna.safetensors"
    if way == "folders":
        find_or_train(
            TrainingJob.of(read_photos(photos), load_base(small_sd15), CONFIG),
            LoraFolders("anna", [path.parent]),
        )
    else:
        lora = train(photos, small_sd15, CONFIG, output=path if way == "file" else None)
        assert lora.metadata[UNTIL_KEY] == UNTIL and lora.metadata[SUBJECT_KEY] == AGREED
    if way != "value":
        assert (
            inspect_header(path)["about"] | {"subject": AGREED, "agreed_until": UNTIL} == inspect_header(path)["about"]
        )
        assert agreement_of(path).agreed_by == "Zora Quist"
        assert agreement_of(path.with_name("anna-step000100.safetensors")).agreed_by == "Zora Quist"


def test_who_has_agreed_and_what_for_is_in_no_other_file(tmp_path):
    """The LoRA, pictures, sheets, pages, records, sidecars, the folder to upload, and what ComfyUI or the page would zip."""
    photos, output = noted(tmp_path / "people" / "anna", NOTE), tmp_path / "out"
    terms = Terms(find_style_packs([write_quick_pack(tmp_path / "packs")]).packs, "quick", count=1, settings=QUICK)
    (made,) = make_people([Person("anna", photos, agreed=True)], load_base(BASE_FILE), output, terms)
    assert made.lora, made.reason
    lora = output / made.lora
    write_sidecars(lora)
    upload = publish(lora, tmp_path / "upload", [output / made.pictures[0]], agreed=True, title="A face")
    assert f"and to its publication, until {UNTIL}." in upload.page.read_text()
    assert LoraFile.read(upload.lora).metadata[UNTIL_KEY] == LoraFile.read(lora).metadata[UNTIL_KEY] == UNTIL
    words, every = (b"Zora", b"Quist", b"jubilee"), [path for path in tmp_path.rglob("*") if path.is_file()]
    told = {path for path in every if any(word in path.read_bytes() for word in words)}
    assert told == {lora.with_suffix(".person.toml"), photos / "person.toml"}

    assert main(["consent", str(photos), "--withdrawn", "2026-12-01"]) == 0  # beside the photos alone
    with pytest.raises(BadConfig, match=r"anna/person\.toml: the person has withdrawn"):
        publish(lora, tmp_path / "again", agreed=True, title="A face")
    assert forget("anna", output) and not (output / "anna").exists()


@pytest.mark.parametrize(
    ("text", "reason"), [(ENDED, "has ended (agreed_until = 2020-02-29)"), (WITHDRAWN, "withdrawn")]
)
@pytest.mark.parametrize("name", ["anna.safetensors", "anna-step000100.safetensors", "earlier/anna.safetensors"])
def test_nothing_is_published_after_the_end_or_a_withdrawal(tmp_path, capsys, text, reason, name):
    lora = write_lora(tmp_path / name)
    note = tmp_path / "anna.person.toml"
    note.write_text(text)
    assert main(["publish", str(lora), "--agreed", "--output", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"facelora: {note}: the ") and reason in said and not (tmp_path / "out").exists()
    note.write_text(NOTE)
    assert main(["publish", str(lora), "--agreed", "--output", str(tmp_path / "out")]) == 0


def test_a_copied_lora_is_not_published_after_the_end_that_its_metadata_state(tmp_path):
    lora = write_lora(tmp_path / "anna.safetensors", facelora__agreed_until="2020-02-29")
    with pytest.raises(BadConfig, match=r"anna\.safetensors, facelora\.agreed_until: the agreement has ended"):
        publish(lora, tmp_path / "out", [write_picture(tmp_path / "1.png")], agreed=True)
    edit_metadata(lora, tmp_path / "ben.safetensors", title="Me")
    with pytest.raises(BadConfig, match="the agreement has ended"):
        publish(tmp_path / "ben.safetensors", tmp_path / "out", agreed=True)
    with pytest.raises(BadConfig, match=r"facelora\.agreed_until = 'Zora'"):
        shared_metadata({UNTIL_KEY: "Zora"})


def test_a_merged_lora_has_the_earliest_end(tmp_path):
    loras = [
        LoraFile.read(write_lora(tmp_path / f"{end}.safetensors", facelora__agreed_until=end))
        for end in ("2034-01-01", "2031-01-01")
    ]
    assert merge_loras([(one, 0.5) for one in loras])[0].metadata[UNTIL_KEY] == "2031-01-01"


def test_a_withdrawal_beside_a_lora_outlives_another_training_run(tmp_path, small_sd15):
    photos, path = noted(tmp_path / "photos", NOTE), tmp_path / "anna.safetensors"
    train(photos, small_sd15, CONFIG, output=path)
    assert main(["consent", str(path), "--withdrawn", "2026-12-01"]) == 0
    with pytest.raises(BadConfig, match=r"anna\.person\.toml: the person has withdrawn"):
        train(photos, small_sd15, CONFIG, output=path)
    (photos / "person.toml").write_text(NOTE.replace("Zora Quist", "Zora Quist, again"))
    train(photos, small_sd15, CONFIG, output=path)
    assert not agreement_of(path).withdrawn


def test_a_note_that_was_written_beside_the_lora_first_counts(tmp_path, small_sd15):
    """InvokeAI's photos have no folder of their own."""
    path = tmp_path / "anna.safetensors"
    assert main(["consent", str(path), "--agreed-until", UNTIL]) == 0
    images = [photo.image() for photo in read_photos(write_photos(tmp_path / "photos", count=4))]
    assert train(images, small_sd15, CONFIG, output=path).metadata[UNTIL_KEY] == UNTIL


def test_the_command_keeps_the_other_lines_and_writes_nothing_invalid(tmp_path, capsys):
    file = tmp_path / "person.toml"
    file.write_text("# Anna\nclass_word = 'woman'\nagreed_by = 'A'\n")
    given = ["--agreed-by", 'Zora "Q"', "--agreed-on", "2026-12-01", "--agreed-until"]
    assert main(["consent", str(tmp_path), *given, "2037-12-01"]) == 1
    assert "agreed_until = 2037-12-01: must be at most 10 years" in capsys.readouterr().err
    assert file.read_text().endswith("agreed_by = 'A'\n")
    assert main(["consent", str(tmp_path), *given, "2036-12-01"]) == 0
    assert file.read_text() == (
        '# Anna\nclass_word = \'woman\'\nagreed = true\nagreed_on = 2026-12-01\nagreed_by = "Zora \\"Q\\""\n'
        "agreed_until = 2036-12-01\n"
    )
    assert 'agreed_by = Zora "Q"' in capsys.readouterr().out


def test_an_agreement_begins_today_and_one_without_an_end_is_not_written(tmp_path, capsys):
    file = tmp_path / "person.toml"
    assert main(["consent", str(tmp_path), "--agreed-by", "Zora Quist"]) == 1
    assert "give the first and the last day" in capsys.readouterr().err and not file.exists()
    write_agreement(file, {"agreed_until": UNTIL})
    agreement, others = read_person_file(file)
    assert (agreement.agreed_on, f"{agreement.agreed_until}") == (date.today(), UNTIL) and others == {"agreed": True}


def test_a_first_day_that_is_known_stays_and_a_withdrawal_is_no_agreement(tmp_path):
    file = tmp_path / "person.toml"
    write_agreement(file, {"withdrawn": "2026-12-01"})
    assert file.read_text() == "withdrawn = 2026-12-01\n"
    file.write_text("agreed_on = 2026-11-30\nagreed_until = 2027-01-01\n")
    write_agreement(file, {"agreed_until": "2028-01-01"})
    assert read_person_file(file)[0].agreed_on == date(2026, 11, 30)
    write_agreement(file, {"agreed_on": "2026-12-01", "agreed_until": "2028-01-01"})
    assert read_person_file(file)[0].agreed_on == date(2026, 12, 1)
