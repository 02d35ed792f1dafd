"""LoRAs that are applied on the fake device. Each function runs in a process of its own, and returns plain values."""

from lab.emulated_gpu.fake_cuda import DEVICE, fake_cuda  # isort: skip  # before torch

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import numpy as np
import torch

import core.models.memory_plan as memory_plan
from core.faces import Face
from core.lora.apply import apply
from core.lora.file import LoraFile
from core.models.base import Base
from core.pictures import DrawingModel, Group, GroupMember, generate_group
from core.pictures.generate import GenerateConfig, PictureJob, generate
from core.pictures.headshot import cut_out, drawn_again
from core.training.methods import METHODS
from lab.emulated_gpu.trials import Case
from tests.tooling import random_lora

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Applied:
    """What it took to apply a LoRA."""

    to_device: int
    """Bytes copied to the card."""
    to_host: int
    """Bytes copied from the card, but for numbers that the host waits for."""
    waits: int
    matrices: int
    """Bytes of the LoRA's matrices."""
    weights: int
    """Bytes of the weights that it changes."""
    products: int
    """Products on the card that add to a weight."""
    changed: int
    """The number of these weights."""
    pinned: int
    """Bytes of page-locked memory that the LoRA has added."""


def lora_of(case: Case, base: Base, method: str) -> LoraFile:
    """An untrained LoRA of that method, or a random plain one."""
    if method == "lora":
        pattern = r"transformer_blocks\..+" if case.form else ".*"
        return random_lora(base, pattern)
    networks = {"denoiser": base.load("denoiser", CPU, torch.float32)}
    adapter = METHODS[method].attach(networks, base.family, replace(case.config(), method=method), None)  # pyright: ignore
    file = adapter.export(adapter.parameters(), base, {"ss_base_model_version": base.family.base_model_version})
    assert isinstance(file, LoraFile)
    return file


def applied(case: Case, method: str = "lora", brought_in: bool = False, others_follow: bool = False) -> Applied:
    """What it takes to apply a LoRA to a denoiser that is on the card, or whose blocks are all brought in."""
    base = case.base()
    lora = lora_of(case, base, method)
    with fake_cuda() as card, patch.object(memory_plan, "WEIGHTS_IN_DRAWING", 1.0 * (not brought_in)):
        model = DrawingModel(base, "bf16", device=DEVICE)
        model.apply_only(())
        shapes, before = base.module_shapes(), card.pinned
        card.watch()
        model.apply_only(((lora, 0.7),), for_good=not others_follow)
        copies = [copy for copy in card.copies if copy.place.startswith("lora/")]
        changed = [module for entry in lora.entries for module in entry.modules]
        return Applied(
            sum(copy.size for copy in copies if copy.direction == "to device"),
            sum(copy.size for copy in copies if copy.direction == "to host"),
            sum(copy.direction == "read" for copy in copies),
            sum(tensor.nbytes for tensor in lora.tensors.values() if tensor.numel() > 1),
            sum(2 * int(np.prod(shapes[module])) for module in changed),
            sum(count for (name, _), count in card.products.items() if name == "aten.addmm"),
            len(changed),
            card.pinned - before,
        )


def applied_where_much_is_lacking() -> list[int]:
    """The bytes of changes in float32 that are copied to a device like Apple's, which has no fp8 and no inverses, for a LoRA in
    fp8 and for a DoRA, whose change the processor computes.
    """
    base, copied = Case("flux1").base(), []
    plain, dora = (lora_of(Case("flux1"), base, method) for method in ("lora", "dora"))
    fp8 = replace(plain, tensors={name: tensor.to(torch.float8_e4m3fn) for name, tensor in plain.tensors.items()})
    lacking = {
        f"core.{module}.keeps_quantised_weights": lambda _: False
        for module in ("lora.apply", "models.base", "models.spec")
    }
    with ExitStack() as stack:
        for name, value in (lacking | {"core.lora.apply.HAS_ALL_OPERATIONS": "none"}).items():
            stack.enter_context(patch(name, value))
        card = stack.enter_context(fake_cuda())
        card.refused = frozenset({torch.float8_e4m3fn, torch.float64})
        denoiser = base.load("denoiser", DEVICE, torch.bfloat16)
        for lora in (fp8, dora):
            card.watch()
            apply(lora, {"family": "flux1", "denoiser": denoiser}, for_good=True)
            copied.append(sum(copy.size for copy in card.copies if copy.direction == "to device"))
    shapes = base.module_shapes()
    sizes = [
        sum(4 * int(np.prod(shapes[module])) for entry in lora.entries for module in entry.modules)
        for lora in (fp8, dora)
    ]
    return [one - whole for one, whole in zip(copied, sizes, strict=True)]


