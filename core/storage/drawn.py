"""Mark pictures as drawn by a program, and read such marks.

The mark is IPTC's digital source type in XMP, which photo galleries, search engines and Adobe's programs can read. It also
names this program and its version, and nothing else. `signature` signs the file after that.
"""

import base64
import io
import os
import re
from collections.abc import Mapping
from typing import BinaryIO, Literal

from PIL import Image, PngImagePlugin

from ..version import __version__
from .files import write_file
from .signature import hashes_in, signed

DRAWN = "trainedAlgorithmicMedia"
"""IPTC's digital source type of a picture that a model has drawn."""
PARTLY_DRAWN = "compositeWithTrainedAlgorithmicMedia"
"""The same for a picture that also contains parts of photos."""
_PROGRAM = "FaceLoRA "
"""The start of the name and version that our marks contain."""
_VOCABULARY = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_PACKET = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:xmp="http://ns.adobe.com/xap/1.0/" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    ' xmp:CreatorTool="{tool}" Iptc4xmpExt:DigitalSourceType="{type}"/></rdf:RDF></x:xmpmeta>'
    '<?xpacket end="r"?>'
)
_PNG_KEY, _JPEG_KEY = "XML:com.adobe.xmp", b"http://ns.adobe.com/xap/1.0/\0"
"""The names under which PNG and JPEG files have XMP."""
MARK_KEYS = {"xmp", _PNG_KEY}
"""The names under which Pillow has the mark of an opened PNG."""
# Programs write a property as an attribute, as an element, or as an element with a resource. Only its start is shown.
_TYPE = re.compile(rf"DigitalSourceType[^<]{{0,40}}?{re.escape(_VOCABULARY)}(\w{{1,100}})")
_TOOL = re.compile(r"""CreatorTool(?:\s*=\s*["']|>)([^<>"']{0,200})""")
PROGRAM_TEXTS = {"parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata"}
"""The names under which A1111, ComfyUI and InvokeAI write into the PNG files that they draw."""


def write_picture(
    target: BinaryIO,
    image: Image.Image,
    format: Literal["PNG", "JPEG", "WEBP"],
    texts: Mapping[str, str] | None = None,
    *,
    mark: str | None = DRAWN,
    hashes: Mapping[str, str] | None = None,
    is_copy: bool = False,
    signs: bool = True,
) -> None:
    """Write the picture with the mark, a digital source type, in it; unmarked for None. A PNG also has the texts by name.

    Nothing else that the picture came with is written. With c2pa-python, a marked picture is signed if `signs` is true. The
    signature names the models by their `hashes`, or by those in the text `parameters`. It names no program that drew a copy.
    """
    bare, file = image.copy(), io.BytesIO()
    bare.info = {}  # Otherwise a colour profile, EXIF data or a comment would be saved too.
    packet = _PACKET.format(tool=_PROGRAM + __version__, type=_VOCABULARY + mark) if mark else ""
    if format == "PNG":
        info = PngImagePlugin.PngInfo()
        for name, text in (texts or {}).items():
            # iTXt, which is UTF-8, is written only when necessary: not every program reads it.
            (info.add_text if text.isascii() else info.add_itxt)(name, text)
        if packet:
            info.add_itxt(_PNG_KEY, packet)
        bare.save(file, "PNG", pnginfo=info)
    elif format == "JPEG":
        segment = _JPEG_KEY + packet.encode()
        # Pillow writes XMP into JPEG files only since version 11.
        extra = b"\xff\xe1" + (2 + len(segment)).to_bytes(2, "big") + segment if packet else b""
        bare.save(file, "JPEG", quality=85, extra=extra)
    else:
        bare.save(file, "WEBP", quality=85, xmp=packet.encode())
    data = file.getvalue()
    if mark and signs:
        found = hashes_in((texts or {}).get("parameters", "")) if hashes is None else hashes
        data = signed(data, format, _VOCABULARY + mark, found, is_copy)
    target.write(data)


def save_png(
    path: str | os.PathLike[str],
    image: Image.Image,
    texts: Mapping[str, str] | None = None,
    *,
    mark: str | None = DRAWN,
    hashes: Mapping[str, str] | None = None,
    is_copy: bool = False,
) -> None:
    """Write a PNG as `write_picture` does, completely or not at all. Raises BadFile if it cannot be written."""
    write_file(path, lambda file: write_picture(file, image, "PNG", texts, mark=mark, hashes=hashes, is_copy=is_copy))


def jpeg_url(image: Image.Image, side: int, mark: str | None) -> str:
    """Return the picture as a data URL of a JPEG with the mark, its longer side at most `side` pixels."""
    small, data = image.convert("RGB"), io.BytesIO()
    small.thumbnail((side, side))
    write_picture(data, small, "JPEG", mark=mark, signs=False)  # Pages and metadata only have the mark.
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def mark_of(image: Image.Image) -> str | None:
    """Return an opened picture's digital source type, such as DRAWN or a camera's, without IPTC's address; None without one."""
    return (found := _TYPE.search(_xmp(image))) and found[1]


def tool_of(image: Image.Image) -> str | None:
    """Return the program that an opened picture's XMP names."""
    return (found := _TOOL.search(_xmp(image))) and found[1]


def inspect_mark(path: str | os.PathLike[str]) -> dict[str, str | None]:
    """Return the `digital_source_type` of the picture in a file and its `creator_tool`, the program that its XMP names."""
    with Image.open(path) as image:
        return {"digital_source_type": mark_of(image), "creator_tool": tool_of(image)}


def is_drawn(image: Image.Image) -> bool:
    """Return whether an opened picture is marked as drawn, or has a text of a program that draws. Photos have neither."""
    return mark_of(image) == DRAWN or not PROGRAM_TEXTS.isdisjoint(image.info)


def is_our_drawing(image: Image.Image) -> bool:
    """Return whether an opened picture is marked as drawn by this program, all of it or a part."""
    return mark_of(image) in (DRAWN, PARTLY_DRAWN) and (tool_of(image) or "").startswith(_PROGRAM)


def read_mark(path: str | os.PathLike[str]) -> str | None:
    """Return the mark for copies of the picture in a file: DRAWN, PARTLY_DRAWN, or None for what may be a photo."""
    with Image.open(path) as image:
        return DRAWN if is_drawn(image) else PARTLY_DRAWN if mark_of(image) == PARTLY_DRAWN else None


def _xmp(image: Image.Image) -> str:
    # Pillow only has a JPEG's XMP among its segments before version 11.
    segments = [data for _, data in getattr(image, "applist", ())]
    parts = [image.info.get("xmp"), image.info.get(_PNG_KEY), *(one for one in segments if one.startswith(_JPEG_KEY))]
    texts = [part.decode("utf-8", "replace") if isinstance(part, bytes) else part for part in parts]
    return "\n".join(text for text in texts if isinstance(text, str))
