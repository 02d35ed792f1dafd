"""Draw a schematic picture of a style from its data: shape, framing, surroundings and light.

It is used for styles without an example picture. It shows no person, and only what the texts describe.
"""

import re
from xml.sax.saxutils import escape

from ..core.errors import one_line
from ..core.pictures.style_pack import Style

HEIGHT = 120
"""The height of every picture in pixels; the width follows from the style's aspect."""

HEAD_SIZES = {"close-up": 0.6, "head-and-shoulders": 0.42, "chest-up": 0.32, "waist-up": 0.23}
"""The height of the head for each framing, as a share of the picture's height."""

# The colours at the top and bottom for each word in the style's texts. The first match is used.
PLAIN = {
    "white": ("#f6f6f4", "#e6e6e3"), "cream": ("#f3e8d2", "#e4d5b8"), "beige": ("#e6d5bb", "#d1bd9d"),
    "sand": ("#e2cfa9", "#cbb488"), "light grey": ("#d5d7d9", "#bfc2c5"), "pale grey": ("#d5d7d9", "#bfc2c5"),
    "mid-grey": ("#9a9ea2", "#84888c"), "charcoal": ("#45484c", "#2e3033"), "black": ("#1d1d1f", "#0e0e10"),
    "dark grey": ("#5a5d61", "#414448"), "dark blue": ("#25365c", "#162342"), "navy": ("#25365c", "#162342"),
    "mustard": ("#d9a93a", "#c08f22"),
    "orange": ("#ee8b45", "#e0679b"), "sage": ("#a9b79b", "#8fa081"), "blue": ("#a9c3d9", "#88a8c4"),
    "green": ("#93b08a", "#74976b"), "brown": ("#6e5747", "#4e3c30"), "dark": ("#4a4a4e", "#2b2b2f"),
    "grey": ("#b4b7ba", "#989c9f"), "concrete": ("#c2c0bb", "#a9a7a1"), "plaster": ("#ece7dd", "#d9d2c4"),
}  # fmt: skip
SCENES = {
    "neon": ("#3b1f5e", "#16213f"), "dusk": ("#7a5c8e", "#2f3550"), "golden hour": ("#f2c678", "#b08a45"),
    "autumn": ("#d9914a", "#8a5528"), "winter": ("#e3edf4", "#bccbd6"), "sea": ("#bcd9e6", "#d8cba8"),
    "mountain": ("#b9d0e0", "#7f9a78"), "park": ("#a9cd9a", "#6d9a60"), "houseplants": ("#9cc08f", "#5f8a57"),
    "skyline": ("#b7cbe0", "#8d9db0"), "steps": ("#cfcac1", "#aaa499"), "street": ("#b9bfc6", "#8a8f96"),
    "crossing": ("#b9bfc6", "#8a8f96"), "terrace": ("#cdbf9f", "#9a8a6a"), "courtyard": ("#c6cdb0", "#9a9d80"),
    "facade": ("#c9ced2", "#a2a8ad"), "glass": ("#cfe2ea", "#a9c4d0"), "marble": ("#eeeae4", "#cfc8be"),
    "brick": ("#b4694e", "#8a4a36"), "wood": ("#8f6440", "#62422a"), "books": ("#8a6848", "#5c4330"),
    "library": ("#8a6848", "#5c4330"), "workshop": ("#a98c6a", "#75604a"), "coffee": ("#a67c55", "#6f4f36"),
    "theatre": ("#5b3a44", "#34222b"), "club": ("#46384f", "#221c2c"), "stage": ("#2b3a66", "#161d38"),
    "news": ("#5a7fb0", "#33507c"), "microphone": ("#5d5560", "#3b3540"), "musician": ("#8a6a55", "#51403a"),
    "chef": ("#b9a894", "#8b7b69"), "editing desk": ("#3c4a5e", "#252d3b"), "laboratory": ("#dbe7ea", "#b3c6cb"),
    "scientist": ("#dbe7ea", "#b3c6cb"), "hospital": ("#e2eff0", "#bcd3d5"), "nurse": ("#e2eff0", "#bcd3d5"),
    "lecture": ("#c8b99e", "#978768"), "whiteboard": ("#f2f4f5", "#cdd3d7"), "dance": ("#e6dfd6", "#b79f83"),
    "home": ("#e2d3bd", "#b79f80"), "desk": ("#d8d2c6", "#ab9f8c"), "room": ("#dcd3c4", "#b3a58f"),
    "office": ("#dde5ea", "#b4c0c8"), "rainy": ("#8f9aa5", "#5f6a75"),
}  # fmt: skip
UNKNOWN = ("#cdd0d3", "#a9adb1")


