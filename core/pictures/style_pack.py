"""Style packs: headshot styles as data, and their expansion into the prompts of a batch.

A pack is a JSON file (`style_packs/style_pack.schema.json` describes it, docs/style-packs.md explains it). Packs lie in
this package and in folders of the user, and are read anew each time they are asked for.
"""

import json
import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import BadConfig, BadStylePack, UnknownFamily
from ..models.families import FAMILIES
from ..storage.files import is_text, read_json

PACKAGE_FOLDER = Path(__file__).parent / "style_packs"
MAX_FILE_BYTES = 5 * 1024 * 1024
SCHEMA_SUFFIX = ".schema.json"
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Subject:
    """The person in the pictures, by the LoRA's trigger word and the class word that it belongs to."""

    trigger: str
    class_word: str = "person"

    def __str__(self) -> str:
        return f"{self.trigger} {self.class_word}".strip()


@dataclass(frozen=True)
class FamilyDefaults:
    """The settings of a model family for prompts and pictures where a style says nothing."""

    wording: str
    """The wording of prompts that the family reads best, "tags" or "sentences"."""
    resolution: int
    """The side of the square with the same area as a picture, in pixels."""
    size_multiple: int
    """Width and height are multiples of this, in pixels."""
    guidance: float
    steps: int


FAMILY_DEFAULTS: Mapping[str, FamilyDefaults] = {
    name: FamilyDefaults(family.wording, family.resolution, family.size_multiple, family.guidance, family.steps)
    for name, family in FAMILIES.items()
}


@dataclass(frozen=True)
class Wording:
    """One wording of a style: prompt and negative prompt with placeholders; None leaves a number to the family."""

    prompt: str
    negative: str = ""
    guidance: float | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Style:
    """A headshot style: its wordings, and what its pictures have in common."""

    name: str
    category: str
    tags: Wording | None
    """The wording for families that read tags (SD1.5, SDXL). At least one of `tags` and `sentences` is there."""
    sentences: Wording | None
    """The wording for families that read sentences (FLUX and later)."""
    framing: str = "head-and-shoulders"
    aspect: str = "4:5"
    """The aspect of the pictures, as "width:height"."""
    strength: float = 0.8
    """The suggested strength of the LoRA."""
    axes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The placeholders that vary from picture to picture, with the texts that each takes in turn."""
    picture: str | None = None
    """The file name of an example picture, relative to the pack's folder."""

    def wording(self, family: str) -> Wording:
        """The wording for a model family.

        A family whose wording is missing takes the prompt of the other one, but not its negative prompt and numbers:
        a guidance that is right for SDXL burns a FLUX picture. Raises UnknownFamily.
        """
        reads_tags = family_defaults(family).wording == "tags"
        own, other = (self.tags, self.sentences) if reads_tags else (self.sentences, self.tags)
        if own is not None:
            return own
        assert other is not None, "a style has at least one wording"
        return Wording(other.prompt)


@dataclass(frozen=True)
class StyledPrompt:
    """Everything that makes one picture, except the models."""

    style: str
    prompt: str
    negative: str
    width: int
    height: int
    seed: int
    strength: float
    guidance: float
    steps: int


