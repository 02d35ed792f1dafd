"""Batches of headshots: made once, small faces drawn anew, ranked, the best kept, shown on a page."""

import hashlib
import html
import itertools
import json
import math
import os
import re
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from core import GenerateConfig, LoraFile, PictureJob, load_base
from core.cli import main
from core.demo import BASE_FILE
from core.demo.people import person_photos
from core.errors import BadConfig, BadFile, BadPhoto, InUse, UnmatchedKeys
from core.faces import TO_TRAINED_ON, Face, Reference
from core.lora.hashes import file_hashes
from core.models import Base
from core.pictures import DrawingModel, with_speed_lora
from core.pictures.gallery import SAME_PERSON
from core.pictures.generate import Picture, generate, parameters_text
from core.pictures.headshot import FacePass, Headshot, blend, cut_out
from core.pictures.headshots import batch_summary, make_headshots
from core.pictures.sampling import SAMPLERS, build_sampler, encode_pairs, sample_latents
from core.pictures.sheet import contact_sheet
from core.progress import READING
from tests.tooling import (
    held_elsewhere,
    mostly_slow,
    random_lora,
    small_flow_base,
    write_gguf,
    write_photos,
)


def jobs(count: int) -> list[PictureJob]:
    return [PictureJob("a photo of person", seed, size=(64, 80), steps=1, guidance=1.0) for seed in range(count)]


