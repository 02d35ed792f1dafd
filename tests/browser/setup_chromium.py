"""Sees to it that the browser tests find a chromium: `python tests/browser/setup_chromium.py`.

The system's is taken where there is one. Otherwise its package manager installs one, where that may be done without asking
for a password, and else playwright downloads its own. Where neither works, the browser tests are reported as not run.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

BY_HAND = "python -m playwright install --with-deps chromium"
"""What a user can type to get one."""
_PROGRAMS = ("chromium", "google-chrome", "chromium-browser")
_PACKAGE_MANAGERS = {
    "apt-get": (("update", "-qq"), ("install", "-y", "-qq", "chromium")),
    "dnf": (("install", "-y", "-q", "chromium"),),
    "apk": (("add", "--quiet", "chromium"),),
    "pacman": (("-Sy", "--noconfirm", "--quiet", "chromium"),),
}


def find_chromium() -> str | None:
    """The path of the system's chromium or of playwright's own; None where there is neither."""
    for name in _PROGRAMS:
        if program := shutil.which(name):
            return program
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def main() -> None:
    if find_chromium():
        return
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        for manager, steps in _PACKAGE_MANAGERS.items():
            if program := shutil.which(manager):
                print(f"installing chromium with {manager}", flush=True)
                all(succeeds(program, *arguments) for arguments in steps)
                break
    if not find_chromium():
        print("downloading playwright's chromium", flush=True)
        succeeds(sys.executable, "-m", "playwright", "install", "chromium")
    if not find_chromium():
        print(f"no chromium could be installed: the browser tests will not run. To run them: {BY_HAND}")


def succeeds(*command: str) -> bool:
    try:
        return subprocess.run(command, timeout=600).returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        print(f"{command[0]}: {error}")
        return False


if __name__ == "__main__":
    main()
