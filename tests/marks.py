"""The mark of drawn pictures as other programs read it: Pillow with Python's XML parser, and exiftool where it is installed."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

try:
    import c2pa  # pyright: ignore[reportMissingImports]
except ImportError:
    c2pa = None

EXIFTOOL = shutil.which("exiftool")
"""On Debian, the package libimage-exiftool-perl."""
_NAMES = {
    "DigitalSourceType": "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType",
    "CreatorTool": "{http://ns.adobe.com/xap/1.0/}CreatorTool",
}


def mark_in(path: Path) -> tuple[str, str] | None:
    """The picture's digital source type, without the address of IPTC's vocabulary, and the program that wrote it."""
    packets = re.findall(rb"<x:xmpmeta.*?</x:xmpmeta>", path.read_bytes(), re.DOTALL)
    assert len(packets) <= 1
    values = _values(packets[0]) if packets else {}
    if c2pa and path.suffix == ".png":
        assert is_signed(path) == bool(values)
    if EXIFTOOL:
        seen = exiftool(path)
        assert {name: seen[name] for name in _NAMES if name in seen} == values
    if not values:
        return None
    vocabulary, _, word = values["DigitalSourceType"].rpartition("/")
    assert vocabulary == "http://cv.iptc.org/newscodes/digitalsourcetype"
    return word, values["CreatorTool"]


def is_signed(path: Path) -> bool:
    """Whether the picture has a signature that C2PA's own reader finds valid. Its own settings ask for a trusted issuer."""
    assert c2pa
    settings = c2pa.Settings.from_dict({"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}})
    kind = {".jpg": "jpeg"}.get(path.suffix, path.suffix[1:])
    reader = c2pa.Reader.try_create(f"image/{kind}", io.BytesIO(path.read_bytes()), context=c2pa.Context(settings))
    return reader is not None and reader.get_validation_state() == "Valid"


def exiftool(path: Path) -> dict[str, Any]:
    """Everything that exiftool reads in a picture."""
    assert EXIFTOOL
    return json.loads(subprocess.check_output([EXIFTOOL, "-json", "-n", path]))[0]


def _values(packet: bytes) -> dict[str, str]:
    (described,) = ElementTree.fromstring(packet).iter("{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    return {name: described.attrib[key] for name, key in _NAMES.items()}
