"""core/threads.py: how many processor threads are chosen, and for whom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.threads import FEW, SPINS, usable_threads

ROOT = Path(__file__).parents[1]


def machine(root: Path, group: str, files: dict[str, str]) -> Path:
    """A folder that looks like / on a machine of many cores, to a process in a control group."""
    for number in range(64):
        files[f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"] = f"{number}\n"
    for name, text in {"proc/self/cgroup": group, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("group", "files"),
    [
        ("0::/", {"sys/fs/cgroup/cpu.max": "200000 100000"}),
        ("0::/a/b", {"sys/fs/cgroup/a/cpu.max": "200000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}),
        (
            "3:cpu,cpuacct:/docker/1",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "250000", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"},
        ),
        (
            "4:cpu,cpuacct:/a\n0::/",
            {
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000",
            },
        ),
    ],
    ids=["v2", "v2 of a parent", "v1 in a container", "v1 and v2"],
)
def test_a_quota_of_two_cores_on_a_large_machine_gives_two_threads(group, files, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    found = usable_threads(machine(tmp_path, group, files))
    assert found.count == 2 and "control group" in found.why


@pytest.mark.parametrize("text", ["max 100000", "-1 100000", "", "nonsense"])
def test_without_a_quota_the_processors_that_may_be_used_are_counted(text, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    found = usable_threads(machine(tmp_path, "0::/", {"sys/fs/cgroup/cpu.max": text}))
    assert found.count <= 3 and "that the process may run on" in found.why


def test_two_threads_of_a_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    for number in range(4):
        place = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        place.parent.mkdir(parents=True)
        place.write_text(f"{number % 2},{number % 2 + 2}\n")
    found = usable_threads(tmp_path)
    assert found.count == 2 and found.why.startswith("physical cores")


def test_a_real_control_group_is_read():
    """One with half a core, which takes the rights to make it."""
    v1 = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").exists()
    group = Path("/sys/fs/cgroup/cpu" if v1 else "/sys/fs/cgroup") / f"facelora-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error.strerror}")
    try:
        try:
            (group / ("cpu.cfs_quota_us" if v1 else "cpu.max")).write_text("50000" if v1 else "50000 100000")
        except OSError as error:
            pytest.skip(f"no quota can be set here: {error.strerror}")
        ask = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid())); "
        assert "0.5 cores" in printed(ask + "from core.threads import *; print(usable_threads().why)", {})
    finally:
        group.rmdir()


def printed(code: str, environment: dict[str, str]) -> str:
    """What Python prints of that code, where the environment has nothing else about threads."""
    about = ("OMP_", "GOMP_", "KMP_", "RAYON_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(about)}
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**clean, **environment}, cwd=ROOT, text=True, capture_output=True, check=True
    ).stdout


SEEN = """
import json, os, core.cli, core.cli.doctor as doctor
def run(options: doctor.DoctorOptions):
    import torch
    print(json.dumps([os.environ.get("GOMP_SPINCOUNT"), torch.get_num_threads()]))
doctor.run = run
core.cli.main(["doctor"])
"""


def test_a_command_chooses_its_threads_and_has_waiting_ones_sleep():
    assert json.loads(printed(SEEN, {})) == [SPINS, usable_threads().count]


def test_what_the_user_has_set_stays():
    given = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "active"}
    assert json.loads(printed(SEEN, given)) == [None, 1]


def test_the_demo_has_few_threads():
    code = "import os; os.sched_getaffinity = lambda _: set(range(64)); from core.threads import *; "
    code += "print(thread_settings(few=True)['OMP_NUM_THREADS'])"
    assert int(printed(code, {})) <= FEW


IN_ANOTHER_PROGRAM = """
import os, torch
before = torch.get_num_threads(), dict(os.environ)
import core, core.threads as threads
threads.set_threads()
core.train
assert before == (torch.get_num_threads(), dict(os.environ))

threads._quotas = lambda root: [1.0]
with threads.within_quota():
    print(torch.get_num_threads())
assert torch.get_num_threads() == before[0]
torch.set_num_threads(7)
with threads.within_quota():
    print(torch.get_num_threads())
"""


def test_another_programs_threads_stay_and_a_quota_lowers_only_torchs_own_number():
    """ComfyUI's, say, which has loaded torch before."""
    assert printed(IN_ANOTHER_PROGRAM, {}) == "1\n7\n"


def test_a_script_keeps_its_environment():
    code = "import os; before = dict(os.environ); import core; core.train, core.generate; print(before == dict(os.environ))"
    assert printed(code, {}) == "True\n"
