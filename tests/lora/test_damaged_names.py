"""Files with the names and sizes of published models, whole, in part and with one module wrong: what is said of them."""

import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import BadFile, UnknownFamily
from core.lora.content import Content, Types, recognise
from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.lora.names import LoraNames
from core.lora.readers import READERS, read_by
from core.lora.report import format_inspection, inspect_header
from core.storage.safetensors_file import save_safetensors
from core.tensor_names import NAME_TABLES, SCHEMES, text_encoder_path
from tools.model_tables import whole

from .test_identity import CASES, PREFIXES, TABLES, Shapes, subsets


def understood(path: str, shape: tuple[int, ...]) -> bool:
    """Not so modules with three or five axes, of sound and video, and one of Krea 2 whose flattened name is CLIP's too."""
    return len(shape) in (1, 2, 4) and path != "final_layer.norm"


WHOLE = [
    (
        m["title"],
        m["family"],
        {path: shape for path, shape in whole(m["denoiser"][n]).items() if understood(path, shape)},
    )
    for m, n in CASES
]
TEXT_ENCODERS = {name: whole(table) for name, table in TABLES["text_encoders"].items()}


class Named(LoraNames):
    """A LoRA of names and shapes without tensors."""

    def __init__(self, family: str, types: Types, metadata: Mapping[str, str], found: Content | None = None):
        self.family, self.types, self.metadata, self.name = family, types, dict(metadata), "x"
        self.__post_init__(found)

    @classmethod
    def read(cls, types: Types, metadata: Mapping[str, str] = {}) -> "Named":
        family, found = recognise(types, metadata, "x")
        return cls(family, types, metadata, found)


def read(types: Types, metadata: Mapping[str, str] = {}) -> Named | None:
    """The LoRA of these tensors; None where it is refused."""
    try:
        return Named.read(types, metadata)
    except UnknownFamily:
        return None


