"""A folder with all that one uploads to a site for models: a LoRA, a page of text and pictures, without anything personal."""

import os
import re
import shutil
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import ExifTags, Image

from ..errors import BadConfig, BadFile
from ..lora.file import LoraFile
from ..lora.hashes import file_hashes
from ..lora.metadata import copy_with_hashes, cover, small_picture
from ..lora.personal import personal_part, shared_metadata
from ..lora.progress import OnProgress, silent
from ..lora.readers import READERS, TRAINERS, read_by
from ..lora.verify import verify_lora
from ..lora.words import PHRASE_KEY, trigger_words
from ..models.families import FAMILIES
from ..photos.reading import DAMAGED, Photo, read_photo_files, read_photos
from ..storage.files import clean_place, make_folder, write_text, writing
from ..storage.locks import locked
from ..storage.safetensors_file import SafetensorsFile
from ..tensor_names import NAME_TABLES
from .group import GROUP_NODE, shows_several
from .headshots import CONTACT_SHEET
from .parameters import Parameters, save_png

PAGE = "page.txt"
"""The name of the file with the texts to paste."""
CONSENT = "The person shown has agreed to the training of this model and to its publication."
_SETTINGS = (
    "Steps", "Sampler", "Schedule type", "CFG scale", "Distilled CFG Scale", "Seed", "Size", "Model hash", "Model",
    "VAE hash", "VAE", "Denoising strength", "Clip skip", "Prediction", "Zero terminal SNR", "Lora hashes", "TI hashes",
)  # fmt: skip
"""The settings of a picture that stay; others hold whatever an extension of A1111 writes."""
_ADVICE = ("Sampler", "Schedule type", "Steps", "CFG scale", "Distilled CFG Scale", "Size", "Clip skip")
_DRAWN = {"parameters", "prompt", "workflow", "invokeai_metadata", "sd-metadata"}
"""The names of what A1111, ComfyUI and InvokeAI write into a PNG file that they draw."""
_LORA_TAG = re.compile(r"\s*<lora:([^:>]*):?([^:>]*)[^>]*>")
_LORA_HASH = re.compile(r"(.+?): (?:0x)?([0-9a-fA-F]+)(?:, |$)")
_KINDS = {"lora": "LORA", "dora": "DoRA"}
"""The type that Civitai has for a kind of adapter; all others are LyCORIS there."""


@dataclass(frozen=True)
class Publication:
    """What `publish` has made."""

    folder: Path
    lora: Path
    page: Path
    """The texts to paste: title, description, base model, trigger words, settings and hashes."""
    pictures: tuple[Path, ...]
    left_out: tuple[str, ...]
    """The keys of the LoRA's metadata that are not in the published file."""


@dataclass(frozen=True)
class _Example:
    """A picture to publish."""

    photo: Photo
    said: Parameters | None
    """What it was drawn from, without names of people; None where the file does not say."""
    strength: str = ""
    """The strength of the published LoRA in its prompt; empty where that LoRA did not draw it."""


def publish(
    lora: str | os.PathLike[str],
    output: str | os.PathLike[str],
    pictures: Sequence[str | os.PathLike[str]] = (),
    *,
    agreed: bool = False,
    title: str | None = None,
    description: str | None = None,
    on_progress: OnProgress = silent,
    on_warning: Callable[[str], None] = warnings.warn,
) -> Publication:
    """The files of a new folder `output`, made for a site such as Civitai: the LoRA, a page of text, and example pictures.

    `pictures` are files and folders of them. Their A1111 parameters stay where they have some, with names of LoRA files
    replaced; all other metadata go, as do those of the LoRA that tell of a person or a computer. `agreed` says that the person
    shown has agreed to it, which the page then says too. `title` and `description` are else those in the LoRA's metadata.
    A picture whose parameters say that several people are in it is left out: one of them has not agreed to this.
    So is one in which nothing says that a program has drawn it, since it may be a photo. `on_warning` is told of these, of
    other pictures without parameters, of those that were drawn without this LoRA, and of a LoRA that no program loads.

    Raises BadFile when the folder is there already, the LoRA has faults, or a text that would be published names a path, a
    photo or this computer's user; BadConfig without a title, or where nobody has agreed; BadPhoto for an unreadable picture.
    """
    if not agreed:
        raise BadConfig("nothing is published of anyone who has not agreed; agreed says that the person has")
    source, folder = LoraFile.read(lora), Path(output)
    if os.path.lexists(folder):
        raise BadFile(f"{folder}: is there already; choose another output")
    if not source.entries:
        raise BadFile(f"{source.name}: holds vectors of a word and no LoRA; only LoRAs are published")
    if fault := next((fault for fault in verify_lora(lora) if fault.is_error), None):
        raise BadFile(f"{source.name}: {fault.text}; mend it before it is published")
    if _is_loaded_by_none(source):
        on_warning(
            f"{source.name}: no program that draws pictures loads its {source.scheme} names; publish what this makes of it: "
            f"facelora convert {Path(source.name).name} --to {NAME_TABLES[source.family].scheme} --output NEW.safetensors"
        )
    texts = {"modelspec.title": title, "modelspec.description": description}
    metadata = shared_metadata(source.true_metadata) | {key: text for key, text in texts.items() if text is not None}
    name = _file_name(metadata.get("modelspec.title", ""), source.name)
    found = [_example(photo, name, source.model_hash, on_warning) for photo in _photos(pictures, on_warning)]
    examples = [example for example in found if example]
    with _new_folder(folder) as made:
        paths = [made / f"{name}-{number:02}.png" for number in range(1, len(examples) + 1)]
        for path, example in zip(paths, examples, strict=True):
            save_png(path, example.photo.image(), {"parameters": str(example.said)} if example.said else {})
        if paths:
            metadata |= cover(small_picture(paths[0]))
        path = made / f"{name}.safetensors"
        assert isinstance(source.tensors, SafetensorsFile)
        metadata = copy_with_hashes(source.tensors, path, metadata, on_progress)
        write_text(made / PAGE, _page(source, path, metadata, examples))
        names = [example.photo.name for example in examples]
        _check_nothing_personal(path, made / PAGE, dict(zip(paths, names, strict=True)))
    left_out = tuple(key for key in source.metadata if key not in metadata)
    return Publication(
        folder, folder / path.name, folder / PAGE, tuple(folder / picture.name for picture in paths), left_out
    )


