"""Publish a LoRA: a folder to upload to a model site, with the LoRA, a page of text and pictures, and nothing personal."""

import os
import re
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import ExifTags, Image

from ..errors import BadConfig, BadFile
from ..lora.embeddings import file_word
from ..lora.file import LoraFile
from ..lora.hashes import file_hashes
from ..lora.inspect import verify_lora
from ..lora.metadata import agreed_until, copy_with_hashes, cover, personal_part, shared_metadata, small_picture
from ..lora.readers import READERS, TRAINERS, read_by
from ..lora.stated import PHRASE_KEY, UNTIL_KEY, trigger_words
from ..models.families import FAMILIES
from ..photos.reading import DAMAGED, Photo, read_photo_files, read_photos
from ..progress import OnProgress, OnWarning, silent
from ..storage.drawn import MARK_KEYS, PROGRAM_TEXTS, save_png
from ..storage.files import make_folder, remove_leftovers_of, write_text, writing
from ..storage.locks import locked
from ..storage.safetensors_file import SafetensorsFile
from ..tensor_names import NAME_TABLES
from .group import shows_several
from .headshots import CONTACT_SHEET
from .parameters import Parameters

PAGE = "page.txt"
"""The file with the texts to paste."""
CONSENT = "The person shown has agreed to the training of this model and to its publication{}."
_SETTINGS = (
    "Steps", "Sampler", "Schedule type", "CFG scale", "Distilled CFG Scale", "Seed", "Size", "Model hash", "Model",
    "VAE hash", "VAE", "Denoising strength", "Clip skip", "Prediction", "Zero terminal SNR", "Lora hashes", "TI hashes",
)  # fmt: skip
"""The settings of a picture that are kept; A1111's extensions may write anything into others."""
_ADVICE = ("Model", "Sampler", "Schedule type", "Steps", "CFG scale", "Distilled CFG Scale", "Size", "Clip skip")
_GROUP_IN_GRAPH = '"FaceLoRAGroup"'
"""The text in the graph of a picture that ComfyUI has drawn of several people: the type of our node, which is fixed."""
_MOST_PARAMETERS = 50_000
"""The most characters of a picture's parameters. The patterns below limit the length of names, so they take linear time."""
_OTHER_TAG = r"<lora:(?:[^<]{0,255}?:-?[\d.]{1,20}(?::[^<>]{0,255})?|[^<>]*)>"
"""Matches the tag of an unknown LoRA up to its strength, since a file's name may contain `>`."""
_LORA_HASH = re.compile(r"(?:^|(?<=, ))(.{1,255}?): (?:0x)?([0-9a-fA-F]{1,64})(?:, |$)")
_KINDS = {"lora": "LORA", "dora": "DoRA"}
"""Civitai's types for kinds of adapters; all other kinds are LyCORIS there."""


@dataclass(frozen=True)
class Publication:
    """The result of `publish`."""

    folder: Path
    lora: Path
    page: Path
    """The texts to paste: title, description, base model, trigger words, settings and hashes."""
    pictures: tuple[Path, ...]
    left_out: tuple[str, ...]
    """The keys of the LoRA's metadata that are not in the published file."""


@dataclass(frozen=True)
class _Example:
    photo: Photo
    parameters: Parameters | None
    """What it was drawn from, without people's names; None if the file doesn't record it."""
    strength: str = ""
    """The strength of the published LoRA in its prompt; empty if it was drawn without that LoRA."""


