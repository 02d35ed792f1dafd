"""LoRAs beside the layers: where training adapters and speed LoRAs are on, what becomes of the result, what is refused."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import core.models.quantised_layers as quantised_layers
from core.cli import main
from core.config import TrainConfig
from core.demo import BASE_FILE
from core.errors import BadConfig, BadFile, FaceLoraError, LoraMisfit, UnknownFamily
from core.lora.apply import apply
from core.lora.file import LoraFile
from core.lora.modules import name_kinds
from core.models import Base, load_base
from core.models.memory_plan import PLANS, MemoryPlan
from core.photos import Thresholds, make_ready
from core.pictures import find_style_packs, with_speed_lora
from core.storage.safetensors_file import SafetensorsFile
from core.studio import Order
from core.training import TrainingJob
from core.training.callbacks import Callbacks, StepReport
from core.training.drawing import Drawing
from core.training.identity import run_identity
from core.training.inputs import TrainingInputs
from core.training.loop import train_lora
from core.training.samples import build_draw_shots, make_class_images
from core.training.step import Run
from core.training.store import train
from core.training.training_adapter import METADATA_KEY, TrainingAdapter
from tests.tooling import (
    SMALL_FLOWS,
    assert_trained_alike,
    cache_of,
    mostly_slow,
    random_lora,
    small_flow_base,
    write_photos,
    write_quick_pack,
)

CPU = torch.device("cpu")
CONFIG = TrainConfig(rank=2, precision="fp32", batch_size=2, learning_rate=1e-3, steps=2, prior_prediction=1.0)
BOUND = 1e-5
"""How far a prediction with an adapter may be from one with the adapter merged in, in float32 (relative, of norms)."""


def draw(*shape: int, seed: int = 1) -> Tensor:
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def base_of(family: str, small_sd15: Path) -> Base:
    return load_base(small_sd15) if family == "sd15" else small_flow_base(family)


def merged(base: Base, lora: LoraFile) -> Base:
    """The base with the LoRA in its weights."""
    denoiser = base.load("denoiser", CPU, torch.float32)
    apply(lora, {"family": base.family.name, "denoiser": denoiser})
    component = replace(base.components["denoiser"], tensors=dict(denoiser.state_dict()))
    return replace(base, components={**base.components, "denoiser": component})


def run_with(base: Base, lora: LoraFile | None, config: TrainConfig = CONFIG, plan: MemoryPlan = PLANS[0]) -> Run:
    adapter = TrainingAdapter.open(lora, base) if lora else None
    return Run(TrainingInputs.on(CPU, cache_of(base, 2, side=8), base, config, adapter=adapter), plan=plan)


def predicted(run: Run) -> Tensor:
    """What the networks of a run predict now, as a sampler sees them."""

    def sampler(*_: object) -> list:
        pictures = run.examples.images[:1]
        conditioning = run.examples.conditioning(pictures, [pictures[0].caption])
        with torch.no_grad():
            drawn.append(run.model.predict(pictures[0].mean[None], torch.tensor([500.0]), conditioning))
        return []

    drawn: list[Tensor] = []
    Drawing(run).draw(sampler, [], lambda warning: None)
    return drawn[0]


@pytest.mark.parametrize("family", mostly_slow(("sd15", *SMALL_FLOWS), "zimage"))
def test_a_step_equals_one_on_a_base_with_the_adapter_merged_in(family, small_sd15):
    """On every linear layer and convolution, with prior prediction, whose frozen model has the adapter too."""
    base = base_of(family, small_sd15)
    lora = random_lora(base, r"(?!embed_).*")
    ours, theirs = run_with(base, lora), run_with(merged(base, lora), None)
    plain = run_with(base, None)
    for run in (ours, theirs, plain):
        run.train_step()
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=BOUND)
    assert plain.loss.item() != pytest.approx(theirs.loss.item(), rel=0.01)
    for run in (ours, theirs):
        run.train_step()
    assert_trained_alike(ours.parameters, theirs.parameters)


def test_one_that_changes_an_embedding_is_refused():
    base = small_flow_base("ideogram4")
    with pytest.raises(LoraMisfit, match="the training adapter changes embed_image_indicator, which is an embedding"):
        run_with(base, random_lora(base))


@pytest.mark.parametrize("method", mostly_slow(("lora", "lokr", "loha", "dora", "oft", "dreambooth"), "dora"))
def test_it_adds_to_the_layers_of_every_method(method, small_sd15):
    """DoRA and OFT multiply the weight, without the adapter's change in it, since their files are for the base without it."""
    base = load_base(small_sd15)
    lora = random_lora(base, r".*(attn1\.to_q|conv1|proj_in)")
    config = replace(CONFIG, method=method, prior_prediction=0.0, targets="transformer+conv", rank=4)
    ours, theirs = run_with(base, lora, config), run_with(merged(base, lora), None, config)
    losses = []
    for run in (ours, theirs):
        run.train_step()
        losses.append(run.loss.item())
        run.train_step()
    assert losses[0] == pytest.approx(losses[1], rel=1e-3 if method == "dora" else BOUND)


