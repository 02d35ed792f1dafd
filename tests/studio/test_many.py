"""Many people on one base: each made once, what fails fails alone, and all that is kept of one can be deleted."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from core.cli import main
from core.demo.people import person_photos
from core.errors import BadConfig, BadFile, InUse
from core.lora.file import LoraFile
from core.lora.stated import AGREED, SUBJECT_KEY
from core.pictures import find_style_packs
from core.storage.cache_folder import cache_folder
from core.storage.drawn import save_png
from core.studio import Person, Result, Terms, forget, make_people, many, plan_ledger, plan_people, read_people
from core.studio.report import read_report
from core.studio.result import find
from core.training import Callbacks
from tests.tooling import held_elsewhere, write_photos, write_quick_pack

QUICK = {"rank": 2, "steps": 3, "batch_size": 1, "warmup_steps": 0, "prior_prediction": 0.0, "state_interval": 0.0}


@pytest.fixture
def terms(tmp_path) -> Terms:
    """A picture of one step a person."""
    packs = find_style_packs([write_quick_pack(tmp_path / "packs")]).packs
    return Terms(packs, "quick", count=1, settings=QUICK)


@pytest.fixture
def people(tmp_path) -> list[Person]:
    """Anna and Ben, of five photos each."""
    return [
        Person(name, write_photos(tmp_path / "people" / name, count=5, person=person), agreed=True)
        for name, person in (("anna", 35), ("ben", 36))
    ]


def strangers(folder: Path) -> Path:
    """A folder with a photo each of two people."""
    write_photos(folder, count=1, person=37)
    person_photos(38)[0].save(folder / "1.png")
    return folder


def agree(folder: Path, text: str = "agreed = true") -> None:
    (folder / "person.toml").write_text(text)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def forbid(monkeypatch) -> None:
    def not_now(*_: object, **__: object) -> None:
        raise AssertionError("something was made")

    monkeypatch.setattr("core.studio.result.train_and_draw", not_now)


def test_each_is_made_once_and_what_fails_fails_alone(tmp_path, base, terms, people, monkeypatch):
    mixed = Person("carl", strangers(tmp_path / "people" / "carl"), agreed=True)
    others = [replace(people[1], name="dora", agreed=False), replace(people[1], name="ed", style_pack="none")]
    everyone, output = [people[0], mixed, *others, people[1]], tmp_path / "out"
    kept_before = files(cache_folder())
    first = {result.name: result for result in make_people(everyone, base, output, terms)}
    assert [result.status for result in first.values()] == ["made", "failed", "failed", "failed", "made"]
    for name, words in (("carl", "different people"), ("dora", "agreed"), ("ed", "choose one of")):
        assert words in first[name].reason
    assert sorted(path.name for path in output.iterdir()) == ["anna", "ben", "report.html", "report.json"]
    assert LoraFile.read(output / (first["anna"].lora or "")).metadata[SUBJECT_KEY] == AGREED
    assert len(first["anna"].pictures) == 1
    # What is kept while one is made lies with the person, and goes with the end of it.
    assert files(cache_folder()) == kept_before and not (output / "anna" / ".facelora-cache").exists()
    report = json.loads((output / "report.json").read_text())
    assert (report["made"], report["failed"]) == (2, 3) and report["people"][0]["status"] == "failed"

    with monkeypatch.context() as patch:
        forbid(patch)
        again = list(make_people(people, base, output, terms))
    assert again == [replace(first[name], status="found") for name in ("anna", "ben")]
    assert plan_people(people, base, output, terms).made_before == ("anna", "ben")
    changed = [replace(terms, **what) for what in ({"count": 2}, {"seed": 2}, {"settings": QUICK | {"steps": 4}})]
    changed.append(replace(terms, drawn_on=base))
    others = [(base, terms) for terms in changed] + [(replace(base, zero_terminal_snr=True), terms)]
    assert all([*plan_people(people, one, output, two).to_make] == ["anna", "ben"] for one, two in others)
    shutil.rmtree(people[1].photos)
    strangers(people[1].photos)
    assert [result.status for result in make_people(people, base, output, terms)] == ["found", "failed"]
    write_photos(people[1].photos, count=6, person=36)
    assert [*plan_people(people, base, output, terms).to_make] == ["ben"]
    assert [result.status for result in make_people(people, base, output, terms)] == ["found", "made"]


def test_drawn_pictures_in_a_persons_folder_are_trained_on_and_are_nobodys_photos(tmp_path, base, terms, people):
    anna, warnings = people[0], []
    callbacks = Callbacks(on_warning=warnings.append)
    assert [result.status for result in make_people([anna], base, tmp_path / "out", terms)] == ["made"]
    (anna.photos / "drawn").mkdir()
    assert plan_people([anna], base, tmp_path / "out", terms).made_before == ("anna",)
    save_png(anna.photos / "drawn" / "view.png", person_photos(35)[8])
    person_photos(36)[0].save(anna.photos / "drawn" / "ben.png")
    plan = plan_people([anna], base, tmp_path / "out", terms)
    assert plan.to_make["anna"].photos == 7
    counted = plan_ledger(plan, [anna], base, terms)
    (made,) = make_people([anna], base, tmp_path / "out", terms, callbacks=callbacks)
    assert made.status == "made" and made.cost and made.cost.work.photos == 7 and counted
    assert LoraFile.read(tmp_path / "out" / (made.lora or "")).metadata["ss_num_train_images"] == "6"
    assert sum("left out" in text for text in warnings) == 1 and warnings[-1].startswith("ben.png is left out: ")
    assert [result.status for result in make_people([anna], base, tmp_path / "out", terms)] == ["found"]
    (anna.photos / "drawn").rename(tmp_path / "people" / "drawn")
    agree(anna.photos)
    with_problem = {person.name: person.problem for person in read_people(tmp_path / "people")}
    assert "move it into that person's folder" in with_problem["drawn"] and not with_problem["anna"]


def test_all_that_is_kept_of_a_person_is_deleted_and_nothing_of_others(tmp_path, base, terms, people, capsys):
    output = tmp_path / "out"
    (output / "mine").mkdir(parents=True)
    (output / "mine" / "letter.txt").write_text("dear")

    def stop(report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(make_people(people[:1], base, output, terms, callbacks=Callbacks(on_step=stop)))
    assert any(name.endswith(".state.safetensors") for name in files(output / "anna" / ".facelora-cache"))
    mine = [replace(people[1], name="mine")]
    assert "this folder has files of another program" in plan_people(mine, base, output, terms).refused["mine"]
    assert "this folder has files of another program" in next(make_people(mine, base, output, terms)).reason
    assert [result.status for result in make_people(people, base, output, terms)] == ["made", "made"]
    assert main(["forget", "anna", "--output", str(output)]) == 0
    assert "files of anna deleted" in capsys.readouterr().out
    assert not (output / "anna").exists() and (output / "ben").exists() and (people[0].photos / "1.png").exists()
    assert "anna" not in (output / "report.json").read_text() + (output / "report.html").read_text()
    for name in ("nobody", "../people/anna", "."):
        with pytest.raises(BadConfig, match="was not found; this output contains"):
            forget(name, output)
    assert forget("mine", output) == 0  # which only has a line in the report
    assert "mine" not in (output / "report.json").read_text() and (output / "mine" / "letter.txt").exists()


def test_a_users_own_folder_is_nobodys_in_the_studio_though_it_has_a_cache(tmp_path, base, terms, people):
    home = tmp_path / "home"
    (home / "anna" / ".cache").mkdir(parents=True)
    (home / "anna" / "letter.txt").write_text("dear")
    assert "this folder has files of another program" in next(make_people(people[:1], base, home, terms)).reason
    assert forget("anna", home) == 0
    with pytest.raises(BadConfig, match="'anna' was not found; this output contains nobody"):
        forget("anna", home)
    assert (home / "anna" / "letter.txt").exists() and (home / "anna" / ".cache").exists()


def test_a_person_whose_making_was_killed_at_its_start_is_made(tmp_path, base, terms, people):
    output = tmp_path / "out"
    (output / "anna").mkdir(parents=True)
    (output / "anna" / ".studio.json.lock").touch()
    assert [result.status for result in make_people(people[:1], base, output, terms)] == ["made"]


def test_a_script_can_give_folders_as_text(tmp_path, base, terms, people):
    output = str(tmp_path / "out")
    assert [result.status for result in make_people(people[:1], base, output, terms)] == ["made"]
    assert not plan_people(people[:1], base, output, terms).to_make
    assert forget(people[0].name, output)
    assert [person.name for person in read_people(str(tmp_path / "people"))] == ["anna", "ben"]


def test_a_report_with_markup_for_a_status_is_damaged(tmp_path, base, terms, people):
    list(make_people([replace(people[0], agreed=False)], base, tmp_path, terms))
    report = tmp_path / "report.json"
    report.write_text(report.read_text().replace('"status": "failed"', '"status": "<script>1</script>"'))
    (tmp_path / "ben").mkdir()
    (tmp_path / "ben" / "studio.json").touch()
    with pytest.raises(BadFile, match="this is not a studio report, or it is damaged"):
        forget("ben", tmp_path)
    assert "<script>" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("report", ["[]", '{"people": [1]}', '{"people": [{"who": 1}]}', "{"])
def test_where_the_report_is_damaged_nobody_is_forgotten_by_half(tmp_path, report):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "studio.json").touch()
    (tmp_path / "report.json").write_text(report)
    with pytest.raises(BadFile, match=r"report\.json: "):
        forget("anna", tmp_path)
    assert (tmp_path / "anna" / "studio.json").exists()


def test_paths_that_were_given_as_seen_from_here_are_not_in_the_report(tmp_path, base, terms, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = Path("jane doe/out")
    (output / "ben").mkdir(parents=True)
    (output / "ben" / "theirs.txt").write_text("")
    (tmp_path / "clients" / "jane").mkdir(parents=True)
    photos = write_photos(tmp_path / "clients" / "ben").relative_to(tmp_path)
    people = [Person("jane", Path("clients/jane"), agreed=True), Person("ben", photos, agreed=True)]
    assert [result.status for result in make_people(people, base, output, terms)] == ["failed", "failed"]
    report = (output / "report.json").read_text()
    assert "jane: no readable photo" in report and "ben: this folder has files of another program" in report
    assert "clients" not in report and "jane doe" not in report


def test_the_command_makes_everybody_in_a_folder(tmp_path, terms, capsys):
    agree(write_photos(tmp_path / "people" / "anna", count=5))
    agree(strangers(tmp_path / "people" / "ben & co"))
    (tmp_path / "quick.toml").write_text("\n".join(f"{name} = {value}" for name, value in QUICK.items()))
    command = ["studio", str(tmp_path / "people"), "--base", "demo", "--output", str(tmp_path / "out"), "--count", "1"]
    command += ["--config", str(tmp_path / "quick.toml"), "--style-pack", "quick"]
    assert main([*command, "--style-folder", str(tmp_path / "packs")]) == 1
    printed = capsys.readouterr()
    said = printed.out + printed.err
    assert (
        "1 of 2: anna: none alike, pictures kept: 0 of 1" in said
        and "2 of 2: ben & co: failed: different people" in said
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "ben &amp; co" in page and "ben & co" not in page and 'href="anna/gallery.html"' in page
    assert (tmp_path / "out" / "anna" / "gallery.html").exists()


def write_place(folder: Path, text: str, encoding: str = "utf-8") -> Path:
    """A manifest with this text, as CSV or as lines of JSON, or else a folder of Anna with this `person.toml`."""
    if text.startswith(("name", "{")):
        place = folder / ("people.jsonl" if text.startswith("{") else "people.csv")
        place.write_bytes(text.encode(encoding))
        return place
    (folder / "people" / "anna").mkdir(parents=True)
    agree(folder / "people" / "anna", text)
    (folder / "people" / ".hidden").mkdir()
    return folder / "people"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('agreed = true\nclass_word = "woman"\ncount = 3', Person("anna", Path(), True, "woman", count=3)),
        ("name, photos, agreed, count\nanna, a, yes, 3\n", Person("anna", Path("a"), True, count=3)),
        ("name,photos,agreed\nanna,a,\n", Person("anna", Path("a"))),
        ("name,photos,agreed\ranna,a,yes\r", Person("anna", Path("a"), True)),
        ('{"name": "anna", "photos": "a", "agreed": true, "count": 2}\n\n', Person("anna", Path("a"), True, count=2)),
    ],
)
def test_people_are_read_from_folders_and_manifests(tmp_path, text, expected):
    place = write_place(tmp_path, text)
    photos = place / "anna" if place.is_dir() else tmp_path / expected.photos
    assert read_people(place) == [replace(expected, photos=photos)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agreed", "person.toml: "),
        ("agreed = 1", "agreed = 1: must be true or false"),
        ("agreed = true\ncount = 0", "count = 0: must be between 1 and 10000"),
        ("agreed = true\nage = 3", "age = 3: unknown; choose from agreed"),
        ('{"name": "anna", "photos": "a", "agreed": "perhaps"}', "agreed = 'perhaps': must be true or false"),
        ('{"name": "anna", "photos": "a", "agreed": true, "class_word": ""}', "class_word = '': must be a text"),
        (f"agreed = {'1' * 5000}", "person.toml: "),
    ],
)
def test_what_is_wrong_with_one_person_is_that_persons_problem(tmp_path, text, words):
    (person,) = read_people(write_place(tmp_path, text))
    assert words in person.problem and person.name == "anna"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        *(
            (name, "is not a valid folder name")
            for name in ("../anna", ".", ".cache", "a\x1b[2J", "a\0", "\ud800", " ")
        ),
        ("a" * 300, "the name is longer than 200 bytes"),
        ("Report.html", "is the name of a studio file"),
    ],
)
def test_a_name_that_no_folder_can_have_fails_that_person_alone(tmp_path, base, terms, name, words):
    lines = [{"name": one, "photos": "a", "agreed": True} for one in (name, "ben")]
    (tmp_path / "people.jsonl").write_text("\n".join(map(json.dumps, lines)))
    people = read_people(tmp_path / "people.jsonl")
    results = list(make_people(people, base, tmp_path / "out", terms))
    assert words in results[0].reason and "this photo folder does not exist" in results[1].reason
    assert files(tmp_path / "out") == {"report.html", "report.json"}


def test_the_report_on_many_people_is_not_written_after_each(tmp_path, base, terms, people, monkeypatch):
    written: list[int] = []
    write = many.write_report
    monkeypatch.setattr(
        many, "write_report", lambda output, results: (written.append(len(results)), write(output, results))
    )
    crowd = [replace(people[0], name=f"p{number}", agreed=False) for number in range(500)]
    everyone = make_people(crowd, base, tmp_path / "out", terms)
    assert next(everyone).name == "p0" and written == [1]
    assert len(list(everyone)) == 499 and written[-1] == 500 and len(written) < 50
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["people"]) == 500
    whole = len(written)
    stopped = make_people(crowd, base, tmp_path / "out", terms)
    assert [next(stopped).name for _ in range(20)][-1] == "p19"
    del stopped
    assert len(written) > whole + 1 and written[-1] == 500


def test_people_of_earlier_calls_stay_in_the_report(tmp_path, base, terms, people, monkeypatch):
    monkeypatch.setattr("core.studio.many.find_or_make", lambda person, *_: Result(person.name, "made"))
    for one in ([people[0]], [people[1]], [people[1]]):
        list(make_people(one, base, tmp_path / "out", terms))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(one["name"], one["status"]) for one in report["people"]] == [("anna", "found"), ("ben", "made")]
    assert (report["made"], report["found"]) == (1, 1)


def test_whatever_goes_wrong_with_one_person_the_others_are_made(tmp_path, base, terms, people, monkeypatch):
    def fail_for_anna(person: Person, *_: object) -> Result:
        if person.name == "anna":
            raise PermissionError(13, "Permission denied", "/home/anna\n")
        return Result(person.name, "made")

    monkeypatch.setattr("core.studio.many.find_or_make", fail_for_anna)
    nowhere = Person("carl", Path("a\0b"), agreed=True)
    assert plan_people([*people, nowhere], base, tmp_path / "out", terms).refused.keys() == {"carl"}
    results = list(make_people(people, base, tmp_path / "out", terms))
    assert [result.status for result in results] == ["failed", "made"]
    assert results[0].reason == "PermissionError: [Errno 13] Permission denied: '/home/anna\\n'"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name,photos\nanna,a\n", "missing columns: agreed"),
        ("name,photos,agreed\n", "no people found"),
        ("name,photos,agreed\nZoë,a,yes\n", r"people\.csv: not UTF-8 text"),
        ("name,photos,agreed\nAnna,a,yes\nanna,b,yes\n", "two people are called 'anna'"),
        ('{"photos": "a"}', "person 1: name and photos"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path, text, words):
    with pytest.raises(BadConfig, match=words):
        read_people(write_place(tmp_path, text, "cp1252"))


@pytest.mark.parametrize("rows", ["Bob,a,maybe\nbob,b,yes\n", "bob,b,yes\nBob,a,maybe\n"])
def test_a_faulty_entry_of_the_same_name_does_not_refuse_the_manifest(tmp_path, rows):
    people = read_people(write_place(tmp_path, f"name,photos,agreed\n{rows}"))
    assert [person.name for person in people if not person.problem] == ["bob"] and len(people) == 2


@pytest.mark.slow
def test_what_is_damaged_of_a_person_is_made_anew_and_the_rest_found(tmp_path, base, terms, people):
    folder = tmp_path / "out" / "anna"
    (made,) = make_people(people[:1], base, folder.parent, terms)
    record, picture = folder / "studio.json", folder.parent / made.pictures[0]
    values = json.loads(record.read_text())
    nameless = json.dumps(values | {"result": values["result"] | {"name": None}})
    flattered = json.dumps(values | {"result": values["result"] | {"likeness": 0.99}})
    steps: list[int] = []
    callbacks = Callbacks(on_step=lambda report: steps.append(report.step))
    for path, damaged in (
        (record, b'{"result": 3'), (record, nameless.encode()), (record, flattered.encode()),
        (picture, picture.read_bytes()[:-100]), (picture, None),
    ):  # fmt: skip
        if damaged is None:
            path.unlink()
            os.mkfifo(path)  # whoever opens it waits
        else:
            path.write_bytes(damaged)
        (again,) = make_people(people[:1], base, folder.parent, terms, callbacks=callbacks)
        assert (again.status, again.pictures, again.likeness) == ("made", made.pictures, made.likeness) and not steps
        with Image.open(picture) as image:
            image.load()


def test_who_is_given_to_a_worker_has_no_photo_read_twice(tmp_path, base, terms, people, monkeypatch):
    def not_now(*_: object, **__: object) -> None:
        raise AssertionError("photos were read")

    monkeypatch.setattr("core.studio.result.read_person", not_now)
    assert find(people[0], base, tmp_path / "out", terms) is None
    with pytest.raises(BadConfig, match="has not agreed"):
        find(replace(people[0], agreed=False), base, tmp_path / "out", terms)
    (tmp_path / "out" / "anna").mkdir(parents=True)
    (tmp_path / "out" / "anna" / "studio.json").touch()
    with pytest.raises(AssertionError, match="photos were read"):
        find(people[0], base, tmp_path / "out", terms)


def test_a_person_whom_another_run_is_making_is_left_alone(tmp_path, base, terms, people, monkeypatch):
    output = tmp_path / "out"
    list(make_people(people[:1], base, output, terms))
    before = {path: path.read_bytes() for path in (output / "anna").rglob("*") if path.is_file()}
    write_photos(people[0].photos, count=6, person=35)
    forbid(monkeypatch)
    with held_elsewhere(output / "anna" / "studio.json"):
        (refused,) = make_people(people[:1], base, output, terms)
        assert refused.status == "failed" and "another process is writing this file" in refused.reason
        with pytest.raises(InUse):
            forget("anna", output)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize(("name", "text"), [("report.json", '{"mine": 1}'), ("report.html", "<p>mine</p>")])
def test_another_programs_report_is_not_replaced(tmp_path, base, terms, people, name, text):
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text(text)
    with pytest.raises(BadFile, match=f"{name}: this is not a studio"):
        list(make_people([replace(people[0], agreed=False)], base, output, terms))
    assert files(output) == {name} and (output / name).read_text() == text


def test_a_person_made_by_another_run_is_not_reported_as_failed(tmp_path, base, terms, people):
    output = tmp_path / "out"
    (output / "anna" / ".facelora-cache").mkdir(parents=True)
    second = make_people(people, base, output, terms)
    with held_elsewhere(output / "anna" / "studio.json"):
        assert "another process is writing this file" in next(second).reason
    assert [one.status for one in make_people(people[:1], base, output, terms)] == ["made"]
    assert [one.status for one in second] == ["made"]
    assert {one.name: one.status for one in read_report(output)} == {"anna": "found", "ben": "made"}


def test_reading_the_model_is_shown_before_the_plan(tmp_path, people, monkeypatch, capsys):
    def planned(*_: object) -> None:
        raise BadConfig(f"shown: {shown}")

    shown: list[str] = []
    monkeypatch.setattr("core.studio.plan_people", planned)
    monkeypatch.setattr("core.cli.studio.progress_bar", lambda name: lambda *_: shown.append(name))
    command = ["studio", str(people[0].photos.parent), "--base", "demo", "--output", str(tmp_path), "--dry-run"]
    assert main(command) == 1 and "shown: []" in capsys.readouterr().err
    (tmp_path / "report.json").write_text('{"people": []}')
    assert main(command) == 1 and "shown: ['reading the model'" in capsys.readouterr().err
