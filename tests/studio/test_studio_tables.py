"""The table of many workers in docs/studio.md is made from the report of a studio."""

from core.studio import Result
from core.studio.report import write_report
from tests.studio.test_cost import cost
from tools import studio_tables
from tools.studio_tables import main


def test_the_table_goes_by_the_report_of_a_studio(tmp_path, monkeypatch, capsys) -> None:
    write_report(tmp_path, [Result("anna", "made", cost=cost(100.0)), Result("ben", "made", cost=cost(20.0))])
    document = tmp_path / "studio.md"
    document.write_text("before\n<!-- table: many workers -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(studio_tables, "DOCUMENT", document)
    arguments = ["studio_tables", "--report", str(tmp_path / "report.json"), "--start", "10"]
    monkeypatch.setattr("sys.argv", [*arguments, "--people", "12", "--workers", "1", "--processor"])
    main()
    # Five phases of half of 60 seconds.
    assert capsys.readouterr().out == "1810.0 s\n" and "old" in document.read_text()
    monkeypatch.setattr("sys.argv", [*arguments, "--people", "20"])
    main()
    assert "| 10 | 0 | 0.169 | 118 | 98% | 0.0% | 0 |" in document.read_text() and "old" not in document.read_text()
