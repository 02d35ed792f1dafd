"""ComfyUI's own LoRA trainer as a peer of lab/bench.py, in a process of its own.

`python lab/comfyui_trainer.py COMFYUI FOLDER` trains, with the code of the `Train LoRA` node, on what is in the folder:
`weights.safetensors` (a denoiser), `inputs.safetensors` (latents and conditioning), `task.json`. For each empty line on its
standard input it makes one step and answers with a line `STEP {...}`; another line is the path of a file to save the LoRA in.
It stops at the end of its input.
"""

# pyright: reportMissingImports=false

import json
import re
import sys
import time
from collections.abc import Mapping, ValuesView
from pathlib import Path
from typing import Any


class Turns:
    """In the place of the node's progress bar: says after each step how long it took, and waits for the next turn."""

    tensors: Mapping[str, Any]
    """Of the LoRA that is trained, by name."""

    def __init__(self, *_: object):
        self._wait()

    def update(self, _: int) -> None:
        import torch

        on_gpu = torch.cuda.is_available() and "--cpu" not in sys.argv
        if on_gpu:
            torch.cuda.synchronize()
        seconds, processor = time.perf_counter() - self._start, time.process_time() - self._used
        peak = torch.cuda.max_memory_allocated() if on_gpu else _peak_of_the_process()
        print("STEP", json.dumps({"seconds": seconds, "processor": processor, "peak": peak}), flush=True)
        self._wait()

    def _wait(self) -> None:
        while (line := sys.stdin.readline()) != "\n":
            if not line:
                sys.exit()
            from safetensors.torch import save_file

            save_file({name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}, line.rstrip("\n"))
            print("STEP {}", flush=True)
        self._start, self._used = time.perf_counter(), time.process_time()


def _peak_of_the_process() -> int | None:
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def main(comfyui: str, folder: Path) -> None:
    task: dict[str, Any] = json.loads((folder / "task.json").read_text())
    # The folder of this file comes first there, and has modules with names that ComfyUI has too.
    sys.path[0] = comfyui
    sys.argv = sys.argv[:1] + (["--cpu"] if task["device"] == "cpu" else [])
    import comfy.options

    comfy.options.enable_args_parsing()  # before anything else of ComfyUI's is imported
    import comfy_extras.nodes_train as trainer
    import torch
    from comfy.sd import load_diffusion_model
    from comfy.supported_models import SD15, models
    from safetensors.torch import load_file

    # ComfyUI recognises SD1.5 by its published widths alone.
    models.append(type("Narrow", (SD15,), {"unet_config": SD15.unet_config | task["widths"]}))
    trainer.ProgressBar = Turns
    create = trainer._create_optimizer

    def create_watched(name: str, parameters: ValuesView[Any], rate: float) -> Any:
        Turns.tensors = parameters.mapping  # pyright: ignore[reportAttributeAccessIssue]
        return create(name, parameters, rate)

    trainer._create_optimizer = create_watched
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    with torch.inference_mode():
        model = load_diffusion_model(
            str(folder / "weights.safetensors"), model_options={"dtype": dtypes[task["precision"]]}
        )
        inputs = load_file(folder / "inputs.safetensors")
        extra = {"pooled_output": inputs["pooled"]} if "pooled" in inputs else {}
        # All inputs of this node are lists.
        trainer.TrainLoraNode.execute(
            model=[model], latents=[{"samples": inputs["latents"]}], positive=[[[inputs["context"], extra]]],
            batch_size=[task["batch_size"]], steps=[10**9], grad_accumulation_steps=[1],
            learning_rate=[task["learning_rate"]], rank=[task["rank"]], optimizer=["AdamW"], loss_function=["MSE"],
            seed=[task["seed"]],
            training_dtype=["none" if task["precision"] == "fp16" else task["precision"]], lora_dtype=["fp32"],
            quantized_backward=[False], algorithm=["LoRA"], gradient_checkpointing=[False], checkpoint_depth=[1],
            offloading=[False], existing_lora=["[None]"], bucket_mode=[False], bypass_mode=[False],
        )  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
