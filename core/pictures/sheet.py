"""Contact sheets: many pictures on one, in titled rows."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Image.Image]]],
    *,
    tile: int = 160,
    labels: Sequence[Sequence[str]] | None = None,
    title: str = "",
    columns: int = 50,
) -> Image.Image:
    """One picture with a titled row per entry of `rows`, each image scaled to `tile` pixels high, its label below it.

    A row of more than `columns` images goes on below.
    """
    font, small = ImageFont.load_default(18), ImageFont.load_default(13)
    gap, line = 8, 26
    scaled = [[_to_height(image, tile) for image in images] for _, images in rows]
    lines = [[row[start : start + columns] for start in range(0, len(row) or 1, columns)] for row in scaled]
    width = max([sum(image.width + gap for image in images) for row in lines for images in row] + [320]) + gap
    step = tile + gap + (20 if labels else 0)
    height = (line + 10 if title else 0) + sum(line + len(row) * step for row in lines) + gap
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    y = gap
    if title:
        draw.text((gap, y), title, fill="black", font=ImageFont.load_default(22))
        y += line + 10
    for index, ((name, _), row) in enumerate(zip(rows, lines, strict=True)):
        draw.text((gap, y), name, fill="black", font=font)
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


def _to_height(image: Image.Image, height: int) -> Image.Image:
    width = max(1, round(image.width * height / image.height))
    return image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
