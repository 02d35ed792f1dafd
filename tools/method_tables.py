"""The table of docs/methods.md: `python -m tools.method_tables DIR` writes what `facelora compare --output DIR` has found."""

import argparse
import json
from pathlib import Path

from core.bench.compare import REPORT, MethodResult, summary_rows
from tools.photo_tables import replace_table, table

DOCUMENT = Path(__file__).parent.parent / "docs" / "methods.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    reports = sorted(path for path in parser.parse_args().folder.glob("*.json") if path.name != REPORT)
    results = [MethodResult(**one) for path in reports for one in json.loads(path.read_text("utf-8"))["results"]]
    header, *rows = summary_rows(results)
    DOCUMENT.write_text(replace_table(DOCUMENT.read_text("utf-8"), "methods", table(header, rows)), "utf-8")


if __name__ == "__main__":
    main()
