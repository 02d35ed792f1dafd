"""Predict how other programs load a LoRA.

They are ComfyUI 0.30, diffusers 0.42, peft 0.21, sd-scripts 0.10.1, InvokeAI 6.14 and eight more.

Most of them skip unknown names, with a line in the log at best, so a file with other names loads and does nothing. A family's
name table lists the names that each program supports (`LoadedNames`). tests/comfyui/test_lora_readers.py compares the
predictions with the programs themselves, or with sd-scripts' lists of modules. The other eight were tested once, with complete
LoRAs of published models (`LoadedNames.others`). Anything that was not tested with them counts as not loaded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

from ..tensor_names import NAME_TABLES, T5_PATHS, NamedTensor, NameTable, is_published, is_text_path, parse_key
from .kinds import BIAS_DIFFERENCES
from .names import Entry, LoraNames, has_pefts_magnitude
from .stated import PEFT_KEY

OTHERS = {
    "A1111": frozenset({"dora", "loha", "lokr", "oft"}),
    "Forge": frozenset({"dora", "loha", "lokr"}),
    "SD.Next": frozenset({"dora", "loha", "lokr", "oft"}),
    "stable-diffusion.cpp": frozenset({"loha", "lokr"}),
    "mflux": frozenset[str](),
    "OneTrainer": frozenset[str](),
    "ai-toolkit": frozenset[str](),
    "musubi-tuner": frozenset[str](),
}
"""The kinds of adapters other than plain LoRAs that the programs load, for the families in `_KINDS_IN`."""
_KINDS_IN = {"SD1", "SDXL"}
"""The families, by A1111's names, that were tested with other kinds."""
READERS = ("ComfyUI", "diffusers", "peft", "sd-scripts", "InvokeAI", *OTHERS)
FORMS = {"kohya": "lora_down lora_down+"} | dict.fromkeys(("diffusers", "peft", "comfy"), "lora_A lora lora_A+~ lora+~")
"""The forms of a plain LoRA that diffusers loads, by scheme, as the word in the name of its down matrix (`_form`).

A "+" stands for an alpha beside it, and a "~" for a form whose alpha diffusers ignores."""
TEXT_FORMS = FORMS | {"diffusers": "lora_A lora_linear_layer lora_A+~ lora_linear_layer+~"}
"""The forms of a plain LoRA of a text encoder that diffusers loads, like FORMS."""
INVOKEAI_FORMS = {"kohya": "lora_down lora_down+"}
INVOKEAI_FORMS |= dict.fromkeys(("diffusers", "peft", "comfy", "bare"), "lora_A named")
"""The forms of a plain LoRA that InvokeAI loads, like FORMS."""
PICTURE_PROGRAMS = ("ComfyUI", "diffusers", "InvokeAI")
"""The readers for drawing pictures. Training warns you if one of them cannot load the LoRA."""
TRAINERS = ("peft", "sd-scripts", "OneTrainer", "ai-toolkit", "musubi-tuner")
"""The readers that draw no pictures, except for samples during training."""


@dataclass(frozen=True)
class Objection:
    """The reason why a program does not load a module as intended."""

    reason: str
    loads: bool = False
    """Whether the program loads the module anyway, as a different change."""


@dataclass(frozen=True)
class Reading:
    """How a program loads a LoRA."""

    modules: int
    """The number of modules that the LoRA changes."""
    objections: Mapping[str, Objection]
    """The objections to modules, by their names in the file."""
    of_published: bool = True
    """Whether the LoRA, or all but some of its modules, fits a published model."""
    is_known: bool = True
    """Whether anything is known of the program and the LoRA's family."""

    @property
    def verdict(self) -> str:
        """The result: "loads", "loads in part", "loads as another change" (all or part of it), "not at all" or "not known".

        For a LoRA that fits no published model, "knows the names" replaces the first three, because whether it loads depends
        on the model that you use.
        """
        if not self.is_known:
            return "not known"
        if self.modules == sum(not objection.loads for objection in self.objections.values()):
            return "not at all"
        if not self.of_published:
            return "knows the names"
        if any(objection.loads for objection in self.objections.values()):
            return "loads as another change"
        return "loads in part" if self.objections else "loads"


