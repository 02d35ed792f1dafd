"""Processes that are killed at any change of the disk, or have no more rights than another user."""

import functools
import importlib
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import core
from core.storage.files import fill_page

NOBODY = 65534
"""The number of the user and the group that own nothing."""
_CHANGES = {f"os.{name}" for name in ("chmod", "link", "mkdir", "remove", "rename", "rmdir", "symlink", "truncate")}
"""Python's audit events before a call that changes the disk, beside those that open a file for writing."""


def where_forks_work(test: Callable[..., None]) -> Callable[..., None]:
    """A test that calls `child`. In a process that has become too large to fork, it runs in a pytest of its own."""

    @functools.wraps(test)
    def run(*arguments: Any, **fixtures: Any) -> None:
        try:
            child(lambda: None)
        except OSError:
            # xdist adds a group to the name.
            name = os.environ["PYTEST_CURRENT_TEST"].removesuffix(" (call)").partition("@")[0]
            environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "", name]
            result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stdout
        else:
            test(*arguments, **fixtures)

    return run


def child(function: Callable[[], object], dies_after: float | None = None) -> int:
    """The exit status of a process of its own that runs the function: what it returns, if that is a number, 3 if it raised,
    or -9 when it was killed.
    """
    process = os.fork()
    if process == 0:
        signal.alarm(0)
        code = 3
        try:
            code = function()
        finally:
            os._exit(code if isinstance(code, int) else 0)
    if dies_after is not None:
        time.sleep(dies_after)
        os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die_at_change(number: int) -> None:
    """Kill this process just before its call number `number` that changes the disk."""
    left = number

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        changes = event in _CHANGES
        if event == "open":
            changes = isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        left -= changes
        if changes and left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


@functools.cache
def load_core() -> None:
    """Import every module of the library and read its pages, which a user who may not enter the checkout can't do later."""
    for module in pkgutil.walk_packages(core.__path__, "core."):
        if not module.name.endswith("__main__"):  # which runs the command line
            importlib.import_module(module.name)
    for page in Path(core.__file__).parent.rglob("*.html"):
        fill_page(page, defaultdict(str))


def become_nobody() -> None:
    """This process, which root has started, has no more rights than a user who owns nothing."""
    load_core()
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter, and whose files are nobody's where this process is root's."""
    if os.name == "nt" or os.geteuid():
        pytest.skip("only root can become another user")
    load_core()  # here, so that the processes of a test need not
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield Path(folder)
