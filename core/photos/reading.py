"""Photos from a folder or from memory: size, caption, repeats and digest are read at once, pixels on demand."""

from __future__ import annotations

import hashlib
import io
import os
import re
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from ..errors import BadPhoto, check_length, counted, one_line
from ..faces import check_open
from ..progress import OnWarning
from ..storage.drawn import is_our_drawing
from ..storage.files import opened_file, read_bytes

HEIF_SUFFIXES = (".heic", ".heif")
PHOTO_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", *HEIF_SUFFIXES)
MASK_ENDING = "-masklabel.png"
"""The ending of a mask's file name, as in OneTrainer: `anna-masklabel.png` beside `anna.jpg`, white where the loss counts."""

MAX_PIXELS = 2 * 89_478_485
"""The most pixels a photo may have: Pillow refuses more as a decompression bomb. Large phone cameras have 108 megapixels."""

MOST_PIXELS_AT_ONCE, _STRIP_PIXELS = 100_000_000, 2**22
"""The most pixels of a picture kept at full size beside its decoded file, and the pixels converted at once."""

_MANY_COPIES = {"WEBP": 60_000_000, "AVIF": 60_000_000}
"""Lower limits for formats whose decoders hold several copies."""

MAX_SIDE = 65_535
"""The longest side in pixels that is read: JPEG's own limit."""
MAX_BYTES = 2**30
"""The largest file that is read: larger than 178 uncompressed megapixels at 16 bits."""

_MAX_METADATA, _PIECE, _CALL = 2**24, 2**16, 48
"""The most bytes of a picture that are read beside its pixels, and the largest pieces in which Pillow reads pixels. Each call
counts for the last number at least, since a file can have millions of empty parts."""
_MAX_WHOLE = 2**28
"""The largest file in a format that Pillow reads as a whole, with its metadata."""