def read_by(reader: str, lora: LoraNames) -> Reading:
    """Predict how a program, one of READERS, loads a LoRA."""
    if reader in OTHERS and reader not in NAME_TABLES[lora.family].loaded.others:
        nothing = Objection(f"{lora.family} at all, as far as we know")
        return Reading(len(lora.entries), dict.fromkeys((e.name for e in lora.entries), nothing), is_known=False)
    rule = _rule_of(reader, lora)
    found = {entry.name: objection for entry in lora.entries if (objection := _objection(rule, lora.family, entry))}
    if reader not in ("diffusers", "peft") and PEFT_KEY in lora.metadata:
        # Only these two read an alpha other than the rank from the metadata.
        scaled = [entry.name for entry in lora.entries if lora.scale_in_config(entry) not in (None, 1.0)]
        reason = "peft's alpha in the metadata, and loads a different change without it"
        found = dict.fromkeys(scaled, Objection(reason, loads=True)) | found
    refusal = _refusal_by_invokeai(lora, found) if reader == "InvokeAI" else None
    if reader == "diffusers":
        refusal = _refusal_by_diffusers(lora)
    if reader == "SD.Next" and found and (reader, lora.scheme) in NAME_TABLES[lora.family].loaded.others_lack:
        refusal = "a file with modules outside the blocks or of text encoders"
    identity = lora.identity
    misfits = [name for name in lora.misfits if name not in found or found[name].loads] if identity.is_near else []
    if misfits:
        others = f"modules of other sizes than in {identity.nearest}"
        if reader == "ComfyUI":
            of_bias = {entry.name for entry in lora.entries if _changes_bias(entry)}
            bias = f"changes of a bias that {identity.nearest} does not have, or modules of another size"
            found |= {name: Objection(bias if name in of_bias else others) for name in misfits}
        else:  # All other programs stop with an error at the first such module.
            refusal = refusal or f"a file with {others}"
    if refusal:
        found = {entry.name: Objection(refusal) for entry in lora.entries}
    return Reading(len(lora.entries), found, lora.is_known)


def _rule_of(reader: str, lora: LoraNames) -> str:
    """Return the name of the rule, one of _RULES, by which a program loads the modules of a LoRA."""
    if reader in _CONTROL_SIGNS and lora.types.keys() >= _CONTROL_SIGNS[reader]:
        return _OF_CONTROL[reader]
    return _USO_IN_COMFYUI if reader == "ComfyUI" and lora.types.keys() >= _USO_SIGNS else reader


def not_loaded_by(reader: str, lora: LoraNames) -> dict[str, str]:
    """Return, by module, the reason why a program, one of READERS, would not load it or not as intended."""
    return {name: objection.reason for name, objection in read_by(reader, lora).objections.items()}


@lru_cache(maxsize=1 << 17)  # Most files in a folder have the same modules.
def _objection(rule: str, family: str, entry: Entry) -> Objection | None:
    if not all(is_published(family, *module) for module in entry.modules):
        return Objection(f"a module that no published {family} model has")
    named = parse_key(f"{entry.name}.alpha")
    assert named is not None
    if named.path.endswith(".linear1_qkv") and (rule, named.scheme) not in _KNOWING_LINEAR1_QKV:
        return Objection("names of a part of linear1")
    if named.scheme == "peft" and not entry.name.startswith("base_model."):
        return Objection(f"names that begin with {entry.name.partition('base_model.')[0]}base_model.model.")
    table = NAME_TABLES[family]
    prefix = "transformer." if table.is_unet else "unet."
    if named.part == "denoiser" and entry.name.startswith(prefix):
        return Objection(f"names of {family} that begin with {prefix}")
    found = _RULES[rule](table, named, entry)
    return Objection(found) if isinstance(found, str) else found


def _by_comfyui(family: NameTable, named: NamedTensor, entry: Entry) -> Objection | str | None:
    if any(re.search(r"\.lora_(up|B(\.\w+)?)\.bias$", key) for key in entry.keys.values()):
        return "a bias of the up matrix"
    if any(re.search(r"\.lora_[AB]\.(?!default\.)\w+\.weight$", key) for key in entry.keys.values()):
        return "an adapter's name in the tensors' names, except default"
    if not (family.loaded.comfyui or family.loaded.comfyui_later):
        return f"{family.name} at all"
    if entry.kind == "set" and not entry.keys["set_weight"].endswith(".set_weight"):
        return "new weights of norms under the model's own names"
    reason = _name_not_known_to_comfyui(family, named)
    if reason is None and has_pefts_magnitude(entry):
        return Objection("peft's magnitude, and loads a different change without it", loads=True)
    return reason