@dataclass(frozen=True)
class StylePack:
    """A pack of styles, as one JSON file holds it."""

    id: str
    title: str
    version: str
    licence: str
    styles: tuple[Style, ...]
    folder: Path
    """The folder of the pack's file, to which the names of pictures are relative."""

    @property
    def names(self) -> list[str]:
        """The names of the styles, in the pack's order."""
        return [style.name for style in self.styles]

    def style(self, name: str) -> Style:
        """The style of that name, in upper or lower case. Raises BadStylePack, with the names that there are."""
        for style in self.styles:
            if style.name.casefold() == name.casefold():
                return style
        raise BadStylePack(f"style pack {self.id!r} has no style {name!r}; it has: {', '.join(self.names)}")

    def picture(self, style: Style) -> Path | None:
        """The path of a style's example picture; None if it has none or the file is not there.

        Raises BadStylePack when the path leads out of the pack's folder or cannot be looked up.
        """
        if style.picture is None:
            return None
        at = f"style pack {self.id!r}: style {style.name!r}: picture {style.picture[:60]!r}"
        try:
            path = (self.folder / style.picture).resolve()
            found = path.is_file()
        except (OSError, RuntimeError) as error:  # a name that is too long, links in a circle
            raise BadStylePack(
                f"{at} cannot be looked up: {getattr(error, 'strerror', 'links in a circle')}"
            ) from error
        if not path.is_relative_to(self.folder.resolve()):  # a symbolic link; other tricks are refused at reading
            raise BadStylePack(f"{at} leaves the folder")
        return path if found else None

    def prompts(
        self,
        subject: Subject,
        family: str,
        count: int,
        seed: int,
        styles: Sequence[str] | None = None,
        resolution: int | None = None,
    ) -> list[StyledPrompt]:
        """The prompts for `count` pictures in these styles (None: all); the same arguments give the same list.

        Styles come in rounds, each round in a new order, and so do the values of every axis within a style. So at any
        point of the list two styles, or two values of an axis, have been used equally often or once more; and a longer
        list starts with the shorter one. Picture i has the seed `seed + i`.

        `resolution` is the side in pixels of the square with the pictures' area; None means the family's own. Raises
        BadStylePack for an unknown style, UnknownFamily for an unknown family, and BadConfig for an empty subject, no
        styles, or a number out of range.
        """
        if not str(subject):
            raise BadConfig("the subject is empty; it needs a trigger word, a class word or both")
        if count < 1:
            raise BadConfig(f"count is {count}; it must be 1 or more")
        defaults = family_defaults(family)
        if resolution is None:
            resolution = defaults.resolution
        if resolution < defaults.size_multiple:
            raise BadConfig(f"resolution is {resolution}; for {family} it must be {defaults.size_multiple} or more")
        if not 0 <= seed < 2**64:
            raise BadConfig(f"seed is {seed}; it must be between 0 and 2**64 - 1")
        chosen = {style.name: style for style in self.styles}
        if styles is not None:
            chosen = {style.name: style for style in map(self.style, styles)}
        if not chosen:
            raise BadConfig(f"styles is empty; style pack {self.id!r} has: {', '.join(self.names)}")
        turns = _in_rounds(list(chosen), count, f"{seed}")
        uses = Counter(turns)
        variations = {name: iter(_variations(style, uses[name], seed)) for name, style in chosen.items()}
        prompts = []
        for i, name in enumerate(turns):
            style, wording = chosen[name], chosen[name].wording(family)
            texts = {"subject": str(subject), "framing": style.framing, **next(variations[name])}
            width, height = picture_size(style.aspect, resolution, defaults.size_multiple)
            prompts.append(
                StyledPrompt(
                    style=name,
                    prompt=_fill(wording.prompt, texts),
                    negative=_fill(wording.negative, texts),
                    width=width,
                    height=height,
                    seed=(seed + i) % 2**64,
                    strength=style.strength,
                    guidance=defaults.guidance if wording.guidance is None else wording.guidance,
                    steps=defaults.steps if wording.steps is None else int(wording.steps),
                )
            )
        return prompts


@dataclass(frozen=True)
class FoundPacks:
    """The packs that `find_style_packs` found, and a line for each thing in the folders that could not be used."""

    packs: Mapping[str, StylePack]
    problems: tuple[str, ...]
    clashes: Mapping[str, tuple[Path, ...]]
    """The files for each id that several files of the user claim: none of these files is used."""

    def pick(self, name: str) -> StylePack:
        """The pack of that id. Raises BadStylePack, with the choices or with the files that claim the same id."""
        if name in self.clashes:
            raise BadStylePack(_clash(name, self.clashes[name]))
        if name not in self.packs:
            raise BadStylePack(f"no style pack {name!r}; there are: {', '.join(sorted(self.packs))}")
        return self.packs[name]


