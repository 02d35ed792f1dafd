"""The mark in pictures that a program has drawn, as other programs read and write it."""

import base64

import pytest
from PIL import Image, PngImagePlugin

from core.storage.drawn import DRAWN, PARTLY_DRAWN, inspect_mark, is_drawn, jpeg_url, mark_of, save_png, write_picture
from core.version import __version__
from tests.marks import EXIFTOOL, c2pa, exiftool, mark_in

FORMATS = {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}


@pytest.fixture(params=FORMATS)
def marked(request, tmp_path):
    """A picture in each format with the mark, and the same without it."""
    paths = {mark: tmp_path / f"{mark}{FORMATS[request.param]}" for mark in (DRAWN, None)}
    for mark, path in paths.items():
        with path.open("wb") as file:
            write_picture(file, Image.new("RGB", (64, 80), "teal"), request.param, mark=mark)
    return paths


def test_other_programs_read_that_a_program_drew_the_picture(marked):
    assert mark_in(marked[DRAWN]) == (DRAWN, f"FaceLoRA {__version__}")
    assert mark_in(marked[None]) is None


@pytest.mark.skipif(EXIFTOOL is None, reason="needs exiftool")
def test_exiftool_warns_of_nothing_in_the_mark(marked):
    assert "Warning" not in exiftool(marked[DRAWN])


def test_the_mark_is_read_back_and_takes_less_than_a_kilobyte_and_four_with_a_signature(marked):
    with Image.open(marked[DRAWN]) as image:
        assert mark_of(image) == DRAWN and is_drawn(image)
    with Image.open(marked[None]) as image:
        assert mark_of(image) is None and not is_drawn(image)
    tool = f"FaceLoRA {__version__}"
    assert inspect_mark(marked[DRAWN]) == {"digital_source_type": DRAWN, "creator_tool": tool}
    assert inspect_mark(marked[None]) == {"digital_source_type": None, "creator_tool": None}
    assert marked[DRAWN].stat().st_size - marked[None].stat().st_size < (1024 if c2pa is None else 5000)


@pytest.mark.parametrize(
    "words",
    [
        'xmlns:a="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" a:DigitalSourceType="{}"',
        "><a:DigitalSourceType>{}</a:DigitalSourceType>",
        '><Iptc4xmpExt:DigitalSourceType rdf:resource="{}"/>',
    ],
)
def test_a_mark_in_another_programs_words_is_read(words, tmp_path):
    info = PngImagePlugin.PngInfo()
    address = f"http://cv.iptc.org/newscodes/digitalsourcetype/{DRAWN}"
    info.add_itxt("XML:com.adobe.xmp", f"<rdf:Description {words.format(address)}", zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    with Image.open(tmp_path / "a.png") as image:
        assert mark_of(image) == DRAWN


def test_only_the_start_of_a_long_mark_is_read(tmp_path):
    info = PngImagePlugin.PngInfo()
    address = f"http://cv.iptc.org/newscodes/digitalsourcetype/{'a' * 9000}"
    info.add_itxt("XML:com.adobe.xmp", f'<a DigitalSourceType="{address}" CreatorTool="{"b" * 9000}"/>')
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    assert inspect_mark(tmp_path / "a.png") == {"digital_source_type": "a" * 100, "creator_tool": "b" * 200}


@pytest.mark.parametrize("name", ["parameters", "prompt", "invokeai_metadata"])
def test_a_picture_without_the_mark_is_drawn_if_a_program_that_draws_recorded_itself(name, tmp_path):
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), {name: "{}"}, mark=None)
    with Image.open(tmp_path / "a.png") as image:
        assert is_drawn(image) and mark_of(image) is None


def test_a_sheet_of_drawn_pictures_and_photos_does_not_count_as_drawn(tmp_path):
    save_png(tmp_path / "a.png", Image.new("RGB", (8, 8)), mark=PARTLY_DRAWN)
    with Image.open(tmp_path / "a.png") as image:
        assert mark_of(image) == PARTLY_DRAWN and not is_drawn(image)


def test_a_saved_picture_has_the_texts_and_the_mark_and_nothing_else(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.info = {"icc_profile": b"profile", "exif": b"Exif\0\0", "comment": b"private"}
    save_png(tmp_path / "a.png", image, {"parameters": "sks", "name": "Zoë"})
    with Image.open(tmp_path / "a.png") as saved:
        assert {*saved.info} - {"xmp"} == {"XML:com.adobe.xmp", "parameters", "name"}
        assert saved.info["parameters"] == "sks" and saved.info["name"] == "Zoë"


def test_a_data_url_is_a_small_jpeg(tmp_path):
    url = jpeg_url(Image.new("RGBA", (400, 200)), 100, DRAWN)
    (tmp_path / "a.jpg").write_bytes(base64.b64decode(url.removeprefix("data:image/jpeg;base64,")))
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.size == (100, 50) and image.format == "JPEG"
    assert mark_in(tmp_path / "a.jpg")
