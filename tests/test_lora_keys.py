import json
from pathlib import Path

import pytest

from core.lora_keys import FAMILIES, parse_key

REFERENCE = Path(__file__).parent / "reference"
# Module lists enumerated by running sd-scripts 0.10.1's network code on models without weights.
KOHYA_LISTS = {"sd15": "kohya_sd15_conv.json", "sd2": "kohya_sd2.json", "sdxl": "kohya_sdxl_conv.json"}


@pytest.mark.parametrize("family", KOHYA_LISTS)
def test_every_kohya_name_is_located_and_written_back(family):
    keys = FAMILIES[family]
    names = json.loads((REFERENCE / KOHYA_LISTS[family]).read_text())
    for name in names:
        named = parse_key(f"{name}.alpha")
        assert named is not None
        fusion, _ = keys.locate(named.part, named.path)
        assert keys.kohya_name(named.part, fusion.parts[0]) == name