# If a file has USO's and other names, ComfyUI converts USO's to its own and prefixes all others with "diffusion_model.".
_USO_SIGNS = {"single_blocks.37.processor.qkv_lora.up.weight", "double_blocks.18.processor.qkv_lora2.up.weight"}
_CONTROL_SIGNS = {
    "ComfyUI": {"img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale"},
    "diffusers": {"img_in.lora_A.weight", "double_blocks.0.img_attn.norm.query_norm.scale"},
    "InvokeAI": {"img_in.lora_A.weight", "img_in.lora_B.weight", "img_in.lora_B.bias"},
}
"""The tensors by which programs recognise FLUX.1's control LoRAs with the model's own names."""
_OF_CONTROL = {program: f"a control LoRA in {program}" for program in _CONTROL_SIGNS}
_USO_KEY = re.compile(r"(double|single)_blocks\.\d+\.processor\.(qkv|proj)_lora[12]?\.(down|up)\.weight")
_USO_IN_COMFYUI = "USO's file in ComfyUI"
_KNOWING_LINEAR1_QKV = {("ComfyUI", "comfy"), (_USO_IN_COMFYUI, "xlabs"), ("diffusers", "xlabs")}
"""The (program, naming scheme) pairs that have a name for the rows of q, k and v in FLUX's linear1."""


def _of_uso_by_comfyui(family: NameTable, named: NamedTensor, entry: Entry) -> str | None:
    is_usos = all(_USO_KEY.fullmatch(key) for key in entry.keys.values())
    return None if is_usos else "other names in a file with USO's names"


def _of_control(rule: str, family: NameTable, named: NamedTensor, entry: Entry) -> Objection | str | None:
    if named.scheme != "bare" or "original" not in _whose_paths(family, named):
        return "other names in a file with the names of a control LoRA"
    if rule == "diffusers" and entry.place.fusion.halves_swapped:
        # It swaps the halves of both matrices.
        return Objection("the order of shift and scale in original names, and loads a different change", loads=True)
    return None


def _by_diffusers(family: NameTable, named: NamedTensor, entry: Entry) -> Objection | str | None:
    if _changes_bias(entry):
        return "changes of a bias"
    if _is_t5(named):
        return "T5 as a text encoder"
    if entry.kind == "lokr":
        if "lokr_w1_a" in entry.keys:
            return "adapters of kind lokr whose first factor is a product"
        return _lokr_not_loaded_by_diffusers(family, named, "alpha" in entry.keys)
    if named.scheme not in family.loaded.diffusers:
        # A denoiser of diffusers loads the files that it has saved itself (`save_lora_adapter`).
        is_own = named.scheme == "bare" and "diffusers" in _whose_paths(family, named)
        denoiser = family.diffusers_prefix.rstrip(".")
        hint = f" (pipe.{denoiser}.load_lora_adapter(file, prefix=None) does)" if is_own else ""
        return f"{named.scheme} names of {family.name}{hint}"
    if reason := _paths_not_in_diffusers(family, named):
        return reason
    lacks = family.loaded.diffusers_lacks.get(named.scheme)
    if lacks is not None and re.search(lacks, named.path):
        return f"{named.scheme} names that contain unknown words"
    if named.part == "denoiser" and not is_text_path(named.path):
        forms = family.loaded.diffusers_forms.get(named.scheme, FORMS.get(named.scheme))
    else:
        forms = family.loaded.diffusers_text_forms.get(named.scheme, TEXT_FORMS.get(named.scheme))
    if entry.kind == "set":
        # It reads these only for control LoRAs.
        is_own = entry.keys["set_weight"].endswith(".weight") and "xlabs" in family.loaded.diffusers
        return None if is_own and named.scheme == "diffusers" else "new weights of norms with these names"
    if objection := (_form_not_in(forms, entry) if forms else None) or _kind_not_loaded_by_peft(entry):
        return objection
    if entry.place.index is None and entry.place.fusion.halves_swapped:
        # It swaps them in checkpoints, but not in LoRAs.
        return Objection("the order of shift and scale in original names, and loads a different change", loads=True)
    return None


def _paths_not_in_diffusers(family: NameTable, named: NamedTensor) -> str | None:
    whose = "diffusers" if named.scheme == "diffusers" else family.loaded.diffusers_paths.get(named.scheme)
    is_denoiser = named.part == "denoiser" and not is_text_path(named.path)
    if not is_denoiser or not whose or whose in _whose_paths(family, named):
        return None
    return f"{named.scheme} names of {'the original model' if whose == 'diffusers' else 'diffusers'}"