MAX_REPEATS = 1_000
"""The most repeats that a folder name can set: the number in a larger one, such as `2019_Italy`, is a year."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF", "AVIF", "HEIF")
"""The Pillow decoders for PHOTO_SUFFIXES. Pillow picks a decoder by content, and another one runs Ghostscript."""
_REPEATS_FOLDER = re.compile(r"(\d+)_.*(?<!-headshots)")  # The command headshots writes its pictures there.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip
DAMAGED = (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error, zlib.error)
"""The exceptions that Pillow's decoders raise on damaged files; AVIF's raises RuntimeError."""


@dataclass(frozen=True)
class Photo:
    """One photo, made by `read_photos` or `Photo.from_image`. It is decoded on every call of `image()`."""

    name: str
    """The file name without its folder, for messages only."""
    size: tuple[int, int]
    """The width and height in pixels, with the EXIF orientation applied."""
    caption: str | None
    """The text of the sidecar .txt file on one line; None without one."""
    repeats: int
    """How often the photo is used in an epoch: N in a Kohya `N_name` folder, else 1."""
    digest: str
    """The SHA-256 of the picture (of the file, or of pixels in memory), without name, caption and mask."""
    source: Path | Image.Image = field(repr=False, compare=False)
    mask_source: Path | Image.Image | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_length(f"{self.name}: its caption", self.caption or "", BadPhoto)

    @property
    def folder(self) -> Path | None:
        """The folder of all photos of the person, above a Kohya `N_name` folder; None for a photo in memory."""
        if isinstance(self.source, Image.Image):
            return None
        parent = self.source.parent
        return parent.parent if _REPEATS_FOLDER.fullmatch(parent.name) else parent

    @property
    def fingerprint(self) -> str:
        """A hash of picture, mask, caption and repeats, without the name: equal for photos that train alike."""
        source = self.mask_source
        if isinstance(source, Image.Image):
            mask = f"{source.mode} {source.size}".encode() + source.tobytes()
        else:
            mask = _read_bytes(source) if source else b""
        described = [self.digest, hashlib.sha256(mask).hexdigest(), self.caption, self.repeats]
        return hashlib.sha256(repr(described).encode("utf-8", "surrogateescape")).hexdigest()

    @classmethod
    def from_image(
        cls,
        image: Image.Image,
        name: str,
        caption: str | None = None,
        repeats: int = 1,
        mask: Image.Image | None = None,
    ) -> Photo:
        """Make a photo from pixels in memory, in any Pillow mode except the floating-point "F".

        The mask is white where the loss counts. Raises BadPhoto for mode "F" and for a mask of another size.
        """
        with _opened(name, image):
            image = ImageOps.exif_transpose(image)
            if image.mode == "P":  # Palette pixels mean nothing without the palette.
                image = image.convert("RGBA" if image.has_transparency_data else "RGB")
        if mask is not None and mask.size != image.size:
            raise BadPhoto(f"{name}: the mask has {_times(mask.size)} pixels, but the photo {_times(image.size)}")
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()
        return cls(name, image.size, caption, repeats, digest, image, mask)

    def with_mask(self, mask: Image.Image) -> Photo:
        """Return a copy of the photo with this mask, in mode L, white where the loss counts, stretched over the photo."""
        return replace(self, mask_source=mask)

    def image(self, shorter_side: int | None = None) -> Image.Image:
        """Return the picture in mode RGB and in sRGB: upright, the first frame, with white behind transparent parts.

        With `shorter_side`, the picture may be smaller, with no side below that many pixels: JPEG files then decode at a half,
        a quarter or an eighth, many times faster. Pictures of more than MOST_PIXELS_AT_ONCE are always reduced. Raises BadPhoto
        if the file can no longer be read, or its content no longer matches `digest`.
        """
        with _opened(self.name, self._picture()) as image:
            if shorter_side is None and _is_large(image):
                shorter_side = min(image.size) // 2
            if shorter_side is not None:
                # Pillow's draft keeps both sides at or above the requested size, so a square requests the same of both.
                image.draft("RGB", (shorter_side, shorter_side))
            changed, turn = _in_strips(image, "RGB", _to_rgb), _turn(image)
        del image  # Free its pixels before making another copy.
        return changed if turn is None else changed.transpose(turn)

    def box_in(self, image: Image.Image, box: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
        """Convert a box in pixels of the photo to pixels of `image`, which may be smaller."""
        x, y = image.width / self.size[0], image.height / self.size[1]
        return box[0] * x, box[1] * y, box[2] * x, box[3] * y

    def mask(self) -> Image.Image | None:
        """Return the mask in mode L and in the photo's size, white where the loss counts; None without a mask.

        The mask beside the photo is used first, then the photo's own transparency.
        """
        if self.mask_source is not None:
            with _opened(self.name, _content(self.mask_source)) as image:
                mask, turn = _in_strips(image, "L", lambda strip: strip.convert("L")), _turn(image)
        else:
            with _opened(self.name, self._picture()) as image:
                if not _is_transparent(image):
                    return None
                mask = _in_strips(image, "L", lambda strip: strip.convert("RGBA").getchannel("A"))
                turn = _turn(image)
            if mask.getextrema() == (255, 255):
                return None
        del image
        mask = mask if turn is None else mask.transpose(turn)
        # A drawn mask (`with_mask`) is smaller than a large photo, and the mask of a very large photo is reduced.
        return mask if mask.size == self.size else mask.resize(self.size, Image.Resampling.BILINEAR)

    def _picture(self) -> bytes | Image.Image:
        """Return the content that the digest was made of. Raises BadPhoto if it has changed since."""
        content = _content(self.source)
        if isinstance(content, bytes) and hashlib.sha256(content).hexdigest() != self.digest:
            raise BadPhoto(f"{self.name}: the file has changed since it was first read; start again")
        return content


PhotoLike = Photo | Image.Image | np.ndarray | str | os.PathLike[str]
"""What `as_photo` accepts as a photo."""


def as_photo(picture: PhotoLike, name: str) -> Photo:
    """Return a Photo unchanged, read one from a path, or make one of that name from a PIL image or an array.

    Arrays are of uint8 (height, width, 3) in RGB. Raises BadPhoto for anything else, and for a file that can't be read.
    """
    if isinstance(picture, Photo):
        return picture
    if isinstance(picture, str | os.PathLike):
        return read_photo_files([picture], strict=True)[0]
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return Photo.from_image(picture, name)
    what = f"{picture.dtype} {picture.shape}" if isinstance(picture, np.ndarray) else type(picture).__name__
    raise BadPhoto(f"{name} is {what}: expected a path, a Photo, a PIL image, or an array of uint8 (height, width, 3)")


def read_photos(
    folder: str | Path,
    *,
    repeats: bool = True,
    strict: bool = False,
    drawn: bool = False,
    apart: Path | None = None,
    on_warning: OnWarning = warnings.warn,
) -> list[Photo]:
    """Read the photos of a folder in the order of their names, then those of its Kohya-style `N_name` folders.

    The latter are read only with `repeats`. A photo that cannot be read is skipped with a warning to `on_warning`; with
    `strict` it raises instead. Pictures that this program has drawn are skipped too, unless they are asked for with `drawn`.
    Other sub-folders with photos are skipped with a warning, except `apart`, which the caller reads separately.
    Captions come from `NAME.txt` beside the photo, masks from `NAME-masklabel.png` or from transparency.

    Raises BadPhoto if the folder is missing, is a file, cannot be accessed, or has no readable photo.
    """
    if not isinstance(folder, str | os.PathLike):
        given = type(folder).__name__
        raise BadPhoto(f"the photo folder is a {given}: expected a path. read_photo_files reads a list of files")
    folder = Path(folder)
    try:
        if not folder.exists():
            raise BadPhoto(f"{folder}: this photo folder does not exist")
        if not folder.is_dir():
            raise BadPhoto(f"{folder}: expected a folder of photos, but this is a file")
        paths = list(_photo_paths(folder, repeats, on_warning, apart))
    except OSError as problem:
        raise BadPhoto(f"{problem.filename or folder}: cannot be read ({problem.strerror or problem})") from problem

    photos = _read_each(paths, strict, drawn, on_warning)
    if not photos:
        raise BadPhoto(f"{folder}: no readable photo in this folder (looked for {' '.join(PHOTO_SUFFIXES)})")
    return photos


def read_photo_files(
    paths: Iterable[str | os.PathLike[str]], *, strict: bool = False, on_warning: OnWarning = warnings.warn
) -> list[Photo]:
    """Read the photos in these files, in the order given, with the captions and masks beside them.

    A photo that cannot be read is skipped with a warning to `on_warning`, so the list may be empty. With `strict` it raises
    BadPhoto instead.
    """
    return _read_each(((Path(path), 1) for path in paths), strict, True, on_warning)


def count_photos(folder: Path) -> int:
    """Count the files that `read_photos` would read, without opening them; 0 if the folder cannot be read."""
    try:
        return sum(1 for _ in _photo_paths(folder, True, lambda warning: None))
    except (OSError, ValueError):  # Paths with a NUL raise ValueError.
        return 0


def _read_each(paths: Iterable[tuple[Path, int]], strict: bool, with_drawn: bool, on_warning: OnWarning) -> list[Photo]:
    photos: list[Photo] = []
    drawn: list[str] = []
    for path, repeats in paths:
        try:
            if photo := _read_photo(path, repeats, with_drawn):
                photos.append(photo)
            else:
                drawn.append(one_line(path.name))
        except BadPhoto as problem:
            if strict:
                raise
            on_warning(f"left out: {problem}")
    if drawn:
        on_warning(f"left out: {counted(len(drawn), 'picture')} that this program has drawn, such as {drawn[0]}")
    return photos


def _photo_paths(
    folder: Path, repeats: bool, on_warning: OnWarning, apart: Path | None = None
) -> Iterator[tuple[Path, int]]:
    entries = sorted(folder.iterdir(), key=lambda path: path.name)
    for path in entries:
        if _is_photo_file(path):
            yield path, 1
    _mention_captions(entries, on_warning)
    if not repeats:
        return
    for subfolder in (path for path in entries if path.is_dir() and not path.name.startswith(".")):
        try:
            files = sorted(subfolder.iterdir(), key=lambda path: path.name)
            inside = list(filter(_is_photo_file, files))
        except OSError as problem:
            on_warning(f"folder {subfolder.name!r} left out: it cannot be read ({problem.strerror or problem})")
            continue
        match = _REPEATS_FOLDER.fullmatch(subfolder.name)
        if match and 0 < int(match[1]) <= MAX_REPEATS:
            yield from ((path, int(match[1])) for path in inside)
            _mention_captions(files, on_warning)
        elif inside and not (apart and subfolder.resolve() == apart.resolve()):
            on_warning(
                f"folder {subfolder.name!r} with {counted(len(inside), 'photo')} left out: "
                f"only sub-folders with a name like '10_name' (10 repeats, at most {MAX_REPEATS:,}) are read"
            )


def _mention_captions(files: Iterable[Path], on_warning: OnWarning) -> None:
    """Mention captions in the files of other tools, which are not read."""
    if found := [path.name for path in files if path.suffix == ".caption" or path.name == "metadata.jsonl"]:
        count = counted(len(found), "caption file is", "caption files are")
        on_warning(f"{count} not read, such as {found[0]!r}: write the caption of NAME.jpg into NAME.txt")


def _is_photo_file(path: Path) -> bool:
    name = path.name.lower()
    # macOS creates files named "._x.jpg" beside "x.jpg" on disks of other systems.
    if not name.endswith(PHOTO_SUFFIXES) or name.endswith(MASK_ENDING) or name.startswith("."):
        return False
    return path.is_file() or path.is_symlink()  # Broken links are reported, not skipped.


def _read_photo(path: Path, repeats: int, with_drawn: bool) -> Photo | None:
    """Read the photo with its caption and mask; None for a picture that this program has drawn, unless `with_drawn`."""
    name = one_line(path.name)  # It may contain terminal commands or invalid UTF-8.
    with _opened_file(path) as file:
        with _opened(name, file) as image:
            full_size = image.size
            # Decode once, as cheaply as possible, so that a truncated file is found now and not during training.
            reduced = image.draft("RGB", (1, 1))
            image.load()
            if is_our_drawing(image) and not with_drawn:
                return None
            size = _upright(full_size if reduced else image.size, image)  # TIFF files are turned upright on loading.
        file.seek(0)
        digest = hashlib.sha256()
        while piece := file.read(2**20):
            digest.update(piece)

    mask_path = path.with_name(path.stem + MASK_ENDING)
    if os.path.isfile(mask_path):  # The name may be too long for the file system.
        with _opened_file(mask_path) as file, _opened(f"{name}: the mask {mask_path.name}", file) as mask:
            mask.load()
            mask_size = _upright(mask.size, mask)
        if mask_size != size:
            raise BadPhoto(f"{mask_path.name}: the mask has {_times(mask_size)} pixels, but its photo {_times(size)}")
    else:
        mask_path = None
    caption = _read_caption(path.with_suffix(".txt"), name)
    return Photo(name, size, caption, repeats, digest.hexdigest(), path, mask_path)


def _upright(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    is_sideways = _turn(image) in [turn for value, turn in _TURNS.items() if value > 4]
    return (size[1], size[0]) if is_sideways else size


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that makes the picture upright; None if it already is."""
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DAMAGED:  # The EXIF data are damaged, but the picture may be whole.
        return None


