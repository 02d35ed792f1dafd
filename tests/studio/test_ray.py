"""Many people on a Ray cluster: what is refused without one, and a real one whose workers and nodes are killed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from core.cli import main
from core.demo import BASE_FILE
from core.errors import BadConfig, BadFile
from core.lora.file import LoraFile
from core.models import load_base
from core.pictures import find_style_packs
from core.storage.safetensors_file import SafetensorsFile
from core.studio import Person, Result, Terms, make_people
from tests.tooling import random_lora, write_photos, write_quick_pack

pytestmark = pytest.mark.ci

ROOT = Path(__file__).parents[2]
WITHOUT_RAY = pytest.mark.skipif(find_spec("ray") is None, reason='needs Ray: pip install ".[ray]"')
STEPS, PEOPLE = 40, 12
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else nodes ask for the token of whoever runs the tests, where there is one
    "RAY_worker_niceness": "0",  # else the machine's other work comes first
    "RAY_memory_monitor_refresh_ms": "0",  # else workers die of what others take
}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def somebody(tmp_path: Path) -> list[Person]:
    return [Person("anna", write_photos(tmp_path / "anna", count=5), agreed=True)]


@pytest.mark.parametrize(
    ("address", "words"),
    [("10.0.0.5", "6379, or local"), ("ray://10.0.0.5:10001", "expected the head node's HOST:PORT"),
     ("127.0.0.1:{free}", "the address does not answer")],
)  # fmt: skip
def test_an_address_without_a_cluster_is_refused_in_seconds(tmp_path, monkeypatch, address, words):
    monkeypatch.setattr("core.studio.cluster.find_spec", lambda name: name)
    address = address.format(free=free_port())
    terms = Terms(find_style_packs().packs, "corporate")
    with pytest.raises(BadConfig, match=words):
        list(make_people(somebody(tmp_path), load_base(BASE_FILE), tmp_path / "out", terms, ray=address))


def test_a_base_that_is_not_from_files_cannot_be_opened_by_other_machines(tmp_path, monkeypatch):
    monkeypatch.setattr("core.studio.cluster.find_spec", lambda name: name)
    base = load_base(dict(SafetensorsFile.open(BASE_FILE)))
    with pytest.raises(BadConfig, match="was not loaded from files"):
        list(make_people(somebody(tmp_path), base, tmp_path / "out", Terms({}, "none"), ray="127.0.0.1:6379"))


def test_a_base_from_files_is_opened_anew_with_what_it_was_opened_with(tmp_path, monkeypatch):
    monkeypatch.chdir(BASE_FILE.parent)
    base = load_base(BASE_FILE.name, zero_terminal_snr=True)
    identity, opened_with = base.identity, base.opened_with
    monkeypatch.chdir(tmp_path)
    assert opened_with is not None and load_base(**opened_with).identity == identity


def test_without_ray_one_line_says_how_to_install_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("core.studio.cluster.find_spec", lambda name: None)
    (write_photos(tmp_path / "people" / "anna") / "person.toml").write_text("agreed = true")
    command = ["studio", str(tmp_path / "people"), "--base", "demo", "--output", str(tmp_path / "out")]
    assert main([*command, "--ray", "127.0.0.1:6379"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        'facelora: a cluster requires Ray, which is not installed: pip install ".[ray]" in a clone of this project'
    )
    assert main([*command, "--ray", "127.0.0.1:6379", "--device", "cpu"]) == 1
    assert "--device" in capsys.readouterr().err


def test_what_ray_prints_is_not_among_the_results(tmp_path, monkeypatch, capsys):
    def noisy(*_: object, **__: object) -> Iterator[Result]:
        print("(raylet) A worker died")
        yield Result("anna", "found")

    monkeypatch.setattr("core.studio.make_people", noisy)
    write_photos(tmp_path / "people" / "anna")
    assert (
        main(["studio", str(tmp_path / "people"), "--base", "demo", "--output", str(tmp_path / "out"), "--json"]) == 0
    )
    printed = capsys.readouterr()
    before, result = map(json.loads, printed.out.splitlines())
    assert before["to_make"]["people"] == 0 and before["refused"] == 1
    assert result["name"] == "anna" and "(raylet)" in printed.err


class Cluster:
    """A Ray cluster on this machine, each of whose nodes `ray start` begins, as on machines of their own."""

    def __init__(self, folder: Path):
        self.folder, self.address = folder, f"127.0.0.1:{free_port()}"
        self.nodes: list[subprocess.Popen[bytes]] = []

    def add(self, processors: int = 1) -> int:
        """The process of the raylet of a new node. The first node is the head."""
        port, before = self.address.rpartition(":")[2], set(self._raylets())
        head = ["--head", "--port", port, "--include-dashboard", "false", "--temp-dir", str(self.folder)]
        place = ["--address", self.address] if self.nodes else head
        size = ["--num-cpus", str(processors), "--num-gpus", "0", "--object-store-memory", "80000000"]
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *place, *size, "--block"]
        with (self.folder / f"node{len(self.nodes)}.txt").open("wb") as log:
            self.nodes.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log))
        for _ in range(1200):
            if new := set(self._raylets()) - before:
                return new.pop()
            time.sleep(0.1)
        raise AssertionError(f"no node after two minutes: {(self.folder / 'node0.txt').read_text()}")

    def _raylets(self) -> list[int]:
        return [pid for pid, command in processes() if f"--raylet_socket_name={self.folder}" in command]

    def end(self) -> None:
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            node.wait(60)
        for pid, command in processes():
            if str(self.folder) in command:
                kill(pid)


def processes() -> Iterator[tuple[int, str]]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            yield int(path.parent.name), path.read_bytes().replace(b"\0", b" ").decode(errors="replace")


def workers_of(raylet: int) -> list[int]:
    """The actors on a node."""

    def parent(pid: int) -> int:
        with suppress(OSError):
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return 0

    return [pid for pid, command in processes() if command.startswith("ray::Worker") and parent(pid) == raylet]


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # the paths of its sockets must be short
    cluster = Cluster(folder)
    try:
        yield cluster
    finally:
        cluster.end()
        shutil.rmtree(folder, ignore_errors=True)


class Watch:
    """A command, and the steps of the states that it is seen to leave on disk."""

    def __init__(self, command: Sequence[str], output: Path, environment: Mapping[str, str] = ENVIRONMENT):
        self.output = output
        self.steps: dict[str, list[int]] = {}
        """The steps of each person's states, one after the other."""
        self.now: dict[str, int] = {}
        """The step of each state that there is."""
        self.printed = output.with_suffix(".txt")
        with self.printed.open("wb") as file:
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=file)
        threading.Thread(target=self._look_on, daemon=True).start()

    def _look_on(self) -> None:
        while self.process.poll() is None:
            found = {}
            with suppress(BadFile, OSError):  # a person is done, and the folder goes while it is looked at
                for file in self.output.glob("*/.facelora-cache/runs/*/*.state.safetensors"):
                    name, step = file.parents[3].name, int(SafetensorsFile.open(file).metadata["step"])
                    found[name] = step
                    seen = self.steps.setdefault(name, [])
                    if seen[-1:] != [step]:
                        seen.append(step)
            self.now = found
            time.sleep(0.02)

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.process.poll() is None, "the command has ended before"
            time.sleep(0.01)

    def ended(self) -> list[dict[str, Any]]:
        """What it has printed, when it ended: results and warnings."""
        self.process.wait()
        return [json.loads(line) for line in self.printed.read_text().splitlines()]