@contextmanager
def loads() -> Iterator[list[str]]:
    """The parts of a base model that are loaded in this context."""
    found: list[str] = []
    load = Base.load
    with patch.object(Base, "load", lambda base, part, *given: (found.append(part), load(base, part, *given))[1]):
        yield found


def loaded_for_headshots(case: Case) -> tuple[list[str], list[tuple[int, int]]]:
    """The parts that are loaded for headshots of two strengths and their face pass, and the bytes that LoRAs copy to the card
    and back before each picture."""
    base = case.base()
    lora, size = random_lora(base), (64, 64)
    jobs = [
        PictureJob("a photo", seed, size=size, steps=1, strength=strength)
        for seed, strength in enumerate((1.0, 0.5, 0.5))
    ]
    config, copied = GenerateConfig(precision="bf16"), []
    with (
        fake_cuda() as card,
        loads() as found,
        DrawingModel(base, "bf16", device=DEVICE, keeps_originals=True) as model,
    ):

        def note() -> None:
            sizes = {"to device": 0, "to host": 0, "read": 0}
            for copy in card.copies:
                sizes[copy.direction] += copy.size * copy.place.startswith("lora/")
            copied.append((sizes["to device"], sizes["to host"]))
            card.watch()

        drawn = {}
        for picture in generate(base, [(lora, 1.0)], jobs, config, model=model):
            drawn[picture.job] = picture.image
            note()
        face = Face((20, 20, 28, 28), np.zeros((5, 2)), 1.0)
        parts = {job: (job, cut_out(image, face, 0.5, 64, 8)) for job, image in drawn.items()}
        for _ in drawn_again(base, [(lora, 1.0)], parts, config, 0.5, None, model):  # pyright: ignore
            note()
    return found, copied


def loaded_for_a_group(case: Case, people: int) -> tuple[list[str], int]:
    """The parts that are loaded for a picture of some people and two redrawn faces of each. Also the bytes of weights that are
    copied from the card for the picture.
    """
    base = case.base()
    names = ["anna", "ben", "carl"][:people]
    group = Group(tuple(GroupMember(n, random_lora(base, seed=at), f"{n} person") for at, n in enumerate(names)))
    job = PictureJob(group.listed, 1, size=(64 * people, 64), steps=1)
    with (
        fake_cuda() as card,
        loads() as found,
        DrawingModel(base, "bf16", device=DEVICE, keeps_originals=True) as model,
    ):
        (picture,) = generate_group(base, group, [job], GenerateConfig(precision="bf16"), model=model)
        back = sum(copy.size for copy in card.copies if copy.direction == "to host" and "lora/" in copy.place)
        face = Face((20, 20, 28, 28), np.zeros((5, 2)), 1.0)
        for person in group.people:
            words = replace(job, prompt=group.words_of(person, job.prompt))
            for _ in range(2):
                parts = {0: (words, cut_out(picture.image, face, 0.5, 64, 8))}
                loras = [(person.lora, person.strength)]
                list(drawn_again(base, loras, parts, GenerateConfig(precision="bf16"), 0.5, None, model))  # pyright: ignore
    return found, back


def brought_in_for_a_group() -> tuple[float, float, int, int]:
    """The share of blocks that is brought in for a picture of two people and then for a face, on a card that holds twice the
    denoiser. Also the bytes of the denoiser, and those on the card in the end.
    """
    base = Case("flux1").base()
    size = base.weight_bytes("denoiser", torch.bfloat16)
    anna, ben = ((random_lora(base, seed=seed), 1.0) for seed in (1, 2))
    with fake_cuda(2 * size / memory_plan.WEIGHTS_IN_DRAWING / 2**30) as card, DrawingModel(base, "bf16") as model:
        model.apply_only((), at_hand=(anna, ben))
        for_all = model._memory.plan.offload
        model.apply_only((anna,))
        return for_all, model._memory.plan.offload, size, card.live


def left_after_drawing(case: Case, end: str) -> tuple[str, int, int, int]:
    """The error of drawing with blocks brought in that is "done", "cancelled" or "failed", and what it leaves while the error
    is kept: bytes of the card, of page-locked memory in use, and of page-locked memory that torch keeps.
    """

    def step(*_: int) -> None:
        if end == "cancelled":
            raise InterruptedError("stopped")
        if end == "failed":
            card.total = card.live

    base = case.base()
    loras, jobs = [(random_lora(base), 1.0)], [PictureJob("a photo", 1, size=(64, 64), steps=2)]
    with fake_cuda() as card, patch.object(memory_plan, "WEIGHTS_IN_DRAWING", 0.0):
        kept: BaseException | None = None
        try:
            list(generate(base, loras, jobs, device=DEVICE, on_step=step))
        except Exception as error:
            kept = error
        return type(kept).__name__ if kept else "", card.live, card.pinned, card.unpinned
