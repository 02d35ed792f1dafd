"""The node Apply LoRA, which puts a LoRA on a model and its text encoder."""

# pyright: reportMissingImports=false

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import comfy.lora
import folder_paths
from comfy_api.latest import io, ui
from torch import Tensor

from ...core.errors import BadConfig, BadFile, LoraMisfit, counted
from ...core.lora.blocks import BLOCK_LISTS, block_strengths
from ...core.lora.file import LoraFile
from ...core.lora.names import Entry
from ...core.lora.stated import trigger_words
from ...core.models.families import FAMILIES
from ...core.storage.cache_folder import content_key
from .convert import LoraModel, loadable, lora_file
from .folders import prompt_phrase, says_no_server_paths
from .weight_patches import BypassAdapters, load_patches

CONNECTED = "(the connected LoRA)"
MODES = ("into the weights", "bypass", "off")
_made: WeakKeyDictionary[Any, tuple[Any, str]] = WeakKeyDictionary()
"""What each MODEL of this node that is still in use was made from: another MODEL, and a hash of what was applied to it."""


class ApplyLora(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRAApply",
            display_name="Apply LoRA",
            category="FaceLoRA",
            description="Applies a LoRA to MODEL and CLIP, whatever names its file uses. If the LoRA doesn't fit the "
            "model, the node stops with an error instead of only logging it.",
            search_aliases=["lora loader", "load lora", "use lora", "lora block weight", "lora schedule"],
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the LoRA to."),
                io.Combo.Input(
                    "lora_name",
                    options=[CONNECTED, *folder_paths.get_filename_list("loras")],
                    tooltip="The LoRA file to use, from the loras folders. Ignored if a LoRA is connected to lora.",
                ),
                io.Float.Input(
                    "strength_model",
                    default=1.0, min=-10.0, max=10.0, step=0.05,
                    tooltip="How strongly the LoRA changes MODEL. 1 is the strength it was trained at. Lower it if the "
                    "prompt's style is lost, raise it if the likeness is too weak.",
                ),
                io.Float.Input(
                    "strength_clip",
                    default=1.0, min=-10.0, max=10.0, step=0.05,
                    tooltip="How strongly the LoRA changes CLIP. It has no effect if CLIP is not connected or the LoRA "
                    "doesn't change the text encoder.",
                ),
                io.Combo.Input(
                    "mode", options=list(MODES), default=MODES[0], optional=True, advanced=True,
                    tooltip="How the LoRA is applied. 'into the weights' (default) is the fastest. 'bypass' computes the "
                    "LoRA separately and leaves the weights unchanged: slower, but exact for fp8 weights. 'off' passes "
                    "MODEL and CLIP through unchanged.",
                ),
                io.String.Input(
                    "block_weights", default="", multiline=True, optional=True, advanced=True,
                    placeholder="empty: all blocks equal. Or e.g. up_blocks=0.5, IN04=0",
                    tooltip="Multiplies the strength of single blocks: BLOCK=NUMBER, separated by commas, with names from "
                    "Inspect LoRA or BASE, IN04, M00, OUT05. LoRA Block Weight lists work too: "
                    + ", ".join(f"{count} ({family})" for count, family in BLOCK_LISTS if family in FAMILIES) + " numbers.",
                ),
                io.Float.Input(
                    "start_percent", default=0.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="The point in sampling, from 0 to 1, at which the LoRA starts to act on MODEL. Raise it to "
                    "let the base model decide the composition.",
                ),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="The point in sampling, from 0 to 1, at which the LoRA stops acting on MODEL. If the range "
                    "is not 0 to 1, the LoRA is computed separately, as in mode bypass.",
                ),
                io.Clip.Input(
                    "clip", optional=True,
                    tooltip="The text encoder. Connect it if the LoRA changes the text encoder.",
                ),
                LoraModel.Input(
                    "lora",
                    optional=True,
                    tooltip="A LoRA from Train Face LoRA, Inspect LoRA or ComfyUI's Train LoRA. It is used instead of "
                    "lora_name.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="MODEL with the LoRA applied."),
                io.Clip.Output(display_name="clip", tooltip="CLIP with the LoRA applied. Empty if CLIP is not connected."),
                io.String.Output(
                    display_name="trigger_phrase",
                    tooltip="The words for the person in prompts, from the LoRA's metadata, e.g. 'sks person'.",
                ),
                io.String.Output(
                    display_name="prompt",
                    tooltip="The start of a prompt: 'a photo of' and the trigger phrase.",
                ),
                io.String.Output(
                    display_name="label",
                    tooltip="The LoRA's name and its strength, for the labels of Likeness Score and Contact Sheet.",
                ),
            ],
            has_intermediate_output=True,  # the text stays when ComfyUI reuses the result
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> str:
        return file_state(lora_name)

    @classmethod
    @says_no_server_paths
    def execute(
        cls, model, lora_name, strength_model, strength_clip, mode=MODES[0], block_weights="", start_percent=0.0,
        end_percent=1.0, clip=None, lora=None,
    ) -> io.NodeOutput:  # fmt: skip
        if start_percent >= end_percent:
            raise BadConfig(f"start_percent = {start_percent:g} must be less than end_percent = {end_percent:g}")
        file = chosen_lora(lora_name, lora)
        if mode != "off":
            steps = (start_percent, end_percent)
            model, clip = _apply(
                file, model, clip, strength_model, strength_clip, block_weights, mode == "bypass", steps
            )
        phrase, missing = prompt_phrase(file, next(iter(trigger_words(file.metadata)), ""))
        text = lora_summary(file, phrase) + (f"\n{missing}" if missing else "")
        label = f"{Path(file.name).stem} at {0 if mode == 'off' else strength_model:g}"
        return io.NodeOutput(
            model, clip, phrase, f"a photo of {phrase}" if phrase else "", label, ui=ui.PreviewText(text)
        )


