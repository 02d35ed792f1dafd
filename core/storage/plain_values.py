"""Read what others wrote: JSON, TOML, and values of stated types in them.

All faults of such a text are found here: deep nesting, numbers of thousands of digits, repeated names and half characters.
So are values of another type, out of range or not among the choices.
"""

import inspect
import json
import math
import re
import reprlib
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import BadConfig

_T = TypeVar("_T")
_MOST_TOML, _MOST_DOTS = 2**18, 100
"""The most characters of a TOML text, and the most dots in a line: a key's memory grows with the square of its parts."""
_SHOWN = reprlib.Repr()
_SHOWN.maxstring = _SHOWN.maxother = 100


@dataclass(frozen=True)
class Range:
    """The smallest and the largest allowed number, or no limits at all without a smallest one."""

    low: float | None
    high: float = math.inf
    whole: bool = False

    def check(self, name: str, value: Any) -> None:
        if isinstance(value, str | bool):
            return
        if self.whole and value % 1:
            raise BadConfig(f"{name} = {_SHOWN.repr(value)}: must be a whole number")
        if self.low is not None and not self.low <= value <= self.high:
            allowed = f"at least {self.low}" if self.high == math.inf else f"between {self.low} and {self.high}"
            raise BadConfig(f"{name} = {_SHOWN.repr(value)}: must be {allowed}")


@dataclass(frozen=True)
class Form:
    """The required form of a text: a pattern to find in it, and what such a text is called."""

    pattern: str
    title: str

    def check(self, name: str, value: Any) -> None:
        if not re.search(self.pattern, value):
            raise BadConfig(f"{name} = {_SHOWN.repr(value)}: expected {self.title}")


def is_text(text: str) -> bool:
    """Check that the text can be written as UTF-8. JSON and file names can contain unpaired surrogates, which cannot."""
    return text.isascii() or not re.search("[\ud800-\udfff]", text)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError with what is wrong."""
    try:
        return json.loads(_decoded(text), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("values are nested too deeply") from None


def parse_toml(text: str | bytes) -> dict[str, Any]:
    """Parse the settings in a TOML text. Raises BadConfig with what is wrong."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib  # pyright: ignore[reportMissingImports]
    try:
        text = _decoded(text)
        if len(text) > _MOST_TOML:
            raise BadConfig(f"the text has {len(text):,} characters, and the limit is {_MOST_TOML:,}")
        for number, line in enumerate(text.split("\n"), start=1):  # as the parser counts them
            if line.count(".") > _MOST_DOTS and not line.lstrip().startswith("#"):
                raise BadConfig(f"line {number} has more than {_MOST_DOTS} dots")
        settings = tomllib.loads(text)
        repr(settings)  # Raises for values nested too deeply for a message.
    except ValueError as error:  # Also raised for a number of thousands of digits.
        place = re.search(r"at line (\d+)", str(error))
        line = str(text).split("\n")[int(place[1]) - 1].strip() if place else ""
        raise BadConfig(f"{error}{line and f': {_SHOWN.repr(line)}'}") from None
    except RecursionError:
        raise BadConfig("values are nested too deeply") from None
    return settings


def _decoded(text: str | bytes) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.decode("utf-8-sig")  # Some Windows editors start a file with a byte order mark.
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start})") from None


def unique(pairs: Sequence[tuple[str, Any]], what: str = "field") -> dict[str, Any]:
    """Make a dictionary of a JSON object's pairs. Raises ValueError, with `what` such a name is, if one appears twice."""
    table = dict(pairs)
    if len(table) != len(pairs):  # The json module would keep the last one of a name.
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the {what} {twice[:80]!r} appears twice")
    return table


def read_as(kind: type[_T], values: Any, where: str = "") -> _T:
    """Build a dataclass of a table's values, whose names and types are those of its fields.

    `where` names the table in messages. Raises BadConfig for a missing or unknown field, and as `read_value` does.
    """
    if not isinstance(values, Mapping):
        raise BadConfig(f"{where and f'{where} = '}{_SHOWN.repr(values)}: expected a table")
    hints, required = _fields(kind)
    faults = [f"the field {name!r} is missing" for name in required if name not in values]
    faults += [f"unknown field {_SHOWN.repr(name)}; known: {', '.join(hints)}" for name in values if name not in hints]
    if faults:
        raise BadConfig(f"{where and f'{where}: '}{'; '.join(faults)}")
    at = f"{where}." if where else ""
    return kind(**{name: read_value(f"{at}{name}", value, hints[name]) for name, value in values.items()})


@cache
def _fields(kind: type) -> tuple[dict[str, Any], list[str]]:
    """Return the types of a dataclass's fields, and the names of those without a default."""
    required = [name for name, item in inspect.signature(kind).parameters.items() if item.default is item.empty]
    return get_type_hints(kind, include_extras=True), required


def read_value(name: str, value: Any, hint: Any, rule: Range | Form | None = None) -> Any:
    """Return a value as the type `hint`; a list becomes a tuple, and a table a dataclass, where that is the type.

    A type may be annotated with the Range of its numbers or the Form of its texts; `rule` is one for the whole value. Raises
    BadConfig with the name, the value and what was expected.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return read_value(name, value, arguments[0], arguments[1])
    if origin in (Union, UnionType):
        (inner,) = (one for one in arguments if one is not NoneType)
        return None if value is None else read_value(name, value, inner, rule)
    if is_dataclass(hint):
        return read_as(hint, value, name)  # pyright: ignore[reportArgumentType]
    if origin is Literal:
        if not isinstance(value, str) or value not in arguments:
            raise BadConfig(f"{name} = {_SHOWN.repr(value)}: choose one of {', '.join(arguments)}")
    elif hint is not Any:
        accepted = {float: (int, float), tuple: (list, tuple)}.get(origin or hint, (origin or hint,))
        if not isinstance(value, accepted) or (hint is not bool and type(value) is bool):
            expected = {tuple: "a list", dict: "a table", Mapping: "a table"}.get(origin) or hint.__name__
            raise BadConfig(f"{name} = {_SHOWN.repr(value)}: expected {expected}")
    if isinstance(value, list | tuple) and arguments:
        return tuple(read_value(name, one, arguments[0], rule) for one in value)
    if isinstance(value, Mapping) and arguments:
        return {
            read_value(name, key, arguments[0]): read_value(f"{name}: {key}", one, arguments[1], rule)
            for key, one in value.items()
        }
    _check_plain(name, value)
    if rule:
        rule.check(name, value)
    return value


def _check_plain(name: str, value: Any) -> None:
    if isinstance(value, str) and not is_text(value):
        raise BadConfig(f"{name} = {_SHOWN.repr(value)}: contains an invalid character (an unpaired surrogate)")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadConfig(f"{name} = {value}: must be finite")
