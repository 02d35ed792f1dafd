"""Write the report on all people of a studio, as JSON and as a page."""

import html
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ..errors import BadConfig, BadFile, counted
from ..lora.metadata import without_folders
from ..storage.files import delete, fill_page, leftovers, read_json, write_text
from ..storage.plain_values import read_as
from .cost import PHASES
from .people import PAGE, REPORT
from .result import NONE_ALIKE, STATUSES, Result


def read_report(output: Path) -> list[Result]:
    """Read the results from the report of the studio's output; none without a report.

    Raises BadFile if the report or its page is another program's, or the report is damaged.
    """
    report = output / REPORT
    if not report.exists() and (output / PAGE).exists():
        raise BadFile(f"{output / PAGE}: this is not a studio page; move it, or choose another output")
    try:
        return [read_as(Result, one) for one in read_json(report)["people"]] if report.exists() else []
    except (TypeError, KeyError, BadConfig):
        raise BadFile(
            f"{report}: this is not a studio report, or it is damaged; move it, and the next run writes a new one"
        ) from None


def write_report(output: Path, results: Sequence[Result], page_first: bool = False) -> None:
    """Write the report on the results into the output, as JSON and as a page, with those to check first at the top.

    Reasons in it don't name folders of this machine, since reports are sent to others. With `page_first`, a person who is
    no longer in the JSON file isn't on the page either, whenever the process is killed.
    """
    here = f"{output.absolute()}{os.sep}"
    cleaned = [replace(one, reason=without_folders(one.reason.replace(here, ""))) for one in results]
    ranked = sorted(cleaned, key=_urgency)
    totals = _totals(ranked)
    values = json.dumps({**totals, "people": [asdict(one) for one in ranked]}, indent=1)
    gpu = any(one.cost.gpu_hours for one in ranked if one.cost)
    numbers = Counter(one.shown_status for one in ranked)
    counts = [f"{numbers[word]} {word}" for word in ("made", "found", NONE_ALIKE, "failed") if numbers[word]]
    parts = {
        "TITLE": ", ".join(counts),
        "COSTS": _in_words(totals),
        "SECONDS": "".join(f'<th class="number">{head}' for head in (*PHASES, "GPU-hours" if gpu else "CPU-hours")),
        "ROWS": "\n".join(_row(one, gpu) for one in ranked),
    }
    files = [(REPORT, values), (PAGE, fill_page(Path(__file__).with_name("report.html"), parts))]
    for name, text in reversed(files) if page_first else files:
        write_text(output / name, text)


def delete_leftovers(output: Path, left: list[str]) -> None:
    """Delete what a killed process left of the report, as `delete` does. The caller must hold the report's lock."""
    for place in {Path(os.path.realpath(output / name)) for name in (REPORT, PAGE)}:
        try:
            for path in leftovers(place.parent, re.escape(place.name)):
                delete(path, left)
        except OSError as error:  # A folder may be writable, but not readable.
            left.append(f"{place.parent}: cannot be read: {error.strerror or error}")


def _urgency(result: Result) -> tuple[bool, float]:
    """Return a sort key: failed people first, then those whose likeness is least above their leakage."""
    likeness = -1.0 if result.likeness is None else result.likeness
    return result.status != "failed", likeness - max(result.leakage or 0.0, 0.0)


def _totals(results: Sequence[Result]) -> dict[str, Any]:
    """Count the results, and sum the costs of people made in this run."""
    costs = [one.cost for one in results if one.status == "made" and one.cost]
    gpu = [hours for cost in costs if (hours := cost.gpu_hours) is not None]
    return {
        **{status: sum(one.status == status for one in results) for status in STATUSES},
        "none_alike": sum(one.shown_status == NONE_ALIKE for one in results),
        "seconds": round(sum(one.seconds for one in results if one.status == "made"), 1),
        "phases": {phase: round(sum(cost.seconds[phase] for cost in costs), 1) for phase in PHASES},
        "gpu_hours": round(sum(gpu), 4) if gpu else None,
        "processor_hours": round(sum(cost.processor_hours for cost in costs), 4),
    }


def _in_words(totals: Mapping[str, Any]) -> str:
    if not (made := totals["made"]):
        return ""
    shares = ", ".join(f"{phase} {taken / (totals['seconds'] or 1):.0%}" for phase, taken in totals["phases"].items())
    gpu = "" if totals["gpu_hours"] is None else f"{totals['gpu_hours']:.2f} GPU-hours and "
    each = f"{totals['seconds'] / made:.0f} s for each of {counted(made, 'person', 'people')} made in this run"
    return f"{each} ({shares}); {gpu}{totals['processor_hours']:.2f} processor hours."


def _row(result: Result, gpu: bool) -> str:
    name, folder = html.escape(result.name), quote(Path(result.lora or "").parent.as_posix())
    shown = f'<a href="{folder}/gallery.html">{name}</a>' if result.lora else name
    picture = f'<img src="{quote(result.pictures[0])}" alt="" loading="lazy">' if result.pictures else ""
    kept = result.kept_of if result.pictures else ""
    cost, times = result.cost, [""] * (len(PHASES) + 1)
    if cost:
        hours = cost.gpu_hours if gpu else cost.processor_hours
        times = [f"{cost.seconds[phase]:.1f}" for phase in PHASES] + ["" if hours is None else f"{hours:.3f}"]
    shares = ["" if share is None else f"{share:.2f}" for share in (result.likeness, result.leakage)]
    cells = "".join(f'<td class="number">{cell}</td>' for cell in (*shares, kept, *times))
    status, reason = result.shown_status, html.escape(result.reason)
    return (
        f'<tr class="{status.replace(" ", "-")}"><td>{picture}</td>'
        f'<th>{shown}<div class="reason">{reason}</div></th><td>{status}</td>{cells}</tr>'
    )
