"""Style packs: headshot styles as data, and their expansion into the prompts of a batch.

A pack is a JSON file. `style_packs/style_pack.schema.json` describes it, and docs/style-packs.md explains it. Packs are in this
package and in the user's folders, and are read again on every use.
"""

import math
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from ..errors import BadConfig, BadStylePack, UnknownFamily, check_length
from ..models.families import FAMILIES
from ..models.spec import FamilySpec
from ..storage.files import read_bytes
from ..storage.plain_values import Form, Range, parse_json, read_as, read_value
from .sizes import size_near

PACKAGE_FOLDER = Path(__file__).parent / "style_packs"
MOST_PICTURES = 10_000
"""The most pictures of a person, or of each prompt."""
MAX_FILE_BYTES = 5 * 1024 * 1024
SCHEMA_SUFFIX = ".schema.json"
PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Subject:
    """The person in the pictures: the LoRA's trigger word, and its class word."""

    trigger: str
    class_word: str = "person"

    def __str__(self) -> str:
        return f"{self.trigger} {self.class_word}".strip()


FAMILY_DEFAULTS: Mapping[str, FamilySpec] = FAMILIES
"""The settings for prompts and pictures that a style doesn't set, by family."""


# The types of the fields below are the rules of a pack. style_pack.schema.json has the same rules for editors, and a test
# compares the two.

_Text = Annotated[str, Form(r"\S", "a text")]
_Name = Annotated[
    str,
    Form(r"^(?=\S)[^,]*(?<=\S)\Z", "a name without commas, which separate styles, and without spaces around it"),
]
_Axis = Annotated[
    str,
    Form(
        r"^(?!(subject|framing)\Z)[a-z][a-z_]*\Z",
        "a placeholder's name (lower-case letters and _; not subject or framing)",
    ),
]
_Picture = Annotated[
    str,
    Form(
        r"^(?![\s\S]*(\.\.|[\\:\x00-\x1f]))[^./~][\s\S]*\.(jpg|jpeg|png|webp)\Z",
        "the relative name of a jpg, png or webp file beside the pack",
    ),
]


@dataclass(frozen=True)
class Wording:
    """One wording of a style: prompt and negative prompt with placeholders; None leaves a number to the family."""

    prompt: Annotated[str, Form(r"\{subject\}", "a text containing {subject}")]
    negative: str = ""
    guidance: Annotated[float, Range(0, 30)] | None = None
    steps: Annotated[float, Range(1, 200, whole=True)] | None = None


@dataclass(frozen=True)
class Style:
    """A headshot style: its wordings, and what its pictures have in common."""

    name: _Name
    category: _Text
    prompts: Mapping[Literal["tags", "sentences"], Wording]
    """The wordings for families that read tags (SD1.5, SDXL) and those that read sentences (FLUX and later), or one of both."""
    framing: Literal["close-up", "head-and-shoulders", "chest-up", "waist-up", "full-length"] = "head-and-shoulders"
    aspect: Literal["1:1", "4:5", "5:4", "3:4", "4:3", "2:3", "3:2", "9:16", "16:9"] = "4:5"
    """The aspect of the pictures, as "width:height"."""
    strength: Annotated[float, Range(0, 2)] = 1.0
    """The suggested strength of the LoRA."""
    axes: Mapping[_Axis, tuple[Annotated[str, Form(r"^(?=[\s\S]*\S)[^{}]*\Z", "a text without braces")], ...]] = field(
        default_factory=dict
    )
    """The placeholders that vary between pictures, with the texts that each takes in turn."""
    picture: _Picture | None = None
    """The file name of an example picture, relative to the pack's folder."""

    def __post_init__(self) -> None:
        """Raise BadConfig for wordings and axes that don't go together."""
        _check(self.prompts, "prompts: is empty")
        for axis, texts in self.axes.items():
            _check(texts, f"axes: {axis}: is empty")
            _check(len({*texts}) == len(texts), f"axes: {axis}: a value appears twice")
        used: set[str] = set()
        for kind, wording in self.prompts.items():
            for part, text in (("prompt", wording.prompt), ("negative", wording.negative)):
                used |= _placeholders(text, f"prompts: {kind}.{part}", ["subject", "framing", *self.axes])
        for axis in self.axes:
            _check(axis in used, f"axes: {axis}: no prompt contains {{{axis}}}")

    @property
    def tags(self) -> Wording | None:
        return self.prompts.get("tags")

    @property
    def sentences(self) -> Wording | None:
        return self.prompts.get("sentences")

    def wording(self, family: str) -> Wording:
        """Return the wording for a model family.

        Without one, the prompt of the other wording is used, but not its negative prompt and numbers. A guidance for SDXL would
        burn a FLUX picture. Raises UnknownFamily.
        """
        own = self.prompts.get(family_defaults(family).wording)
        return own or Wording(next(iter(self.prompts.values())).prompt)


