"""Training settings as options of a command, which override those in a TOML file."""

import argparse
import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from ..config import TrainConfig, group_of, known_settings
from ..errors import BadConfig
from ..storage.files import read_bytes
from ..storage.plain_values import parse_toml
from .values import unicode_text, values_of

SCHEDULE = ("prediction_type", "zero_terminal_snr")
"""The settings for how the base model predicts, which are needed to load it."""
OF_RECIPES = (
    "rank", "resolution", "steps", "batch_size", "learning_rate", "schedule", "warmup_steps", "prior_prediction",
    "sample_every", "hold_out", "likeness_pictures", "stop_early",
)  # fmt: skip
"""The settings that the families' recipes set."""
MAX_FILE_BYTES = 2**20
"""The largest size of a settings file, in bytes."""


def add_settings(parser: argparse.ArgumentParser, only: Collection[str] | None = None) -> None:
    """Add an option for each field of TrainConfig under its group's heading, or only for the fields in `only`, without one.

    Commands with fields in `only` always have a recipe.

    Options that are not given are missing from the parsed options, which keeps the values of a file.
    """
    hints = get_type_hints(TrainConfig)
    groups: dict[str, argparse._ArgumentGroup] = {}
    for item in dataclasses.fields(TrainConfig):
        if only is None:
            title = group_of(item.name)
            if title not in groups:
                groups[title] = parser.add_argument_group(f"settings, {title}")
            _add_setting(groups[title], item, hints[item.name])
        elif item.name in only:
            _add_setting(parser, item, hints[item.name], has_recipe=True)


def _add_setting(
    group: argparse._ActionsContainer, item: dataclasses.Field, hint: Any, has_recipe: bool = False
) -> None:
    """Add the option of a field. `has_recipe` is whether the command always has a recipe, which may set it."""

    def default(value: Any) -> str:
        if item.name not in OF_RECIPES:
            return f"(default: {value})"
        return "(default: the recipe's)" if has_recipe else f"(default: the recipe's, else {value})"

    flag = "--" + item.name.replace("_", "-")
    names = ["--trigger", flag] if item.name == "trigger_word" else [flag]
    text = re.sub(r"\(default: (.*)\)", lambda told: default(told[1]), item.metadata["help"])
    keywords: dict[str, Any] = {"dest": f"setting_{item.name}", "default": argparse.SUPPRESS}
    kind, choices, is_list = values_of(hint)
    if kind is bool:
        keywords |= {"action": argparse.BooleanOptionalAction}
        text += f" {default('yes' if item.default else 'no')}" if item.default is not None else ""
    elif get_origin(hint) is dict:
        keywords |= {"action": "append", "type": _pattern_of(get_args(hint)[1]), "metavar": "PATTERN=NUMBER"}
    else:
        keywords |= {"choices": choices} if choices else {"metavar": {int: "N", float: "X", str: "TEXT"}[kind]}
        keywords |= {"type": unicode_text if kind is str else kind, "action": "append" if is_list else None}
        if is_list:
            names, text = [flag.removesuffix("s")], f"{text}; may be repeated"
        elif item.default is not None:
            text = f"{text} {default(item.default)}"
    group.add_argument(*names, help=text.replace("%", "%%"), **keywords)


def _pattern_of(number: type) -> Callable[[str], tuple[str, Any]]:
    def parse(text: str) -> tuple[str, Any]:
        pattern, separator, value = text.rpartition("=")
        if not separator:
            raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=NUMBER")
        try:
            return pattern, number(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r} in {text!r} is not a number") from None

    return parse


def settings_from(file: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings in a TOML file, overridden by those given on the command line.

    Raises BadFile or BadConfig if the file cannot be read, is not TOML, or has an unknown setting.
    """
    settings = read_toml(file) if file else {}
    try:
        return known_settings(settings) | given
    except BadConfig as error:
        raise BadConfig(f"{file}: {error}") from None


def given_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings given on the command line, by their names in TrainConfig."""
    settings: dict[str, Any] = {}
    for name, value in vars(options).items():
        if name.startswith("setting_"):
            if value and isinstance(value, list) and isinstance(value[0], tuple):
                value = dict(value)
            settings[name.removeprefix("setting_")] = value
    return settings


def schedule_from(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given settings in SCHEDULE, as arguments of `load_base`."""
    return {name: settings[name] for name in SCHEDULE if name in settings}


def read_toml(path: Path) -> dict[str, Any]:
    try:
        return parse_toml(read_bytes(path, MAX_FILE_BYTES))
    except BadConfig as error:
        raise BadConfig(f"{path}: not a TOML file: {error}") from None
