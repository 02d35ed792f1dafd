"""The work of a job is counted before it begins as it is counted while it is done, and a dry run prints it and does nothing."""

import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from core import demo
from core.cli import main
from core.cli.computing import speed_hint
from core.config import TrainConfig
from core.device import processor
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.models.base import Base
from core.models.memory_plan import PLANS, MemoryPlan
from core.models.spec import Component
from core.photos import Photo, prepare, read_photos
from core.pictures import find_style_packs, with_speed_lora
from core.pictures.generate import PictureJob, generate
from core.pictures.headshot import FacePass
from core.storage.cache_folder import cache_in
from core.studio import (
    PARTS,
    Cost,
    Forecast,
    Ledger,
    Speed,
    Work,
    basis,
    remember_speed,
    speed_of,
    timed_training,
)  # fmt: skip
from core.studio.cost import PHASES
from core.studio.ledger import LOADING, LOOKING, PHASE_OF
from core.studio.passes import Passes
from core.studio.person import Order, ledger_of, ready_photos, train_and_draw
from core.training import Callbacks, TrainingAdapter, train
from core.training.encode import encode
from core.training.job import TrainingJob
from core.training.methods import METHODS
from core.training.recipes import recipe_config
from core.training.samples import make_class_images
from core.training.step import Run
from core.training.store import LoraFolders
from lab.flops import count_flops
from tests.published_models import with_vae
from tests.tooling import (
    SMALL_FLOWS,
    mostly_slow,
    random_lora,
    small_flow_base,
    write_photos,
)

