"""Inspection of LoRA files: their content, their faults, and changes to their metadata alone."""

import base64
import hashlib
import io
import itertools
import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import BadConfig, BadFile, BadPhoto, FaceLoraError, one_line
from ..models.base_weights import BaseWeights
from ..photos.reading import read_photo_files
from ..storage.safetensors_file import CHUNK_BYTES, SafetensorsFile, copy_with_metadata
from ..tensor_names import NAME_TABLES, is_published
from .embeddings import word_of
from .file import Entry, LoraFile, family_in_metadata, fit
from .hashes import legacy_hash
from .kinds import KINDS, needs_base
from .norms import LARGEST_VALUE, change_norm, largest_change
from .readers import READERS, not_loaded

_SETTINGS = {
    "network_module": "network",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "steps": "steps",
    "num_epochs": "epochs",
    "num_train_images": "images",
    "resolution": "resolution",
    "total_batch_size": "batch size",
    "learning_rate": "learning rate",
    "text_encoder_lr": "text encoder learning rate",
    "lr_scheduler": "schedule",
    "optimizer": "optimizer",
    "min_snr_gamma": "min-SNR gamma",
    "noise_offset": "noise offset",
    "clip_skip": "clip skip",
    "mixed_precision": "precision",
    "seed": "seed",
}
MODELSPEC_VERSION = "1.0.1"
_MODELSPEC = ("title", "author", "description", "trigger_phrase", "tags", "license", "usage_hint", "date")
_SHOWN_CHARACTERS = 200


OnProgress = Callable[[int, int], None]
"""A function that is told (steps done, steps in all)."""


def silent(done: int, total: int) -> None:
    """The OnProgress that tells nobody."""
    pass


def _steps(on_progress: OnProgress, total: int) -> Callable[[], None]:
    """A function to be called after each step, which passes on how many of the `total` steps are done."""
    done = itertools.count(1)
    return lambda: on_progress(next(done), total)


def inspect_lora(
    path: str | os.PathLike[str], read_tensors: bool = True, on_progress: OnProgress = silent
) -> dict[str, Any]:
    """A report of everything that is known of a LoRA file, as values for JSON.

    Without `read_tensors` hashes and norms are left out, and only the header is read, whatever the size of the file.
    Raises BadFile or UnknownFamily when it is no LoRA file.
    """
    path = Path(path)
    lora = LoraFile.read(path)
    entries = lora.entries
    ranks = Counter(entry.rank for entry in entries if entry.rank is not None)
    report: dict[str, Any] = {
        "file": path.name,
        "bytes": path.stat().st_size,
        "tensors": len(lora.tensors),
        "dtype": str(lora.dtype).removeprefix("torch."),
        "family": lora.family,
        "identity": _identity(lora),
        "scheme": lora.scheme,
        "kind": lora.kind,
        "kinds": _histogram(entry.kind for entry in entries),
        "parts": _histogram(entry.part for entry in entries),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "alphas": _histogram(_alpha_text(lora, entry) for entry in entries if entry.rank is not None),
        "embeddings": sorted({word_of(lora, key) for key in lora.embedding_keys}),
        "unknown_keys": list(lora.unknown_keys),
        "not_loaded_by": {reader: not_loaded_by(reader, lora) for reader in READERS},
        "base_model": _known(
            version=lora.metadata.get("ss_base_model_version"),
            name=lora.metadata.get("ss_sd_model_name"),
            hash=lora.metadata.get("ss_new_sd_model_hash") or lora.metadata.get("ss_sd_model_hash"),
            architecture=lora.metadata.get("modelspec.architecture"),
        ),
        "trigger_words": trigger_words(lora.metadata),
        "training": _known(**{label: lora.metadata.get(f"ss_{key}") for key, label in _SETTINGS.items()}),
        "about": _known(**{key: lora.metadata.get(f"modelspec.{key}") for key in _MODELSPEC}),
        "thumbnail": "modelspec.thumbnail" in lora.metadata,
    }
    if read_tensors:
        step = _steps(on_progress, _chunks(path) + len(entries))
        report["hashes"] = file_hashes(path, step)
        report["norms"] = block_norms(lora, step)
    return report


