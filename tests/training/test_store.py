"""What is trained already is found again: keys, files and their names, runs that are cancelled and go on."""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import core
from core.cli import main
from core.config import TrainConfig
from core.demo import BASE_FILE
from core.errors import BadConfig, BadFile, InUse, TrainingDiverged
from core.faces import load_faces
from core.lora.file import KEY, LoraFile
from core.lora.stated import AGREED, SUBJECT_KEY
from core.models import Base, load_base
from core.photos import Photo, read_photos
from core.progress import OnWarning, silent
from core.storage.cache_folder import cache_folder, made_folder
from core.storage.safetensors_file import SafetensorsFile
from core.training import store
from core.training.callbacks import NO_CALLBACKS, Callbacks, StepReport, StopAndKeep
from core.training.identity import settings_of_the_file
from core.training.job import TrainingJob
from core.training.likeness import LIKENESS_KEY
from core.training.methods import peak_rate
from core.training.store import LoraFolders, find_or_train
from core.training.trained_file import Curve, RunFolder, TrainedFile, drawn_sample, files_of, has_key
from tests.tooling import held_elsewhere, save_mean_colour, write_photos

CONFIG = TrainConfig(steps=2, rank=2, learning_rate=0.01, resolution=32, batch_size=1, check_photos=False)
LONG = replace(CONFIG, steps=6)


@dataclass(frozen=True)
class Wanted:
    """A job that can be put on any base model, and the name of its file."""

    name: str
    config: TrainConfig
    photos: Sequence[Photo]
    class_photos: Sequence[Photo] = ()
    start: LoraFile | None = None
    agreed: bool = False

    def on(self, base: Base, on_warning: OnWarning = silent) -> TrainingJob:
        return TrainingJob.of(
            self.photos, base, self.config, class_photos=self.class_photos, start=self.start, on_warning=on_warning
        )

    def key(self, base: Base) -> str:
        return self.on(base).key


def made_of(
    job: Wanted,
    base: Base,
    folders: Sequence[Path],
    own_name: bool = False,
    on_history: Callable[[Curve], None] = silent,
    on_point: Callable[[StepReport], None] = silent,
    callbacks: Callbacks = NO_CALLBACKS,
) -> TrainedFile:
    place = LoraFolders(job.name, folders, own_name, job.agreed)
    wanted = job.on(base, callbacks.on_warning)
    return find_or_train(wanted, place, on_history=on_history, on_point=on_point, callbacks=callbacks)


def forget_runs() -> None:
    shutil.rmtree(cache_folder() / "runs", ignore_errors=True)


@pytest.fixture(autouse=True)
def no_runs():
    """No test finds a run of another one; what is encoded is encoded once."""
    forget_runs()


@pytest.fixture(scope="module")
def photos(photo_folder) -> list[Photo]:
    """Four of one person."""
    return read_photos(photo_folder)


@pytest.fixture
def job(photos) -> Wanted:
    return Wanted("anna", CONFIG, photos)


@pytest.fixture
def long_job(photos) -> Wanted:
    return Wanted("anna", LONG, photos)


@pytest.fixture
def loras(tmp_path) -> Path:
    return tmp_path / "loras"


def trained(job: Wanted, base: Base, *folders: Path) -> TrainedFile:
    """The result, of which at least one step was made."""
    steps: list[int] = []
    made = made_of(job, base, folders, callbacks=Callbacks(on_step=lambda report: steps.append(report.step)))
    assert steps and not made.found
    return made


def found(job: Wanted, base: Base, *folders: Path) -> TrainedFile:
    """The result, for which nothing was trained, encoded or looked at."""

    def nothing(*_: object) -> None:
        raise AssertionError("it was trained")

    made = made_of(
        job, base, folders, on_point=nothing,
        callbacks=Callbacks(on_step=nothing, on_phase=nothing, on_sample=nothing, check_cancelled=nothing),
    )  # fmt: skip
    assert made.found
    return made


def tensors(path: Path) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in LoraFile.read(path).tensors.items()}


