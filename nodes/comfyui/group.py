"""The nodes Group Person and Group Portrait: several people in one picture, as `core.pictures.group` draws them.

A KSampler calls the model for each entry of a conditioning, on the entry's area and with the LoRA of its hooks, and blends
the predictions by their masks. That is what `generate_group` does, so the nodes make such entries: one for the scene and one
for each person. Areas and masks depend on the size of the latents and are set when sampling begins.
"""

# pyright: reportMissingImports=false

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.hooks
import comfy.lora
import comfy.model_management
import folder_paths
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io, ui
from torch import Tensor

from ...core.errors import BadConfig, LoraMisfit
from ...core.lora.stated import trigger_words
from ...core.pictures.group import MOST_PEOPLE, Area, Group, GroupMember, Mask, read_box
from .apply import CONNECTED, chosen_lora, file_state, patch_clip
from .convert import LoraModel, loadable, mask_picture, resolution_of
from .folders import prompt_phrase, says_no_server_paths
from .weight_patches import load_patches

MemberType = io.Custom("FACELORA_PERSON")
"""The type of `Member` between Group Person and Group Portrait."""
PLACE = "facelora_place"
"""The key in an entry of a conditioning of its `Slot`."""


@dataclass(frozen=True)
class Member:
    person: GroupMember
    region: Area | None
    """None: side by side with the others."""


@dataclass(frozen=True)
class Slot:
    """The place of a conditioning's entry in the picture."""

    group: Group
    number: int
    """The number of the person; the scene has the last one."""
    multiple: int
    """The number of latents that sides of regions are multiples of, where the picture's are."""


class GroupPerson(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRAPerson",
            display_name="Group Person",
            category="FaceLoRA",
            description="One person for Group Portrait: a LoRA, and the name for the person in the prompt.",
            search_aliases=["person", "character", "several people", "multiple loras"],
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=[CONNECTED, *folder_paths.get_filename_list("loras")],
                    tooltip="The person's LoRA file, from the loras folders. Ignored if a LoRA is connected to lora.",
                ),
                io.String.Input(
                    "name", default="anna",
                    tooltip="A one-word name for the person. Write it in braces in the prompt: {anna}.",
                ),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.05,
                    tooltip="How strongly the LoRA acts in this person's region. It has no effect elsewhere. 1 (default) "
                    "is the strength it was trained at.",
                ),
                io.String.Input(
                    "phrase", default="", placeholder="empty: from the LoRA file. Or e.g. sks woman",
                    tooltip="Trigger word and class word, e.g. 'sks woman'. Needed only if the LoRA's metadata doesn't "
                    "contain them. In the other people's prompts, the class word replaces the name.",
                ),
                io.String.Input(
                    "region", default="", placeholder="empty: side by side. Or e.g. 0, 0, 0.6, 1", optional=True, advanced=True,
                    tooltip="Where the person is: left, top, right and bottom, each from 0 to 1. Set it for everyone or "
                    "for nobody. If empty, people are side by side, in the order of the inputs.",
                ),
                LoraModel.Input(
                    "lora",
                    optional=True,
                    tooltip="A LoRA from Train Face LoRA, Inspect LoRA or ComfyUI's Train LoRA. It is used instead of "
                    "lora_name.",
                ),
                io.Mask.Input(
                    "mask", optional=True,
                    tooltip="Use it instead of region for any shape: white where the person is, grey where they fade "
                    "out. The mask is stretched over the picture.",
                ),
            ],
            outputs=[MemberType.Output(display_name="person", tooltip="Connect it to Group Portrait.")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: object) -> str:
        return file_state(lora_name)

    @classmethod
    @says_no_server_paths
    def execute(cls, lora_name, name, strength, phrase, region="", lora=None, mask=None) -> io.NodeOutput:
        file = chosen_lora(lora_name, lora)
        words, missing = prompt_phrase(file, phrase.strip() or next(iter(trigger_words(file.metadata)), ""))
        if not words:
            raise BadConfig(
                f"{name}: {Path(file.name).name} doesn't contain trigger words. Type them into phrase, e.g. sks woman"
            )
        if missing:
            raise BadConfig(f"{name}: {missing}")
        if mask is not None and region.strip():
            raise BadConfig(f"{name}: mask and region are both given. Disconnect mask, or leave region empty")
        place = read_box(name, region) if region.strip() else None
        if mask is not None:
            place = Mask(mask_picture(mask.reshape(-1, *mask.shape[-2:])[0]))
        return io.NodeOutput(Member(GroupMember(name.strip(), file, words, strength), place))