def times(folder: Path) -> dict[str, int]:
    """When each picture of a batch was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*-*.png")}


# Made once


def test_a_picture_depends_on_its_own_seed_and_not_on_its_batch(base, tmp_path: Path) -> None:
    alone = make_headshots(base, [], jobs(2), tmp_path / "alone")
    together = make_headshots(base, [], jobs(2), tmp_path / "together", GenerateConfig(batch_size=2))
    for one, other in zip(alone, together, strict=True):
        a, b = Image.open(one.path), Image.open(other.path)
        assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1
    assert Image.open(alone[0].path).tobytes() != Image.open(alone[1].path).tobytes()


def test_a_picture_does_not_depend_on_longer_texts_in_its_batch(base) -> None:
    short, long = (
        PictureJob(f"a photo of person{', red bricks' * count}", 1, size=(64, 80), steps=2) for count in (0, 40)
    )
    unread = replace(short, guidance=1.0)
    given = [short, long, replace(short, negative=long.prompt), unread, replace(unread, negative=long.prompt)]
    together = {picture.job: picture.image for picture in generate(base, [], given, GenerateConfig(batch_size=5))}
    (alone,) = generate(base, [], [short])
    difference = np.array(alone.image, int) - np.array(together[alone.job], int)
    assert abs(difference).max() <= 1
    assert together[replace(alone.job, guidance=1.0)].tobytes() == list(together.values())[-1].tobytes()


def test_what_is_no_list_of_loras_is_refused(base, tmp_path) -> None:
    """The check would use up a zip, and the pictures would be drawn without the LoRAs."""
    lora = random_lora(base, r".*attn1\.to_q")
    with pytest.raises(BadConfig, match=r"loras: <zip object at \w+>: expected a list of pairs of a LoraFile"):
        next(generate(base, zip([lora], [1.0], strict=True), jobs(1)))  # pyright: ignore
    with pytest.raises(BadConfig) as refused:
        make_headshots(base, [lora], jobs(1), tmp_path / "out")  # pyright: ignore
    assert str(refused.value).startswith("loras: LoraFile(family='sd15', name='LoRA'): expected a list")


def test_a_speed_lora_is_applied_at_full_strength_beside_others(base, tmp_path) -> None:
    person, path = random_lora(base, r".*attn1\.to_q"), tmp_path / "lightning_2step.safetensors"
    random_lora(base, r".*attn2\.to_k", seed=3).save(path)
    faster = with_speed_lora(base, path)
    half = replace(jobs(1)[0], strength=0.5).on(faster)
    assert (half.steps, half.guidance) == (2, 1.0) and faster.identity != base.identity
    (drawn,) = generate(faster, [(person, 0.8)], [half])
    together = [(person, 0.4), (LoraFile.read(path), 1.0)]
    (expected,) = generate(base.as_distilled(), together, [replace(half, strength=1.0)])
    assert drawn.image.tobytes() == expected.image.tobytes()
    assert "<lora:lightning_2step:1>" in drawn.parameters


def test_texts_are_encoded_some_at_a_time(base) -> None:
    family, sizes = base.family, []

    def encode_text(encoders, texts, clip_skip, chunks):
        sizes.append(len(texts))
        return family.encode_text(encoders, texts, clip_skip, chunks)

    counted = replace(base, family=replace(family, encode_text=encode_text))
    encoders = base.load_text_encoders(torch.device("cpu"), torch.float32)
    pairs = encode_pairs(counted, encoders, [(f"a photo of person {number}", "") for number in range(40)])
    assert sizes == [16, 16, 9] and len(pairs) == 40


def test_an_interrupted_batch_makes_no_picture_twice(base, tmp_path: Path) -> None:
    def stop_at_two(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("pictures", 2):
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make_headshots(base, [], jobs(4), tmp_path, on_progress=stop_at_two)
    made = times(tmp_path)
    assert len(made) == 2
    (tmp_path / ".004-4.png.0123abcd.tmp").write_bytes(b"half a picture")  # as a killed process leaves
    shots = make_headshots(base, [], jobs(4), tmp_path)
    assert len(shots) == 4
    assert made.items() <= times(tmp_path).items()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_picture_is_saved_while_the_next_is_drawn(base, tmp_path: Path, monkeypatch) -> None:
    save, step, second, waited = Picture.save, itertools.count(1), threading.Event(), []

    def save_late(picture: Picture, path: Path) -> None:
        waited.append(second.wait(20))
        save(picture, path)

    def in_each_step() -> None:
        if next(step) == 2:
            second.set()

    monkeypatch.setattr(Picture, "save", save_late)
    make_headshots(base, [], jobs(2), tmp_path, check_cancelled=in_each_step)
    assert waited == [True, True] and len(times(tmp_path)) == 2


def test_a_full_disk_ends_a_batch_and_a_cancel_keeps_what_is_drawn(base, tmp_path: Path, monkeypatch) -> None:
    save, step = Picture.save, itertools.count(1)

    def fail(picture: Picture, path: Path) -> None:
        raise BadFile(f"{path.name}: no space left on device")

    monkeypatch.setattr(Picture, "save", fail)
    with pytest.raises(BadFile, match=r"001-0\.png: no space"):
        make_headshots(base, [], jobs(4), tmp_path)

    def cancel_in_second() -> None:
        if next(step) == 2:
            raise InterruptedError

    monkeypatch.setattr(Picture, "save", save)
    with pytest.raises(InterruptedError):
        make_headshots(base, [], jobs(4), tmp_path, check_cancelled=cancel_in_second)
    assert [*times(tmp_path)] == ["001-0.png"]


def test_a_picture_is_cancelled_within_a_sampling_step(base, tmp_path: Path) -> None:
    checks = iter(range(5))

    def cancel_at_fifth() -> None:
        if next(checks) == 4:
            raise InterruptedError

    several = [replace(job, steps=4) for job in jobs(2)]
    with pytest.raises(InterruptedError):
        make_headshots(base, [], several, tmp_path, check_cancelled=cancel_at_fifth)
    assert len(times(tmp_path)) == 1, "the first is whole"


def test_reading_the_file_for_its_hash_is_shown_and_can_be_cancelled(tmp_path: Path) -> None:
    """Pictures name their model by its hash, for which its whole file is read."""
    base, shown = load_base(BASE_FILE), []

    def cancel_at_half(phase: str, done: int, total: int) -> None:
        shown.append((phase, total))
        if 2 * done >= total:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        make_headshots(base, [], jobs(1), tmp_path, on_progress=cancel_at_half)
    assert set(shown) == {(READING, 100)} and len(shown) > 3 and not times(tmp_path)
    make_headshots(base, [], jobs(1), tmp_path)
    shown.clear()
    make_headshots(base, [], jobs(1), tmp_path, on_progress=lambda phase, *_: shown.append((phase, 1)))
    assert not shown


def test_a_picture_of_another_setting_or_cut_short_is_made_again(base, tmp_path: Path) -> None:
    second = make_headshots(base, [], jobs(3), tmp_path)[1]
    second.path.write_bytes(second.path.read_bytes()[:2000])
    before = times(tmp_path)
    make_headshots(base, [], jobs(3), tmp_path)
    after = times(tmp_path)
    assert {name for name in before if before[name] != after[name]} == {second.path.name}
    make_headshots(base, [], jobs(3), tmp_path, GenerateConfig(sampler="euler"))
    assert not times(tmp_path).items() & after.items()


def test_a_picture_by_a_file_whose_name_is_no_unicode_text_is_made_once(base, tmp_path: Path) -> None:
    named = replace(base, name=os.fsdecode(b"an\xff.safetensors"))
    (shot,) = make_headshots(named, [], jobs(1), tmp_path)
    assert "Model: an?," in Image.open(shot.path).info["parameters"]
    before = times(tmp_path)
    make_headshots(named, [], jobs(1), tmp_path)
    assert times(tmp_path) == before


def test_a_picture_that_was_made_otherwise_is_set_aside_and_comes_back(base, tmp_path: Path) -> None:
    (foreign := tmp_path / "001-0.png").write_bytes(b"somebody's")
    made, drawn = [], []
    for prompt in ("a photo of person", "a drawing of person", "a photo of person", "a drawing of person"):
        job = PictureJob(prompt, 0, size=(64, 80), steps=1)
        make_headshots(
            base, [], [job], tmp_path, on_progress=lambda phase, *_, prompt=prompt: drawn.append((phase, prompt))
        )
        made.append(foreign.read_bytes())
    assert [prompt for phase, prompt in drawn if phase == "pictures"] == ["a photo of person", "a drawing of person"]
    assert made[0] == made[2] != made[1] == made[3]
    assert {path.read_bytes() for path in (tmp_path / "earlier").iterdir()} == {b"somebody's", made[0]}


@pytest.mark.parametrize("said", ["hello", '{"below": 7, "denoise": 1, "before": 0, "after": null}'])
def test_what_others_write_as_face_pass_is_not_taken_for_ours(base, said, tmp_path: Path) -> None:
    (job,) = jobs(1)
    picture = Picture(Image.new("RGB", (64, 80)), job, parameters_text(base, [], job, GenerateConfig()))
    picture.save(tmp_path / "001-0.png", {"face_pass": said})
    before = times(tmp_path)
    (shot,) = make_headshots(base, [], [job], tmp_path)
    assert shot.face_pass is None and times(tmp_path) == before


def test_jobs_that_differ_in_their_size_are_pictures_of_their_own(base, tmp_path: Path) -> None:
    sizes = [(64, 80), (80, 64)]
    shots = make_headshots(
        base, [], [PictureJob("a photo of person", 1, size=size, steps=1) for size in sizes], str(tmp_path)
    )
    assert [Image.open(shot.path).size for shot in shots] == sizes


# What the PNG says


def test_a_png_carries_its_parameters_as_a1111_and_comfyui_read_them(base, tmp_path: Path) -> None:
    shot = make_headshots(base, [], jobs(1), tmp_path)[0]
    prompt, negative, settings = Image.open(shot.path).info["parameters"].split("\n")
    # ComfyUI's reader takes nothing from a text without a line for the negative prompt, so it is there when empty too.
    assert (prompt, negative) == ("a photo of person", "Negative prompt: ")
    assert settings == (
        f"Steps: 1, Sampler: DPM++ 2M Karras, CFG scale: 1, Seed: 0, Size: 64x80, Model: base, "
        f"Model hash: {base.sha256[:10]}"
    )


def read_as_a1111_does(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and settings, by the grammar of A1111 1.10's reader of such texts.

    The last line is `Name: value` with commas between, a value in JSON's quotes where it holds a comma, colon or line
    break; a name has letters, digits, spaces, `-` and `/`. The negative prompt begins where a line says so.
    """
    *lines, last = text.strip().split("\n")
    said = "\n".join(line.strip() for line in lines)
    prompt, _, negative = said.partition("\nNegative prompt:")
    settings = {}
    while last:
        match = re.match(r'\s*(?P<name>\w[\w /-]+):\s*(?P<value>"(?:[^"\\]|\\.)+"|[^,]*)(?:,|$)', last)
        assert match, last
        value = match["value"]
        settings[match["name"]] = json.loads(value) if value.startswith('"') else value
        last = last[match.end() :]
    return prompt, negative.strip(), settings


