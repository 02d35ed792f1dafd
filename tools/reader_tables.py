"""The table of what other programs load in docs/formats.md: `python -m tools.reader_tables` writes it.

It is what core/lora/readers.py says of whole LoRAs, of the first published model of each family: of every matrix and
convolution of the denoiser, and of the text encoders' layers.
"""

import json
import re
from pathlib import Path

import torch

from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.lora.readers import READERS, read_by
from core.tensor_names import NAME_TABLES, SCHEMES, ModuleId, text_encoder_path
from tools.model_tables import OUTPUT, whole
from tools.photo_tables import replace_table, table

DOCUMENT = Path(__file__).parent.parent / "docs" / "formats.md"
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


def cell(reader: str, lora: LoraFile) -> str:
    reading = read_by(reader, lora)
    loaded = reading.modules - len(reading.objections)
    return SHORT.get(reading.verdict, f"{loaded} of {reading.modules}")


def rows() -> list[list[str]]:
    return [
        [f"{family}, {contents}", *(cell(reader, lora) for reader in READERS)]
        for family in NAME_TABLES
        for contents, lora in loras_of(family).items()
    ]


def document() -> str:
    """The page with the table as it is now."""
    made = table(["names", *READERS], rows())
    return replace_table(DOCUMENT.read_text("utf-8"), "readers", made)


if __name__ == "__main__":
    DOCUMENT.write_text(document(), "utf-8")