def _opened_file(path: Path) -> AbstractContextManager[BinaryIO]:
    return opened_file(path, MAX_BYTES, name=path.name, error=BadPhoto)


def _read_bytes(path: Path) -> bytes:
    return read_bytes(path, MAX_BYTES, name=path.name, error=BadPhoto)


def _content(source: Path | Image.Image) -> bytes | Image.Image:
    return source if isinstance(source, Image.Image) else _read_bytes(source)


def _read_caption(path: Path, photo: str) -> str | None:
    if not path.is_file():
        return None
    try:
        named = f"{photo}: the caption {path.name}"
        text = read_bytes(path, 2**20, name=named, error=BadPhoto).decode("utf-8-sig")
        if "\0" in text:
            raise UnicodeError  # This is UTF-16 without its mark.
        return " ".join(text.split()) or None
    except UnicodeError as problem:
        raise BadPhoto(f"{photo}: the caption {path.name} is not UTF-8 text; save it as UTF-8") from problem


class _Sparing:
    """A picture's file for Pillow, which would read everything in it. Raises BadPhoto for too much beside the pixels."""

    def __init__(self, name: str, file: BinaryIO):
        self._name, self._file, self._left, self._exif = name, file, _MAX_METADATA, 0
        self.seek, self.tell, self.is_open, self._size = file.seek, file.tell, False, file.seek(0, io.SEEK_END)

    def read(self, size: int = -1) -> bytes:
        if size < 0 and not self.is_open and self._size > _MAX_WHOLE:
            raise BadPhoto(f"{self._name}: the file is larger than {_MAX_WHOLE >> 20} MiB, the maximum for its format")
        found = self._file.read(size)
        # Nothing but metadata is read until the picture is open.
        self._left -= _CALL + (len(found) if size > _PIECE or (size > 0 and not self.is_open) else 0)
        if found.startswith(b"Exif\0\0"):  # Pillow copies the parts of a JPEG's EXIF data again for each new one.
            self._exif += len(found)
            self._left -= self._exif
        if self._left < 0:
            limit = f"{_MAX_METADATA >> 20} MiB of metadata, or EXIF data in many parts"
            raise BadPhoto(f"{self._name}: it has more than {limit}; save it without them")
        return found


