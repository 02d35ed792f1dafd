"""core/studio/forgetting.py: whatever happens, a repeated `forget` leaves nothing of the person, or says what is left."""

import os
import re
import signal
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest

from core.cli import main
from core.demo import BASE_FILE
from core.errors import BadConfig, BadFile, InUse
from core.models import load_base
from core.pictures import find_style_packs
from core.studio import Person, Result, Terms, forget, forgetting, make_people
from core.studio.report import read_report, write_report
from tests.kills import NOBODY, become_nobody, child, die_at_change, open_folder, where_forks_work
from tests.tooling import write_photos

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork, and has other permissions")


def write_studio(output: Path, *, link: Path | None = None, is_made: bool = True) -> Path:
    """A studio's output with Anna, made or in the middle of it, and Ben. A killed process has left reports with both."""
    for name in ("anna", "ben"):
        folder = output / name
        if link and name == "anna":
            (link / "anna").mkdir(parents=True)
            output.mkdir(parents=True)
            folder.symlink_to(link / "anna")
        unfinished = [".facelora-cache/latents/1.safetensors", ".facelora-cache/runs/2/history.json"]
        made = [
            f"{name}.safetensors",
            f"{name}.person.toml",
            "001-1.png",
            "kept/001-1.png",
            "earlier/001-1.png",
            "studio.json",
        ]
        for file in [*made, ".studio.json.01234567.tmp"] if is_made or name == "ben" else [*unfinished, "1.png"]:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(name)
    results = [Result(name, "made", lora=f"{name}/{name}.safetensors") for name in ("anna", "ben")]
    write_report(output, results if is_made else results[1:])
    for name in ("report.json", "report.html"):
        (output / f".{name}.0123abcd.tmp").write_bytes((output / name).read_bytes() + b"anna")
    return output


def traces(name: str, *folders: Path) -> list[str]:
    """Every path below the folders that has the name in it or in its content."""
    found = [path for folder in folders for path in folder.rglob("*")]
    return [str(path) for path in found if name in path.name or (path.is_file() and name in path.read_text())]


@pytest.mark.parametrize("kind", ["made", "unfinished", "link"])
@where_forks_work
def test_killed_after_any_change_of_the_disk_it_leaves_nothing_when_it_is_repeated(tmp_path, kind, capsys):
    number, status = 0, -signal.SIGKILL
    while status:
        number += 1
        room = tmp_path / str(number)
        link = room / "elsewhere" if kind == "link" else None
        output = write_studio(room / "out", link=link, is_made=kind != "unfinished")
        command = ["forget", "anna", "--output", str(output)]
        status = child(lambda number=number, command=command: die_at_change(number) or main(command))
        assert status in (0, -signal.SIGKILL)
        code = main(command) if status else 0
        assert traces("anna", output, *([link] if link else [])) == [], f"left after change {number}"
        assert code == 0 or "'anna' was not found" in capsys.readouterr().err
        assert {path.name for path in (output / "ben").iterdir()} >= {"studio.json", "kept"}
        assert [one.name for one in read_report(output)] == ["ben"] and "ben" in (output / "report.html").read_text()
    assert number > 10


def forget_as_nobody(output: Path) -> tuple[int, str]:
    """The exit code of the command for Anna, and what it says, as another user."""
    said = output.parent / "said"
    os.close(os.open(said, os.O_CREAT, 0o666))
    os.chown(said, NOBODY, NOBODY)

    def run_command() -> int:
        become_nobody()
        with said.open("w") as sys.stderr:
            return main(["forget", "anna", "--output", str(output)])

    return child(run_command), said.read_text()


