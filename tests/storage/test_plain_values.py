"""Reading what others wrote: JSON, and values of stated types."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from core.errors import BadConfig
from core.storage.plain_values import Form, Range, parse_json, parse_toml, read_as


@dataclass(frozen=True)
class Inner:
    size: Annotated[float, Range(0, 2)]
    anything: Any = None


@dataclass(frozen=True)
class Outer:
    name: Annotated[str, Form(r"\S", "a text")]
    kind: Literal["one", "two"] = "one"
    inner: Inner | None = None
    parts: tuple[int, ...] = ()
    sizes: Mapping[str, Annotated[float, Range(1, 9, whole=True)]] | None = None
    on: bool = False


def test_a_table_becomes_a_dataclass_with_others_in_it():
    values = {"name": "a", "kind": "two", "inner": {"size": 1}, "parts": [1, 2], "sizes": {"a": 2.0}, "on": True}
    assert read_as(Outer, values) == Outer("a", "two", Inner(1), (1, 2), {"a": 2.0}, True)
    assert read_as(Outer, {"name": "a", "inner": None}) == Outer("a")


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ([], r"pack = \[\]: expected a table"),
        ({}, "pack: the field 'name' is missing"),
        ({"name": "a", "nam": 1}, "pack: unknown field 'nam'; known: name, kind, inner, parts, sizes, on"),
        ({"name": 1}, "pack.name = 1: expected str"),
        ({"name": " "}, "pack.name = ' ': expected a text"),
        ({"name": "half \ud83d"}, "pack.name = .* invalid character"),
        ({"name": "a", "kind": "three"}, "pack.kind = 'three': choose one of one, two"),
        ({"name": "a", "kind": ["one"]}, "pack.kind = .*: choose one of one, two"),
        ({"name": "a", "inner": {"size": 3}}, "pack.inner.size = 3: must be between 0 and 2"),
        ({"name": "a", "inner": {"size": True}}, "pack.inner.size = True: expected float"),
        ({"name": "a", "inner": {"size": float("nan")}}, "pack.inner.size = nan: must be finite"),
        ({"name": "a", "parts": "12"}, "pack.parts = '12': expected a list"),
        ({"name": "a", "parts": [1, 2.0]}, "pack.parts = 2.0: expected int"),
        ({"name": "a", "sizes": {"b": 2.5}}, "pack.sizes: b = 2.5: must be a whole number"),
        ({"name": "a", "on": 1}, "pack.on = 1: expected bool"),
        ({"name": "a" * 1000, "on": "b" * 1000}, r"pack.on = 'b+\.\.\.b+': expected bool"),
        ({"name": "a", "inner": {"size": 10**400}}, r"pack.inner.size = 1.{3,50}: must be between 0 and 2"),
        ({"name": "\ud800" * 1000}, r"pack.name = .{3,200}: contains an invalid character"),
        ({"name": "a", "b" * 1000: 1}, r"pack: unknown field .{3,200}; known: "),
    ],
)
def test_a_fault_is_named_with_the_field_the_value_and_the_choices(values, fault):
    with pytest.raises(BadConfig, match=f"^{fault}"):
        read_as(Outer, values, "pack")


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1,', r"\(line 1, column 9\)"),
        ("[" * 100_000, "values are nested too deeply"),
        ('[{"a": 1, "b": 2, "a": 3}]', "the field 'a' appears twice"),
        ("1" * 5000, "Exceeds the limit"),
        (b"\xff", r"not UTF-8 text \(byte 0\)"),
    ],
)
def test_json_that_cannot_be_used_says_why(text, fault):
    with pytest.raises(ValueError, match=fault):
        parse_json(text)


@pytest.mark.parametrize("separator", ["\u2028", "\x85", "\u2029"])
def test_a_fault_in_toml_shows_the_line_that_the_parser_counts(separator):
    with pytest.raises(BadConfig, match=r"line 2.*: 'b ='$"):
        parse_toml(f'a = "one{separator}two"\nb =\nc = 3\n')
    with pytest.raises(BadConfig, match=r"^line 2 has more than 100 dots"):
        parse_toml(f"# one{separator}two\nb{'.b' * 101} = 1")
    assert parse_toml(f"# one{separator}{'.' * 101}\na = 1") == {"a": 1}
