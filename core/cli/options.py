"""The options of a command as the fields of a dataclass: argparse's arguments are made from them, and its result fills them.

    @dataclass(frozen=True)
    class ResizeOptions(Options):
        file: InputPath = argument("LoRA to resize", "IN")
        rank: int | None = option("Largest rank of a module", "N")

The type of a field says what its text becomes. A `bool` is a switch, a `Literal` a choice, and a `list` an option that may be
repeated. An option whose type has no None is required, unless it has a default. Importing this doesn't load torch.
"""

import argparse
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .settings import add_settings, given_settings
from .values import Output

T = TypeVar("T")


class Options:
    """The options of a command. The subclasses are frozen dataclasses."""

    usage: ClassVar[str | None] = None
    """A short usage. Without it, a message about wrong usage shows none, since argparse's own lists every option."""
    epilog: ClassVar[str | None] = None
    first: ClassVar[Collection[str]] = ()
    """The options that --help shows, if it leaves the others to --help-all."""
    dry_run: bool = False
    """Whether nothing is written."""
    overwrite: bool = True
    """Whether existing files may be replaced. True for commands without this option."""


@dataclass(frozen=True, eq=False)
class OneOf:
    """Options of which only one may be given."""

    required: bool = False


def argument(text: str, metavar: str | None = None, *, choices: Collection[str] | None = None) -> Any:
    """Return a field for a positional argument: for a list, one or more."""
    return field(metadata={"is_positional": True, "help": text, "metavar": metavar, "choices": choices, "nargs": "+"})


def option(
    text: str,
    metavar: str | None = None,
    *,
    default: Any = None,
    flag: str | None = None,
    choices: Collection[str] | None = None,
    nargs: str | None = None,
    one_of: OneOf | None = None,
) -> Any:
    """Return a field for an option. Its flag is by default the field's name. `nargs` is for a list that is given at once."""
    told = {"help": text, "metavar": metavar, "default": default, "flag": flag, "choices": choices, "nargs": nargs}
    return field(metadata=told | {"one_of": one_of})


def options_below() -> Any:
    """Return a field for the options of another dataclass, which is the field's type."""
    return field()


def settings_below(only: Collection[str] | None = None) -> Any:
    """Return a field for the given settings of a training run: of all, or of those in `only`."""
    return field(metadata={"settings": only})


def add_options(parser: argparse.ArgumentParser, of: Any) -> None:
    """Add the arguments for the fields of the dataclass."""
    groups: dict[OneOf, argparse._ActionsContainer] = {}
    for name, hint, told in _fields(of):
        if dataclasses.is_dataclass(hint):
            add_options(parser, hint)
        elif "settings" in told:
            add_settings(parser, told["settings"])
        elif "is_positional" in told:
            parser.add_argument(name, **_keywords(hint, told))
        else:
            one_of, flag = told["one_of"], told["flag"] or "--" + name.replace("_", "-")
            if one_of and one_of not in groups:
                groups[one_of] = parser.add_mutually_exclusive_group(required=one_of.required)
            place = groups[one_of] if one_of else parser
            keywords = _keywords(hint, told)
            if hint is not bool:
                default = [] if told["default"] is None and get_origin(hint) is list else told["default"]
                keywords |= {"default": default, "required": default is None and not _has_none(hint)}
            place.add_argument(flag, dest=name, **keywords)


def _keywords(hint: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    """Return argparse's arguments for a field of that type, besides its default."""
    if hint is bool:
        return {"help": told["help"], "action": "store_true"}
    convert, choices, is_list = _values_of(hint)
    return {
        "help": told["help"],
        "metavar": convert.metavar if isinstance(convert, Output) else told["metavar"],
        "choices": choices or told["choices"],
        "type": convert,
        "nargs": told["nargs"] if is_list else None,
        "action": "append" if is_list and not told["nargs"] else None,
    }


def _values_of(hint: Any) -> tuple[Any, Sequence[Any], bool]:
    """Return what converts the text of a value of that type, the choices for it, and whether there are several values."""
    if _has_none(hint):
        (hint,) = (one for one in get_args(hint) if one is not NoneType)
    if is_list := get_origin(hint) is list:
        (hint,) = get_args(hint)
    if get_origin(hint) is Literal:
        return str, get_args(hint), is_list
    return get_args(hint)[1] if get_origin(hint) is Annotated else hint, (), is_list


def _has_none(hint: Any) -> bool:
    return get_origin(hint) in (Union, UnionType)


def _fields(of: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield the name, the type and the metadata of each field."""
    hints = get_type_hints(of, include_extras=True)
    yield from ((item.name, hints[item.name], item.metadata) for item in dataclasses.fields(of))


def filled(of: type[T], parsed: argparse.Namespace) -> T:
    """Return the dataclass with the values that argparse has made of its options."""
    values: dict[str, Any] = {}
    for name, hint, told in _fields(of):
        if dataclasses.is_dataclass(hint):
            values[name] = filled(cast(type, hint), parsed)
        else:
            values[name] = given_settings(parsed) if "settings" in told else getattr(parsed, name)
    return of(**values)


def given_values(options: object) -> Iterator[tuple[Any, Any]]:
    """Yield the value of each given option after what has converted it from text: for an output, an `Output`."""
    for name, hint, _ in _fields(type(options)):
        value = getattr(options, name)
        if dataclasses.is_dataclass(value):
            yield from given_values(value)
        elif value is not None:
            yield _values_of(hint)[0], value


class HelpAll(argparse.Action):
    """The option --help-all, which shows all options, including those that `show_first` has hidden."""

    hidden: Sequence[tuple[argparse.Action, str | None]] = ()

    def show(self) -> None:
        """Restore the hidden options."""
        for action, text in self.hidden:
            action.help = text

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        self.show()
        parser.print_help()
        parser.exit()


def show_first(parser: argparse.ArgumentParser, first: Collection[str]) -> None:
    """Show only the options of these names in --help, and add --help-all, which shows every option."""
    shown = {"--help", *first}
    hidden = [action for action in parser._actions if action.option_strings and not shown & {*action.option_strings}]
    more = parser.add_argument("--help-all", action=HelpAll, nargs=0, help=f"Show {len(hidden)} more options")
    assert isinstance(more, HelpAll)
    more.hidden = [(action, action.help) for action in hidden]
    for action in hidden:
        action.help = argparse.SUPPRESS