def publish(
    lora: str | os.PathLike[str],
    output: str | os.PathLike[str],
    pictures: Sequence[str | os.PathLike[str]] = (),
    *,
    agreed: bool = False,
    title: str | None = None,
    description: str | None = None,
    on_progress: OnProgress = silent,
    on_warning: OnWarning = warnings.warn,
) -> Publication:
    """Make a new folder `output` for a site such as Civitai, with the LoRA, a page of text, and example pictures.

    `pictures` are files, and folders of files. Their A1111 parameters are kept, with names of LoRA files replaced; all other
    metadata are removed. The LoRA's metadata about a person or a computer are removed too. `agreed` confirms that the person
    shown has agreed, which the page then states. `title` and `description` default to those in the LoRA's metadata.

    Pictures are left out if their parameters show several people, since only one of them has agreed. They are also left out if
    nothing shows that a program drew them, since they may be photos. `on_warning` is told of these pictures, of others without
    parameters or drawn without this LoRA, and of a LoRA that no program loads.

    Raises BadFile if the folder exists, the LoRA has faults, or a text to publish names a path, a photo or this computer's
    user. Raises BadConfig without a title or the person's agreement, and after its end or a withdrawal. Raises BadPhoto for an
    unreadable picture.
    """
    if not agreed:
        raise BadConfig("the person shown must have agreed to the publication; confirm it with agreed")
    source, folder = LoraFile.read(lora), Path(output)
    until = agreed_until(lora, source.metadata)
    if os.path.lexists(folder):
        raise BadFile(f"{folder}: this folder already exists; choose another output")
    if fault := next((fault for fault in verify_lora(lora) if fault.is_error), None):
        raise BadFile(f"{source.name}: {fault.text}; repair it before publishing")
    if not source.entries:
        raise BadFile(f"{source.name}: this file is an embedding; only LoRAs can be published")
    drawing = [reader for reader in READERS if reader not in TRAINERS]
    if source.identity.models and all(read_by(reader, source).verdict.startswith("not ") for reader in drawing):
        on_warning(
            f"{source.name}: no image program loads its {source.scheme} names. Convert it, and publish the result: "
            f"facelora convert {Path(source.name).name} --to {NAME_TABLES[source.family].scheme} --output NEW.safetensors"
        )
    texts = {"modelspec.title": title, "modelspec.description": description}
    stated = {UNTIL_KEY: until.isoformat()} if until else {}
    metadata = shared_metadata({**source.true_metadata, **stated}) | {
        key: text for key, text in texts.items() if text is not None
    }
    name = _file_name(metadata.get("modelspec.title", ""), source.name)
    found = [_example(photo, name, source.model_hash, on_warning) for photo in _photos(pictures, on_warning)]
    examples = [example for example in found if example]
    with _new_folder(folder) as made:
        paths = [made / f"{name}-{number:02}.png" for number in range(1, len(examples) + 1)]
        for path, example in zip(paths, examples, strict=True):
            texts = {"parameters": str(example.parameters)} if example.parameters else {}
            save_png(path, example.photo.image(), texts, is_copy=True)
        if paths:
            metadata |= cover(small_picture(paths[0]))
        path = made / f"{name}.safetensors"
        assert isinstance(source.tensors, SafetensorsFile)
        metadata = copy_with_hashes(source.tensors, path, metadata, on_progress)
        write_text(made / PAGE, _page(source, path, metadata, examples))
        names = [example.photo.name for example in examples]
        _check_nothing_personal(path, made / PAGE, dict(zip(paths, names, strict=True)))
    left_out = tuple(key for key in source.metadata if key not in metadata)
    published = tuple(folder / picture.name for picture in paths)
    return Publication(folder, folder / path.name, folder / PAGE, published, left_out)


def _file_name(title: str, lora: str) -> str:
    """Return the title as a file name of letters, digits, `-` and `_`. Raises BadConfig if nothing is left of it."""
    name = re.sub(r"[^\w-]+", "_", title).strip("_-")[:64]
    if not name:
        fault = f"its title {title!r} contains nothing usable in a file name" if title.strip() else "it has no title"
        raise BadConfig(f"{lora}: {fault}; set title")
    return file_word(name)


def _photos(pictures: Sequence[str | os.PathLike[str]], on_warning: OnWarning) -> Iterator[Photo]:
    for path in map(Path, pictures):
        if os.path.isdir(path):
            found = read_photos(path, repeats=False, drawn=True, on_warning=on_warning)
        else:
            found = read_photo_files([path], strict=True)
        yield from (photo for photo in found if photo.name != CONTACT_SHEET)


def _example(photo: Photo, name: str, model_hash: str, on_warning: OnWarning) -> _Example | None:
    """Return the picture as an example under the LoRA's published name; None if it shows other people or may be a photo."""
    assert isinstance(photo.source, Path)
    try:
        with Image.open(photo.source) as image:
            text, recorded = image.info.get("parameters") or _comment(image), not PROGRAM_TEXTS.isdisjoint(image.info)
            graph = "".join(str(image.info.get(name, "")) for name in ("prompt", "workflow"))
    except DAMAGED:
        text, recorded, graph = None, False, ""
    if isinstance(text, str) and len(text) > _MOST_PARAMETERS:
        size = f"{len(text):,} characters, more than {_MOST_PARAMETERS:,}"
        on_warning(f"{photo.name}: left out: its parameters have {size}")
        return None
    parameters = Parameters.read(text) if isinstance(text, str) else None
    if parameters is None and not recorded:  # The mark of drawn pictures is not enough: sheets and covers have it too.
        on_warning(f"{photo.name}: left out: it may be a photo or show other people, since no prompt or graph is in it")
        return None
    if (parameters and shows_several(parameters)) or _GROUP_IN_GRAPH in graph:
        on_warning(f"{photo.name}: left out: its parameters show several people, but the LoRA is of one person")
        return None
    if parameters is None:
        on_warning(f"{photo.name}: it has no A1111 parameters, so visitors cannot see how it was made")
        return _Example(photo, None)
    hashes = {stem: number.lower() for stem, number in _LORA_HASH.findall(parameters.settings.get("Lora hashes", ""))}
    ours = {stem for stem, number in hashes.items() if model_hash.startswith(number)}
    if not ours:
        on_warning(f"{photo.name}: the hashes in its parameters show that it was drawn without this LoRA")
    # A LoRA's file may be named after a person; sites find it by its hash.
    names = {stem: name if stem in ours else number for stem, number in hashes.items()}
    strengths = [tag[2] or "1" for tag in _tags(hashes).finditer(parameters.prompt) if tag[1] in ours]
    return _Example(photo, _without_names(parameters, names, hashes), next(iter(strengths), ""))


