"""Report the header of a LoRA file, as values for JSON and as readable text, without torch."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import BadFile, FaceLoraError, counted, one_line
from .content import shortened
from .kinds import KINDS
from .names import LoraHeader, word_of
from .readers import READERS, Reading, read_by
from .stated import SUBJECT_KEY, UNTIL_KEY, trigger_words

SETTINGS = {
    "network_module": "network",
    "network_dim": "rank",
    "network_alpha": "alpha",
    "steps": "steps",
    "epoch": "epochs",
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
"""The training settings to show: labels by `ss_*` keys without that prefix."""
_MODELSPEC = ("title", "author", "description", "trigger_phrase", "tags", "license", "usage_hint", "date")
_SHOWN_CHARACTERS = 200
MOVEMENT_KEY = "facelora.movement"
"""The metadata key of a trained LoRA's `movement_of`, as JSON."""
USUAL_MOVEMENT = 0.003, 0.1
"""The usual range of the median movement on full-size models. An estimate: LoRAs of real people have 0.01 to 0.02."""


def inspect_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Report everything in the header of a LoRA file, as values for JSON.

    Only the header and the alphas are read, whatever the size of the file, and torch is not loaded. Raises BadFile or
    UnknownFamily when it is not a LoRA file.
    """
    path = Path(path)
    lora = LoraHeader.read(path)
    entries = lora.entries
    ranks = Counter(entry.rank for entry in entries if entry.rank is not None)
    readers = {reader: _reading(read_by(reader, lora)) for reader in READERS} if entries else {}
    # A family is not named if it is only the first of several with such names.
    others = [*([] if lora.is_known or not lora.other_models else [lora.family]), *lora.other_models]
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "tensors": len(lora.types),
        "dtype": lora.type_name,
        "family": lora.family if lora.family not in others else None,
        "identity": {
            "verdict": lora.identity.verdict,
            "models": list(lora.identity.models),
            "nearest": lora.identity.nearest,
            "misfits": list(lora.misfits),
            "others": others,
            "first_blocks": lora.identity.first_blocks,
        },
        "scheme": lora.scheme,
        "kind": lora.kind,
        "kinds": _histogram(entry.kind for entry in entries),
        "parts": _histogram(entry.part for entry in entries),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "alphas": _histogram("none (as rank)" if alpha is None else f"{alpha:g}" for alpha in lora.alphas()),
        "embeddings": sorted({word_of(lora, key) for key in lora.embedding_keys}),
        "unknown_keys": list(lora.unknown_keys),
        "readers": readers,
        "needs": _needs(lora, readers),
        "base_model": _known(
            version=lora.metadata.get("ss_base_model_version"),
            name=lora.metadata.get("ss_sd_model_name"),
            hash=lora.metadata.get("ss_new_sd_model_hash") or lora.metadata.get("ss_sd_model_hash"),
            architecture=lora.metadata.get("modelspec.architecture"),
        ),
        "trigger_words": trigger_words(lora.metadata),
        "training": _known(**{label: lora.metadata.get(f"ss_{key}") for key, label in SETTINGS.items()}),
        "about": _known(
            **{key: lora.metadata.get(f"modelspec.{key}") for key in _MODELSPEC},
            subject=lora.metadata.get(SUBJECT_KEY),
            agreed_until=lora.metadata.get(UNTIL_KEY),
        ),
        "thumbnail": "modelspec.thumbnail" in lora.metadata,
    }


def _needs(lora: LoraHeader, readers: Mapping[str, Any]) -> str | None:
    """Return what a LoRA needs for drawing that this project lacks, and who has it; None if it needs nothing."""
    if not lora.widened:
        return None
    entry = lora.widened[0]
    able = [reader for reader, reading in readers.items() if not reading["verdict"].startswith("not ")]
    return (
        f"a control image, for which {entry.path} has {(entry.weight_shape or (0, 0))[1]} inputs. FaceLoRA reads and converts "
        f"the file, but cannot draw with a control image. With these names {', '.join(able) or 'no program'} can load it"
    )


def _reading(reading: Reading) -> dict[str, Any]:
    """Return how a program loads the LoRA, as values for JSON. The modules are only named if some of them load."""
    objections = reading.objections
    return {
        "verdict": reading.verdict,
        "modules": reading.modules,
        "not_as_meant": len(objections),
        "reasons": _histogram(objection.reason for objection in objections.values()),
        "names": list(objections) if len(objections) < reading.modules else [],
    }


def _histogram(values) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _known(**values: str | None) -> dict[str, str]:
    return {key: value for key, value in values.items() if value not in (None, "", "None", "null")}


def inspect_files(
    paths: Iterable[str | os.PathLike[str]], inspect: Callable[[Path], dict[str, Any]] = inspect_header
) -> Iterator[dict[str, Any]]:
    """Yield the report of `inspect` for each file, and for all safetensors files in each folder and its subfolders, by name.

    `file` is the given path, or the path relative to the folder. If a file is not a LoRA, is damaged or is for an unknown
    model, its report has only `file`, `error` and an `identity` with the verdict "refused".
    """
    for given in map(Path, paths):
        is_folder = given.is_dir()
        for path in sorted(_safetensors_in(given)) if is_folder else [given]:
            name = path.relative_to(given).as_posix() if is_folder else os.fspath(path)
            try:
                if path.is_dir() and is_folder:
                    raise BadFile(f"{path}: this folder cannot be read")
                yield inspect(path) | {"file": name}
            except FaceLoraError as error:
                identity = {"verdict": "refused", "models": [], "nearest": None, "misfits": []}
                yield {"file": name, "identity": identity, "error": str(error).removeprefix(f"{path}: ")}


def _safetensors_in(folder: Path) -> list[Path]:
    """Return the safetensors files in a folder and its subfolders, also linked ones, and the folders that can't be read."""
    found: list[Path] = []
    seen = set[str]()
    walk = os.walk(folder, followlinks=True, onerror=lambda error: found.append(Path(error.filename)))
    for root, folders, files in walk:
        if (real := os.path.realpath(root)) in seen:
            folders.clear()  # A link leads back to it.
        else:
            found += [Path(root, name) for name in files if name.lower().endswith(".safetensors")]
        seen.add(real)
    return found