def _identity(lora: LoraFile) -> dict[str, Any]:
    """The published models that the LoRA is for, as values for JSON."""
    found = lora.identity
    return {
        "verdict": found.verdict,
        "models": list(found.models),
        "nearest": found.nearest,
        "misfits": len(found.misfits),
        "misfit": next(iter(found.misfits), None),
    }


def not_loaded_by(reader: str, lora: LoraFile) -> dict[str, str]:
    """The reason for each module, by name, why a program would not load it; empty when it loads everything.

    `reader` is one of readers.READERS.
    """
    family = NAME_TABLES[lora.family]
    reasons = {e.name: not_loaded(reader, family, e.name, e.kind, e.keys.values()) for e in lora.entries}
    made_up = [e for e in lora.entries if not all(is_published(lora.family, *module) for module in e.modules)]
    reasons |= {entry.name: f"a module that no published {lora.family} model has" for entry in made_up}
    return {name: reason for name, reason in reasons.items() if reason}


def _histogram(values) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _known(**values: str | None) -> dict[str, str]:
    return {key: value for key, value in values.items() if value not in (None, "", "None", "null")}


def _alpha_text(lora: LoraFile, entry: Entry) -> str:
    alpha = lora.tensors_of(entry).get("alpha")
    return "none (as rank)" if alpha is None else f"{alpha.item():g}"


def inspect_folder(folder: str | os.PathLike[str], read_tensors: bool = False) -> Iterator[dict[str, Any]]:
    """The report of every safetensors file in and below a folder, in the order of their names, one as it is made.

    `file` is the path from the folder on. A file that is no LoRA, or damaged, has a report of its `file` and the `error`.
    """
    folder = Path(folder)
    for path in sorted(folder.rglob("*.safetensors")):
        name = {"file": path.relative_to(folder).as_posix()}
        try:
            yield inspect_lora(path, read_tensors) | name
        except FaceLoraError as error:
            yield name | {"error": str(error).removeprefix(f"{path}: ")}


def format_line(report: Mapping[str, Any]) -> str:
    """A report of `inspect_folder` as a line for a person."""
    if "error" in report:
        return one_line(f"{report['file']}: {report['error']}")
    models = " or ".join(report["identity"]["models"]) or f"named like {report['family']}"
    trigger = f", trigger: {_short(report['trigger_words'][0])}" if report["trigger_words"] else ""
    return one_line(f"{report['file']}: {models}, {report['kind']} of rank {_counts(report['ranks'])}{trigger}")


def format_inspection(report: Mapping[str, Any]) -> str:
    """The report of `inspect_lora` as text for a person."""
    lines = [
        f"{report['file']}  ({report['bytes'] / 1e6:.1f} MB, {report['tensors']} tensors, {report['dtype']})",
        f"  for           {report['family']}, {report['scheme']} names",
        *([f"                {_doubt(report['identity'])}"] if report["identity"]["verdict"] != "certain" else []),
        f"  kind          {report['kind']}: {KINDS.get(report['kind'], 'several kinds of adapters')}",
    ]
    if report["parts"]:
        lines.append(f"  modules       {_counts(report['parts'])}")
        lines.append(f"  rank          {_counts(report['ranks'])}")
        lines.append(f"  alpha         {_counts(report['alphas'])}")
    if report["trigger_words"]:
        lines.append(f"  trigger       {_short(', '.join(report['trigger_words'][:10]))}")
    for title, section in (("base", "base_model"), ("about", "about"), ("training", "training"), ("hashes", "hashes")):
        rows = report.get(section) or {}
        lines += [f"  {title if first else '':<13} {key}: {_short(value)}" for first, key, value in _rows(rows)]
    norms = report.get("norms") or {}
    largest = max((norm for norm in norms.values() if norm is not None), default=0.0) or 1.0
    for first, block, norm in _rows(norms):
        value = "NaN or infinity" if norm is None else f"{norm:9.4f} {'#' * round(24 * norm / largest)}"
        lines.append(f"  {'change' if first else '':<13} {block:<28} {value}")
    if report["embeddings"]:
        lines.append(f"  embeddings    {_short(', '.join(report['embeddings']))}")
    if report["unknown_keys"]:
        lines.append(f"  not understood: {len(report['unknown_keys'])}, e.g. {_short(report['unknown_keys'][0])}")
    total = sum(report["parts"].values())
    loads = {reader: _loads(total, refused) for reader, refused in report["not_loaded_by"].items() if total}
    lines += [f"  {'loads' if first else '':<13} {reader}: {text}" for first, reader, text in _rows(loads)]
    return "\n".join(map(one_line, lines))


