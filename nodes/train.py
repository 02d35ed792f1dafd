"""Train Face LoRA."""

# pyright: reportMissingImports=false

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from PIL import Image

from ..core.base import Base
from ..core.cache import cache_folder, content_key
from ..core.config import TrainConfig, config_from, settings_of_the_file
from ..core.errors import BadConfig, BadFile, FaceLoraError
from ..core.files import write_text
from ..core.generate import contact_sheet
from ..core.likeness import LIKENESS_KEY, LikenessPoint
from ..core.lora_file import LoraFile, model_hash
from ..core.methods import METHODS
from ..core.photos import Photo
from ..core.photos_to_lora import SAVE_DTYPES, train
from ..core.recipes import MEASUREMENTS, RECIPES, recipe_settings
from ..core.training import StepReport, StopAndKeep
from . import panel
from .convert import FacePhotos, LoraModel, base_from, image_tensor, lora_file, lora_model, photos_of, trained_family
from .plot import loss_plot

KEY = "facelora.key"
"""In a LoRA's metadata: what it was made from, as a hash. The file that a run would make is found by it."""
TRAINING_VERSION = "1"
"""Part of every key: raised when the same inputs would train differently."""
SHOW_INTERVAL = 0.5
"""Seconds between two looks at the loss, each of which waits for the device."""
SAVE_INTERVAL = 10.0
"""Seconds between two times that the curve is saved, of which a killed server loses the rest."""


class TrainFaceLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRATrain",
            display_name="Train Face LoRA",
            category="FaceLoRA",
            description="Trains a LoRA of one person on MODEL as it is wired, and writes it into the loras folder. "
            "Cancelled, it goes on from there when queued again; what is trained already is never trained again. "
            "Train only people who have agreed to it.",
            search_aliases=["train lora", "dreambooth", "finetune", "face training"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train on, with whatever is patched onto it."),
                io.Clip.Input("clip", tooltip="The text encoder that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.MultiType.Input(
                    "photos", [FacePhotos, io.Image],
                    tooltip="10 to 20 photos of one person, from Load Face Photos; images from any other node work too.",
                ),
                io.String.Input(
                    "name", default="my-face",
                    tooltip="Name of the file in the loras folder. When another LoRA has it already, a number is added.",
                ),
                io.String.Input("trigger_word", default="sks", tooltip=f"{_help('trigger_word')}."),
                io.String.Input("class_word", default="person", tooltip=f"{_help('class_word')}."),
                io.Combo.Input(
                    "recipe", options=list(RECIPES), default="balanced",
                    tooltip="How much is trained, in numbers that suit MODEL's family: fast for a first look, balanced for "
                    "most people; best holds two photos out, measures likeness to them, and keeps the checkpoint most alike.",
                ),
                io.Int.Input(
                    "samples", default=4, min=0, max=100,
                    tooltip="How many times sample pictures are drawn during the training; 0: never (where photos are held "
                    f"out: {MEASUREMENTS} times all the same).",
                ),
                io.Int.Input(
                    "steps", default=0, min=0, max=100_000, advanced=True,
                    tooltip="Optimizer steps; 0: what the recipe says.",
                ),
                io.Int.Input(
                    "rank", default=0, min=0, max=1024, advanced=True,
                    tooltip="Rank, the size of the LoRA; 0: what the recipe says.",
                ),
                io.Float.Input(
                    "learning_rate", default=0.0, min=0.0, max=10.0, step=1e-6, round=1e-7, advanced=True,
                    tooltip="Peak learning rate; 0: what the recipe says.",
                ),
                io.Int.Input(
                    "resolution", default=0, min=0, max=4096, step=8, advanced=True,
                    tooltip="Side of the square with a picture's area, in pixels; 0: the model's own (512 or 1024).",
                ),
                io.Int.Input(
                    "training_seed", default=1, min=0, max=2**63 - 1, control_after_generate=False, advanced=True,
                    tooltip="Seed of everything random. The same inputs with the same seed give the same LoRA.",
                ),
                io.String.Input(
                    "sample_prompts", default="", multiline=True, advanced=True,
                    placeholder="prompts of the samples, one a line",
                    tooltip="Prompts of the sample pictures, one a line; empty: a photo of the trigger and class word.",
                ),
                io.String.Input(
                    "settings", default="", multiline=True, advanced=True,
                    placeholder="any other setting, e.g. text_encoder_lr = 1e-5",
                    tooltip="Any setting of the training as lines of TOML; it wins over the recipe. There are: "
                    + ", ".join(TrainConfig.__dataclass_fields__),
                ),
                io.String.Input(
                    "captions", optional=True, force_input=True,
                    tooltip="A caption for each photo, in the same order; those of Load Face Photos come with the photos.",
                ),
                io.MultiType.Input(
                    "class_photos", [FacePhotos, io.Image], optional=True,
                    tooltip="Pictures of other people of the class, for prior preservation: keeps 'person' from "
                    "becoming this person.",
                ),
                io.Mask.Input(
                    "masks", optional=True,
                    tooltip="A mask for each photo, in the same order: white where the loss counts in full. Those beside "
                    "the files come with the photos.",
                ),
                LoraModel.Input("continue_from", optional=True, tooltip="A LoRA to go on from, instead of a new one."),
            ],
            outputs=[
                LoraModel.Output(
                    display_name="lora", tooltip="The LoRA, for Apply LoRA or ComfyUI's Load LoRA Model and Save LoRA."
                ),
                io.String.Output(display_name="lora_name", tooltip="Its name in the loras folder, as loaders list it."),
                io.Image.Output(display_name="loss_plot", tooltip="The smoothed loss over the steps."),
                io.Image.Output(display_name="sample_grid", tooltip="The samples, a row for each time they were drawn."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, settings: Any = None) -> bool | str:
        """Finds a wrong line of settings before anything is loaded. (ComfyUI would repeat the message for each argument.)"""
        text = settings[0] if isinstance(settings, list) else settings
        try:
            config_from(_toml(text or ""))
        except FaceLoraError as problem:
            return str(problem)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, photos, name, trigger_word, class_word, recipe, samples, steps, rank, learning_rate,
        resolution, training_seed, sample_prompts, settings, captions=None, class_photos=None, masks=None,
        continue_from=None,
    ) -> io.NodeOutput:  # fmt: skip
        _check_name(name[0])
        config = _config(
            trained_family(model[0]), trigger_word[0], class_word[0], recipe[0], samples[0], steps[0], rank[0],
            learning_rate[0], resolution[0], training_seed[0], sample_prompts[0], settings[0],
        )  # fmt: skip
        if METHODS[config.method].makes != "lora":
            raise BadConfig(
                f"settings: method = {config.method!r} makes no LoRA (but: {METHODS[config.method].makes}); "
                "train it on the command line (facelora train)"
            )
        job = Job(
            name=name[0],
            config=config,
            photos=photos_of(photos, captions, masks),
            class_photos=photos_of(class_photos) or None,
            continue_from=lora_file(continue_from[0]) if continue_from else None,
        )
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        with torch.inference_mode(False):
            path, run = make(job, base_from(model[0], clip[0], vae[0], config), cls.hidden.unique_id)
        relative = str(path.relative_to(_loras_folder()))
        plot = loss_plot(run.history(), f"{path.stem}: loss")
        return io.NodeOutput(
            lora_model(LoraFile.read(path)), relative, image_tensor(plot), image_tensor(run.sample_sheet())
        )


def _help(setting: str) -> str:
    text = TrainConfig.__dataclass_fields__[setting].metadata["help"]
    return text[0].upper() + text[1:]