def give_to_nobody(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


@pytest.mark.parametrize("closed", ["anna/kept", "anna", "."])
@where_forks_work
def test_what_another_user_cannot_delete_is_told_and_deleted_later(closed):
    with open_folder() as room:
        output = write_studio(room / "out")
        give_to_nobody(output)
        os.chown(output / closed, 0, 0)
        for _ in range(2):
            code, said = forget_as_nobody(output)
            assert code == 1 and said.startswith("facelora: ") and said.count("\n") == 1, said
            left = re.match(r"facelora: (/.+?): cannot be deleted: Permission denied", said)
            assert left and Path(left[1]).exists(), said
            assert "anna" in [one.name for one in read_report(output)]
        give_to_nobody(output)
        assert forget_as_nobody(output)[0] == 0 and traces("anna", output) == []


@where_forks_work
def test_a_folder_that_cannot_be_read_is_told(tmp_path):
    with open_folder() as room:
        output = write_studio(room / "out")
        give_to_nobody(output)
        os.chown(output / "anna", 0, 0)
        (output / "anna").chmod(0o700)
        code, said = forget_as_nobody(output)
        assert code == 1 and f"{output / 'anna'}: cannot be deleted: Permission denied" in said


@where_forks_work
def test_people_are_reported_in_a_folder_that_may_be_written_but_not_read():
    with open_folder() as room:
        output, base = room / "out", load_base(BASE_FILE)
        output.mkdir(0o733)
        output.chmod(0o733)

        def run_studio() -> None:
            become_nobody()
            list(make_people([Person("carl", room / "none", agreed=True)], base, output, Terms({}, "none")))

        assert child(run_studio) == 0 and [one.name for one in read_report(output)] == ["carl"]


def test_on_a_full_disk_the_report_that_has_the_person_is_named(tmp_path, monkeypatch, capsys):
    output = write_studio(tmp_path / "out")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main(["forget", "anna", "--output", str(output)]) == 1
    assert (
        "report.html: cannot be written: No space left on device; the report still has 'anna'"
        in capsys.readouterr().err
    )
    assert main(["forget", "anna", "--output", str(output)]) == 0 and traces("anna", output) == []


def test_reports_that_a_killed_process_left_are_deleted_by_the_next_run(tmp_path):
    output = write_studio(tmp_path / "out")
    terms = Terms(find_style_packs().packs, "corporate")
    list(make_people([Person("carl", tmp_path / "none", agreed=True)], load_base(BASE_FILE), output, terms))
    assert not list(output.glob(".*")) and [one.name for one in read_report(output)] == ["carl", "anna", "ben"]


def test_beside_a_link_a_killed_process_left_reports_too(tmp_path):
    output = write_studio(tmp_path / "out")
    (tmp_path / "sent").mkdir()
    for name in ("report.json", "report.html"):
        (output / name).rename(tmp_path / "sent" / name)
        (output / name).symlink_to(tmp_path / "sent" / name)
        (tmp_path / "sent" / f".{name}.0123abcd.tmp").write_text("anna")
    assert forget("anna", output) and traces("anna", tmp_path / "sent") == []


def in_another_thread(do: Callable[[], object]) -> None:
    with ThreadPoolExecutor(1) as thread:
        thread.submit(do).result()


def test_who_is_yet_to_be_made_cannot_be_deleted_meanwhile(tmp_path):
    """Otherwise nothing would be found, and the person made afterwards."""
    people = [Person(name, write_photos(tmp_path / name, count=5, person=35), agreed=True) for name in ("anna", "ben")]
    output, terms = tmp_path / "out", Terms(find_style_packs().packs, "corporate")
    nobody = [Person("carl", tmp_path / "none", agreed=True), *people]
    results = make_people(nobody, load_base(BASE_FILE), output, terms)
    next(results)  # Carl's failure; Anna's folder isn't made yet.
    with pytest.raises(InUse, match=r"'anna' can't be deleted while people are being made here.*lock: "):
        in_another_thread(lambda: forget("anna", output))
    with pytest.raises(InUse, match="'carl' can't be deleted"):  # The run would write the line again.
        forget("carl", output)
    cast(Generator[Result], results).close()
    assert forget("carl", output) == 0 and not list(output.glob(".*"))


def test_while_the_command_reads_the_model_nobody_can_be_deleted(tmp_path, monkeypatch, capsys):
    output, said = write_studio(tmp_path / "out"), []
    write_photos(tmp_path / "people" / "anna", count=5, person=35)

    def planned(*_: object) -> None:
        with pytest.raises(InUse) as refused:
            forget("anna", output)
        said.append(refused.value)
        raise BadConfig("enough")

    monkeypatch.setattr("core.studio.plan_people", planned)
    assert main(["studio", str(tmp_path / "people"), "--base", "demo", "--output", str(output)]) == 1
    assert said and "enough" in capsys.readouterr().err and forget("anna", output)


def test_nobody_is_made_while_somebody_is_deleted(tmp_path, monkeypatch):
    output, terms = write_studio(tmp_path / "out"), Terms(find_style_packs().packs, "corporate")
    base, refused = load_base(BASE_FILE), []

    def run_meanwhile(*_: object, **__: object) -> int:
        with pytest.raises(InUse) as error:
            in_another_thread(lambda: list(make_people([], base, output, terms)))
        refused.append(error)
        return 0

    monkeypatch.setattr("core.storage.locks.WAIT", 0.0)
    monkeypatch.setattr("core.studio.forgetting.delete", run_meanwhile)
    forget("anna", output)
    assert refused


def test_the_note_of_the_agreement_is_the_last_file_to_be_deleted(tmp_path, monkeypatch):
    deleted: list[str] = []
    delete = forgetting.delete
    monkeypatch.setattr(forgetting, "delete", lambda path, left: deleted.append(path.name) or delete(path, left))
    forget("anna", write_studio(tmp_path / "out"))
    assert deleted[-4:] == ["studio.json", "anna.person.toml", "anna", "anna"]


def test_a_killed_runs_lock_keeps_nobody_from_being_deleted(tmp_path):
    output = write_studio(tmp_path / "out")
    (output / ".report.json.0123abcd.lock").touch()
    assert forget("anna", output) and not list(output.glob(".*"))


def test_a_folder_with_only_the_lock_of_a_killed_run_is_the_persons(tmp_path):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / ".studio.json.lock").touch()
    forget("anna", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_made_person_whose_folder_has_lost_its_record_stays_in_the_report(tmp_path):
    output = write_studio(tmp_path / "out")
    (output / "anna" / "studio.json").unlink()
    with pytest.raises(BadFile, match=r"anna: without studio\.json, this folder may be somebody else's; delete it"):
        forget("anna", output)
    assert (output / "anna" / "001-1.png").exists() and "anna" in [one.name for one in read_report(output)]
    for path in sorted((output / "anna").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    forget("anna", output)
    assert traces("anna", output) == []


def test_what_links_in_a_persons_folder_lead_to_is_kept(tmp_path):
    output = write_studio(tmp_path / "out")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").touch()
    (output / "anna" / "photos").symlink_to(tmp_path / "photos")
    assert forget("anna", output) and (tmp_path / "photos" / "1.png").exists()


def test_no_folder_is_made_for_an_output_that_does_not_exist(tmp_path):
    with pytest.raises(BadFile, match="out: cannot be read: No such file or directory"):
        forget("anna", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
