"""The node Headshots, which draws a batch of pictures with a LoRA and ranks them by likeness."""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false

import shutil
from dataclasses import replace
from functools import partial

import torch
from invokeai.invocation_api import (
    BaseInvocationOutput,
    ImageField,
    InputField,
    InvocationContext,
    MetadataField,
    ModelIdentifierField,
    OutputField,
    WithBoard,
    invocation,
    invocation_output,
)

from ...core.device import within_free_memory
from ...core.errors import counted
from ...core.lora.file import LoraFile
from ...core.models.base import Base
from ...core.pictures.generate import PictureJob
from ...core.pictures.headshot import Headshot
from ...core.pictures.headshots import make_headshots, read_picture
from ...core.progress import READING
from ...core.storage.cache_folder import content_key, made_folder
from ...core.storage.signature import hashes_in
from ...core.threads import within_quota
from . import services
from .models import LORA_MODEL, base_of, lora_of
from .photos import PhotosInvocation
from .progress import NodeProgress
from .style_pack import StylesInvocation


@invocation_output("facelora_headshots_output")
class HeadshotsOutput(BaseInvocationOutput):
    pictures: list[ImageField] = OutputField(description="The pictures, highest likeness last.")
    likenesses: list[float] = OutputField(
        description="The likeness of each picture to the photos. 0.55 or more is usually the same person. -1 means no "
        "face, or no photos."
    )
    report: str = OutputField(description="The highest likeness, and notes about the photos.")


@invocation(
    "facelora_headshots",
    title="Headshots",
    tags=["facelora", "headshot", "portrait", "lora"],
    category="FaceLoRA",
    version="1.0.0",
    use_cache=False,
)
class HeadshotsInvocation(StylesInvocation, PhotosInvocation, WithBoard):
    """Draw headshots with a LoRA. With photos of the person, sort them by likeness."""

    lora: ModelIdentifierField = InputField(
        description="The LoRA, from Train Face LoRA or your models.", title="LoRA", **LORA_MODEL
    )
    weight: float = InputField(
        default=1.0,
        ge=-2,
        le=2,
        description="Multiplies the LoRA weight that each style suggests. 1 uses it unchanged.",
    )

    def invoke(self, context: InvocationContext) -> HeadshotsOutput:
        progress = NodeProgress(context)
        base, (lora, phrase) = base_of(context, self.model), lora_of(context, self.lora)
        base = replace(base, resolution=self.resolution or base.resolution)  # the resolution for redrawing small faces
        jobs = [PictureJob.from_style(prompt).on(base) for prompt in self.prompts(base, phrase)]
        shots = self._draw(base, lora, jobs, context, progress)
        shots = shots[::-1]  # the page shows the last of a result, and the gallery new pictures first
        names = [self._save(shot, context) for shot in shots]
        shutil.rmtree(shots[0].path.parent)
        return HeadshotsOutput(
            pictures=[ImageField(image_name=name) for name in names],
            likenesses=[-1.0 if shot.likeness is None else shot.likeness for shot in shots],
            report="\n".join([_about(shots), *progress.notes]),
        )

    def _draw(
        self, base: Base, lora: LoraFile, jobs: list[PictureJob], context: InvocationContext, progress: NodeProgress
    ) -> list[Headshot]:
        """Draw the pictures into a folder of the cache. Returns them with the highest likeness first."""
        base.compute_hashes(partial(progress.phase, READING))
        folder = made_folder("headshots", content_key("headshots", base.identity, lora.model_hash, jobs))
        services.make_room(context)
        device = services.device()
        with torch.inference_mode(False), torch.no_grad(), within_quota(), within_free_memory(device):
            return make_headshots(
                base,
                [(lora, self.weight)],
                jobs,
                folder,
                reference=self.reference(context, progress),
                device=device,
                on_progress=progress.phase,
                check_cancelled=progress.check_cancelled,
            )

    def _save(self, shot: Headshot, context: InvocationContext) -> str:
        """Save the picture with the values that InvokeAI's page can recall, and return InvokeAI's name of it."""
        image, job = read_picture(shot.path), shot.job
        values = {
            "positive_prompt": job.prompt, "negative_prompt": job.negative, "seed": job.seed, "steps": job.steps,
            "cfg_scale": job.guidance, "width": image.width, "height": image.height, "likeness": shot.likeness,
            "model": self.model.model_dump(mode="json"),
            "loras": [{"model": self.lora.model_dump(mode="json"), "weight": self.weight * job.strength}],
        }  # fmt: skip
        return services.save_drawn(context, image, MetadataField(values), hashes_in(image.info.get("parameters", "")))


def _about(shots: list[Headshot]) -> str:
    """Return one line about the pictures: their number, and the highest likeness if measured."""
    best = max((shot.likeness for shot in shots if shot.likeness is not None), default=None)
    return counted(len(shots), "picture") + ("" if best is None else f", highest likeness {best:.2f}")