@dataclass(frozen=True)
class StyledPrompt:
    """Everything needed to make one picture, except the models."""

    style: str
    prompt: str
    negative: str
    width: int
    height: int
    seed: int
    strength: float
    guidance: float
    steps: int

    def __post_init__(self) -> None:
        check_length(f"style {self.style!r}", self.prompt, BadStylePack)
        check_length(f"the negative prompt of style {self.style!r}", self.negative, BadStylePack)


def check_count(count: int) -> None:
    """Raise BadConfig if the number of pictures is out of range."""
    if not 1 <= count <= MOST_PICTURES:
        raise BadConfig(f"count = {count}: must be between 1 and {MOST_PICTURES}")


@dataclass(frozen=True)
class StylePack:
    """A pack of styles from one JSON file."""

    id: str
    title: str
    version: str
    licence: str
    styles: tuple[Style, ...]
    folder: Path
    """The folder of the pack's file; names of pictures are relative to it."""

    @property
    def names(self) -> list[str]:
        """The names of the styles, in the pack's order."""
        return [style.name for style in self.styles]

    def style(self, name: str) -> Style:
        """Return the style of that name, in any case. Raises BadStylePack with the available names."""
        for style in self.styles:
            if style.name.casefold() == name.casefold():
                return style
        raise BadStylePack(f"style pack {self.id!r} has no style {name!r}; choose one of: {', '.join(self.names)}")

    def picture(self, style: Style) -> Path | None:
        """Return the path of a style's example picture; None without one, or if the file is missing.

        Raises BadStylePack if the path leads out of the pack's folder or cannot be resolved.
        """
        if style.picture is None:
            return None
        at = f"style pack {self.id!r}: style {style.name!r}: picture {style.picture[:60]!r}"
        try:
            path = (self.folder / style.picture).resolve()
            found = path.is_file()
        except (OSError, RuntimeError) as error:  # The name is too long, or links form a circle.
            reason = getattr(error, "strerror", None) or "circular links"
            raise BadStylePack(f"{at} cannot be resolved: {reason}") from error
        # Only a symbolic link can lead out: other ways are refused on reading.
        if not path.is_relative_to(self.folder.resolve()):
            raise BadStylePack(f"{at} leads out of the folder")
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
        """Return the prompts for `count` pictures in these styles (None: all); the same arguments give the same list.

        Styles are used in rounds, each in a new order, and so are the values of every axis within a style. At any point of the
        list, two styles, or two values of an axis, differ by at most one use. A longer list starts with the shorter one.
        Picture i has the seed `seed + i`.

        `resolution` is the side in pixels of the square with the pictures' area; None means the family's own. Raises
        BadStylePack for an unknown style and UnknownFamily for an unknown family. Raises BadConfig for an empty subject, no
        styles, or a number out of range.
        """
        if not str(subject):
            raise BadConfig("the subject is empty; set a trigger word, a class word or both")
        check_count(count)
        defaults = family_defaults(family)
        if resolution is None:
            resolution = defaults.resolution
        if resolution < defaults.size_multiple:
            raise BadConfig(f"resolution = {resolution}: must be at least {defaults.size_multiple} for {family}")
        if not 0 <= seed < 2**64:
            raise BadConfig(f"seed = {seed}: must be between 0 and 2**64 - 1")
        chosen = {style.name: style for style in self.styles}
        if styles is not None:
            chosen = {style.name: style for style in map(self.style, styles)}
        if not chosen:
            raise BadConfig(f"styles: must not be empty; style pack {self.id!r} has: {', '.join(self.names)}")
        turns = _in_rounds(list(chosen), count, f"{seed}")
        uses = Counter(turns)
        values = {
            (name, axis): iter(_in_rounds(texts, uses[name], f"{seed}/{name}/{axis}"))
            for name, style in chosen.items()
            for axis, texts in style.axes.items()
        }
        prompts = []
        for i, name in enumerate(turns):
            style, wording = chosen[name], chosen[name].wording(family)
            texts = {"subject": str(subject), "framing": style.framing}
            texts |= {axis: next(values[name, axis]) for axis in style.axes}
            width, height = size_near(style.aspect, resolution, defaults.size_multiple)
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
    """The packs found by `find_style_packs`, and a line for each item in the folders that couldn't be used."""

    packs: Mapping[str, StylePack]
    problems: tuple[str, ...]
    clashes: Mapping[str, tuple[Path, ...]]
    """The files for each id that several of the user's files claim; none of them is used."""

    def pick(self, name: str) -> StylePack:
        """Return the pack of that id. Raises BadStylePack with the choices, or with the files that claim the same id."""
        if name in self.clashes:
            raise BadStylePack(_clash(name, self.clashes[name]))
        if name not in self.packs:
            raise BadStylePack(f"no style pack {name!r}; choose one of: {', '.join(sorted(self.packs))}")
        return self.packs[name]


