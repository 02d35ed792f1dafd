"""The program that measures pictures of two people and writes their table."""

import sys

import pytest

from tools import group_tables
from tools.group_tables import ADDED, ALONE, REGIONS, Row, main, read_records, rows


def row(way: str, seed: int, own: tuple[float | None, ...], other: tuple[float | None, ...]) -> Row:
    return Row((35, 36), way, seed, own, other)


def test_a_missing_face_counts_nothing_and_one_more_like_the_other_person_is_confused():
    alone = row(ALONE, 101, (0.8, 0.6), (0.1, 0.0))
    added = row(ADDED, 101, (0.2, None), (0.4, None))
    by_way = {cells[0]: cells[1:] for cells in rows([alone, added])}
    assert by_way[ALONE] == ("1", "0.700", "100%", "0.050", "0 of 2", "0", "0.600")
    assert by_way[ADDED] == ("1", "0.100", "14%", "0.400", "1 of 2", "1", "0.000")


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch: pytest.MonkeyPatch):
    measured = []

    def measure(base, pair, way, seeds, folder):
        measured.extend((way, seed) for seed in seeds)
        if way == REGIONS and len(measured) < 6:
            raise KeyboardInterrupt
        return [row(way, seed, (0.5, 0.5), (0.1, 0.1)) for seed in seeds]

    document = tmp_path / "group.md"
    document.write_text("<!-- table: ways -->\n<!-- end -->\n")
    monkeypatch.setattr(group_tables, "DOCUMENT", document)
    monkeypatch.setattr(group_tables, "measure", measure)
    monkeypatch.setattr(group_tables, "open_pair", lambda *_: None)
    monkeypatch.setattr(group_tables, "load_faces", lambda: None)
    command = ["group_tables", "--work", str(tmp_path), "--count", "2", "--way", ALONE, "--way", REGIONS]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        main()
    main()
    assert measured == [(ALONE, 101), (ALONE, 102), *[(REGIONS, 101), (REGIONS, 102)] * 2]
    main()
    assert len(measured) == 6 and len(read_records(tmp_path / "records.jsonl")) == 4
    assert f"| {REGIONS} | 2 | 0.500 | 100% |" in document.read_text()