def _apply(
    lora: LoraFile, model: Any, clip: Any, strength_model: float, strength_clip: float, block_weights: str,
    bypass: bool, steps: tuple[float, float],
) -> tuple[Any, Any]:  # fmt: skip
    """Return copies of MODEL and CLIP (or None) with the LoRA applied for the given range of the sampling, from 0 to 1."""
    lora, entries = loadable(lora, model, clip)
    factors = block_strengths(lora, block_weights)
    below, model = model, model.clone()
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    whole = steps == (0.0, 1.0)
    sampling = model.get_model_object("model_sampling")
    sigmas = None if whole else (sampling.percent_to_sigma(steps[0]), sampling.percent_to_sigma(steps[1]))
    bypassed = BypassAdapters(sigmas)
    fixed: list[Entry] = []
    for factor, group in _by_factor([entry for entry in entries if entry.part == "denoiser"], factors):
        movable = [entry for entry in group if (bypass or not whole) and _can_bypass(entry, key_map[entry.name])]
        rest = [entry for entry in group if entry not in movable]
        fixed += rest
        strength = strength_model * factor
        bypassed.add(load_patches(lora, movable, key_map, strength), strength)
        _add_patches(model, load_patches(lora, rest, key_map, strength), strength, lora)
    if fixed and not whole:
        raise BadConfig(
            f"start_percent, end_percent: {counted(len(fixed), 'module')} of {Path(lora.name).name}, e.g. {fixed[0].name} "
            f"({fixed[0].kind}), can only be added to the weights, for all steps. Set start_percent to 0 and end_percent to 1"
        )
    if bypass or not whole:
        bypassed.attach(model)
    scales = [lora.scale_in_config(entry) for entry in entries]
    _made[model] = below, content_key(lora.model_hash, scales, strength_model, block_weights, bypass, steps)
    if clip is not None:
        clip = clip.clone()
        for factor, group in _by_factor([entry for entry in entries if entry.part != "denoiser"], factors):
            patch_clip(clip, lora, group, strength_clip * factor)
    return model, clip


def origin(model: Any) -> tuple[Any, list[str]]:
    """Return the MODEL that Apply LoRA has made this one from, and a hash of each thing applied; none for any other MODEL.

    They are the same for a LoRA that only has another name.
    """
    applied = []
    while model in _made:
        model, key = _made[model]
        applied.append(key)
    return model, applied


def patch_clip(clip: Any, lora: LoraFile, entries: list[Entry], strength: float) -> None:
    """Add the entries of text encoders to the CLIP."""
    key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
    _add_patches(clip, load_patches(lora, entries, key_map, strength), strength, lora)


def _by_factor(entries: list[Entry], factors: Mapping[str, float]) -> list[tuple[float, list[Entry]]]:
    """The entries grouped by the factor on their strength, as (factor, entries); entries with factor 0 are left out."""
    groups: dict[float, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(factors[entry.name], []).append(entry)
    return [(factor, group) for factor, group in groups.items() if factor]


def _can_bypass(entry: Entry, place: Any) -> bool:
    """Whether the change can be added to the module's output: not where it depends on the base weight or changes a bias."""
    additive = entry.kind in ("lora", "locon", "loha", "lokr") and "dora" not in entry.keys
    only_rows = isinstance(place, str) or (len(place) == 2 and place[1][0] == 0)
    return additive and entry.keys.keys().isdisjoint(("diff_b", "reshape_weight")) and only_rows


def _add_patches(model_or_clip: Any, patches: Mapping[Any, Any], strength: float, lora: LoraFile) -> None:
    """Add the patches to a MODEL or CLIP. Raises LoraMisfit when it lacks a tensor that they change, such as a bias."""
    if left_over := patches.keys() - set(model_or_clip.add_patches(patches, strength)):
        raise LoraMisfit(
            f"{Path(lora.name).name}: it changes {next(iter(left_over))}, which MODEL and CLIP don't have. Choose a LoRA for "
            "this base model"
        )


def lora_summary(lora: LoraFile, phrase: str) -> str:
    """Return the text that the node shows about a LoRA: its name, family, rank, trigger phrase and base model."""
    ranks = sorted({entry.rank for entry in lora.entries if entry.rank is not None})
    rank = f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    return (
        f"{Path(lora.name).name}: {lora.family}{rank}\ntrigger phrase: {phrase or 'not stated'}\n"
        f"base model: {lora.metadata.get('ss_sd_model_name') or 'not stated'}"
    )


def chosen_lora(lora_name: str, lora: Mapping[str, Tensor] | None) -> LoraFile:
    """Return the connected LoRA, or else the named file. Raises BadFile without either, LoraMisfit if it changes no weight."""
    if lora is None and lora_name == CONNECTED:
        raise BadFile("no LoRA: connect one to lora, or choose a file in lora_name")
    file = LoraFile.read(_path(lora_name)) if lora is None else lora_file(lora)
    if not file.entries:
        raise LoraMisfit(
            f"{Path(file.name).name}: changes no weight. If it is a textual inversion, move it to the embeddings folder and "
            "write embedding:NAME into the prompt"
        )
    return file


def file_state(lora_name: str | None) -> str:
    """Return a text that changes when the file in the loras folders changes; "" if no file is chosen."""
    if not lora_name or lora_name == CONNECTED:
        return ""
    state = _path(lora_name).stat()
    return f"{state.st_size} {state.st_mtime_ns}"


def _path(name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise("loras", name))
