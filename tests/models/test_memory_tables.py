"""The tables of memory plans are written anew for one model without a change of the others."""

from tools.memory_tables import DOCUMENT, HEADERS, MODELS, rows_in, titled, with_rows

TEXT = DOCUMENT.read_text("utf-8")


def test_every_model_has_a_row_in_each_table_and_no_other():
    for name in HEADERS:
        titles = MODELS if name == "drawing on cards" else map(titled, MODELS)
        assert [cells[0] for cells in rows_in(TEXT, name)[2:]] == list(titles)


def test_the_rows_of_one_model_take_the_place_of_its_own_alone():
    row = {name: ["SDXL" if name == "drawing on cards" else titled("SDXL"), "1"] for name in HEADERS}
    written = with_rows(TEXT, {"SDXL": row})
    changed = [new for old, new in zip(TEXT.splitlines(), written.splitlines(), strict=True) if old != new]
    assert changed == ["| SDXL, 1024 px | 1 |", "| SDXL, 1024 px | 1 |", "| SDXL | 1 |"]


def test_a_new_models_rows_go_where_it_is_listed():
    rows = {name: next(cells for cells in rows_in(TEXT, name) if cells[0].startswith("SDXL")) for name in HEADERS}
    own = {f"| {' | '.join(cells)} |" for cells in rows.values()}
    without = "\n".join(line for line in TEXT.split("\n") if line not in own)
    assert len(without) < len(TEXT) and with_rows(without, {"SDXL": rows}) == TEXT
