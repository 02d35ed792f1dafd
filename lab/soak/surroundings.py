"""Trials of what is around a command: kills while people are deleted and reported, another user, closed and full streams."""

import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from core.cli import main
from core.models import load_base
from core.pictures import find_style_packs
from core.studio import Person, Result, Terms, make_people
from core.studio.report import write_report
from tests.kills import NOBODY, become_nobody, child, die_at_change

from .desk import Desk, names_in, run, same, tensors_of

NAMES = ("anna-quux", "ben-quux", "carl-quux")
"""People whose names are in no other file."""


def made_people(desk: Desk, draw: Random) -> Path:
    """A studio's output with people who are made, in the middle of it, or only in the report."""
    output = desk.room / "out"
    output.mkdir()
    for name in NAMES:
        files = {
            "made": ("studio.json", f"{name}.safetensors", "001-1.png", "kept/001-1.png", "earlier/001-1.png"),
            "unfinished": (".facelora-cache/runs/1/history.json", ".facelora-cache/latents/1.safetensors", "001-1.png"),
            "begun": (".studio.json.lock",),
            "refused": (),
        }[draw.choice(("made", "made", "unfinished", "begun", "refused"))]
        folder = output / name
        if files and draw.random() < 0.2:
            (desk.room / "elsewhere" / name).mkdir(parents=True)
            folder.symlink_to(desk.room / "elsewhere" / name)
        for file in files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text(name)
    write_report(output, [Result(name, "made") for name in NAMES])
    if draw.random() < 0.5:
        (output / ".report.json.0123abcd.tmp").write_text(" ".join(NAMES))
    return output


def traces(desk: Desk, name: str) -> list[str]:
    """Everything in the room that has the name in it or is called so."""
    found = [path for path in desk.room.rglob("*") if name in path.name or path.is_file()]
    return [str(path) for path in found if name in path.name or name.encode() in path.read_bytes()]


def forget_all(desk: Desk, output: Path, draw: Random) -> None:
    """Everybody is deleted in any order, one after the other; of those who are not there, nothing is."""
    for name in draw.sample(NAMES, len(NAMES)):
        code, said = run("forget", name, "--output", output)
        assert not traces(desk, name), f"left of {name}: {traces(desk, name)}"
        assert code == 0 or "was not found" in said, said


def killed_forget(desk: Desk, draw: Random) -> None:
    """`forget` that is killed again and again leaves nothing of the person in the end, and all of the others."""
    output, name = made_people(desk, draw), draw.choice(NAMES)
    others = {path: path.read_bytes() for path in output.rglob("*") if path.is_file() and name not in str(path)}
    for _ in range(draw.randrange(1, 4)):
        number = draw.randrange(1, 40)
        status = child(lambda number=number: die_at_change(number) or run("forget", name, "--output", output)[0])
        assert status in (0, 1, -signal.SIGKILL), f"exit status {status}"
        desk.counts["kills"] += status == -signal.SIGKILL
    run("forget", name, "--output", output)
    assert not traces(desk, name), f"left of {name}: {traces(desk, name)}"
    kept = [path for path in others if path.parent != output]
    assert all(path.read_bytes() == others[path] for path in kept), "a file of somebody else's is lost"
    forget_all(desk, output, draw)


def killed_report(desk: Desk, draw: Random) -> None:
    """Runs that are killed while they write the report, two at a time, leave nothing that `forget` does not delete."""
    output = made_people(desk, draw) if draw.random() < 0.5 else desk.room / "out"
    people = [Person(name, desk.room / "none", agreed=draw.random() < 0.5) for name in NAMES]
    base, terms = load_base(desk.base), Terms(find_style_packs().packs, "corporate")
    for _ in range(draw.randrange(1, 4)):
        number = draw.randrange(1, 60)
        status = child(lambda number=number: die_at_change(number) or list(make_people(people, base, output, terms)))
        assert status in (0, -signal.SIGKILL), f"exit status {status}"
        desk.counts["kills"] += status != 0
    if not output.exists():
        return
    if draw.random() < 0.5:
        list(make_people(people, base, output, terms))
        assert not [name for name in names_in(output) if name.endswith(".tmp")], "a temporary file is left"
    forget_all(desk, output, draw)


def killed_studio(desk: Desk, draw: Random) -> None:
    """Of a person whose making is killed, nothing is left when they are deleted, and no photo is touched."""
    place, output = desk.room / "people", desk.room / "out"
    for photo in sorted(desk.photos.glob("*.png")):
        desk.put(f"people/{NAMES[0]}/{photo.name}", photo)
    desk.put(f"people/{NAMES[0]}/person.toml", b"agreed = true\n")
    command = desk.studio(place, output)
    number = draw.randrange(1, 150)
    status = child(lambda: die_at_change(number) or run(*command)[0])
    assert status in (0, 1, -signal.SIGKILL), f"exit status {status}"
    desk.counts["kills"] += status == -signal.SIGKILL
    if output.exists():
        run("forget", NAMES[0], "--output", output)
        left = [path for path in output.rglob("*") if NAMES[0] in path.name]
        assert not left, f"left: {left}"
        assert not [path for path in output.rglob("*") if path.is_file() and NAMES[0].encode() in path.read_bytes()]
    assert len(list((place / NAMES[0]).glob("*.png"))) == len(list(desk.photos.glob("*.png"))), "a photo is lost"