def _tags(stems: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of the tags of LoRAs in a prompt. Its groups are one of these names, if it is one, and the strength."""
    known = "|".join(map(re.escape, sorted(stems, key=len, reverse=True)))
    return re.compile(rf"(?<!\s)\s*(?:<lora:({known or '(?!)'})(?::(-?[\d.]{{1,20}})?[^<>]*)?>|{_OTHER_TAG})")


def _comment(image: Image.Image) -> str:
    """Return a picture's EXIF comment, where A1111 writes parameters in JPEG and WebP files; empty without one."""
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(b"UNICODE\0"):
        return ""
    return comment[8:].decode("utf-16-be", errors="replace")


def _without_names(parameters: Parameters, names: Mapping[str, str], hashes: Mapping[str, str]) -> Parameters:
    """Return the parameters with LoRAs renamed, and without unknown settings and names that have no hash."""

    def renamed(tag: re.Match[str]) -> str:
        return f" <lora:{names[tag[1]]}:{tag[2] or 1}>" if tag[1] else ""

    settings = {key: parameters.settings[key] for key in _SETTINGS if key in parameters.settings}
    for key in ("Model", "VAE"):
        if f"{key} hash" not in settings:  # This is the name of a folder.
            settings.pop(key, None)
    if names:
        settings["Lora hashes"] = ", ".join(f"{names[stem]}: {number}" for stem, number in hashes.items())
    prompt, negative = (_tags(names).sub(renamed, text).strip() for text in (parameters.prompt, parameters.negative))
    return replace(parameters, prompt=prompt, negative=negative, settings=settings)


def _page(source: LoraFile, path: Path, metadata: Mapping[str, str], examples: Sequence[_Example]) -> str:
    listings, until = source.listings, metadata.get(UNTIL_KEY)
    consent = CONSENT.format(f", until {until}" if until else "")
    strength, settings = _advice(source if listings else None, examples)
    found = file_hashes(path)
    # Civitai's names for the hashes.
    hashes = [
        f"{name}: {found[name.lower()].upper()}"
        for name in ("AutoV2", "AutoV3", "CRC32", "BLAKE3", "SHA256")
        if name.lower() in found
    ]
    licences = " or ".join(dict.fromkeys(listing.licence for listing in listings))
    fields = {
        "Title": metadata["modelspec.title"],
        "Description": "\n\n".join(filter(None, [metadata.get("modelspec.description"), consent])),
        "Type": _KINDS.get(source.kind, "LyCORIS"),
        "Base model": " or ".join(listing.civitai for listing in listings) or "unknown",
        "Trigger words": metadata.get(PHRASE_KEY, "none known"),
        "Strength": strength,
        "Settings": ", ".join(f"{name}: {value}" for name, value in settings.items()) or "unknown",
        f"Hashes of {path.name}": "\n".join(hashes),
        "Licence of the base model": f"{licences}\n(a checkpoint based on it may have a different licence)"
        if licences
        else "unknown",
    }
    return "\n".join(f"{name}\n{'-' * len(name)}\n{text}\n" for name, text in fields.items())


def _advice(source: LoraFile | None, examples: Sequence[_Example]) -> tuple[str, dict[str, str]]:
    """Return the strength and settings of most of the LoRA's pictures, else the usual ones of its family, if it is known."""
    drawn = [(example.strength, example.parameters) for example in examples if example.strength and example.parameters]
    if drawn:
        usual = Counter(strength for strength, _ in drawn).most_common(1)[0][0]
        seen = {key: Counter(made.settings[key] for _, made in drawn if key in made.settings) for key in _ADVICE}
        return usual, {key: counts.most_common(1)[0][0] for key, counts in seen.items() if counts}
    spec = FAMILIES.get(source.family) if source else None
    if spec is None:
        return "1", {}
    side = spec.resolution
    return "1", {"Steps": f"{spec.steps}", "CFG scale": f"{spec.guidance:g}", "Size": f"{side}x{side}"}


def _check_nothing_personal(lora: Path, page: Path, pictures: Mapping[Path, str]) -> None:
    """Raise BadFile if a text in the files names a path, a photo or the user. `pictures` are original names, for messages."""
    metadata = SafetensorsFile.open(lora).metadata
    texts = [(f"the LoRA's {key}", text) for key, text in metadata.items() if key not in cover("")]
    texts += [("the page", page.read_text(encoding="utf-8"))]
    for path, name in pictures.items():
        with Image.open(path) as image:
            assert set(image.info) <= {"parameters", *MARK_KEYS}
            texts.append((f"{name}, parameters", image.info.get("parameters", "")))
    words = [word for phrase in trigger_words(metadata) for word in (phrase, *phrase.split())]
    for what, text in texts:
        if part := personal_part(text, words):
            raise BadFile(f"{what}: found {part}, which should not be published; change the text or leave it out")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """Make a folder that becomes `folder` after the context. It is deleted after an error, as are those of killed processes."""
    made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    make_folder(folder.parent)
    with locked(folder):
        remove_leftovers_of(folder)
        try:
            yield make_folder(made)
            with writing(folder):
                made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