def find_style_packs(user_folders: Iterable[str | Path] = ()) -> FoundPacks:
    """The packs of the package and of the user's folders, read at each call.

    A user's pack replaces a shipped one of the same id. A file that cannot be used is left out, and a line in `problems`
    says why.
    """
    problems: list[str] = []
    shipped = _packs_in(PACKAGE_FOLDER, problems)
    claims: dict[str, list[tuple[Path, StylePack]]] = {}
    for folder in dict.fromkeys(Path(folder).resolve() for folder in user_folders):
        for path, pack in _packs_in(folder, problems):
            claims.setdefault(pack.id, []).append((path, pack))
    packs = {pack.id: pack for _, pack in shipped} | {id_: claim[0][1] for id_, claim in claims.items()}
    clashes = {id_: tuple(path for path, _ in claim) for id_, claim in claims.items() if len(claim) > 1}
    for id_, paths in clashes.items():
        del packs[id_]
        problems.append(_clash(id_, paths))
    return FoundPacks(packs, tuple(problems), clashes)


def read_style_pack(path: str | Path) -> tuple[StylePack, tuple[str, ...]]:
    """The pack in a JSON file, and one line for each fault of a style that is left out because of it.

    The list format of sdxl_prompt_styler is read too: `{prompt}` becomes "{framing} portrait of {subject}", and the
    file's name is the pack's id and title. Raises BadStylePack if the file as a whole, or every style, is unusable.
    """
    path = Path(path)
    document = _read_json(path)
    if isinstance(document, list):
        rule, read_style = {"type": "array", "minItems": 1}, _read_styler_style
        head = {"id": path.stem, "title": path.stem, "version": "1", "licence": "not stated", "styles": document}
    else:
        rule, read_style, head = _schema()["pack"], _read_style, document
        # The styles are checked one by one below, so that a bad one costs only itself.
        rule = {**rule, "properties": {**rule["properties"], "styles": {"type": "array", "minItems": 1}}}
    if faults := list(_faults(document, rule)):
        raise BadStylePack(f"{path.name}: {'; '.join(faults)}")

    styles: dict[str, Style] = {}
    problems: list[str] = []
    for number, entry in enumerate(head["styles"], 1):
        style, faults = read_style(entry, head["title"])
        if style and style.name.casefold() in styles:
            faults.append("name: another style of this pack has the same name")
        elif style:
            styles[style.name.casefold()] = style
        name = entry.get("name") if isinstance(entry, dict) else None
        label = repr(name) if isinstance(name, str) else f"number {number}"
        problems += [f"{path.name}: style {label}: {fault}" for fault in faults]
    if not styles:
        raise BadStylePack(f"{problems[0]} (no style of the file can be used; problems: {len(problems)})")
    pack = StylePack(
        head["id"],
        head["title"],
        head["version"],
        head["licence"],
        tuple(styles.values()),
        path.resolve().parent,
    )
    return pack, tuple(problems)


def family_defaults(family: str) -> FamilyDefaults:
    """The settings of a model family for prompts and pictures. Raises UnknownFamily, with the choices."""
    if family not in FAMILY_DEFAULTS:
        raise UnknownFamily(f"style packs know no family {family!r}; known: {', '.join(FAMILY_DEFAULTS)}")
    return FAMILY_DEFAULTS[family]


def picture_size(aspect: str, resolution: int, size_multiple: int) -> tuple[int, int]:
    """The (width, height) in pixels of a picture near the aspect, with an area of at most resolution².

    Both are multiples of `size_multiple`. The shorter side is rounded and the longer one takes the area that is left: at
    1024 and 64 these are the sizes that SDXL was trained on (appendix I of arXiv:2307.01952).
    """
    across, down = (int(part) for part in aspect.split(":"))
    side = resolution // size_multiple  # this and the sides below are in multiples of size_multiple
    shorter = round(side * math.sqrt(min(across, down) / max(across, down)))
    longer = side * side // shorter
    width, height = (shorter, longer) if across < down else (longer, shorter)
    return width * size_multiple, height * size_multiple


def long_prompts(prompts: Iterable[StyledPrompt], count_tokens: Callable[[str], int], limit: int = 77) -> list[str]:
    """One line for each style whose longest prompt or negative prompt is over `limit` tokens; [] if all fit.

    `count_tokens` counts as CLIP's tokenizer does, with the start and end token. Only families that read nothing but CLIP
    have this limit: T5 and the language models behind the newer families read 256 tokens and more.
    """
    longest: dict[tuple[str, str], int] = {}
    for styled in prompts:
        for part, text in (("prompt", styled.prompt), ("negative prompt", styled.negative)):
            key = (styled.style, part)
            longest[key] = max(longest.get(key, 0), count_tokens(text))
    return [
        f"style {style!r}: the {part} has {tokens} tokens, {tokens - limit} over the {limit} of one chunk"
        for (style, part), tokens in longest.items()
        if tokens > limit
    ]


