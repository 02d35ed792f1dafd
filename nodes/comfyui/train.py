"""The node Train Face LoRA, which trains a LoRA on photos of a person, or finds the one trained before."""

# pyright: reportMissingImports=false

import asyncio
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from aiohttp import web
from comfy_api.latest import io
from PIL import Image
from server import PromptServer

from ...core import studio  # Its modules are loaded when they are used.
from ...core.config import TrainConfig, config_from, typed_settings
from ...core.device import within_free_memory
from ...core.errors import BadConfig, BadPhoto, FaceLoraError, one_line
from ...core.lora.file import LoraFile
from ...core.models.families import FAMILIES
from ...core.photos.ready import SWITCH
from ...core.progress import LOADING, READING
from ...core.threads import within_quota
from ...core.training.callbacks import Callbacks, StepReport, StopAndKeep, likeness_word, step_line
from ...core.training.job import TrainingJob
from ...core.training.methods import peak_rate
from ...core.training.optimizer import learning_rate_factor
from ...core.training.recipes import ENOUGH, RECIPES, recipe_settings
from ...core.training.store import LoraFolders, check_makes_lora, is_trained, lora_path
from ...core.training.trained_file import TrainedFile
from ...core.training.training_adapter import TrainingAdapter
from ..forecasts import forecast_for, forget_forecasts, spans_of
from ..settings import NodeSettings
from ..shown import DONE, FAILED, STEPPING, STOPPED
from .app.dropped import input_folder
from .app.runs import SAMPLE_SIDE, QueuedRun, photo_urls, sample_urls
from .app.state import app
from .convert import FacePhotos, LoraModel, base_from, image_tensor, lora_file, lora_model, photos_of, trained_family
from .folders import opened, says_no_server_paths, without_server_paths, write_embedding
from .inputs import setting_input
from .plot import loss_plot

GOOD, ALL = "good photos", "all photos"
BASIC = ("trigger_word", "class_word", "recipe", "samples")
"""The fields of NodeSettings that are not among the advanced inputs."""
WIDGETS: Mapping[str, Mapping[str, Any]] = {
    "recipe": {"options": list(RECIPES)},
    "learning_rate": {"step": 1e-6, "round": 1e-7}, "resolution": {"step": 8},
    "training_seed": {"control_after_generate": False},
    "sample_prompts": {"multiline": True, "placeholder": "sample prompts, one per line"},
    "settings": {"multiline": True, "placeholder": "any other setting, e.g. text_encoder_lr = 1e-5"},
}  # fmt: skip
"""How the widgets of these fields look."""
LOG_INTERVAL = 30.0
"""Seconds between two progress lines in the server's log."""


class TrainFaceLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRATrain",
            display_name="Train Face LoRA",
            category="FaceLoRA",
            description="Trains a LoRA of one person on MODEL and saves it in the loras folder. If you cancel and queue it "
            "again, training continues. The same inputs are never trained twice. Train only people who have agreed to it.",
            search_aliases=["train lora", "dreambooth", "finetune", "face training"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model to train on. LoRAs and merges applied to it are included."),
                io.Clip.Input("clip", tooltip="The text encoder of the base model."),
                io.Vae.Input("vae", tooltip="The VAE of the base model."),
                io.MultiType.Input(
                    "photos", [FacePhotos, io.Image],
                    tooltip="10 to 20 photos of one person. One is enough to start, 8 to measure likeness. Images work too.",
                ),
                io.String.Input(
                    "name", default="my-face",
                    tooltip="Name of the LoRA file in the loras folder. A number is added if another LoRA already has "
                    "this name.",
                ),
                *_setting_inputs(),
                io.String.Input(
                    "captions", optional=True, force_input=True,
                    tooltip="One caption for each photo, in the same order. Leave it empty for Load Face Photos, which "
                    "already adds captions to its photos.",
                ),
                io.MultiType.Input(
                    "class_photos", [FacePhotos, io.Image], optional=True,
                    tooltip="Pictures of other people of the same class, for prior preservation. Connect them if the "
                    "class word alone starts to draw this person.",
                ),
                io.Mask.Input(
                    "masks", optional=True,
                    tooltip="One mask for each photo, in the same order: white where the person is. All black means no "
                    "mask. Invert masks from Load Image. Leave it empty for Load Face Photos, which reads mask files.",
                ),
                LoraModel.Input(
                    "continue_from", optional=True,
                    tooltip="A LoRA to train further. Without one, training starts with a new LoRA.",
                ),
                io.Combo.Input(
                    "use", options=[GOOD, ALL], default=GOOD, optional=True,
                    tooltip="'good photos' (default) leaves out photos that the photo check rejects, such as blurred "
                    "faces, other people, drawings and duplicates. 'all photos' trains on every photo.",
                ),
                io.Int.Input(
                    "checkpoint", default=0, min=0, max=100_000, optional=True, advanced=True,
                    tooltip="The step whose intermediate LoRA this node outputs. 0 (default) outputs the LoRA that was "
                    "kept. Another measured step is saved as NAME-stepNNNNNN, without training again. The panel has a "
                    "button for each step.",
                ),
                LoraModel.Input(
                    "training_adapter", optional=True,
                    tooltip="For base models distilled to a few steps (Z-Image-Turbo, FLUX.1-schnell): a LoRA that "
                    "undoes the distillation during training. Samples and the trained LoRA don't contain it.",
                ),
                io.MultiType.Input(
                    "drawn_photos", [FacePhotos, io.Image], optional=True,
                    tooltip="Drawn pictures of the person, from Choose Alike. They count at most as much as the photos.",
                ),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, settings: Any = None) -> bool | str:
        """Return True, or a message about an invalid line in `settings`, before anything is loaded.

        It takes one argument, since ComfyUI repeats the message for each.
        """
        # ComfyUI gives a list, or (None,) if the text comes from another node and is unknown until that runs.
        text = settings[0] if isinstance(settings, list | tuple) else settings
        # The lines may be valid only beside a certain recipe or widget: with many steps, samples or photos held out.
        plenty = {"steps": 100_000, "sample_every": 1}
        try:
            config_from(
                recipe_settings("best", next(iter(FAMILIES.values())).recipes, plenty | typed_settings(text or ""))
            )
        except FaceLoraError as problem:
            return str(problem)
        return True

    @classmethod
    def fingerprint_inputs(cls, name: Any = None, **_: object) -> list[str]:
        """Changes when a file that the node returned has been deleted or moved, so that ComfyUI runs the node again."""
        given = name[0] if isinstance(name, list) else name
        is_whole = all(path.exists() for path in app().outputs.get(given, ()))
        return [] if is_whole else [secrets.token_hex()]  # each time another, since the file may be deleted again

    @classmethod
    @says_no_server_paths
    def execute(
        cls, model, clip, vae, photos, name, captions=None, class_photos=None, masks=None, continue_from=None, use=(GOOD,),
        checkpoint=(0,), training_adapter=None, drawn_photos=None, **settings: Sequence[Any],
    ) -> io.NodeOutput:  # fmt: skip
        family, person = trained_family(model[0]), photos_of(photos, captions, masks)
        notes: list[str] = []
        _check_parts(model[0], clip[0], vae[0])
        inputs = NodeSettings(**{name: values[0] for name, values in settings.items()})
        others = _clip_skip(family, clip[0].layer_idx) | ({"check_photos": False} if use[0] == ALL else {})
        config = inputs.config(FAMILIES[family].recipes, len(person), others, notes.append)
        check_makes_lora(config)
        place = LoraFolders(lora_path(name[0]), [Path(folder) for folder in folder_paths.get_folder_paths("loras")])
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()
        with torch.inference_mode(False):
            base = base_from(model[0], clip[0], vae[0], config)
            checked = partial(
                TrainingJob.of, person, base, config, class_photos=photos_of(class_photos),
                drawn_photos=photos_of(drawn_photos),
                start=lora_file(continue_from[0]) if continue_from else None,
                adapter=TrainingAdapter.open(lora_file(training_adapter[0]), base) if training_adapter else None,
            )  # fmt: skip
            made = _make(checked, place, checkpoint[0], cls.hidden.unique_id, notes)
        app().outputs[name[0]] = app().outputs.get(name[0], set()) | {made.path}
        relative = str(made.path.relative_to(folder_paths.get_folder_paths("loras")[0]))
        plot = loss_plot(made.run.history(), f"{made.path.stem}: loss")
        return io.NodeOutput(
            lora_model(LoraFile.read(made.path)), relative, image_tensor(plot), image_tensor(made.run.sample_sheet()),
            ui={"lora_name": [relative]},
        )  # fmt: skip


