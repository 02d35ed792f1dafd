"""What a real card would do, tried on the fake one: what is left of a run, odd cards, other programs' settings.

Each function runs in a process of its own, and returns plain values.
"""

from lab.emulated_gpu.fake_cuda import DEVICE, fake_cuda  # isort: skip  # before torch

import os
import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

import core.models.memory_plan as memory_plan
from core import doctor
from core.config import TrainConfig
from core.device import device_and_dtype, within_free_memory
from core.errors import FaceLoraError
from core.faces import Face
from core.lora.file import LoraFile
from core.models.memory_plan import PLANS, MemoryPlan, drawing_plan
from core.models.text import blank_caption
from core.pictures.drawing_model import DrawingModel
from core.pictures.generate import GenerateConfig, PictureJob, generate
from core.pictures.headshot import cut_out, drawn_again
from core.training.callbacks import Callbacks, StepReport
from core.training.inputs import TrainingInputs
from core.training.memory_prediction import choose_plan, predicted_memory
from core.training.step import Run
from core.training.store import train
from lab.emulated_gpu import trials
from lab.emulated_gpu.trials import PLAIN, SHORT, Case, cached
from lab.gpu.agreement import agreement
from tests.random_models import random_base, random_cache
from tests.tooling import encoded_cache, encoded_image


def left_after(case: Case, photos: Path, output: Path, end: str) -> tuple[str, int, int, int]:
    """The error of a training that is "done", "cancelled" or "failed", and what it leaves while the error is kept: bytes of the
    card, of page-locked memory in use, and of page-locked memory that torch keeps.
    """
    with fake_cuda(case.size, case.capability) as card:
        base, kept = case.base(), []

        def step(_: StepReport) -> None:
            if end == "cancelled":
                raise FaceLoraError("stopped")
            if end == "failed":
                card.total = card.live  # another program has taken the rest

        before = card.live
        try:
            train(photos, base, case.config(), output=output, device=DEVICE, callbacks=Callbacks(on_step=step))
        except FaceLoraError as raised:
            kept.append(raised)
        error = "".join(f"{type(raised).__name__}: {raised}" for raised in kept)
        return error, card.live - before, card.pinned, card.unpinned


@dataclass(frozen=True)
class Choice:
    """What a card was like when a person's plan was chosen."""

    plan: str
    live: int
    """Bytes on the card."""


def two_people(case: Case, photos: Path, folder: Path, pictures: int = 20) -> tuple[list[Choice], list[float]]:
    """A person is trained and drawn, with small faces drawn again, and then another: on a card that has just the room for the
    fastest plan of one. The state of the card at each choice, and the share of blocks that was brought in for each drawing.
    """
    chosen: list[Choice] = []
    offloads: list[float] = []
    base = case.base()
    with fake_cuda(case.size, case.capability) as card:

        def choose(*args: Any) -> MemoryPlan:
            live = card.live
            plan = choose_plan(*args)
            chosen.append(Choice(str(plan), live))
            return plan

        def draw(*args: Any) -> MemoryPlan:
            plan = drawing_plan(*args)
            offloads.append(plan.offload)
            return plan

        with patch("core.training.loop.choose_plan", choose), patch("core.pictures.drawing_model.drawing_plan", draw):
            for person in ("first", "second"):
                lora = train(photos, base, case.config(), output=folder / f"{person}.safetensors", device=DEVICE)
                assert isinstance(lora, LoraFile)
                jobs = [PictureJob("a photo of sks person", seed, size=(64, 64), steps=2) for seed in range(pictures)]
                config = GenerateConfig(batch_size=4)
                drawn = [picture.image for picture in generate(base, [(lora, 1.0)], jobs, config, device=DEVICE)]
                face = Face((20, 20, 28, 28), np.zeros((5, 2)), 1.0)
                parts = {n: (jobs[n], cut_out(image, face, 0.5, 64, 8)) for n, image in enumerate(drawn)}
                found = {n: (job, part) for n, (job, part) in parts.items() if part}
                assert len(list(drawn_again(base, [(lora, 1.0)], found, config, 0.35, DEVICE))) == pictures
        return chosen, offloads