def _by_peft(family: NameTable, named: NamedTensor, entry: Entry) -> Objection | str | None:
    if _changes_bias(entry):
        return "changes of a bias"
    if named.scheme not in ("diffusers", "peft"):
        return f"{named.scheme} names"
    if named.part == "denoiser" and not is_text_path(named.path) and "diffusers" not in _whose_paths(family, named):
        return f"{named.scheme} names of the original model"
    return _form_not_in("lora_A lora_A+~", entry) or _kind_not_loaded_by_peft(entry)


def _form(entry: Entry) -> str:
    """Return the word in the name of the down matrix, with a "+" if there is an alpha: lora_down+ for Kohya's own files."""
    down = entry.keys["down"].removeprefix(entry.name)
    words = {
        ".lora_A.weight": "lora_A",
        ".lora_A": "short",
        ".lora_down.weight": "lora_down",
        ".lora_linear_layer.down.weight": "lora_linear_layer",
    }
    word = words.get(down, "named" if down.startswith(".lora_A.") else "lora")
    return word + "+" * ("alpha" in entry.keys)


def _form_not_in(forms: str, entry: Entry) -> Objection | str | None:
    if entry.kind not in ("lora", "locon", "dora") or (form := _form(entry)) in forms.split():
        return None
    if f"{form}~" in forms.split():
        return Objection("an alpha in these names, and loads a different change unless it is the rank", loads=True)
    if form.rstrip("+") in forms.split():
        return "an alpha in these names"
    word = re.sub(r"^\W+|\.weight$", "", entry.keys["down"].removeprefix(entry.name))
    return f"{entry.scheme} names that end with {word}"


def _kind_not_loaded_by_peft(entry: Entry) -> Objection | str | None:
    if entry.kind == "dora" and not has_pefts_magnitude(entry):
        return Objection("dora_scale, and loads a different change without it", loads=True)
    return None if entry.kind in ("lora", "locon", "dora") else f"adapters of kind {entry.kind}"


def _by_sd_scripts(family: NameTable, named: NamedTensor, entry: Entry) -> Objection | str | None:
    known = family.loaded.sd_scripts
    if known is None:
        return f"{family.name} at all"
    if not entry.is_plain:
        return f"adapters of kind {entry.kind} in its plain network"
    if named.part != "denoiser":
        prefix = "lora_te3_" if _is_t5(named) else family.kohya_prefixes.get(entry.part, "?")
        is_right = named.module_name.startswith(prefix) and (_is_t5(named) or "text_model" in named.module_name)
        if not is_right:
            return f"{named.scheme} names of text encoders"
        return None if _is_t5(named) or _CLIP_LAYERS.fullmatch(named.path) else "modules outside the layers"
    whose = "original" if family.original_in_kohya else "diffusers"
    if named.scheme != "kohya" or whose not in _whose_paths(family, named):
        return f"{named.scheme} names" if named.scheme != "kohya" else f"names that are not {whose}'s"
    if reason := _form_not_in(FORMS["kohya"], entry):
        return reason
    return None if re.search(known, named.path) else "modules outside the blocks"


def _by_invokeai(family: NameTable, named: NamedTensor, entry: Entry) -> Objection | str | None:
    known = family.loaded.invokeai
    if not known:
        return f"{family.name} at all"
    if entry.kind == "dora":
        if has_pefts_magnitude(entry) or entry.shapes["dora"][:1] != (1,):
            return Objection("a magnitude for each output, and loads a different change", loads=True)
    elif entry.kind not in ("lora", "locon", "loha", "lokr") or entry.changes_bias:
        return f"adapters of kind {entry.kind}"
    if entry.kind in ("loha", "lokr", "dora") and named.scheme != "kohya":
        return f"adapters of kind {entry.kind} with {named.scheme} names, as far as we know"
    unread = _form_not_in_invokeai(family, entry)
    if named.part != "denoiser":
        if named.module_name.startswith(family.loaded.invokeai_text or "?"):
            return unread
        return f"text encoder names that begin with {named.module_name[: -len(named.path)]}"
    patterns = [known[named.scheme, whose] for whose in _whose_paths(family, named) if (named.scheme, whose) in known]
    if not patterns:
        return f"{named.scheme} names of {family.name}"
    return unread if any(re.search(pattern, named.path) for pattern in patterns) else "modules outside the blocks"


