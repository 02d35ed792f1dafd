"""Where commands write: each output of each command refuses what it must not replace, and leaves it as it is."""

import argparse
import os
from pathlib import Path

import pytest

from core.cli import COMMANDS, main
from core.cli.command import command_parser
from core.cli.values import Output, WrittenFile, WrittenFolder, input_path
from core.errors import BadFile
from core.photos import is_sheet
from core.storage.files import check_writable, write_text

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no pipes and other permissions")

ARGUMENTS = {
    "demo": (),
    "page": ("--no-browser",),
    "headshots": ("photos", "--base", "model.safetensors"),
    "studio": ("photos", "--base", "model.safetensors"),
    "train": ("photos", "--base", "model.safetensors", "--continue-from", "lora.safetensors", "--restart"),
    "generate": ("--base", "model.safetensors", "--reference", "me=photos", "--person", "me=lora.safetensors:0.5"),
    "check": ("photos", "--overwrite", "--like", "photos"),
    "score": ("photos", "--reference", "photos", "--overwrite"),
    "convert": ("lora.safetensors", "--to", "kohya", "--overwrite"),
    "merge": ("lora.safetensors:0.5", "--into", "model.safetensors", "--overwrite"),
    "resize": ("lora.safetensors", "--rank", "1", "--overwrite"),
    "extract": ("model.safetensors", "lora.safetensors", "--overwrite"),
    "metadata": ("lora.safetensors", "--title", "a", "--overwrite"),
    "publish": ("lora.safetensors", "--pictures", "photos", "--agreed"),
    "forget": ("photos",),
}
"""The other arguments of each command that writes."""
INPUTS = {
    "people", "photos", "images", "reference", "pictures", "class_photos", "style_folder", "tokenizer", "comfyui", "vae",
    "file", "files", "original", "tuned", "base", "into", "continue_from", "training_adapter", "config", "thumbnail",
    "comfyui_python", "speed_lora", "trained_on", "like", "drawn_photos", "place",
}  # fmt: skip
"""The options with a path from which is read."""


def test_a_home_folder_that_the_shell_has_left_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert WrittenFile("FILE")("~/a.safetensors") == input_path("~/a.safetensors") == tmp_path / "a.safetensors"
    assert input_path("~a.safetensors") == Path("~a.safetensors") and WrittenFolder("DIR")("a/~") == Path("a/~")


ACTIONS = [(command, action) for command in COMMANDS for action in command_parser(command)._actions]
FILES = [(command, action) for command, action in ACTIONS if isinstance(action.type, WrittenFile)]
FOLDERS = [(command, action) for command, action in ACTIONS if isinstance(action.type, WrittenFolder)]


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name in ("photos/01.png", "lora.safetensors", "model.safetensors", "mine"):
        Path(name).write_text(name)
    return tmp_path


def refused(command: str, action: argparse.Action, place: str, capsys, without: str = "") -> str:
    """The message with which the command refuses to write there. Everything is as it was."""
    before = {path: (os.lstat(path), path.read_bytes() if path.is_file() else b"") for path in Path().rglob("*")}
    arguments = [one for one in ARGUMENTS[command] if one != without]
    assert main([command, *arguments, action.option_strings[0], place]) == 1
    after = {path: (os.lstat(path), path.read_bytes() if path.is_file() else b"") for path in Path().rglob("*")}
    assert {path: (*stat[:4], content) for path, (stat, content) in after.items()} == {
        path: (*stat[:4], content) for path, (stat, content) in before.items()
    }
    error = capsys.readouterr().err
    assert error.startswith(f"facelora: {place}: ") and error.count("\n") == 1, error
    return error


def named(action: argparse.Action, name: str = "out") -> str:
    """The name with the ending that the option wants."""
    return name + Path(str(action.metavar)).suffix


def test_every_option_with_a_path_is_an_input_or_an_output():
    paths = [
        (command, action)
        for command, action in ACTIONS
        if any(word in str(action.metavar) for word in ("FILE", "DIR", "FOLDER"))
    ]
    assert paths
    for command, action in paths:
        known = isinstance(action.type, Output) or action.dest in INPUTS
        assert known or action.type not in (Path, input_path), f"{command} {action.dest}: an input or an output?"


