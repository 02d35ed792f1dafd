"""Several people in one picture: whose words, whose region, whose LoRA and whose face."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import core.pictures.drawing_model as drawing_model
import core.pictures.group as group_module
import core.pictures.group_batch as faces_module
from core import GenerateConfig, LoraFile, LoraModule, PictureJob, generate
from core.cli import main
from core.cli.generate import region_from
from core.demo.people import person_photos
from core.errors import BadConfig, LoraMisfit
from core.faces import Face, Reference
from core.models.families import FAMILIES
from core.pictures import (
    FacePass,
    Group,
    GroupMember,
    GroupReference,
    Mask,
    generate_group,
    make_group_pictures,
    redraw_faces,
)
from core.pictures.generate import Picture
from core.pictures.group import MOST_PEOPLE, RelativeBox, group_parameters, shows_several, side_by_side
from core.pictures.group_batch import assign_faces
from core.pictures.parameters import Parameters
from tests.tooling import small_flow_base

PROMPT = "a photo of {anna} and {ben}"
CPU = torch.device("cpu")


def lora(seed: int, phrase: str = "") -> LoraFile:
    """A LoRA that changes one layer of the demo's base at random."""
    generator, name = (
        torch.Generator().manual_seed(seed),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
    )
    shapes = {f"{name}.lora_down.weight": (2, 128), f"{name}.lora_up.weight": (128, 2)}
    metadata = {"ss_base_model_version": "sd_v1"} | ({"modelspec.trigger_phrase": phrase} if phrase else {})
    tensors = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return LoraFile.from_tensors(tensors, metadata, name=f"{seed}.safetensors")


ANNA, BEN = GroupMember("anna", lora(1), "sks woman"), GroupMember("ben", lora(2), "ohwx man")
COUPLE = Group((ANNA, BEN))
JOB = PictureJob(PROMPT, 3, size=(128, 80), steps=1, guidance=1.0)


# Words


@pytest.mark.parametrize(
    ("prompt", "of_anna", "of_scene"),
    [
        ("{anna} and {ben} in an office", "sks woman in an office", "woman and man in an office"),
        ("a photo of {ben} with {anna}", "a photo of sks woman", "a photo of man with woman"),
        ("{ben}, {anna}", "sks woman", "man, woman"),
        ("{anna} in red, {ben} in blue", "sks woman in red, man in blue", "woman in red, man in blue"),
    ],
)
def test_each_reads_of_a_list_of_names_the_own_one_alone(prompt, of_anna, of_scene) -> None:
    assert COUPLE.words_of(ANNA, prompt) == of_anna
    assert COUPLE.scene_words(prompt) == of_scene


def test_of_three_in_a_list_one_is_left() -> None:
    three = Group((ANNA, BEN, replace(BEN, name="carl", phrase="zwx man")))
    assert three.words_of(three.people[2], "{anna}, {ben}, and {carl} at home") == "zwx man at home"
    assert three.everyones_words("{anna}, {ben} and {carl}") == "sks woman, ohwx man and zwx man"


# What is refused


@pytest.mark.parametrize(
    ("people", "layout", "said"),
    [
        ((ANNA, replace(BEN, name="anna")), (), "person 'anna' is given twice"),
        ((ANNA, replace(BEN, name="{ben}")), (), "person '{ben}': a name must be one word without braces"),
        ((ANNA, replace(BEN, name="{" * 900)), (), f"person '{'{' * 80}': a name must be one word without braces"),
        ((), (), f"0 people: a picture can have 1 to {MOST_PEOPLE}"),
        ((ANNA, BEN), side_by_side(3), "3 regions for 2 people: give one for each person"),
        ((ANNA, BEN), ((0, 0, 0.5, 1), (0.7, 0, 0.6, 1)), "region of ben: 0.7,0,0.6,1: must be left,top,right,bottom"),
        ((ANNA, BEN), ((0, 0, 0.5, 1), (0.5, 0, float("nan"), 1)), "region of ben: 0.5,0,nan,1: must be"),
    ],
)
def test_people_and_layouts_that_make_no_group_are_refused(people, layout, said: str) -> None:
    with pytest.raises(BadConfig) as refused:
        Group(people, layout)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("{anna} and {bob}", "{bob} is not in the group; use {anna}, {ben}"),
        ("{anna} at home", "{ben} is missing; name everyone in the prompt"),
    ],
)
def test_a_prompt_that_names_somebody_else_or_not_everyone_is_refused(base, prompt: str, said: str) -> None:
    with pytest.raises(BadConfig, match=said):
        next(generate_group(base, COUPLE, [replace(JOB, prompt=prompt)]))


