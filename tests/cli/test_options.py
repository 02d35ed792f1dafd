"""core/cli/options.py: what the type of a field makes of an option, and what `run` is given."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from core.cli.options import OneOf, Options, add_options, argument, below, filled, given_values, option, settings
from core.cli.parser import CommandParser
from core.cli.values import InputPath, LoraOutput, WrittenFile, input_path

EITHER = OneOf(required=True)


@dataclass(frozen=True)
class Parts:
    vae: str | None = option("VAE", "FILE")


@dataclass(frozen=True)
class EveryKind(Options):
    files: list[InputPath] = argument("Files", "FILE")
    output: LoraOutput = option("Output")
    parts: Parts = below()
    rank: int = option("Rank", "N", default=8)
    word: list[str] = option("Word")
    tag: list[str] | None = option("Tag")
    kind: Literal["small", "large"] | None = option("Kind")
    to: str | None = option("Names", choices=("a", "b"), one_of=EITHER)
    readers: str | None = option("Programs", flag="--for", one_of=EITHER)
    dry_run: bool = option("Dry run")
    given: dict[str, Any] = settings(("steps",))


def read(*words: str) -> EveryKind:
    parser = CommandParser(prog="facelora every")
    add_options(parser, EveryKind)
    return filled(EveryKind, parser.read(words))


def test_each_field_has_the_value_of_its_type():
    options = read(
        "a", "b", "--output=c.safetensors", "--vae", "v", "--rank", "4", "--word", "x", "--word", "y", "--kind", "small",
        "--for", "comfyui", "--dry-run", "--steps", "9",
    )  # fmt: skip
    assert options == EveryKind(
        files=[Path("a"), Path("b")], output=Path("c.safetensors"), parts=Parts(vae="v"), rank=4, word=["x", "y"],
        tag=None, kind="small", to=None, readers="comfyui", dry_run=True, given={"steps": 9},
    )  # fmt: skip


def test_what_is_not_given_has_its_default():
    options = read("a", "--output", "c.safetensors", "--to", "b")
    assert (options.rank, options.word, options.tag, options.kind, options.given) == (8, [], None, None, {})
    assert not options.dry_run and options.overwrite and options.parts == Parts(vae=None)
    inputs = [value for convert, value in given_values(options) if convert is input_path]
    outputs = [value for convert, value in given_values(options) if isinstance(convert, WrittenFile)]
    assert inputs == [[Path("a")]] and outputs == [Path("c.safetensors")]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["a", "--to", "a"], "the following arguments are required: --output"),
        (["a", "--output", "c"], "one of the arguments --to --for is required"),
        (["a", "--output", "c", "--to", "a", "--for", "b"], "argument --for: not allowed with argument --to"),
        (["a", "--output", "c", "--to", "c"], "argument --to: invalid choice: 'c'"),
        (["a", "--kind", "medium"], "argument --kind: invalid choice: 'medium'"),
        (["a", "--output", "c", "--to", "a", "-x"], "unknown: -x ("),
    ],
)
def test_what_does_not_fit_is_wrong_usage(words, error, capsys):
    with pytest.raises(SystemExit, match="2"):
        read(*words)
    assert error in capsys.readouterr().err
