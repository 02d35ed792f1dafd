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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_origin, get_type_hints

from .values import Output, has_none, values_of

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
    """A group of options: only one of them may be given."""

    required: bool = False


@dataclass(frozen=True)
class _Declared:
    """How a field is given on the command line."""

    text: str
    metavar: str | None
    choices: Collection[str] | None
    nargs: str | None
    default: Any = None
    flag: str | None = None
    one_of: OneOf | None = None
    is_positional: bool = False


@dataclass(frozen=True)
class _Settings:
    """The settings of a training run that are given as options."""

    only: Collection[str] | None


def argument(text: str, metavar: str | None = None) -> Any:
    """Declare a positional argument: for a list, one or more."""
    return _Declared(text, metavar, None, "+", is_positional=True)


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
    """Declare an option. Its flag is by default the field's name. `nargs` is for a list that is given at once."""
    return _Declared(text, metavar, choices, nargs, default, flag, one_of)


def below() -> Any:
    """Declare the options of another dataclass, the field's type."""
    return None


def settings(only: Collection[str] | None = None) -> Any:
    """Declare an option for each setting of a training run, or for those in `only`. The field is a dict of the given ones."""
    return _Settings(only)


def add_options(parser: argparse.ArgumentParser, of: type) -> None:
    """Add the arguments for the fields of the dataclass, and of the dataclasses in it."""
    groups: dict[OneOf, argparse._ActionsContainer] = {}
    # argparse names missing arguments in this order: positional ones first, also those of a subclass.
    for name, hint, declared in sorted(_fields(of), key=lambda one: not getattr(one[2], "is_positional", False)):
        if declared is None:
            add_options(parser, hint)
        elif isinstance(declared, _Settings):
            from .settings import add_settings  # Most commands have no settings of a run, and do without their module.

            add_settings(parser, declared.only)
        elif declared.is_positional:
            parser.add_argument(name, **_keywords(hint, declared))
        else:
            one_of, flag = declared.one_of, declared.flag or "--" + name.replace("_", "-")
            if one_of and one_of not in groups:
                groups[one_of] = parser.add_mutually_exclusive_group(required=one_of.required)
            place = groups[one_of] if one_of else parser
            keywords = _keywords(hint, declared)
            if hint is not bool:
                default = [] if declared.default is None and get_origin(hint) is list else declared.default
                keywords |= {"default": default, "required": default is None and not has_none(hint)}
            place.add_argument(flag, dest=name, **keywords)


def _keywords(hint: Any, declared: _Declared) -> dict[str, Any]:
    if hint is bool:
        return {"help": declared.text, "action": "store_true"}
    convert, choices, is_list = values_of(hint)
    return {
        "help": declared.text,
        "metavar": convert.metavar if isinstance(convert, Output) else declared.metavar,
        "choices": choices or declared.choices,
        "type": convert,
        "nargs": declared.nargs if is_list else None,
        "action": "append" if is_list and not declared.nargs else None,
    }


def _fields(of: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the name and the type of each field, and how it is declared: None if its type is a dataclass of options."""
    hints = get_type_hints(of, include_extras=True)
    yield from ((item.name, hints[item.name], item.default) for item in dataclasses.fields(of))


def filled(of: type[T], parsed: argparse.Namespace) -> T:
    """Return the dataclass with the values that argparse has made of its options."""
    values: dict[str, Any] = {}
    for name, hint, declared in _fields(of):
        if declared is None:
            values[name] = filled(hint, parsed)
        elif isinstance(declared, _Settings):
            from .settings import given_settings

            values[name] = given_settings(parsed)
        else:
            values[name] = getattr(parsed, name)
    return of(**values)


def given_values(options: object) -> Iterator[tuple[Any, Any]]:
    """Yield the value of each given option after what has converted it from text: for an output, an `Output`."""
    for name, hint, declared in _fields(type(options)):
        value = getattr(options, name)
        if declared is None:
            yield from given_values(value)
        elif value is not None:
            yield values_of(hint)[0], value


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