def test_what_does_not_fit_the_base_is_refused_before_anything_is_loaded(base) -> None:
    flow = replace(base, family=FAMILIES["flux1"])
    with pytest.raises(LoraMisfit, match=r"^anna: 1.safetensors is for sd15, but the base model .* is flux1"):
        next(generate_group(flow, COUPLE, []))
    thin = Group((ANNA, BEN), ((0, 0, 1, 1), (0, 0, 0.01, 1)))
    with pytest.raises(BadConfig, match="region of ben: is empty in 128x80 pixels"):
        next(generate_group(base, thin, [JOB]))


# Regions


def weights_of(regions: list[tuple[int, int, int, int]], size: tuple[int, int]) -> torch.Tensor:
    width, height = size
    boxes: list[RelativeBox] = [
        (left / width, top / height, right / width, bottom / height) for left, top, right, bottom in regions
    ]
    return Group((ANNA, BEN)[: len(boxes)], tuple(boxes)).soft_masks(regions, size)


def disc(size: int, at: float) -> Image.Image:
    """A white disc on black, half as wide as the picture, around that share of its width."""
    across = np.linspace(0, 1, size)
    return Image.fromarray((255 * ((across[None] - at) ** 2 + (across[:, None] - 0.5) ** 2 < 1 / 16)).astype(np.uint8))


def test_a_mask_is_the_weight_of_its_person_and_its_box_the_region() -> None:
    group = Group((ANNA, BEN), (Mask(disc(64, 0.25)), (0.5, 0.0, 1.0, 1.0)))
    regions = group.regions((128, 128), 8)
    assert regions == [(0, 32, 64, 96), (64, 0, 128, 128)]
    anna, _, scene = group.soft_masks(regions, (128, 128))
    assert anna[64, 32] == 1 and anna[36, 4] == 0 and scene[36, 4] == 1 and scene[64, 32] == 0
    with pytest.raises(BadConfig, match="region of anna: the mask is black everywhere; it must be white where"):
        Group((ANNA,), (Mask(Image.new("L", (8, 8))),))


def test_transparent_parts_of_a_mask_are_black(tmp_path: Path) -> None:
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    mask.paste("white", (0, 0, 4, 8))
    mask.save(tmp_path / "mask.png")
    place = region_from("anna", str(tmp_path / "mask.png"))
    assert isinstance(place, Mask) and place.box == (0, 0, 0.5, 1)