def find_style_packs(user_folders: Iterable[str | Path] = ()) -> FoundPacks:
    """Find the packs in the package and in the user's folders, read again on each call.

    A user's pack replaces a shipped one of the same id. Files that cannot be used are skipped, with a line in `problems`.
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
    """Read a pack from a JSON file; also return a line for each skipped style, with its first fault.

    The list format of sdxl_prompt_styler is read too: `{prompt}` becomes "{framing} portrait of {subject}", and the file's name
    is the pack's id and title. Raises BadStylePack if the whole file, or every style, is unusable.
    """
    path = Path(path)
    content = read_bytes(path, MAX_FILE_BYTES, name=path.name, error=BadStylePack)
    try:
        document = parse_json(content)
    except ValueError as error:
        raise BadStylePack(f"{path.name}: not JSON: {error}") from None
    try:
        if isinstance(document, list):
            read_style, head = _read_styler_style, _Head(path.stem, path.stem, "1", "not stated", tuple(document))
        else:
            if isinstance(document, dict):
                read_value("$schema", document.pop("$schema", ""), str)
            read_style, head = _read_style, read_as(_Head, document)
        _check(head.styles, "styles: is empty")
    except BadConfig as fault:
        raise BadStylePack(f"{path.name}: {fault}") from None

    styles: dict[str, Style] = {}
    problems: list[str] = []
    for number, entry in enumerate(head.styles, 1):
        try:
            style = read_style(entry, head.title)
            _check(style.name.casefold() not in styles, "name: another style of this pack has the same name")
            styles[style.name.casefold()] = style
        except BadConfig as fault:
            name = entry.get("name") if isinstance(entry, dict) else None
            label = repr(name) if isinstance(name, str) else f"number {number}"
            problems.append(f"{path.name}: style {label}: {fault}")
    if not styles:
        raise BadStylePack(f"{problems[0]} (no style in this file can be used; problems: {len(problems)})")
    folder = path.resolve().parent
    pack = StylePack(head.id, head.title, head.version, head.licence, tuple(styles.values()), folder)
    return pack, tuple(problems)


def family_defaults(family: str) -> FamilySpec:
    """Return a model family's settings for prompts and pictures. Raises UnknownFamily with the choices."""
    if family not in FAMILY_DEFAULTS:
        raise UnknownFamily(
            f"style packs don't support the family {family!r}; choose one of: {', '.join(FAMILY_DEFAULTS)}"
        )
    return FAMILY_DEFAULTS[family]