def _doubt(identity: Mapping[str, Any]) -> str:
    """A sentence on an identity that is not certain."""
    if identity["models"]:
        return f"its modules are in several models alike: {', '.join(identity['models'])}"
    if not identity["nearest"]:
        return "by its names alone: no published model has modules of such sizes"
    return (
        f"by its names alone; the nearest published model is {identity['nearest']}, where "
        f"{identity['misfits']} modules do not fit, e.g. {_short(identity['misfit'])}"
    )


def _loads(total: int, refused: Mapping[str, str]) -> str:
    if not refused:
        return f"all {total} modules"
    return f"{total - len(refused)} of {total} modules; it does not know {next(iter(refused.values()))}"


def _rows(section: Mapping[str, Any]) -> list[tuple[bool, str, Any]]:
    return [(number == 0, key, value) for number, (key, value) in enumerate(section.items())]


def _counts(histogram: Mapping[str, int]) -> str:
    if len(histogram) == 1:
        return next(iter(histogram))
    return ", ".join(f"{key} ({count}x)" for key, count in histogram.items()) or "none"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger words that the metadata name, best first: those of modelspec and the subsets, then frequent tags."""
    words = [word.strip() for word in metadata.get("modelspec.trigger_phrase", "").split(",")]
    for dataset in _json(metadata, "ss_datasets", list):
        subsets = dataset.get("subsets") if isinstance(dataset, dict) else None
        for subset in subsets if isinstance(subsets, list) else []:
            if isinstance(subset, dict):
                words.append(str(subset.get("class_tokens") or ""))
    for tags in _json(metadata, "ss_tag_frequency", dict).values():
        if isinstance(tags, dict):
            counts = [(tag, count) for tag, count in tags.items() if isinstance(count, int)]
            words += [tag.strip() for tag, _ in sorted(counts, key=lambda pair: -pair[1])[:5]]
    return [word for word in dict.fromkeys(words) if word and word != "None"]


def _json(metadata: Mapping[str, str], key: str, kind: type) -> Any:
    """The JSON value of type `kind` that a metadata value holds, an empty one where it is damaged or of another type."""
    try:
        value = json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        return kind()
    return value if isinstance(value, kind) else kind()


def _chunks(path: str | os.PathLike[str]) -> int:
    """The number of steps in which a file is hashed."""
    return 1 + Path(path).stat().st_size // CHUNK_BYTES


def file_hashes(path: str | os.PathLike[str], step: Callable[[], None] = lambda: None) -> dict[str, str]:
    """The hashes by which the community knows a file, computed from its bytes; `step` is called `_chunks` times.

    `autov3` and A1111's short hash are the first 12 digits of `sshs_model_hash`, `autov2` is the first 10 of `sha256`.
    """
    file = SafetensorsFile.open(path)
    whole, model = hashlib.sha256(), hashlib.sha256()
    with file.path.open("rb") as stream:
        start = stream.read(8)
        header = stream.read(struct.unpack("<Q", start)[0])
        whole.update(start + header)
        for _ in range(_chunks(path)):
            chunk = stream.read(CHUNK_BYTES)
            whole.update(chunk)
            model.update(chunk)
            step()
    return {
        "sha256": whole.hexdigest(),
        "autov2": whole.hexdigest()[:10],
        "sshs_model_hash": model.hexdigest(),
        "autov3": model.hexdigest()[:12],
        "sshs_legacy_hash": legacy_hash(file, file.metadata),
    }


def block_norms(lora: LoraFile, step: Callable[[], None] = lambda: None) -> dict[str, float | None]:
    """The Frobenius norm of each block's weight change, None if it is not finite; DoRA and OFT are left out.

    `step` is called for each module.
    """
    norms: dict[str, float] = {}
    for entry in lora.entries:
        step()
        if entry.kind == "bias" or needs_base(entry.kind, entry.keys):
            continue
        block = _block(entry)
        norms[block] = math.hypot(norms.get(block, 0.0), change_norm(entry.kind, lora.tensors_of(entry)))
    return {
        block: round(norms[block], 6) if math.isfinite(norms[block]) else None
        for block in sorted(norms, key=_by_number)
    }


def _by_number(block: str) -> list[tuple[str, int]]:
    return [(word, int(number or 0)) for word, number in re.findall(r"(\D+)(\d*)", block)]


def _block(entry: Entry) -> str:
    path = entry.modules[0][1]
    match = re.match(r"(?:text_model\.encoder\.)?\w+(?:\.\d+)?", path)
    block = match[0].removeprefix("text_model.encoder.") if match else path
    return block if entry.part == "denoiser" else f"{entry.part}.{block}"


@dataclass(frozen=True)
class Fault:
    """A fault of a LoRA file that `verify_lora` has found."""

    is_error: bool
    """Whether the file does not do what it should; other faults are only worth a look."""
    text: str


SUSPICIOUS_NORM = 20.0
"""The multiple of the median from which a module's change is suspicious."""


