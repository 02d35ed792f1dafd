"""Plots of the loss and of likeness scores as pictures, drawn with Pillow alone."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (640, 400)
MARGIN = 56
LINE = "#2563eb"


def loss_plot(history: Sequence[tuple[int, float]], title: str) -> Image.Image:
    """Plot the smoothed loss, (step, loss) pairs, by step. Without a history, the frame is empty."""
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


def score_plot(scores: Sequence[float], limits: Sequence[float]) -> Image.Image:
    """Draw a bar chart of likeness scores from 0 to 1, with a line at each limit. A score below 0 (no face) has no bar."""
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    left, top, right, bottom = MARGIN, MARGIN, SIZE[0] - 16, SIZE[1] - 40
    draw.text((left, 14), "likeness", fill="black", font=ImageFont.load_default(18))
    small = ImageFont.load_default(12)
    width = (right - left) / max(1, len(scores))
    for index, score in enumerate(scores):
        x, y = left + index * width, bottom - (bottom - top) * min(max(score, 0.0), 1.0)
        draw.rectangle((x + 0.1 * width, y, x + 0.9 * width, bottom), fill=LINE)
        if width > 30:
            draw.text(
                (x + width / 2, bottom + 8),
                f"{score:.2f}" if score >= 0 else "-",
                fill="#475569",
                font=small,
                anchor="ma",
            )
    for limit in limits:
        y = bottom - (bottom - top) * limit
        draw.line((left, y, right, y), fill="#dc2626")
        draw.text((8, y - 7), f"{limit:.2f}", fill="#475569", font=small)
    draw.rectangle((left, top, right, bottom), outline="#cbd5e1")
    return image