def _is_loaded_by_none(lora: LoraFile) -> bool:
    """Whether none of the programs that draw pictures loads any module of a LoRA for a published model."""
    drawing = [reader for reader in READERS if reader not in TRAINERS]
    return bool(lora.identity.models) and all(read_by(reader, lora).verdict == "not at all" for reader in drawing)


def _file_name(title: str, lora: str) -> str:
    """The title as a file's name, of letters, digits, `-` and `_`. Raises BadConfig where nothing is left of it."""
    name = re.sub(r"[^\w-]+", "_", title).strip("_-")[:64]
    if not name:
        raise BadConfig(f"{lora}: has no title that could name a file; give one (title)")
    return name


def _photos(pictures: Sequence[str | os.PathLike[str]], on_warning: Callable[[str], None]) -> Iterator[Photo]:
    for path in map(Path, pictures):
        found = (
            read_photos(path, repeats=False, on_warning=on_warning)
            if os.path.isdir(path)
            else read_photo_files([path], strict=True)
        )
        yield from (photo for photo in found if photo.name != CONTACT_SHEET)


def _example(photo: Photo, name: str, model_hash: str, on_warning: Callable[[str], None]) -> _Example | None:
    """The picture as an example of the LoRA under its published name; None where it shows other people, or may be a photo."""
    assert isinstance(photo.source, Path)
    try:
        with Image.open(photo.source) as image:
            text, is_drawn = image.info.get("parameters") or _comment(image), not _DRAWN.isdisjoint(image.info)
            graph = "".join(str(image.info.get(name, "")) for name in ("prompt", "workflow"))
    except DAMAGED:
        text, is_drawn, graph = None, False, ""
    said = Parameters.read(text) if isinstance(text, str) else None
    if said is None and not is_drawn:
        on_warning(f"{photo.name}: is left out, since nothing in it says that it was drawn, and it may be a photo")
        return None
    if (said and shows_several(said)) or f'"{GROUP_NODE}"' in graph:
        on_warning(f"{photo.name}: is left out, since by its parameters it shows several people and this is one's LoRA")
        return None
    if said is None:
        on_warning(f"{photo.name}: has no parameters of A1111 in it, so nobody will see how it was made")
        return _Example(photo, None)
    hashes = {stem: number.lower() for stem, number in _LORA_HASH.findall(said.settings.get("Lora hashes", ""))}
    ours = {stem for stem, number in hashes.items() if model_hash.startswith(number)}
    if not ours:
        on_warning(f"{photo.name}: was drawn without this LoRA, by the hashes in its parameters")
    # A LoRA's file may be named after a person; sites find it by its hash.
    names = {stem: name if stem in ours else number for stem, number in hashes.items()}
    strengths = [strength or "1" for stem, strength in _LORA_TAG.findall(said.prompt) if stem in ours]
    return _Example(photo, _without_names(said, names, hashes), next(iter(strengths), ""))


def _comment(image: Image.Image) -> str:
    """The EXIF comment of a picture as A1111 writes it into JPEG and WebP files; empty without one."""
    comment = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if not isinstance(comment, bytes) or not comment.startswith(b"UNICODE\0"):
        return ""
    return comment[8:].decode("utf-16-be", errors="replace")