@contextmanager
def _opened(name: str, source: bytes | BinaryIO | Image.Image) -> Iterator[Image.Image]:
    """Open a picture, without decoding it; any failure inside the context raises BadPhoto.

    `source` is the file with that name or its content, or a picture in memory.
    """
    if isinstance(source, Image.Image):
        check_open(name, source)
        _refuse_float_pixels(name, source)
        yield source
        return
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    # Some programs rename HEIC files to .jpg.
    if name.lower().endswith(HEIF_SUFFIXES) or file.read(12)[4:11] == b"ftyphei":
        try:
            import pillow_heif
        except ImportError as problem:
            raise BadPhoto(f"{name}: HEIC photos require a package: pip install pillow-heif") from problem
        pillow_heif.register_heif_opener()
    try:
        # Pillow warns about large pictures and unreadable tags. Damaged photos are reported by our own errors.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            Image.init()
            formats = [name for name in _FORMATS if name in Image.OPEN]  # This Pillow may lack some.
            sparing = _Sparing(name, file)
            with Image.open(cast(BinaryIO, sparing), formats=formats) as image:
                sparing.is_open = True
                if max(image.size) > MAX_SIDE:
                    raise BadPhoto(f"{name}: {_times(image.size)} pixels; at most {MAX_SIDE} per side can be read")
                most = _MANY_COPIES.get(str(image.format), MAX_PIXELS)
                if image.width * image.height > most:
                    raise BadPhoto(f"{name}: more than {most // 10**6} megapixels; make it smaller first")
                _refuse_float_pixels(name, image)
                yield image
    except Image.UnidentifiedImageError as problem:
        raise BadPhoto(f"{name}: this picture cannot be read") from problem
    except Image.DecompressionBombError as problem:
        raise BadPhoto(f"{name}: more than {MAX_PIXELS // 10**6} megapixels; make it smaller first") from problem
    except DAMAGED as problem:
        raise BadPhoto(f"{name}: the file is damaged or incomplete") from problem