def full_disk_forget(desk: Desk, draw: Random) -> None:
    """On a full disk `forget` says what is left, and deletes it as soon as there is room."""
    output, name = made_people(desk, draw), draw.choice(NAMES)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(10 ** draw.uniform(0, 5)), limits[1]))
    try:
        code, said = run("forget", name, "--output", output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code == 0 and not traces(desk, name)) or "report still has" in said or "was not found" in said, said
    forget_all(desk, output, draw)


def _in_child(desk: Desk, function: Callable[[], int], expected: set[int]) -> int:
    """The exit status of the function in a process of its own, which is one of those."""
    told = (desk.folder / "told").open("w")

    def called() -> int:
        try:
            return function()
        except BaseException:
            traceback.print_exc(file=told)
            told.flush()
            raise

    status = child(called)
    assert status in expected, f"exit status {status}: {(desk.folder / 'told').read_text()}"
    return status


def another_user(desk: Desk, draw: Random) -> None:
    """Another user's commands on files of root's end in success or one clear error, and change nothing of theirs."""
    if os.geteuid():
        return  # only root can become another user
    for folder in (desk.folder.parent, desk.folder, desk.room):
        folder.chmod(0o711)
    output = made_people(desk, draw)
    lora, photos = desk.put("mine/a.safetensors", desk.loras[0]), desk.put("mine/1.png", desk.pictures["png"]).parent
    theirs = desk.room / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)

    def command(place: Path) -> list[Any]:
        return {
            "forget": ["forget", NAMES[0], "--output", output], "clear-cache": ["clear-cache"],
            "inspect": ["inspect", lora], "verify": ["verify", lora], "metadata": ["metadata", lora, "--title", "b"],
            "convert": ["convert", lora, "--to", "comfy", "--output", place / "out.safetensors"],
            "resize": ["resize", lora, "--rank", "1", "--output", place / "out.safetensors"],
            "check": ["check", photos, "--sheet", place / "sheet.html"], "sidecars": ["sidecars", lora],
            "publish": ["publish", lora, "--agreed", "--output", place / "page"],
            "studio": ["studio", desk.room / "people", "--base", desk.base, "--output", place],
            "train": desk.training(place / "out.safetensors"),
        }[name]  # fmt: skip

    name = draw.choice((
        "forget", "forget", "clear-cache", "inspect", "verify", "metadata", "convert", "resize", "check", "sidecars",
        "publish", "studio", "train",
    ))  # fmt: skip
    desk.put("people/dora/1.png", desk.pictures["png"])
    if name not in ("forget", "clear-cache", "metadata", "sidecars"):
        run(*command(desk.room / "first"))  # The other user may not be able to import what is imported by this.
    closed = draw.choice((desk.room / "mine", output, output / NAMES[1]))
    if closed.is_dir() and not closed.is_symlink():
        closed.chmod(draw.choice((0o700, 0o744, 0o711, 0o755)))
    before = {path: path.read_bytes() for path in (*output.rglob("*"), *photos.rglob("*")) if path.is_file()}
    place = draw.choice((theirs, output, photos, desk.room / "new"))
    _in_child(desk, lambda: (become_nobody(), run(*command(place))[0])[1], {0, 1})
    assert all(path.read_bytes() == data for path, data in before.items()), "a file of root's is changed"
    if name == "forget":
        forget_all(desk, output, draw)


def closed_streams(desk: Desk, draw: Random) -> None:
    """A command whose streams are closed or full does the same, and only reports what it could not print."""
    lora = desk.put("a.safetensors", draw.choice(desk.loras))
    output = desk.room / "out.safetensors"
    command = draw.choice((
        ["inspect", lora], ["verify", lora], ["convert", lora, "--to", "comfy", "--output", output, "--overwrite"],
        ["resize", lora, "--rank", "1", "--output", output, "--overwrite"], ["check", desk.photos],
        ["generate", "--style-pack", "list"], ["completion", "bash"], desk.training(output, "--restart"),
    ))  # fmt: skip
    code, _ = run(*command)
    written = tensors_of(output) if output.exists() else {}
    output.unlink(missing_ok=True)
    states = {name: draw.choice(("open", "closed", "full")) for name in ("stdin", "stdout", "stderr")}

    def called() -> int:
        for number, (name, state) in enumerate(states.items()):
            if state == "closed":
                setattr(sys, name, None)
                os.close(number)
            elif name != "stdin":
                setattr(sys, name, open("/dev/full" if state == "full" else os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        return main([str(word) for word in command])

    expected = {code} | ({1} if states["stdout"] == "full" else set())
    status = _in_child(desk, called, expected)
    if status == code and written:
        assert same(tensors_of(output), written), "another output with other streams"