def _setting_inputs() -> list[Any]:
    """Return the inputs of NodeSettings. The advanced ones have defaults that suit most people."""
    advanced = {"optional": True, "advanced": True}
    return [
        setting_input(NodeSettings, one.name, **WIDGETS.get(one.name, {}), **({} if one.name in BASIC else advanced))
        for one in fields(NodeSettings)
    ]


def _outputs() -> list[Any]:
    return [
        LoraModel.Output(
            display_name="lora",
            tooltip="The trained LoRA, for Apply LoRA or ComfyUI's Load LoRA Model and Save LoRA Weights.",
        ),
        io.String.Output(display_name="lora_name", tooltip="The name of the LoRA file, as loaders list it."),
        io.Image.Output(display_name="loss_plot", tooltip="A chart of the smoothed loss by step."),
        io.Image.Output(
            display_name="sample_grid",
            tooltip="All samples: one row for each time that samples were drawn.",
        ),
    ]  # fmt: skip


def _clip_skip(family: str, layer: int | None) -> dict[str, int]:
    """Return the setting clip_skip for the layer of CLIP Set Last Layer, as a dict that may be empty.

    Raises BadConfig for a layer that the family cannot be trained on.
    """
    spec = FAMILIES[family]
    if layer is None or not spec.trains_text_encoders:  # CLIP encodes the captions itself, and so applies its layer
        return {}
    if spec.has_clip_skip:
        return {"clip_skip": -layer}
    if layer == -2:  # the layer that SDXL always uses
        return {}
    raise BadConfig(
        f"clip: CLIP Set Last Layer is set to {layer}, but {spec.title} can only be trained on layer -2. Set it to -2"
    )


def _check_parts(model: Any, clip: Any, vae: Any) -> None:
    """Raise BadConfig when CLIP or VAE is missing, which ComfyUI's loaders only log, or when the VAE is for another model."""
    for name, part in (("clip", clip), ("vae", getattr(vae, "first_stage_model", None))):
        if part is None:
            raise BadConfig(
                f"{name}: the checkpoint doesn't contain one. Load the {name.upper()} of this base model from another file"
            )
    wanted, made = model.model.latent_format.latent_channels, vae.latent_channels
    if made != wanted:
        raise BadConfig(
            f"vae: it makes latents with {made} channels, but MODEL needs {wanted}. Connect the VAE of this base model"
        )


def _make(
    checked: Callable[..., TrainingJob], place: LoraFolders, checkpoint: int, node_id: str, notes: Sequence[str]
) -> TrainedFile:
    """Return the trained file in the loras folder. It is trained now, shown by the panel, unless it already exists.

    `checked` returns the job when it has checked the photos. If `checkpoint` is not 0, the path is the intermediate LoRA of
    that measured step.
    """
    run, key = app().begin(node_id), None
    watch = Watch(run, place.name)
    for note in notes:
        watch.warning(note)
    try:
        try:
            job = checked(on_warning=watch.warning)
        except BadPhoto as error:
            raise BadPhoto(str(error).replace(SWITCH, f"choose '{ALL}' instead of '{GOOD}' in Train on")) from None
        job.base.compute_hashes(partial(watch.phase, READING))
        if checkpoint and not is_trained(job, place):
            raise BadConfig(
                f"checkpoint = {checkpoint}: these photos and settings have not been trained yet. Set checkpoint to 0"
            )
        photos = photo_urls(job.ready.photos)
        watch.resume(job.key)
        watch.show(photos=photos)
        key = app().remember(run, job.key, place.name, picture=next(iter(photos), None), **_photos_of(job))
        watch.show(person=key)
        callbacks = Callbacks(
            on_step=watch.step,
            on_phase=watch.phase,
            on_sample=watch.sample,
            on_warning=watch.warning,
            check_cancelled=comfy.model_management.throw_exception_if_processing_interrupted,
        )
        device = comfy.model_management.get_torch_device()
        with within_quota(), within_free_memory(device):
            made = studio.timed_training(
                job,
                place,
                device=device,
                on_history=partial(watch.history, job.config),
                on_point=watch.point,
                callbacks=callbacks,
            )
        forget_forecasts()
        watch.show(checkpoints=_choices(made))
        likeness = dict(made.likenesses()).get(made.kept_step())
        word = None if likeness is None else likeness_word(likeness, job.base.draws_roughly)
        kept = {"file": made.path.name, "likeness": likeness, "likeness_word": word}
        _keep(made)
        if checkpoint:
            made = replace(made, path=made.take_checkpoint(checkpoint))
        write_embedding(made.path)
        watch.log(f"{made.path.name}: {'already trained' if made.found else 'trained'}")
        watch.show(phase=DONE, file=made.path.name, chosen=bool(checkpoint), **_results(made, job.base.draws_roughly))
        app().people.note(run.user, key, phase=DONE, **kept)
    except Exception as error:  # the panel shows the user any error
        watch.show(phase=FAILED, error=without_server_paths(str(error)))
        _ended(run, key, FAILED)
        raise
    except BaseException:  # cancelled
        watch.log("stopped. Run it again to continue")
        watch.show(phase=STOPPED)
        _ended(run, key, STOPPED)
        raise
    return made