def long_prompts(prompts: Iterable[StyledPrompt], count_tokens: Callable[[str], int], limit: int = 77) -> list[str]:
    """Return a line for each style whose longest prompt or negative prompt exceeds `limit` tokens; [] if all fit.

    `count_tokens` counts like CLIP's tokenizer, including the start and end token. Only families that read nothing but CLIP
    have this limit: T5 and the language models of newer families read 256 tokens or more.
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
    # rng.shuffle may change with Python's version: only random() is guaranteed to give the same numbers.
    rounds = (sorted(values, key=lambda _: rng.random()) for _ in range(math.ceil(count / len(values))))
    return [value for round_ in rounds for value in round_][:count]


def _fill(template: str, texts: Mapping[str, str]) -> str:
    # str.format would let a template like "{subject.__class__}" access our objects.
    return " ".join(PLACEHOLDER.sub(lambda match: texts[match[1]], template).split())


def _packs_in(folder: Path, problems: list[str]) -> list[tuple[Path, StylePack]]:
    """Return the packs of a folder with their paths, by file name. Adds a line to `problems` for each unusable file."""
    if not os.path.isdir(folder):
        fault = "is a file; give the folder that it is in" if os.path.isfile(folder) else "does not exist"
        problems.append(f"{folder}: this folder of style packs {fault}")
        return []
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
    return f"style pack id {pack_id!r} is used by several files; keep one: {', '.join(map(str, paths))}"


@dataclass(frozen=True)
class _Head:
    """A pack's file, whose styles are not read yet."""

    id: Annotated[str, Form(r"^[a-z0-9][a-z0-9-]*\Z", "an id of lower-case letters, digits and hyphens")]
    title: _Text
    version: Annotated[str, Form(r"^[0-9]+(\.[0-9]+){0,2}\Z", "a version such as 1.0.0")]
    licence: _Text
    styles: tuple[Any, ...]


@dataclass(frozen=True)
class _StylerStyle:
    """An entry of sdxl_prompt_styler's list. Other fields are ignored."""

    name: _Name
    prompt: Annotated[str, Form(r"\{prompt\}", "a text containing {prompt}")]
    negative_prompt: str = ""

    def __post_init__(self) -> None:
        _placeholders(self.prompt, "prompt", ["prompt"])
        _placeholders(self.negative_prompt, "negative_prompt", ["prompt"])


def _read_style(entry: Any, category: str) -> Style:
    return read_as(Style, {"category": category, **entry} if isinstance(entry, dict) else entry)


def _read_styler_style(entry: Any, category: str) -> Style:
    known = _StylerStyle.__annotations__
    given = {name: entry[name] for name in known if name in entry} if isinstance(entry, dict) else entry
    style = read_as(_StylerStyle, given)
    portrait = "{framing} portrait of {subject}"
    prompt, negative = (text.replace("{prompt}", portrait) for text in (style.prompt, style.negative_prompt))
    return Style(style.name, category, {"tags": Wording(prompt, negative)})


def _placeholders(text: str, where: str, known: Sequence[str]) -> set[str]:
    """Return the placeholders in the text. Raises BadConfig for an unknown one, or an unmatched brace."""
    names = PLACEHOLDER.findall(text)
    for name in names:
        choices = ", ".join(f"{{{choice}}}" for choice in known)
        _check(name in known, f"{where}: unknown placeholder {{{name}}}; known: {choices}")
    _check(not re.search(r"[{}]", PLACEHOLDER.sub("", text)), f"{where}: an unmatched brace")
    return set(names)


def _check(is_right: object, fault: str) -> None:
    if not is_right:
        raise BadConfig(fault)
