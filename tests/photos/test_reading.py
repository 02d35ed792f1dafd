"""core/photos/reading.py: every kind of picture comes out upright, RGB and named; what cannot be read says why."""

import hashlib
import io
import os
import struct
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, features
from PIL.PngImagePlugin import PngInfo

from core.cli import main
from core.errors import BadPhoto
from core.faces import Reference
from core.photos import reading
from core.photos.reading import Photo, as_photo, read_photo_files, read_photos
from core.storage.drawn import write_picture
from tests.tooling import write_photos

RED, GREEN, WHITE = (255, 0, 0), (0, 255, 0), (255, 255, 255)


def picture(size=(64, 48), left=RED, right=GREEN):
    image = Image.new("RGB", size, left)
    image.paste(right, (size[0] // 2, 0, *size))
    return image


def only_photo(folder):
    (photo,) = read_photos(folder, strict=True)
    return photo


def close(pixel, expected, within=6):
    return all(abs(a - b) <= within for a, b in zip(pixel, expected, strict=True))


@pytest.mark.parametrize("suffix", ["jpg", "jpeg", "JPG", "png", "webp", "bmp", "tif", "tiff", "gif", "heic"])
def test_every_file_format_is_read(tmp_path, suffix):
    if suffix == "heic":
        pillow_heif.register_heif_opener()
    picture().save(tmp_path / f"a.{suffix}")
    photo = only_photo(tmp_path)
    image = photo.image()
    assert (photo.name, photo.size, image.mode, image.size) == (f"a.{suffix}", (64, 48), "RGB", (64, 48))
    assert close(image.getpixel((5, 20)), RED, within=12)
    assert close(image.getpixel((60, 20)), GREEN, within=12)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_is_applied_to_size_and_pixels(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # EXIF 2.3: row 0 is the right side, column 0 the top: turn clockwise by 90 degrees to view.
    picture().save(tmp_path / f"a.{suffix}", exif=exif)
    photo = only_photo(tmp_path)
    image = photo.image()
    assert photo.size == image.size == (48, 64)
    assert close(image.getpixel((20, 5)), RED, within=12)  # what was left is on top
    assert close(image.getpixel((20, 60)), GREEN, within=12)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    Image.fromarray(np.full((32, 32), 0x8000, np.uint16)).save(tmp_path / "a.png")
    assert only_photo(tmp_path).image().getpixel((3, 3)) == (128, 128, 128)


def test_grey_palette_bilevel_and_cmyk_become_rgb(tmp_path):
    picture().convert("L").save(tmp_path / "grey.png")
    picture().quantize(4).save(tmp_path / "palette.png")
    picture().convert("1").save(tmp_path / "bilevel.png")
    picture().convert("CMYK").save(tmp_path / "cmyk.jpg")
    images = {photo.name: photo.image() for photo in read_photos(tmp_path, strict=True)}
    assert {image.mode for image in images.values()} == {"RGB"}
    assert close(images["palette.png"].getpixel((5, 5)), RED)
    assert close(images["cmyk.jpg"].getpixel((5, 20)), RED, within=12)


def test_transparency_shows_white_and_becomes_the_mask(tmp_path):
    image = picture().convert("RGBA")
    image.putalpha(Image.new("L", image.size, 0))
    image.paste((*GREEN, 255), (0, 0, 16, 48))
    image.save(tmp_path / "a.png")
    photo = only_photo(tmp_path)
    assert photo.image().getpixel((5, 5)) == GREEN
    assert photo.image().getpixel((40, 5)) == WHITE
    mask = photo.mask()
    assert mask is not None
    assert (mask.mode, mask.size, mask.getpixel((5, 5)), mask.getpixel((40, 5))) == ("L", (64, 48), 255, 0)


def test_an_opaque_alpha_channel_is_not_used_as_a_mask(tmp_path):
    picture().convert("RGBA").save(tmp_path / "a.png")
    assert only_photo(tmp_path).mask() is None


def test_a_mask_file_beside_the_photo_wins_and_leaves_the_identity(tmp_path):
    picture().convert("RGBA").save(tmp_path / "a.png")
    without = only_photo(tmp_path)
    Image.new("L", (64, 48), 200).save(tmp_path / "a-masklabel.png")
    photo = only_photo(tmp_path)
    mask = photo.mask()
    assert mask is not None and mask.getpixel((0, 0)) == 200
    assert photo.digest == without.digest


@pytest.mark.parametrize("damaged", [False, True])
def test_a_photo_is_refused_with_its_mask(tmp_path, damaged):
    picture().save(tmp_path / "a.png")
    mask = tmp_path / "a-masklabel.png"
    Image.new("L", (20, 20)).save(mask)
    words = r"^a-masklabel\.png: the mask has 20x20 pixels, but its photo 64x48"
    if damaged:
        mask.write_bytes(b"no picture")
        words = r"^a\.png: the mask a-masklabel\.png: "
    with pytest.raises(BadPhoto, match=words):
        read_photos(tmp_path, strict=True)


def test_the_first_frame_of_an_animation_is_the_photo(tmp_path):
    for name in ("a.gif", "b.webp", "c.png"):
        picture().save(tmp_path / name, save_all=True, append_images=[picture(left=GREEN, right=RED)], duration=50)
    photos = read_photos(tmp_path, strict=True)
    assert len(photos) == 3
    for photo in photos:
        assert close(photo.image().getpixel((5, 20)), RED, within=12), photo.name


def test_colours_of_a_profile_are_converted_to_srgb(tmp_path):
    # In XYZ's D50 space of the ICC, Lab (50, 0, 0) is mid grey: in sRGB 119, by the CIE and IEC 61966-2-1 formulas.
    lab = ImageCms.createProfile("LAB")
    image = Image.merge("LAB", [Image.new("L", (8, 8), value) for value in (128, 128, 128)])
    image.save(tmp_path / "a.tif", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())
    assert close(only_photo(tmp_path).image().getpixel((2, 2)), (119, 119, 119), within=2)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    "broken",
    [
        {"icc_profile": b"not a profile"},
        {"exif": b"Exif\0\0no header"},
        {"exif": b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x02\x00\x12\x01\x03\x00\x01\x00\x00\x00\x06"},
    ],
    ids=["profile", "EXIF", "tags"],
)
def test_broken_data_beside_the_pixels_are_ignored_in_silence(tmp_path, suffix, broken, recwarn):
    picture().save(tmp_path / f"a.{suffix}", **broken)
    photo = only_photo(tmp_path)
    assert photo.image().size == (64, 48) and photo.mask() is None
    assert [str(warning.message) for warning in recwarn] == []


def test_a_photo_whose_caption_cannot_be_read_is_named_with_it(tmp_path):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    (tmp_path / "a.txt").write_bytes("café".encode("latin-1"))
    told: list[str] = []
    assert [photo.name for photo in read_photos(tmp_path, on_warning=told.append)] == ["b.png"]
    (tmp_path / "a.txt").write_bytes("a photo".encode("utf-16-le"))
    read_photos(tmp_path, on_warning=told.append)
    assert told == 2 * ["left out: a.png: the caption a.txt is not UTF-8 text; save it as UTF-8"]


def test_captions_come_from_text_files_as_one_line(tmp_path):
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "b.png")
    picture().save(tmp_path / "c.png")
    (tmp_path / "a.txt").write_text("\ufeffphoto of sks person,\n smiling, é\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("  \n")
    assert [photo.caption for photo in read_photos(tmp_path)] == ["photo of sks person, smiling, é", None, None]


def test_caption_files_that_are_not_read_are_mentioned(tmp_path):
    folder = tmp_path / "10_sks person"
    folder.mkdir()
    for name in ("a", "b"):
        picture().save(folder / f"{name}.png")
        (folder / f"{name}.caption").write_text("sks person, smiling")
    picture().save(tmp_path / "top.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "top.png", "text": "sks person"}')
    said = []
    read_photos(tmp_path, on_warning=said.append)
    assert said == [
        "1 caption file is not read, such as 'metadata.jsonl': write the caption of NAME.jpg into NAME.txt",
        "2 caption files are not read, such as 'a.caption': write the caption of NAME.jpg into NAME.txt",
    ]


def test_kohya_folders_give_repeats_and_other_folders_are_mentioned(tmp_path):
    for folder in ("10_sks person", "3_more", "old"):
        (tmp_path / folder).mkdir()
        picture().save(tmp_path / folder / "x.png")
    picture().save(tmp_path / "top.png")
    said = []
    photos = read_photos(tmp_path, on_warning=said.append)
    assert [(photo.name, photo.repeats) for photo in photos] == [("top.png", 1), ("x.png", 10), ("x.png", 3)]
    assert len(said) == 1 and "'old'" in said[0]


def test_photos_are_sorted_and_told_apart_by_their_sha256(tmp_path):
    for name in ("c.png", "a.png", "b.png"):
        picture(left=GREEN if name == "c.png" else RED).save(tmp_path / name)
    photos = read_photos(tmp_path)
    assert [photo.name for photo in photos] == ["a.png", "b.png", "c.png"]
    assert [photo.digest for photo in photos] == [
        hashlib.sha256((tmp_path / photo.name).read_bytes()).hexdigest() for photo in photos
    ]
    assert photos[0].digest == photos[1].digest != photos[2].digest


def test_an_unreadable_photo_among_good_ones_is_named_and_left_out(tmp_path):
    picture().save(tmp_path / "good.png")
    data = io.BytesIO()
    picture((600, 400)).save(data, "jpeg")
    (tmp_path / "cut.jpg").write_bytes(data.getvalue()[: len(data.getvalue()) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("hello")
    said = []
    assert [photo.name for photo in read_photos(tmp_path, on_warning=said.append)] == ["good.png"]
    assert [message.split(": ")[1] for message in said] == ["cut.jpg", "empty.png", "text.jpg"]
    with pytest.raises(BadPhoto, match=r"cut\.jpg: the file is damaged or incomplete"):
        read_photos(tmp_path, strict=True)


def test_a_folder_without_photos_is_refused_in_one_line(tmp_path):
    file = tmp_path / "a.png"
    with pytest.raises(BadPhoto, match="does not exist"):
        read_photos(tmp_path / "missing")
    with pytest.raises(BadPhoto, match="no readable photo in this folder"):
        read_photos(tmp_path)
    picture().save(file)
    with pytest.raises(BadPhoto, match="this is a file"):
        read_photos(file)
    with pytest.raises(
        BadPhoto, match=r"the photo folder is a list: expected a path\. read_photo_files reads a list of files"
    ):
        read_photos([file])  # pyright: ignore


def test_a_sub_folder_that_may_not_be_read_is_left_out(tmp_path, monkeypatch):
    """Such as `System Volume Information` on a USB stick."""
    listed = reading.Path.iterdir

    def refuse(folder):
        if folder != tmp_path:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    picture().save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(reading.Path, "iterdir", refuse)
    told: list[str] = []
    assert [photo.name for photo in read_photos(tmp_path, on_warning=told.append)] == ["a.png"]
    assert told == ["folder 'closed' left out: it cannot be read (Permission denied)"]
    assert reading.count_photos(tmp_path) == 1


def test_a_pipe_device_or_dangling_link_is_named_and_never_read(tmp_path):
    picture().save(tmp_path / "good.png")
    os.mkfifo(tmp_path / "pipe")
    for name, target in (("endless", "/dev/zero"), ("gone", tmp_path / "nowhere.jpg"), ("waits", tmp_path / "pipe")):
        (tmp_path / f"{name}.jpg").symlink_to(target)
    said: list[str] = []
    assert [photo.name for photo in read_photos(tmp_path, on_warning=said.append)] == ["good.png"]
    wanted = [
        "left out: endless.jpg: is not a regular file",
        "left out: gone.jpg: cannot be read: No such file or directory",
        "left out: waits.jpg: is not a regular file",
    ]
    assert said == wanted
    assert read_photo_files([tmp_path / "endless.jpg", tmp_path / "pipe"], on_warning=said.append) == []
    assert said[3:] == [wanted[0], "left out: pipe: is not a regular file"]


def test_a_program_for_printers_in_a_photos_name_is_not_run(tmp_path):
    """Pillow would hand it to Ghostscript."""
    picture().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(BadPhoto, match=r"a\.jpg: this picture cannot be read"):
        read_photos(tmp_path, strict=True)


def test_a_file_or_a_side_that_is_too_long_is_refused_before_it_is_read(tmp_path, monkeypatch):
    (tmp_path / "long.png").write_bytes(png_that_promises(100_000_000, 1))
    with pytest.raises(BadPhoto, match=r"long\.png: 100000000x1 pixels; at most 65535 per side can be read"):
        read_photos(tmp_path, strict=True)
    monkeypatch.setattr(reading, "MAX_BYTES", 2**20)
    with (tmp_path / "long.png").open("wb") as file:
        file.truncate(3 * 2**20)
    with pytest.raises(BadPhoto, match=r"long\.png: the file is larger than 1 MiB, the maximum"):
        read_photos(tmp_path, strict=True)


def png_that_promises(width: int, height: int) -> bytes:
    """A PNG of a few bytes: IHDR is all that Pillow reads on opening."""
    small = io.BytesIO()
    Image.new("1", (8, 8)).save(small, "png")
    header = b"IHDR" + struct.pack(">II", width, height) + small.getvalue()[24:29]
    return small.getvalue()[:12] + header + struct.pack(">I", zlib.crc32(header)) + small.getvalue()[33:]


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_that_promises(30_000, 30_000))
    with pytest.raises(BadPhoto, match=r"bomb\.png: more than 178 megapixels"):
        read_photos(tmp_path, strict=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # some programs switch Pillow's own check off
    with pytest.raises(BadPhoto, match=r"bomb\.png: more than 178 megapixels"):
        read_photos(tmp_path, strict=True)


def with_metadata(kind: str, size: int) -> bytes:
    """A picture of that format with a large or endless part beside its pixels, or after them."""
    data, blank = io.BytesIO(), bytes(size)
    if kind == "tiff":
        picture().save(data, kind, tiffinfo={700: blank})
        return data.getvalue()
    picture().save(data, "png" if kind.startswith("png") else "jpeg")
    whole = data.getvalue()
    texts = {"png": b"iTXt" + b"a" + bytes(5) + blank, "png end": b"prVt" + blank, "png empty": b"prVt"}
    if text := texts.get(kind):
        part = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
        at = len(whole) - 12 if kind == "png end" else 33
        return whole[:at] + part * (size // 64 if kind == "png empty" else 1) + whole[at:]
    segment = {"jpeg": b"\xff\xe1\xff\x02Exif\0\0" + bytes(65_274), "jpeg parts": b"\xff\xe1\0\x80Exif\0\0" + bytes(120),
               "jpeg other": b"\xff\xe1\xff\x02http" + bytes(65_276), "jpeg padding": b"\xff" * 1000}[kind]  # fmt: skip
    return whole[:2] + segment * (size // len(segment)) + whole[2:]


@pytest.mark.parametrize("kind", ["png", "png end", "png empty", "jpeg", "jpeg other", "jpeg padding", "tiff"])
def test_too_much_metadata_is_refused_before_it_is_read(tmp_path, kind):
    suffix = {"tiff": "tif"}.get(kind, kind[:4].strip())
    (tmp_path / f"a.{suffix}").write_bytes(with_metadata(kind, 2**25))
    fault = rf"a\.{suffix}: it has more than 16 MiB of metadata, or EXIF data in many parts; save it without them"
    with pytest.raises(BadPhoto, match=fault):
        read_photos(tmp_path, strict=True)
    (tmp_path / f"a.{suffix}").write_bytes(with_metadata(kind, 2**17))
    assert only_photo(tmp_path).image().size == picture().size


@pytest.mark.parametrize(("kind", "size"), [("jpeg", 2**22), ("jpeg parts", 2**20)])
def test_exif_data_in_many_parts_are_refused_since_pillow_copies_them_for_each(tmp_path, kind, size):
    (tmp_path / "a.jpg").write_bytes(with_metadata(kind, size))
    with pytest.raises(BadPhoto, match=r"EXIF data in many parts"):
        read_photos(tmp_path, strict=True)


def test_a_webp_that_is_larger_than_its_pixels_can_be_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MAX_WHOLE", 2**20)
    picture().save(tmp_path / "a.webp", xmp=bytes(2**20))
    with pytest.raises(BadPhoto, match=r"a\.webp: the file is larger than 1 MiB, the maximum for its format"):
        read_photos(tmp_path, strict=True)


def test_a_108_megapixel_photo_is_read_without_a_warning(tmp_path, recwarn):
    Image.new("L", (12_000, 9_000)).save(tmp_path / "large.jpg")
    assert only_photo(tmp_path).size == (12_000, 9_000)
    assert not recwarn.list


def test_a_missing_heif_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(b"x")
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(BadPhoto, match=r"a\.heic: HEIC photos require a package: pip install pillow-heif"):
        read_photos(tmp_path, strict=True)


def test_a_heic_photo_renamed_to_jpg_is_read_whatever_was_read_before(tmp_path, monkeypatch):
    pillow_heif.register_heif_opener()
    picture().save(tmp_path / "a.jpg", "HEIF")
    monkeypatch.delitem(Image.OPEN, "HEIF")
    assert only_photo(tmp_path).size == (64, 48)


def test_a_photo_or_mask_that_is_gone_or_another_by_now_is_refused(tmp_path):
    """What is made of a photo is kept under the digest that it had."""
    file, mask = tmp_path / "a.png", tmp_path / "a-masklabel.png"
    picture().convert("RGBA").save(file)
    photo = only_photo(tmp_path)
    picture(left=GREEN).convert("RGBA").save(file)
    for use in (photo.image, photo.mask):
        with pytest.raises(BadPhoto, match=r"a\.png: the file has changed since it was first read; start again"):
            use()
    Image.new("L", (64, 48)).save(mask)
    masked = only_photo(tmp_path)
    mask.unlink()
    file.unlink()
    with pytest.raises(BadPhoto, match=r"a\.png: cannot be read: No such file or directory"):
        photo.image()
    for use in (lambda: masked.fingerprint, masked.mask):
        with pytest.raises(BadPhoto, match=r"a-masklabel\.png: cannot be read: No such file or directory"):
            use()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\x1b[2J\nb\u202e c\u202fd.png".encode(), "a\ufffd[2J\ufffdb\ufffd c\u202fd.png"),
        (b"a" * 251 + b".png", "a" * 251 + ".png"),
        pytest.param(
            b"J\xfcrgen.png", "J\ufffdrgen.png",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names"),
        ),
    ],
    ids=["one that writes to the terminal", "the longest", "not UTF-8"],
)  # fmt: skip
def test_any_name_can_be_shown_without_its_path(tmp_path, name, shown):
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    photo = only_photo(tmp_path)
    assert photo.name == shown and str(tmp_path) not in repr(photo)


def test_a_reduced_decode_keeps_both_sides_large_enough(tmp_path):
    picture((4000, 3000)).save(tmp_path / "a.jpg")
    photo = only_photo(tmp_path)
    assert photo.image(shorter_side=640).size == (1000, 750)
    assert photo.image(shorter_side=5000).size == (4000, 3000)


def test_a_photo_from_memory_is_the_same_kind_of_value():
    photo = Photo.from_image(picture(), "node 1", caption="sks person", mask=Image.new("L", (64, 48), 7))
    assert (photo.size, photo.caption, photo.image().getpixel((5, 5))) == ((64, 48), "sks person", RED)
    mask = photo.mask()
    assert mask is not None and mask.getpixel((0, 0)) == 7
    assert photo.digest == Photo.from_image(picture(), "another name").digest
    assert photo.digest != Photo.from_image(picture(left=GREEN), "node 1").digest
    with pytest.raises(BadPhoto, match="float"):
        Photo.from_image(Image.new("F", (8, 8)), "f")


KINDS = ["jpeg", "png", "webp", "gif", "tiff", "bmp", *(["avif"] if features.check("avif") else [])]


@cache
def sample_files():
    files = {}
    for kind in KINDS:
        data = io.BytesIO()
        picture().save(data, kind)
        files[kind] = data.getvalue()
    return files


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_a_damaged_file_is_a_photo_or_a_bad_photo_and_nothing_else(tmp_path, kind, data):
    content = bytearray(sample_files()[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / f"a.{ {'jpeg': 'jpg', 'tiff': 'tif'}.get(kind, kind) }"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        (photo,) = read_photo_files([path], strict=True)
        assert photo.image().size == photo.size
    except BadPhoto as problem:
        assert str(problem).startswith(path.name) and "\n" not in str(problem)
    finally:
        path.unlink()


def test_a_folder_with_too_many_repeats_is_left_out_with_a_warning(tmp_path):
    for name in ("a", "1000_me", "1000_me-headshots", "2019_Italy", f"{'1' * 180}_me"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / name / "1.png")
    warnings: list[str] = []
    (photo,) = read_photos(tmp_path, on_warning=warnings.append)
    assert photo.repeats == 1000
    assert warnings.pop(0).startswith("folder '1000_me-headshots' with 1 photo left out: ")
    assert len(warnings) == 3 and all("(10 repeats, at most 1,000)" in warning for warning in warnings)


def test_pictures_drawn_by_this_program_are_left_out_of_the_photos(tmp_path, capsys):
    photos = write_photos(tmp_path / "photos", count=5)
    command = ["generate", "--base", "demo", "--prompt", "a photo", "--steps", "1", "--size", "64x64", "--count", "1"]
    assert main([*command, "--output", str(photos / "10_x")]) == 0
    (photos / "10_x" / "001-1.png").rename(photos / "renamed.png")
    main([*command, "--seed", "2", "--output", str(photos / "10_x")])
    warnings: list[str] = []
    assert len(read_photos(photos, strict=True, on_warning=warnings.append)) == 5
    assert warnings == ["left out: 3 pictures that this program has drawn, such as renamed.png"]
    assert len(read_photos(photos / "10_x", drawn=True)) == 2  # as pictures to score, or of a class
    capsys.readouterr()
    main(["check", str(photos)])
    assert " of 5 usable" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_only_marked_pictures_of_this_program_are_left_out_of_the_photos(format, tmp_path, monkeypatch):
    """People also train on pictures of other programs, and phones mark photos that they have retouched."""
    photos = write_photos(tmp_path / "photos")
    image, path = Image.open(photos / "0.png"), photos / f"drawn.{format.lower()}"
    with path.open("wb") as file:
        write_picture(file, image, format)
    assert len(read_photos(photos)) == 4
    with monkeypatch.context() as other, path.open("wb") as file:
        other.setattr("core.storage.drawn._PROGRAM", "Magic Editor ")
        write_picture(file, image, format)
    assert len(read_photos(photos)) == 5


@pytest.mark.parametrize(
    "text",
    [
        "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x80, Model: sd15",
        "Steps: 1, Seed: 1, Size: 64x64, Model hash: abc, Model: a, Version: v1.10", "Size: 64x64", "my parameters",
    ],
)  # fmt: skip
def test_a_picture_with_another_programs_parameters_is_a_photo(tmp_path, text):
    info = PngInfo()
    info.add_text("parameters", f"a photo\n{text}")
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png", pnginfo=info)
    assert len(read_photos(tmp_path)) == 1


def closed(how: str) -> Image.Image:
    stream = io.BytesIO()
    picture().save(stream, "PNG")
    image = Image.open(stream)
    if how == "after it was loaded":
        image.load()
    if how == "with its file":
        with image:
            return image
    image.close()
    return image


@pytest.mark.parametrize("how", ["before it was loaded", "after it was loaded", "with its file"])
def test_a_closed_picture_is_refused(how):
    with pytest.raises(BadPhoto, match=r"photos\[0\]: it is closed, so it has no pixels"):
        as_photo(closed(how), "photos[0]")
    with pytest.raises(BadPhoto, match="it is closed"):
        Reference.on([closed(how)])


def sample(mode):
    noise = np.random.default_rng(0).integers(0, 2**16, (41, 37, 4), dtype=np.uint16)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0])
    image = Image.fromarray((noise >> 8).astype(np.uint8))
    return image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_in_strips_a_picture_is_what_it_is_as_a_whole(tmp_path, monkeypatch, mode):
    exif = Image.Exif()
    exif[0x0112] = 8
    sample(mode).save(tmp_path / "a.png", exif=exif)
    photo = only_photo(tmp_path)
    image, mask = photo.image(), photo.mask()
    monkeypatch.setattr(reading, "_STRIP_PIXELS", 100)
    assert photo.image().tobytes() == image.tobytes()
    again = photo.mask()
    assert (again and again.tobytes()) == (mask and mask.tobytes())


def test_a_very_large_photo_is_decoded_at_half_size_and_boxes_are_scaled(tmp_path, monkeypatch):
    sample("RGBA").resize((640, 480)).save(tmp_path / "a.png")
    picture((640, 480)).save(tmp_path / "b.jpg")
    small = [photo.image() for photo in read_photos(tmp_path)]
    monkeypatch.setattr(reading, "MOST_PIXELS_AT_ONCE", 300_000)
    transparent, other = read_photos(tmp_path)
    assert transparent.image().tobytes() == small[0].reduce(2).tobytes() and transparent.size == (640, 480)
    mask = transparent.mask()
    assert mask is not None and mask.size == (640, 480)
    half = other.image()
    assert half.size == (320, 240) and other.box_in(half, (64, 32, 128, 100)) == (32, 16, 64, 50)


def test_formats_that_are_decoded_in_many_copies_have_a_lower_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MANY_COPIES", {"WEBP": 2_000_000})
    for suffix in ("webp", "png"):
        Image.new("RGB", (1500, 1500)).save(tmp_path / f"a.{suffix}")
    warnings: list[str] = []
    assert [photo.name for photo in read_photos(tmp_path, on_warning=warnings.append)] == ["a.png"]
    assert warnings == ["left out: a.webp: more than 2 megapixels; make it smaller first"]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="only Linux says how much memory is anonymous")
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_a_small_file_of_many_pixels_takes_at_most_a_gigabyte(tmp_path, mode):
    peaks = []
    for side in (64, 13_370):
        Image.new(mode, (side, side)).save(tmp_path / "a.png")
        command = [sys.executable, "-m", "tests.peak_memory", "check", str(tmp_path), "--json"]
        root = Path(__file__).parents[2]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, cwd=root).stdout.splitlines()[-1]))
    assert peaks[1] - peaks[0] < 1e9, peaks


def test_arrays_and_pil_images_are_photos_too():
    image = picture()
    for one in (image, np.asarray(image)):
        photo = reading.as_photo(one, "photos[3]")
        assert (photo.name, photo.image().tobytes()) == ("photos[3]", image.tobytes())
    assert reading.as_photo(photo, "b") is photo
    for wrong, what in ((np.zeros((4, 4)), r"float64 \(4, 4\)"), (1, "int")):
        with pytest.raises(
            BadPhoto, match=rf"photos\[0\] is {what}: expected a path, a Photo, a PIL image, or an array"
        ):
            reading.as_photo(wrong, "photos[0]")  # pyright: ignore[reportArgumentType]
