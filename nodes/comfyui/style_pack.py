"""The node Headshot Style Pack, and the addresses that serve the styles' names and pictures."""

# pyright: reportMissingImports=false

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from aiohttp import web
from comfy_api.latest import io, ui
from server import PromptServer

from ...core.errors import BadConfig, BadStylePack
from ...core.pictures.style_pack import FAMILY_DEFAULTS, FoundPacks, StyledPrompt, find_style_packs
from ..settings import NodeStyles
from ..style_picture import style_picture
from .convert import few_steps, speed_hint, style_family
from .folders import refusal, says_no_server_paths, without_server_paths
from .inputs import setting_input

FROM_MODEL = "that of the model"
NOT_VARIED = -1
FEWEST_ALIKE = 4
"""The fewest pictures in a list of pictures that are like one."""


def find_packs() -> FoundPacks:
    """Return the included packs, and the users' own from the folder `style_packs` in ComfyUI's models folder."""
    folder = Path(folder_paths.models_dir) / "style_packs"
    return find_style_packs([folder] if folder.is_dir() else [])


class HeadshotStylePack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        packs = find_packs()
        problems = "".join(f"\nNot used: {problem}" for problem in packs.problems)
        return io.Schema(
            node_id="FaceLoRAStylePack",
            display_name="Headshot Style Pack",
            category="FaceLoRA",
            description="Makes lists of prompts, negative prompts, seeds and sizes for a set of headshots. Connect them to "
            "CLIP Text Encode, Empty Latent Image and KSampler, which draw one picture after the other.\n"
            f"Save your own packs in models/style_packs.{problems}",
            search_aliases=["style", "prompt styler", "headshots", "prompts"],
            inputs=[
                setting_input(NodeStyles, "pack", options=list(packs.packs)),
                setting_input(
                    NodeStyles, "styles", placeholder="all styles of the pack",
                    tooltip="Names of styles in the pack, separated by commas. If empty, all styles are used. "
                    "Click a picture below to add or remove its style.",
                ),
                io.String.Input(
                    "subject",
                    default="sks person",
                    tooltip="The person in the pictures. Connect trigger_phrase of Apply LoRA, or type the LoRA's "
                    "trigger phrase.",
                ),
                setting_input(NodeStyles, "count"),
                setting_input(NodeStyles, "first_seed"),
                io.Combo.Input(
                    "family",
                    options=[FROM_MODEL, *FAMILY_DEFAULTS],
                    tooltip="The model family that the prompts are for: tags for SD1.5 and SDXL, sentences for newer "
                    "models. The default uses the family of the connected model.",
                ),
                setting_input(NodeStyles, "resolution", step=8, advanced=True),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="The model that draws the pictures. Needed only if family is 'that of the model'. A "
                    "model that was distilled to a few steps, by the name of its file, gets these steps and no guidance.",
                ),
                io.String.Input(
                    "extra", default="", placeholder="e.g. smiling, with glasses", optional=True,
                    tooltip="Words that are added to every prompt, such as 'smiling, with glasses'.",
                ),
                io.Int.Input(
                    "vary", default=NOT_VARIED, min=NOT_VARIED, max=2**64 - 1, optional=True, advanced=True,
                    tooltip="Seed of the picture to draw more like. All pictures then have its prompt and size. Give Sample "
                    "Headshots the same seed. -1 (default): the whole list. The panel has a button for it.",
                ),
                io.Int.Input(
                    "variation_seed", default=0, min=0, max=2**64 - 1, control_after_generate=False, optional=True,
                    advanced=True, tooltip="Seed of the first picture that is like the one in vary.",
                ),
            ],
            outputs=_outputs(),
            has_intermediate_output=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, pack: str, **_: object) -> str:
        """Return the pack's content, so that ComfyUI doesn't reuse results of an older version."""
        return repr(find_packs().packs.get(pack))

    @classmethod
    def validate_inputs(cls, pack: str | None = None, styles: str | None = None) -> bool | str:
        if pack is None or styles is None:  # connected to another node, so unknown until it runs
            return True
        try:
            chosen = find_packs().pick(pack)
            for name in NodeStyles(pack, styles).names:
                chosen.style(name)
        except BadStylePack as problem:
            return without_server_paths(str(problem))
        return True

    @classmethod
    @says_no_server_paths
    def execute(
        cls, pack, styles, subject, count, first_seed, family, resolution, model=None, extra="", vary=NOT_VARIED,
        variation_seed=0,
    ) -> io.NodeOutput:  # fmt: skip
        if family == FROM_MODEL:
            if model is None:
                raise BadConfig("family: choose a family, or connect the model that draws the pictures to model")
            family = style_family(model)
        packs = find_packs()
        chosen = NodeStyles(pack, styles, count, first_seed, resolution)
        prompts = _alike(chosen.prompts(packs, subject.strip(), family), vary, variation_seed)
        few = few_steps(model) if model is not None else None  # Such a model draws in its own steps, without guidance.
        hint = speed_hint(model) if model is not None else ""
        return io.NodeOutput(
            [f"{item.prompt.rstrip(' .')}, {extra.strip()}" if extra.strip() else item.prompt for item in prompts],
            [item.negative for item in prompts],
            [item.seed for item in prompts],
            [item.width for item in prompts],
            [item.height for item in prompts],
            [1.0 if few else item.guidance for item in prompts],
            [few.steps if few else item.steps for item in prompts],
            [item.style for item in prompts],
            [item.strength for item in prompts],
            ui=ui.PreviewText("\n".join([*packs.problems, *([hint] if hint else [])])),
        )