def _in_rounds(values: Sequence[Any], count: int, key: str) -> list[Any]:
    rng = random.Random(key)
    # rng.shuffle may change with Python's version: only random() is promised to give the same numbers in each.
    rounds = (sorted(values, key=lambda _: rng.random()) for _ in range(math.ceil(count / len(values))))
    return [value for round_ in rounds for value in round_][:count]


def _variations(style: Style, count: int, seed: int) -> list[dict[str, str]]:
    """The values of a style's axes for each of `count` pictures."""
    columns = {axis: _in_rounds(texts, count, f"{seed}/{style.name}/{axis}") for axis, texts in style.axes.items()}
    return [{axis: column[i] for axis, column in columns.items()} for i in range(count)]


def _fill(template: str, texts: Mapping[str, str]) -> str:
    # str.format would let a template like "{subject.__class__}" reach into our objects.
    return " ".join(PLACEHOLDER.sub(lambda match: texts[match[1]], template).split())


def _packs_in(folder: Path, problems: list[str]) -> list[tuple[Path, StylePack]]:
    """The packs of a folder with their paths, by file name. What cannot be used adds a line to `problems`."""
    if not os.path.isdir(folder):
        problems.append(f"{folder}: no such folder of style packs")
    packs = []
    for path in sorted(folder.glob("*.json")):
        if path.name.endswith(SCHEMA_SUFFIX):
            continue
        try:
            pack, faults = read_style_pack(path)
        except BadStylePack as error:
            problems.append(str(error))
        else:
            packs.append((path, pack))
            problems.extend(faults)
    return packs


def _clash(pack_id: str, paths: Iterable[Path]) -> str:
    return f"style pack id {pack_id!r} is in several files, keep one: {', '.join(map(str, paths))}"


