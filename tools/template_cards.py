"""Makes the square pictures of the template browser from pictures of the docs: `python -m tools.template_cards`.

They are drawn by the demo's base model after the demo's training: the second row of `docs/demo.png` is the person with the
LoRA, its fourth the class with it.
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
    "8": ["person 7", "person 4", "class 1", "class 4"],
    "9": ["base 3", "person 3", "person 5", "person 7"],
    "Inspect": ["person 7"],
    "One": ["person 0", "person 3", "person 6", "person 4"],
}
"""First word of a workflow's name -> the faces of its card, by row and place."""
GROUPS = {"7": [(8, 371), (434, 371)]}
"""The same of one for several people -> the corners in `docs/images/group.jpg` of two pictures, each half of its card."""
PAIR = (204, 102)
"""The size of what is taken of each, in pixels."""


def face(sheet: Image.Image, name: str) -> Image.Image:
    """The middle of a picture, as a square."""
    row, place = name.split()
    left, top = 8 + 136 * int(place), ROWS[row] + (FACE[1] - FACE[0]) // 2
    return sheet.crop((left, top, left + FACE[0], top + FACE[0]))


def card_of_faces(sheet: Image.Image, faces: list[str]) -> Image.Image:
    columns = 1 if len(faces) == 1 else 2
    side = SIDE // columns
    card = Image.new("RGB", (SIDE, SIDE))
    for index, name in enumerate(faces):
        small = face(sheet, name).resize((side, side), Image.Resampling.LANCZOS)
        card.paste(small, (index % columns * side, index // columns * side))
    return card


def card_of_pairs(sheet: Image.Image, corners: list[tuple[int, int]]) -> Image.Image:
    card = Image.new("RGB", (SIDE, SIDE))
    for index, (left, top) in enumerate(corners):
        pair = sheet.crop((left, top, left + PAIR[0], top + PAIR[1]))
        card.paste(pair.resize((SIDE, SIDE // 2), Image.Resampling.LANCZOS), (0, index * SIDE // 2))
    return card


def main() -> None:
    people = Image.open(ROOT / "docs" / "demo.png").convert("RGB")
    groups = Image.open(ROOT / "docs" / "images" / "group.jpg").convert("RGB")
    for workflow in (ROOT / "workflows").glob("*.json"):
        word = workflow.name.partition(" ")[0]
        card = card_of_pairs(groups, GROUPS[word]) if word in GROUPS else card_of_faces(people, CARDS[word])
        card.save(workflow.with_name(workflow.name.removesuffix(".json") + ".jpg"), quality=85)


if __name__ == "__main__":
    main()
