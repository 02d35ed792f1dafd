"""core/config.py: what is said of a setting once is what the command line and every check go by."""

import dataclasses
import math
import re

import pytest

from core.cli.command import command_parser
from core.cli.options import HelpAll
from core.cli.settings import OF_RECIPES
from core.config import GROUPS, TrainConfig, config_from, group_of, known_settings, name_matches, parse_toml
from core.errors import BadConfig
from core.models.families import FAMILIES
from core.training.recipes import recipe_settings

SETTINGS = {item.name: item for item in dataclasses.fields(TrainConfig)}
BOUNDED = {name: item.metadata for name, item in SETTINGS.items() if item.metadata["low"] is not None}


@pytest.mark.parametrize("name", sorted(BOUNDED.keys() - {"rank_pattern", "alpha_pattern", "more_resolutions"}))
def test_a_value_out_of_range_is_refused_with_the_setting_the_value_and_the_range(name):
    low, high = BOUNDED[name]["low"], BOUNDED[name]["high"]
    kind = type(low) if SETTINGS[name].default is None else type(SETTINGS[name].default)
    for value in {kind(low - 1), kind(2 * high + 1) if high != math.inf else kind(low - 2)}:
        with pytest.raises(
            BadConfig, match=rf"^{name} = {value}: must be (between {low} and|at least {low})".replace("+", r"\+")
        ):
            config_from({name: value})


def test_each_number_of_a_table_or_list_is_checked():
    with pytest.raises(BadConfig, match="more_resolutions = 8: must be between 16 and 8192"):
        config_from({"more_resolutions": [64, 8]})
    with pytest.raises(BadConfig, match="more_resolutions = '512': expected int"):
        config_from({"more_resolutions": ["512"]})
    with pytest.raises(BadConfig, match="rank_pattern: attn = 0: must be at least 1"):
        TrainConfig(rank_pattern={"mlp": 4, "attn": 0})


NAME = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        ("attn1", True), ("attn2", False), ("attn1.to", True), (r"attn1\.to_q", True), ("^down_blocks.1", True),
        ("^attn1", False), ("to_q$", True), ("attn1$", False), ("down_blocks.*to_q", True), (r"^down.*\.to_[qk]$", True),
        ("attn[23]", False), ("down_blocks*attn1", True), ("^down_blocks$", False), ("*", True), ("a*" * 5000 + "z", False),
    ],
)  # fmt: skip
def test_a_pattern_is_a_part_of_a_name(pattern, matches):
    TrainConfig(rank_pattern={pattern: 4})
    assert name_matches(pattern, NAME) is matches


@pytest.mark.parametrize(
    "pattern", ["", "^", "(a+)+$", "attn1|attn2", "a?", r"\d", "[^0]", "[!0]", "to_q$ ", "[]", "a\n"]
)
def test_an_invalid_pattern_is_refused(pattern):
    for name in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(BadConfig, match=f"^{name}: .* is not a valid pattern: use a part of a module's name"):
            config_from({name: {pattern: 4}})


def test_every_group_has_settings_and_its_heading_in_the_help_in_this_order():
    assert list(dict.fromkeys(map(group_of, SETTINGS))) == list(GROUPS)
    titles = [group.title for group in command_parser("train")._action_groups]
    assert [title for title in titles if str(title).startswith("settings")] == [
        f"settings, {heading}" for heading in GROUPS
    ]


def test_every_setting_is_an_option_with_its_help():
    parser = command_parser("train")
    actions = {action.dest: action for action in parser._actions}
    everything = actions["help_all"]
    assert isinstance(everything, HelpAll)
    told = {action.dest: text or "" for action, text in everything.hidden}
    told |= {name: action.help or "" for name, action in actions.items() if name not in told}
    for name, item in SETTINGS.items():
        text = told[f"setting_{name}"].replace("%%", "%").replace("default: the recipe's, else", "default:")
        assert text.startswith(item.metadata["help"])


def test_the_help_says_which_defaults_come_from_the_recipe():
    recipes = [(name, family.recipes) for family in FAMILIES.values() for name in family.recipes]
    assert {*OF_RECIPES} == {setting for name, of_family in recipes for setting in recipe_settings(name, of_family)}
    help_text = command_parser("train").format_help().replace("\n", " ")
    assert re.search(r"default:\s+the\s+recipe's,\s+else\s+800", help_text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (".".join("a" * 2000) + " = 1", "line 1 has more than 100 dots"),
        ("[" + ".".join("a" * 2000) + "]", "line 1 has more than 100 dots"),
        ("# a\n" * 2**16 + "a", "has 262,145 characters, and the limit is 262,144"),
        ("a = [" * 10_000, "nested too deeply|Invalid"),
        ("a = " + "1" * 5000, "Exceeds the limit"),
    ],
    ids=["key", "heading", "size", "nesting", "digits"],
)
def test_a_toml_text_that_would_take_much_memory_is_refused(text, words):
    with pytest.raises(BadConfig, match=words):
        parse_toml(text)


def test_settings_that_are_no_mapping_are_refused():
    with pytest.raises(
        BadConfig, match="the settings are a TrainConfig: expected a mapping of those to change, such as"
    ):
        known_settings(TrainConfig())  # pyright: ignore


def test_dots_in_comments_and_texts_do_not_count_as_keys():
    assert parse_toml(f'# {"." * 200}\nprompt = "{"and. so. on. " * 30}"')["prompt"].startswith("and. so.")