def verify_lora(
    path: str | os.PathLike[str], base: str | os.PathLike[str] | None = None, on_progress: OnProgress = silent
) -> list[Fault]:
    """The faults of a LoRA file: none, if it is what its metadata say and every module has a sane change.

    With a checkpoint `base`, modules that have no place there are faults too. Raises BadFile or UnknownFamily when it is
    no LoRA file.
    """
    lora = LoraFile.read(path)
    step = _steps(on_progress, _chunks(path) + len(lora.tensors) + len(lora.entries))
    faults = [
        *_verify_names(lora),
        *_verify_metadata(lora, file_hashes(path, step)),
    ]
    if base is not None:
        weights = BaseWeights.open(base)
        left_over = fit(lora, weights.family, weights.shapes, weights.biased).left_over
        examples = "; ".join(f"{key} {why}" for key, why in list(left_over.items())[:3])
        if left_over:
            text = (
                f"{len(left_over)} keys have no place in {weights.file.path.name} ({weights.family}), e.g. {examples}"
            )
            faults.append(Fault(True, text))
    broken = []
    for name, tensor in lora.tensors.items():
        broken += [] if _is_finite(tensor) else [name]
        step()
    if broken:
        faults.append(Fault(True, f"{len(broken)} tensors hold NaN or infinity, e.g. {broken[0]}"))
        return faults
    return faults + _verify_norms(lora, step)


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor.float()).all())


def _verify_names(lora: LoraFile) -> list[Fault]:
    faults = []
    if lora.unknown_keys:
        text = f"{len(lora.unknown_keys)} tensors are not understood or not complete, e.g. {lora.unknown_keys[0]}"
        faults.append(Fault(True, text))
    schemes = Counter(entry.scheme for entry in lora.entries)
    if len(schemes) > 1:
        faults.append(Fault(False, f"its names are of several schemes: {_counts(schemes)}"))
    modules = Counter(module for entry in lora.entries for module in entry.modules)
    twice = [module for module, count in modules.items() if count > 1]
    if twice:
        faults.append(Fault(True, f"{len(twice)} modules are changed twice, e.g. {twice[0][1]}"))
    refused = list(not_loaded_by("ComfyUI", lora))
    if refused:
        faults.append(Fault(False, f"ComfyUI would not load {len(refused)} modules, e.g. {refused[0]}; convert it"))
    return faults


def _verify_metadata(lora: LoraFile, hashes: Mapping[str, str]) -> list[Fault]:
    faults = []
    claimed = family_in_metadata(lora.metadata)
    if claimed not in (None, lora.family):
        faults.append(Fault(True, f"its metadata say {claimed}, its tensors are for {lora.family}"))
    in_fact: dict[str, str] = {**hashes, "modelspec.hash_sha256": hashes["sshs_model_hash"]}
    for key in ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"):
        claimed_hash = lora.metadata.get(key, in_fact[key]).removeprefix("0x")
        if claimed_hash != in_fact[key]:
            text = f"{key} is {claimed_hash[:12]} in the metadata, but {in_fact[key][:12]} in fact"
            faults.append(Fault(key == "sshs_model_hash", text))
    ranks = {str(entry.rank) for entry in lora.entries if entry.rank is not None}
    stated = lora.metadata.get("ss_network_dim", "")
    if stated.isdecimal() and ranks and stated not in ranks:
        faults.append(Fault(False, f"its metadata say rank {stated}, its modules have {', '.join(sorted(ranks))}"))
    if not trigger_words(lora.metadata):
        faults.append(Fault(False, "its metadata name no trigger word"))
    return faults


