"""The tables of photos in docs/photos.md: `python -m lab.photo_tables` measures them and writes them there.

With `--face-network` another network is measured on the same photos, and nothing is written: its limits can be read off.
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from core.faces import Face, FaceNetwork, embed_images, load_faces
from lab.face_figures import find_intruders, try_real_photos, verification
from tests.face_samples import NUMBERS, PEOPLE, orl
from tools.tables import table, write_tables

DOCUMENT = Path(__file__).parent.parent / "docs" / "photos.md"


class Remembering:
    """A face network that answers at once about a picture that it has seen before."""

    def __init__(self, network: FaceNetwork) -> None:
        self.name = network.name
        self._network = network
        self._faces: dict[bytes, list[Face]] = {}
        self._vectors: dict[tuple[bytes, bytes], np.ndarray] = {}

    def detect(self, image: Image.Image) -> list[Face]:
        key = _key(image)
        if key not in self._faces:
            self._faces[key] = self._network.detect(image)
        return self._faces[key]

    def embed(self, images: Sequence[Image.Image], faces: Sequence[Face]) -> np.ndarray:
        keys = [(_key(image), face.landmarks.tobytes()) for image, face in zip(images, faces, strict=True)]
        for key, image, face in zip(keys, images, faces, strict=True):
            if key not in self._vectors:
                self._vectors[key] = self._network.embed([image], [face])[0]
        return np.stack([self._vectors[key] for key in keys]) if keys else self._network.embed([], [])


def _key(image: Image.Image) -> bytes:
    return hashlib.sha256(image.tobytes()).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--face-network", default="sface", help="as for facelora check (default: %(default)s)")
    network = Remembering(load_faces(parser.parse_args().face_network))
    vectors = embed_images(network, [orl(person, number) for person in PEOPLE for number in NUMBERS])
    figures = verification(vectors, np.repeat(PEOPLE, len(NUMBERS)))
    found, wrongly = find_intruders(network)
    tables = {
        "verification": table(
            ("AUC", "equal-error rate", "at cosine", "same person, mean", "lowest 5 %", "other, mean", "highest 0.1 %"),
            [
                (
                    f"{figures.auc:.6f}",
                    f"{figures.equal_error_rate:.2%}",
                    f"{figures.threshold:.3f}",
                    f"{figures.same.mean():.2f}",
                    f"{np.quantile(figures.same, 0.05):.2f}",
                    f"{figures.other.mean():.2f}",
                    f"{np.quantile(figures.other, 0.999):.2f}",
                )
            ],
        ),
        "intruders": table(
            ("sets of 10", "intruders found", "right photos taken for someone else"),
            [(str(len(PEOPLE) * len(NUMBERS)), f"{found:.2%}", f"{wrongly:.2%}")],
        ),
    }
    if network.name == "sface":
        tables["tried"] = table(("photo", "verdict", "reasons"), try_real_photos(network))
        write_tables(DOCUMENT, tables)
    for title, content in tables.items():
        print(f"\n{title}\n{content}")


if __name__ == "__main__":
    main()
