"""The tables of memory plans are written anew for one model without a change of the others."""

from tools.memory_tables import DOCUMENT, HEADERS, MODELS, rows_in, titled, with_rows

TEXT = DOCUMENT.read_text("utf-8")


def test_every_model_has_a_row_in_each_table_and_no_other():
    for name in HEADERS:
        titles = MODELS if name == "drawing on cards" else map(titled, MODELS)
        assert [cells[0] for cells in rows_in(TEXT, name)[2:]] == list(titles)


def test_a_new_models_rows_go_where_it_is_listed():
    rows = {name: next(cells for cells in rows_in(TEXT, name) if cells[0].startswith("SDXL")) for name in HEADERS}
    own = {f"| {' | '.join(cells)} |" for cells in rows.values()}
    without = "\n".join(line for line in TEXT.split("\n") if line not in own)
    assert len(without) < len(TEXT) and with_rows(without, {"SDXL": rows}) == TEXT