def format_line(report: Mapping[str, Any]) -> str:
    """Format a report of `inspect_files` as one readable line."""
    if "error" in report:
        return one_line(f"{report['file']}: {report['error']}")
    models = " or ".join(report["identity"]["models"]) or f"named like {_family(report)}"
    trigger = f", trigger: {_short(report['trigger_words'][0])}" if report["trigger_words"] else ""
    return one_line(f"{report['file']}: {models}, {report['kind']} of rank {counts(report['ranks'])}{trigger}")


def format_inspection(report: Mapping[str, Any]) -> str:
    """Format the report of `inspect_header` or `inspect_lora` as readable text."""
    lines = [
        f"{report['file']}  ({report['bytes'] / 1e6:.1f} MB, {report['tensors']} tensors, {report['dtype']})",
        f"  for           {_family(report)}, {report['scheme']} names",
        *([f"                {_doubt(report['identity'])}"] if report["identity"]["verdict"] != "certain" else []),
        f"  kind          {report['kind']}: {KINDS.get(report['kind'], 'several kinds of adapters')}",
    ]
    if report["parts"]:
        lines.append(f"  modules       {counts(report['parts'])}")
        lines.append(f"  rank          {counts(report['ranks'])}")
        lines.append(f"  alpha         {counts(report['alphas'])}")
    if report["needs"]:
        lines.append(f"  needs         {report['needs']}")
    if report["trigger_words"]:
        lines.append(f"  trigger       {_short(', '.join(report['trigger_words'][:10]))}")
    for title, section in (("base", "base_model"), ("about", "about"), ("training", "training"), ("hashes", "hashes")):
        rows = report.get(section) or {}
        lines += [f"  {title if first else '':<13} {key}: {_short(value)}" for first, key, value in _rows(rows)]
    if "movement" in report:
        moved = report["movement"]
        lines += [f"  {'moves':<13} {text}" for text in (format_movement(moved), doubt_of_movement(moved)) if text]
    norms = report.get("norms") or {}
    largest = max((norm for norm in norms.values() if norm is not None), default=0.0) or 1.0
    for first, block, norm in _rows(norms):
        value = "NaN or infinity" if norm is None else f"{norm:9.4f} {'#' * round(24 * norm / largest)}"
        lines.append(f"  {'change' if first else '':<13} {block:<28} {value}")
    if report["embeddings"]:
        lines.append(f"  embeddings    {_short(', '.join(report['embeddings']))}")
    if report["unknown_keys"]:
        lines.append(f"  not recognised: {len(report['unknown_keys'])}, e.g. {some_of(report['unknown_keys'])}")
    readers: dict[str, list[str]] = {}
    for reader, reading in report["readers"].items():
        readers.setdefault(_loads(reading), []).append(reader)
    lines += [f"  {'loads' if first else '':<13} {', '.join(names)}: {text}" for first, text, names in _rows(readers)]
    return "\n".join(map(one_line, lines))