def _form_not_in_invokeai(family: NameTable, entry: Entry) -> Objection | str | None:
    forms = family.loaded.invokeai_forms.get(entry.scheme, INVOKEAI_FORMS.get(entry.scheme))
    return _form_not_in(forms, entry) if forms else None


def _by_other(program: str, family: NameTable, named: NamedTensor, entry: Entry) -> Objection | str | None:
    known = family.loaded.others[program].split()
    is_original = {"kohya": family.original_in_kohya, "comfy": family.original_in_comfy}.get(named.scheme, False)
    of_texts = f"{named.scheme}+" in known
    if named.part != "denoiser" or is_text_path(named.path):
        return None if of_texts and _CLIP_LAYERS.fullmatch(named.path) else f"{named.scheme} names of text encoders"
    is_known = of_texts or named.scheme in known
    if not is_known or ("original" if is_original else "diffusers") not in _whose_paths(family, named):
        return f"{named.scheme} names of {family.name}"
    lacks = family.loaded.others_lack.get((program, named.scheme))
    if lacks and re.search(lacks, named.path):
        return f"{named.scheme} names of these modules"
    if not entry.is_plain:
        if program == "stable-diffusion.cpp" and entry.kind == "dora":
            return Objection("dora_scale, and loads a different change without it", loads=True)
        if entry.kind not in OTHERS[program] or family.a1111_version not in _KINDS_IN or entry.changes_bias:
            return f"adapters of kind {entry.kind}, as far as we know"
    if program == "ai-toolkit" and len(entry.modules) > 1:
        return "fused q, k and v above the rank that it is configured for"
    return None


def _refusal_by_diffusers(lora: LoraNames) -> str | None:
    """Return the reason why diffusers refuses a whole file; None if it doesn't."""
    loaded = NAME_TABLES[lora.family].loaded
    if lora.types.keys() >= _CONTROL_SIGNS["diffusers"]:
        # It expects so many modules, without the two for guidance.
        return None if len(lora.entries) >= 464 else "a control LoRA without some of its modules"
    for scheme, stacks in loaded.diffusers_blocks.items():
        paths = {module.path for module in lora.content.modules if module.scheme == scheme}
        for stack, expected in stacks.items():
            numbers = {path.split(".")[1] for path in paths if path.startswith(f"{stack}.")}
            # It counts the blocks, and looks for so many from the first one on.
            missing = {f"{stack}.{number}.{name}" for number in range(len(numbers)) for name in expected} - paths
            if missing:
                return f"a file in {scheme} names without {min(missing)}"
    return next(filter(None, (_refused_by_diffusers(lora.family, entry) for entry in lora.entries)), None)


@lru_cache(maxsize=1 << 16)
def _refused_by_diffusers(family: str, entry: Entry) -> str | None:
    """Return the reason why diffusers refuses any file with this module; None if it doesn't."""
    loaded, named = NAME_TABLES[family].loaded, parse_key(f"{entry.name}.alpha")
    if named is None:
        return None
    if named.part == "denoiser" and re.search(loaded.diffusers_refuses.get(named.scheme, "$^"), named.path):
        return f"a file in {named.scheme} names with layers such as {named.path}"
    if reason := _paths_not_in_diffusers(NAME_TABLES[family], named):
        return f"a file with {reason}"
    if named.path.endswith(loaded.diffusers_linear) and len(entry.shapes.get("down", ())) > 2:
        return f"a file with convolutions where {family} has Linear layers"
    return None


def _refusal_by_invokeai(lora: LoraNames, objections: Mapping[str, Objection]) -> str | None:
    """Return the reason why InvokeAI refuses a whole file; None if it doesn't."""
    loaded = NAME_TABLES[lora.family].loaded
    if not loaded.invokeai:
        return None
    if lora.unknown_keys:
        return "a file with unknown tensors"
    for unknown in (e for e in lora.entries if e.name in objections and not objections[e.name].loads):
        is_skipped = unknown.scheme in loaded.invokeai_skips and unknown.part == "denoiser"
        if is_skipped and not isinstance(_form_not_in_invokeai(NAME_TABLES[lora.family], unknown), str):
            continue
        return f"a file with {objections[unknown.name].reason}"
    outlines = lora.content.outlines
    known = (*loaded.invokeai_signs, *loaded.invokeai_signs_in.get(lora.scheme, ()))
    if known and not any(all(any(sign.matches(*one) for one in outlines) for sign in signs) for signs in known):
        return "a file without the modules that identify the family"
    return None