def same(one: Path | dict[str, Tensor], other: Path | dict[str, Tensor]) -> bool:
    first, second = (tensors(item) if isinstance(item, Path) else item for item in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_script_trains_nothing_twice(job, base, tmp_path):
    output, steps = tmp_path / "anna.safetensors", []

    def again(config: TrainConfig = CONFIG, **options: Any) -> tuple[LoraFile, int]:
        """The LoRA, and the number of steps that it took."""
        steps.clear()
        counting = Callbacks(on_step=lambda report: steps.append(report.step))
        lora = core.train(job.photos, base, config, output=output, callbacks=counting, **options)
        assert isinstance(lora, LoraFile)
        return lora, len(steps)

    first, made = again()
    tensors_hash = first.model_hash  # Its file will be replaced.
    assert made == 2 and again()[1] == 0 and again(restart=True)[1] == 2
    named, made = again(metadata={"ss_training_comment": "Anna"})
    assert made == 0 and named.metadata["ss_training_comment"] == "Anna"
    assert named.tensors.keys() == first.tensors.keys() and named.model_hash == tensors_hash
    assert again(replace(CONFIG, seed=2))[1] == 2  # made in another way, so it is replaced
    assert again(seed=2)[1] == 0 and again(steps=3)[1] == 3  # settings as keywords
    with pytest.raises(BadConfig, match="unknown setting 'step'; did you mean steps"):
        again(step=3)


def test_callbacks_that_are_a_function_are_refused(photos, base):
    with pytest.raises(BadConfig, match=r"callbacks is a function: expected Callbacks, such as Callbacks\(on_step="):
        core.train(photos, base, CONFIG, callbacks=lambda report: None)  # pyright: ignore


def test_the_command_line_trains_nothing_twice(small_sd15, tmp_path, capsys):
    folder, output = write_photos(tmp_path / "photos", count=5), tmp_path / "anna.safetensors"
    command = ["train", str(folder), "--base", str(small_sd15), "--output", str(output), "--recipe", "none"]
    command += ["--rank", "2", "--resolution", "32", "--batch-size", "1"]

    def run(*options: str) -> tuple[bool, int]:
        """Whether the LoRA was found, and the last step that was made."""
        assert main([*command, "--json", *options]) == 0
        *reports, result = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return result["found"], max((report["step"] for report in reports if "step" in report), default=0)

    assert run("--steps", "1") == (False, 1)
    before = output.read_bytes()
    for options in ((), ("--face-network", "sface")):  # the default by its name
        assert run("--steps", "1", *options) == (True, 0) and output.read_bytes() == before
    assert run("--steps", "1", "--restart") == (False, 1)
    again = output.read_bytes()
    for options in ((), ("--resume",)):  # there is no state to go on from
        assert main([*command, "--steps", "2", *options]) == 1 and "already exists" in capsys.readouterr().err
    assert output.read_bytes() == again
    assert run("--steps", "2", "--restart") == (False, 2)
    next(folder.iterdir()).unlink()
    assert run("--steps", "2", "--no-check-photos", "--restart") == (False, 2)


def test_the_same_job_again_is_found_and_nothing_is_trained(job, base, loras):
    first = trained(job, base, loras)
    before = first.path.read_bytes(), first.path.stat().st_mtime_ns
    again = found(job, base, loras)
    assert again.path == first.path == loras / "anna.safetensors"
    assert (again.path.read_bytes(), again.path.stat().st_mtime_ns) == before
    assert again.run.history() == first.run.history() and len(first.run.history()) == 2
    assert files(loras) == ["anna.safetensors"]


def test_the_file_says_what_it_was_made_from_and_is_called(job, base, loras):
    lora = LoraFile.read(trained(replace(job, name="people/anna"), base, loras).path)
    assert lora.name == str(loras / "people" / "anna.safetensors")
    assert lora.metadata[KEY] == job.key(base)
    assert lora.metadata["ss_output_name"] == "anna"
    assert lora.metadata["sshs_model_hash"] == lora.model_hash
    assert lora.dtype == torch.float16


def test_the_model_is_loaded_between_the_last_caption_and_the_first_step(job, base, loras):
    news: list[str] = []
    callbacks = Callbacks(
        on_step=lambda report: news.append("step"),
        on_phase=lambda name, done, total: news.append(f"{name} {done}/{total}"),
    )
    made_of(job, base, [loras], callbacks=callbacks)
    last = max(index for index, one in enumerate(news) if one.startswith("encoding"))
    done, total = news[last].removeprefix("encoding ").split("/")
    assert done == total and news[last + 1 : last + 3] == ["loading the model 0/0", "step"]


def test_the_base_model_is_read_first_and_that_can_be_cancelled(job, small_sd15, loras):
    base, news = load_base(small_sd15), []

    def cancel(name: str, done: int, total: int) -> None:
        news.append((name, total))
        raise KeyboardInterrupt

    for train in (partial(made_of, job, base, [loras]), partial(core.train, job.photos, base, job.config)):
        with pytest.raises(KeyboardInterrupt):
            train(callbacks=Callbacks(on_phase=cancel))
    assert news == [("reading the model", 100)] * 2


def test_nothing_but_the_loss_and_the_hash_is_kept_of_a_finished_run(job, base, loras):
    made = trained(job, base, loras)
    assert made.run.path == cache_folder() / "runs" / job.key(base)
    assert files(made.run.path) == ["history.json", "made.txt"]


@pytest.mark.parametrize("place", ["loras/bea.safetensors", "loras/a/b/anna of 2026.safetensors", "others/x.sft"])
def test_a_file_that_was_renamed_or_moved_is_found_by_its_tensors(job, base, tmp_path, place):
    loras, others = tmp_path / "loras", tmp_path / "others"
    first = trained(job, base, loras, others).path
    moved = tmp_path / place
    moved.parent.mkdir(parents=True, exist_ok=True)
    first.rename(moved)
    again = found(job, base, loras, others).path
    assert again == first and again.read_bytes() == moved.read_bytes()


def test_behind_a_link_to_a_folder_too(job, base, tmp_path, loras):
    first = trained(job, base, loras).path
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first.rename(elsewhere / "x.safetensors")
    (loras / "link").symlink_to(elsewhere)
    assert found(job, base, loras).path == first


def test_under_another_name_it_is_a_copy_and_both_are_found_under_their_own(job, base, loras):
    first = trained(job, base, loras).path
    other = replace(job, name="berta")
    copy = found(other, base, loras).path
    assert copy == loras / "berta.safetensors" and same(copy, first)
    assert LoraFile.read(copy).metadata["ss_output_name"] == "berta"
    assert LoraFile.read(first).metadata["ss_output_name"] == "anna"
    assert [found(item, base, loras).path for item in (job, other)] == [first, copy]
    copy.unlink()
    assert found(job, base, loras).path == first
    assert files(loras) == ["anna.safetensors"]


def test_a_deleted_file_is_made_again(job, base, loras):
    first = trained(job, base, loras)
    before, history = tensors(first.path), first.run.history()
    first.path.unlink()
    again = trained(job, base, loras)
    assert again.path == first.path and same(again.path, before)
    assert again.run.history() == history, "not twice"
    found(job, base, loras)


@pytest.mark.parametrize("changes", [{"seed": 2}, {"rank": 3}])
def test_another_setting_is_a_second_file_and_leaves_the_first_alone(job, base, loras, changes):
    first = trained(job, base, loras).path
    before = first.read_bytes()
    other = replace(job, config=replace(CONFIG, **changes))
    second = trained(other, base, loras).path
    assert second == loras / "anna-2.safetensors" and not same(first, second)
    assert LoraFile.read(second).metadata["ss_output_name"] == "anna-2"
    assert first.read_bytes() == before
    assert [found(item, base, loras).path for item in (job, other)] == [first, second]


def put_somebody_elses(kind: str, path: Path) -> None:
    path.parent.mkdir()
    if kind == "a folder":
        path.mkdir()
    elif kind == "a LoRA":
        a_lora(1.0).save(path)
    else:
        path.write_bytes({"nothing": b"", "a text": b"not a LoRA at all"}[kind])


@pytest.mark.parametrize("kind", ["a LoRA", "nothing", "a text", "a folder"])
def test_what_somebody_else_has_under_that_name_is_never_written_over(job, base, loras, kind):
    path = loras / "anna.safetensors"
    put_somebody_elses(kind, path)
    before = path.read_bytes() if path.is_file() else None
    assert trained(job, base, loras).path == loras / "anna-2.safetensors"
    assert (path.read_bytes() if path.is_file() else None) == before
    assert found(job, base, loras).path == loras / "anna-2.safetensors"


def test_a_file_whose_header_names_another_dtype_is_not_taken(job, base, loras):
    """The numbers are read from the same bytes, which are all that the hash knows of."""
    made = trained(job, base, loras)
    content = made.path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header[max(header)]["dtype"] = "BF16"
    text = json.dumps(header).encode()
    made.path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    assert LoraFile.read(made.path).model_hash == LoraFile.read(made.path).metadata["sshs_model_hash"]
    assert not has_key(made.path, job.key(base))


def test_a_damaged_file_does_not_stop_the_search(job, base, loras):
    first = trained(job, base, loras).path
    data = first.read_bytes()
    first.rename(loras / "moved.safetensors")
    (loras / "a.safetensors").write_bytes(b"no header")
    (loras / "b.safetensors").write_bytes(data[: len(data) // 2])
    (loras / "c.safetensors").mkdir()
    (loras / "d.safetensors").symlink_to(loras / "gone.safetensors")
    (loras / "e.txt").write_text("of no interest")
    again = found(job, base, loras, loras / "a folder that is not there").path
    assert again == first and again.read_bytes() == data


def test_a_file_with_a_bit_that_has_flipped_is_neither_taken_nor_copied(job, base, loras):
    path = trained(job, base, loras).path
    before, data = {key: value.clone() for key, value in tensors(path).items()}, bytearray(path.read_bytes())
    data[-2] ^= 1
    path.write_bytes(data)
    again = trained(job, base, loras).path
    assert again == loras / "anna-2.safetensors" and same(again, before)
    assert path.read_bytes() == data


def test_where_nothing_can_be_written_the_error_names_the_folder_and_nothing_is_trained(job, base, tmp_path):
    (tmp_path / "loras").write_text("a file")
    with pytest.raises(BadFile, match=r"loras.*: cannot be written"):
        trained(job, base, tmp_path / "loras")
    assert not state_of(job, base).with_name("lora.safetensors").exists()


@pytest.mark.parametrize("name", ["x" * 300, "ü" * 130], ids=["letters", "bytes"])
def test_a_name_that_is_too_long_for_a_file_is_refused(job, base, loras, name):
    loras.mkdir()
    with pytest.raises(BadFile, match="cannot be written there: File name too long"):
        made_of(replace(job, name=name), base, [loras])


def test_what_could_not_be_written_in_the_end_is_not_trained_again(job, base, loras):
    def take_the_folder_away(report: StepReport) -> None:
        if report.step == report.steps:
            loras.rename(loras.with_name("unplugged"))

    saving = replace(job, config=replace(CONFIG, save_every=1))
    with pytest.raises(BadFile, match=r"loras.*: cannot be written"):
        made_of(saving, base, [loras], callbacks=Callbacks(on_step=take_the_folder_away))
    made = found(saving, base, loras)
    assert files(loras) == ["anna-step000001.safetensors", "anna.safetensors"]
    assert files(made.run.path) == ["history.json", "made.txt"]
    before = tensors(made.path)
    made.path.unlink()
    assert same(trained(saving, base, loras).path, before)


def test_a_file_whose_hash_a_tool_has_taken_out_is_found_by_its_key(job, base, loras):
    path = trained(job, base, loras).path
    file = SafetensorsFile.open(path)
    values = {name: file[name].clone() for name in file}
    save_file(values, path, {key: text for key, text in file.metadata.items() if key != "sshs_model_hash"})
    assert found(job, base, loras).path == path


# One's own name


def trained_under_its_own_name(job: Wanted, base: Base, loras: Path) -> list[int]:
    """The steps that were made for the LoRA, which is the job's and has its name."""
    steps: list[int] = []
    callbacks = Callbacks(on_step=lambda report: steps.append(report.step))
    made = made_of(job, base, [loras], own_name=True, callbacks=callbacks)
    assert made.path == loras / "anna.safetensors" and made.found == (not steps)
    lora = LoraFile.read(made.path)
    assert (lora.metadata[KEY], lora.metadata["ss_output_name"]) == (job.key(base), "anna")
    return steps


def test_under_its_own_name_the_one_before_is_set_aside_and_comes_back_untrained(job, base, loras):
    other = replace(job, config=replace(CONFIG, seed=2))
    assert trained_under_its_own_name(job, base, loras) == [1, 2]
    first = (loras / "anna.safetensors").read_bytes()
    assert trained_under_its_own_name(other, base, loras) == [1, 2]
    second = (loras / "anna.safetensors").read_bytes()
    for item, here, aside in ((job, first, second), (other, second, first)):
        forget_runs()  # as in a studio, where it goes with the person's end
        assert trained_under_its_own_name(item, base, loras) == []
        assert (loras / "anna.safetensors").read_bytes() == here
        assert [path.read_bytes() for path in (loras / "earlier").iterdir()] == [aside]


def test_what_is_set_aside_replaces_nothing_and_checkpoints_go_along(job, base, loras):
    (loras / "earlier").mkdir(parents=True)
    for name in ("anna", "earlier/anna", "anna-step000001", "anna-stepson"):
        (loras / f"{name}.safetensors").write_text(f"mine, {name}.safetensors")
    trained_under_its_own_name(replace(job, config=replace(CONFIG, save_every=1)), base, loras)
    assert files(loras) == [
        "anna-step000001.safetensors", "anna-stepson.safetensors", "anna.safetensors", "earlier/anna (2).safetensors",
        "earlier/anna-step000001.safetensors", "earlier/anna.safetensors",
    ]  # fmt: skip
    mine = {path.read_text() for path in (loras / "earlier").iterdir()}
    assert mine == {"mine, anna.safetensors", "mine, earlier/anna.safetensors", "mine, anna-step000001.safetensors"}
    assert LoraFile.read(loras / "anna-step000001.safetensors").metadata["ss_steps"] == "1"


def test_nothing_is_set_aside_before_the_new_one_is_trained(job, base, loras):
    trained_under_its_own_name(job, base, loras)

    def cancel(report: StepReport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_of(replace(job, config=LONG), base, [loras], own_name=True, callbacks=Callbacks(on_step=cancel))
    assert files(loras) == ["anna.safetensors"]
    assert trained_under_its_own_name(job, base, loras) == []


def test_where_only_its_key_is_gone_its_tensors_are_read_from_where_it_was_set_aside(job, base, loras):
    trained_under_its_own_name(job, base, loras)
    path = loras / "anna.safetensors"
    file = SafetensorsFile.open(path)
    values = {name: file[name].clone() for name in file}
    save_file(values, path, {key: text for key, text in file.metadata.items() if key != KEY})
    assert trained_under_its_own_name(job, base, loras) == []
    assert files(loras) == ["anna.safetensors", "earlier/anna.safetensors"] and same(path, values)


# What decides the key


def a_lora(value: float, name: str = "LoRA") -> LoraFile:
    key = "lora_unet_down_blocks_0_attentions_0_proj_in"
    shapes = {"lora_down": (1, 32, 1, 1), "lora_up": (32, 1, 1, 1)}
    values = {f"{key}.{side}.weight": torch.full(shape, value) for side, shape in shapes.items()}
    return LoraFile("sd15", {}, values, name)


def network_called(name: str) -> Any:
    return SimpleNamespace(name=name)


CHANGES: dict[str, Callable[[Wanted], Wanted]] = {
    "seed": lambda job: replace(job, config=replace(job.config, seed=2)),
    "steps": lambda job: replace(job, config=replace(job.config, steps=3)),
    "trigger word": lambda job: replace(job, config=replace(job.config, trigger_word="ohwx")),
    "precision of the file": lambda job: replace(job, config=replace(job.config, save_precision="fp32")),
    "thumbnail": lambda job: replace(job, config=replace(job.config, sample_every=1, thumbnail=True)),
    "more resolutions": lambda job: replace(job, config=replace(job.config, more_resolutions=(48,))),
    "fewer photos": lambda job: replace(job, photos=job.photos[1:]),
    "another photo": lambda job: replace(
        job, photos=[Photo.from_image(Image.new("RGB", (64, 64)), "x.png"), *job.photos[1:]]
    ),
    "order": lambda job: replace(job, photos=job.photos[::-1]),
    "caption": lambda job: replace(job, photos=[replace(job.photos[0], caption="sks"), *job.photos[1:]]),
    "repeats": lambda job: replace(job, photos=[replace(job.photos[0], repeats=2), *job.photos[1:]]),
    "a mask": lambda job: masked(job, 128),
    "another mask": lambda job: masked(job, 129),
    "class photos": lambda job: replace(job, class_photos=job.photos[:2]),
    "other class photos": lambda job: replace(job, class_photos=job.photos[2:]),
    "class photos as photos": lambda job: replace(job, photos=job.photos[:2], class_photos=job.photos[2:]),
    "samples on which likeness is measured": lambda job: measured(job, 1),
    "samples at other steps": lambda job: measured(job, 2),
    "a LoRA to go on from": lambda job: replace(job, start=a_lora(1.0)),
    "another LoRA to go on from": lambda job: replace(job, start=a_lora(2.0)),
}


def measured(job: Wanted, sample_every: int) -> Wanted:
    return replace(job, config=replace(job.config, sample_every=sample_every, hold_out=1))


def masked(job: Wanted, value: int) -> Wanted:
    mask = Image.new("L", job.photos[0].size, value)
    return replace(job, photos=[job.photos[0].with_mask(mask), *job.photos[1:]])


def test_a_network_from_a_file_counts_by_its_content(job, base, tmp_path):
    """Also one that is called as the default network is."""
    plain, keys = job.on(base), set()
    for number, name in enumerate(("sface", "model", "model")):
        file = tmp_path / str(number) / f"{name}.onnx"
        file.parent.mkdir()
        save_mean_colour(file)
        content = onnx.load(file)
        content.doc_string = str(number)
        onnx.save(content, file)
        keys.add(replace(plain, ready=replace(plain.ready, network=load_faces(file))).key)
    assert len(keys | {plain.key}) == 4


def test_networks_that_hold_out_or_judge_other_than_by_default_change_the_key(job, base):
    plain = job.on(base)
    ready = [replace(plain.ready, network=network_called(name)) for name in ("sface", "dlib", "aura")]
    jobs = [*(replace(plain, ready=one) for one in ready), replace(plain, judge=network_called("dlib"))]
    jobs += [replace(plain, held_out=job.photos[:2]), replace(plain, held_out=job.photos[:1])]
    keys = [one.key for one in jobs]
    assert keys[0] == plain.key and len(set(keys)) == len(keys)


def test_all_that_changes_the_file_changes_the_key(job, base):
    keys = {name: change(job).key(base) for name, change in CHANGES.items()} | {"none": job.key(base)}
    assert len(set(keys.values())) == len(keys), keys
    renamed = replace(job, start=a_lora(1.0, "another"))  # which counts by its tensors
    assert renamed.key(base) == keys["a LoRA to go on from"]


def test_what_only_saves_memory_leaves_the_key_unless_it_rounds_the_weights(job):
    rounded = settings_of_the_file(replace(job.config, eight_bit_products="on"))
    assert rounded != settings_of_the_file(job.config) == settings_of_the_file(replace(job.config, memory_limit=8.0))


def renamed_photos(job: Wanted) -> Wanted:
    return replace(job, photos=[replace(photo, name=f"{index}.jpg") for index, photo in enumerate(job.photos)])


SAME: dict[str, Callable[[Wanted], Wanted]] = {
    "name": lambda job: replace(job, name="berta"),
    "how often samples are drawn": lambda job: replace(job, config=replace(job.config, sample_every=1)),
    "which": lambda job: replace(job, config=replace(job.config, sample_every=2, sample_prompts=("a",), sample_steps=3)),
    "memory": lambda job: replace(job, config=replace(job.config, gradient_checkpointing="on", state_interval=0.0)),
    "the learning rate's own default": lambda job: replace(
        job, config=replace(job.config, learning_rate=peak_rate(job.config))
    ),
    "names of the photos": renamed_photos,
}  # fmt: skip


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_changes_nothing_in_the_file_leaves_the_key(job, base, change):
    assert change(job).key(base) == job.key(base)


def test_a_folder_of_photos_and_a_base_that_are_called_otherwise_are_the_same(
    job, base, photo_folder, small_sd15, tmp_path
):
    shutil.copytree(photo_folder, tmp_path / "copy")
    shutil.copy(small_sd15, tmp_path / "copy.safetensors")
    copy = replace(job, photos=read_photos(tmp_path / "copy"))
    assert copy.key(load_base(tmp_path / "copy.safetensors")) == job.key(base)


@pytest.mark.parametrize("part", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model."])
def test_one_bit_of_the_base_makes_another_key(job, base, small_sd15, tmp_path, part):
    file = SafetensorsFile.open(small_sd15)
    name = next(name for name in file if name.startswith(part) and name.endswith(".weight"))
    other = tmp_path / small_sd15.name
    data = bytearray(small_sd15.read_bytes())
    needle = file[name].flatten()[:64].contiguous().numpy().tobytes()
    data[data.index(needle)] ^= 1
    other.write_bytes(data)
    assert job.key(load_base(other)) != job.key(base)


# What is trained


def test_masks_class_photos_and_a_lora_to_go_on_from_are_trained_with(job, base, loras, tmp_path):
    plain = trained(job, base, loras).path
    others = read_photos(write_photos(tmp_path / "others", count=2, person=36))
    jobs = [
        replace(job, photos=[photo.with_mask(half_white(photo.size)) for photo in job.photos]),
        replace(job, class_photos=others),
        replace(job, start=LoraFile.read(plain)),
    ]
    paths = [trained(item, base, loras).path for item in jobs]
    assert files(loras) == [f"anna{end}.safetensors" for end in ("-2", "-3", "-4", "")]
    assert not any(same(path, plain) for path in paths)
    assert [found(item, base, loras).path for item in jobs] == paths


def half_white(size: tuple[int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


def test_checkpoints_on_the_way_are_files_beside_it(job, base, loras):
    loras.mkdir()
    (loras / "anna.safetensors").touch()
    made = trained(replace(job, config=replace(LONG, save_every=2)), base, loras)
    assert files(loras) == [
        "anna-2-step000002.safetensors", "anna-2-step000004.safetensors", "anna-2.safetensors", "anna.safetensors",
    ]  # fmt: skip
    steps = [LoraFile.read(path).metadata["ss_steps"] for path in sorted(loras.glob("anna-2*"))]
    assert steps == ["2", "4", "6"]
    assert files_of(made.run.path.name, None, [loras]) == sorted(loras.glob("anna-2*")), "by their keys"
    assert files(made.run.path) == ["history.json", "made.txt"]


@pytest.mark.parametrize("agreed", [True, False])
def test_the_files_of_a_person_who_has_agreed_state_it(job, base, loras, agreed):
    trained(replace(job, config=replace(CONFIG, save_every=1), agreed=agreed), base, loras)
    said = [LoraFile.read(path).metadata.get(SUBJECT_KEY) for path in loras.glob("anna*")]
    assert said == [AGREED if agreed else None] * 2


def test_checkpoints_write_over_no_file_of_others(job, base, loras):
    loras.mkdir()
    a_lora(1.0).save(loras / "anna-step000001.safetensors")
    before = (loras / "anna-step000001.safetensors").read_bytes()
    assert trained(replace(job, config=replace(CONFIG, save_every=1)), base, loras).path.stem == "anna-2"
    assert (loras / "anna-step000001.safetensors").read_bytes() == before
    checkpoint = loras / "anna-2-step000001.safetensors"
    assert LoraFile.read(checkpoint).metadata["ss_output_name"] == "anna-2"
    # It was written in the cache folder, whose files are their owner's alone.
    assert checkpoint.stat().st_mode == (loras / "anna-step000001.safetensors").stat().st_mode


def test_two_runs_at_once_neither_share_a_job_nor_write_to_one_file(job, base, loras):
    loras.mkdir()
    (loras / ".anna.safetensors.0123abcd.tmp").write_bytes(b"half")
    output = RunFolder(made_folder("runs", job.key(base))).files.output
    with held_elsewhere(output), pytest.raises(InUse, match=r"lora\.safetensors: another process is writing this file"):
        made_of(job, base, [loras])
    with held_elsewhere(loras / "anna.safetensors"):
        assert trained(job, base, loras).path.stem == "anna-2"
        assert ".anna.safetensors.0123abcd.tmp" in files(loras)
    assert trained(replace(job, config=replace(CONFIG, seed=2)), base, loras).path.stem == "anna"
    assert files(loras) == ["anna-2.safetensors", "anna.safetensors"]


@pytest.mark.parametrize("content", ["[[1, 2", "[1, 2]", "[[Infinity, 2]]", "null", "\x80"])
def test_a_history_that_is_damaged_is_begun_anew(tmp_path, content):
    (tmp_path / "history.json").write_bytes(content.encode("latin-1"))
    assert RunFolder(tmp_path).history() == []


@pytest.mark.parametrize("method", ["dreambooth", "textual-inversion"])
def test_what_makes_no_lora_is_refused(job, base, loras, method):
    with pytest.raises(BadConfig, match=f"method = '{method}' doesn't make a LoRA"):
        trained(replace(job, config=replace(CONFIG, method=method)), base, loras)


def test_a_word_with_vectors_of_its_own_is_in_the_file_alone(job, base, loras):
    made = trained(replace(job, config=replace(CONFIG, method="pivotal")), base, loras)
    assert LoraFile.read(made.path).embedding_keys
    assert files(loras) == ["anna.safetensors"]
    assert files(made.run.path) == ["history.json", "made.txt"]


class Cancel(BaseException):
    """As ComfyUI cancels: with what is no Exception."""


def cancelled_at(step: int, job: Wanted, base: Base, *folders: Path) -> list[int]:
    """The steps that were made until it was cancelled."""
    steps: list[int] = []

    def on_step(report: StepReport) -> None:
        steps.append(report.step)
        if report.step == step:
            raise Cancel

    with pytest.raises(Cancel):
        made_of(job, base, folders, callbacks=Callbacks(on_step=on_step))
    return steps


def state_of(job: Wanted, base: Base) -> Path:
    return cache_folder() / "runs" / job.key(base) / "lora.state.safetensors"


def whole_run(job: Wanted, base: Base, folder: Path) -> tuple[dict[str, Tensor], Sequence[tuple[int, float]]]:
    """Tensors and history of a run that nothing interrupts, forgotten afterwards."""
    made = trained(job, base, folder)
    shutil.rmtree(made.run.path)
    return tensors(made.path), made.run.history()


@pytest.fixture
def every_loss(monkeypatch):
    """The loss is looked at after every step, however fast they are."""
    monkeypatch.setattr(store, "LOSS_INTERVAL", -1.0)


def test_cancelled_again_and_again_it_goes_on_and_gives_the_same_tensors(long_job, base, loras, tmp_path, every_loss):
    whole, history = whole_run(long_job, base, tmp_path / "whole")
    assert [step for step, _ in history] == [1, 2, 3, 4, 5, 6]
    assert cancelled_at(2, long_job, base, loras) == [1, 2]
    assert SafetensorsFile.open(state_of(long_job, base)).metadata["step"] == "2"
    assert cancelled_at(4, long_job, base, loras) == [3, 4]
    assert files(loras) == []

    known: list[list[tuple[int, float]]] = []
    points: list[int] = []
    made = made_of(long_job, base, [loras], on_history=known.append, on_point=lambda report: points.append(report.step))
    assert known == [list(history[:4])] and points == [5, 6]
    assert same(made.path, whole)
    assert made.run.history() == history
    assert not state_of(long_job, base).exists()


def test_under_another_name_an_unfinished_run_goes_on(long_job, base, loras):
    cancelled_at(4, long_job, base, loras)
    assert cancelled_at(5, replace(long_job, name="berta"), base, loras) == [5]


@pytest.mark.slow
def test_a_history_longer_than_the_state_is_cut_back_to_it(photos, base, loras, tmp_path, every_loss):
    job = Wanted("anna", replace(LONG, state_interval=0.0), photos)
    whole, history = whole_run(job, base, tmp_path / "whole")
    cancelled_at(2, job, base, loras)
    state = state_of(job, base)
    shutil.copy(state, tmp_path / "early")
    cancelled_at(4, job, base, loras)
    os.replace(tmp_path / "early", state)  # as if the process had been killed after step 4
    made = made_of(job, base, [loras])
    assert made.run.history() == history
    assert same(made.path, whole)


def test_the_history_is_saved_while_it_grows(long_job, base, loras, every_loss, monkeypatch):
    monkeypatch.setattr(store, "SAVE_INTERVAL", -1.0)
    saved: list[int] = []

    def on_step(_: StepReport) -> None:
        saved.append(len(RunFolder(cache_folder() / "runs" / long_job.key(base)).history()))

    made_of(long_job, base, [loras], callbacks=Callbacks(on_step=on_step))
    assert saved == [1, 2, 3, 4, 5, 6]


def test_the_loss_is_looked_at_seldom_and_at_the_end(long_job, base, loras, monkeypatch):
    monkeypatch.setattr(store, "LOSS_INTERVAL", 1e9)
    assert [step for step, _ in trained(long_job, base, loras).run.history()] == [1, 6]


def test_a_loss_that_is_no_number_is_not_shown(long_job, base, loras, every_loss):
    """A page cannot read NaN in JSON."""
    shown: list[float] = []
    job = replace(long_job, config=replace(LONG, learning_rate=100.0, max_grad_norm=0.0))
    with pytest.raises(TrainingDiverged):
        made_of(job, base, [loras], on_point=lambda report: shown.append(report.loss))
    history = RunFolder(cache_folder() / "runs" / job.key(base)).history()
    assert shown == [loss for _, loss in history] and all(map(math.isfinite, shown))


def test_stopped_with_what_was_learned_it_is_the_jobs_file(long_job, base, loras, every_loss):
    def stop(report: StepReport) -> None:
        if report.step == 3:
            raise StopAndKeep

    made = made_of(long_job, base, [loras], callbacks=Callbacks(on_step=stop))
    assert not made.found
    assert LoraFile.read(made.path).metadata["ss_steps"] == "3"
    assert [step for step, _ in made.run.history()] == [1, 2, 3]
    assert found(long_job, base, loras).path == made.path


def test_samples_are_kept_and_handed_on(job, base, loras):
    config = replace(CONFIG, sample_every=1, sample_steps=1, sample_guidance=1.0, sample_prompts=("one", "two"))
    handed: dict[int, list[Image.Image]] = {}
    made = made_of(replace(job, config=config), base, [loras], callbacks=Callbacks(on_sample=handed.__setitem__))
    assert [*handed] == [1, 2] and [len(images) for images in handed.values()] == [2, 2]
    again = found(job, base, loras).run.samples()  # the job without samples is the same job
    assert again.keys() == handed.keys() == made.run.samples().keys()
    assert all(
        kept.tobytes() == given.convert("RGB").tobytes()
        for step in handed
        for kept, given in zip(again[step], handed[step], strict=True)
    )
    assert made.run.sample_sheet().height > RunFolder(loras).sample_sheet().height


@pytest.mark.slow
def test_samples_of_a_run_that_was_cancelled_are_still_there(photos, base, loras):
    config = replace(LONG, sample_every=2, sample_steps=1, sample_guidance=1.0)
    job = Wanted("anna", config, photos)
    cancelled_at(4, job, base, loras)
    assert [*trained(job, base, loras).run.samples()] == [2, 4, 6]


def test_the_likeness_that_was_measured_is_read_from_the_file(job, base, loras):
    made = trained(job, base, loras)
    assert made.likenesses() == []
    lora = LoraFile.read(made.path)
    points = [{"step": 2, "likeness": 0.25}, {"step": 4, "likeness": 0.5}]
    measured = made.path.with_name("measured.safetensors")
    lora.with_metadata({**lora.metadata, LIKENESS_KEY: json.dumps({"points": points})}).save(measured)
    assert replace(made, path=measured).likenesses() == [(2, 0.25), (4, 0.5)]


def test_another_measured_checkpoint_can_be_taken(photos, loras):
    config = replace(CONFIG, sample_every=1, hold_out=1, likeness_pictures=1, sample_steps=1, sample_guidance=1.0)
    job, base = Wanted("anna", config, photos), load_base(BASE_FILE)
    made = trained(job, base, loras)
    ((step, file),) = [item for item in made.checkpoints().items() if item[1] != made.path]
    assert sorted(made.checkpoints()) == [1, 2]
    assert made.take_checkpoint(3 - step) == made.path

    (loras / f"anna-step00000{step}.safetensors").symlink_to(made.path)  # of something else
    (loras / f"anna-step00000{step}-2.safetensors").write_text("no LoRA at all")
    taken = made.take_checkpoint(step)
    assert taken == loras / f"anna-step00000{step}-3.safetensors"
    lora = LoraFile.read(taken)
    curve = json.loads(lora.metadata[LIKENESS_KEY])
    assert int(lora.metadata["ss_steps"]) == step == curve["points"][curve["kept"]]["step"]
    assert same(taken, file) and not same(taken, made.path)
    assert made.take_checkpoint(step) == taken and len(files(loras)) == 4
    with pytest.raises(BadConfig, match=r"checkpoint = 7: anna has no .*Choose one of: 1, 2"):
        made.take_checkpoint(7)

    for path, at in ((taken, step), (made.path, 3 - step)):
        sample = drawn_sample(LoraFile.read(path))
        assert sample is not None and sample.tobytes() == made.run.samples()[at][0].tobytes()
    shutil.rmtree(made.run.path)
    assert drawn_sample(lora) is None
    assert list(found(job, base, loras).checkpoints()) == [3 - step]