def test_a1111_reads_back_what_was_drawn_however_the_files_are_called(base, tmp_path: Path) -> None:
    name = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 8), f"{name}.lora_up.weight": torch.ones(8, 2)}
    lora = LoraFile.from_tensors(tensors, {"ss_base_model_version": "sd_v1"}, name='sks, the "woman".safetensors')
    odd = replace(base, name='mix: "A", fp16.safetensors')
    job = PictureJob("a photo of sks woman,\n(smiling:1.2)", 2**40, "blurry,\nugly", (64, 80), 20, 4.5, strength=0.5)
    text = parameters_text(odd, [(lora, 0.75)], job, GenerateConfig("euler_ancestral", clip_skip=2))
    prompt, negative, settings = read_as_a1111_does(text)
    assert prompt == f'{job.prompt} <lora:sks, the "woman":0.375>' and negative == job.negative
    assert settings == {
        "Steps": "20", "Sampler": "Euler a", "CFG scale": "4.5", "Seed": str(2**40), "Size": "64x80",
        "Model": 'mix: "A", fp16', "Model hash": base.sha256[:10], "Clip skip": "2",
        "Lora hashes": f'sks, the "woman": {lora.model_hash[:12]}',
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "guidance", "negative", "said"),
    [
        ("flux1", 3.5, "", {"CFG scale": "1", "Distilled CFG Scale": "3.5"}),
        ("zimage", 3.5, "blurry", {"CFG scale": "3.5"}),
        ("zimage", 1.0, "", {"CFG scale": "1"}),
    ],
)
def test_guidance_and_negative_prompt_are_said_as_they_are_taken(family, guidance, negative, said) -> None:
    job = PictureJob("a photo", 1, "blurry", guidance=guidance)
    _, read, settings = read_as_a1111_does(parameters_text(small_flow_base(family), [], job, GenerateConfig()))
    assert read == negative
    assert {name: value for name, value in settings.items() if "CFG" in name} == said


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """The parts of base models that are loaded."""
    found: list[str] = []
    load = Base.load
    monkeypatch.setattr(Base, "load", lambda base, part, *given: (found.append(part), load(base, part, *given))[1])
    return found


def test_batches_with_one_model_load_it_once_and_draw_the_same(base, loads: list[str]) -> None:
    loras = [(random_lora(base), 0.5)]
    given = [
        PictureJob("a photo", 1, size=(64, 80), steps=2, guidance=1.0, strength=strength) for strength in (0.5, 1.0)
    ]
    start = Image.new("RGB", (64, 80), (90, 120, 150))
    starts = dict.fromkeys(given, start)
    apart = [*generate(base, loras, given), *generate(base, loras, given, starts=starts, denoise=0.5)]
    assert loads == ["text_encoder", "denoiser", "vae"] * 2
    loads.clear()
    with DrawingModel(base, keeps_originals=True) as model:
        drawn = list(generate(base, loras, given, model=model))
        again = list(generate(base, loras, given, starts=starts, denoise=0.5, model=model))
        # Other words need the text encoders, for which the denoiser makes room.
        more = list(generate(base, loras, [replace(given[0], prompt="a drawing")], model=model))
    assert loads == ["text_encoder", "denoiser", "vae"] * 2 and len(more) == 1
    pictures = {(at > 1, picture.job): picture.image.tobytes() for at, picture in enumerate(apart)}
    assert pictures == {(at > 1, picture.job): picture.image.tobytes() for at, picture in enumerate(drawn + again)}


def test_a_model_changed_for_good_is_loaded_again_when_needed(base, loads: list[str]) -> None:
    loras = [(random_lora(base), 0.5)]
    given = [
        PictureJob("a photo", 1, size=(64, 80), steps=1, guidance=1.0, strength=strength) for strength in (0.5, 1.0)
    ]
    with DrawingModel(base) as model:
        drawn = [next(generate(base, loras, [job], model=model)).image.tobytes() for job in given]
    assert loads.count("denoiser") == 2
    assert drawn == [next(generate(base, loras, [job])).image.tobytes() for job in given]


def test_nothing_is_left_of_a_lora_that_could_not_be_applied_for_good(base) -> None:
    job, lora = PictureJob("a photo", 1, size=(64, 80), steps=1, guidance=1.0), random_lora(base)
    last = [name for name in lora.tensors if name.endswith("lora_B.weight")][-1]
    broken = {name: lora.tensors[name] * (math.nan if name == last else 1) for name in lora.tensors}
    with DrawingModel(base) as model:
        before = next(generate(base, [], [job], model=model))
        with pytest.raises(UnmatchedKeys, match="NaN"):
            next(generate(base, [(LoraFile.from_tensors(broken, lora.metadata), 1.0)], [job], model=model))
        after = next(generate(base, [], [job], model=model))
    assert after.image.tobytes() == before.image.tobytes()


def test_a_batch_and_its_face_pass_load_one_model(base, tmp_path: Path, loads: list[str]) -> None:
    drawn, missing = (PictureJob("a photo of person", seed, size=(160, 200), steps=2, guidance=1.0) for seed in (1, 2))
    photos = person_photos(36)
    small_face(base, drawn, tmp_path, photos[0])
    shots = make_headshots(base, [], [drawn, missing], tmp_path, reference=photos[:2], face_pass=FacePass(below=0.6))
    assert any(shot.face_pass for shot in shots) and loads == ["text_encoder", "denoiser", "vae"]


def test_a_picture_of_another_embedding_is_made_again(base, tmp_path: Path) -> None:
    job = PictureJob("a photo of face", 1, size=(64, 80), steps=1)
    pictures = []
    for value in (0.1, 3.0):
        metadata = {"ss_base_model_version": "sd_v1"}
        LoraFile.from_tensors({"emb_params": torch.full((1, 64), value)}, metadata).save(tmp_path / "face.safetensors")
        lora = LoraFile.read(tmp_path / "face.safetensors")
        (shot,) = make_headshots(base, [(lora, 1.0)], [job], tmp_path / "pictures")
        with Image.open(shot.path) as image:
            pictures.append(image.tobytes())
            said = read_as_a1111_does(image.info["parameters"])[2]
        assert said["TI hashes"] == f"face: {file_hashes(tmp_path / 'face.safetensors')['sha256'][:12]}"
    assert pictures[0] != pictures[1]


