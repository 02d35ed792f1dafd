"""Measure a GPU in four commands: `python3 -m lab.gpu COMMAND --output FOLDER`, with one of COMMANDS.

It requires a torch that is built for the GPU, and WHEELS. `make gpu-wheels` downloads these for a machine without a network.
Here only the standard library is imported, to report first what is missing.
"""

import argparse
import platform
import sys
import time
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

COMMANDS = ("correctness", "memory", "speed", "compiled")
MINUTES = 9
"""The time that a command takes at most, unless the user gives another."""
WHEELS = "diffusers psutil"
"""What to install beside torch. The other packages come with these."""
MODULES = ("torch", "diffusers", "psutil", "filelock", "huggingface_hub", "numpy", "PIL", "safetensors", "tqdm")
"""The modules that the measurements import."""
SHOWN = ("torch", "triton", "diffusers", "huggingface_hub", "safetensors", "numpy", "pillow", "psutil")
"""The packages whose versions are printed."""


def why_not_ready() -> str:
    """Return what is missing and how to install it, in one line; "" if nothing is."""
    missing = [name for name in MODULES if find_spec(name) is None]
    if "torch" in missing:
        return "torch is missing. Install the build for this GPU that pytorch.org lists"
    if not missing:
        if find_spec("tests.random_models") is None:
            return "an installed package named `tests` hides that of this clone: uninstall it"
        try:  # It may lack a package that it needs itself.
            _ = import_module("diffusers").UNet2DConditionModel
            return ""
        except (ImportError, RuntimeError) as error:
            missing = [str(error).strip().splitlines()[-1]]
    return (
        f"missing: {', '.join(missing)}. Run `make gpu-wheels` in a clone with a network, copy its folder gpu-wheels here, "
        f"and run: python3 -m pip install --no-index --find-links gpu-wheels {WHEELS}"
    )


def installed_versions() -> str:
    """Return the versions of Python and of the installed packages of SHOWN, in one line."""
    found = [f"Python {platform.python_version()}"]
    for name in SHOWN:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)


def main() -> int:
    begun = time.monotonic()
    parser = argparse.ArgumentParser(prog="python3 -m lab.gpu", description="Measure a GPU.")
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="Folder for the results")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="Minutes after which to stop (default: %(default)s)"
    )
    # For tests: small models on the CPU.
    parser.add_argument("--rehearse", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    print(f"gpu: {installed_versions()}", flush=True)
    if reason := why_not_ready():
        print(f"gpu: {reason}", file=sys.stderr)
        return 1
    running = import_module("lab.gpu.running")
    return running.run(options.command, options.output, begun + 60 * options.minutes, options.rehearse)


if __name__ == "__main__":
    sys.exit(main())