def style_picture(style: Style) -> str:
    """Draw an SVG picture of HEIGHT pixels: a featureless figure in the style's frame, surroundings and light."""
    wording = style.prompts.get("tags") or style.prompts["sentences"]
    first = {axis: values[0] for axis, values in style.axes.items()}
    prompt = re.sub(r"\{(\w+)\}", lambda axis: first.get(axis[1], ""), wording.prompt).lower()
    coloured = prompt.replace("black and white", "")
    top, bottom = _surroundings(style, first.get("background", ""), coloured)
    if prompt != coloured:
        top, bottom = _grey(top), _grey(bottom)
    across, down = map(float, style.aspect.split(":"))
    width = HEIGHT * across / down
    head = HEAD_SIZES.get(style.framing, HEAD_SIZES["head-and-shoulders"]) * HEIGHT
    lit, dark, (x1, x2) = "#f0e9e1", "#8d857d", _light(first.get("light", prompt))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{HEIGHT}" viewBox="0 0 {width:.0f} {HEIGHT}">'
        f"<title>{escape(one_line(style.name))}</title>"
        f"<defs>{_gradient('back', (0, 0), (0, 1), top, bottom)}{_gradient('light', (x1, 0), (x2, 0.3), lit, dark)}</defs>"
        f'<rect width="100%" height="100%" fill="url(#back)"/>{_figure(width / 2, head)}</svg>'
    )


def _surroundings(style: Style, background: str, prompt: str) -> tuple[str, str]:
    """Return the colours (top, bottom) of the backdrop if one is named, else of the place, else UNKNOWN."""
    plain = re.search(r"backdrop|background|seamless|wall|canvas|paper|plaster", background or prompt) is not None
    tables = (PLAIN, SCENES) if plain else (SCENES, PLAIN)
    for text in (background.lower(), style.name.lower(), prompt):
        for table in tables:
            for word, colours in table.items():
                if re.search(rf"\b{word}", text):
                    return colours
    return UNKNOWN


def _light(text: str) -> tuple[float, float]:
    """Return the points between which the light falls off, as shares of the figure's width."""
    if re.search(r"both sides|even|front|diffuse|overcast|shade|flat", text):
        return 0.2, 2.4
    return (1.0, 0.0) if re.search(r"\bright\b", text) else (0.0, 1.0)


def _gradient(name: str, start: tuple[float, float], end: tuple[float, float], first: str, last: str) -> str:
    (x1, y1), (x2, y2) = start, end
    return (
        f'<linearGradient id="{name}" x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"><stop stop-color="{first}"/>'
        f'<stop offset="1" stop-color="{last}"/></linearGradient>'
    )


def _figure(middle: float, head: float) -> str:
    """Return the SVG shapes of a head of that height, with neck and shoulders down to the picture's edge."""
    above = min(0.3 * head, 0.14 * HEIGHT)
    centre, neck = above + head / 2, above + 1.05 * head
    # The numbers below are shares of the head's height, from the middle and from the end of the neck.
    x, y = (lambda share: f"{middle + share * head:.1f}"), (lambda share: f"{neck + share * head:.1f}")
    body = (
        f"M{x(-1.3)} {HEIGHT} C{x(-1.3)} {y(0.9)} {x(-1.25)} {y(0.45)} {x(-0.95)} {y(0.32)} L{x(-0.26)} {y(0.06)} "
        f"L{x(-0.2)} {centre:.1f} H{x(0.2)} L{x(0.26)} {y(0.06)} L{x(0.95)} {y(0.32)} "
        f"C{x(1.25)} {y(0.45)} {x(1.3)} {y(0.9)} {x(1.3)} {HEIGHT} Z"
    )
    return (
        f'<path d="{body}" fill="url(#light)" stroke="#0003"/>'
        f'<ellipse cx="{middle:.1f}" cy="{centre:.1f}" rx="{0.37 * head:.1f}" ry="{head / 2:.1f}" fill="url(#light)" '
        'stroke="#0003"/>'
    )


def _grey(colour: str) -> str:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    level = round(0.299 * red + 0.587 * green + 0.114 * blue)
    return f"#{level:02x}{level:02x}{level:02x}"