def test_the_parameters_name_another_vae_file_by_its_hash(tmp_path: Path) -> None:
    vae = {name: tensor for name, tensor in load_file(BASE_FILE).items() if name.startswith("first_stage_model.")}
    save_file(vae, tmp_path / "vae.safetensors")
    other = load_base(BASE_FILE, vae=tmp_path / "vae.safetensors")
    _, _, said = read_as_a1111_does(parameters_text(other, [], jobs(1)[0], GenerateConfig()))
    digest = hashlib.sha256((tmp_path / "vae.safetensors").read_bytes()).hexdigest()
    assert (said["VAE"], said["VAE hash"]) == ("vae.safetensors", digest[:10])


def test_a_picture_by_another_gguf_file_of_the_same_name_is_made_again(tmp_path: Path) -> None:
    kinds, tensors = gguf.GGMLQuantizationType, load_file(BASE_FILE)
    prefix, path = "model.diffusion_model.", tmp_path / "unet.gguf"
    for factor in (1.0, 0.9):
        weights = {name.removeprefix(prefix): factor * one for name, one in tensors.items() if name.startswith(prefix)}
        write_gguf(path, {name: (one, kinds.F16 if one.ndim > 1 else kinds.F32) for name, one in weights.items()})
        base = load_base(path, vae=tensors, text_encoders=[tensors])
        (shot,) = make_headshots(base, [], jobs(1), tmp_path / "out")
        assert (
            f"Model hash: {hashlib.sha256(path.read_bytes()).hexdigest()[:10]}"
            in Image.open(shot.path).info["parameters"]
        )
    assert (tmp_path / "out" / "earlier" / shot.path.name).exists()


def test_another_kind_of_prediction_makes_another_picture(tmp_path: Path) -> None:
    command = ["generate", "--base", str(BASE_FILE), "--output", str(tmp_path), "--prompt", "a photo of person"]
    command += ["--count", "1", "--size", "64x80", "--steps", "1"]
    pictures, said = [], []
    for options in ([], ["--prediction-type", "v_prediction", "--zero-terminal-snr"]):
        assert main([*command, *options]) == 0
        with Image.open(tmp_path / "001-1.png") as image:
            pictures.append(image.tobytes())
            said.append(read_as_a1111_does(image.info["parameters"])[2])
    assert pictures[0] != pictures[1]
    assert said[1] == said[0] | {"Prediction": "v", "Zero terminal SNR": "True"} != said[0]


def test_text_beyond_ascii_survives_in_the_png(tmp_path: Path) -> None:
    picture = Picture(Image.new("RGB", (8, 8)), PictureJob("x", 1), "Zoë à Zürich\nNegative prompt: \nSteps: 1")
    picture.save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").info["parameters"] == picture.parameters
    assert "Zoë à Zürich".encode() in (tmp_path / "a.png").read_bytes()  # as UTF-8, which ComfyUI expects


def test_a_long_row_of_a_sheet_goes_on_below() -> None:
    tiles = [Image.new("RGB", (40, 40), colour) for colour in ("red", "green", "blue")]
    one, wrapped = (contact_sheet([("a", tiles)], tile=40, columns=columns) for columns in (3, 2))
    labelled = contact_sheet([("a", tiles)], tile=40, columns=2, labels=[["1", "2", "3"]])
    assert wrapped.height == one.height + 48 and labelled.height == one.height + 48 + 2 * 20
    assert wrapped.getpixel((20, one.height + 20)) == (0, 0, 255)
    assert contact_sheet([("a", [Image.new("RGB", (1000, 1))])], tile=40).width < 2100, "one is not 40,000 pixels wide"


# Ranked and kept


def batch_with_faces(base, folder: Path) -> list[PictureJob]:
    """Five jobs whose pictures are there as if they had been drawn: four people and one without a face."""
    made = [*(person_photos(person)[3].convert("RGB").resize((64, 80)) for person in (1, 2, 4, 1)), None]
    for number, (job, image) in enumerate(zip(jobs(5), made, strict=True), start=1):
        picture = Picture(image or Image.new("RGB", (64, 80)), job, parameters_text(base, [], job, GenerateConfig()))
        picture.save(folder / f"{number:03d}-{job.seed}.png")
    return jobs(5)


def test_pictures_are_ranked_by_likeness_and_the_best_are_kept(base, tmp_path: Path) -> None:
    photos = person_photos(1)[:2]
    shots = make_headshots(base, [], batch_with_faces(base, tmp_path), tmp_path, reference=photos, keep=2)
    assert [shot.job.seed for shot in shots][:2] == [0, 3]  # person 1
    assert shots[-1].likeness is None
    scores = [shot.likeness for shot in shots if shot.likeness is not None]
    assert scores == sorted(scores, reverse=True)
    expected = Reference.on(photos).likeness([Image.open(shot.path) for shot in shots])
    assert [shot.likeness for shot in shots] == expected
    kept = [shot for shot in shots if shot.kept]
    assert kept == shots[:2]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {shot.path.name for shot in kept}
    described = json.loads((tmp_path / "headshots.json").read_text())
    assert [entry["file"] for entry in described["headshots"]] == [shot.path.name for shot in shots]
    assert [entry["kept"] for entry in described["headshots"]] == [shot.kept for shot in shots]
    means = [float(np.mean([score or 0 for score in those])) for those in (expected[:2], expected)]
    assert described["mean_likeness"] == pytest.approx(means[1], abs=1e-4)
    page = html.unescape((tmp_path / "gallery.html").read_text("utf-8"))
    assert f"5 pictures, the 2 most alike kept: mean likeness {means[0]:.2f}, or {means[1]:.2f} for all" in page
    assert len(re.findall("<figure ", page)) == 5


def test_pictures_of_somebody_else_are_not_kept(base, tmp_path: Path) -> None:
    shots = make_headshots(base, [], batch_with_faces(base, tmp_path), tmp_path, reference=person_photos(7)[:2], keep=3)
    assert not any(shot.kept for shot in shots) and list((tmp_path / "kept").iterdir()) == []
    best = f"none alike enough: the best likeness is {shots[0].likeness:.2f}, and the same person needs {SAME_PERSON}"
    assert batch_summary(shots) == f"5 pictures, {best}"
    assert f"the best {TO_TRAINED_ON} is" in batch_summary(shots, measure=TO_TRAINED_ON)
    assert best in (tmp_path / "gallery.html").read_text("utf-8")


