"""What a picture shows, in the few words that a small base model can learn: read in its prompt, or measured in its colours."""

import random

import numpy as np

SEX = {
    "woman": "woman women female lady her she feminine girlfriend wife mother mom grandmother grandma actress queen princess "
    "duchess baroness empress bride widow sister aunt waitress seamstress policewoman cowgirl nun ballerina herself",
    "man": "man men male guy gentleman dude his he him masculine boyfriend husband father dad grandfather grandpa king prince "
    "duke baron groom brother uncle waiter policeman cowboy monk priest himself beard bearded mustache moustache goatee",
}
AGE = {
    "young": "young youthful twenties",
    "middle-aged": "middle forties fifties mature adult",
    "old": "old older elderly senior grandmother grandfather grandma grandpa sixties seventy eighty ageing aging wrinkled",
}
BEARD = frozenset(["beard", "bearded", "goatee", "whiskers", "mutton", "bushy"])
GLASSES = frozenset(["glasses", "spectacles", "sunglasses", "monocle"])
SMILE = frozenset(
    ["smiling", "smile", "smiles", "laughing", "laugh", "grin", "grinning", "happy", "cheerful", "joyful"]
)


def describe(crop: np.ndarray, words: list[str], share: float) -> dict[str, object]:
    """What a cut picture shows, word by word, and nothing where it is unclear. `share` is the face's share of its width."""
    pixels = crop.astype(np.float32)
    height, width = pixels.shape[:2]
    has, known = set(words), {}
    for kind, table in (("who", SEX), ("age", AGE)):
        found = [word for word, signs in table.items() if has & set(signs.split())]
        if len(found) == 1:
            known[kind] = found[0]
    years = [int(word) for word in words if word.isdigit() and 18 <= int(word) < 100]
    if len(years) == 1 and "old" in has:
        known["age"] = "young" if years[0] < 33 else "middle-aged" if years[0] < 58 else "old"
    known |= {name: True for name, signs in (("beard", BEARD), ("glasses", GLASSES), ("smile", SMILE)) if has & signs}
    corners = [pixels[: height // 6, : width // 8], pixels[: height // 6, -width // 8 :]]
    left, right = (np.median(corner.reshape(-1, 3), axis=0) for corner in corners)
    if np.abs(left - right).max() < 40:
        known["background"] = colour_name((left + right) / 2)
    if has & {"bald", "balding", "hairless", "hat", "cap", "helmet", "turban", "hijab", "crown", "hood", "beret"}:
        known |= {"hair": "bald"} if has & {"bald", "hairless"} else {}
    else:
        # The face's box is in the middle and ends at the forehead: hair is above it.
        forehead = 0.53 - 0.65 * share * width / height
        rows = slice(max(0, round((forehead - 0.09) * height)), max(8, round((forehead - 0.01) * height)))
        centre = slice(round(0.42 * width), round(0.58 * width))
        hair, skin = (
            np.median(pixels[part, centre].reshape(-1, 3), axis=0) for part in (rows, slice(height // 2, -height // 3))
        )
        if min(np.abs(hair - (left + right) / 2).max(), np.abs(hair - skin).max()) > 25:
            known["hair"] = hair_name(hair)
    if share < 0.58:
        shoulders = [
            pixels[-height // 16 :, width // 5 : width // 3],
            pixels[-height // 16 :, -width // 3 : -width // 5],
        ]
        colours = [np.median(shoulder.reshape(-1, 3), axis=0) for shoulder in shoulders]
        if np.abs(colours[0] - colours[1]).max() < 40:
            known["clothes"] = colour_name(np.mean(colours, axis=0))
    grey = pixels.mean(axis=-1)[round(0.3 * height) : round(0.75 * height), round(0.25 * width) : round(0.75 * width)]
    sides = np.abs(np.diff([half.mean() for half in np.array_split(grey, 2, axis=1)]))[0]
    known["light"] = "side" if sides > 35 else "dark" if grey.mean() < 80 else "bright" if grey.mean() > 165 else "soft"
    return known


def colour_name(colour: np.ndarray) -> str:
    """The plain word for an RGB colour."""
    red, green, blue = (float(value) for value in colour)
    light, chroma = max(red, green, blue), max(red, green, blue) - min(red, green, blue)
    if light < 45:
        return "black"
    if chroma < 28 or chroma / light < 0.14:
        return "white" if light > 205 else "grey" if light > 100 else "dark grey"
    hue = (np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)) + 360) % 360
    if hue < 50 or hue >= 340:
        return "brown" if light < 150 or chroma / light < 0.45 else "red" if hue < 18 or hue >= 340 else "orange"
    names = ((70, "yellow"), (165, "green"), (200, "teal"), (255, "blue"), (290, "purple"), (340, "pink"))
    name = next(name for limit, name in names if hue < limit)
    return (
        "navy blue"
        if name == "blue" and light < 110
        else "beige"
        if name == "yellow" and chroma / light < 0.4
        else name
    )


def hair_name(colour: np.ndarray) -> str:
    """The plain word for hair of an RGB colour."""
    name, light = colour_name(colour), float(colour.max())
    red, _, blue = (float(value) for value in colour)
    if name in ("brown", "orange", "beige", "yellow", "red"):
        if light < 60:
            return "black"
        if name in ("red", "orange") or (red > 2.6 * blue and light > 110):
            return "red"
        return "blonde" if light > 165 else "brown"
    return {"dark grey": "black" if light < 75 else "grey", "navy blue": "black", "white": "white"}.get(name, name)


def sex_by_face(rows: list[dict], vectors: np.ndarray) -> None:
    """Tell men from women where the words do not, by ridge regression on the identity vectors of the faces with words."""
    known = np.array([{"man": -1.0, "woman": 1.0}.get(str(row.get("who")), 0.0) for row in rows])
    inputs, answers = vectors[known != 0], known[known != 0]
    weights = np.linalg.solve(inputs.T @ inputs + 3 * np.eye(inputs.shape[1]), inputs.T @ answers)
    scores = vectors @ weights
    print(f"sex by face: right in {np.mean(np.sign(scores[known != 0]) == answers):.3f} of {len(answers)}")
    for row, score in zip(rows, scores, strict=True):
        if "who" not in row and abs(score) > 0.25:
            row["who"] = "woman" if score > 0 else "man"


def caption(known: dict, draw: random.Random) -> str:
    """A caption as a user would write it: some of what is known, in changing order; sometimes nothing at all."""
    if draw.random() < 0.1:
        return ""
    who = known.get("who", "person") if draw.random() < 0.85 else "person"
    subject = f"{known['age']} {who}" if "age" in known and draw.random() < 0.7 else who
    parts = [f"{known[kind]} {kind}" for kind in ("background", "clothes", "light") if kind in known]
    if "hair" in known:
        parts.append("bald" if known["hair"] == "bald" else f"{known['hair']} hair")
    parts += [word for word in ("beard", "glasses", "smile") if word in known]
    share = known["share"]
    parts.append("close-up" if share > 0.66 else "head and shoulders" if share < 0.47 else "portrait")
    chosen = draw.sample(parts, draw.randint(0, len(parts)))
    medium = "painting" if known["source"] == "artflow" else "photo"
    return ", ".join([f"a {medium} of a {subject}", *chosen])