def of_kind(base: Base, kind: str) -> LoraFile:
    """An adapter of another kind on one layer, in Kohya's names."""
    roles = {
        "loha": {"hada_w1_a": draw(128, 2), "hada_w1_b": draw(2, 128), "hada_w2_a": draw(128, 2), "hada_w2_b": draw(2, 128)},
        "lokr": {"lokr_w1": draw(4, 4), "lokr_w2": draw(32, 32)},
        "dora": {"down": draw(2, 128), "up": draw(128, 2), "dora": 1 + draw(128).abs()},
        "oft": {"oft_blocks": draw(4, 32, 32)},
        "full": {"diff": draw(128, 128), "diff_b": draw(128)},
        "bias": {"diff_b": draw(128)},
    }[kind]  # fmt: skip
    tensors = name_kinds(base.names, {("denoiser", "transformer_blocks.0.attn.to_out.0"): roles})
    return LoraFile.from_tensors(tensors, {})


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora", "oft", "full", "bias"])
def test_every_kind_of_lora_does_what_it_does_merged_in(kind):
    base = small_flow_base("flux1")
    lora = of_kind(base, kind)
    ours, theirs = run_with(base, lora), run_with(merged(base, lora), None)
    with torch.no_grad():
        losses = [float(next(map(run.loss_of, run.examples.passes(0)))) for run in (ours, theirs)]
    assert losses[0] == pytest.approx(losses[1], rel=BOUND)


def test_samples_are_drawn_without_it():
    base = small_flow_base("zimage")
    adapted, plain = run_with(base, random_lora(base)), run_with(base, None)
    assert torch.equal(predicted(adapted), predicted(plain))
    adapted.train_step()
    plain.model.put(adapted.parameters)
    assert torch.equal(predicted(adapted), predicted(plain))


@pytest.mark.parametrize("family", mostly_slow(("sd15", *SMALL_FLOWS), "zimage"))
def test_only_samples_are_drawn_with_the_speed_lora(family, small_sd15, tmp_path):
    base = base_of(family, small_sd15)
    lora = random_lora(base, r"(?!embed_).*")
    lora.save(tmp_path / "speed_4step_lora.safetensors", torch.float32)
    faster = base.sped_up(SafetensorsFile.open(tmp_path / "speed_4step_lora.safetensors"))
    fast, plain, whole = run_with(faster, None), run_with(base, None), run_with(merged(base, lora), None)
    for _ in range(2):
        drawn, expected = predicted(fast), predicted(whole)
        assert (drawn - expected).norm() < BOUND * expected.norm()
        assert not torch.allclose(drawn, predicted(plain), rtol=0.01)
        for run in (fast, plain):
            run.train_step()
        assert all(torch.equal(value, plain.parameters[name]) for name, value in fast.parameters.items())
        whole.model.put(fast.parameters)