def test_pictures_of_other_masks_are_not_taken_for_each_other(base) -> None:
    said = [
        group_parameters(base, Group((ANNA, BEN), (Mask(picture), (0.5, 0.0, 1.0, 1.0))), [], JOB, GenerateConfig())
        for picture in (disc(64, 0.25), Image.eval(disc(64, 0.25), lambda value: value // 2))
    ]
    assert said[0] != said[1] and said[0].count("mask ") == 1
    read = [Parameters.read(text) for text in said]
    assert all(one and shows_several(one) for one in read)


@pytest.mark.parametrize("regions", [[(0, 0, 8, 10), (8, 0, 16, 10)], [(0, 0, 10, 10), (6, 2, 16, 9)], [(2, 2, 9, 9)]])
def test_the_masks_add_up_to_one(regions) -> None:
    weights = weights_of(regions, (16, 10))
    assert weights.shape == (len(regions) + 1, 10, 16) and weights.min() >= 0
    assert torch.allclose(weights.sum(dim=0), torch.ones(10, 16), atol=1e-6)
    left, top, right, bottom = regions[0]
    assert weights[0, (top + bottom) // 2, left + 3] == 1
    assert weights[0].count_nonzero() <= (right - left) * (bottom - top)


def test_a_region_fades_into_the_scene_but_not_at_the_edge() -> None:
    anna, ben, scene = weights_of([(0, 0, 8, 10), (8, 0, 16, 10)], (16, 10))
    assert anna[:, 0].eq(1).all() and ben[:, 15].eq(1).all() and scene[:, [0, 15]].eq(0).all()
    assert 0 < anna[5, 7] < 1 and 0 < ben[5, 8] < 1 and 0 < scene[5, 7] < 1


def test_a_picture_whose_size_nobody_has_said_is_wide_enough_for_all(base) -> None:
    width, height = COUPLE.size(base.resolution, base.size_multiple)
    assert (width, height) == (112, 72)
    assert COUPLE.regions((width, height), 8) == [(0, 0, 56, 72), (56, 0, 112, 72)]


def test_one_person_who_fills_the_picture_is_drawn_as_without_a_group(base) -> None:
    job = PictureJob("a photo of {anna}", 3, size=(64, 80), steps=2, guidance=2.5)
    (alone,) = generate(base, [(ANNA.lora, 0.8)], [replace(job, prompt="a photo of sks woman")])
    (grouped,) = generate_group(base, Group((replace(ANNA, strength=0.8),)), [job])
    # With SSE4.1 or AVX2, one or two of 15,360 values round to the other grey level.
    difference = np.asarray(alone.image, int) - np.asarray(grouped.image, int)
    assert np.abs(difference).max() <= 1
    assert np.count_nonzero(difference) <= 10


@pytest.mark.slow
def test_so_is_one_on_a_flow_family_and_two_fit_beside_each_other() -> None:
    flow, config = small_flow_base("zimage"), GenerateConfig(precision="fp32")
    path = "noise_refiner.0.attention.to_q"
    outputs, inputs = flow.load("denoiser", CPU, torch.float32).get_parameter(f"{path}.weight").shape
    change = LoraModule(torch.ones(1, inputs), torch.linspace(-1, 1, outputs)[:, None], 1.0, None)
    anna = replace(ANNA, lora=LoraFile.from_modules("zimage", {("denoiser", path): change}, {}))
    job = PictureJob("{anna}", 1, size=(16, 16), steps=2, guidance=1.0)
    (alone,) = generate(flow, [(anna.lora, 1.0)], [replace(job, prompt="sks woman")], config, device=CPU)
    (grouped,) = generate_group(flow, Group((anna,)), [job], config, device=CPU)
    assert np.array_equal(np.asarray(alone.image), np.asarray(grouped.image))
    both = Group((anna, replace(anna, name="ben")))
    (two,) = generate_group(flow, both, [PictureJob("{anna} and {ben}", 1, size=(32, 16), steps=2)], config, device=CPU)
    assert two.image.size == (32, 16)


def latents_of(base, group: Group, monkeypatch: pytest.MonkeyPatch, loras=()) -> torch.Tensor:
    """The latents that a group's picture is decoded from."""
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(group_module, "finished", lambda base, vae, latents: [seen.append(latents)])
        list(generate_group(base, group, [JOB], loras=loras))
    return seen[0]


def test_a_lora_changes_its_own_region_and_no_other(base, monkeypatch) -> None:
    first = latents_of(base, COUPLE, monkeypatch)
    other = latents_of(base, Group((ANNA, replace(BEN, lora=lora(7)))), monkeypatch)
    assert torch.equal(first[..., :16], other[..., :16])
    assert (first[..., 16:] != other[..., 16:]).any()
    styled = latents_of(base, COUPLE, monkeypatch, loras=[(lora(9), 1.0)])
    assert (first[..., :10] != styled[..., :10]).any() and (first[..., -10:] != styled[..., -10:]).any()


@pytest.mark.parametrize("where", ["never", "between two steps", "while a LoRA is applied"])
def test_nobodys_lora_is_left_applied(base, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def load(*arguments, **options):
        denoiser, memory = load_denoiser(*arguments, **options)
        kept.append((denoiser, {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}))
        return denoiser, memory

    def predict(denoiser, *inputs):
        before = kept[0][1]
        worn.append(any(not torch.equal(before[name], tensor) for name, tensor in denoiser.state_dict().items()))
        if worn[-1] and where == "while a LoRA is applied":
            raise InterruptedError
        return base.family.predict(denoiser, *inputs)

    def on_step(done: int, total: int) -> None:
        if where == "between two steps":
            raise InterruptedError

    worn: list[bool] = []
    load_denoiser = drawing_model.load_denoiser
    monkeypatch.setattr(drawing_model, "load_denoiser", load)
    watched = replace(base, family=replace(base.family, predict=predict))
    drawing = generate_group(watched, COUPLE, [JOB], on_step=on_step)
    if where == "never":
        list(drawing)
        assert worn == [False, True, True]  # the scene, Anna and Ben
    else:
        with pytest.raises(InterruptedError):
            list(drawing)
    denoiser, before = kept[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in denoiser.state_dict().items())


# Faces


def face(left: float, size: float = 40) -> Face:
    return Face((left, 20, left + size, 20 + size), np.zeros((5, 2), np.float32), 1.0)


HALVES = [(0, 0, 100, 100), (100, 0, 200, 100)]


@pytest.mark.parametrize(
    ("faces", "alike", "places"),
    [
        ([face(130), face(20)], [[0.9, 0.1], [0.1, 0.9]], [1, 0]),  # by region, whatever they look like
        ([face(20, 30), face(40, 50)], [[0.9, 0.2], [0.1, 0.1]], [1, None]),  # the largest, and Ben is not there
        ([face(20, 30), face(40, 50)], [[0.9, 0.2], [0.6, 0.1]], [1, 0]),  # what is left over goes by likeness
        ([face(210), face(20)], [[0.1, 0.9], [0.5, 0.1]], [1, 0]),  # in nobody's region
        ([], [[], []], [None, None]),
    ],
)
def test_a_face_is_whose_region_it_is_in_else_whom_it_is_like(faces, alike, places) -> None:
    assert assign_faces(faces, HALVES, alike) == places


def side_by_side_picture(*people: int) -> Image.Image:
    """A picture of these people of the face set beside each other."""
    picture = Image.new("RGB", (92 * len(people), 112))
    for number, person in enumerate(people):
        picture.paste(person_photos(person)[5], (92 * number, 0))
    return picture


@pytest.fixture(scope="module")
def reference():
    return GroupReference(COUPLE, {"anna": person_photos(1)[:2], "ben": person_photos(2)[:2]})


def test_the_likeness_of_a_group_is_that_of_whoever_is_least_alike(reference: GroupReference) -> None:
    right, swapped, alone = side_by_side_picture(1, 2), side_by_side_picture(2, 1), person_photos(1)[5]
    scores = reference.likeness([right, swapped, alone])
    each = [Reference.on(person_photos(person)[:2]).likeness([person_photos(person)[5]])[0] for person in (1, 2)]
    assert scores[0] == pytest.approx(min(score or 0 for score in each), abs=0.1)
    assert scores[0] is not None and scores[0] > 0.5
    assert scores[1] is not None and scores[1] < 0.4 and scores[2] is None


def test_photos_of_nobody_or_not_of_everyone_are_refused() -> None:
    with pytest.raises(BadConfig, match="give photos of each of anna, ben and nobody else; check bob"):
        GroupReference(COUPLE, {"anna": person_photos(1)[:1], "ben": person_photos(2)[:1], "bob": []})


@pytest.mark.parametrize(
    ("drawn", "taken", "tries"),
    [((1, 2), True, 1), pytest.param((5, 6), False, faces_module.TRIES, marks=pytest.mark.slow)],
)
def test_a_face_that_is_not_alike_is_drawn_again_until_it_is(
    base, reference: GroupReference, drawn, taken: bool, tries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def photos(base, loras, parts, config, denoise, device, model):
        person = next(number for number, one in enumerate(COUPLE.people) if loras == [(one.lora, one.strength)])
        for key, (job, part) in parts.items():
            asked.append((job.prompt, job.seed))
            yield key, person_photos(drawn[person])[5].resize(part.image.size)

    monkeypatch.setattr(faces_module, "drawn_again", photos)
    picture = side_by_side_picture(3, 4) if taken else side_by_side_picture(5, 6)
    (result,) = redraw_faces(base, reference, {0: (JOB, picture)}, GenerateConfig(), FacePass()).values()
    assert (result.after > result.before + 0.2) is taken
    assert asked == [
        (words, JOB.seed + number)
        for words in ("a photo of sks woman", "a photo of ohwx man")
        for number in range(tries)
    ]


# A batch


def test_a_batch_of_a_group_is_ranked_and_made_once(base, tmp_path: Path) -> None:
    jobs = [replace(JOB, seed=seed, size=(184, 112)) for seed in (1, 2)]
    for number, (job, people) in enumerate(zip(jobs, ((2, 1), (1, 2)), strict=True), start=1):
        text = group_parameters(base, COUPLE, [], job, GenerateConfig())
        Picture(side_by_side_picture(*people), job, text).save(tmp_path / f"{number:03d}-{job.seed}.png")
    written = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    photos = {"anna": person_photos(1)[:2], "ben": person_photos(2)[:2]}
    shots = make_group_pictures(base, COUPLE, jobs, tmp_path, reference=photos, face_pass=FacePass(below=0), keep=1)
    assert [shot.job.seed for shot in shots] == [2, 1] and [shot.kept for shot in shots] == [True, False]
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("0*.png")} == written
    said = Image.open(shots[0].path).info["parameters"]
    assert "0 0 0.5 1: a photo of sks woman; 0.5 0 1 1: a photo of ohwx man" in said and "anna" not in said
    elsewhere = Group(COUPLE.people, COUPLE.layout[::-1])
    assert said != group_parameters(base, elsewhere, [], shots[0].job, GenerateConfig())


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    people = {"anna": (1, "sks woman"), "ben": (2, "ohwx man")}
    for name, (seed, phrase) in people.items():
        lora(seed, phrase).save(tmp_path / f"{name}.safetensors")
    return [f"--person={name}={tmp_path / name}.safetensors" for name in people]


def test_a_group_comes_from_the_command_line(files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--base", "demo", *files, "--prompt", PROMPT, "--output", str(tmp_path / "out"), "--json"]
    assert main([*command, "--count", "1", "--steps", "1", "--guidance", "1"]) == 0
    (picture,) = json.loads(capsys.readouterr().out)["headshots"]
    with Image.open(tmp_path / "out" / picture["file"]) as image:
        assert image.size == (112, 72) and picture["prompt"] == PROMPT
        assert "0.5 0 1 1: a photo of ohwx man" in image.info["parameters"]
    page = (tmp_path / "out" / "gallery.html").read_text("utf-8")
    assert "--base=demo " in page and "--person=anna=anna.safetensors:1" in page and "--region=ben=0.5,0,1,1" in page


def test_a_style_pack_draws_a_group_whose_list_of_names_is_the_subject(files, tmp_path: Path, capsys) -> None:
    styled = ["--style-pack", "groups", "--style", "Family on the sofa"]
    command = ["generate", "--base", "demo", *files, *styled, "--json"]
    assert main([*command, "--output", str(tmp_path / "out"), "--count", "1", "--steps", "1", "--guidance", "1"]) == 0
    (picture,) = json.loads(capsys.readouterr().out)["headshots"]
    assert picture["style"] == "Family on the sofa"
    assert picture["prompt"].startswith("chest-up portrait photo of {anna} and {ben}, ")
    with Image.open(tmp_path / "out" / picture["file"]) as image:
        assert image.size == (112, 72)
        assert "0 0 0.5 1: chest-up portrait photo of sks woman, " in image.info["parameters"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", "{anna} and {bob}"], "prompt '{anna} and {bob}': {bob} is not in the group; use {anna}, {ben}"),
        (["--prompt", "{anna}"], "prompt '{anna}': {ben} is missing; name everyone in the prompt"),
        ([], "no --prompt given: describe who does what, as in '{anna} and {ben} in an office'"),
        (["--prompt", PROMPT, "--person", "anna=b.safetensors"], "--person anna is given twice"),
        (["--prompt", PROMPT, "--person", "carl"], "--person carl: must be NAME=FILE.safetensors"),
        (["--prompt", PROMPT, "--region", "anna=0,0,1,1"], "--region: give one for each --person and nobody else"),
        (["--style-pack", "groups", "--subject", "sks woman"], "--subject is for one person; with --person"),
        (["--style-pack", "groups", "--prompt", PROMPT], "--prompt and --style-pack are both given; use only one"),
        (["--prompt", PROMPT, "--reference", "anna=photos"], "--reference: give NAME=PHOTOS for each --person and nobody else"),
        (["--prompt", PROMPT, "--reference", "photos"], "--reference photos: must be NAME=PHOTOS"),
    ],
)  # fmt: skip
def test_options_that_make_no_group_are_refused(files, options, said: str, tmp_path, capsys) -> None:
    assert main(["generate", "--base", "demo", *files, "--output", str(tmp_path / "out"), *options]) == 1
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_one_person_alone_and_a_lora_without_trigger_words_are_refused(files, tmp_path: Path, capsys) -> None:
    command = ["generate", "--base", "demo", "--output", str(tmp_path / "out"), "--prompt", PROMPT]
    assert main([*command, files[0]]) == 1
    assert (
        "--person anna: a group needs at least two people; for one person, use --lora FILE" in capsys.readouterr().err
    )
    lora(2).save(tmp_path / "ben.safetensors")
    assert main([*command, *files]) == 1
    assert "--person ben: ben.safetensors has no trigger phrase in its metadata" in capsys.readouterr().err
    assert main([*command, "--region", "anna=0,0,1,1"]) == 1
    assert "--region requires --person" in capsys.readouterr().err
