"""Plots of the loss and of likeness scores as pictures, drawn with Pillow alone."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

SIZE = (640, 400)
LEFT, TOP, RIGHT, BOTTOM = FRAME = (56, 56, SIZE[0] - 16, SIZE[1] - 40)
WIDTH, HEIGHT = RIGHT - LEFT, BOTTOM - TOP
LINE = "#2563eb"


def _empty_plot(title: str) -> tuple[Image.Image, ImageDraw.ImageDraw, ImageFont.FreeTypeFont | ImageFont.ImageFont]:
    """Return a picture with that title, what draws on it, and the font of its labels."""
    image = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(image)
    draw.text((LEFT, 14), title, fill="black", font=ImageFont.load_default(18))
    return image, draw, ImageFont.load_default(12)


def loss_plot(history: Sequence[tuple[int, float]], title: str) -> Image.Image:
    """Plot the smoothed loss, (step, loss) pairs, by step. Without a history, the frame is empty."""
    image, draw, small = _empty_plot(title)
    draw.rectangle(FRAME, outline="#cbd5e1")
    if not history:
        return image
    last = max(step for step, _ in history)
    low, high = min(loss for _, loss in history), max(loss for _, loss in history)
    spread = (high - low) or abs(high) or 1.0
    low, high = low - 0.05 * spread, high + 0.05 * spread
    for part in range(5):
        y = BOTTOM - part * HEIGHT / 4
        draw.line((LEFT, y, RIGHT, y), fill="#e2e8f0")
        draw.text((4, y - 7), f"{low + part * (high - low) / 4:.4f}", fill="#475569", font=small)
        x = LEFT + part * WIDTH / 4
        draw.text((x - 8, BOTTOM + 8), f"{last * part / 4:.0f}", fill="#475569", font=small)
    points = [(LEFT + WIDTH * step / last, BOTTOM - HEIGHT * (loss - low) / (high - low)) for step, loss in history]
    if len(points) == 1:
        x, y = points[0]
        draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=LINE)
    else:
        draw.line(points, fill=LINE, width=2, joint="curve")
    return image


def score_plot(scores: Sequence[float], limits: Sequence[float]) -> Image.Image:
    """Draw a bar chart of likeness scores from 0 to 1, with a line at each limit. A score below 0 (no face) has no bar."""
    image, draw, small = _empty_plot("likeness")
    width = WIDTH / max(1, len(scores))
    for index, score in enumerate(scores):
        x, y = LEFT + index * width, BOTTOM - HEIGHT * min(max(score, 0.0), 1.0)
        draw.rectangle((x + 0.1 * width, y, x + 0.9 * width, BOTTOM), fill=LINE)
        if width > 30:
            text = f"{score:.2f}" if score >= 0 else "-"
            draw.text((x + width / 2, BOTTOM + 8), text, fill="#475569", font=small, anchor="ma")
    for limit in limits:
        y = BOTTOM - HEIGHT * limit
        draw.line((LEFT, y, RIGHT, y), fill="#dc2626")
        draw.text((8, y - 7), f"{limit:.2f}", fill="#475569", font=small)
    draw.rectangle(FRAME, outline="#cbd5e1")
    return image
