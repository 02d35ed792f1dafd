"""Each table of docs/ is what a program of tools/ makes of its records, of the source code or of a measurement."""

import re
from pathlib import Path

import pytest

from tools import memory_tables, peer_tables, photo_tables, reader_tables, recipe_tables
from tools.photo_tables import replace_table, table

ROOT = Path(__file__).parent.parent
PAGES = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}
TABLES = [(page, name) for page, text in PAGES.items() for name in re.findall("<!-- table: (.+) -->", text)]


@pytest.mark.parametrize(("page", "name"), TABLES)
def test_a_program_fills_a_table_of_its_page(page, name):
    programs = [path.read_text(encoding="utf-8") for path in ROOT.glob("tools/*.py")]
    assert any(f'"{name}"' in text and ("DOCUMENT" in text or page in text) for text in programs)
    assert "| --- |" in replace_table(PAGES[page], name, "| --- |")


def test_a_table_with_records_or_from_the_source_is_up_to_date():
    made = recipe_tables.tables(recipe_tables.read_records(recipe_tables.RECORDS))
    assert {*made} == {"defaults", "tried", "how soon", "few photos"}
    for name, content in made.items():
        assert replace_table(PAGES["likeness.md"], name, content) == PAGES["likeness.md"], (
            "python -m tools.recipe_tables"
        )
    peers = table(peer_tables.HEADER, peer_tables.summary(peer_tables.read_records()))
    assert replace_table(PAGES["other-trainers.md"], "likeness", peers) == PAGES["other-trainers.md"]
    assert peer_tables.PLOT.read_text(encoding="utf-8") == peer_tables.plot(peer_tables.read_records())
    assert reader_tables.document() == PAGES["formats.md"], "python -m tools.reader_tables"
    thresholds = table(("threshold", "value", "where it comes from"), photo_tables.threshold_rows())
    assert replace_table(PAGES["photos.md"], "thresholds", thresholds) == PAGES["photos.md"], (
        "python -m tools.photo_tables"
    )


@pytest.mark.parametrize("name", memory_tables.HEADERS)
def test_every_model_has_a_row_in_the_tables_of_memory(name):
    models = memory_tables.MODELS
    titles = models if name == "drawing on cards" else map(memory_tables.titled, models)
    assert [cells[0] for cells in memory_tables.rows_in(PAGES["benchmarks.md"], name)[2:]] == list(titles)