def format_movement(movement: Mapping[str, Any] | None) -> str:
    """Format a result of `movement_of` as readable text."""
    if movement is None:
        return "not known, since its changes depend on the weights or are not finite"
    return f"{movement['median']:.2%} of the weights (median), {movement['layer']} the most: {movement['largest']:.2%}"


def doubt_of_movement(movement: Mapping[str, Any] | None) -> str:
    """Return a sentence about a median movement that is unusual on a full-size model; "" for others."""
    (least, most), share = USUAL_MOVEMENT, movement["median"] if movement else USUAL_MOVEMENT[0]
    if share < least:
        return f"less than {least:.1%}: on a full-size model it hardly changes a picture. Train longer"
    return f"more than {most:.0%}: on a full-size model it damages pictures. Train less" if share > most else ""


def _family(report: Mapping[str, Any]) -> str:
    return report["family"] or " or ".join(report["identity"]["others"])


def _doubt(identity: Mapping[str, Any]) -> str:
    if identity["models"][1:]:
        return f"its modules fit several models: {', '.join(identity['models'])}"
    if identity["models"]:
        return f"it only has the first {identity['first_blocks']} blocks, which a smaller model may have too"
    if not identity["nearest"]:
        return "only by its names: no published model has modules of these sizes"
    return (
        f"only by its names; the nearest published model is {identity['nearest']}, where "
        f"{counted(len(identity['misfits']), 'module does', 'modules do')} not fit: {some_of(identity['misfits'])}"
    )


def _loads(reading: Mapping[str, Any]) -> str:
    total, faulty = reading["modules"], reading["not_as_meant"]
    if reading["verdict"] == "not known":
        return "not known"
    by_names = ", only by their names" if reading["verdict"] == "knows the names" else ""
    if not faulty:
        return f"all {total} modules{by_names}"
    reason = next(iter(reading["reasons"]))
    example = f", e.g. {some_of(reading['names'])}" if reading["names"] else ""
    if reading["verdict"] == "loads as another change":
        return f"{faulty} of {total} modules not as intended; it does not support {reason}{example}"
    return f"{total - faulty} of {total} modules{by_names}; it does not support {reason}{example}"


def some_of(names: Sequence[str]) -> str:
    """List at most three of the names, each shortened, for a message."""
    return ", ".join(map(shortened, names[:3])) + (", ..." if len(names) > 3 else "")


def _rows(section: Mapping[str, Any]) -> list[tuple[bool, str, Any]]:
    return [(number == 0, key, value) for number, (key, value) in enumerate(section.items())]


def counts(histogram: Mapping[str, int]) -> str:
    """Format a histogram as text: a single value alone, several values each with its count."""
    if len(histogram) == 1:
        return next(iter(histogram))
    return ", ".join(f"{key} ({count}x)" for key, count in histogram.items()) or "none"


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
