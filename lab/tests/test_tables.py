"""Each table of docs/ is what a program of lab/ or tools/ makes of its records, of the source code or of a measurement."""

import re
from pathlib import Path

import pytest

from lab import memory_tables, peer_tables, recipe_tables
from tools import source_tables
from tools.tables import replace_table, table

ROOT = Path(__file__).parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/*.md")}


def test_a_program_fills_each_table_that_a_page_names():
    programs = "".join(
        path.read_text(encoding="utf-8") for top in ("lab", "tools") for path in ROOT.glob(f"{top}/*.py")
    )
    named = [name for text in PAGES.values() for name in re.findall("<!-- table: (.+) -->", text)]
    assert named and [name for name in named if f'"{name}"' not in programs] == []


def test_a_table_with_records_or_from_the_source_is_up_to_date():
    """Otherwise run `python -m tools.source_tables`, `lab.recipe_tables` or `lab.peer_tables`."""
    rows = peer_tables.read_records()
    made = {
        **source_tables.tables(),
        "likeness.md": recipe_tables.tables(recipe_tables.read_records(recipe_tables.RECORDS)),
        "other-trainers.md": {"likeness": table(peer_tables.HEADER, peer_tables.summary(rows))},
    }
    assert {*made["likeness.md"]} == {"defaults", "tried", "how soon", "few photos"}
    for page, tables in made.items():
        for name, content in tables.items():
            assert replace_table(PAGES[page], name, content) == PAGES[page], (page, name)
    assert peer_tables.PLOT.read_text(encoding="utf-8") == peer_tables.plot(rows)


@pytest.mark.parametrize("name", memory_tables.HEADERS)
def test_every_model_has_a_row_in_the_tables_of_memory(name):
    models = memory_tables.MODELS
    titles = models if name == "drawing on cards" else map(memory_tables.titled, models)
    assert [cells[0] for cells in memory_tables.rows_in(PAGES["benchmarks.md"], name)[2:]] == list(titles)
