"""How the pack starts and comes back: quickly, from any folder, beside other packs, after the power was cut."""

import re
import subprocess
from pathlib import Path

import pytest

from core.lora.file import LoraFile

from .graphs import node, training
from .server import PACK, TEST_PACK, running_server
from .setup_comfyui import COMFYUI, PYTHON
from .test_train_node import ENDLESS, stop, training_state, wait_for

NEIGHBOUR = """
import os, sys
sys.path.insert(0, os.path.dirname(__file__))
import core  # its own
from . import nodes, utils
assert core.OWNER == nodes.OWNER == utils.OWNER == "neighbour"
NODE_CLASS_MAPPINGS = {"Neighbour": nodes.Neighbour}
"""
NODES = """
OWNER = "neighbour"
class Neighbour:
    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "owner", "tests"
    def owner(self):
        import core
        return (core.OWNER,)
"""
PACK_NAME = "Gesichter für ComfyUI (v1.0)"


@pytest.fixture(scope="module")
def folder(comfy_folder, tmp_path_factory) -> Path:
    """ComfyUI's base directory in a path with spaces and letters beyond ASCII, with another pack in it."""
    base = tmp_path_factory.mktemp("Köpfe") / "ComfyUI – Bilder"
    neighbour = base / "custom_nodes" / "a-pack-with-core"
    neighbour.mkdir(parents=True)
    (neighbour / "__init__.py").write_text(NEIGHBOUR)
    (neighbour / "nodes.py").write_text(NODES)
    (base / "custom_nodes" / TEST_PACK.name).symlink_to(TEST_PACK)
    for name in ("core", "utils"):
        (neighbour / f"{name}.py").write_text("OWNER = 'neighbour'\n")
    (base / "models" / "loras").mkdir(parents=True)
    (base / "user").mkdir()
    (base / "models" / "checkpoints").symlink_to(comfy_folder / "models" / "checkpoints", target_is_directory=True)
    (base / "input").symlink_to(comfy_folder / "input", target_is_directory=True)
    return base


MEASURE = """
import asyncio, sys, time
comfyui, pack, *sys.argv = sys.argv[1:]
sys.path.insert(0, comfyui)
import comfy.options
comfy.options.enable_args_parsing()
import nodes, server

async def measure():
    server.PromptServer(asyncio.get_running_loop())
    await nodes.init_builtin_extra_nodes()
    started = time.process_time()
    assert await nodes.load_custom_node(pack)
    print("SECONDS", time.process_time() - started)

asyncio.run(measure())
"""


@pytest.mark.clock
def test_it_adds_less_than_a_third_of_a_second_to_the_start(tmp_path):
    """Seconds of a processor, since the test machine may be busy with something else."""
    pack = tmp_path / "ComfyUI-FaceLoRA"
    pack.symlink_to(PACK, target_is_directory=True)
    command = [PYTHON, "-c", MEASURE, COMFYUI, pack, "main.py", "--cpu", "--base-directory", tmp_path]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=COMFYUI, timeout=300)
    seconds = re.search(r"SECONDS ([\d.]+)", done.stdout)
    assert seconds, done.stdout + done.stderr
    assert float(seconds[1]) < 0.3


def test_it_starts_in_any_folder_beside_any_pack_and_goes_on_after_the_server_was_killed(folder):
    old_states = folder / "user" / "facelora-training.json"
    old_states.write_text("{}")
    long = training(name="long", steps=ENDLESS, settings="state_interval = 0")
    with running_server(folder, "--multi-user", pack_name=PACK_NAME) as first:
        nodes = first.get("/object_info")
        assert {name for name in nodes if name.startswith("FaceLoRA")} >= {"FaceLoRATrain", "FaceLoRAApply"}
        assert "IMPORT FAILED" not in first.log()
        neighbour = {"neighbour": node("Neighbour"), "shown": node("PreviewAny", source=["neighbour", 0])}
        assert first.run(neighbour).outputs["shown"]["text"] == ["neighbour"]

        berta = first.post("/users", {"username": "berta"})
        first = first.as_user(berta)
        first.result(training())
        file = folder / "models" / "loras" / "anna.safetensors"
        written = file.stat().st_mtime_ns

        first.queue(long)
        wait_for(lambda: training_state(first).get("step", 0) >= 3, "the training to begin")
        step = training_state(first)["step"]
        first.kill()

    with running_server(folder, "--multi-user", pack_name=PACK_NAME) as second:
        assert not old_states.exists(), "small pictures of everybody's photos, from an earlier version"
        second = second.as_user(berta)
        state = training_state(second)
        assert state["phase"] == "stopped" and state["photos"], "what a page shows is still known"

        found = second.result(training())
        assert "train" not in found.cached and training_state(second)["phase"] == "done"
        assert file.stat().st_mtime_ns == written, "it was not trained again"

        prompt, steps = second.queue(long), [0]

        def goes_on() -> bool:
            state = training_state(second)
            steps.append(state["step"] if state["phase"] == "training" else 0)
            return steps[-1] > step

        wait_for(goes_on, "the training to go on")
        assert min(filter(None, steps)) >= step, "it went on where it was"
        state = training_state(second)
        assert all(state[curve][0][0] < step for curve in ("history", "learning_rates")), "curves of the whole run"
        stop(second)
        kept = second.wait(prompt)
        assert kept.status == "success", kept.error
        lora = LoraFile.read(folder / "models" / "loras" / "long.safetensors")
        assert step < int(lora.metadata["ss_steps"]) < ENDLESS