def test_where_no_picture_has_a_face_the_line_on_the_batch_says_so(base, tmp_path: Path, capsys) -> None:
    job = PictureJob("a photo of person", 1, size=(64, 80), steps=1, guidance=1.0)
    write_photos(tmp_path / "photos", count=1, person=1)
    picture = Picture(Image.new("RGB", (64, 80)), job, parameters_text(base, [], job, GenerateConfig()))
    command = ["generate", "--base", "demo", "--prompt", job.prompt, "--count", "1", "--steps", "1", "--guidance", "1"]
    command += ["--size", "64x80", "--output", str(tmp_path / "out")]
    (tmp_path / "out").mkdir()
    picture.save(tmp_path / "out" / "001-1.png")
    for options, said in (["--reference", str(tmp_path / "photos")], ", none with a face"), ([], ""):
        assert main([*command, *options]) == 0
        assert capsys.readouterr().out.startswith(f"1 picture{said}\n")
        assert f"<p>1 picture{said}</p>" in (tmp_path / "out" / "gallery.html").read_text("utf-8")
    nobody = [Headshot(tmp_path / "001-1.png", job, None)]
    assert batch_summary(nobody, people=2) == "1 picture, none with a face of everyone"


def test_a_second_choice_replaces_the_first_and_leaves_other_files_alone(base, tmp_path: Path) -> None:
    photos = person_photos(1)[:2]
    batch = batch_with_faces(base, tmp_path)
    make_headshots(base, [], batch, tmp_path, reference=photos, keep=9)
    assert len(list((tmp_path / "kept").iterdir())) == 2  # not the one without a face, nor those of other people
    (tmp_path / "kept" / "mine.png").write_bytes(b"")
    before = times(tmp_path)
    shots = make_headshots(base, [], batch, tmp_path, reference=photos)  # a quarter
    names = {path.name for path in (tmp_path / "kept").iterdir()}
    assert names == {"mine.png", *(shot.path.name for shot in shots if shot.kept)}
    assert len(names) == 1 + 2
    assert times(tmp_path) == before


def test_what_an_earlier_batch_kept_is_set_aside(base, tmp_path: Path) -> None:
    photos = person_photos(1)[:2]
    make_headshots(base, [], batch_with_faces(base, tmp_path), tmp_path, reference=photos, keep=9)
    kept = {path.name: path.read_bytes() for path in (tmp_path / "kept").iterdir()}
    make_headshots(base, [], [replace(jobs(1)[0], prompt="another")], tmp_path)  # not ranked
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["earlier"]
    (aside,) = (tmp_path / "kept" / "earlier").iterdir()  # the others are where they were, beside the folder
    assert aside.read_bytes() == kept["001-0.png"]
    assert all((tmp_path / name).read_bytes() == kept[name] for name in kept if name != "001-0.png")


def test_a_command_for_more_of_a_picture_has_what_it_depends_on(base, tmp_path: Path) -> None:
    used = load_base(BASE_FILE, prediction_type="v_prediction", zero_terminal_snr=True)
    for one, config, wanted in (
        (
            used,
            GenerateConfig(sampler="euler"),
            ["--prediction-type=v_prediction", "--zero-terminal-snr", "--sampler=euler"],
        ),
        (base, GenerateConfig(), []),
        (load_base(load_file(BASE_FILE)), GenerateConfig(sampler="euler"), None),
    ):
        make_headshots(one, [], jobs(1), tmp_path, config)
        data = json.loads((tmp_path / "headshots.json").read_text("utf-8"))
        assert data["headshots"][0]["models"] == ([] if wanted is None else ["--base=demo", *wanted])
        assert all(option in (tmp_path / "gallery.html").read_text("utf-8") for option in wanted or ())


def test_the_vae_may_come_from_another_checkpoint_of_the_same_tensors(tmp_path: Path) -> None:
    other = shutil.copy(BASE_FILE, tmp_path / "other.safetensors")
    make_headshots(load_base(BASE_FILE, vae=other), [], jobs(1), tmp_path)
    data = json.loads((tmp_path / "headshots.json").read_text("utf-8"))
    assert data["headshots"][0]["models"] == ["--base=demo", "--vae=other.safetensors"]


@pytest.mark.parametrize("overview", [None, "mine", '{"headshots": [{"mine": 1}]}', '{"headshots": 1}', "[]"])
def test_files_of_others_with_the_names_of_a_batch_are_set_aside(base, tmp_path: Path, overview: str | None) -> None:
    theirs = {"gallery.html": "mine", "contact_sheet.png": "mine"} | ({"headshots.json": overview} if overview else {})
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    for _ in range(2):
        make_headshots(base, [], jobs(1), tmp_path)
    assert {path.name: path.read_text() for path in (tmp_path / "earlier").iterdir()} == theirs


def test_neither_the_page_nor_its_data_name_a_folder_of_the_machine(base, tmp_path: Path) -> None:
    home, folder = tmp_path / "janes-home", tmp_path / "janes-home" / "janes-pictures"
    own, elsewhere = folder / "loras" / "anna.safetensors", home / "janes-models" / "grey.safetensors"
    for path in (own, elsewhere):
        path.parent.mkdir(parents=True)
        random_lora(base, r".*attn1\.to_q").save(path)
    (home / "x.safetensors").symlink_to(BASE_FILE)
    loras = [(LoraFile.read(path), 1.0) for path in (own, elsewhere)]
    named = [f"--lora={Path('loras', 'anna.safetensors')}:1", "--lora=grey.safetensors:1"]
    for used, name in ((load_base(home / "x.safetensors"), "x.safetensors"), (base, "demo")):
        make_headshots(used, loras, jobs(1), folder)
        page, data = ((folder / file).read_text("utf-8") for file in ("gallery.html", "headshots.json"))
        assert json.loads(data)["headshots"][0]["models"] == [f"--base={name}", *named]
        assert all(f"--base={name}" in text for text in (page, data))
        assert not {*home.parts, "janes-pictures", "janes-models", ".."} & {*re.findall(r"[\w.-]+", page + data)}


