"""The pages, docstrings and errors are readable: no sentence is long, and none has a turn of phrase to read twice."""

from pathlib import Path

import pytest

from .prose import PAGES, ROOT, faults, texts_of

CODE = sorted(path for folder in ("core", "nodes") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", [*PAGES, *CODE], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_it_has_no_sentence_to_rewrite(path: Path) -> None:
    assert faults(texts_of(path)) == []


def test_what_has_to_be_rewritten_is_found() -> None:
    long = " ".join(["word"] * 31)
    found = faults(
        f"# Title\n\nGood.\n\n{long}.\n\n| {long} |\n\n```\n{long}\n```\n\n- a file of which nothing is known"
    )
    assert [fault.partition(":")[0] for fault in found] == ["31 words", "'of which'"]
