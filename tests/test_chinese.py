"""The Chinese texts of ComfyUI's page: every text has one, none is left over, and they keep to one word for each thing."""

import re
from pathlib import Path

import pytest

from core.progress import READING
from core.training.callbacks import LOADING, likeness_word

from .prose import ROOT, translated_texts

SCRIPTS = {file.name: file.read_text(encoding="utf-8") for file in (ROOT / "web").glob("*.js")}
CHINESE = dict(re.findall(r'^  "(.+?)": "(.+)",$', SCRIPTS["words.js"], re.MULTILINE))


def said() -> set[str]:
    """Return the texts that the scripts translate: their own, and those that the server sends."""
    found = set().union(*(translated_texts(text) for name, text in SCRIPTS.items() if name != "words.js"))
    found |= set(re.findall(r'name: "([a-z ]+)"', SCRIPTS["train_panel.js"]))  # of the curves
    found |= {LOADING, READING, *(likeness_word(likeness) for likeness in (0.0, 0.5, 1.0))}
    shown = (ROOT / "nodes/comfyui" / name for name in ("panel.py", "train.py"))
    for path in [*(ROOT / "core/training").rglob("*.py"), *shown]:
        phases = r'(?:callbacks\.progress\(|"phase": )"([^"]+)"'
        found |= set(re.findall(phases, path.read_text(encoding="utf-8")))
    return found


def test_every_text_of_a_panel_has_a_chinese_one_and_none_is_left_over():
    assert len(said()) > 70
    assert said() == set(CHINESE)


def test_a_chinese_text_has_a_place_for_each_value():
    assert [text for text, chinese in CHINESE.items() if text.count("{}") != chinese.count("{}")] == []


PAGES = [*sorted(ROOT.glob("web/docs/*/zh.md")), *sorted(ROOT.glob("locales/zh/*.json")), ROOT / "web/words.js"]
NOT_OURS = {
    "蒙版": "遮罩",
    "检查点": "中间 LoRA",
    "方案": "预设",
    "头像": "形象照",
    "底模": "基础模型",
    "显示卡": "GPU",
}
"""Words that mean the same as one of ours, with ours."""


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_chinese_has_one_word_for_each_thing_and_its_own_punctuation(path: Path):
    text = path.read_text(encoding="utf-8").replace("内存方案", "")  # the memory plan
    assert [f"{word}: {ours}" for word, ours in NOT_OURS.items() if word in text] == []
    assert re.findall(r"[\u4e00-\u9fff][,;:?!][^\d]", text) == [], "full-width punctuation after a Chinese character"
