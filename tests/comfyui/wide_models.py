"""How far predictions at the published models' widths are from ComfyUI's own: the table of docs/families.md.

`python -m tests.comfyui.wide_models [FAMILY ...]` takes up to 6 GB of memory and 4 GB of disk, a family at a time.
"""

import sys
import tempfile
from pathlib import Path

import torch

from core.storage.safetensors_file import SafetensorsFile

from ..small_models import IN_COMFYUI
from .flow_files import run_model_writer
from .test_flow_models import CPU, cases_of, conditioning_of, denoiser_base


@torch.no_grad()
def row(family: str) -> str:
    """What the denoiser is made of, and the largest relative error of its four predictions, in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wide.safetensors"
        run_model_writer({f"{family}.wide": path})
        file = SafetensorsFile.open(path)
        base = denoiser_base(file)
        assert base.family.name == family
        denoiser = base.load("denoiser", CPU, torch.float32)
        errors = []
        for case in cases_of(file):
            conditioning = conditioning_of(base, case)
            if family == "flux2":  # whose texts are filled up to 512 tokens by their mask; the tests compare that
                del conditioning["context_mask"]
            ours = base.family.predict(denoiser, case["latents"], 1000 * case["time"], conditioning)
            errors.append(((ours - case["prediction"]).norm() / case["prediction"].norm()).item())
        millions = sum(parameter.numel() for parameter in denoiser.parameters()) / 1e6
    return f"| {base.family.title} | {millions:.0f} million | {max(errors):.1e} |"


# Chroma's modulations depend on how many blocks there are, so that it is compared at its real depth, but narrow.
for family in sys.argv[1:] or [family for family, small in IN_COMFYUI.items() if small.wide]:
    print(row(family), flush=True)
