"""What differs on Windows and macOS, simulated where it can be. docs/systems.md is the table of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from core import Callbacks, LoraFile, PictureJob, TrainConfig, generate, load_base, train
from core.cli import main
from core.cli.common import BarProgress, split_strength
from core.errors import BadFile
from core.lora.embeddings import file_word
from core.models.objective import NoiseSchedule
from core.storage import files
from core.storage.cache_folder import made_folder
from core.storage.files import LONGEST_ON_WINDOWS, write_file, write_text
from core.storage.safetensors_file import save_safetensors
from core.studio.people import read_people
from core.training.job import hints
from tests.tooling import write_photos
from tests.windows import windows_rules

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
on_linux = pytest.mark.skipif(
    sys.platform != "linux", reason="simulates another system by what Linux tells of open files"
)


@pytest.fixture
def windows(monkeypatch):
    """The library as on Windows, with Windows' rules for files that are open."""
    monkeypatch.setattr(files, "IS_WINDOWS", True)
    with windows_rules():
        yield


def run(*arguments: object, encoding: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
    """The command line in a process of its own, whose streams have that encoding."""
    command = [sys.executable, "-m", "core", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding}, capture_output=True)


def test_training_a_full_size_model_without_a_gpu_names_what_to_install(small_sd15, monkeypatch):
    base = load_base(small_sd15)

    def told(device=CPU):
        return list(hints(base, TrainConfig(), adapted=False, device=device))

    assert not told()
    monkeypatch.setattr("core.models.base.LARGE", 1)
    base = load_base(small_sd15)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "processor, which takes hours or days: this torch only supports the CPU" in told()[0]
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "check the GPU and its driver" in told()[0]
    monkeypatch.setattr("core.device.best_device", lambda: torch.device("cuda"))  # the processor was chosen
    assert not told()
    assert not told(torch.device("cuda"))


@on_linux
def test_a_lora_is_edited_and_saved_over_its_own_file(windows, tmp_path):
    path = tmp_path / "face.safetensors"
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(4, 320), f"{name}.lora_up.weight": torch.ones(320, 4)}
    save_safetensors(path, tensors)
    assert main(["metadata", str(path), "--title", "A face"]) == 0
    lora = LoraFile.read(path)
    lora.save(path)
    assert LoraFile.read(path).metadata["modelspec.title"] == "A face"


@on_linux
def test_a_run_that_was_stopped_goes_on_and_leaves_nothing_behind(windows, tmp_path, small_sd15):
    write_photos(tmp_path / "photos", count=3)
    config = TrainConfig(resolution=32, rank=2, steps=3, warmup_steps=0, check_photos=False)
    base, output = load_base(small_sd15), tmp_path / "face.safetensors"

    def stop(report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "photos", base, config, output=output, callbacks=Callbacks(on_step=stop))
    assert (tmp_path / "face.state.safetensors").exists()
    train(tmp_path / "photos", base, config, output=output, resume=True)
    assert {path.name for path in tmp_path.iterdir()} - {".face.safetensors.lock"} == {"photos", "face.safetensors"}


@on_linux
def test_a_file_that_another_program_has_open_for_a_moment_is_replaced(windows, tmp_path, monkeypatch):
    path, waits = tmp_path / "page.html", []
    write_text(path, "old")
    with path.open():
        monkeypatch.setattr(files.time, "sleep", waits.append)
        with pytest.raises(BadFile, match="close the programs that have it open"):
            write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old" and os.listdir(tmp_path) == ["page.html"] and sum(waits) == 2
    scanner = path.open()
    monkeypatch.setattr(files.time, "sleep", lambda _: scanner.close())
    write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "new"


