"""core/storage/locks.py: one run at a time, and what a killed one leaves stops nobody."""

import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from core.errors import InUse
from core.storage import locks
from core.storage.locks import locked

ROOT = Path(__file__).parents[2]
HOLDS_IT = """
import sys
from pathlib import Path
from core.storage.locks import locked

with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def no_wait(monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.0)


@contextmanager
def another_run(path: Path):
    """A process that holds the lock of the path."""
    command = [sys.executable, "-c", HOLDS_IT, str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None and run.stdout.readline() == "held\n"
        yield run


def test_another_process_is_kept_out_and_named_the_lock(tmp_path):
    path = tmp_path / "face.safetensors"
    said = r"face\.safetensors: another process is writing this file \(lock: .*\.face\.safetensors\.lock\)"
    with another_run(path), pytest.raises(InUse, match=said), locked(path):
        pass
    with locked(path):
        assert [file.name for file in tmp_path.iterdir()] == [".face.safetensors.lock"]
    assert list(tmp_path.iterdir()) == []


def test_another_thread_is_kept_out_and_the_same_one_is_not(tmp_path):
    path, said = tmp_path / "face.safetensors", []

    def enter() -> None:
        try:
            with locked(path):
                said.append("entered")
        except InUse:
            said.append("in use")

    def enter_elsewhere() -> None:
        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()

    with locked(path):
        enter()
        enter_elsewhere()
    enter_elsewhere()
    assert said == ["entered", "in use", "entered"]


def test_what_a_killed_process_leaves_locks_nothing(tmp_path):
    path = tmp_path / "face.safetensors"
    with another_run(path) as run:
        run.kill()
    assert [file.name for file in tmp_path.iterdir()] == [".face.safetensors.lock"]
    with locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_is_used_without_one(tmp_path, monkeypatch):
    def refuse(lock):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks.FileLock, "acquire", refuse)
    entered = []
    with locked(tmp_path / "face.safetensors"):
        entered.append(True)
    assert entered
