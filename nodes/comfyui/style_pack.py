"""The node Headshot Style Pack, and the addresses that serve the styles' names and pictures."""

# pyright: reportMissingImports=false

from pathlib import Path

import folder_paths
from aiohttp import web
from comfy_api.latest import io, ui
from server import PromptServer

from ...core.errors import BadConfig, BadStylePack
from ...core.pictures.style_pack import FAMILY_DEFAULTS, FoundPacks, Subject, find_style_packs
from ...core.pictures.style_picture import style_picture
from .convert import style_family
from .folders import says_no_server_paths, without_server_paths

FROM_MODEL = "that of the model"


def user_folder() -> Path:
    """The folder of users' own style packs: `style_packs` in ComfyUI's models folder."""
    return Path(folder_paths.models_dir) / "style_packs"


def find_packs() -> FoundPacks:
    folder = user_folder()
    return find_style_packs([folder] if folder.is_dir() else [])


class HeadshotStylePack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        found = find_packs()
        problems = "".join(f"\nNot used: {problem}" for problem in found.problems)
        return io.Schema(
            node_id="FaceLoRAStylePack",
            display_name="Headshot Style Pack",
            category="FaceLoRA",
            description="Prompts, negative prompts, seeds and sizes for a whole batch of headshots, as lists: wired to "
            "CLIP Text Encode, Empty Latent Image and KSampler, each picture is drawn in turn.\n"
            f"Your own packs go into models/style_packs.{problems}",
            search_aliases=["style", "prompt styler", "headshots", "prompts"],
            inputs=[
                io.Combo.Input(
                    "pack",
                    options=list(found.packs),
                    default="corporate",
                    tooltip="A pack of styles. Your own packs go into models/style_packs and replace those of the same id.",
                ),
                io.String.Input(
                    "styles",
                    default="",
                    placeholder="all styles of the pack",
                    tooltip="Names of styles of the pack, with commas between; empty: all of them. "
                    "A click on a picture below adds or takes out its style.",
                ),
                io.String.Input(
                    "subject",
                    default="sks person",
                    tooltip="Who is in the pictures: the LoRA's trigger phrase, as Apply LoRA gives it.",
                ),
                io.Int.Input(
                    "count", default=8, min=1, max=1000, tooltip="Number of pictures, spread evenly over the styles."
                ),
                io.Int.Input(
                    "first_seed",
                    default=1, min=0, max=2**64 - 1,
                    tooltip="Seed of the first picture; the next ones count up. Also decides which variations are drawn.",
                ),
                io.Combo.Input(
                    "family",
                    options=[FROM_MODEL, *FAMILY_DEFAULTS],
                    tooltip="Kind of model that reads the prompts: tags for SD1.5 and SDXL, sentences for later ones.",
                ),
                io.Int.Input(
                    "resolution",
                    default=0, min=0, max=4096, step=8, advanced=True,
                    tooltip="Side of the square with a picture's area, in pixels; 0: what the family was trained at.",
                ),
                io.Model.Input("model", optional=True, tooltip="Tells the family when it is not chosen."),
            ],
            outputs=[
                io.String.Output(display_name="prompts", is_output_list=True, tooltip="To CLIP Text Encode."),
                io.String.Output(display_name="negatives", is_output_list=True, tooltip="To another CLIP Text Encode."),
                io.Int.Output(display_name="seeds", is_output_list=True, tooltip="To KSampler's seed."),
                io.Int.Output(display_name="widths", is_output_list=True, tooltip="To Empty Latent Image, in pixels."),
                io.Int.Output(display_name="heights", is_output_list=True, tooltip="To Empty Latent Image, in pixels."),
                io.Float.Output(display_name="guidance", is_output_list=True, tooltip="To KSampler's cfg."),
                io.Int.Output(display_name="steps", is_output_list=True, tooltip="To KSampler's steps."),
                io.String.Output(display_name="names", is_output_list=True, tooltip="Name of each picture's style."),
                io.Float.Output(
                    display_name="strengths",
                    is_output_list=True,
                    tooltip="LoRA strength that each style suggests; to Apply LoRA's strength, which then runs for each "
                    "picture.",
                ),
            ],
            has_intermediate_output=True,
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, pack: str, **_: object) -> str:
        """Changes with the content of the pack's file, so that ComfyUI does not reuse results of an older one."""
        return repr(find_packs().packs.get(pack))

    @classmethod
    def validate_inputs(cls, pack: str | None = None, styles: str | None = None) -> bool | str:
        if pack is None or styles is None:  # wired from another node: known only when it runs
            return True
        try:
            chosen = find_packs().pick(pack)
            for name in _names(styles):
                chosen.style(name)
        except BadStylePack as problem:
            return without_server_paths(str(problem))
        return True

    @classmethod
    @says_no_server_paths
    def execute(cls, pack, styles, subject, count, first_seed, family, resolution, model=None) -> io.NodeOutput:
        if family == FROM_MODEL:
            if model is None:
                raise BadConfig("family: connect a model, or choose a family")
            family = style_family(model)
        found = find_packs()
        prompts = found.pick(pack).prompts(
            Subject(subject.strip(), class_word=""), family, count, first_seed,
            styles=_names(styles) or None, resolution=resolution or None,
        )  # fmt: skip
        return io.NodeOutput(
            [item.prompt for item in prompts],
            [item.negative for item in prompts],
            [item.seed for item in prompts],
            [item.width for item in prompts],
            [item.height for item in prompts],
            [item.guidance for item in prompts],
            [item.steps for item in prompts],
            [item.style for item in prompts],
            [item.strength for item in prompts],
            ui=ui.PreviewText("\n".join(found.problems)),
        )


def _names(styles: str) -> list[str]:
    return [name.strip() for name in styles.split(",") if name.strip()]


def add_routes() -> None:
    """Adds two addresses to the server.

    GET /facelora/styles?pack=ID answers with the names of a pack's styles as JSON, and
    GET /facelora/style?pack=ID&style=NAME with the picture of one.
    """
    routes = PromptServer.instance.routes

    @routes.get("/facelora/styles")
    async def styles(request: web.Request) -> web.Response:
        try:
            return web.json_response(find_packs().pick(request.query.get("pack", "")).names)
        except BadStylePack as problem:
            return web.json_response({"error": without_server_paths(str(problem))}, status=404)

    @routes.get("/facelora/style")
    async def style(request: web.Request) -> web.StreamResponse:
        try:
            pack = find_packs().pick(request.query.get("pack", ""))
            shown = pack.style(request.query.get("style", ""))
            picture = pack.picture(shown)
        except BadStylePack as problem:
            return web.json_response({"error": without_server_paths(str(problem))}, status=404)
        if picture is not None:
            return web.FileResponse(picture)
        return web.Response(text=style_picture(shown), content_type="image/svg+xml")