CPU = torch.device("cpu")
FAST = Speed(1e12, dict.fromkeys(("encode", "train", "draw"), (0.25, 0.5)), copies=(1e12, 1e12))
PLAIN = TrainConfig(steps=4, rank=2, batch_size=2, min_snr_gamma=0.0, check_photos=False, resolution=64)
MEASURED: dict[str, Any] = {"sample_every": 2, "sample_steps": 3}
LIKENESS: dict[str, Any] = {**MEASURED, "hold_out": 2, "likeness_pictures": 2}
VARIED: dict[str, dict[str, Any]] = {
    "prior prediction": {"prior_prediction": 1.0},
    "recomputation": {"gradient_checkpointing": "on"},
    "samples": {**MEASURED, "sample_prompts": ("a street", "a dog")},
    "likeness": LIKENESS,
    "class images": {"class_images": 2},
    "training": {"accumulation": 3},
}
"""Settings by the part of the work that they add the most to."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Photo]:
    return read_photos(write_photos(tmp_path_factory.mktemp("ledger") / "anna", count=8))


def expected(photos: Sequence[Photo], base: Base, config: TrainConfig, jobs: Sequence[PictureJob] = ()) -> Ledger:
    return basis(photos, base, config, CPU).ledger(photos, config, jobs)


@pytest.fixture(scope="module")
def counted(photos, base, tmp_path_factory) -> Callable[..., int]:
    """Gives the operations of a real training run with other settings than PLAIN, for which nothing was kept before."""

    @functools.cache
    def count(part: str = "") -> int:
        shown = Callbacks(on_sample=lambda step, images: None)
        config = replace(PLAIN, **VARIED.get(part, {}))
        with cache_in(tmp_path_factory.mktemp("cache")):
            return count_flops(lambda: train(photos, base, config, device=CPU, callbacks=shown))

    return count


@pytest.fixture(scope="module")
def plain(photos, base) -> Ledger:
    return expected(photos, base, PLAIN)


def test_a_training_run_is_counted_as_it_is_done(plain, counted):
    assert set(plain.operations) == set(PHASE_OF)
    assert plain.total == pytest.approx(counted(), rel=0.02)


@pytest.mark.parametrize("part", mostly_slow(VARIED, "likeness", "prior prediction"))
def test_each_part_of_a_training_run_is_counted_as_it_is_done(photos, base, plain, counted, part):
    more = expected(photos, base, replace(PLAIN, **VARIED[part]))
    added = counted(part) - counted()
    assert more.total - plain.total == pytest.approx(added, rel=0.03)
    if part == "class images":  # which are trained on too
        added = count_flops(lambda: make_class_images(base, "person", 2, resolution=PLAIN.resolution, device=CPU))
    assert more.operations[part] - plain.operations[part] == pytest.approx(added, rel=0.03)


def test_likeness_pictures_take_the_steps_of_the_speed_lora(photos, base, plain, counted, tmp_path):
    random_lora(base, r"mid_block.*attn1\.to_q").save(tmp_path / "speed_1step.safetensors")
    faster, config = with_speed_lora(base, tmp_path / "speed_1step.safetensors"), replace(PLAIN, **LIKENESS)
    with cache_in(tmp_path / "cache"):
        done = count_flops(lambda: train(photos, faster, config, device=CPU))
    few, usual = (expected(photos, one, config) for one in (faster, base))
    assert few.total - plain.total == pytest.approx(done - counted(), rel=0.03)
    assert few.operations["likeness"] < 0.4 * usual.operations["likeness"]
    assert few.operations["training"] == usual.operations["training"]


@pytest.mark.parametrize("method", mostly_slow(METHODS, "pivotal"))
def test_every_method_is_counted_as_it_is_done(photos, base, tmp_path, method):
    config = replace(PLAIN, method=method)
    with cache_in(tmp_path):
        done = count_flops(lambda: train(photos, base, config, device=CPU))
    assert expected(photos, base, config).total == pytest.approx(done, rel=0.02)


def test_a_face_pass_is_counted_as_it_is_drawn(photos, base):
    job = PictureJob("a photo of sks person", 1, size=(64, 64), steps=10, guidance=4.0)
    size = base.resolution // base.size_multiple * base.size_multiple
    part = replace(job, size=(size, size))
    start = {part: Image.new("RGB", (size, size))}
    again = count_flops(lambda: list(generate(base, [], [part], starts=start, denoise=FacePass().denoise, device=CPU)))
    both = [job, replace(job, seed=2)]  # The less alike half of the pictures has none.
    for jobs in ([job], both):
        assert expected(photos, base, PLAIN, jobs).operations["face pass"] == pytest.approx(again, rel=0.06)


def test_captions_and_photos_are_counted_as_they_are_encoded(photos, base, plain, tmp_path):
    dataset = prepare(photos, resolution=64, size_multiple=base.size_multiple, trigger="sks", class_word="person")
    with cache_in(tmp_path):
        done = count_flops(lambda: encode(dataset, base, PLAIN, device=CPU))
    assert plain.operations["encoding"] == pytest.approx(done, rel=0.02)


def test_recomputation_is_that_of_the_plan(photos, base):
    size, shared = (64, 64), basis(photos, base, replace(PLAIN, batch_size=1), CPU)
    whole = count_flops(Run(shared.inputs).accumulate)
    for plan in PLANS[1:4]:
        again = count_flops(Run(shared.inputs, plan=plan).accumulate) - whole
        assert abs(shared.passes.recompute(plan, size) - again) < 0.04 * whole


def test_a_smaller_memory_plan_takes_less_memory_and_more_work(photos, base):
    plain, small = (expected(photos, base, replace(PLAIN, batch_size=8, memory_limit=limit)) for limit in (None, 0.001))
    assert small.memory < 0.7 * plain.memory
    assert small.operations["recomputation"] > plain.operations["recomputation"] == 0


def test_a_training_adapter_takes_memory_and_work_in_steps_alone(photos, base):
    layers = {module: torch.ones(shape) for module, shape in base.module_shapes().items() if len(shape) == 2}
    path = max((path for part, path in layers if part == "denoiser"), key=lambda path: layers["denoiser", path].numel())
    rows, columns = layers["denoiser", path].shape
    modules = {("denoiser", path): LoraModule(torch.ones(512, columns), torch.ones(rows, 512), 1.0)}
    adapter = TrainingAdapter.open(LoraFile.from_modules("sd15", modules, {}, names=base.names), base)
    plain, adapted = (
        basis(photos, base, PLAIN, CPU, one).ledger(photos, PLAIN, [PictureJob("a", 1)]) for one in (None, adapter)
    )
    assert adapted.memory > plain.memory
    assert adapted.operations["training"] > 1.01 * plain.operations["training"]
    passes = [Passes.of(base, PLAIN, one) for one in (None, adapter)]
    assert passes[0].predict((64, 64)) == passes[1].predict((64, 64))


def test_weights_brought_in_and_loaded_and_pictures_looked_at_take_time(photos, base):
    jobs = [PictureJob("a", seed, steps=10) for seed in (1, 2)]
    config = replace(PLAIN, prior_prediction=0.5)
    shared = basis(photos, base, config, CPU)
    weights = {part: base.weight_bytes(part, torch.float32, as_stored=True) for part in base.components}
    ledger = replace(shared, plan=MemoryPlan(1.0, offload=0.5), free=weights["denoiser"]).ledger(photos, config, jobs)
    training = 2 * 0.5 * config.steps * weights["denoiser"]
    assert ledger.copied["training"] == training and ledger.copied["prior prediction"] == pytest.approx(0.75 * training)
    assert ledger.copied["headshots"] == pytest.approx(0.3 * 20 * weights["denoiser"])
    assert ledger.loaded == 3 * sum(weights.values()) and ledger.face_detections == len(photos) + 4
    slow, fast = (replace(FAST, copies=(rate, 2 * rate)) for rate in (1e6, 1e12))
    assert ledger.seconds(slow)["training"] == pytest.approx((training / 2e6, training / 1e6), rel=0.01)
    assert ledger.seconds(fast)["training"][0] == ledger.operations["training"] / 0.5e12
    taken = ledger.seconds(replace(FAST, loads=(1e6, 2e6), seconds_per_face_detection=(1.0, 2.0)))
    assert taken[LOADING] == (ledger.loaded / 2e6, ledger.loaded / 1e6) and taken[LOOKING] == (12, 24)


def test_a_forecast_without_photos_is_the_time_of_a_job_on_square_ones(base):
    config = replace(PLAIN, **LIKENESS)
    square = [Photo.from_image(Image.new("RGB", (64, 64)), "square")] * 8
    jobs = [PictureJob("a photo of sks person", 1)] * 3
    forecast = Forecast.on(base, replace(config, steps=1), CPU)
    assert forecast.span(config, 8, 3)[0] and base.file and base.file._memory is None, "the file is closed"
    spans = basis(square, base, config, CPU).ledger(square, config, jobs, redraws_faces=False).seconds(forecast.speed)
    assert forecast.span(config, 8, 3) == pytest.approx(tuple(map(sum, zip(*spans.values(), strict=True))))
    assert forecast.span(replace(config, steps=8), 8, 3)[0] > forecast.span(config, 8, 3)[0]


def without_text_encoders(name: str, **parts: Component) -> Base:
    """A small rectified flow that can't encode captions."""
    base = small_flow_base(name)
    return replace(base, components={"denoiser": base.components["denoiser"], **parts}, caption_encoder=None)