def _keep(made: TrainedFile) -> None:
    """Give the LoRA a second name in the run's folder. If the first is deleted, the next run copies it from there."""
    kept = made.run.files.output
    with suppress(OSError):
        kept.unlink(missing_ok=True)
        try:
            os.link(made.path, kept)
        except OSError:  # on another disk, or one without links
            shutil.copyfile(made.path, kept)


def _ended(run: QueuedRun, key: str | None, phase: str) -> None:
    if key:
        app().people.note(run.user, key, phase=phase)


def _photos_of(job: TrainingJob) -> dict[str, list[str]]:
    """Return the digests of a training run's photos, and the names of the photos in the input folder."""
    root, sources = input_folder(), [photo.source for photo in job.ready.photos]
    files = [path for path in sources if isinstance(path, Path) and path.is_relative_to(root)]
    return {
        "digests": [photo.digest for photo in job.ready.photos],
        "photos": [path.relative_to(root).as_posix() for path in files],
    }


def _choices(made: TrainedFile) -> list[dict[str, Any]]:
    """Return the intermediate LoRAs that the panel offers: step, likeness, and whether it was kept."""
    likeness = dict(made.likenesses())
    return [
        {"step": step, "likeness": likeness[step], "kept": path == made.path}
        for step, path in made.checkpoints().items()
    ]


def _results(made: TrainedFile, rough: bool) -> dict[str, Any]:
    """Return what the panel shows about a finished training run: its likeness, and the samples of the kept step.

    `rough` is `Base.draws_roughly`.
    """
    shown: dict[str, Any] = {"kept_step": made.kept_step()}
    if likenesses := made.likenesses():
        likeness = dict(likenesses)[made.kept_step()]
        shown |= {"likenesses": likenesses, "kept_likeness": likeness, "kept_word": likeness_word(likeness, rough)}
    if drawn := made.kept_samples():
        step, images = drawn
        shown |= {"samples": sample_urls(images), "samples_step": step}
    return shown