def test_what_cannot_be_compared_is_refused(base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadConfig, match="keep: photos of the person are required"):
        make_headshots(base, [], jobs(1), tmp_path, keep=1)
    with pytest.raises(BadConfig, match="keep = 0: must be at least 1"):
        make_headshots(base, [], jobs(1), tmp_path, keep=0, reference=person_photos(1)[:1])
    with pytest.raises(BadPhoto, match="no face was found in the 1 photo to"):
        make_headshots(base, [], jobs(1), tmp_path, reference=[Image.new("RGB", (64, 64))])
    assert not times(tmp_path)  # all of this is said before anything is drawn
    arguments = ["generate", "--base", str(BASE_FILE), "--prompt", "a", "--output", str(tmp_path)]
    for option in ("--keep", "--face-pass", "--face-denoise"):
        assert main([*arguments, option, "1"]) == 1
        assert capsys.readouterr().err == f"facelora: {option} requires --reference PHOTOS, to measure likeness\n"
    assert main([*arguments, "--reference", str(tmp_path)]) == 1
    assert "this command reads this folder" in capsys.readouterr().err and not times(tmp_path)


# The face pass


def face(left: float, top: float, right: float, bottom: float) -> Face:
    return Face((left, top, right, bottom), np.zeros((5, 2), np.float32), 1.0)


def test_a_cut_out_is_the_face_at_its_share_in_the_pictures_aspect() -> None:
    picture = Image.new("RGB", (1000, 500))
    part = cut_out(picture, face(480, 240, 520, 280), share=0.5, resolution=512, size_multiple=64)
    assert part is not None
    left, top, right, bottom = part.box
    assert part.image.size == (640, 384)
    assert (right - left) / (bottom - top) == pytest.approx(640 / 384, rel=0.02)
    assert 40 / ((right - left) * (bottom - top)) ** 0.5 == pytest.approx(0.5, rel=0.02)
    assert ((left + right) / 2, (top + bottom) / 2) == pytest.approx((500, 260), abs=1)


def test_a_cut_out_at_the_edge_stays_inside_with_its_aspect() -> None:
    part = cut_out(Image.new("RGB", (1000, 1000)), face(-10, 960, 40, 1010), 0.5, 512, 64)
    assert part is not None
    assert part.box == (0, 900, 100, 1000)


def test_a_large_face_has_nothing_to_gain() -> None:
    assert cut_out(Image.new("RGB", (512, 512)), face(100, 100, 400, 400), 0.5, 512, 64) is None
    assert not FacePass(below=0.25).wants(face(0, 0, 128, 128), 512)
    assert FacePass(below=0.25).wants(face(0, 0, 127, 127), 512)


def test_blending_changes_the_face_and_nothing_far_from_it_without_a_seam() -> None:
    picture = Image.new("RGB", (400, 400), (100, 100, 100))
    part = cut_out(picture, face(180, 180, 220, 220), 0.5, 512, 64)
    assert part is not None
    result = np.asarray(blend(picture, part, Image.new("RGB", part.image.size, (200, 200, 200))), int)[..., 0]
    assert result[200, 200] == 200
    left, top, right, bottom = part.box
    outside = np.ones_like(result, bool)
    outside[top:bottom, left:right] = False
    assert (result[outside] == 100).all()
    assert abs(np.diff(result, axis=1)).max() < 30  # of 100: the edge is spread over several pixels


@pytest.mark.parametrize("wrong", [{"below": -0.1}, {"below": 1.5}, {"denoise": 0.0}, {"denoise": 1.1}])
def test_face_pass_settings_that_cannot_work_are_refused(wrong) -> None:
    with pytest.raises(BadConfig, match=next(iter(wrong))):
        FacePass(**wrong)


def small_face(base, job: PictureJob, folder: Path, photo: Image.Image, number: int = 1) -> Path:
    """The job's picture as if it had been drawn: the photo small on grey."""
    picture = Image.new("RGB", job.size or (0, 0), (120, 120, 120))
    picture.paste(photo.convert("RGB").resize((40, 50), Image.Resampling.LANCZOS), (60, 50))
    folder.mkdir(exist_ok=True)
    path = folder / f"{number:03d}-{job.seed}.png"
    Picture(picture, job, parameters_text(base, [], job, GenerateConfig())).save(path)
    return path


def test_a_new_face_that_is_more_like_the_person_is_taken_once(base, tmp_path: Path) -> None:
    drawn = PictureJob("a photo of person", 3, size=(64, 80), steps=3, guidance=2.5)
    while not Reference.on([person_photos(1)[0]]).network.detect(person := next(generate(base, [], [drawn])).image):
        drawn = PictureJob(drawn.prompt, drawn.seed + 1, size=drawn.size, steps=3, guidance=2.5)
    # To draw the whole of the face anew from the same seed makes the person that the base draws there: the reference.
    job = PictureJob(drawn.prompt, drawn.seed, size=(160, 200), steps=3, guidance=2.5)
    path = small_face(base, job, tmp_path, person_photos(2)[0])
    before = np.asarray(Image.open(path), int)
    settings = FacePass(below=0.6, denoise=1.0)
    (shot,) = make_headshots(base, [], [job], tmp_path, reference=[person], face_pass=settings)
    assert shot.face_pass is not None and shot.face_pass.kept
    assert shot.face_pass.after is not None and shot.face_pass.after > shot.face_pass.before + 0.1
    assert shot.likeness == shot.face_pass.after
    after = np.asarray(Image.open(path), int)
    changed = np.flatnonzero(abs(after - before).max(axis=(0, 2)) > 0)
    assert 0 < len(changed) < 80  # of 160 columns
    assert f"{shot.face_pass.before:.2f} → {shot.face_pass.after:.2f}, used" in (tmp_path / "gallery.html").read_text()
    first = times(tmp_path)
    assert make_headshots(base, [], [job], tmp_path, reference=[person], face_pass=settings) == [shot]
    assert times(tmp_path) == first
    # Without the pass, the picture as it was drawn first is wanted: it has to be made.
    (plain,) = make_headshots(base, [], [job], tmp_path, reference=[person], face_pass=FacePass(below=0))
    assert plain.face_pass is None and times(tmp_path) != first


def test_only_faces_of_the_more_alike_half_are_drawn_again(base, tmp_path: Path) -> None:
    jobs = [PictureJob("a photo of person", seed, size=(160, 200), steps=1, guidance=1.0) for seed in range(5)]
    shown = [person_photos(2)[0], person_photos(36)[0], person_photos(3)[0], person_photos(36)[1], person_photos(4)[0]]
    for number, (job, photo) in enumerate(zip(jobs, shown, strict=True), start=1):
        small_face(base, job, tmp_path, photo, number)
    settings, photos = FacePass(below=0.6, denoise=1.0), person_photos(36)[2:4]

    def redrawn(keep: int | None = None) -> set[int]:
        shots = make_headshots(base, [], jobs, tmp_path, reference=photos, face_pass=settings, keep=keep)
        return {shot.job.seed for shot in shots if shot.face_pass}

    first = redrawn()
    assert len(first) == 3 and {1, 3} < first  # of five
    assert redrawn() == first
    assert redrawn(keep=4) > first  # All that may be kept are worth it.