def types_of(shapes: Shapes, prefix: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    types = {}
    for path, shape in shapes.items():
        name = prefix + (path.replace(".", "_") if prefix.endswith("_") else path)
        if len(shape) == 1:
            types[f"{name}.w_norm"] = ("float16", shape)
        else:
            types[f"{name}.lora_down.weight"] = ("float16", (4, *shape[1:]))
            types[f"{name}.lora_up.weight"] = ("float16", (shape[0], 4, *(1 for _ in shape[2:])))
    return types


def damages(path: str, shape: tuple[int, ...], chance: random.Random) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The module with a size or its path changed in one place, in many ways."""
    outputs, *inputs = shape
    yield path, (outputs + 1, *inputs)
    yield path, (2 * outputs, *inputs)
    if inputs:
        yield path, (outputs, inputs[0] + 1, *inputs[1:])
        yield path, (inputs[0], outputs, *inputs[1:])
        yield path, (outputs,)
    if len(inputs) > 1:
        yield path, (outputs, inputs[0], *(side + 2 for side in inputs[1:]))
    words = path.split(".")
    for number in [place for place, word in enumerate(words) if word.isdigit()][:1]:
        for word in (f"{int(words[number]) + 90}", f"0{words[number]}", f"{words[number]}-{words[number]}"):
            yield ".".join([*words[:number], word, *words[number + 1 :]]), shape
        yield ".".join(words[:number] + words[number + 1 :]), shape
    place = chance.randrange(len(words))
    yield ".".join([*words[:place], f"{words[place]}x", *words[place + 1 :]]), shape
    for changed in (f"{path}.foo", ".".join(words[:-1]) or "x", path.upper(), f"{path} ", path.replace("_", ".")):
        yield changed, shape


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> set[tuple[str, int, int]]:
    """The modules by path, outputs and inputs, where a kernel may be flattened and a 1x1 convolution a Linear."""
    return {(path, shape[0], math.prod(shape[1:])) for path, shape in shapes.items()}


ALL_SIZES: dict[str, set[tuple[str, int, int]]] = {}
for title, _, table in WHOLE:
    ALL_SIZES.setdefault(title, set()).update(sizes(table))


def wrongly_said(shapes: Shapes, prefix: str) -> str | None:
    """What is said untruly of a file with these modules, of which no published model has all."""
    if any(sizes(shapes) <= known for known in ALL_SIZES.values()):
        return None
    lora = read(types_of(shapes, prefix))
    if lora is None:
        return None
    if lora.identity.models:
        return f"is for {lora.identity.models}"
    loading = [reader for reader in READERS if read_by(reader, lora).verdict in ("loads", "loads as another change")]
    return f"loads in {loading}" if loading else None


def damaged(shapes: Shapes, prefix: str, chance: random.Random, size: int) -> Iterator[Shapes]:
    """A few modules of a model, of which the first is damaged."""
    first, *others = chance.sample(sorted(shapes), min(size, len(shapes)))
    for path, shape in damages(first, shapes[first], chance):
        # Dots and "_" are alike in a flattened name.
        if not (prefix.endswith("_") and path.replace(".", "_") == first.replace(".", "_") and shape == shapes[first]):
            yield {path: shape} | {other: shapes[other] for other in others}


@settings(max_examples=150)
@given(
    st.integers(0, len(WHOLE) - 1),
    st.sampled_from([*PREFIXES, "unet."]),
    st.sampled_from([1, 3, 12]),
    st.randoms(use_true_random=False),
)
def test_a_module_that_no_model_has_is_never_said_to_load(model, prefix, size, chance):
    _, _, shapes = WHOLE[model]
    tried = [(modules, wrongly_said(modules, prefix)) for modules in damaged(shapes, prefix, chance, size)]
    assert tried and [(modules, said) for modules, said in tried if said] == []


def fitting(shapes: Shapes) -> tuple[str, ...]:
    """The titles of the models that have all the modules, found without the code that is tested."""
    return tuple(title for title, known in ALL_SIZES.items() if sizes(shapes) <= known)


def parts(shapes: Shapes, chance: random.Random) -> Iterator[Shapes]:
    """All of a model, its matrices, those of attention, some modules and each of a few alone."""
    yield from subsets(shapes)
    for path in chance.sample(sorted(shapes), 3):
        yield {path: shapes[path]}


def assert_told(title: str, family: str | None, shapes: Shapes, prefix: str) -> None:
    """That exactly the models that fit are named: in the report, or in the message that refuses the file."""
    models = fitting(shapes)
    families = {of for other, of, _ in WHOLE if other in models and of}
    assert title in models
    types = types_of(shapes, prefix)
    try:
        lora = Named.read(types)
    except UnknownFamily as error:
        # All blocks of a smaller model are that model's, though they are in a larger one too.
        of_all = title if families and family is None else " or ".join(models)
        assert f"is for {of_all}, which" in str(error), (title, prefix, error)
        return
    told = lora.identity
    assert set(told.models) == set(models) and set(told.families) == families, (title, prefix, told, models)
    assert told.verdict == ("certain" if len(models) == 1 else "ambiguous")
    assert lora.family in families and (family is None or len(models) > 1 or lora.family == family)


@settings(max_examples=25)
@given(st.integers(0, len(WHOLE) - 1), st.sampled_from(PREFIXES), st.randoms(use_true_random=False))
def test_exactly_the_models_that_have_the_modules_are_named(model, prefix, chance):
    title, family, shapes = WHOLE[model]
    cases = list(parts(shapes, chance))
    assert cases
    for part in cases:
        assert_told(title, family, part, prefix)


TRAINED = [(title, family, shapes) for title, family, shapes in WHOLE if family][::2]  # in diffusers' names


@settings(max_examples=25)
@given(
    st.integers(0, len(TRAINED) - 1),
    st.sampled_from(SCHEMES),
    st.sampled_from([1, 2, 8]),
    st.randoms(use_true_random=False),
)
def test_what_is_written_is_of_the_model_that_it_was_made_for(model, scheme, count, chance):
    title, family, shapes = TRAINED[model]
    chosen = chance.sample(sorted(path for path, shape in shapes.items() if len(shape) > 1), count)
    modules = {
        ("denoiser", path): LoraModule(
            torch.zeros(1, *shapes[path][1:]), torch.zeros(shapes[path][0], 1, *[1] * (len(shapes[path]) - 2)), 1.0
        )
        for path in chosen
    }
    version = {"ss_base_model_version": NAME_TABLES[family].base_versions[0]}
    lora = LoraFile.from_tensors(LoraFile.from_modules(family, modules, version, scheme).tensors, version)
    assert lora.family == family and title in lora.identity.models and not lora.misfits


@pytest.mark.parametrize(
    ("family", "parts"), [("sd15", 1), ("sd2", 1), ("sdxl", 2), ("sd3", 3), ("flux1", 2), ("chroma", 1)]
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_file_of_text_encoders_alone_is_of_a_model_with_such_ones(family, parts, scheme):
    model = next(model for model in TABLES["models"] if model["family"] == family)
    modules = {}
    for part, encoder in zip(("text_encoder", "text_encoder_2", "text_encoder_3")[:parts], model["text"], strict=True):
        for path, shape in TEXT_ENCODERS[encoder].items():
            if ".3." in path and len(shape) > 1:
                module = LoraModule(torch.zeros(1, shape[1]), torch.zeros(shape[0], 1), 1.0)
                modules[part, text_encoder_path(path.removeprefix("text_model."))] = module
    version = {"ss_base_model_version": NAME_TABLES[family].base_versions[0]}
    lora = LoraFile.from_tensors(LoraFile.from_modules(family, modules, version, scheme).tensors, version)
    assert lora.family == family and model["title"] in lora.identity.models and not lora.misfits
    assert scheme == "diffusers" or read_by("ComfyUI", lora).verdict == "loads"


def flux1(*wrong: tuple[str, tuple[int, ...]]) -> Shapes:
    """Modules of three double blocks of FLUX.1, and others."""
    sizes = {"img_attn.qkv": (9216, 3072), "img_attn.proj": (3072, 3072), "img_mlp.0": (12288, 3072)}
    return {f"double_blocks.{n}.{path}": size for n in range(3) for path, size in sizes.items()} | dict(wrong)


def report_of(shapes: Shapes, path: Path) -> dict[str, Any]:
    types = types_of(shapes, "diffusion_model.")
    types = {name.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): value for name, value in types.items()}
    save_safetensors(path, {name: torch.zeros(shape, dtype=torch.float16) for name, (_, shape) in types.items()})
    return inspect_header(path)


def test_readers_name_the_module_of_another_size(tmp_path):
    report = report_of(flux1(("double_blocks.1.img_attn.proj", (3072, 3071))), tmp_path / "a.safetensors")
    module = "diffusion_model.double_blocks.1.img_attn.proj"
    assert (report["identity"]["nearest"], report["identity"]["misfits"]) == ("FLUX.1", [module])
    verdicts = {reader: (found["verdict"], found["not_as_meant"]) for reader, found in report["readers"].items()}
    assert verdicts.pop("ComfyUI") == ("loads in part", 1)
    assert set(verdicts.values()) == {("not at all", 9), ("not known", 9)}
    text = format_inspection(report)
    assert f"8 of 9 modules; it does not support modules of other sizes than in FLUX.1, e.g. {module}" in text
    (line,) = (line for line in text.splitlines() if "InvokeAI" in line)
    assert line.endswith(": 0 of 9 modules; it does not support a file with modules of other sizes than in FLUX.1")


def test_of_a_file_in_no_published_sizes_the_names_are_known(tmp_path):
    shapes = {path: (outputs // 8, inputs // 8) for path, (outputs, inputs) in flux1().items()}
    report = report_of(shapes, tmp_path / "a.safetensors")
    assert report["readers"]["ComfyUI"]["verdict"] == "knows the names"
    assert report["readers"]["sd-scripts"]["verdict"] == "not at all"
    lines = [line.split() for line in format_inspection(report).splitlines() if "all 9 modules, only by" in line]
    assert [line[:2] for line in lines] == [["loads", "ComfyUI,"]], "programs that load it alike share a line"


def test_one_module_of_another_model_does_not_make_the_file_that_model_s():
    """A twentieth double block is a sign of HunyuanVideo, where nothing else speaks against it."""
    ends = ("img_in", (3072, 64)), ("txt_in", (3072, 4096))
    lora = read(types_of(flux1(("double_blocks.19.img_attn.qkv", (9216, 3072)), *ends), "diffusion_model."))
    assert lora is not None and lora.family == "flux1"
    assert lora.misfits == ("diffusion_model.double_blocks.19.img_attn.qkv",)


def test_the_family_in_the_metadata_is_the_nearest_of_equally_near_ones():
    types = types_of(flux1(("double_blocks.0.foo", (1, 1))), "diffusion_model.")
    lora = read(types, {"ss_base_model_version": "chroma"})
    assert lora is not None and (lora.family, lora.identity.nearest, lora.misfits) == (
        "chroma",
        "Chroma",
        ("diffusion_model.double_blocks.0.foo",),
    )


@pytest.mark.parametrize(
    ("role", "shape"),
    [("diff_b", (3071,)), ("dora_scale", (3071, 1)), ("lora_B.bias", (9216,)), ("lora_magnitude_vector", (1,))],
)
def test_a_bias_or_magnitude_of_another_size_is_not_understood(role, shape, tmp_path):
    types = types_of(flux1(), "diffusion_model.")
    lora = read(types | {f"diffusion_model.double_blocks.1.img_attn.proj.{role}": ("float16", shape)})
    assert lora is not None and len(lora.entries) == 8 and len(lora.unknown_keys) == 3


@pytest.mark.parametrize(("kind", "shape"), [("oft_blocks", (4, 96, 96)), ("diff_b", (384,)), ("w_norm", (3072,))])
def test_of_kinds_that_tell_the_outputs_alone_these_are_compared(kind, shape):
    types = types_of(flux1(), "lora_unet_")
    lora = read(types | {f"lora_unet_double_blocks_1_txt_attn_proj.{kind}": ("float16", shape)})
    assert lora is not None and lora.misfits == ("lora_unet_double_blocks_1_txt_attn_proj",)


def test_processor_stays_in_names_that_are_no_unet_s():
    types = types_of({"double_stream_layers.0.img_instruct_attn.processor.img_out": (3360, 3360)}, "diffusion_model.")
    with pytest.raises(UnknownFamily, match="is for Boogu, which is not supported"):
        Named.read(types)
    old = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out_lora"
    lora = read({f"{old}.down.weight": ("float16", (4, 1280)), f"{old}.up.weight": ("float16", (1280, 4))})
    assert lora is not None and lora.entries[0].modules[0][1].endswith("attn1.to_out.0")


def test_a_file_of_more_modules_than_any_lora_has_is_refused_at_once():
    types = {
        f"lora_unet_down_blocks_{number}_attentions_0_proj_in.diff": ("float16", (1, 1)) for number in range(20_001)
    }
    with pytest.raises(BadFile, match="many: has 20,001 tensors, but a LoRA can have at most 20,000"):
        recognise(types, {}, "many")
