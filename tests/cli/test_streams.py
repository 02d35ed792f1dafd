"""Commands whose streams are closed or full, or whose user has no home folder or may not enter a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.cli import main
from core.errors import BadFile
from core.storage.cache_folder import cache_folder
from tests.kills import become_nobody, child, open_folder, where_forks_work
from tests.tooling import write_photos

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no such streams, and other permissions")
ROOT = Path(__file__).parents[2]


def command(shell: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in a shell, with these redirections."""
    words = [sys.executable, "-m", "core", *map(str, arguments)]
    return subprocess.run(["sh", "-c", f'"$@" {shell}', "sh", *words], capture_output=True, text=True, cwd=ROOT)


def training(folder: Path) -> list[str]:
    options = ["--rank", "2", "--steps", "2", "--resolution", "32", "--no-check-photos", "--recipe", "none"]
    photos = write_photos(folder / "photos", count=2)
    return ["train", str(photos), "--base", "demo", "--output", str(folder / "a.safetensors"), *options]


@pytest.mark.parametrize("shell", [">&- 2>&- <&-", "2>/dev/full"])
def test_closed_streams_and_messages_that_cannot_be_written_stop_no_training(tmp_path, shell):
    done = command(shell, *training(tmp_path))
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "a.safetensors").exists()


@pytest.mark.parametrize(("driver", "own"), [("/", ""), ("/", "PYTORCH_CUDA_ALLOC_CONF"), ("/none", "")])
def test_commands_choose_growing_segments_before_torch_is_loaded(driver, own):
    """Only with NVIDIA's driver for Linux, and never by an import, as in ComfyUI's process."""
    program = f"""if True:
        import os, sys, core, core.cli
        names = [name for name in os.environ if name.endswith("ALLOC_CONF")]
        core.cli.NVIDIA = {driver!r}
        core.cli.main(["--version"])
        assert "torch" not in sys.modules
        print(*names, *(f"{{name}}={{os.environ[name]}}" for name in sorted(os.environ) if name.endswith("ALLOC_CONF")))
    """
    clean = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    environment = {**clean, **({own: "max_split_size_mb:64"} if own else {})}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=environment)
    chosen = [f"PYTORCH_{name}=expandable_segments:True" for name in ("ALLOC_CONF", "CUDA_ALLOC_CONF")]
    wanted = [own, f"{own}=max_split_size_mb:64"] if own else chosen if driver == "/" else []
    assert done.stdout.splitlines()[1:] == [" ".join(wanted)], done.stderr


def test_commands_allow_amds_fast_attention_before_torch_is_loaded(monkeypatch):
    name = "TORCH_ROCM_AOTRITON_ENABLE_EXPERIMENTAL"
    for given, wanted in ((None, "1"), ("0", "0")):
        monkeypatch.setenv(name, given) if given else monkeypatch.delenv(name, raising=False)
        main(["--version"])
        assert os.environ[name] == wanted


@pytest.mark.parametrize("arguments", [["generate", "--style-pack", "list"], ["completion", "bash"]])
def test_a_full_output_is_named(arguments):
    done = command(">/dev/full", *arguments)
    assert done.returncode == 1
    assert done.stderr == "facelora: standard output: cannot be written: No space left on device\n"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_ends_the_parser_and_cannot_be_written_is_no_traceback(option):
    said = command(">/dev/full", option).stderr
    assert said in ("", "facelora: standard output: cannot be written: No space left on device\n")


def test_a_training_whose_progress_cannot_be_written_keeps_its_state(tmp_path):
    done = command(">/dev/full", *training(tmp_path), "--json")
    assert done.returncode == 1 and done.stderr.endswith("cannot be written: No space left on device\n"), done.stderr
    assert command("", *training(tmp_path), "--resume").returncode == 0


def test_a_reader_who_has_gone_is_no_error():
    done = command("| true", "generate", "--style-pack", "list")
    assert done.stderr == ""


def test_a_user_without_a_home_folder_is_told_what_to_set(tmp_path, monkeypatch, capsys):
    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("FACELORA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    with pytest.raises(BadFile, match="this user has no home folder; set FACELORA_CACHE to a folder"):
        cache_folder()
    assert main(["clear-cache"]) == 1 and "set FACELORA_CACHE" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["check", "~/photos"])
    assert "~/photos: this user has no home folder; give the whole path" in capsys.readouterr().err


@pytest.mark.parametrize("mode", [0o700, 0o744])
@pytest.mark.parametrize("name", ["generate", "studio", "forget", "headshots", "demo"])
@where_forks_work
def test_an_output_that_may_not_be_entered_is_named(name, mode):
    with open_folder() as room:
        photos, output = write_photos(room / "people" / "anna", count=2), room / "out"
        said = room / "said"
        output.mkdir()
        output.chmod(mode)
        arguments = {
            "generate": ["--base", "demo", "--prompt", "a"], "studio": [photos.parent, "--base", "demo"],
            "forget": ["anna"], "headshots": [photos, "--base", "demo"], "demo": [],
        }  # fmt: skip

        def run_command() -> int:
            with said.open("w") as sys.stderr:
                become_nobody()
                return main([name, *map(str, arguments[name]), "--output", str(output)])

        assert child(run_command) == 1
        assert said.read_text() == f"facelora: {output}: cannot be written there: Permission denied\n"