def test_a_clip_skip_that_the_base_does_not_have_is_refused(base) -> None:
    for layer, words in ((0, "must be at least 1"), (99, "the text encoder has 2 layers")):
        with pytest.raises(BadConfig, match=f"clip_skip = {layer}: {words}"):
            next(generate(base, [], jobs(1), GenerateConfig(clip_skip=layer)))


@pytest.mark.parametrize("strength", [math.nan, math.inf, "0.9"])
def test_a_strength_that_is_not_finite_is_refused(base, strength) -> None:
    word = LoraFile("sd15", {}, {"emb_params": torch.zeros(1, 64)}, name="word.safetensors")
    with pytest.raises(BadConfig, match=f"word.safetensors: strength = {strength!r}: must be a finite number"):
        next(generate(base, [(word, strength)], jobs(1)))


def test_a_picture_of_nan_is_refused_instead_of_drawn_black(base, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"base.safetensors: a picture became NaN or infinite; use a lower strength"):
        make_headshots(base, [(random_lora(base, ".*attn1.*"), 1e30)], jobs(1), tmp_path)
    assert not times(tmp_path)


def test_numpys_integers_are_seeds_and_what_is_not_loaded_is_named(base) -> None:
    job = PictureJob("a photo", np.int64(3), size=(64, 80), steps=1, guidance=1.0)  # pyright: ignore[reportArgumentType]
    (picture,) = generate(base, [], [job])
    assert picture.job.seed == 3 and type(picture.job.seed) is int
    for wrong in (["me.safetensors"], [("me.safetensors", 1.0)]):
        with pytest.raises(BadConfig, match=r"me\.safetensors.*LoraFile\.read"):
            next(generate(base, wrong, [job]))  # pyright: ignore[reportArgumentType]
    with pytest.raises(BadConfig, match=r"sd15\.safetensors.*load_base"):
        next(generate("sd15.safetensors", [], [job]))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("sampler", mostly_slow(SAMPLERS, "dpmpp_2m_sde_karras"))
def test_many_steps_are_taken_and_begin_near_pure_noise(base, sampler: str) -> None:
    noise = torch.zeros(1, 4, 4, 4)
    firsts = [float(build_sampler(sampler, base, steps, noise).timesteps[0]) for steps in (30, 150, 300, 501, 1000)]
    assert min(firsts) > 890 and max(firsts) < 1000
    blind = replace(base, family=replace(base.family, predict=lambda denoiser, noisy, *others: torch.zeros_like(noisy)))
    text = [{"context": torch.zeros(1, 77, 64)}]
    latents = sample_latents(
        blind, torch.nn.Identity(), text, text, device=torch.device("cpu"), dtype=torch.float32, seeds=[1], size=(32, 32),
        steps=1000, guidance=1.0, sampler=sampler,
    )  # fmt: skip
    assert latents.isfinite().all()


@pytest.mark.parametrize(
    ("model", "name", "steps"),
    [
        ("sdxl", "JuggernautXL_Lightning", 8), ("sdxl", "splashedMixDMD", 8), ("sdxl", "sdxl_lightning_4step", 4),
        ("sdxl", "lcmix_12000steps", None), ("sd15", "realisticVisionV60B1_v51HyperVAE", 8), ("sd15", "Hyper-Realism", None),
    ],
)  # fmt: skip
def test_lightning_and_hyper_draw_in_a_few_even_steps_from_pure_noise(
    model, name: str, steps: int | None, request
) -> None:
    base = replace(load_base(request.getfixturevalue(f"small_{model}")), name=f"{name}.safetensors")
    distilled = steps is not None
    job = PictureJob("a photo", 1, steps=30, guidance=7.0).on(base)
    assert (job.steps, job.guidance) == ((steps, 1.0) if distilled else (30, 7.0))
    times = build_sampler(None, base, 8, torch.zeros(1, 4, 8, 8)).timesteps.tolist()
    assert (times == [999, 874, 749, 624, 499, 374, 249, 124]) == distilled  # Those of SDXL-Lightning's authors.
    _, _, settings = read_as_a1111_does(parameters_text(base, [], job, GenerateConfig()))
    assert (settings["Sampler"], settings.get("Schedule type")) == (
        ("Euler", "SGM Uniform") if distilled else ("DPM++ 2M Karras", None)
    )


@pytest.mark.parametrize("sampler", mostly_slow(SAMPLERS, "dpmpp_2m_sde_karras"))
def test_drawing_anew_with_few_steps_stays_near_the_picture(base, sampler: str) -> None:
    photo = person_photos(1)[0].convert("RGB").resize((64, 80), Image.Resampling.LANCZOS)
    job = PictureJob("a photo of person", 1, size=(64, 80), steps=10, guidance=1)

    def distance(denoise: float) -> float:
        config = GenerateConfig(sampler)
        (picture,) = generate(base, [], [job], config, starts={job: photo}, denoise=denoise)
        return float(np.abs(np.asarray(picture.image, int) - np.asarray(photo, int)).mean())

    assert distance(0.1) < 12 < distance(1.0)  # of 255


def test_a_picture_to_redraw_belongs_to_its_job_and_has_its_size(base) -> None:
    job, photo = PictureJob("a photo of person", 1, steps=1, guidance=1), Image.new("L", (72, 72))
    (picture,) = generate(base, [], [job], starts={job: photo}, denoise=0.5)
    assert picture.job.size == photo.size
    with pytest.raises(BadConfig, match="starts: 'a photo of person' with seed 1 needs a picture of 72x72 pixels"):
        next(generate(base, [], [job], starts={job: photo.resize((92, 112))}, denoise=0.5))
    with pytest.raises(BadConfig, match="starts: 'a photo of person' with seed 2 needs a picture of 72x72 pixels"):
        next(generate(base, [], [job, replace(job, seed=2)], starts={job: photo}, denoise=0.5))
    with pytest.raises(BadConfig, match=r"denoise = 35: must be above 0, up to 1"):
        next(generate(base, [], [job], starts={job: photo}, denoise=35))


# The command line