@on_linux
def test_a_path_that_is_too_long_for_windows_is_named_as_that(windows, tmp_path):
    def refuse(_) -> None:
        raise FileNotFoundError(2, "The system cannot find the path specified")

    path = tmp_path / ("a" * (LONGEST_ON_WINDOWS - len(str(tmp_path)) - 1))
    with pytest.raises(BadFile, match=r"cannot find the path specified$"):
        write_file(path, refuse)
    with pytest.raises(BadFile, match="has more than 246 characters: choose a shorter one, or enable long paths"):
        write_file(path.with_name(f"{path.name}a"), refuse)


def test_no_file_of_the_cache_needs_a_long_path():
    """What is longest there: a checkpoint's temporary file, below a user's folder of 40 characters."""
    folder = made_folder("runs", "0" * 64)
    path = folder / ".lora-step000100.safetensors.01234567.tmp"
    assert len("C:/Users/") + 20 + len("/AppData/Local/facelora/") + len(str(path.relative_to(folder.parents[1]))) < 240


@pytest.mark.parametrize("name", ["con", "NUL", "aux.anna", "COM1", "lpt9.txt"])
def test_device_names_of_windows_are_refused_as_folders_and_files(tmp_path, name):
    write_photos(tmp_path / "people" / name, count=1)
    (person,) = read_people(tmp_path / "people")
    assert "is not a valid folder name" in person.problem
    assert not files.RESERVED.fullmatch(f"{file_word(name)}.safetensors")


def test_a_drive_letter_is_not_taken_for_a_strength():
    assert split_strength(r"C:\loras\face.safetensors") == (r"C:\loras\face.safetensors", 1.0)
    assert split_strength(r"C:\loras\face.safetensors:0.8") == (r"C:\loras\face.safetensors", 0.8)
    assert split_strength(r"\\server\share\face.safetensors:-1") == (r"\\server\share\face.safetensors", -1.0)


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_help_is_printed_on_a_console_of_any_encoding(encoding):
    for arguments in (["train", "--help-all"], ["studio", "--help"]):
        done = run(*arguments, encoding=encoding)
        assert done.returncode == 0, done.stderr.decode()


def test_a_progress_bar_is_drawn_in_characters_that_the_console_has(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with open(tmp_path / "console", "w", encoding="cp1252") as console:
        console.isatty = lambda: True  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr(sys, "stderr", console)
        with BarProgress() as bar:
            bar.phase("reading", 1, 2)
    assert "reading:  50%|" in (tmp_path / "console").read_text(encoding="cp1252")


class AsOnMps(TorchDispatchMode):
    """What an Apple GPU refuses: any tensor in float64 or in fp8."""

    MISSING = (torch.float64, torch.complex128, torch.float8_e4m3fn, torch.float8_e5m2)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.lift_fresh.default:  # of an array, which is on the CPU
            return result
        for one in result if isinstance(result, list | tuple) else (result,):
            if isinstance(one, torch.Tensor) and one.dtype in self.MISSING:
                raise TypeError(f"{function}: cannot convert a MPS tensor to {one.dtype}")
        return result


@pytest.mark.parametrize("method", ["lora", "dora", "oft"])
def test_training_and_drawing_need_no_dtype_that_apple_gpus_lack(tmp_path, small_sd15, method, monkeypatch):
    schedule = NoiseSchedule.scaled_linear()  # in float64 on the CPU, and float32 on the device
    monkeypatch.setattr(NoiseSchedule, "scaled_linear", lambda *_: schedule)
    write_photos(tmp_path / "photos", count=2)
    base = load_base(small_sd15)
    config = TrainConfig(
        method=method, resolution=32, rank=2, steps=1, warmup_steps=0, check_photos=False, save_precision="fp32"
    )
    train(tmp_path / "photos", base, config, output=tmp_path / "face.safetensors")
    lora = LoraFile.read(tmp_path / "face.safetensors")
    with AsOnMps():
        train(tmp_path / "photos", base, config, output=tmp_path / "again.safetensors")
        assert len(list(generate(base, [(lora, 1.0)], [PictureJob("sks person", 1, size=(32, 32), steps=2)]))) == 1
