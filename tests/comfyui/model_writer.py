"""Run by test_flow_models.py in a process of its own, with ComfyUI on its path: small models of ComfyUI's own classes.

Arguments: pairs of family and file. Writes into each file the weights of a model of the real architecture but few and narrow
layers, random, under ComfyUI's names (`weights.…`), and for some noisy latents, times and texts what it predicts (`case0.…`).
"""

# pyright: reportMissingImports=false
import sys

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.supported_models as supported  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

FLUX = {"axes_dim": [16, 56, 56], "num_heads": 2, "mlp_ratio": 4.0, "theta": 10000, "out_channels": 16, "qkv_bias": True,
        "txt_ids_dims": [], "patch_size": 2, "in_channels": 16, "hidden_size": 256, "context_in_dim": 64, "vec_in_dim": 48,
        "depth": 2, "depth_single_blocks": 2, "yak_mlp": False, "txt_norm": False}  # fmt: skip
# ComfyUI's class and what its model_detection reads off a checkpoint, narrower; channels of the latents; widths of text.
MODELS = {
    "flux1": (supported.Flux, {**FLUX, "image_model": "flux", "guidance_embed": True}, 16, {"context": 64, "pooled": 48}),
}  # fmt: skip
TEXT_LENGTHS = (5, 32)


def random_weights(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2:
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.data = (
                noise + 1 if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "scale")) else noise
            )
        else:
            deviation = 0.7 * parameter[0].numel() ** -0.5
            parameter.data = deviation * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def write(family: str, path: str) -> None:
    cls, config, channels, widths = MODELS[family]
    model = cls(dict(config)).get_model({}, "", device=torch.device("cpu")).float()
    random_weights(model.diffusion_model)
    tensors = {f"weights.{name}": value.contiguous() for name, value in model.diffusion_model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    for number, length in enumerate(TEXT_LENGTHS):
        case = {
            "latents": torch.randn(1, channels, 8, 12, generator=generator),
            "time": torch.tensor([0.3 + 0.4 * number]),
            "context": torch.randn(1, length, widths["context"], generator=generator),
        }
        given = {"c_crossattn": case["context"]}
        if "pooled" in widths:
            given["y"] = case["pooled"] = torch.randn(1, widths["pooled"], generator=generator)
        if config.get("guidance_embed"):
            given["guidance"] = case["guidance"] = torch.tensor([3.5])
        denoised = model.apply_model(case["latents"], case["time"], **given)
        case["prediction"] = (case["latents"] - denoised) / case["time"].view(-1, 1, 1, 1)
        tensors |= {f"case{number}.{name}": value.contiguous() for name, value in case.items()}
    safetensors.torch.save_file(tensors, path)


for family, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    write(family, path)