def _read_json(path: Path) -> Any:
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadStylePack(
                f"{path.name}: {size / 2**20:.1f} MiB; a style pack has at most {MAX_FILE_BYTES >> 20} MiB"
            )
        # utf-8-sig: some editors on Windows begin a file with a byte order mark.
        return json.loads(
            path.read_text("utf-8-sig"), object_pairs_hook=_object_without_repeats, parse_constant=_refuse_constant
        )
    except OSError as error:
        raise BadStylePack(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise BadStylePack(f"{path.name}: not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise BadStylePack(f"{path.name}: not JSON: {error.msg} (line {error.lineno}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a repeated field, NaN, an endless number, endless nesting
        raise BadStylePack(f"{path.name}: not usable as JSON: {error}") from error


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    for name, uses in Counter(name for name, _ in pairs).items():
        if uses > 1:  # json would silently keep the last one
            raise ValueError(f"the field {name!r} is there {uses} times in one object")
    return dict(pairs)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _read_style(entry: Any, category: str) -> tuple[Style | None, list[str]]:
    """The style of one entry of a pack and no faults, or None and the entry's faults."""
    if faults := list(_faults(entry, _schema()["style"])):
        return None, faults
    wordings = {kind: Wording(**wording) for kind, wording in entry["prompts"].items()}
    texts = {f"prompts.{kind}.prompt": wording.prompt for kind, wording in wordings.items()}
    texts |= {f"prompts.{kind}.negative": wording.negative for kind, wording in wordings.items()}
    axes = {axis: tuple(values) for axis, values in entry.get("axes", {}).items()}
    if faults := list(_placeholder_faults(texts, ["subject", "framing", *axes])):
        return None, faults
    used = set(PLACEHOLDER.findall(" ".join(texts.values())))
    if faults := [f"axes.{axis}: no prompt says {{{axis}}}" for axis in axes if axis not in used]:
        return None, faults
    options = {name: entry[name] for name in ("framing", "aspect", "strength", "picture") if name in entry}
    tags, sentences = wordings.get("tags"), wordings.get("sentences")
    return Style(entry["name"], entry.get("category", category), tags, sentences, axes=axes, **options), []


def _read_styler_style(entry: Any, category: str) -> tuple[Style | None, list[str]]:
    """The style of one entry of sdxl_prompt_styler's list and no faults, or None and the entry's faults."""
    if faults := list(_faults(entry, _schema()["styler_style"])):
        return None, faults
    prompt, negative = entry["prompt"], entry.get("negative_prompt", "")
    if faults := list(_placeholder_faults({"prompt": prompt, "negative_prompt": negative}, ["prompt"])):
        return None, faults
    portrait = "{framing} portrait of {subject}"
    tags = Wording(prompt.replace("{prompt}", portrait), negative.replace("{prompt}", portrait))
    return Style(entry["name"], category, tags, sentences=None), []


def _placeholder_faults(texts: Mapping[str, str], known: Sequence[str]) -> Iterator[str]:
    for where, text in texts.items():
        for name in dict.fromkeys(PLACEHOLDER.findall(text)):
            if name not in known:
                choices = ", ".join(f"{{{choice}}}" for choice in known)
                yield f"{where}: unknown placeholder {{{name}}}; known: {choices}"
        if re.search(r"[{}]", PLACEHOLDER.sub("", text)):
            yield f"{where}: a brace without its partner"


@cache
def _schema() -> dict[str, Any]:
    """The definitions of the JSON Schema in the package, so that packs are checked by the schema that is published."""
    return read_json(PACKAGE_FOLDER / f"style_pack{SCHEMA_SUFFIX}")["$defs"]


def _faults(value: Any, rule: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """A line for each way in which a JSON value breaks a rule, in the part of JSON Schema that our schema uses."""
    if "$ref" in rule:
        rule = _schema()[rule["$ref"].removeprefix("#/$defs/")]
    at = f"{where}: " if where else ""
    if "type" in rule and not _is_a(value, rule["type"]):
        article = "an" if rule["type"][0] in "aeiou" else "a"
        yield f"{at}{_shown(value)} is not {article} {rule['type']}"
        return
    if isinstance(value, str) and not is_text(value):
        yield f"{at}{value!a} has half a character in it"
    if "enum" in rule and value not in rule["enum"]:
        yield f"{at}{_shown(value)} is none of {', '.join(rule['enum'])}"
    if "pattern" in rule and not re.search(rule["pattern"], value):
        yield f"{at}{_shown(value)} is not {rule['title']}"
    if "minimum" in rule and not rule["minimum"] <= value <= rule["maximum"]:
        yield f"{at}{_shown(value)} is not between {rule['minimum']} and {rule['maximum']}"
    if ("minItems" in rule or "minProperties" in rule) and not value:  # both are 1 wherever they stand
        yield f"{at}is empty"
    if rule.get("uniqueItems") and any(item in value[:i] for i, item in enumerate(value)):
        yield f"{at}a value is there twice"
    if "items" in rule:
        for i, item in enumerate(value):
            yield from _faults(item, rule["items"], f"{where}[{i}]")
    if rule.get("type") == "object":
        yield from _object_faults(value, rule, where)


def _object_faults(value: Any, rule: Mapping[str, Any], where: str) -> Iterator[str]:
    at = f"{where}: " if where else ""
    known, others = rule.get("properties", {}), rule.get("additionalProperties", True)
    for name in rule.get("required", ()):
        if name not in value:
            yield f"{at}the field {name!r} is missing"
    for name, item in value.items():
        inside = f"{where}.{name}" if where else name
        if name in known:
            yield from _faults(item, known[name], inside)
        elif others is False:
            yield f"{at}unknown field {name!r}; known: {', '.join(known)}"
        elif others is not True:
            yield from _faults(name, rule["propertyNames"], where)
            yield from _faults(item, others, inside)


def _is_a(value: Any, kind: str) -> bool:
    if isinstance(value, float) and kind == "integer":
        return value.is_integer()  # 30.0 is an integer in JSON Schema
    types = {"object": dict, "array": list, "string": str, "number": (int, float), "integer": int}
    return isinstance(value, types[kind]) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
