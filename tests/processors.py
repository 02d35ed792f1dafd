"""Run the tests that compare tensors or measured figures with each instruction set of this processor, and print a table.

`make test-processors`, or `python -m tests.processors [PYTEST OPTIONS]`. The libraries that torch computes with choose their
instructions when they are loaded. Environment variables limit the choice, so one machine stands for older ones.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from core.device import processor

COMPARES = ("torch.equal(", "assert_close(", "assert_trained_alike(", "assert_goes_on_exactly(", "error_of(", "approx(")
"""What a file of tests contains that compares numbers."""
QUICK = "not slow and not clock"


def settings() -> Iterator[Mapping[str, str]]:
    """Yield the environments to test in: the default with one and two threads, then the limits of each library."""
    yield {"OMP_NUM_THREADS": "1"}
    yield {"OMP_NUM_THREADS": "2"}
    yield {"MKL_CBWR": "AUTO"}
    yield {"MKL_CBWR": "COMPATIBLE", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
    yield {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    if has_avx512:
        yield {"MKL_CBWR": "AVX512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    if "Intel" in processor(torch.device("cpu")):  # The others ignore it.
        for name in ("SSE4_2", "AVX2", *(("AVX512",) if has_avx512 else ())):
            yield {"MKL_ENABLE_INSTRUCTIONS": name}


def files() -> list[str]:
    """Return the files of tests that compare numbers."""
    folder = Path(__file__).parent
    rooms = [folder, *(room for room in folder.iterdir() if room.name not in ("browser", "comfyui", "invokeai"))]
    found = (path for room in rooms for path in room.glob("test_*.py"))
    return sorted(str(path) for path in found if any(word in path.read_text(encoding="utf-8") for word in COMPARES))


def main(options: list[str]) -> int:
    """Run the tests in each environment, and return how many had failures."""
    print(f"{processor(torch.device('cpu'))}, torch {torch.__version__}", flush=True)
    failed = 0
    for limits in settings():
        threads = limits.get("OMP_NUM_THREADS", "1")
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2" if threads == "1" else "1", "-m", QUICK, *options]
        environment = {**os.environ, "OMP_NUM_THREADS": threads, **limits}
        began = time.monotonic()
        result = subprocess.run([*command, *files()], env=environment, capture_output=True, text=True, check=False)
        lines = result.stdout.splitlines()
        name = " ".join(f"{variable}={value}" for variable, value in limits.items())
        print(f"{name}: {lines[-1] if lines else result.stderr} ({time.monotonic() - began:.0f} s)", flush=True)
        for line in lines:
            if line.startswith(("FAILED", "ERROR")):
                print(f"    {line}", flush=True)
        failed += result.returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