class GroupPortrait(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        people = io.Autogrow.TemplatePrefix(
            MemberType.Input("person", tooltip="A person in the picture, from left to right."),
            prefix="person", min=1, max=MOST_PEOPLE,
        )  # fmt: skip
        return io.Schema(
            node_id="FaceLoRAGroup",
            display_name="Group Portrait",
            category="FaceLoRA",
            description="Draws several people in one picture, each with their own LoRA, prompt and region. Applying two "
            "LoRAs one after the other would blend their faces.",
            search_aliases=["couple", "family", "multiple loras", "regional prompt", "attention couple", "several people"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model, without the people's LoRAs. Connect the same MODEL to KSampler.",
                ),
                io.Clip.Input("clip", tooltip="The text encoder of the base model, without the people's LoRAs."),
                io.Autogrow.Input(
                    "people", template=people,
                    tooltip="The people in the picture, from left to right: one Group Person each.",
                ),
                io.String.Input(
                    "prompt", multiline=True, default="a photo of {anna} and {ben} in an office", dynamic_prompts=False,
                    tooltip="The prompt, with each person's name in braces. From a list such as '{anna}, {ben} and "
                    "{carl}', each person's prompt keeps only their own name. All other words apply to everyone.",
                ),
                io.String.Input(
                    "negative", multiline=True, default="", dynamic_prompts=False,
                    tooltip="The negative prompt, for the scene and for everyone.",
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=16384, step=8,
                    tooltip="Width of the picture in pixels. 0 (default) is wide enough for a portrait of each person.",
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=16384, step=8,
                    tooltip="Height of the picture in pixels. 0 (default) uses the base model's resolution.",
                ),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Number of pictures."),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive",
                    tooltip="Connect it to KSampler's positive. It contains the regions and LoRAs, and works at any "
                    "picture size.",
                ),
                io.Conditioning.Output(display_name="negative", tooltip="Connect it to KSampler's negative."),
                io.Latent.Output(display_name="latent", tooltip="An empty latent of this size, for KSampler."),
            ],
            has_intermediate_output=True,  # the text stays when ComfyUI reuses the result
        )  # fmt: skip

    @classmethod
    @says_no_server_paths
    def execute(cls, model, clip, people, prompt, negative="", width=0, height=0, batch_size=1) -> io.NodeOutput:
        members: list[Member] = [member for member in people.values() if member is not None]
        group = _group(members)
        group.check_prompt(prompt)
        multiple = _multiple(model)
        begin = comfy.hooks.TransformerOptionsHook(
            {"wrappers": {WrappersMP.OUTER_SAMPLE: {"facelora.group": [_begin_in_places]}}}
        )
        texts = [(group.words_of(person, prompt), person) for person in group.people] + [
            (group.scene_words(prompt), None)
        ]
        entries: tuple[list, list] = ([], [])
        for number, (words, person) in enumerate(texts):
            hooks, own_clip = comfy.hooks.HookGroup(), clip
            hooks.add(begin)
            if person:
                hook, own_clip = _worn(person, model, clip)
                hooks.add(hook)
            # One group of hooks for both, so that KSampler changes the weights once a step.
            values = {"hooks": hooks, PLACE: Slot(group, number, multiple)}
            for conditioning, text in zip(entries, (words, negative), strict=True):
                encoded = own_clip.encode_from_tokens_scheduled(own_clip.tokenize(text))
                conditioning += [[tensor, {**given, **values}] for tensor, given in encoded]
        prompts = "\n".join(f"{person.name if person else 'scene'}: {words}" for words, person in texts)
        size = _size(group, model, width, height, multiple)
        return io.NodeOutput(*entries, _empty(model, size, batch_size), ui=ui.PreviewText(prompts))


