"""Run by test_method_readers.py in a process of its own, with ComfyUI on its path: embeddings and checkpoints that we write.

Arguments: a JSON list of [kind, file, output, options]. Writes what ComfyUI makes of each file into a safetensors file.
"""

# pyright: reportMissingImports=false
import json
import logging
import sys
from pathlib import Path

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402


def embedding(path: Path, width: int, key: str) -> dict[str, torch.Tensor]:
    """As `embedding:NAME` in a prompt looks it up."""
    return {"vectors": comfy.sd1_clip.load_embed(path.stem, str(path.parent), width, key)}


def checkpoint(path: Path, seed: int) -> dict[str, torch.Tensor]:
    """The noise that the loaded model predicts, from its own text encoder's states."""
    model, clip, _, _ = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=True, output_clip=True)
    context = clip.encode_from_tokens(clip.tokenize("a photo of sks person"))
    network = model.model.to(torch.float32)
    network.diffusion_model.dtype = torch.float32
    network.manual_cast_dtype = None
    sigma = torch.tensor([2.0])
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * (sigma**2 + 1).sqrt()
    with torch.no_grad():
        denoised = network.apply_model(latents, sigma, c_crossattn=context.float())
    timestep = network.model_sampling.timestep(sigma)
    return {"prediction": (latents - denoised) / sigma, "context": context.float(), "timestep": timestep.float()}


for kind, path, output, options in json.loads(sys.argv[1]):
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record, messages=messages: messages.append(record.getMessage())
    logging.getLogger().addHandler(handler)
    found = {"embedding": embedding, "checkpoint": checkpoint}[kind](Path(path), **options)
    logging.getLogger().removeHandler(handler)
    log = [message for message in messages if "missing" in message or "unet unexpected" in message]
    safetensors.torch.save_file({k: v.contiguous() for k, v in found.items()}, output, {"log": json.dumps(log)})
