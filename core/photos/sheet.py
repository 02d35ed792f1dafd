"""Show the photo report: as a table for the terminal, or as an HTML page with the faces and the reasons."""

from __future__ import annotations

import html
import re
import textwrap
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw

from ..storage.drawn import jpeg_url
from ..storage.files import fill_page, write_text
from .report import CROP, REJECT, REVIEW, USE, VERDICTS, PhotoReport, SetReport

SHEET_KEY = "facelora.sheet"
"""Marks a file as a photo report, near its beginning. A new report may replace it, and `score` skips it."""
THUMBNAIL = 360
"""The long side of a picture on the page, in pixels."""
COLOURS = {USE: "#1a7f37", CROP: "#0969da", REVIEW: "#9a6700", REJECT: "#cf222e"}


def format_report(report: SetReport, width: int | None = None) -> str:
    """Format the report as lines for a terminal: one per photo with its verdict and reasons, then the set and what to add.

    If a line would have more than `width` characters, the reasons are printed below their photos.
    """
    rows = [("photo", "verdict", "face", "likeness", "sharp", "view", "framing", "why")]
    rows += [
        (
            photo.photo.name,
            photo.verdict,
            "-" if photo.face is None else f"{photo.face.size:.0f} px",
            _decimals(photo.likeness),
            _decimals(photo.sharpness),
            photo.view or "-",
            photo.framing or "-",
            "; ".join(finding.sentence for finding in photo.findings),
        )
        for photo in _in_order(report)
    ]
    sizes = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    starts = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=False)) for row in rows]
    lines = [f"{start}  {row[-1]}".rstrip() for start, row in zip(starts, rows, strict=True)]
    summary = _about_the_set(report)
    if width is not None and max(map(len, lines)) > width:
        room = max(width, 24)
        below = [textwrap.fill(row[-1], room, initial_indent="    ", subsequent_indent="    ") for row in rows]
        lines = [f"{start.rstrip()}\n{why}".rstrip() for start, why in zip(starts, below, strict=True)]
        summary = [textwrap.fill(line, room) for line in summary]
    return "\n".join([*lines, "", *summary])


def _in_order(report: SetReport) -> list[PhotoReport]:
    """Return the photos by name, with 2.png before 10.png."""

    def parts(photo: PhotoReport) -> list[tuple[bool, int, str]]:
        found = re.findall(r"[0-9]+|[^0-9]+", photo.photo.name)
        return [(False, int(part), part) if part[0] in "0123456789" else (True, 0, part) for part in found]

    return sorted(report.photos, key=parts)


def save_sheet(report: SetReport, path: str | Path) -> None:
    """Write one self-contained HTML page with each photo, its face framed, and its verdict and reasons.

    The page contains the photos and is as personal as they are. Raises BadFile if it cannot be written.
    """
    worst_first = sorted(_in_order(report), key=lambda photo: -VERDICTS.index(photo.verdict))
    cards = "\n".join(map(_card, worst_first))
    summary = "".join(f"<p>{html.escape(line)}</p>" for line in _about_the_set(report))
    write_text(path, fill_page(Path(__file__).with_name("sheet.html"), {"SUMMARY": summary, "CARDS": cards}))


def is_sheet(path: Path) -> bool:
    """Return whether `save_sheet`, or the command `score`, wrote the file: SHEET_KEY is near its beginning."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return SHEET_KEY.encode() in file.read(1024)
    except OSError:
        return False


def _about_the_set(report: SetReport) -> list[str]:
    def counts(values: list[str | None]) -> str:
        return ", ".join(f"{count} {value}" for value, count in Counter(values).most_common())

    lines = [f"{report.headline}."]
    if report.usable and report.network:
        lines.append(
            f"View: {counts([photo.view for photo in report.usable])}. "
            f"Framing: {counts([photo.framing for photo in report.usable])}. "
            f"Kinds of light: {report.lights}. Kinds of background: {report.backgrounds}."
        )
    return [*lines, *report.advice]


def _card(report: PhotoReport) -> str:
    colour = COLOURS[report.verdict]
    reasons = "".join(f"<li>{html.escape(finding.sentence)}</li>" for finding in report.findings)
    facts = [f"{report.photo.size[0]} x {report.photo.size[1]}"]
    if report.face is not None:
        facts += [f"face {report.face.size:.0f} px", f"likeness {_decimals(report.likeness)}", f"{report.view}"]
        facts += [f"{report.framing}", f"sharpness {_decimals(report.sharpness)}"]
    return (
        f'<figure><img src="{_thumbnail(report)}" alt="{html.escape(report.photo.name)}">'
        f'<figcaption><b style="background:{colour}">{report.verdict}</b> {html.escape(report.photo.name)}'
        f"<ul>{reasons}</ul><small>{' &middot; '.join(facts)}</small></figcaption></figure>"
    )


def _thumbnail(report: PhotoReport) -> str:
    """Return the photo as a data URL of a small JPEG, the person's face framed in the verdict's colour and others in grey."""
    image = report.photo.image(shorter_side=THUMBNAIL)
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(image)
    scale = image.width / report.photo.size[0]
    for face in report.other_faces:
        draw.rectangle([value * scale for value in face.box], outline="#888888", width=2)
    if report.face is not None:
        draw.rectangle([value * scale for value in report.face.box], outline=COLOURS[report.verdict], width=3)
    return jpeg_url(image, THUMBNAIL, mark=None)


def _decimals(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
