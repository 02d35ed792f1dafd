"""The table of threads in docs/benchmarks.md: `python -m tools.thread_tables` measures it and writes it there (13 minutes).

Each way of using threads has a process of its own, since OpenMP reads its settings once. The processes work in turns, first
on a quiet machine and then beside three busy processes.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import torch

from core import GenerateConfig, Job, TrainConfig, generate, load_base
from core.demo import CONFIG, PICTURE_SIZE
from core.demo.people import person_photos
from core.faces import embed_images, load_faces
from core.threads import thread_settings
from core.training.inputs import TrainingInputs
from core.training.step import Run
from tests.tooling import encoded_cache, encoded_image
from tools.photo_tables import replace_table, table
from tools.random_models import REAL_CHANNELS, random_base, random_cache

CPU = torch.device("cpu")
DOCUMENT = Path(__file__).parent.parent / "docs" / "benchmarks.md"
WAYS = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2, spinning": {"OMP_NUM_THREADS": "2"},
    "2, sleeping": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0"},
    "as chosen": None,
}
"""The environment of each way; "as chosen" is that of core/threads.py."""
BUSY = 3
"""Busy processes beside."""


def demo_step() -> Callable[[], object]:
    base = load_base("demo")
    side = 64 // base.latent_shape.pixels
    shape = (base.latent_shape.channels, side, side)
    images = [encoded_image(base, f"{n}.png", "a photo of sks person", n, False, shape) for n in range(8)]
    return Run(TrainingInputs.on(CPU, encoded_cache(base, images), base, CONFIG)).train_step


def sd15_step() -> Callable[[], object]:
    base, config = random_base("sd15", REAL_CHANNELS, CPU, torch.float32), TrainConfig(resolution=256)
    return Run(TrainingInputs.on(CPU, random_cache(base, config), base, config)).train_step


def drawing() -> Callable[[], object]:
    base = load_base("demo")
    jobs = [Job("a photo of a person", seed, size=PICTURE_SIZE, steps=10) for seed in range(4)]
    return lambda: list(generate(base, [], jobs, GenerateConfig(batch_size=4), device=CPU))


def faces() -> Callable[[], object]:
    network, photos = load_faces(), person_photos(35)
    return lambda: embed_images(network, photos)


WORKS = {
    "a step of the demo": (demo_step, 9),
    "a step of SD1.5, 256 px": (sd15_step, 5),
    "four pictures of the demo's model, 10 steps": (drawing, 9),
    "ten photos through the face networks": (faces, 9),
}
"""What is measured: what makes the work, and in how many rounds."""


def work_on_request(name: str) -> None:
    """Does the work once for each line on standard input, and prints its seconds."""
    work = WORKS[name][0]()
    work()
    print("ready", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        work()
        print(time.perf_counter() - began, flush=True)


def _answer(process: subprocess.Popen[str], request: str = "") -> str:
    assert process.stdin and process.stdout
    process.stdin.write(request)
    process.stdin.flush()
    return process.stdout.readline()


def measured(name: str, busy: int) -> dict[str, float]:
    """The median seconds of the work by way, beside that many busy processes."""
    processes: dict[str, subprocess.Popen[str]] = {}
    with ExitStack() as stack:
        for way, environment in WAYS.items():
            command = [sys.executable, "-m", "tools.thread_tables", "--work", name]
            environment = environment or thread_settings(few=name != "a step of SD1.5, 256 px")
            processes[way] = stack.enter_context(
                subprocess.Popen(
                    command, env={**os.environ, **environment}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            assert _answer(processes[way]) == "ready\n"
        for _ in range(busy):
            stack.callback(subprocess.Popen([sys.executable, "-c", "while True: pass"]).kill)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(WORKS[name][1]):
            for way, process in processes.items():
                seconds[way].append(float(_answer(process, "\n")))
        for process in processes.values():
            process.communicate()
    return {way: median(found) for way, found in seconds.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work_on_request(options.work)
        sys.exit()
    rows = []
    for name in WORKS:
        for busy in (0, BUSY):
            found = measured(name, busy)
            rows.append((name, f"{busy} busy processes" if busy else "quiet", *(f"{found[way]:.2f}" for way in WAYS)))
            print(*rows[-1], sep="  ", flush=True)
    content = table(("seconds", "beside", *WAYS), rows)
    DOCUMENT.write_text(replace_table(DOCUMENT.read_text(), "threads", content))