def _config(
    family: str, trigger_word: str, class_word: str, recipe: str, samples: int, steps: int, rank: int, learning_rate: float,
    resolution: int, seed: int, sample_prompts: str, settings: str,
) -> TrainConfig:  # fmt: skip
    """The TrainConfig of the node's widgets: the recipe, then the widgets that are not 0, then the settings."""
    widgets = {"steps": steps, "rank": rank, "learning_rate": learning_rate, "resolution": resolution}
    given = {name: value for name, value in widgets.items() if value}
    given |= {"trigger_word": trigger_word, "class_word": class_word, "seed": seed} | _toml(settings)
    prompts = [line.strip() for line in sample_prompts.splitlines() if line.strip()]
    if prompts:
        given["sample_prompts"] = prompts
    chosen = recipe_settings(recipe, family, given)
    if samples and "sample_every" not in given:
        chosen["sample_every"] = max(1, -(-chosen["steps"] // samples))
    return config_from(chosen)


def _toml(text: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadConfig(f"settings: {error}; each line is NAME = VALUE, text in quotes") from None


def _check_name(name: str) -> None:
    parts = re.split(r"[\\/]", name)
    if (
        not name.strip()
        or any(part.strip() in ("", ".", "..") for part in parts)
        or re.search(r'[<>:"|?*\x00-\x1f]', name)
    ):
        raise BadConfig(f"name {name!r}: give a file name, or FOLDER/NAME below the loras folder")


def _loras_folder() -> Path:
    return Path(folder_paths.get_folder_paths("loras")[0])


@dataclass(frozen=True)
class Job:
    """What is to be trained, apart from the base model."""

    name: str
    config: TrainConfig
    photos: Sequence[Photo]
    class_photos: Sequence[Photo] | None
    continue_from: LoraFile | None

    def key(self, base: Base) -> str:
        """Equal when the same file would be made, whatever the photos and models are called."""
        settings = settings_of_the_file(self.config)
        photos = [
            [(photo.digest, _mask_digest(photo), photo.caption, photo.repeats) for photo in group]
            for group in (self.photos, self.class_photos or ())
        ]
        start = model_hash(self.continue_from.tensors) if self.continue_from else None
        weights = base.fingerprint("denoiser", "vae"), base.text_fingerprint
        schedule = (base.prediction_type, base.zero_terminal_snr)
        return content_key(
            "lora", TRAINING_VERSION, json.dumps(settings, sort_keys=True), photos, start, weights, schedule
        )


def _mask_digest(photo: Photo) -> str:
    """Of a mask of its own; that of transparency is in the photo's."""
    source = photo.mask_source
    data = b"" if source is None else source.read_bytes() if isinstance(source, Path) else source.tobytes()
    return hashlib.sha256(data).hexdigest()


def make(job: Job, base: Base, node_id: str) -> tuple[Path, "RunFolder"]:
    """The trained file in the loras folder and the folder of its run: found if it is there already, else trained now."""
    key = job.key(base)
    run = RunFolder(cache_folder() / "runs" / key)
    path, found = _place(job.name, key)
    panel.begin(node_id, run.history(), job.photos)
    if found:
        panel.publish(node_id, {"phase": "done", "file": path.name, **_looks(path, run)})
        return path, run
    watch = Watch(node_id, job.config, run)
    output = run.path / "lora.safetensors"
    arguments: dict[str, Any] = {
        "output": output,
        "class_photos": job.class_photos,
        "continue_from": job.continue_from,
        "resume": True,
        "device": comfy.model_management.get_torch_device(),
        "on_step": watch.step,
        "on_phase": watch.phase,
        "on_sample": watch.sample,
        "on_warning": watch.warning,
        "check_cancelled": comfy.model_management.throw_exception_if_processing_interrupted,
    }
    try:
        lora = train(job.photos, base, job.config, **arguments)
    except BaseException:
        panel.publish(node_id, {"phase": "stopped"})
        raise
    finally:
        run.save_history()
    metadata = lora.metadata | {KEY: key, "ss_output_name": path.stem}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFile(f"{path.parent}: cannot be written: {error.strerror}") from None
    lora.with_metadata(metadata).save(path, SAVE_DTYPES[job.config.save_precision])
    output.unlink()
    for checkpoint in run.path.glob(f"{output.stem}-step*.safetensors"):
        shutil.move(checkpoint, path.with_name(path.stem + checkpoint.name.removeprefix(output.stem)))
    panel.publish(node_id, {"phase": "done", "file": path.name})
    return path, run


def _looks(path: Path, run: "RunFolder") -> dict[str, Any]:
    """What the panel shows of a training that was done before, apart from the loss: likeness, the last samples."""
    shown: dict[str, Any] = {}
    metadata = LoraFile.read(path).metadata
    if LIKENESS_KEY in metadata:
        shown["likenesses"] = [
            (point["step"], point["likeness"]) for point in json.loads(metadata[LIKENESS_KEY])["points"]
        ]
    if samples := run.samples():
        step = max(samples)
        shown |= {"samples": panel.data_urls(samples[step]), "samples_step": step}
    return shown


def _place(name: str, key: str) -> tuple[Path, bool]:
    """The path of the LoRA, and whether it is there: the first of NAME, NAME-2, ... that is free or has the key."""
    number = 1
    while True:
        path = _loras_folder() / f"{name}{f'-{number}' if number > 1 else ''}.safetensors"
        if not path.exists():
            return path, False
        try:
            if LoraFile.read(path).metadata.get(KEY) == key:
                return path, True
        except FaceLoraError:
            pass  # whatever it is, it is not ours
        number += 1


@dataclass
class RunFolder:
    """What is kept of a run beside its LoRA: the loss, the samples, and while it is unfinished its state."""

    path: Path
    _history: list[tuple[int, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "history.json"
        if file.exists():
            self._history = [(int(step), float(loss)) for step, loss in json.loads(file.read_text())]

    def history(self) -> list[tuple[int, float]]:
        """(step, smoothed loss), in order."""
        return self._history

    def add(self, step: int, loss: float) -> None:
        while self._history and self._history[-1][0] >= step:  # from before the server was killed
            self._history.pop()
        self._history.append((step, loss))

    def save_history(self) -> None:
        write_text(self.path / "history.json", json.dumps(self._history))

    def add_samples(self, step: int, images: Sequence[Image.Image]) -> None:
        for index, image in enumerate(images):
            image.save(self.path / f"sample-{step:06d}-{index}.png")

    def samples(self) -> dict[int, list[Image.Image]]:
        """Step -> its samples."""
        found: dict[int, list[Image.Image]] = {}
        for file in sorted(self.path.glob("sample-*.png")):
            with Image.open(file) as image:
                found.setdefault(int(file.stem.split("-")[1]), []).append(image.convert("RGB"))
        return found

    def sample_sheet(self) -> Image.Image:
        rows = [(f"step {step}", images) for step, images in self.samples().items()]
        return contact_sheet(rows, tile=256, title="" if rows else "no samples were drawn")


class Watch:
    """Listens to a training: shows it, and ends it when the user has cancelled."""

    def __init__(self, node_id: str, config: TrainConfig, run: RunFolder):
        self._node_id, self._run = node_id, run
        self._bar = comfy.utils.ProgressBar(config.steps, node_id=node_id)
        self._shown = self._saved = -math.inf

    def phase(self, name: str, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if name == "encoding" and done == total:
            comfy.model_management.unload_all_models()  # CLIP, where it has encoded the captions
        self._bar.update_absolute(done, total)
        panel.publish(self._node_id, {"phase": name, "done": done, "total": total})

    def warning(self, message: str) -> None:
        panel.publish(self._node_id, {"warning": message})

    def step(self, report: StepReport) -> None:
        now = time.monotonic()
        measured = report.likeness is not None and report.likeness.step == report.step
        if measured or now - self._shown > SHOW_INTERVAL or report.step == report.steps:
            self._shown = now
            self._show(report, report.likeness if measured else None)
        if now - self._saved > SAVE_INTERVAL:
            self._saved = now
            self._run.save_history()
        comfy.model_management.throw_exception_if_processing_interrupted()
        if panel.stop_is_wanted(self._node_id):
            raise StopAndKeep

    def _show(self, report: StepReport, measured: LikenessPoint | None) -> None:
        self._run.add(report.step, report.loss)
        self._bar.update_absolute(report.step, report.steps)
        panel.publish(
            self._node_id,
            {
                "phase": "training", "step": report.step, "steps": report.steps, "loss": report.loss,
                "learning_rate": report.learning_rate, "seconds_left": report.seconds_left, "memory": report.memory,
                **({"likeness": measured.likeness} if measured else {}),
            },
        )  # fmt: skip

    def sample(self, step: int, images: list[Image.Image]) -> None:
        self._run.add_samples(step, images)
        panel.publish(self._node_id, {"samples": panel.data_urls(images), "samples_step": step})