def _verify_norms(lora: LoraFile, step: Callable[[], None]) -> list[Fault]:
    norms, huge = {}, []
    for entry in lora.entries:
        tensors = lora.tensors_of(entry)
        huge += [] if largest_change(entry.kind, tensors) <= LARGEST_VALUE else [entry.name]
        if entry.kind != "bias" and not needs_base(entry.kind, entry.keys):
            norms[entry.name] = change_norm(entry.kind, tensors)
        step()
    faults = []
    if huge:
        text = f"the changes of {len(huge)} modules hold numbers that are too large for a weight, e.g. {huge[0]}"
        faults.append(Fault(True, text))
    zero = [name for name, norm in norms.items() if norm == 0]
    if zero:
        everything = len(zero) == len(norms)
        text = "no module changes anything" if everything else f"{len(zero)} modules change nothing, e.g. {zero[0]}"
        faults.append(Fault(everything, text))
    sizes = sorted(norm for norm in norms.values() if norm > 0)
    if sizes:
        median = sizes[len(sizes) // 2]
        large = [name for name, norm in norms.items() if norm > SUSPICIOUS_NORM * median]
        if large:
            text = f"{len(large)} modules change far more than the others ({SUSPICIOUS_NORM:g} times the median), e.g. "
            faults.append(Fault(False, text + large[0]))
    return faults


def edit_metadata(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    author: str | None = None,
    description: str | None = None,
    trigger_phrase: str | None = None,
    tags: Sequence[str] | None = None,
    license: str | None = None,
    usage_hint: str | None = None,
    thumbnail: str | os.PathLike[str] | None = None,
    remove: Sequence[str] = (),
    on_progress: OnProgress = silent,
) -> dict[str, str]:
    """The new metadata, after the file is written with them to `output`, or over itself; tensors stay byte for byte.

    None leaves a value, "" deletes it, and `remove` deletes any keys. `thumbnail` is a picture file, which is shrunk to a
    JPEG without its EXIF data. Both `sshs_*` hashes are brought up to date; that of the tensors does not change. Raises
    BadConfig when there is nothing to change, BadFile when a file cannot be read or written.
    """
    file = SafetensorsFile.open(path)
    values = {
        "title": title,
        "author": author,
        "description": description,
        "trigger_phrase": trigger_phrase,
        "tags": None if tags is None else ", ".join(tags),
        "license": license,
        "usage_hint": usage_hint,
        "thumbnail": None if thumbnail is None else _thumbnail(thumbnail),
    }
    if not remove and all(value is None for value in values.values()):
        raise BadConfig("nothing to change: give a title, author, ... or keys to remove")
    given = {f"modelspec.{key}": value for key, value in values.items() if value is not None}
    removed = {*remove, *(key for key, value in given.items() if value == "")}
    metadata = {key: value for key, value in (file.metadata | given).items() if key not in removed}
    if any(key.startswith("modelspec.") for key in metadata):
        # No program reads modelspec's other keys without its version.
        metadata.setdefault("modelspec.sai_model_spec", MODELSPEC_VERSION)
    metadata["sshs_model_hash"] = file_hashes(path, _steps(on_progress, _chunks(path)))["sshs_model_hash"]
    metadata["sshs_legacy_hash"] = legacy_hash(file, metadata)
    copy_with_metadata(file, path if output is None else output, metadata)
    return metadata


THUMBNAIL_SIDE = 256
"""The longest side of a thumbnail in pixels: it travels in the header, which every program parses."""


def _thumbnail(picture: str | os.PathLike[str]) -> str:
    """The picture as a data URL of a JPEG with sides of at most THUMBNAIL_SIDE pixels. Raises BadFile."""
    try:
        small = read_photo_files([Path(picture)], strict=True)[0].image(shorter_side=THUMBNAIL_SIDE)
    except BadPhoto as error:
        raise BadFile(f"{Path(picture)}: cannot be read as a picture: {error}") from None
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85, comment="")  # else the picture's own comment comes along
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode("ascii")
