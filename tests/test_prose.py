"""Pages, docstrings, errors and texts on screen are readable: no long sentence, no turn of phrase to read twice."""

from pathlib import Path

import pytest

from .prose import PAGES, ROOT, faults, shown_texts, texts_of

SCREENS = sorted([*ROOT.glob("nodes/*/*.py"), *ROOT.glob("web/*.js")])
CODE = sorted(path for folder in ("core", "nodes") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", [*PAGES, *CODE], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_it_has_no_sentence_to_rewrite(path: Path) -> None:
    assert faults(texts_of(path)) == []


@pytest.mark.parametrize("path", SCREENS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_text_on_screen_has_no_sentence_to_rewrite(path: Path) -> None:
    assert faults(shown_texts(path), on_screen=True) == []


def test_texts_on_screen_are_found() -> None:
    for name in ("nodes/comfyui/train.py", "nodes/invokeai/train.py", "web/train_panel.js", "web/photos.js"):
        assert len(shown_texts(ROOT / name)) > 200, name


def test_what_has_to_be_rewritten_is_found() -> None:
    long = " ".join(["word"] * 31)
    found = faults(
        f"# Title\n\nGood.\n\n{long}.\n\n| {long} |\n\n```\n{long}\n```\n\n- a file of which nothing is known"
    )
    assert [fault.partition(":")[0] for fault in found] == ["31 words", "'of which'"]
    assert faults("The training goes on.") == []
    assert len(faults("The training goes on.", on_screen=True)) == 2
