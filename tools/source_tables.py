"""Write the tables of docs/ that are made from the source: `python -m tools.source_tables`.

docs/formats.md has what other programs load. It is what core/lora/readers.py says of whole LoRAs, of the first published
model of each family: of every matrix and convolution of the denoiser, and of the text encoders' layers. A second table has
the version and the file of each program in which that was read. docs/photos.md has the thresholds of the photo check.
"""

import ast
import inspect
import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.lora.readers import OTHERS, READERS, read_by
from core.photos import Thresholds
from core.tensor_names import NAME_TABLES, SCHEMES, ModuleId, text_encoder_path
from tools.model_tables import OUTPUT, whole
from tools.tables import table, write_tables

DOCS = Path(__file__).parent.parent / "docs"
SHORT = {"loads": "all", "not at all": "-"}


def module(shape: tuple[int, ...]) -> LoraModule:
    """A LoRA of rank 1 that changes nothing."""
    return LoraModule(torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1, *[1] * (len(shape) - 2)), 1.0)


def loras_of(family: str) -> dict[str, LoraFile]:
    """The LoRAs of a family's denoiser and of its text encoders in each scheme, by what they hold."""
    tables = json.loads(OUTPUT.read_text("utf-8"))
    model = next(model for model in tables["models"] if model["family"] == family)
    contents: dict[str, dict[ModuleId, LoraModule]] = {"": {}}
    for path, shape in whole(model["denoiser"]["diffusers"]).items():
        if len(shape) > 1:
            contents[""]["denoiser", path] = module(shape)
    for part, encoder in zip(("text_encoder", "text_encoder_2", "text_encoder_3"), model["text"], strict=False):
        for path, shape in whole(tables["text_encoders"][encoder]).items():
            if len(shape) > 1 and re.search(r"(layers|block)\.\d+\..*(?<!relative_attention_bias)$", path):
                contents.setdefault("text ", {})[part, text_encoder_path(path)] = module(shape)
    return {
        f"{kind}{scheme}": LoraFile.from_modules(family, modules, {}, scheme)
        for kind, modules in contents.items()
        for scheme in SCHEMES
    }


class Program(NamedTuple):
    """A program, and where the names that it loads were read."""

    version: str
    """The version that was tried or read, or the date and commit of its source."""
    repository: str
    """The owner and name of its repository on GitHub."""
    files: Mapping[str, str]
    """The families, and ALL for all others, by the file in the repository that decides over their names."""


ALL = "all"
IN_INVOKEAI = "invokeai/backend/patches/lora_conversions"
IN_MFLUX = "src/mflux/models"
IN_ONETRAINER = "modules/modelLoader"
IN_AI_TOOLKIT = "extensions_built_in/diffusion_models"
IN_MUSUBI = "src/musubi_tuner/networks"
PROGRAMS = {
    "ComfyUI": Program("0.30.0", "Comfy-Org/ComfyUI", {"comfy/lora.py": ALL}),
    "diffusers": Program("0.42.1", "huggingface/diffusers", {
        "src/diffusers/loaders/peft.py": "longcat-image", "src/diffusers/loaders/lora_conversion_utils.py": ALL}),
    "peft": Program("0.21.2", "huggingface/peft", {"src/peft/utils/save_and_load.py": ALL}),
    "sd-scripts": Program("0.10.1", "kohya-ss/sd-scripts", {
        "networks/lora_flux.py": "flux1 chroma", "networks/lora_sd3.py": "sd3", "networks/lora_lumina.py": "lumina2",
        "networks/lora.py": ALL}),
    "InvokeAI": Program("6.14", "invoke-ai/InvokeAI", {
        f"{IN_INVOKEAI}/sd_lora_conversion_utils.py": "sd15 sd2", f"{IN_INVOKEAI}/sdxl_lora_conversion_utils.py": "sdxl",
        f"{IN_INVOKEAI}/z_image_lora_conversion_utils.py": "zimage",
        f"{IN_INVOKEAI}/qwen_image_lora_conversion_utils.py": "qwen-image",
        f"{IN_INVOKEAI}/krea2_lora_conversion_utils.py": "krea2", f"{IN_INVOKEAI}/formats.py": ALL}),
    "A1111": Program("1.10.1", "AUTOMATIC1111/stable-diffusion-webui", {"extensions-builtin/Lora/networks.py": ALL}),
    "Forge": Program("2025-06-26 (dfdcbab)", "lllyasviel/stable-diffusion-webui-forge", {
        "packages_3rdparty/comfyui_lora_collection/lora.py": ALL}),
    "SD.Next": Program("2026-07-23 (058a7f0)", "vladmandic/sdnext", {
        "pipelines/flux/flux_lora.py": "flux1", "pipelines/chroma/chroma_lora.py": "chroma",
        "pipelines/flux/flux2_lora.py": "flux2", "pipelines/z_image/zimage_lora.py": "zimage",
        "pipelines/krea2/krea2_lora.py": "krea2", "pipelines/ernie/ernie_lora.py": "ernie-image",
        "modules/lora/lora_diffusers.py": "qwen-image", "modules/lora/lora_convert.py": ALL}),
    "stable-diffusion.cpp": Program(
        "2026-08-19 (97d2990)", "leejet/stable-diffusion.cpp", {"src/name_conversion.cpp": ALL}),
    "mflux": Program("0.18.0", "filipstrand/mflux", {
        f"{IN_MFLUX}/flux/weights/flux_lora_mapping.py": "flux1",
        f"{IN_MFLUX}/flux2/weights/flux2_lora_mapping.py": "flux2",
        f"{IN_MFLUX}/z_image/weights/z_image_lora_mapping.py": "zimage",
        f"{IN_MFLUX}/qwen/weights/qwen_lora_mapping.py": "qwen-image",
        f"{IN_MFLUX}/krea2/weights/krea2_lora_mapping.py": "krea2",
        f"{IN_MFLUX}/ernie_image/weights/ernie_lora_mapping.py": "ernie-image",
        f"{IN_MFLUX}/ideogram4/weights/ideogram4_lora_mapping.py": "ideogram4"}),
    "OneTrainer": Program("2026-08-19 (23df383)", "Nerogar/OneTrainer", {
        f"{IN_ONETRAINER}/stableDiffusion/StableDiffusionLoRALoader.py": "sd15",
        f"{IN_ONETRAINER}/stableDiffusionXL/StableDiffusionXLLoRALoader.py": "sdxl",
        f"{IN_ONETRAINER}/stableDiffusion3/StableDiffusion3LoRALoader.py": "sd3",
        f"{IN_ONETRAINER}/flux/FluxLoRALoader.py": "flux1", f"{IN_ONETRAINER}/chroma/ChromaLoRALoader.py": "chroma",
        f"{IN_ONETRAINER}/qwen/QwenLoRALoader.py": "qwen-image", f"{IN_ONETRAINER}/krea2/Krea2LoRALoader.py": "krea2",
        f"{IN_ONETRAINER}/GenericLoRAModelLoader.py": ALL}),
    "ai-toolkit": Program("2026-08-21 (27a03a9)", "ostris/ai-toolkit", {
        f"{IN_AI_TOOLKIT}/chroma/chroma_model.py": "chroma", f"{IN_AI_TOOLKIT}/flux2/flux2_model.py": "flux2",
        f"{IN_AI_TOOLKIT}/z_image/z_image.py": "zimage", f"{IN_AI_TOOLKIT}/qwen_image/qwen_image.py": "qwen-image",
        f"{IN_AI_TOOLKIT}/krea2/krea2.py": "krea2", f"{IN_AI_TOOLKIT}/ernie_image/ernie_image.py": "ernie-image",
        "toolkit/network_mixins.py": ALL}),
    "musubi-tuner": Program("0.3.4", "kohya-ss/musubi-tuner", {
        f"{IN_MUSUBI}/lora_flux_2.py": "flux2", f"{IN_MUSUBI}/lora_zimage.py": "zimage",
        f"{IN_MUSUBI}/lora_qwen_image.py": "qwen-image", f"{IN_MUSUBI}/lora_krea2.py": "krea2",
        f"{IN_MUSUBI}/lora_ideogram4.py": "ideogram4"}),
}  # fmt: skip


