"""The workflows of .github/: they call the Makefile and nothing else, so that what they do is tried by hand too."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from core import __version__
from tools.release import release

ROOT = Path(__file__).parent.parent
WORKFLOWS = {path.name: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)) | {
    "test-with-highest",
    "test-with-lowest-direct",
}


def steps(workflow: str) -> list[dict[str, Any]]:
    return [step for job in WORKFLOWS[workflow]["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", sorted(WORKFLOWS))
def test_a_workflow_runs_targets_of_the_makefile_alone(workflow):
    commands = [step["run"] for step in steps(workflow) if "run" in step]
    called = [command.split()[1] for command in commands if command.startswith("make ") and "${{" not in command]
    assert set(called) <= TARGETS
    others = [command for command in commands if not command.startswith("make ")]
    assert others in ([], ['python tools/release.py >> "$GITHUB_OUTPUT"'])


def test_each_test_machine_runs_an_existing_target():
    machines = WORKFLOWS["test.yml"]["jobs"]["test"]["strategy"]["matrix"]["include"]
    assert {machine["make"] for machine in machines} <= TARGETS
    assert {machine["os"].partition("-")[0] for machine in machines} == {"ubuntu", "windows", "macos"}
    assert [machine["make"] for machine in machines].count("lint") == 1


def test_a_release_is_of_the_version_in_the_project_file():
    done = subprocess.run(
        [sys.executable, ROOT / "tools/release.py", f"v{__version__}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[0] == f"version={__version__}"


def test_a_release_without_a_fitting_tag_or_a_section_of_the_changelog_is_refused():
    project, changelog = 'version = "1.2"\n[tool.comfy]\nPublisherId = "somebody"\n', "# Changelog\n\n## [1.2]\n"
    assert release(project, changelog, "v1.2") == {"version": "1.2", "publisher": "somebody"}
    with pytest.raises(SystemExit, match=r"the tag is v1.3, the version in pyproject.toml 1.2"):
        release(project, changelog, "v1.3")
    with pytest.raises(SystemExit, match=r"no section \[1.2\]"):
        release(project, "# Changelog\n\n## [1.1]\n")