def _alike(prompts: Sequence[StyledPrompt], seed: int, variation_seed: int) -> list[StyledPrompt]:
    """Return the item with the seed, and then as often as there are items with other seeds; all items for NOT_VARIED.

    Raises BadConfig without such an item.
    """
    if seed == NOT_VARIED:
        return [*prompts]
    chosen = next((one for one in prompts if one.seed == seed), None)
    if chosen is None:
        raise BadConfig(f"vary = {seed}: no picture of the list has this seed; choose one, or -1 for the whole list")
    count = max(len(prompts), FEWEST_ALIKE) - 1
    others = [other % 2**64 for other in range(variation_seed, variation_seed + count + 1)]
    return [chosen, *(replace(chosen, seed=other) for other in [one for one in others if one != seed][:count])]


def _outputs() -> list[Any]:
    """Return the outputs, all of them lists with one item for each picture."""
    outputs = (
        (io.String, "prompts", "Prompt of each picture, for CLIP Text Encode."),
        (io.String, "negatives", "Negative prompt of each picture, for a second CLIP Text Encode."),
        (io.Int, "seeds", "Seed of each picture, for KSampler's seed."),
        (io.Int, "widths", "Width of each picture in pixels, for Empty Latent Image."),
        (io.Int, "heights", "Height of each picture in pixels, for Empty Latent Image."),
        (io.Float, "guidance", "Guidance (CFG) of each picture, for KSampler's cfg."),
        (io.Int, "steps", "Sampling steps of each picture, for KSampler's steps."),
        (io.String, "names", "Style name of each picture, e.g. for the labels of Contact Sheet."),
        (io.Float, "strengths", "LoRA strength that the style of each picture suggests. If you connect it to Apply LoRA, that "
         "node runs once for each picture."),
    )  # fmt: skip
    return [kind.Output(display_name=name, is_output_list=True, tooltip=text) for kind, name, text in outputs]


def listed(chosen: NodeStyles, vary: int, variation_seed: int) -> list[StyledPrompt]:
    """Return the list of the node for another subject and family. Raises BadStylePack for an unknown pack or style."""
    return _alike(chosen.prompts(find_packs(), "person", next(iter(FAMILY_DEFAULTS))), vary, variation_seed)


def add_routes() -> None:
    """Add two routes to the server.

    GET /facelora/styles?pack=ID returns the names of a pack's styles as JSON, and
    GET /facelora/style?pack=ID&style=NAME the picture of one style.
    """
    routes = PromptServer.instance.routes

    @routes.get("/facelora/styles")
    async def styles(request: web.Request) -> web.Response:
        try:
            return web.json_response(find_packs().pick(request.query.get("pack", "")).names)
        except BadStylePack as problem:
            return refusal(problem, 404)

    @routes.get("/facelora/style")
    async def style(request: web.Request) -> web.StreamResponse:
        try:
            pack = find_packs().pick(request.query.get("pack", ""))
            shown = pack.style(request.query.get("style", ""))
            picture = pack.picture(shown)
        except BadStylePack as problem:
            return refusal(problem, 404)
        if picture is not None:
            return web.FileResponse(picture)
        return web.Response(text=style_picture(shown), content_type="image/svg+xml")