def speedy_job(base: Base, folder: Path, name: str) -> TrainingJob:
    """A run that measures likeness on pictures drawn with another speed LoRA for each name."""
    random_lora(base, seed=len(name)).save(folder / f"{name}_2step.safetensors", torch.float32)
    ready = make_ready([], None, Thresholds(face_pixels_reject=9), check=False)
    return TrainingJob(
        ready, with_speed_lora(base, folder / f"{name}_2step.safetensors"), replace(CONFIG, hold_out=2, sample_every=1)
    )


def test_the_key_does_not_depend_on_the_speed_lora(base, tmp_path):
    one, other = (speedy_job(base, tmp_path, name) for name in ("one", "other"))
    assert one.key == other.key == replace(one, base=base).key
    assert one.base._digests.keys() >= {"denoiser", "vae"}, "its weights would be hashed again"
    assert one.base.identity != other.base.identity


def test_a_run_that_measures_keeps_its_speed_lora(base, tmp_path):
    """Otherwise pictures that were drawn in two ways would be compared."""
    bases = [base, *(speedy_job(base, tmp_path, name).base for name in ("one", "other"))]
    inputs = [TrainingInputs.on(CPU, cache_of(base, 2, side=8), one, CONFIG) for one in bases]
    assert len({run_identity(one, ["SFace"])["settings"] for one in inputs}) == 3
    assert len({run_identity(one)["settings"] for one in inputs}) == 1


def test_layers_in_8_bits_keep_it(monkeypatch):
    """Those in the place of layers that the method does not train; the others stay inside of the method's."""
    monkeypatch.setattr(quantised_layers, "SMALLEST", 1)
    base = small_flow_base("zimage")
    lora = random_lora(base, r"(?!layers\.\d+\.(attention|feed_forward)).*")
    plan = next(plan for plan in PLANS if plan.weights == "8 bits")
    config = replace(CONFIG, prior_prediction=0.0)
    runs = [
        run_with(base, *case) for case in ((lora, config, plan), (lora, config, PLANS[0]), (None, config, PLANS[0]))
    ]
    with torch.no_grad():
        narrow, wide, without = (float(run.loss_of(*run.examples.passes(0))) for run in runs)
    assert abs(narrow - wide) < 0.2 * abs(without - wide)


@pytest.fixture
def base() -> Base:
    return small_flow_base("zimage")


def trained(
    base: Base, lora: LoraFile, state: Path | None = None, stop_after: int | None = None, resume: bool = False
) -> LoraFile:
    """What train_lora makes; stopped after a step, it leaves its state."""

    def on_step(report: StepReport) -> None:
        if report.step == stop_after:
            raise KeyboardInterrupt

    made = train_lora(
        cache_of(base, 2, side=8), base, CONFIG, device=CPU, training_adapter=TrainingAdapter.open(lora, base),
        state_path=state, resume=resume, callbacks=Callbacks(on_step=on_step),
    )  # fmt: skip
    assert isinstance(made, LoraFile)
    return made


def test_a_resumed_run_needs_the_same_adapter(base, tmp_path):
    state, lora = tmp_path / "state.safetensors", random_lora(base)
    with pytest.raises(KeyboardInterrupt):
        trained(base, lora, state, stop_after=1)
    with pytest.raises(BadConfig, match="training_adapter"):
        trained(base, random_lora(base, seed=5), state, resume=True)
    resumed, whole = trained(base, lora, state, resume=True), trained(base, lora)
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(resumed.tensors[name], whole.tensors[name]) for name in whole.tensors)


def test_the_file_has_nothing_of_it_but_its_hash(base, tmp_path):
    path = tmp_path / "anna.safetensors"
    random_lora(base).save(path, torch.float32)
    adapter = TrainingAdapter.open(path, base)
    made = trained(base, LoraFile.read(path))
    assert made.metadata[METADATA_KEY] == adapter.digest
    assert not any("anna" in value for value in made.metadata.values())
    targets = base.family.denoiser_targets["transformer"]
    modules = made.modules()
    assert all(re.fullmatch(targets, module) for _, module in modules) and {m.rank for m in modules.values()} == {2}