def _refuse_float_pixels(name: str, image: Image.Image) -> None:
    if image.mode == "F":
        raise BadPhoto(f"{name}: the picture has floating-point pixels; save it with 8 or 16 bits")


def _is_large(image: Image.Image) -> bool:
    return image.width * image.height > MOST_PIXELS_AT_ONCE


def _in_strips(image: Image.Image, mode: str, change: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Return the picture changed to that mode in strips, to keep its copies small. Large pictures are halved in size."""
    image.load()
    factor = 2 if _is_large(image) else 1
    changed = Image.new(mode, (-(-image.width // factor), -(-image.height // factor)))
    rows = factor * max(1, _STRIP_PIXELS // (image.width * factor))
    for top in range(0, image.height, rows):
        strip = change(image.crop((0, top, image.width, min(top + rows, image.height))))
        changed.paste(strip.reduce(factor), (0, top // factor))
    return changed


def _is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips 16-bit values to 255 on conversion instead of scaling them.
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
    if _is_transparent(image):
        flat = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA")).convert("RGB")
        flat.info = image.info
        return _to_srgb(flat)
    return _to_srgb(image.convert("RGB") if image.mode in ("P", "1") else image)


def _to_srgb(image: Image.Image) -> Image.Image:
    """Return the picture in RGB and sRGB. Phones save Display P3 and printers CMYK, whose values mean other colours."""
    if embedded := image.info.get("icc_profile"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(embedded))
            if not ImageCms.getProfileDescription(profile).startswith("sRGB"):
                converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
                assert converted is not None, "profileToProfile returns None only when working in place"
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass  # Ignore a damaged profile, or one for another mode: treat the values as sRGB.
    return image.convert("RGB")


def _times(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