@pytest.mark.parametrize("name", mostly_slow(SMALL_FLOWS, "flux1", "krea2"))
def test_a_denoiser_alone_is_enough_for_a_forecast(name):
    config = replace(PLAIN, **MEASURED)
    least, most = Forecast.on(without_text_encoders(name), config, CPU).span(config, 8, 2)
    assert 0 < least < most


def test_no_tokenizer_is_needed_for_a_forecast():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4, "vocab_size": 64}
    base = without_text_encoders("chroma", text_encoder=Component(sizes, {}))
    assert Forecast.on(base, PLAIN, CPU).span(PLAIN, 8, 0)[0] > 0


def test_after_a_job_its_own_speed_is_expected(base, tmp_path, monkeypatch):
    cost = Cost("cpu", processor(CPU), "", Work(1, 8, 100, 10), dict.fromkeys(PHASES, 10.0), dict.fromkeys(PHASES, 0.0))
    with cache_in(tmp_path):
        before = speed_of(base, CPU, "fp32")
        remember_speed(base, "fp32", before, {"train": 0.8 * 10 * before.rate, "draw": 0.0}, cost)
        after = speed_of(base, CPU, "fp32")
        assert after.shares["train"] == pytest.approx((0.72, 0.88)) and after.shares["draw"] == before.shares["draw"]
        assert speed_of(base, CPU, "bf16").shares == before.shares
        (file,) = tmp_path.rglob("*.json")
        file.write_text("[]")
        assert speed_of(base, CPU, "fp32").shares == before.shares


def test_after_a_training_run_its_own_speed_is_expected(photos, base, plain, tmp_path, monkeypatch):
    monkeypatch.setattr("core.studio.forecast.basis", lambda *_: SimpleNamespace(ledger=lambda *_, **__: plain))
    job, place = TrainingJob.of(photos, base, PLAIN), LoraFolders("anna", [tmp_path / "loras"])
    place.folders[0].mkdir()
    with cache_in(tmp_path / "cache"):
        before = speed_of(base, CPU).shares
        timed_training(job, place, device=CPU)
        assert speed_of(base, CPU).shares == before, "too short to tell"
        (tmp_path / "loras" / "anna.safetensors").unlink()
        monkeypatch.setattr("core.studio.forecast.LEAST_SECONDS", 0)
        timed_training(job, place, device=CPU)
        after = speed_of(base, CPU).shares
    assert after["train"] != before["train"] and after["draw"] == before["draw"]


