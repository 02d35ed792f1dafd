"""A person's LoRA and a style's together, measured: `python -m tools.lora_pairs DIR PHOTOS...` fills in docs/methods.md.

DIR is what `python -m tools.method_tables DIR PHOTOS...` has written: the people's LoRAs are taken from there, and the style's,
an oval on white learnt from people whom the base knows, is trained into it.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from core.config import TrainConfig
from core.demo import BASE_FILE
from core.demo.people import SEEN_PEOPLE, person_photos
from core.faces import embed_images, likeness, load_faces, mean_face
from core.lora.file import LoraFile
from core.models import load_base
from core.photos import Photo, Thresholds, make_ready, read_photos
from core.pictures.generate import GenerateConfig, Job, generate
from core.training import train
from core.training.samples import SAMPLE_BATCH
from tools.method_tables import DOCUMENT
from tools.photo_tables import replace_table, table

PROMPT, STYLE_PROMPT = "a photo of sks person, cameo", "a photo of person, cameo"
STRENGTHS = {"person": (1.0, 0.8, 0.6), "style": (0.0, 0.5, 1.0)}
PICTURES, SIZE = 8, (64, 80)
CONFIG = TrainConfig(
    steps=100, batch_size=8, learning_rate=4e-3, schedule="cosine", warmup_steps=10, min_snr_gamma=0.0, precision="fp32"
)


def as_cameo(image: Image.Image) -> Image.Image:
    """The picture in an oval on white."""
    oval = Image.new("L", image.size, 0)
    ImageDraw.Draw(oval).ellipse((0, 0, *image.size), fill=255)
    return Image.composite(image, Image.new("RGB", image.size, "white"), oval)


def corners(images: Sequence[Image.Image]) -> float:
    """How light the four corners are, an eighth of the width each way: a mean in grey levels, 255 for white."""
    side = images[0].width // 8
    greys = np.stack([np.asarray(image.convert("L"), float) for image in images])
    at_both_ends = np.r_[:side, -side:0]
    return float(greys[:, at_both_ends][:, :, at_both_ends].mean())


def train_style(output: Path) -> LoraFile:
    if not output.exists():
        people = [person for person in SEEN_PEOPLE if person % 4 == 0]
        photos = [
            Photo.from_image(as_cameo(person_photos(person)[0]), f"{person}.png", STYLE_PROMPT) for person in people
        ]
        train(photos, BASE_FILE, CONFIG, output=output, restart=True)
    return LoraFile.read(output)


def spread(values: Sequence[float], decimals: int) -> str:
    return f"{np.mean(values):.{decimals}f} ± {np.std(values):.{decimals}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("people", type=Path, nargs="+", metavar="PHOTOS")
    options = parser.parse_args()
    base, faces, style = load_base(BASE_FILE), load_faces(), train_style(options.folder / "style.safetensors")
    jobs = [Job(PROMPT, seed, size=SIZE, steps=8, guidance=2.5) for seed in range(1, PICTURES + 1)]
    measured: dict[tuple[float, float], list[tuple[float, float]]] = {}
    for folder in options.people:
        lora = LoraFile.read(options.folder / f"{folder.name}-lora.safetensors")
        ready = make_ready(read_photos(folder), faces, Thresholds(), check=False, hold_out=2)
        centre = mean_face(ready.vectors(ready.held_out))
        assert centre is not None
        for of_person in STRENGTHS["person"]:
            for of_style in STRENGTHS["style"]:
                files = [(lora, of_person), (style, of_style)]
                drawn = generate(base, files, jobs, GenerateConfig(batch_size=SAMPLE_BATCH, precision="fp32"))
                images = [picture.image for picture in drawn]
                alike = np.nan_to_num(likeness(embed_images(faces, images), centre[None])[:, 0]).mean()
                measured.setdefault((of_person, of_style), []).append((float(alike), corners(images)))
                print(folder.name, of_person, of_style, f"{alike:.2f} {corners(images):.1f}", flush=True)
    rows = [
        (
            str(of_person),
            str(of_style),
            spread([alike for alike, _ in found], 2),
            spread([light for _, light in found], 0),
        )
        for (of_person, of_style), found in measured.items()
    ]
    header = ("the person's", "the style's", "likeness (to held-out photos)", "corners (grey levels, white is 255)")
    DOCUMENT.write_text(replace_table(DOCUMENT.read_text("utf-8"), "pairs", table(header, rows)), "utf-8")


if __name__ == "__main__":
    main()
