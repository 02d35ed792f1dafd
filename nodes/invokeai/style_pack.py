"""The style packs that nodes offer, and the node Headshot Style Pack."""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false

from typing import TYPE_CHECKING, Literal

from invokeai.invocation_api import (
    BaseInvocation,
    BaseInvocationOutput,
    InputField,
    InvocationContext,
    ModelIdentifierField,
    OutputField,
    invocation,
    invocation_output,
)

from ...core.models.base import Base
from ...core.pictures.generate import PictureJob
from ...core.pictures.style_pack import MOST_PICTURES, FoundPacks, StyledPrompt, find_style_packs
from ..settings import NodeStyles
from . import services
from .fields import setting_field
from .models import MAIN_MODEL, base_of


def find_packs() -> FoundPacks:
    """Return the included packs, and the user's own from the folder `style_packs` in InvokeAI's root folder."""
    folder = services.root_folder() / "style_packs"
    return find_style_packs([folder] if folder.is_dir() else [])


_FOUND = find_packs()
_TITLES = {name: pack.title for name, pack in _FOUND.packs.items()}
_NOT_USED = "".join(f"\nNot used: {problem}" for problem in _FOUND.problems)
if TYPE_CHECKING:
    PackName = str
else:
    PackName = Literal[tuple(_TITLES)]  # the packs that exist when InvokeAI starts


class StylesInvocation(BaseInvocation):
    """A node that takes prompts from a style pack."""

    model: ModelIdentifierField = InputField(description="The base model: SD1.5 or SDXL.", **MAIN_MODEL)
    style_pack: PackName = InputField(
        default="corporate", description=f"The pack of headshot styles.{_NOT_USED}", ui_choice_labels=_TITLES
    )
    styles: str = setting_field(NodeStyles, "styles")
    count: int = setting_field(NodeStyles, "count", le=MOST_PICTURES)
    first_seed: int = setting_field(NodeStyles, "first_seed")
    resolution: int = setting_field(
        NodeStyles, "resolution",
        "Picture size: the side, in pixels, of a square with the picture's area. 0 uses the model's resolution.",
    )  # fmt: skip

    def prompts(self, base: Base, phrase: str) -> list[StyledPrompt]:
        """Return the prompts for pictures of the person with that trigger phrase."""
        styles = NodeStyles(
            self.style_pack, self.styles, self.count, self.first_seed, self.resolution or base.resolution
        )
        return styles.prompts(find_packs(), phrase, base.family.name)


@invocation_output("facelora_style_pack_output")
class HeadshotStylePackOutput(BaseInvocationOutput):
    prompt: str = OutputField(description="The prompt of the picture chosen with number.")
    negative_prompt: str = OutputField(description="Its negative prompt.")
    width: int = OutputField(description="Its width in pixels.")
    height: int = OutputField(description="Its height in pixels.")
    seed: int = OutputField(description="Its seed.")
    steps: int = OutputField(description="Its number of denoising steps.")
    cfg_scale: float = OutputField(description="Its guidance scale.", title="CFG Scale")
    weight: float = OutputField(description="The LoRA weight that its style suggests.")
    prompts: list[str] = OutputField(description="The prompts of all pictures.")
    negative_prompts: list[str] = OutputField(description="Their negative prompts.")
    widths: list[int] = OutputField(description="Their widths in pixels.")
    heights: list[int] = OutputField(description="Their heights in pixels.")
    seeds: list[int] = OutputField(description="Their seeds.")


@invocation(
    "facelora_style_pack",
    title="Headshot Style Pack",
    tags=["facelora", "headshot", "style", "prompt"],
    category="FaceLoRA",
    version="1.0.0",
    use_cache=False,
)
class HeadshotStylePackInvocation(StylesInvocation):
    """Prompts, sizes and seeds of a batch of headshots, for InvokeAI's own nodes.

    Connect an Iterate node over an Integer Range to `number` to draw all pictures in turn.
    """

    subject: str = InputField(default="sks person", description="The trigger phrase of the LoRA.")
    number: int = InputField(
        default=0, ge=0, description="The picture that the single outputs describe. The first is 0."
    )

    def invoke(self, context: InvocationContext) -> HeadshotStylePackOutput:
        base = base_of(context, self.model)
        prompts = self.prompts(base, self.subject.strip())
        one = prompts[self.number % len(prompts)]
        job = PictureJob.from_style(one).on(base)  # A model that was distilled to a few steps has its own.
        return HeadshotStylePackOutput(
            prompt=one.prompt,
            negative_prompt=one.negative,
            width=one.width,
            height=one.height,
            seed=one.seed,
            steps=job.steps,
            cfg_scale=job.guidance,
            weight=one.strength,
            prompts=[item.prompt for item in prompts],
            negative_prompts=[item.negative for item in prompts],
            widths=[item.width for item in prompts],
            heights=[item.height for item in prompts],
            seeds=[item.seed for item in prompts],
        )
