"""The workflows of .github/: they call the Makefile and nothing else, so that what they do is tried by hand too."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools.release import release

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parent.parent
WORKFLOWS = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)) | {
    "test-with-highest",
    "test-with-lowest-direct",
}


def steps(workflow: str) -> list[dict[str, Any]]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job.get("steps", ())]


def test_workflows_run_targets_of_the_makefile_alone():
    commands = [step["run"] for workflow in WORKFLOWS for step in steps(workflow) if "run" in step]
    called = {command.split()[1] for command in commands if command.startswith("make ") and "${{" not in command}
    assert called and called <= TARGETS
    others = {command for command in commands if not command.startswith("make ")}
    assert others <= {'python tools/release.py >> "$GITHUB_OUTPUT"'}


def test_a_release_needs_a_fitting_tag_and_a_section_of_the_changelog():
    project, changelog = 'version = "1.2"\n[tool.comfy]\nPublisherId = "somebody"\n', "# Changelog\n\n## [1.2]\n"
    assert release(project, changelog, "v1.2") == {"version": "1.2", "publisher": "somebody"}
    with pytest.raises(SystemExit, match=r"the tag is v1.3, the version in pyproject.toml 1.2"):
        release(project, changelog, "v1.3")
    with pytest.raises(SystemExit, match=r"no section \[1.2\]"):
        release(project, "# Changelog\n\n## [1.1]\n")