def room_for_one(case: Case, settings: Mapping[str, Any]) -> float:
    """The GiB of a card on which the fastest plan of a run fits, but not beside what another one has left."""
    with fake_cuda():
        base, config = case.base(), TrainConfig(**settings)
        dtype = device_and_dtype(config.precision, DEVICE)[1]
        shape = (base.latent_shape.channels, 8, 8)
        cache = encoded_cache(base, [encoded_image(base, "0.png", "a photo of sks person", 0, shape=shape)])
        return (
            1.25
            * predicted_memory(TrainingInputs(cache, base, config, DEVICE, dtype), PLAIN)
            / memory_plan.RESERVE
            / 2**30
        )


def deterministic_after_a_product(photos: Path, output: Path, workspace: str | None) -> str:
    """The error of a deterministic training in a process that has used the GPU before, with that setting of cuBLAS."""
    if workspace:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace
    else:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    with fake_cuda():
        if workspace is not None:
            torch.mm(torch.ones(2, 2, device=DEVICE), torch.ones(2, 2, device=DEVICE))
        case = Case("flux1", settings={**SHORT, "deterministic": True})
        try:
            train(photos, case.base(), case.config(), output=output, device=DEVICE)
        except FaceLoraError as raised:
            return str(raised)
    return ""


def rounded_in_a_comparison() -> tuple[int, bool]:
    """The convolutions in TF32 when a card is compared with the CPU in float32, and whether torch's setting is as before."""
    base = random_base("sd15", 64, torch.device("cpu"), torch.float32)
    cache, before = random_cache(base, TrainConfig(resolution=64)), torch.backends.cudnn.allow_tf32
    with fake_cuda() as card, suppress(ZeroDivisionError):
        agreement(base, cache, DEVICE, torch.float32)
        return card.rounded, before == torch.backends.cudnn.allow_tf32
    raise AssertionError


LACKING_FP8 = ("models.base", "models.spec", "training.adapted_model", "pictures.drawing_model")
"""The modules that ask whether a device has fp8."""


def fp8_where_there_is_none(form: str, plan: MemoryPlan) -> tuple[frozenset[torch.dtype], list[str], int]:
    """A step and a picture on a device without fp8, as MPS is, beside a CPU with it. (diffusers itself avoids float64 on MPS.)

    Returns the dtypes of weights in the step, the ways to store weights that its plans have, and the number of pictures.
    """
    with ExitStack() as stack:
        for module in LACKING_FP8:
            stack.enter_context(patch(f"core.{module}.keeps_quantised_weights", lambda place: place.type == "cpu"))
        card = stack.enter_context(fake_cuda())
        card.refused = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
        case = Case("flux1", form=form)
        base = case.base()
        run = Run(TrainingInputs.on(DEVICE, cached(base, case), base, case.config()), plan=plan)
        run.train_step()
        dtypes = frozenset(parameter.dtype for parameter in run.model.denoiser.parameters())
        offered = sorted({plan.weights for plan in run.model.plans})
        del run
        stack.enter_context(
            patch("core.pictures.drawing_model.drawing_plan", lambda *_: MemoryPlan(offload=plan.offload))
        )
        job = PictureJob("a photo of sks person", seed=1, size=(64, 64), steps=2)
        return dtypes, offered, len(list(generate(base, [], [job], device=DEVICE)))


def pinned_with_little_memory() -> tuple[int, int]:
    """The bytes of page-locked memory, and of weights in usual memory, where the computer has little memory left."""
    with fake_cuda() as card, patch("core.models.memory_plan.free_memory", lambda _: memory_plan.LEFT_FREE):
        case = Case("flux1", plan=PLANS[-1])
        base = case.base()
        run = Run(TrainingInputs.on(DEVICE, cached(base, case), base, case.config()), plan=case.plan)
        run.train_step()
        return card.pinned, run.model.memory.offload.pageable