def file_of(reader: str, family: str) -> str | None:
    """The file of a program in which its names of a family were read, None: nothing is known of them."""
    if reader in OTHERS and reader not in NAME_TABLES[family].loaded.others:
        return None
    return next(
        (file for file, named in PROGRAMS[reader].files.items() if family in named.split() or named == ALL), None
    )


def cell(reader: str, lora: LoraFile) -> str:
    if file_of(reader, lora.family) is None:
        return ""
    reading = read_by(reader, lora)
    loaded = reading.modules - len(reading.objections)
    return SHORT.get(reading.verdict, f"{loaded} of {reading.modules}")


def threshold_rows() -> list[tuple[str, str, str]]:
    """(name, value, origin) of the thresholds, from the source code itself."""
    (cls,) = ast.parse(inspect.getsource(Thresholds)).body
    assert isinstance(cls, ast.ClassDef)
    rows = []
    for field, text in itertools.pairwise(cls.body):
        if isinstance(field, ast.AnnAssign):
            name = ast.unparse(field.target)
            assert isinstance(text, ast.Expr), f"{name} doesn't say where it comes from"
            origin = " ".join(ast.literal_eval(text.value).split())
            rows.append((f"`{name}`", f"{getattr(Thresholds(), name):g}", origin))
    return rows


def reader_tables() -> dict[str, str]:
    """The tables of what each program loads, and of where that was read."""
    families, made = {}, []
    for family in NAME_TABLES:
        for contents, lora in loras_of(family).items():
            cells = {reader: cell(reader, lora) for reader in READERS}
            made.append([f"{family}, {contents}", *cells.values()])
            for reader, text in cells.items():
                if text not in ("", "-") or (text and reader in OTHERS):
                    families.setdefault((reader, file_of(reader, family)), {})[family] = None
    sources = [
        [reader, PROGRAMS[reader].version, f"`{PROGRAMS[reader].repository}`", f"`{file}`", ", ".join(named)]
        for (reader, file), named in sorted(families.items(), key=lambda item: READERS.index(item[0][0]))
    ]
    return {
        "readers": table(["names", *READERS], made),
        "sources": table(["program", "version", "repository", "file", "base models"], sources),
    }


def tables() -> dict[str, dict[str, str]]:
    """The tables of each page, by their names."""
    thresholds = table(("threshold", "value", "where it comes from"), threshold_rows())
    return {"formats.md": reader_tables(), "photos.md": {"thresholds": thresholds}}


if __name__ == "__main__":
    for page, made in tables().items():
        write_tables(DOCS / page, made)
