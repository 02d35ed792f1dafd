"""Graphs in ComfyUI's API format, as small as the random models allow."""

from typing import Any

Node = dict[str, Any]


def node(class_type: str, **inputs: Any) -> Node:
    return {"class_type": class_type, "inputs": inputs}


BASE = {"base": node("CheckpointLoaderSimple", ckpt_name="sd15.safetensors")}


def load_photos(folder: str = "(no folder)", pictures: Any = "", **changes: Any) -> Node:
    return node("FaceLoRALoadPhotos", folder=folder, pictures=pictures, **({"check": False, "strict": False} | changes))


def training(checkpoint: str = "sd15.safetensors", folder: str = "anna", **changes: Any) -> dict[str, Node]:
    """Photos -> Train Face LoRA: node "train", on the checkpoint in node "base"."""
    links = {"model": ["base", 0], "clip": ["base", 1], "vae": ["base", 2], "photos": ["photos", 0]}
    settings = {
        "name": "anna", "trigger_word": "sks", "class_word": "person", "recipe": "fast", "samples": 0, "steps": 2, "rank": 4,
        "learning_rate": 0.01, "resolution": 64, "training_seed": 1, "sample_prompts": "", "settings": "",
    }  # fmt: skip
    chosen = links | settings | changes
    chosen["settings"] = f"batch_size = 1\ncheck_photos = false\n{chosen['settings']}"
    return {
        "base": node("CheckpointLoaderSimple", ckpt_name=checkpoint),
        "photos": load_photos(folder),
        "train": node("FaceLoRATrain", **chosen),
    }  # fmt: skip


def drawing(
    model: list, clip: list, vae: list, prompt: Any = "a photo of sks person", seed: Any = 1
) -> dict[str, Node]:
    """A picture of 64 x 64 pixels in two steps, from a VAE with 4 pixels a latent: node "picture"."""
    return {
        "positive": node("CLIPTextEncode", clip=clip, text=prompt),
        "negative": node("CLIPTextEncode", clip=clip, text=""),
        "empty": node("EmptyLatentImage", width=128, height=128, batch_size=1),
        "sampler": node(
            "KSampler",
            model=model, positive=["positive", 0], negative=["negative", 0], latent_image=["empty", 0], seed=seed,
            steps=2, cfg=1.0, sampler_name="euler", scheduler="simple", denoise=1.0,
        ),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=vae),
        "picture": node("PreviewImage", images=["decoded", 0]),
    }  # fmt: skip
