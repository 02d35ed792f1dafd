"""The loss curve as a picture, drawn with Pillow alone."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (640, 400)
MARGIN = 56
LINE = "#2563eb"


def loss_plot(history: Sequence[tuple[int, float]], title: str) -> Image.Image:
    """The smoothed loss over the steps; an empty frame with the title when there is no history."""
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = MARGIN, MARGIN, SIZE[0] - 16, SIZE[1] - 40
    draw.text((left, 14), title, fill="black", font=ImageFont.load_default(18))
    draw.rectangle((left, top, right, bottom), outline="#cbd5e1")
    if not history:
        return image
    small = ImageFont.load_default(12)
    last = max(step for step, _ in history)
    low, high = min(loss for _, loss in history), max(loss for _, loss in history)
    spread = (high - low) or abs(high) or 1.0
    low, high = low - 0.05 * spread, high + 0.05 * spread
    for part in range(5):
        y = bottom - part * (bottom - top) / 4
        draw.line((left, y, right, y), fill="#e2e8f0")
        draw.text((4, y - 7), f"{low + part * (high - low) / 4:.4f}", fill="#475569", font=small)
        x = left + part * (right - left) / 4
        draw.text((x - 8, bottom + 8), f"{last * part / 4:.0f}", fill="#475569", font=small)
    points = [
        (left + (right - left) * step / last, bottom - (bottom - top) * (loss - low) / (high - low))
        for step, loss in history
    ]
    if len(points) == 1:
        x, y = points[0]
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=LINE)
    else:
        draw.line(points, fill=LINE, width=2, joint="curve")
    return image
