"""LoRAs beside the weights, on ComfyUI's own ModelPatcher and adapters, where the original model has q, k and v in one."""

import subprocess

from .server import PACK
from .setup_comfyui import COMFYUI, PYTHON

SCRIPT = """
import importlib, sys, types
comfyui, pack = sys.argv[1:]
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, comfyui)
import comfy.options
comfy.options.enable_args_parsing()
import comfy.model_patcher, torch
from comfy.weight_adapter.lora import LoRAAdapter

# As packages whose own __init__ is not run: that of the nodes needs a server.
for name, folder in (("pack", pack), ("pack.nodes", pack + "/nodes"), ("pack.nodes.comfyui", pack + "/nodes/comfyui")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
module = importlib.import_module("pack.nodes.comfyui.weight_patches")

torch.manual_seed(1)
model = torch.nn.Module()
model.qkv = torch.nn.Linear(8, 24)
model.conv = torch.nn.Conv2d(4, 6, 3, padding=1)
sizes = {("qkv.weight", (0, 8, 8)): ((8, 2), (2, 8)), "conv.weight": ((6, 2, 1, 1), (2, 4, 3, 3))}
weights = {place: [torch.randn(size) for size in pair] for place, pair in sizes.items()}


def bypassed():
    adapters = {place: LoRAAdapter(set(), (up, down, 2.0, None, None, None)) for place, (up, down) in weights.items()}
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    one = module.BypassAdapters(None)
    one.add(adapters, 0.5)
    one.attach(patcher)
    return patcher


first, second = bypassed(), bypassed()
x, image = torch.randn(3, 8), torch.randn(1, 4, 5, 5)
plain, plain_image = model.qkv(x), model.conv(image)
up, down = weights["qkv.weight", (0, 8, 8)]
change = torch.zeros(3, 24)
change[:, 8:16] = 0.5 * x @ (up @ down).T
up, down = weights["conv.weight"]
kernel = 0.5 * (up.flatten(1) @ down.flatten(1)).reshape(6, 4, 3, 3)
change_image = torch.nn.functional.conv2d(image, kernel, padding=1)
for injected, times in ((first, 1), (second, 2)):
    injected.inject_model()
    torch.testing.assert_close(model.qkv(x), plain + times * change)
    torch.testing.assert_close(model.conv(image), plain_image + times * change_image)
first.eject_model()
torch.testing.assert_close(model.qkv(x), plain + change)
second.eject_model()
assert torch.equal(model.qkv(x), plain) and torch.equal(model.conv(image), plain_image)

# A LoRA for control images: doubled inputs, a bias, and the new weight of a norm.
from pack.core.lora.file import LoraFile
from pack.core.lora.convert import convert_lora

tensors = {"img_in.lora_A.weight": torch.randn(2, 128), "img_in.lora_B.weight": torch.randn(3072, 2)}
tensors |= {"img_in.lora_B.bias": torch.randn(3072), "single_blocks.0.norm.key_norm.scale": torch.randn(128)}
lora = convert_lora(LoraFile.from_tensors(tensors, {"ss_base_model_version": "flux1"}), "comfy").lora
key_map = {entry.name: entry.name + ".weight" for entry in lora.entries}
model = torch.nn.ModuleDict({"diffusion_model": torch.nn.ModuleDict({"img_in": torch.nn.Linear(64, 3072)})})
model["diffusion_model"]["single_blocks"] = torch.nn.ModuleList([torch.nn.Module()])
model["diffusion_model"]["single_blocks"][0].norm = torch.nn.ModuleDict({"key_norm": torch.nn.RMSNorm(128)})
patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
patches = module.load_patches(lora, list(lora.entries), key_map, 1.0)
assert set(patcher.add_patches(patches, 1.0)) == set(patches) and len(patches) == 3
before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
patcher.patch_model()
after = model.state_dict()
a, b, bias, norm = tensors.values()
wide = torch.nn.functional.pad(before["diffusion_model.img_in.weight"], (0, 64))
torch.testing.assert_close(after["diffusion_model.img_in.weight"], wide + b @ a)
torch.testing.assert_close(after["diffusion_model.img_in.bias"], before["diffusion_model.img_in.bias"] + bias)
torch.testing.assert_close(after["diffusion_model.single_blocks.0.norm.key_norm.weight"], norm)
print("AS EXPECTED")
"""


def test_rows_of_a_weight_and_convolutions_are_added_to_and_taken_off_in_any_order():
    done = subprocess.run(
        [str(PYTHON), "-c", SCRIPT, str(COMFYUI), str(PACK)], capture_output=True, text=True, cwd=COMFYUI, timeout=300
    )
    assert "AS EXPECTED" in done.stdout, done.stdout + done.stderr