_RULES = {
    "ComfyUI": _by_comfyui,
    _USO_IN_COMFYUI: _of_uso_by_comfyui,
    **{rule: partial(_of_control, program) for program, rule in _OF_CONTROL.items()},
    "diffusers": _by_diffusers,
    "peft": _by_peft,
    "sd-scripts": _by_sd_scripts,
    "InvokeAI": _by_invokeai,
    **{program: partial(_by_other, program) for program in OTHERS},
}


def _changes_bias(entry: Entry) -> bool:
    return bool(entry.keys.keys() & BIAS_DIFFERENCES)


def _lokr_not_loaded_by_diffusers(family: NameTable, named: NamedTensor, has_alpha: bool) -> str | None:
    if not family.loaded.diffusers_lokr & {(named.scheme, whose) for whose in _whose_paths(family, named)}:
        return f"adapters of kind lokr with {named.scheme} names of {family.name}"
    if named.scheme == "diffusers" and has_alpha:
        return "adapters of kind lokr with an alpha under its own names"
    if named.scheme in family.loaded.diffusers_lokr_with_alpha and not has_alpha:
        prefix = "without a prefix" if named.scheme == "bare" else f"with {named.scheme} names"
        return f"adapters of kind lokr {prefix} and without an alpha"
    in_blocks = named.path.startswith(("transformer_blocks.", "single_transformer_blocks."))
    return None if named.scheme != "lycoris" or in_blocks else "adapters of kind lokr outside the blocks"


def _whose_paths(family: NameTable, named: NamedTensor) -> set[str]:
    """Return the naming of a path: the original model's, diffusers', or both."""
    if family.of_original(named.path) is not None:
        return {"original"}
    return {"original", "diffusers"} if family.of_diffusers(named.path).original == named.path else {"diffusers"}


def _is_t5(named: NamedTensor) -> bool:
    return named.path.startswith(T5_PATHS)


# The CLIP modules that ComfyUI and sd-scripts support in Kohya and diffusers names.
_CLIP_LAYERS = re.compile(r"text_model\.encoder\.layers\.\d+\.(mlp\.fc[12]|self_attn\.\w+_proj)")


def _text_not_known_to_comfyui(family: NameTable, named: NamedTensor) -> str | None:
    if named.scheme == "comfy":
        prefix = family.comfy_prefixes.get(family.part_names.get(named.part, named.part), "?")
        if not named.module_name.startswith(prefix) or ("t5" in prefix) != _is_t5(named):
            return f"text encoder names that begin with {named.module_name[: -len(named.path)]}"
        if _is_t5(named) or named.path.startswith(("text_model.", "text_projection")):
            return None
    if _is_t5(named):
        if named.module_name.startswith(family.loaded.comfyui_t5 or "?"):
            return None
        return f"{named.scheme} names of T5 that begin with {named.module_name.partition('encoder')[0]}"
    if not named.path.startswith(("text_model.", "text_projection")):
        return "text encoder names without text_model"
    if named.scheme not in ("kohya", "diffusers"):
        return f"{named.scheme} names of text encoders"
    is_known = _CLIP_LAYERS.fullmatch(named.path) or (named.scheme, named.path) == ("kohya", "text_projection")
    return None if is_known else f"{named.scheme} names of text encoders outside the layers"


def _name_not_known_to_comfyui(family: NameTable, named: NamedTensor) -> str | None:
    if named.part != "denoiser" or is_text_path(named.path):
        return _text_not_known_to_comfyui(family, named)
    if named.module_name.startswith("oft_unet_"):
        return "names that begin with oft_unet_"
    known, whose = family.loaded.comfyui or family.loaded.comfyui_later, _whose_paths(family, named)
    if named.path.endswith(".scale") and named.scheme != "comfy":
        return f"{named.scheme} names of a tensor that is not a module's weight"
    if "original" in whose and (named.scheme, "original") in known:
        return None
    is_lacking = re.search(family.loaded.comfyui_lacks, named.path)
    if "diffusers" in whose and (named.scheme, "diffusers") in known and not is_lacking:
        return None
    # It supports all diffusers names of a UNet except those of attentions, which must be on their processors, as in old files.
    is_unet_of_diffusers = family.is_unet and "diffusers" in whose and named.scheme in ("diffusers", "bare")
    if is_unet_of_diffusers and (".processor." in named.module_name or ".to_" not in named.path):
        return None
    model = "diffusers" if "diffusers" in whose else "the original model"
    return "names of diffusers" if named.scheme == model else f"{named.scheme} names of {model}"
