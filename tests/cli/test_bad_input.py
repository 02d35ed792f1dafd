"""Bad input: each time exit code 1, one clear line on stderr, and nothing half-written."""

import json
import math
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from core.cli import main
from core.config import TrainConfig, config_from
from core.errors import BadConfig, BadFile
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.models import load_base
from core.storage.cache_folder import cache_folder
from core.storage.safetensors_file import save_safetensors
from core.training import train
from core.training.identity import settings_of_the_file, settings_of_the_steps
from tests.kills import child, where_forks_work
from tests.tooling import SMALL_SD15, held_elsewhere, write_checkpoint


@dataclass
class Desk:
    """What a user has on the table; a case spoils one thing."""

    folder: Path
    photos: Path
    base: Path
    output: Path
    options: list[str]

    def arguments(self) -> list[str]:
        paths = ["train", str(self.photos), "--base", str(self.base), "--output", str(self.output)]
        return [*paths, "--json", "--resolution", "32", "--steps", "1", "--no-check-photos", *self.options]

    def write(self, name: str, content: bytes | str) -> Path:
        path = self.folder / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path


@pytest.fixture
def desk(tmp_path, small_sd15, photo_folder) -> Desk:
    (tmp_path / "results").mkdir()
    return Desk(tmp_path, photo_folder, small_sd15, tmp_path / "results" / "face.safetensors", ["--rank", "2"])


def assert_refused(desk: Desk, capsys, pattern: str) -> None:
    code = main(desk.arguments())
    errors = capsys.readouterr().err
    assert code == 1
    assert re.fullmatch(rf"facelora: .*{pattern}.*\n", errors), errors
    assert list((desk.folder / "results").iterdir()) == []


def empty_folder(desk: Desk) -> None:
    desk.photos = desk.folder / "empty"
    desk.photos.mkdir()


def with_bad_photo(desk: Desk) -> None:
    desk.photos = Path(shutil.copytree(desk.photos, desk.folder / "some"))
    (desk.photos / "broken.jpg").write_bytes(b"no picture")


def bad_photo_and_strict(desk: Desk) -> None:
    with_bad_photo(desk)
    desk.options += ["--strict"]


def base_of(name: str, content: Callable[[Desk], bytes]) -> Callable[[Desk], None]:
    def spoil(desk: Desk) -> None:
        desk.base = desk.write(name, content(desk))

    return spoil


def missing_base(desk: Desk) -> None:
    desk.base = desk.folder / "nowhere.safetensors"


def tensors_as_base(*names: str) -> Callable[[Desk], None]:
    def spoil(desk: Desk) -> None:
        desk.base = desk.folder / "strange.safetensors"
        save_safetensors(desk.base, {name: torch.zeros(4, 4) for name in names})

    return spoil


def incomplete_base(desk: Desk) -> None:
    desk.base = write_checkpoint(
        desk.folder / "part.safetensors", SMALL_SD15, without="middle_block.0.in_layers.2.weight"
    )


def lora_file(desk: Desk, family: str = "sd15", rank: int = 2) -> Path:
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    module = LoraModule(torch.zeros(rank, 32), torch.zeros(32, rank), float(rank))
    metadata = {"ss_base_model_version": {"sd15": "sd_v1", "sdxl": "sdxl_base_v1-0"}[family]}
    target = desk.folder / "lora.safetensors"
    LoraFile.from_modules(family, {("denoiser", path): module}, metadata).save(target)
    return target


def lora_as_base(desk: Desk) -> None:
    desk.base = lora_file(desk)


def continue_from(make: Callable[[Desk], Path]) -> Callable[[Desk], None]:
    def spoil(desk: Desk) -> None:
        desk.options += ["--continue-from", str(make(desk))]

    return spoil


def options(*values: str) -> Callable[[Desk], None]:
    def spoil(desk: Desk) -> None:
        desk.options += values

    return spoil


def toml(text: str) -> Callable[[Desk], None]:
    def spoil(desk: Desk) -> None:
        desk.options += ["--config", str(desk.write("settings.toml", text))]

    return spoil


def class_photos_twice(desk: Desk) -> None:
    desk.options += ["--class-images", "2", "--class-photos", str(desk.photos)]


