"""Prints what a release needs to know, for the workflow that publishes it: `python tools/release.py [TAG]`.

`version=` is the project's version and `publisher=` the PublisherId for the Comfy registry, empty where there is none. Ends
with an error where TAG isn't `v` and the version, or the changelog has no section about the version.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def release(project: str, changelog: str, tag: str = "") -> dict[str, str]:
    """The version and the publisher in the text of a pyproject.toml. Raises SystemExit with what is wrong."""
    found = {
        name: match[1] if (match := re.search(rf'^{key} = "(.+)"', project, re.MULTILINE)) else ""
        for name, key in (("version", "version"), ("publisher", "PublisherId"))
    }
    if tag and tag != f"v{found['version']}":
        raise SystemExit(f"the tag is {tag}, the version in pyproject.toml {found['version']}: they must be the same")
    if f"\n## [{found['version']}]" not in changelog:
        raise SystemExit(f"CHANGELOG.md has no section [{found['version']}]")
    return found


if __name__ == "__main__":
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CHANGELOG.md")]
    print("\n".join(f"{name}={value}" for name, value in release(*texts, *sys.argv[1:2]).items()))
