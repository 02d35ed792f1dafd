"""The report on all people of a studio, as JSON and as a page."""

import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import BadFile
from ..storage.files import read_json, write_text
from .result import Result, result_of

REPORT, PAGE = "report.json", "report.html"
"""Its files in the studio's output."""


def read_report(output: Path) -> list[Result]:
    """The results in the report of the studio's output; none where there is no report. Raises BadFile when it is damaged."""
    report = output / REPORT
    try:
        return [result_of(one) for one in read_json(report)["people"]] if report.exists() else []
    except (TypeError, KeyError):
        raise BadFile(f"{report}: is damaged; delete it, and the next run of the studio writes it anew") from None


def write_report(output: Path, results: Sequence[Result]) -> None:
    """Writes the report on the results into the output, as JSON and as a page: what failed first, then the least alike."""

    def order(result: Result) -> tuple[bool, float]:
        return result.status != "failed", -1.0 if result.likeness is None else result.likeness

    ranked = sorted(results, key=order)
    counts = {status: sum(one.status == status for one in ranked) for status in ("made", "found", "failed")}
    summary = {**counts, "seconds": round(sum(one.seconds for one in ranked if one.status == "made"), 1)}
    write_text(output / REPORT, json.dumps({**summary, "people": [asdict(one) for one in ranked]}, indent=1))
    rows = "\n".join(_row(one) for one in ranked)
    title = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    write_text(output / PAGE, _PAGE.replace("<!--TITLE-->", title).replace("<!--ROWS-->", rows))


def _row(result: Result) -> str:
    name = html.escape(result.name)
    shown = name
    if result.lora:
        shown = f'<a href="{html.escape(Path(result.lora).parent.as_posix())}/gallery.html">{name}</a>'
    likeness = "" if result.likeness is None else f"{result.likeness:.2f}"
    kept = f"{result.kept} of {len(result.pictures)}" if result.pictures else ""
    seconds = f"{result.seconds:.0f}" if result.seconds else ""
    cells = (shown, result.status, likeness, kept, seconds, html.escape(result.reason))
    return f'<tr class="{result.status}">{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Studio: <!--TITLE--></title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; }
  table { border-collapse: collapse; width: 100%; }
  th, td { border-bottom: 1px solid #ddd; padding: .4rem .6rem; text-align: left; vertical-align: top; }
  .failed td:nth-child(2) { color: #b00020; }
</style>
<h1><!--TITLE--></h1>
<table><thead><tr><th>person<th>status<th>likeness<th>kept<th>seconds<th>reason</thead><tbody>
<!--ROWS-->
</tbody></table></html>
"""
