"""Group Person and Group Portrait in a real server: KSampler draws what `generate_group` draws."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import core.pictures.group as group_module
from core import LoraFile, LoraModule, PictureJob, load_base
from core.models.base import Base
from core.pictures import Group, GroupMember, Mask, generate_group, publish
from core.pictures.sampling import Sampling
from core.tensor_names import NAME_TABLES
from tests.tooling import mostly_slow

from .graphs import BASE, Node, drawing, node
from .test_flow_nodes import LINKS, loaders

PROMPT = "a photo of {anna} and {ben}"
SIZE = (128, 96)
"""The picture's in latents times 8, as ComfyUI counts."""


def lora(folder: Path, family: str, name: str, phrase: str, *modules: tuple[str, str]) -> LoraFile:
    """A LoRA that changes these modules at random, whose sides its base model in `folder` tells, in the loras folder."""
    generator = torch.Generator().manual_seed(len(phrase))
    where = (
        "diffusion_models" if (folder / "models/diffusion_models" / f"{family}.safetensors").exists() else "checkpoints"
    )
    base = load_base(folder / "models" / where / f"{family}.safetensors")
    made = {}
    for part, path in modules:
        outputs, inputs = base.load(part, torch.device("cpu"), torch.float32).get_parameter(f"{path}.weight").shape
        down, up = torch.randn(2, inputs, generator=generator), torch.randn(outputs, 2, generator=generator)
        made[part, path] = LoraModule(down / inputs**0.5, up, 2.0)
    path = folder / "models" / "loras" / name
    metadata = {"modelspec.trigger_phrase": phrase, "ss_base_model_version": NAME_TABLES[family].base_versions[0]}
    LoraFile.from_modules(family, made, metadata).save(path, torch.float32)
    return LoraFile.read(path)


ATTENTION = ("denoiser", "mid_block.attentions.0.transformer_blocks.0.attn2.to_v")
WORDS = ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")
OF_FLOWS = {"flux1": "transformer_blocks.0.attn.to_v", "flux2": "transformer_blocks.0.attn.to_v",
            "zimage": "layers.0.attention.to_v", "qwen-image": "transformer_blocks.0.img_mod.1"}  # fmt: skip
"""A module of the denoiser of some flow families."""


def couple(folder: Path, family: str, *modules: tuple[str, str]) -> tuple[GroupMember, GroupMember]:
    """Anna and Ben, with LoRAs of these modules."""
    words = ("sks woman", "ohwx man")
    files = [lora(folder, family, f"{family}-{phrase[:3]}.safetensors", phrase, *modules) for phrase in words]
    return GroupMember("anna", files[0], words[0]), GroupMember("ben", files[1], words[1], 0.7)


@pytest.fixture(scope="module")
def people(server) -> dict[str, tuple[GroupMember, GroupMember]]:
    """Family -> Anna and Ben."""
    return {family: couple(server.folder, family, ATTENTION, WORDS) for family in ("sd15", "sdxl")}


def one(person: GroupMember, region: str = "", **inputs: Any) -> Node:
    return node(
        "FaceLoRAPerson", lora_name=Path(person.lora.name).name, name=person.name, strength=person.strength, phrase="",
        region=region, **inputs,
    )  # fmt: skip