def test_the_key_of_a_training_knows_the_adapter_by_its_tensors(base, tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 5)):
        random_lora(base, seed=seed).save(tmp_path / f"{name}.safetensors", torch.float32)
    one, same, other = (
        TrainingAdapter.open(tmp_path / f"{name}.safetensors", base) for name in ("one", "same", "other")
    )
    wired = TrainingAdapter.open(
        LoraFile.from_tensors(dict(random_lora(base).tensors), random_lora(base).metadata), base
    )
    ready = make_ready([], None, Thresholds(face_pixels_reject=9), check=False)
    keys = [TrainingJob(ready, base, CONFIG, adapter=each).key for each in (None, one, same, other, wired)]
    assert keys[1] == keys[2] == keys[4] and len(set(keys)) == 3


def wrong_files(folder: Path, base: Base) -> dict[str, tuple[Path, type[FaceLoraError], str]]:
    """Files that are no training adapter for Z-Image, the class of the error, and what is said of each."""
    pickle, other, unknown, norm = (
        folder / name for name in ("a.pt", "b.safetensors", "c.safetensors", "d.safetensors")
    )
    pickle.write_bytes(b"\x80\x02}q\x00.")
    random_lora(small_flow_base("flux1")).save(other)
    tensors = {"something.lora_A.weight": draw(2, 8), "something.lora_B.weight": draw(8, 2)}
    LoraFile("zimage", {}, tensors).save(unknown)
    tensors = dict(random_lora(base, r"layers\.0\.attention\.to_[qkv]").tensors)
    tensors["diffusion_model.layers.0.attention_norm1.w_norm"] = draw(128)
    LoraFile("zimage", random_lora(base).metadata, tensors).save(norm)
    return {
        "pickle": (pickle, BadFile, "pickle"),
        "another family": (other, LoraMisfit, ", but the base model is zimage"),
        "unknown names": (unknown, UnknownFamily, "something"),
        "a norm": (norm, LoraMisfit, "which is neither a linear layer nor a convolution"),
    }


@pytest.mark.parametrize("which", ["pickle", "another family", "unknown names", "a norm"])
def test_a_file_that_is_no_adapter_for_the_base_is_refused_by_name(which, base, tmp_path):
    path, kind, why = wrong_files(tmp_path, base)[which]
    with pytest.raises(kind) as error:
        TrainingAdapter.open(path, base)
    message = str(error.value)
    assert message.startswith("training adapter: ") and str(path) in message and why in message
    assert "expected a LoRA for Z-Image in safetensors, such as ostris/zimage_turbo_training_adapter" in message


def test_a_distilled_model_is_trained_with_it_and_refused_without(tmp_path):
    base = small_flow_base("flux1", guidance_embeds=False)
    photos, config = write_photos(tmp_path / "photos", 2), replace(CONFIG, steps=1, check_photos=False, resolution=64)
    with pytest.raises(BadConfig, match=r"distilled .* the usual one is ostris/FLUX\.1-schnell-training-adapter"):
        train(photos, base, config)
    warnings: list[str] = []
    made = train(
        photos, base, config, training_adapter=random_lora(base), callbacks=Callbacks(on_warning=warnings.append)
    )
    assert METADATA_KEY in made.metadata and not any("distilled" in warning for warning in warnings)


