"""The parsers of the command line, which report wrong usage in one line and suggest the word that was meant."""

import argparse
import difflib
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, below its short usage if it has one."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._actions[0].help = "Show this help and exit"

    def error(self, message: str) -> NoReturn:
        usage = self.format_usage() if self.usage else ""  # Otherwise it lists every option.
        hint = "" if usage else f" ({self.prog} --help lists the options)"
        self.exit(2, f"{usage}{self.prog}: error: {message}{hint}\n")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words of the command line. Unknown ones end the program with an error."""
        options, unknown = self.parse_known_args(words)
        if unknown:
            self.refuse(*unknown)
        return options

    def refuse(self, *unknown: str) -> NoReturn:
        known = [name for action in self._actions for name in action.option_strings]
        self.error(f"unknown: {' '.join(unknown)}{did_you_mean(unknown[0].partition('=')[0], known)}")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        values = super()._get_values(action, arg_strings)
        if values == [] and action.nargs in (None, "+"):  # Python up to 3.12 drops the value of --rank=--.
            raise argparse.ArgumentError(action, "expected one argument")
        return values


class CommandParser(Parser):
    """The parser of one command. It reports a mistyped option before the required option that is missing because of it."""

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        # argparse asks for the options that begin with a word before it looks at any value.
        found = super()._get_option_tuples(option_string)
        if not found and option_string.startswith("--"):
            self.refuse(option_string)
        return found


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Return a question that suggests up to three similar known words; empty if none is similar."""
    alike = difflib.get_close_matches(given, known, n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(alike)}?" if alike else ""