def studio(tmp_path: Path, people: int) -> list[str]:
    """The command, but for its output, that makes so many people with few steps."""
    for person in range(1, people + 1):
        folder = write_photos(tmp_path / "people" / f"p{person:02}", count=5, person=person)
        (folder / "person.toml").write_text("agreed = true")
    lines = ["rank = 2", f"steps = {STEPS}", "batch_size = 1", "warmup_steps = 0", "prior_prediction = 0.0"]
    (tmp_path / "quick.toml").write_text("\n".join([*lines, "state_interval = 0.0", "check_photos = false"]))
    packs = write_quick_pack(tmp_path / "packs")
    order = ["--style-pack", "quick", "--style-folder", str(packs), "--count", "1", "--json"]
    command = [sys.executable, "-m", "core", "studio", str(tmp_path / "people"), "--base", "demo", *order]
    return [*command, "--config", str(tmp_path / "quick.toml"), "--output"]


@WITHOUT_RAY
@pytest.mark.slow
def test_a_ray_of_this_machines_own_ends_with_the_command_which_goes_on_where_it_was_stopped(tmp_path):
    def rays() -> set[int]:
        return {pid for pid, command in processes() if "raylet" in command or "gcs_server" in command}

    before, output, home = rays(), tmp_path / "out", tmp_path / "home"
    home.mkdir()
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "RAY_AUTH_MODE"} | {"HOME": str(home)}
    other = shutil.copy(BASE_FILE, tmp_path / "other.safetensors")  # The workers open it too.
    command = [*studio(tmp_path, people=2), str(output), "--ray", "local", "--draw-on", str(other)]
    random_lora(load_base(BASE_FILE), r".*attn1\.to_q").save(tmp_path / "speed_2step.safetensors")
    command += ["--speed-lora", str(tmp_path / "speed_2step.safetensors")]
    first = Watch(command, output, environment)
    first.until(lambda: 3 <= first.now.get("p01", 0) < STEPS // 2)
    own = rays() - before
    first.process.send_signal(signal.SIGINT)
    first.ended()
    for _ in range(100):
        if not own & rays():
            break
        time.sleep(0.1)
    assert own and not own & rays(), "Ray goes on"
    second = Watch(command, output, environment)
    assert [one["status"] for one in second.ended() if "status" in one] == ["made", "made"]
    assert first.process.returncode == 1 and second.process.returncode == 0
    steps = first.steps["p01"] + second.steps["p01"]
    assert steps == sorted(steps) and len(steps) > len(first.steps["p01"])
    pictures = [Image.open(path).info["parameters"] for path in output.glob("p*/0*.png")]
    assert ["Model: other," in text and "<lora:speed_2step:1>" in text for text in pictures] == [True, True]
    assert not (home / ".ray").exists(), "a token, with which other clusters would ask for it"


@WITHOUT_RAY
@pytest.mark.slow
def test_a_cluster_that_loses_a_worker_and_a_node_makes_everybody_once_and_as_one_machine_does(tmp_path, cluster):
    command = studio(tmp_path, PEOPLE)
    output, on_cluster = tmp_path / "out", ["--ray", cluster.address]

    def finished() -> int:
        return len(list(output.glob("*/studio.json")))

    def trained_now() -> dict[str, int]:
        """The step of those who are in the middle: the last one of those who are nearly done may never be seen."""
        return {name: step for name, step in watch.now.items() if 3 <= step < STEPS // 2}

    head, second = cluster.add(), cluster.add()
    watch = Watch([*command, str(output), *on_cluster], output)
    watch.until(lambda: len(trained_now()) == 2)
    kill(workers_of(head)[0])
    half = trained_now()
    watch.until(lambda: finished() >= 3 and bool(trained_now()))
    kill(second)
    half |= trained_now()
    third = cluster.add()
    watch.until(lambda: bool(workers_of(third)))
    said = watch.ended()
    assert watch.process.returncode == 0
    results = {one["name"]: one for one in said if "status" in one}
    assert len(results) == PEOPLE and {one["status"] for one in results.values()} == {"made"}
    assert sum("a worker ended" in one.get("warning", "") for one in said) >= 2
    for name, steps in watch.steps.items():
        assert steps == sorted(steps), f"{name} was trained from the start again: {steps}"
    assert len(half) >= 2 and all(watch.steps[name][-1] > step for name, step in half.items())

    alone_too = [*command, str(tmp_path / "alone")]
    subprocess.run(alone_too, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    for name, result in results.items():
        made, alone = (LoraFile.read(folder / result["lora"]).tensors for folder in (output, tmp_path / "alone"))
        assert made.keys() == alone.keys() and all(torch.equal(made[key], alone[key]) for key in alone), name

    def again() -> list[str]:
        ended = subprocess.run([*command, str(output), *on_cluster], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE)
        values = [json.loads(line) for line in ended.stdout.splitlines()]
        return sorted(one["name"] for one in values if one.get("status") == "made")

    assert again() == []
    write_photos(tmp_path / "people" / "p05", count=1, person=40)
    assert again() == ["p05"]


@WITHOUT_RAY
def test_a_person_whose_worker_dies_three_times_fails_and_the_others_go_on(tmp_path, cluster):
    command, output = studio(tmp_path, people=3), tmp_path / "out"
    (tmp_path / "people" / "p01" / "person.toml").write_text('agreed = true\nstyle_pack = "none"')
    cluster.add(processors=0)
    watch = Watch([*command, str(output), "--ray", cluster.address], output)
    watch.until(lambda: "the cluster has no room for a worker; waiting" in watch.printed.read_text())
    node = cluster.add()
    for _ in range(3):
        seen = len(watch.steps.get("p02", []))
        watch.until(lambda seen=seen: len(watch.steps.get("p02", [])) > seen)
        kill(workers_of(node)[0])
    said = watch.ended()
    results = {one["name"]: (one["status"], one["reason"]) for one in said if "status" in one}
    assert watch.process.returncode == 1 and results["p03"][0] == "made"
    for name, reason in (("p01", "choose one of"), ("p02", "3 workers ended while making this person; the last one: ")):
        assert results[name][0] == "failed" and reason in results[name][1]
    assert sum("no room" in one.get("warning", "") for one in said) == 1


@WITHOUT_RAY
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (False, "base.safetensors: cannot be read: No such file"),
        pytest.param(True, "its base model is a different one", marks=pytest.mark.slow),
    ],
)
def test_workers_that_cannot_open_the_base_model_end_the_command(tmp_path, other, words):
    """As on machines where nothing, or another base model, has this path."""
    path = Path(shutil.copy(BASE_FILE, tmp_path / "base.safetensors"))
    program = """
import sys
from pathlib import Path
from core.models import load_base
from core.pictures import find_style_packs
from core.studio import Person, Terms, make_people
from core.training import Callbacks
folder, other = Path(sys.argv[1]), Path(sys.argv[1]) / "other.safetensors"
base, terms = load_base(folder / "base.safetensors"), Terms(find_style_packs().packs, "corporate")
terms.compute_hashes(base, lambda *_: None)
(folder / "base.safetensors").unlink()
if other.exists():
    other.rename(folder / "base.safetensors")
people, callbacks = [Person("anna", folder / "anna", agreed=True)], Callbacks(on_warning=print)
list(make_people(people, base, folder / "out", terms, ray="local", callbacks=callbacks))
"""
    somebody(tmp_path)
    if other:
        tensors = load_file(path)
        save_file(
            tensors | {name: tensor + 1 for name, tensor in [next(iter(tensors.items()))]},
            tmp_path / "other.safetensors",
        )
    command = [sys.executable, "-c", program, str(tmp_path)]
    ended = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout.count("a worker could not start: ") == 3
    last = ended.stderr.splitlines()[-1]
    assert "FaceLoraError: no worker could be started; the last one ended with: " in last and words in last
