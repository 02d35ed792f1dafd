"""The nodes that this pack adds to ComfyUI. Each reads its inputs, calls `core` and returns the result."""

# comfy_api is importable only inside ComfyUI.
# pyright: reportMissingImports=false

from comfy_api.latest import ComfyExtension

from ...core import errors
from . import lora_files, style_pack, train
from .alike import ChooseAlike
from .app import routes
from .apply import ApplyLora
from .group import GroupPerson, GroupPortrait
from .likeness import ContactSheet, LikenessScore
from .lora_files import InspectLora, SaveLora
from .photos import LoadFacePhotos
from .redraw import RedrawFaces
from .sampler import SampleHeadshots
from .save import SaveHeadshots
from .style_pack import HeadshotStylePack
from .train import TrainFaceLora

NODES = [
    LoadFacePhotos,
    TrainFaceLora,
    ApplyLora,
    HeadshotStylePack,
    SampleHeadshots,
    RedrawFaces,
    GroupPerson,
    GroupPortrait,
    SaveLora,
    InspectLora,
    LikenessScore,
    ChooseAlike,
    ContactSheet,
    SaveHeadshots,
]

# ComfyUI shows an error's module with its message, and names the modules of a pack after the path of its folder.
for kind in vars(errors).values():
    if isinstance(kind, type):
        kind.__module__ = "FaceLoRA"


class FaceLoraExtension(ComfyExtension):
    async def on_load(self) -> None:
        for module in (routes, style_pack, lora_files, train):
            module.add_routes()

    async def get_node_list(self) -> list[type]:
        return list(NODES)