class Watch:
    """The callbacks of a training run: they show progress in the panel and the log, and raise when the user cancels."""

    def __init__(self, run: QueuedRun, name: str):
        self._run = run
        self._name = name
        self._begun = time.monotonic()
        self._logged = -math.inf
        self._phase = ""
        self._bar: Any = None

    def show(self, **news: Any) -> None:
        """Publish the news with the number of seconds that have passed."""
        app().publish(self._run, {"seconds": time.monotonic() - self._begun, **news})

    def resume(self, job: str) -> None:
        """Continue the curves and the clock of an earlier run of the job with that key."""
        shown = app().runs.resumed(job)
        self._begun -= shown.pop("seconds", 0.0)
        self.show(job=job, **shown)

    def _move_bar(self, phase: str, done: int, total: int) -> None:
        """Move the node's progress bar. Each phase gets a new one, because ComfyUI's can't move back."""
        if phase != self._phase:
            self._phase, self._bar = phase, comfy.utils.ProgressBar(total, node_id=self._run.node)
        self._bar.update_absolute(done, total)

    def log(self, text: str, *, always: bool = True) -> None:
        """Write a line into the server's log; if not `always`, only when the last one is LOG_INTERVAL old."""
        if always or time.monotonic() - self._logged > LOG_INTERVAL:
            self._logged = time.monotonic()
            logging.info(one_line(f"Train Face LoRA: {self._name}: {text}"))

    def history(self, config: TrainConfig, points: Sequence[tuple[int, float]]) -> None:
        """Show the loss of steps from earlier calls, and the learning rates that the settings gave them."""
        peak = peak_rate(config)
        rates = [(step, peak * learning_rate_factor(step - 1, config)) for step, _ in points]
        self.show(history=list(points), learning_rates=rates)

    def phase(self, name: str, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if name == LOADING:
            comfy.model_management.unload_all_models()  # CLIP, where it has encoded the captions
        if total:
            self._move_bar(name, done, total)
        self.log(f"{name}: {done} of {total}" if total else name, always=False)
        self.show(phase=name, done=done, total=total)

    def warning(self, message: str) -> None:
        self.log(message)
        self.show(warning=without_server_paths(message))

    def point(self, report: StepReport) -> None:
        self._move_bar(STEPPING, report.step, report.steps)
        measured = {}
        if report.measured:
            word = likeness_word(report.measured.likeness, report.measured.rough)
            measured = {"likeness": report.measured.likeness, "likeness_word": word}
        text = step_line(report, time.monotonic() - self._begun)
        self.log(text, always=report.step == report.steps or bool(measured))
        self.show(
            phase=STEPPING, step=report.step, steps=report.steps, loss=report.loss, learning_rate=report.learning_rate,
            seconds_left=report.seconds_left, memory=report.memory, **measured,
        )  # fmt: skip

    def step(self, report: StepReport) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if app().runs.stop_is_wanted(self._run):
            raise StopAndKeep

    def sample(self, step: int, images: list[Image.Image]) -> None:
        self.show(samples=sample_urls(images), samples_step=step)
        if self._bar:  # the main area of ComfyUI's app mode shows what comes with the bar
            self._bar.update_absolute(self._bar.current, preview=("JPEG", images[0], SAMPLE_SIDE))


def _count(asked: Mapping[str, str], name: str) -> int:
    """Return a number in a query, 0 to 1000; 0 if it is missing. Raises ValueError for something else."""
    return min(max(int(asked.get(name) or 0), 0), 1000)


def _spans(asked: Mapping[str, str]) -> "dict[str, studio.Span]":
    """Return the least and the most seconds that each recipe takes with the node's inputs; {} for an unknown base model.

    Raises BadConfig or ValueError for an invalid input.
    """
    base = opened(asked.get("base", ""))
    if base is None:
        return {}
    settings, recipes = NodeSettings.read(asked), base.family.recipes
    forecast = forecast_for(base, settings, recipes, comfy.model_management.get_torch_device())
    return spans_of(forecast, settings, recipes, *(_count(asked, name) for name in ("photos", "pictures")))


def add_routes() -> None:
    """Add two routes for the node's inputs and a base model, by its file's name in a loader.

    - GET /facelora/recipe?name=NAME&base=FILE&photos=N&lora=NAME&steps=...: what the inputs set, and errors of the name.
    - GET /facelora/forecast?base=FILE&photos=N&pictures=N&steps=...: the least and the most seconds that each recipe takes.
      It returns {} if that is unknown, and null while a prompt runs.
    """
    server = PromptServer.instance

    @server.routes.get("/facelora/forecast")
    async def forecast(request: web.Request) -> web.Response:
        if server.prompt_queue.currently_running:
            return web.json_response(None)
        with suppress(FaceLoraError, ValueError):
            return web.json_response(await asyncio.to_thread(_spans, request.query))
        return web.json_response({})

    @server.routes.get("/facelora/recipe")
    async def recipe(request: web.Request) -> web.Response:
        base, wrong = await asyncio.to_thread(opened, request.query.get("base", "")), {}
        try:
            lora_path(request.query.get("lora") or "-")
        except BadConfig as problem:
            wrong = {"wrong_name": str(problem)}
        if base is None:
            return web.json_response(wrong)
        try:
            settings = replace(NodeSettings.read(request.query), recipe=request.query.get("name", ""))
            config = settings.config(base.family.recipes, _count(request.query, "photos") or ENOUGH)
        except (BadConfig, ValueError) as problem:
            return web.json_response({"error": str(problem)}, status=400)
        shown = wrong | {"steps": config.steps, "batch_size": config.batch_size, "rank": config.rank}
        rate = {"learning_rate": config.learning_rate} if config.learning_rate else {}  # prodigy finds it
        return web.json_response(shown | rate | {"resolution": config.resolution or base.resolution})
