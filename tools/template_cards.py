"""Makes the square pictures of the template browser from `docs/demo.png`: `python -m tools.template_cards`.

They are drawn by the demo's base model after the demo's training: its second row is the person with the LoRA, its fourth
the class with it.
"""

from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SIDE = 384
FACE = (128, 160)
ROWS = {"base": 70, "person": 284, "class": 712}
"""Upper edge of the rows of `docs/demo.png`, in pixels."""
CARDS = {
    "1": ["person 7", "person 4", "person 1", "person 6"],
    "2": ["person 6", "person 0", "person 2", "person 5"],
    "3": ["person 4", "person 7", "person 3", "person 1"],
    "4": ["person 2", "person 5", "person 7", "person 0"],
    "5": ["person 3", "person 6", "person 1", "person 4"],
    "6": ["person 1", "person 2", "person 5", "person 3"],
    "7": ["person 7", "person 4", "class 1", "class 4"],
    "8": ["base 3", "person 3", "person 5", "person 7"],
    "9": ["person 7"],
}
"""First letter of a workflow's name -> the faces of its card, by row and place."""


def face(sheet: Image.Image, name: str) -> Image.Image:
    """The middle of a picture, as a square."""
    row, place = name.split()
    left, top = 8 + 136 * int(place), ROWS[row] + (FACE[1] - FACE[0]) // 2
    return sheet.crop((left, top, left + FACE[0], top + FACE[0]))


def main() -> None:
    sheet = Image.open(ROOT / "docs" / "demo.png").convert("RGB")
    for workflow in (ROOT / "workflows").glob("*.json"):
        faces = CARDS[workflow.name[0]]
        columns = 1 if len(faces) == 1 else 2
        side = SIDE // columns
        card = Image.new("RGB", (SIDE, SIDE))
        for index, name in enumerate(faces):
            small = face(sheet, name).resize((side, side), Image.Resampling.LANCZOS)
            card.paste(small, (index % columns * side, index // columns * side))
        card.save(workflow.with_name(workflow.name.removesuffix(".json") + ".jpg"), quality=85)


if __name__ == "__main__":
    main()