def pinned_after_texts(ram: int, photos: Path, output: Path) -> tuple[list[int], int, int]:
    """Page-locked memory on a computer with `ram` bytes beside those left to others, and a card that has no room for weights.

    Returns the bytes of weights in usual memory when a picture is drawn and in a step, what is left when texts can't be encoded
    for drawing, and what torch keeps unused when training begins.
    """
    base, pageable, unused = trials.base_with_t5(), [], []
    left: list[int] = []

    def encode_text(encoders: Any, captions: Any, *_: int) -> Any:
        encoders["text_encoder_2"](torch.zeros(1, 16, dtype=torch.long, device=DEVICE))
        if "fails" in captions:
            raise FaceLoraError("stopped")
        blank = blank_caption(base.family, base.components["denoiser"].config, 16)
        return {name: torch.cat([value] * len(captions)).to(DEVICE) for name, value in blank.items()}

    base = replace(base, family=replace(base.family, encode_text=encode_text))
    with ExitStack() as stack:
        card = stack.enter_context(fake_cuda())

        def memory(device: torch.device) -> int:
            return memory_plan.LEFT_FREE + ram - card.pinned - card.unpinned if device.type == "cpu" else 0

        for module in ("models.base", "models.memory_plan", "pictures.drawing_model"):
            stack.enter_context(patch(f"core.{module}.free_memory", memory))
        stack.enter_context(patch("core.models.base.LARGE_ENCODER", 0))
        for text in ("fails", "a photo"):
            with suppress(FaceLoraError), DrawingModel(base, "bf16") as model:
                model.encode({(): [(text, "")]})
                model.apply_only(())
                pageable.append(model._memory.offload.pageable)
            left.append(card.pinned + card.unpinned)
        choose = patch("core.training.loop.choose_plan", lambda *_: unused.append(card.unpinned) or PLANS[-1])
        start = Run.__init__

        def started(run: Run, *given: Any, **named: Any) -> None:
            start(run, *given, **named)
            pageable.append(run.model.memory.offload.pageable)

        with choose, patch.object(Run, "__init__", started):
            train(photos, base, TrainConfig(**SHORT, gradient_checkpointing="auto"), output=output, device=DEVICE)
        return pageable, left[0], unused[0]


def settings_in_a_step(photos: Path, output: Path) -> tuple[list[tuple[bool, bool]], tuple[bool, bool]]:
    """(fp16 sums, trials of kernels) in the steps and afterwards, where the program has set both, as ComfyUI's --fast does."""
    products, seen = torch.backends.cuda.matmul, []

    def now() -> tuple[bool, bool]:
        return products.allow_fp16_accumulation, torch.backends.cudnn.benchmark  # pyright: ignore

    with fake_cuda():
        products.allow_fp16_accumulation = torch.backends.cudnn.benchmark = True  # pyright: ignore
        try:
            case = Case("flux1", settings=SHORT)
            callbacks = Callbacks(on_step=lambda _: seen.append(now()))
            train(photos, case.base(), case.config(), output=output, device=DEVICE, callbacks=callbacks)
            return seen, now()
        finally:
            products.allow_fp16_accumulation = torch.backends.cudnn.benchmark = False  # pyright: ignore


def memory_reported_after_more(photos: Path, output: Path) -> int:
    """The most bytes that a training reports in a process that has used a GiB of the card before."""
    seen, case = [], Case("flux1", settings=SHORT)
    with fake_cuda():
        torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
        callbacks = Callbacks(on_step=lambda report: seen.append(report.memory))
        train(photos, case.base(), case.config(), output=output, device=DEVICE, callbacks=callbacks)
    return max(seen)


def card_without_kernels() -> tuple[str, str]:
    """The error of a training on a card that this torch has no kernels for, and what the doctor says."""
    built_for = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_120", "compute_120")
    with fake_cuda(8, (6, 1), "NVIDIA GeForce GTX 1080", built_for):
        try:
            device_and_dtype()
        except FaceLoraError as raised:
            return str(raised), doctor.format_doctor(doctor.examine(DEVICE))
    return "", ""


def dtypes_of_card(capability: tuple[int, int], name: str) -> tuple[torch.dtype, torch.dtype]:
    """What `auto` chooses on an NVIDIA card, and what for a model that overflows in fp16."""
    with fake_cuda(capability=capability, name=name):
        return tuple(device_and_dtype("auto", None, overflows)[1] for overflows in (False, True))  # pyright: ignore


WINDOWS = {
    "windows": ("win32", "11"),
    "wsl": ("linux", "5.15.167.4-microsoft-standard-WSL2"),
    "linux": ("linux", "6.8.0"),
}
"""What each system reports as its platform and its release."""


def share_on_windows_in_comfyui(system: str, size: float, used: float, own: float) -> tuple[float | None, float | None]:
    """The share of the card in a node and after it, where `used` GiB are another program's and `own` ComfyUI's."""
    name, release = WINDOWS[system]
    with fake_cuda(size) as card, patch.object(sys, "platform", name), patch("platform.release", lambda: release):
        tensors = [torch.empty(int(gib * 2**30), dtype=torch.uint8, device=DEVICE) for gib in (used, own)]
        with patch("torch.cuda.memory_reserved", lambda *_: int(own * 2**30)), within_free_memory(DEVICE):
            within = card.share
        del tensors
        return within, card.share