def test_the_command_line_finds_what_was_trained_with_it(small_sd15, tmp_path, capsys):
    adapter, output = tmp_path / "adapter.safetensors", tmp_path / "me.safetensors"
    random_lora(load_base(small_sd15), r".*attn1\.to_q").save(adapter)
    arguments = [
        "train", str(write_photos(tmp_path / "photos", 2)), "--base", str(small_sd15), "--output", str(output), "--json",
        "--recipe", "none", "--steps", "1", "--rank", "2", "--resolution", "32", "--no-check-photos",
    ]  # fmt: skip
    adapted = ["--training-adapter", str(adapter)]
    for given, found in ((adapted, False), (adapted, True), (["--restart"], False)):
        assert main([*arguments, *given]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["found"] is found
        assert (METADATA_KEY in SafetensorsFile.open(output).metadata) is (given == adapted)


def test_samples_are_drawn_as_a_distilled_model_draws(base, tmp_path, monkeypatch):
    """Its file's name says nothing, as in ComfyUI, where it is not known: without guidance, on the few steps' own times."""
    seen = []
    monkeypatch.setattr("core.training.run_job.build_draw_shots", lambda base, *_: seen.append(base))
    config = replace(CONFIG, steps=1, check_photos=False, resolution=64, sample_every=1)
    with pytest.raises(TypeError):  # there is no sampler
        train(write_photos(tmp_path / "photos", 2), base, config, training_adapter=random_lora(base),
              callbacks=Callbacks(on_sample=lambda step, images: None))  # fmt: skip
    assert (seen[0].guidance, seen[0].steps, base.guidance) == (1.0, 8, base.family.guidance)


@pytest.mark.parametrize(("distilled", "asked", "steps"), [(False, 20, 20), (True, 20, 8), (True, 3, 3)])
def test_samples_of_a_distilled_model_take_its_own_steps(distilled, asked, steps, base, monkeypatch):
    seen = []
    monkeypatch.setattr("core.training.samples.sample_latents", lambda *_, steps, **options: seen.append(steps))
    monkeypatch.setattr("core.training.samples.decode_latents", lambda *_: [None])
    drawn_with = base.as_distilled() if distilled else base
    sampler = build_draw_shots(drawn_with, replace(CONFIG, sample_steps=asked), {"a": ({}, {})}, CPU)
    sampler(nn.Identity(), {}, [("a", 1)])
    assert seen == [steps]


def test_a_studio_trains_with_it(tmp_path):
    """Who was made without it is made anew."""
    folder, packs, adapter = tmp_path / "people" / "anna", tmp_path / "packs", tmp_path / "adapter.safetensors"
    write_photos(folder, 5)
    (folder / "person.toml").write_text("agreed = true")
    write_quick_pack(packs)
    random_lora(load_base(BASE_FILE), r".*attn1\.to_q").save(adapter)
    order = ["--base", "demo", "--style-pack", "quick", "--style-folder", str(packs), "--count", "1", "--steps", "1"]
    for options, made in (([], [False]), (["--training-adapter", str(adapter)], [False, True])):
        assert main(["studio", str(folder.parent), *order, *options, "--output", str(tmp_path / "studio")]) in (0, 1)
        loras = [SafetensorsFile.open(path) for path in (tmp_path / "studio").rglob("*.safetensors")]
        assert sorted(METADATA_KEY in lora.metadata for lora in loras) == made


def test_an_order_with_it_draws_as_a_distilled_model(base, tmp_path):
    pack = find_style_packs([write_quick_pack(tmp_path / "packs")]).pick("quick")
    plain = Order("anna", CONFIG, pack, count=1)
    adapted = replace(plain, training_adapter=TrainingAdapter.open(random_lora(base), base))
    assert [order.jobs(base)[0].steps for order in (plain, adapted)] == [base.family.steps, 8]


def test_class_images_are_drawn_without_the_speed_lora(base, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "core.training.samples.generate", lambda base, _, jobs, **__: seen.append((base, jobs)) or iter(())
    )
    faster = speedy_job(base, tmp_path, "one").base
    with pytest.raises(FileNotFoundError):  # Nothing was drawn.
        make_class_images(faster, "person", 1, resolution=64, device=CPU)
    assert seen[0][0].speed_lora is None and (seen[0][1][0].steps, faster.steps) == (base.steps, 2)