def test_a_training_run_whose_captions_another_program_encodes_tells_its_speed_too(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("core.studio.forecast.LEAST_SECONDS", 0)
    base = small_flow_base("zimage")
    with cache_in(tmp_path / "cache"):
        before = speed_of(base, CPU).shares["train"]
        job = TrainingJob.of(photos, base, replace(PLAIN, steps=1, min_snr_gamma=TrainConfig.min_snr_gamma))
        timed_training(job, LoraFolders("anna", [tmp_path]), device=CPU)
        assert speed_of(base, CPU).shares["train"] != before


def test_only_faces_that_were_redrawn_count_as_drawn(plain):
    counted = replace(plain, operations=dict.fromkeys(PHASE_OF, 1.0))
    assert counted.done(0.5, 0.25) == {"train": 0.5 * 6, "draw": 1.25}


def test_a_fast_gpu_waits_for_the_host_on_a_unet():
    unet, transformer = (with_vae(name) for name in ("SDXL", "FLUX.1-dev"))
    shares = [Speed.published("cuda", unet, rate, FAST.copies).shares["train"][1] for rate in (25e12, 165e12, 989e12)]
    assert shares == sorted(shares, reverse=True) and len(set(shares)) == 3
    assert Speed.published("cuda", transformer, 165e12, FAST.copies).shares["train"][0] > shares[1] * 0.9


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with photos of two people, one of whom has agreed."""
    for name in ("anna", "ben"):
        write_photos(tmp_path / "people" / name, count=9, scale=2)
    (tmp_path / "people" / "anna" / "person.toml").write_text("agreed = true\n")
    return tmp_path


def test_someone_whose_photos_are_too_small_is_not_counted_and_others_are(folder, capsys, monkeypatch):
    (folder / "people" / "carl").mkdir()
    (folder / "people" / "carl" / "person.toml").write_text("agreed = true\n")
    Image.new("RGB", (4, 4)).save(folder / "people" / "carl" / "a.png")
    (folder / "people" / "dora").mkdir()
    (folder / "people" / "dora" / "person.toml").write_text("agreed = false\n")
    (folder / "own.toml").write_text('precision = "bf16"')
    given = ["studio", str(folder / "people"), "--base", "demo", "--output", str(folder / "out"), "--dry-run"]
    asked: list[str] = []
    monkeypatch.setattr("core.studio.speed_of", lambda base, device, precision: asked.append(precision) or FAST)
    assert main([*given, "--config", str(folder / "own.toml")]) == 0 and asked == ["bf16"]
    printed = capsys.readouterr()
    assert "dora will be refused: the person has not agreed" in printed.err
    assert "carl is not included in the estimate: a.png: " in printed.err and "likeness " in printed.out


@pytest.mark.parametrize("command", ["headshots", "studio", "train"])
def test_a_dry_run_prints_the_work_and_writes_no_file(folder, capsys, command):
    output = folder / ("anna.safetensors" if command == "train" else "out")
    source = folder / "people" / ("anna" if command != "studio" else "")
    given = [command, str(source), "--base", "demo", "--output", str(output), "--dry-run"]
    before = sorted(folder.rglob("*"))
    assert main(given) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in printed[:3]] == ["TFLOP", "encoding", "training"]
    assert printed.pop() == "Nothing was trained or drawn."
    if command != "studio":  # whose people have different numbers of photos
        assert printed.pop().startswith("Each photo is seen ")
    assert printed.pop().startswith("memory: ") and "100%" in printed[-1]
    assert [row for row in printed if row.startswith("likeness ")]
    assert main([*given, "--json"]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(values["parts"]) == list(PARTS) and values["memory"] > 0
    assert sum(part["operations"] for part in values["parts"].values()) == pytest.approx(values["operations"])
    assert all(
        0 <= least <= most for least, most in [values["seconds"], *(p["seconds"] for p in values["parts"].values())]
    )
    assert bool(values["parts"]["headshots"]["operations"]) == (command != "train")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("without_travel", [[], ["--optimizer", "prodigy"], ["--method", "dreambooth"]])
def test_views_are_of_the_photos_to_train_on_and_travel_is_of_loras_with_a_rate(folder, capsys, without_travel):
    given = ["train", str(folder / "people" / "anna"), "--base", "demo", "--output", str(folder / "a.safetensors")]
    assert main([*given, "--steps", "40", "--batch-size", "2", "--dry-run", "--json", *without_travel]) == 0
    values = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert values["views"] == 40 * 2 / 8, "one of nine photos is held out"
    assert ("travel" in values) == (not without_travel)


@pytest.mark.parametrize("command", ["headshots", "studio"])
def test_style_packs_that_cannot_be_used_are_named(folder, capsys, command):
    source = folder / "people" / ("anna" if command == "headshots" else "")
    given = [command, str(source), "--base", "demo", "--output", str(folder / "out"), "--dry-run", "--no-check-photos"]
    main([*given, "--style-folder", str(folder / "mistyped"), "--style-pack", "mine"])
    assert f"warning: {folder / 'mistyped'}: this folder of style packs does not exist\n" in capsys.readouterr().err


@pytest.mark.clock
def test_each_part_takes_the_time_that_was_counted_by_a_factor_of_two(folder, base, capsys):
    """On the demo's base model, with a short training run."""
    photos = read_photos(folder / "people" / "anna")
    given = {"steps": 20, "stop_early": False, "sample_every": 10, "likeness_pictures": 4}
    config = recipe_config("fast", base, len(photos), given)
    report = ready_photos(photos, base, config)
    order = Order("anna", config, find_style_packs([demo.FOLDER]).pick(demo.STYLE_PACK), 3, 1, demo.PICTURE_SIZE)
    ledger = ledger_of(report, base, order, CPU)
    spans = ledger.seconds(speed_of(base, CPU, config.precision))
    taken, since = defaultdict[str, float](float), time.monotonic()

    def until_now(part: str) -> None:
        nonlocal since
        now = time.monotonic()
        taken[part] += now - since
        since = now

    names = {"samples": "likeness", "pictures": "headshots", "faces": "face pass"}
    with cache_in(folder / "cache"):
        train_and_draw(
            report, base, order, folder / "out", device=CPU,
            callbacks=Callbacks(
                on_step=lambda report: until_now("training"),
                on_phase=lambda phase, done, total: until_now(names.get(phase, phase)),
            ),
        )  # fmt: skip
    work = {part: sum(span) / 2 for part, span in spans.items()}
    work["training"] += work["prior prediction"] + work["recomputation"]
    rows = {part: (taken[part], work[part]) for part in ("training", "likeness", "headshots")}
    with capsys.disabled():
        print(*(f"\n{part}: {real:.1f} s, counted {counted:.1f} s" for part, (real, counted) in rows.items()))
    for part, (real, counted) in rows.items():
        assert 0.5 < real / counted < 2, part


@pytest.mark.parametrize(
    ("name", "known", "option"),
    [
        (
            "Krea 2",
            "the speed LoRA krea2_turbo_lora_rank_64_bf16.safetensors (Hugging Face: Comfy-Org/Krea-2)",
            "--speed-lora",
        ),
        ("ERNIE-Image", "the distilled model ERNIE-Image-Turbo (Hugging Face: baidu/ERNIE-Image-Turbo)", "--draw-on"),
    ],
)
def test_before_a_job_the_file_that_would_let_it_draw_faster_is_named_with_what_it_saves(name, known, option):
    base = with_vae(name)
    (short,) = speed_hint(base, {})
    (timed,) = speed_hint(base, {"headshots": (3000.0, 6000.0), "face pass": (600.0, 1200.0), "training": (9.0, 9.0)})
    assert known in short and known in timed and timed.endswith(f"download it and give it with {option}")
    assert base.family.few_steps
    share = base.family.few_steps.steps / base.steps / 2  # Guidance takes two predictions per step.
    assert f"would take {share:.0%} of the time" in short and timed.startswith(
        "drawing takes 1.0 to 2.0 h of this, and would"
    )
    assert f"{share * 60:.0f} to {share * 120:.0f} min with" in timed
    assert speed_hint(base.as_distilled(), {}) == []  # It has been done.


def test_a_small_model_or_one_without_a_known_file_is_told_of_none(base):
    assert speed_hint(base, {}) == speed_hint(with_vae("FLUX.2 dev"), {}) == speed_hint(with_vae("Z-Image"), {}) == []


def test_whole_jobs_of_published_models_are_counted_at_their_own_resolution():
    """The tables of memory have FLUX.1 at 512 px, at which nobody's recipe `best` trains."""
    assert {name: with_vae(name).resolution for name in ("SD1.5", "FLUX.1-dev")} == {"SD1.5": 512, "FLUX.1-dev": 1024}