def _group(members: list[Member]) -> Group:
    """Return the people in their places. Raises BadConfig if only some have a region, and as `Group` does."""
    people = tuple(member.person for member in members)
    placed = [member.region for member in members if member.region]
    if placed and len(placed) < len(members):
        lacking = next(member.person.name for member in members if member.region is None)
        raise BadConfig(f"region: set it for everyone or for nobody. {lacking} doesn't have one")
    return Group(people, tuple(placed))


def _worn(person: GroupMember, model: Any, clip: Any) -> tuple[Any, Any]:
    """Return the hook that applies the person's LoRA to MODEL, and CLIP with the LoRA. Raises LoraMisfit as Apply LoRA does."""
    lora, entries = loadable(person.lora, model, clip)
    key_map = comfy.lora.model_lora_keys_unet(model.model, {})
    denoiser = [entry for entry in entries if entry.part == "denoiser"]
    hook = comfy.hooks.WeightHook(strength_model=person.strength)
    hook.weights, hook.need_weight_init = load_patches(lora, denoiser, key_map, person.strength), False
    there = model.model.state_dict()
    for place in hook.weights:
        if (name := place if isinstance(place, str) else place[0]) not in there:
            raise LoraMisfit(
                f"{Path(lora.name).name}: it changes {name}, which MODEL doesn't have. Choose a LoRA for this base model"
            )
    clip = clip.clone()
    patch_clip(clip, lora, [entry for entry in entries if entry.part != "denoiser"], person.strength)
    return hook, clip


def _begin_in_places(executor: Any, noise: Tensor, *rest: Any, **others: Any) -> Any:
    """Fit the entries of the conditionings to latents of the noise's size, before sampling begins."""
    conds: dict[str, list[dict]] = executor.class_obj.conds
    for name, entries in conds.items():
        placed = [_in_place(entry, noise) if PLACE in entry else entry for entry in entries]
        conds[name] = [entry for entry in placed if entry is not None]
    return executor(noise, *rest, **others)


def _in_place(entry: Mapping[str, Any], noise: Tensor) -> dict[str, Any] | None:
    """Return the entry with area and mask as ComfyUI reads them; None for a scene that is wholly covered."""
    place: Slot = entry[PLACE]
    height, width = noise.shape[-2:]
    multiple = 1 if width % place.multiple or height % place.multiple else place.multiple
    regions = place.group.regions((width, height), multiple)
    masks = place.group.soft_masks(regions, (width, height))
    left, top, right, bottom = [*regions, (0, 0, width, height)][place.number]
    mask = masks[place.number]
    if not mask.any():
        return None
    sides = {"width": 8 * (right - left), "height": 8 * (bottom - top)}  # in pixels, as ComfyUI says them to SDXL
    area = {"area": (bottom - top, right - left, top, left), "mask": mask.expand(1, *noise.shape[2:]), "strength": 1.0}
    return {**entry, **area, **sides, "mask_strength": 1.0, "set_area_to_bounds": False}


def _multiple(model: Any) -> int:
    """Return the number of latents that both sides of a picture are multiples of."""
    levels = model.model.model_config.unet_config.get("channel_mult")
    return 2 ** (len(levels) - 1) if levels else 16 // model.get_model_object("latent_format").spacial_downscale_ratio


def _size(group: Group, model: Any, width: int, height: int, multiple: int) -> tuple[int, int]:
    """Return the size in pixels. A side of 0 is computed from the group."""
    pixels = model.get_model_object("latent_format").spacial_downscale_ratio
    own = group.size(resolution_of(model), multiple * pixels)
    return width or own[0], height or own[1]


def _empty(model: Any, size: tuple[int, int], count: int) -> dict[str, Any]:
    """Return empty latents of pictures of that size."""
    form = model.get_model_object("latent_format")
    ratio = form.spacial_downscale_ratio
    shape = (count, form.latent_channels, size[1] // ratio, size[0] // ratio)
    zeros = torch.zeros(shape, device=comfy.model_management.intermediate_device())
    return {"samples": zeros, "downscale_ratio_spacial": ratio}