CASES: dict[str, tuple[Callable[[Desk], None], str]] = {
    "no photos": (empty_folder, "empty"),
    "a bad photo, strict": (bad_photo_and_strict, r"broken\.jpg"),
    "base missing": (missing_base, r"nowhere\.safetensors: cannot be read: No such file"),
    "base empty": (base_of("base.safetensors", lambda desk: b""), r"base\.safetensors: the file is empty"),
    "base truncated": (base_of("base.safetensors", lambda desk: desk.base.read_bytes()[:-100]), "truncated"),
    "base a pickle": (base_of("base.ckpt", lambda desk: b"\x80\x02}q\x00X\x05\x00\x00\x00stateq\x01."), "Python pickle"),
    "Wan": (tensors_as_base("blocks.0.self_attn.q.weight"), "this is Wan, which is not supported"),
    "a UNet alone": (tensors_as_base("unet.down_blocks.0.weight"), "Use the whole diffusers folder instead"),
    "base incomplete": (incomplete_base, r"part\.safetensors: the denoiser lacks 1 tensor, e\.g\. mid_block"),
    "LoRA as base": (lora_as_base, r"lora\.safetensors: this is a LoRA, not a base model"),
    "continue: other family": (continue_from(lambda desk: lora_file(desk, "sdxl")), "it is for sdxl, but the base model is"),
    "continue: other modules": (continue_from(lora_file), "adapts 1 module, these settings"),
    "continue: a checkpoint": (continue_from(lambda desk: desk.base), r"small\.safetensors: not a LoRA: no adapter"),
    "rank too large": (options("--rank", "999"), r"rank 999 is larger than .* allows\. Use at most 32"),
    "class images twice": (class_photos_twice, "class_images and class_photos are both given"),
    "two weightings": (options("--debiased", "--min-snr-gamma", "3"), "set only one of them"),
    "timesteps crossed": (options("--timestep-min", "800", "--timestep-max", "200"), "800 is above timestep_max = 200"),
    "all warm-up": (options("--warmup-steps", "5"), "must be less than steps = 1"),
    "prodigy's rate": (options("--optimizer", "prodigy", "--learning-rate", "1e-4"), "finds the rate automatically; leave it"),
    "prodigy's groups": (
        options("--optimizer", "prodigy", "--learning-rate", "1", "--text-encoder-lr", "0.5"), "one rate for everything"
    ),
    "samples never": (options("--thumbnail"), "require samples: set sample_every"),
    "no sample": (options("--thumbnail", "--sample-every", "9", "--steps", "8"), "draws no sample in 8 steps"),
    "resolution too low": (options("--resolution", "12"), "resolution = 12: must be between 16 and 8192"),
    "bad pattern": (options("--rank-pattern", "(a+)+$=4"), r"rank_pattern: '\(a\+\)\+\$' is not a valid pattern: use a"),
    "no such device": (options("--device", "toaster"), "device toaster: .*; available: .*cpu"),
    "device without a module": (options("--device", "privateuseone"), "device privateuseone: "),
    "device without numbers": (options("--device", "meta"), "device meta: "),
    "unknown setting": (toml("learning_rat = 1"), r"toml: unknown setting 'learning_rat'; did you mean learning_rate"),
    "setting twice": (toml("min-snr-gamma = 1\nmin_snr_gamma = 2"), r"toml: min_snr_gamma is set twice, also as min-snr"),
    "wrong type": (toml('seed = "many"'), r"settings\.toml: seed = 'many': expected int"),
    "wrong choice": (toml('targets = "everything"'), "choose one of attention, transformer, transformer.conv"),
    "no TOML": (toml("steps = = 3"), r"settings\.toml: not a TOML file"),
    "large TOML": (toml("#" * 2**21), r"settings\.toml: the file is larger than 1 MiB, the maximum"),
    "no config": (options("--config", "nowhere.toml"), r"nowhere\.toml: cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_line(desk, capsys, case):
    spoil, pattern = CASES[case]
    spoil(desk)
    assert_refused(desk, capsys, pattern)


def test_sdxl_has_no_clip_skip(desk, capsys, small_sdxl):
    desk.base = small_sdxl
    desk.options += ["--clip-skip", "2"]
    assert_refused(desk, capsys, "clip_skip = 2: Stable Diffusion XL does not let you choose the layer")


def test_a_bad_photo_among_good_ones_is_named_and_left_out(desk, capsys):
    with_bad_photo(desk)
    assert main(desk.arguments()) == 0
    captured = capsys.readouterr()
    assert "broken.jpg" in captured.out + captured.err
    assert desk.output.exists()


@pytest.mark.parametrize("option", ["--trigger", "--class-word", "--embedding-words", "--sample-prompt"])
def test_words_that_are_no_unicode_text_are_wrong_usage(desk, capsys, option):
    with pytest.raises(SystemExit) as exit_:
        main([*desk.arguments(), option, os.fsdecode(b"sk\xff")])
    assert exit_.value.code == 2
    assert r"'sk\udcff' is not valid UTF-8" in capsys.readouterr().err


def test_files_may_have_names_that_are_no_unicode_text(desk):
    name = os.fsdecode(b"an\xff")
    desk.output = desk.output.with_name(f"{name}.safetensors")
    desk.base = Path(shutil.copy(desk.base, desk.folder / f"{name}.safetensors"))
    assert main(desk.arguments()) == 0
    metadata = LoraFile.read(desk.output).metadata
    assert (metadata["ss_output_name"], metadata["ss_sd_model_name"]) == ("an?", "an?.safetensors")


def test_a_script_does_not_write_over_the_base_model(desk):
    base = Path(shutil.copy(desk.base, desk.folder / "base.safetensors"))
    with pytest.raises(BadFile, match="is a file of the base model, which the LoRA would replace"):
        train(desk.photos, load_base(base), config_from({"steps": 1}), output=base)
    assert base.read_bytes() == desk.base.read_bytes()


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Within it no file can be written that has more bytes: as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_leaves_what_was_there(desk, capsys):
    assert main(desk.arguments()) == 0  # photos and captions are in the cache now
    before = desk.output.read_bytes()
    capsys.readouterr()
    with files_limited_to(len(before) // 2):
        assert main([*desk.arguments(), "--restart"]) == 1
    assert capsys.readouterr().err == f"facelora: {desk.output}: cannot be written: File too large\n"
    assert desk.output.read_bytes() == before
    assert os.listdir(desk.folder / "results") == [desk.output.name]


def test_when_the_lora_cannot_be_saved_the_state_is_still_there(desk, capsys, monkeypatch):
    """The run is not lost: it once deleted its state before the LoRA was written."""

    def no_room(self, path, dtype=None):
        raise BadFile(f"{path}: cannot be written: No space left on device")

    desk.options += ["--steps", "3", "--state-interval", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(LoraFile, "save", no_room)
        assert main(desk.arguments()) == 1
    assert [path.name for path in (desk.folder / "results").iterdir()] == ["face.state.safetensors"]
    assert main([*desk.arguments(), "--resume"]) == 0
    assert [path.name for path in (desk.folder / "results").iterdir()] == ["face.safetensors"]


@where_forks_work
def test_a_restart_killed_before_its_first_state_can_be_resumed(desk, capsys, monkeypatch):
    monkeypatch.setenv("FACELORA_CACHE", str(desk.folder / "cache"))
    assert main(desk.arguments()) == 0
    before = desk.output.read_bytes()
    changed = [*desk.arguments(), "--seed", "5", "--steps", "3"]
    desk.output.with_name("face.state.safetensors").write_bytes(b"of another run")

    def restarted() -> int:
        def killed(source: Path, target: Path) -> None:
            if target.name == "face.state.safetensors":
                os.kill(os.getpid(), signal.SIGKILL)
            rename(source, target)

        rename, os.replace = os.replace, killed
        return main([*changed, "--state-interval", "0", "--restart"])

    assert child(restarted) == -signal.SIGKILL and desk.output.read_bytes() == before
    assert main([*changed, "--seed", "6", "--resume"]) == 1 and "already exists" in capsys.readouterr().err
    assert main([*changed, "--resume"]) == 0 and desk.output.read_bytes() != before
    assert os.listdir(desk.output.parent) == [desk.output.name] and not list((cache_folder() / "restarts").iterdir())


def test_a_restart_on_a_full_disk_can_be_resumed(desk):
    assert main(desk.arguments()) == 0
    before, changed = desk.output.read_bytes(), [*desk.arguments(), "--seed", "5"]
    with files_limited_to(len(before) // 2):
        assert [main([*changed, option]) for option in ("--restart", "--resume")] == [1, 1]
    assert desk.output.read_bytes() == before
    assert main([*changed, "--resume"]) == 0 and desk.output.read_bytes() != before


def test_a_new_run_replaces_the_state_of_another_only_when_told(desk, capsys):
    state = desk.output.with_name("face.state.safetensors")
    state.write_bytes(b"hours of work")
    assert main(desk.arguments()) == 1
    assert capsys.readouterr().err == (
        f"facelora: {state}: the state of an unfinished run, which a new run would replace. Continue it with resume, "
        "start over with restart, or choose another output\n"
    )
    assert [path.name for path in (desk.folder / "results").iterdir()] == [state.name]
    assert state.read_bytes() == b"hours of work"
    assert main([*desk.arguments(), "--restart"]) == 0
    assert [path.name for path in (desk.folder / "results").iterdir()] == [desk.output.name]


def leave_half_written(desk, *names: str) -> None:
    for name in (*names, ".face.safetensors.lock"):
        path = desk.output.parent / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")


def test_what_a_killed_run_left_half_written_is_cleared_away(desk):
    leave_half_written(
        desk, ".face.safetensors.1a2b3c4d.tmp", ".face.state.safetensors.1a2b3c4d.tmp",
        ".face-step000002.safetensors.1a2b3c4d.tmp", ".face-embedding.safetensors.1a2b3c4d.tmp",
        "face-samples/.step000002-0.png.1a2b3c4d.tmp", ".face-2.safetensors.1a2b3c4d.tmp",
    )  # fmt: skip
    assert main(desk.arguments()) == 0
    left = sorted(path.name for path in (desk.folder / "results").rglob("*") if path.is_file())
    assert left == [".face-2.safetensors.1a2b3c4d.tmp", desk.output.name]  # the first may be of a run that lives


def test_a_second_run_on_one_output_is_refused(desk, capsys):
    leave_half_written(desk, ".face.state.safetensors.1a2b3c4d.tmp")
    with held_elsewhere(desk.output):
        assert main([*desk.arguments(), "--restart"]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and "face.safetensors: another process is writing this file (lock: " in errors
    assert os.listdir(desk.folder / "results") == [".face.state.safetensors.1a2b3c4d.tmp"]


@pytest.mark.parametrize(
    ("name", "options", "called"),
    [
        ("face-step000001", ["--steps", "2", "--save-every", "1"], "an intermediate LoRA of save_every"),
        ("face-embedding", ["--method", "pivotal"], "the embedding that the method pivotal writes"),
    ],
)
def test_a_file_beside_the_output_replaces_only_its_own_runs(desk, capsys, name, options, called):
    beside, training = desk.output.with_name(f"{name}.safetensors"), [*desk.arguments(), *options]
    assert main(training) == 0
    before = beside.read_bytes()
    assert main([*training, "--seed", "2", "--restart"]) == 0
    assert beside.read_bytes() != before
    lora = LoraFile.read(beside)
    lora.with_metadata(lora.metadata | {"ss_output_name": name}).save(beside)
    before = beside.read_bytes()
    capsys.readouterr()
    assert main([*training, "--restart"]) == 1
    assert f"{name}.safetensors: has the name of {called}" in capsys.readouterr().err
    assert beside.read_bytes() == before


def test_settings_that_begin_with_a_byte_order_mark_are_read(desk):
    toml("\ufeffsteps = 2\nrank = 2\n")(desk)
    desk.options += ["--rank", "3"]
    assert main(desk.arguments()) == 0
    assert LoraFile.read(desk.output).metadata["ss_network_dim"] == "3"


def test_small_photos_are_enlarged_when_told(desk):
    desk.photos = desk.folder / "small"
    desk.photos.mkdir()
    Image.new("RGB", (23, 28), "teal").save(desk.photos / "1.png")
    assert main([*desk.arguments(), "--upscale"]) == 0
    (bucket,) = json.loads(LoraFile.read(desk.output).metadata["ss_bucket_info"])["buckets"].values()
    assert math.prod(bucket["resolution"]) > 23 * 28


def test_settings_that_make_no_sense_are_refused_by_name():
    for settings, message in [
        ({"learning_rate": float("nan")}, "learning_rate = nan: must be finite"),
        ({"steps": True}, "steps = True: expected int"),
        ({"trigger_word": " "}, "trigger_word and class_word must not be empty"),
        ({"sample_every": 5, "sample_prompts": [1]}, "sample_prompts = 1: expected str"),
        ({"rank_pattern": {"attn": "4"}}, "rank_pattern: attn = '4': expected int"),
    ]:
        with pytest.raises(BadConfig, match=re.escape(message)):
            config_from(settings)
    assert config_from({"learning-rate": 1}) == TrainConfig(learning_rate=1)


def test_a_file_does_not_depend_on_what_is_only_shown():
    plain, shown = TrainConfig(), TrainConfig(sample_every=10, sample_prompts=("a",), gradient_checkpointing="on")
    assert settings_of_the_file(plain) == settings_of_the_file(shown)
    measured = [TrainConfig(sample_every=every, hold_out=2) for every in (10, 20)]
    assert settings_of_the_file(measured[0]) != settings_of_the_file(measured[1])


def test_samples_may_change_on_the_way_unless_they_are_measured():
    few, many = TrainConfig(sample_every=10), TrainConfig(sample_every=10, sample_steps=30, sample_guidance=3.0)
    assert settings_of_the_steps(few, measured=False) == settings_of_the_steps(many, measured=False)
    assert settings_of_the_steps(few, measured=True) != settings_of_the_steps(many, measured=True)


def test_a_base_is_named_by_its_file_and_never_by_its_folder(small_sd15):
    assert load_base(small_sd15).name == "small.safetensors"