def _without_names(said: Parameters, names: Mapping[str, str], hashes: Mapping[str, str]) -> Parameters:
    """The parameters with LoRAs under these names, without settings that are not known and names without a hash."""

    def renamed(tag: re.Match[str]) -> str:
        return f" <lora:{names[tag[1]]}:{tag[2] or 1}>" if tag[1] in names else ""

    settings = {key: said.settings[key] for key in _SETTINGS if key in said.settings}
    for key in ("Model", "VAE"):
        if f"{key} hash" not in settings:  # it is a folder's name
            settings.pop(key, None)
    if names:
        settings["Lora hashes"] = ", ".join(f"{names[stem]}: {number}" for stem, number in hashes.items())
    prompt, negative = (_LORA_TAG.sub(renamed, text).strip() for text in (said.prompt, said.negative))
    return replace(said, prompt=prompt, negative=negative, settings=settings)


def _page(source: LoraFile, path: Path, metadata: Mapping[str, str], examples: Sequence[_Example]) -> str:
    """The texts to paste, each below the name of its field."""
    table = NAME_TABLES[source.family].listings
    listings = [table[model] for model in source.identity.models if model in table]
    strength, settings = _advice(source if listings else None, examples)
    fields = {
        "Title": metadata["modelspec.title"],
        "Description": "\n\n".join(filter(None, [metadata.get("modelspec.description"), CONSENT])),
        "Type": _KINDS.get(source.kind, "LyCORIS"),
        "Base model": " or ".join(listing.civitai for listing in listings) or "not known",
        "Trigger words": metadata.get(PHRASE_KEY, "none are known"),
        "Strength": strength,
        "Settings": ", ".join(f"{name}: {value}" for name, value in settings.items()) or "not known",
        f"Hashes of {path.name}": "\n".join(f"{name}: {value}" for name, value in _hashes(path).items()),
        "Licence of the base model": " or ".join(dict.fromkeys(listing.licence for listing in listings))
        + "\n(a checkpoint that was made from it may have another one)"
        if listings
        else "not known",
    }
    return "\n".join(f"{name}\n{'-' * len(name)}\n{text}\n" for name, text in fields.items())


def _advice(source: LoraFile | None, examples: Sequence[_Example]) -> tuple[str, dict[str, str]]:
    """The strength and the settings of most of the pictures that the LoRA has drawn, else those that suit the family.

    `source` is the LoRA, None where its base model is not known.
    """
    drawn = [(example.strength, example.said) for example in examples if example.strength and example.said]
    if drawn:
        usual = Counter(strength for strength, _ in drawn).most_common(1)[0][0]
        seen = {key: Counter(said.settings[key] for _, said in drawn if key in said.settings) for key in _ADVICE}
        return usual, {key: counts.most_common(1)[0][0] for key, counts in seen.items() if counts}
    spec = FAMILIES.get(source.family) if source else None
    if spec is None:
        return "1", {}
    side = spec.resolution
    return "1", {"Steps": f"{spec.steps}", "CFG scale": f"{spec.guidance:g}", "Size": f"{side}x{side}"}


def _hashes(path: Path) -> dict[str, str]:
    """The hashes of the published file under Civitai's names."""
    found = file_hashes(path)
    names = {"AutoV2": "autov2", "AutoV3": "autov3", "CRC32": "crc32", "BLAKE3": "blake3", "SHA256": "sha256"}
    return {name: found[key].upper() for name, key in names.items() if key in found}


def _check_nothing_personal(lora: Path, page: Path, pictures: Mapping[Path, str]) -> None:
    """Raises BadFile when a text in the files, read again, names a path, a photo or the user.

    `pictures` has the name that each picture had before, by which the message calls it.
    """
    metadata = SafetensorsFile.open(lora).metadata
    texts = [(f"the LoRA's {key}", text) for key, text in metadata.items() if key not in cover("")]
    texts += [("the page", page.read_text(encoding="utf-8"))]
    for path, name in pictures.items():
        with Image.open(path) as image:
            assert set(image.info) <= {"parameters"}
            texts += [(f"{name}: what it was drawn from", text) for text in image.info.values()]
    words = [word for phrase in trigger_words(metadata) for word in (phrase, *phrase.split())]
    for what, text in texts:
        if part := personal_part(text, words):
            raise BadFile(f"{what} has {part} in it, which should not be published; change the text or leave it out")


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A context with a folder that is renamed to `folder` at its end, and is gone where something fails.

    What a killed process left of it is deleted.
    """
    made = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    make_folder(folder.parent)
    with locked(folder):
        clean_place(folder)
        try:
            yield make_folder(made)
            with writing(folder):
                made.rename(folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
