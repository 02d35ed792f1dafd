"""What the command line says of itself: all commands, the options that matter first, and the word that was meant."""

import itertools
import sys

import pytest
import torch

from core.cli import COMMANDS, main
from core.cli.common import BarProgress, end_bars
from core.cli.train import StopOnSignal, shown
from core.training import StepReport


def said(capsys, *arguments: str) -> tuple[int, str]:
    """The exit code of a command that ends the program, and what it printed."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out + printed.err


def test_help_lists_every_command_once_in_a_terminal_of_80_columns(capsys):
    code, text = said(capsys, "--help")
    lines = text.splitlines()
    assert code == 0 and max(map(len, lines)) < 80
    assert sorted(line.split()[0] for line in lines if line[:3].strip() and line.startswith("  ")) == sorted(
        ["-h,", "--version", *COMMANDS]
    )


def test_help_shows_what_matters_first_and_help_all_everything(capsys):
    short, whole = (said(capsys, "train", option)[1] for option in ("--help", "--help-all"))
    assert len(short.splitlines()) < 60
    assert all(option in short and option in whole for option in ("--base", "--steps", "--resolution"))
    assert all(option not in short and option in whole for option in ("--vae", "--optimizer", "--caption-dropout"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian", "photos"], "unknown command 'trian'; did you mean train?"),
        (["trian", "demo"], "unknown command 'trian'; did you mean train?"),
        (["photos"], "unknown command 'photos' (--help lists the commands)"),
        (["train", "photos", "--base", "demo", "--output", "a", "--stpes=3"], "--stpes=3; did you mean --steps?"),
        (["inspect", "a", "--wholly-unknown"], "unknown: --wholly-unknown ("),
    ],
)
def test_the_word_that_was_meant_is_named(capsys, arguments, words):
    code, text = said(capsys, *arguments)
    assert code == 2 and words in text and text.count(" or ") <= 2


@pytest.mark.parametrize("command", COMMANDS)
def test_wrong_usage_is_one_line_below_a_usage_of_one_line(capsys, command):
    code, text = said(capsys, command, *["a"] * 9, "--wholly-unknown")
    lines = text.splitlines()
    assert code == 2 and lines[-1].startswith(f"facelora {command}: error: ") and "--help" in text
    assert len(lines) == 1 or (len(lines) == 2 and lines[0].startswith(f"usage: facelora {command} "))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "64"], "error: argument --size: '64' is not WIDTHxHEIGHT in pixels, such as 512x640 ("),
        (["--precision", "fp12"], "error: argument --precision: invalid choice: 'fp12' (choose from"),
    ],
)
def test_a_wrong_value_is_named_with_what_may_stand_there(capsys, arguments, words):
    code, text = said(capsys, "generate", *arguments)
    assert code == 2 and words in text


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_a_shell_completes_every_command_and_the_options_that_help_leaves_out(capsys, shell):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in (*COMMANDS, "--optimizer", "--caption-dropout", "adafactor"))


def test_completion_says_which_package_it_lacks(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == "facelora: completion requires the package shtab: pip install shtab\n"


def test_a_message_stands_on_a_line_of_its_own_below_a_bar(capsys):
    progress = BarProgress()
    progress.phase("merging", 1, 3)
    end_bars()
    assert capsys.readouterr().err.endswith("\n")
    with progress:  # which is ended once
        pass
    assert capsys.readouterr().err == ""


def test_a_phase_without_parts_to_count_shows_its_name_and_time(capsys):
    with BarProgress() as progress:
        progress.phase("loading the model", 0, 0)
    assert capsys.readouterr().err.split("\r")[-1].strip() == "loading the model: 00:00"


def test_the_bar_of_training_shows_how_far_its_samples_are(capsys, monkeypatch):
    monkeypatch.setattr("core.cli.common.time.monotonic", itertools.count().__next__)
    with BarProgress() as progress:
        on_phase = shown(progress, StopOnSignal("")).on_phase
        progress.step(StepReport(1, 9, 1e-4, 1.0, 8.0, 0, None, torch.tensor(0.1)))
        for done in (6, 12):
            on_phase("samples", done, 12)
        names = [line.partition(":")[0] for line in capsys.readouterr().err.split("\r")]
    assert names[-2:] == ["training (samples 50%)", "training"]


@pytest.mark.parametrize("end", [EOFError, KeyboardInterrupt])
def test_control_d_and_control_c_stop_a_command_in_one_line(end, capsys, monkeypatch):
    def asks() -> None:
        raise end

    monkeypatch.setattr("core.cli.clear_cache.clear_cache", asks)
    assert main(["clear-cache"]) == 1
    assert capsys.readouterr().err == "facelora: stopped\n"


@pytest.mark.parametrize("arguments", [("resize", "a", "--rank=--"), ("generate", "--count=--")])
def test_two_dashes_are_no_value(capsys, arguments):
    code, text = said(capsys, *arguments)
    name = arguments[-1].partition("=")[0]
    assert code == 2 and f"argument {name}: " in text


def test_a_mistyped_option_is_told_before_the_one_that_is_missing(capsys):
    code, text = said(capsys, "train", "photos", "--baes", "x.safetensors", "--output", "a.safetensors")
    assert code == 2 and "unknown: --baes; did you mean --base" in text