def test_seeds_begin_again_at_0_after_the_largest(tmp_path: Path, capsys) -> None:
    command = ["generate", "--base", "demo", "--output", str(tmp_path / "out"), "--prompt", "a photo of person"]
    command += ["--steps", "1", "--size", "64x80"]
    assert main([*command, "--count", "2", "--seed", str(2**64 - 1)]) == 0
    assert {path.name for path in (tmp_path / "out").glob("0*.png")} == {f"001-{2**64 - 1}.png", "002-0.png"}
    assert main([*command, "--seed", "-1"]) == 1
    assert "seed = -1: must be between 0 and 2**64 - 1" in capsys.readouterr().err
    assert main([*command, "--style-folder", str(tmp_path)]) == 1
    assert "--style-folder require --style-pack" in capsys.readouterr().err


def test_a_prompt_that_is_given_twice_is_refused(base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--base", str(BASE_FILE), "--output", str(tmp_path), "--prompt", "a", "--prompt", "a"]
    assert main(command) == 1
    assert "--prompt 'a' is given twice" in capsys.readouterr().err
    with pytest.raises(BadConfig, match="2 pictures of 'a photo of person' with seed 0 would be the same"):
        make_headshots(base, [], jobs(1) * 2, tmp_path)


def test_what_other_programs_take_for_more_than_text_is_warned_of(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--base", str(BASE_FILE), "--output", str(tmp_path), "--count", "1", "--size", "64x64"]
    command += ["--steps", "1", "--prompt", "a photo (of: a person), 16:9", "--prompt", "a <lora:anna:0.8> (smile:1.2)"]
    assert main([*command, "--negative", "[blurry:0.5] BREAK ((hat))"]) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    named = ["((hat))", "(smile:1.2)", "<lora:anna:0.8>", "BREAK", "[blurry:0.5]"]
    assert [warning.split("'")[1] for warning in warnings] == named


def test_the_packs_are_listed_without_a_base_and_drawing_asks_for_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--style-pack", "list"]) == 0
    listed = capsys.readouterr().out
    assert "corporate: Corporate\n    Classic grey studio\n" in listed and "demo: " not in listed
    assert main(["generate", "--base", "demo", "--style-pack", "list"]) == 0
    assert "demo: What the demo's base model knows\n    Photo\n" in capsys.readouterr().out
    assert main(["generate", "--style-pack", "corporate", "--output", "x"]) == 1
    assert capsys.readouterr().err == "facelora: --base FILE is missing\n"


def test_a_larger_count_begins_with_the_pictures_that_are_there(tmp_path: Path) -> None:
    arguments = ["generate", "--base", str(BASE_FILE), "--prompt", "a photo of person", "--prompt", "a face"]
    arguments += ["--steps", "1", "--size", "64x80", "--output", str(tmp_path), "--count"]
    assert main([*arguments, "1"]) == 0
    made = times(tmp_path)
    assert main([*arguments, "2"]) == 0
    assert len(times(tmp_path)) == 4
    assert made.items() <= times(tmp_path).items()


def test_names_of_packs_and_styles_cannot_write_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    styles = [{"name": "Plain\x1b[2J", "prompt": "{prompt}"}, {"name": "Bad\n\x1b[H", "prompt": 3}]
    (tmp_path / "a\x1b[1m\nb.json").write_text(json.dumps(styles))
    assert main(["generate", "--style-pack", "list", "--style-folder", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "a\ufffd[1m\ufffdb: a\ufffd[1m\ufffdb\n    Plain\ufffd[2J\n" in said.out
    assert said.err.startswith("warning: a\ufffd[1m\ufffdb.json: style ") and said.err.count("\n") == 1
    assert "\x1b" not in said.out + said.err


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"strength": math.nan}, "strength = nan: must be finite"),
        ({"strength": -math.inf}, "strength = -inf: must be finite"),
        ({"size": (3, 64)}, "size 3x64: width and height must be at least 16"),
        ({"guidance": math.nan}, "guidance = nan: must be between 0 and 100"),
        ({"steps": 0}, "steps = 0"),
        ({"prompt": "half \ud83d"}, "prompt"),
        ({"negative": "\udcff"}, "negative"),
    ],
)
def test_a_job_that_makes_no_picture_is_refused(wrong, said) -> None:
    with pytest.raises(BadConfig, match=f"^{said}"):
        PictureJob(**{"prompt": "a photo", "seed": 1, **wrong})


def test_a_second_batch_into_one_folder_is_refused(base, tmp_path: Path) -> None:
    leftover = tmp_path / ".001-1.png.0123abcd.tmp"
    leftover.touch()
    with (
        held_elsewhere(tmp_path / "headshots.json"),
        pytest.raises(InUse, match=r"headshots\.json: another process is"),
    ):
        make_headshots(base, [], jobs(1), tmp_path)
    assert [*tmp_path.iterdir()] == [leftover]


def test_a_prompt_beyond_77_tokens_is_reported_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = "{prompt}, " + ", ".join(["a wall of old red bricks"] * 20)
    (tmp_path / "long.json").write_text(json.dumps([{"name": "Wall", "prompt": prompt}]))
    arguments = ["generate", "--base", str(BASE_FILE), "--style-pack", "long", "--style-folder", str(tmp_path)]
    arguments += ["--subject", "sks person", "--count", "1", "--steps", "1", "--size", "64x80"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 0
    assert "style 'Wall'" in (warning := capsys.readouterr().err) and "it is encoded in several chunks" in warning
    assert len(times(tmp_path / "out")) == 1


@pytest.mark.slow
def test_a_new_face_that_is_less_like_the_person_is_not_taken(base, tmp_path: Path) -> None:
    photos = person_photos(36)  # whom the base has never seen
    job = PictureJob("a photo of person", 3, size=(160, 200), steps=5, guidance=2.5)
    path = small_face(base, job, tmp_path, photos[0])
    before = Image.open(path).convert("RGB").tobytes()
    settings = FacePass(below=0.6, denoise=1.0)
    (shot,) = make_headshots(base, [], [job], tmp_path, reference=photos, face_pass=settings)
    assert shot.face_pass is not None and not shot.face_pass.kept
    assert shot.likeness == shot.face_pass.before
    assert Image.open(path).convert("RGB").tobytes() == before
    first = times(tmp_path)
    make_headshots(base, [], [job], tmp_path, reference=photos, face_pass=settings)
    assert times(tmp_path) == first  # tried once