@pytest.mark.parametrize(("command", "action"), FILES, ids=lambda one: getattr(one, "dest", one))
def test_a_file_is_not_written_over_an_input_a_folder_a_device_or_a_pipe(command, action, desk, capsys):
    os.mkfifo(named(action, "pipe"))
    Path(named(action, "folder")).mkdir()
    Path(named(action, "device")).symlink_to("/dev/zero")
    Path(named(action, "round")).symlink_to(named(action, "round"))
    kinds = {
        "pipe": "not a regular file",
        "folder": "is a folder",
        "device": "not a regular file",
        "round": "cannot be written",
    }
    for kind, why in kinds.items():
        assert why in refused(command, action, named(action, kind), capsys)
    source = "photos/01.png" if "photos" in ARGUMENTS[command] else "lora.safetensors"
    os.link(source, named(action, "hard"))
    Path(named(action, "soft")).symlink_to(source)
    for name in ("hard", "soft"):
        assert "this command reads this file" in refused(command, action, named(action, name), capsys)


@pytest.mark.parametrize(("command", "action"), FILES, ids=lambda one: getattr(one, "dest", one))
def test_a_file_of_others_is_replaced_only_where_that_is_asked_for(command, action, desk, capsys):
    if command == "train":
        pytest.skip("train first looks whether it has made it")
    os.rename("mine", named(action, "mine"))
    assert "--overwrite" in refused(command, action, named(action, "mine"), capsys, without="--overwrite")


@pytest.mark.parametrize(("command", "action"), FOLDERS, ids=lambda one: getattr(one, "dest", one))
def test_a_folder_is_no_file_and_none_that_is_read(command, action, desk, capsys):
    os.mkfifo("pipe")
    Path("away").symlink_to("nowhere")
    for name in ("mine", "pipe", "away"):
        assert "is not a folder" in refused(command, action, name, capsys)
    assert "File name too long" in refused(command, action, "a" * 300, capsys)
    if command not in ("page", "demo", "forget"):
        Path("link").symlink_to("photos")
        for name in ("photos", "link"):
            assert "this command reads this folder" in refused(command, action, name, capsys)


@pytest.mark.parametrize(
    ("command", "output", "words"),
    [("train", "new.pt", "must end in .safetensors"), ("train", "lora.safetensors", "this command reads this file"),
     ("headshots", "mine", "this is not a folder"), ("studio", "photos", "this command reads this folder")],
)  # fmt: skip
def test_a_dry_run_refuses_what_the_run_would_refuse(command, output, words, desk, capsys):
    before = sorted(desk.rglob("*"))
    assert main([command, *ARGUMENTS[command], "--output", output, "--dry-run"]) == 1
    assert f"{output}: " in (said := capsys.readouterr().err) and words in said
    assert sorted(desk.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "option"),
    [("check", "--sheet"), ("headshots", "--draw-on"),
     *(("generate", option) for option in ("--base", "--vae", "--text-encoder", "--tokenizer", "--lora"))],
)  # fmt: skip
def test_an_empty_name_is_wrong_usage(command, option, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([command, *ARGUMENTS[command], option, ""])
    assert f"argument {option}: the name is empty" in capsys.readouterr().err


def test_a_sheet_replaces_a_sheet(desk, photo_folder, capsys):
    sheet = desk / "sheet.html"
    for _ in range(2):
        main(["check", str(photo_folder), "--sheet", str(sheet)])
        assert is_sheet(sheet)
    assert "already exists" not in capsys.readouterr().err


def test_a_link_stays_and_a_file_keeps_its_permissions(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("before")
    target.chmod(0o640)
    link.symlink_to("target")
    write_text(link, "after")
    assert link.is_symlink() and target.read_text() == "after" and target.stat().st_mode & 0o777 == 0o640
    with pytest.raises(BadFile, match="null: is not a regular file"):
        write_text("/dev/null", "after")


def test_a_name_too_long_for_its_temporary_file_is_refused_before_the_work(tmp_path):
    with pytest.raises(BadFile, match="cannot be written there: File name too long"):
        check_writable(tmp_path / ("a" * 250))


def test_what_a_killed_command_left_is_deleted_by_the_next(desk, capsys):
    for name in (".out.safetensors.0123abcd.tmp", ".other.safetensors.0123abcd.tmp"):
        Path(name).touch()
    assert main(["convert", "lora.safetensors", "--to", "kohya", "--output", "out.safetensors"]) == 1
    assert {path.name for path in Path().glob(".*")} == {".other.safetensors.0123abcd.tmp"}
