"""Contact sheets: many pictures in one, in titled rows."""

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

WIDEST = 2000
"""The widest that a sheet becomes for its title, and a picture on a sheet, in pixels: both can be of any width."""
LONGEST_NAME = 400
"""The most characters shown of a row's name, which may be any text."""


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    tile: int = 160,
    labels: Sequence[Sequence[str]] | None = None,
    title: str = "",
    columns: int = 50,
) -> Image.Image:
    """Return one picture with a titled row per entry of `rows`, each image scaled to `tile` pixels high, its label below it.

    Rows of more than `columns` images are wrapped, as are names wider than the sheet. The sheet is as wide as its title, up to
    WIDEST pixels.
    """
    font, small, large = (ImageFont.load_default(size) for size in (18, 13, 22))
    gap, line = 8, 26

    def scaled(image: Image.Image) -> Image.Image:
        width = min(max(1, round(image.width * tile / image.height)), WIDEST)
        return image.convert("RGB").resize((width, tile), Image.Resampling.LANCZOS)

    tiles = [[scaled(image) for image in images] for _, images in rows]
    lines = [[row[start : start + columns] for start in range(0, len(row) or 1, columns)] for row in tiles]
    titled = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((gap, 0), title, font=large)[2]
    rows_width = max([sum(image.width + gap for image in images) for row in lines for images in row] + [320])
    width = max(rows_width, min(math.ceil(titled), WIDEST)) + gap
    step = tile + gap + (20 if labels else 0)
    names = [_wrapped(name, font, width - 2 * gap) for name, _ in rows]
    height = (line + 10 if title else 0) + sum(map(len, names)) * line + sum(map(len, lines)) * step + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    if title:
        draw.text((gap, y), title, fill="black", font=large)
        y += line + 10
    for index, (name, row) in enumerate(zip(names, lines, strict=True)):
        for part in name:
            draw.text((gap, y), part, fill="black", font=font)
            y += line
        texts = iter(labels[index] if labels else ())
        for images in row:
            x = gap
            for image in images:
                sheet.paste(image, (x, y))
                draw.text((x, y + tile + 2), next(texts, ""), fill="#444444", font=small)
                x += image.width + gap
            y += step
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Wrap the text into lines of at most `width` pixels, without the middle of one of more than LONGEST_NAME characters."""
    half = LONGEST_NAME // 2
    text = text if len(text) <= LONGEST_NAME else f"{text[:half]} ... {text[-half:]}"
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    return lines