def drawn(
    group: dict[str, Node], model: list, clip: list, vae: list, *, prompt: str = PROMPT, count: int = 1,
    size: tuple[int, int] = SIZE, **changes: Any,
) -> dict[str, Node]:  # fmt: skip
    """A picture of the people in `group` in two steps, with these changes of the sampler's inputs: node "picture"."""
    people = {f"people.person{number}": [name, 0] for number, name in enumerate(group)}
    sampler = {"positive": ["group", 0], "negative": ["group", 1], "latent_image": ["group", 2], "seed": 3, "steps": 2,
               "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}  # fmt: skip
    return group | {
        "group": node("FaceLoRAGroup", model=model, clip=clip, prompt=prompt, negative="blurry", width=size[0],
                      height=size[1], batch_size=count, **people),
        "sampler": node("KSampler", **(sampler | {"model": model} | changes)),
        "decoded": node("VAEDecode", samples=["sampler", 0], vae=vae),
        "picture": node("PreviewImage", images=["decoded", 0]),
    }  # fmt: skip


def by_euler(base: Base, predict: Any, sampling: Sampling, seeds: list[int], _: Any) -> Tensor:
    """The latents to which KSampler comes by the predictions in two steps of euler, spaced as `simple` does."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    table = ((1 - (1 - betas).cumprod(0)) / (1 - betas).cumprod(0)) ** 0.5
    pixels = base.latent_shape.pixels
    generator = torch.Generator().manual_seed(seeds[0])
    noise = torch.randn(1, 4, sampling.size[1] // pixels, sampling.size[0] // pixels, generator=generator)
    latents = noise * float(table[999] ** 2 + 1) ** 0.5
    for at, following in ((999, float(table[499])), (499, 0.0)):
        sigma = float(table[at])
        prediction = predict(latents / (sigma**2 + 1) ** 0.5, torch.tensor(at), torch.tensor(at - 500))
        latents = latents + (following - sigma) * prediction
    return latents


def distance(a: Image.Image, b: Image.Image) -> int:
    """The largest difference, in grey levels."""
    assert a.size == b.size
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


@pytest.mark.parametrize(("family", "masked"), [("sd15", False), ("sd15", True), ("sdxl", False)])
def test_ksampler_draws_the_picture_of_generate_group(family, masked, server, people, monkeypatch):
    boxes = ((0, 0, 0.6, 1), (0.5, 0.2, 1, 1))
    nodes = {p.name: one(p, ", ".join(map(str, box))) for p, box in zip(people[family], boxes, strict=True)}
    loader = {"base": node("CheckpointLoaderSimple", ckpt_name=f"{family}.safetensors")}
    if masked:
        fading = Image.fromarray(np.linspace(255, 0, 64).astype(np.uint8)[None].repeat(48, 0))
        boxes = (Mask(fading), Mask(fading.rotate(180)))
        for person, mask in zip(people[family], boxes, strict=True):
            mask.image.save(server.folder / "input" / f"{person.name}.png")
            loader[f"mask of {person.name}"] = node("LoadImageMask", image=f"{person.name}.png", channel="red")
            nodes[person.name] = one(person, mask=[f"mask of {person.name}", 0])
    result = server.result(loader | drawn(nodes, ["base", 0], ["base", 1], ["base", 2], cfg=3.0))
    base = load_base(server.folder / "models" / "checkpoints" / f"{family}.safetensors")
    pixels, told = base.latent_shape.pixels, base.family.image_conditioning

    def as_comfyui(*sizes: tuple[int, int]) -> Any:
        """ComfyUI tells the model a size in latents times 8, whatever its VAE."""
        return told(*((8 * width // pixels, 8 * height // pixels) for width, height in sizes))

    base = replace(base, family=replace(base.family, image_conditioning=as_comfyui))
    monkeypatch.setattr(group_module, "denoised", by_euler)
    job = PictureJob(PROMPT, 3, "blurry", (SIZE[0] // 8 * pixels, SIZE[1] // 8 * pixels), 2, 3.0)
    (ours,) = generate_group(base, Group(people[family], boxes), [job])
    assert distance(server.drawn(result), ours.image) <= 2
    swapped = Group(
        tuple(replace(p, lora=q.lora) for p, q in zip(people[family], people[family][::-1], strict=True)), boxes
    )
    (other,) = generate_group(base, swapped, [job])
    assert distance(ours.image, other.image) > 5, "the LoRAs are seen"


def test_a_picture_of_any_size_has_its_regions_and_nothing_stays_on_the_model(server, people):
    nodes = {person.name: one(person) for person in people["sd15"]}
    links = (["base", 0], ["base", 1], ["base", 2])
    before = server.drawn(server.run(BASE | drawing(*links, prompt="a photo of man")))
    several = server.run(BASE | drawn(nodes, *links, count=2, cfg=3.0))
    first, second = (server.picture(image) for image in several.outputs["picture"]["images"])
    (alone,) = server.run(BASE | drawn(nodes, *links, cfg=3.0)).outputs["picture"]["images"]
    assert distance(first, server.picture(alone)) <= 1 < distance(first, second)
    assert several.outputs["group"]["text"] == [
        "anna: a photo of sks woman\nben: a photo of ohwx man\nscene: a photo of woman and man"
    ]
    other = {"other": node("EmptyLatentImage", width=152, height=88, batch_size=1)}
    odd = server.result(BASE | other | drawn(nodes, *links, latent_image=["other", 0]))
    assert server.drawn(odd).size == (76, 44)
    # Another text, so that it is drawn again, of the same tokens.
    again = server.drawn(server.run(BASE | drawing(*links, prompt="a photo of man ")))
    assert distance(before, again) == 0


@pytest.mark.parametrize("family", mostly_slow(OF_FLOWS, "flux2"))
def test_on_a_flow_family_each_lora_stays_in_its_region_and_one_alone_is_that_of_apply_lora(
    family, server, flow_models
):
    anna, ben = couple(server.folder, family, ("denoiser", OF_FLOWS[family]))
    links = (LINKS["model"], LINKS["clip"], LINKS["vae"])
    multiple = 16 if family == "flux2" else 8
    size = (16 * multiple, 8 * multiple)

    def latents(*people: GroupMember, name: str) -> Tensor:
        graph = drawn({person.name: one(person) for person in people}, *links, size=size, steps=1,
                      prompt=" and ".join(f"{{{person.name}}}" for person in people))  # fmt: skip
        return latents_of(server, loaders(family) | graph, name)

    first = latents(anna, ben, name=f"{family}-1")
    other = latents(anna, replace(ben, strength=-1.0), name=f"{family}-2")
    assert torch.equal(first[..., :8], other[..., :8])
    assert (first[..., 9:] != other[..., 9:]).any()

    alone = latents(anna, name=f"{family}-3")
    applied = node("FaceLoRAApply", model=["unet", 0], clip=["clip", 0], lora_name=Path(anna.lora.name).name,
                   strength_model=1.0, strength_clip=1.0)  # fmt: skip
    texts = {
        name: node("CLIPTextEncode", clip=["apply", 1], text=text) for name, text in (("yes", "sks woman"), ("no", ""))
    }
    graph = drawn(
        {"anna": one(anna)}, *links, size=size, steps=1, prompt="{anna}", positive=["yes", 0], negative=["no", 0]
    )
    graph["sampler"]["inputs"]["model"] = ["apply", 0]
    by_apply = latents_of(server, loaders(family) | {"apply": applied} | texts | graph, f"{family}-4")
    assert torch.equal(alone, by_apply)
    without = {"apply": {**applied, "inputs": {**applied["inputs"], "mode": "off"}}}
    base = latents_of(server, loaders(family) | without | texts | graph, f"{family}-5")
    assert not torch.equal(alone, base)


def latents_of(server, graph: dict[str, Node], name: str) -> Tensor:
    """The latents that the graph's sampler comes to, by way of a file of that name."""
    del graph["decoded"], graph["picture"]
    server.result(graph | {"saved": node("SaveLatent", samples=["sampler", 0], filename_prefix=name)})
    (path,) = (server.folder / "output").glob(f"{name}_*.latent")
    return load_file(path)["latent_tensor"]


@pytest.mark.parametrize(
    ("changes", "region", "words"),
    [
        ({"prompt": "{anna} and {bob}"}, "", "{bob} is not in the group; use {anna}, {ben}"),
        ({}, "0, 0, 0.5, 1", "region: set it for everyone or for nobody. ben doesn't have one"),
        ({}, "half", "region of anna: 'half': must be LEFT,TOP,RIGHT,BOTTOM, each from 0 to 1"),
    ],
)
def test_an_invalid_group_is_an_error_in_the_node(server, people, changes, region, words):
    anna, ben = people["sd15"]
    graph = drawn({"anna": one(anna, region), "ben": one(ben)}, ["base", 0], ["base", 1], ["base", 2], **changes)
    error = server.error(BASE | graph)
    assert words in error


def test_a_style_pack_gives_the_prompts_of_a_group(server, people):
    graph = drawn({person.name: one(person) for person in people["sd15"]}, ["base", 0], ["base", 1], ["base", 2])
    graph["group"]["inputs"] |= {"prompt": ["styles", 0], "negative": ["styles", 1]}
    styles = node("FaceLoRAStylePack", pack="groups", styles="", subject="{anna} and {ben}", count=2, first_seed=1,
                  family="sd15", resolution=0)  # fmt: skip
    saved = node("SaveLatent", samples=["group", 2], filename_prefix="empty")
    result = server.result(
        BASE | {"group": graph["group"], "anna": graph["anna"], "ben": graph["ben"], "styles": styles, "saved": saved}
    )
    said = "\n".join(result.outputs["group"]["text"])
    assert said.count("anna: chest-up portrait photo of sks woman, ") == 2
    assert said.count("scene: chest-up portrait photo of woman and man, ") == 2


def test_a_picture_of_two_people_is_not_published_as_an_example(server, people, tmp_path):
    nodes = {person.name: one(person) for person in people["sd15"]}
    graph = drawn(nodes, ["base", 0], ["base", 1], ["base", 2])
    graph["picture"] = node("SaveImage", images=["decoded", 0], filename_prefix="couple")
    assert server.run(BASE | graph).status == "success"
    picture, told = server.folder / "output" / "couple_00001_.png", []
    made = publish(
        people["sd15"][0].lora.name, tmp_path / "out", [picture], agreed=True, title="Sks", on_warning=told.append
    )
    assert made.pictures == () and told[0].startswith("couple_00001_.png: left out: its parameters show several people")
