"""What other programs make of the files that we write: the table of docs/formats.md.

diffusers and peft are asked about all modules at full width. ComfyUI computes whole matrices: it is asked what it loads of all
modules at full width, how it changes all those of small models, and in `make test-all` those of full width too.
"""

import itertools
import re
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.lora.file import LoraFile
from core.lora.modules import LoraModule
from core.lora.readers import not_loaded_by, read_by
from core.tensor_names import NAME_TABLES, SCHEMES, ModuleId
from tests.small_models import IN_DIFFUSERS
from tests.tooling import mostly_slow

from .lora_changes import (
    EXACT,
    MODELS,
    TEXT_ENCODERS,
    Changes,
    changes_of,
    comfyui_changes,
    compare,
    copied,
    family_of,
    in_original_names,
    loras_of,
    model_of,
    of_diffusers,
    of_peft,
    probed,
    run_comfyui,
    run_invokeai,
    text_loras_of,
    text_of_diffusers,
    text_of_peft,
)

pytestmark = pytest.mark.filterwarnings("ignore")

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats.md"
# Prefix, and whether the rest is flattened, of the schemes that are only read.
OTHER_SCHEMES = {
    "onetrainer": ("lora_transformer_", True),
    "lycoris": ("lycoris_", True),
    "peft": ("base_model.model.", False),
    "bare": ("", False),
}
# Prefix, whether the rest is flattened, and whether it is the original model's path.
LOKR_NAMES = {
    "comfy": ("diffusion_model.", False, True),
    "comfy with diffusers' paths": ("diffusion_model.", False, False),
    "kohya": ("lora_unet_", True, True),
    "diffusers": ("transformer.", False, False),
    "bare": ("", False, False),
    "lycoris": ("lycoris_", True, False),
    "peft": ("base_model.model.", False, True),
    "peft with diffusers' paths": ("base_model.model.", False, False),
}
# The ends of the names of down and up matrices, as different trainers write them.
FORMS = {
    "lora_A": ("lora_A.weight", "lora_B.weight"),
    "lora_down": ("lora_down.weight", "lora_up.weight"),
    "named": ("lora_A.default.weight", "lora_B.default.weight"),
    "lora": ("lora.down.weight", "lora.up.weight"),
    "lora_linear_layer": ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
    "short": ("lora_A", "lora_B"),
}
OTHER_KINDS = ("sd15", "other kinds")
FAMILIES = {name: table for name, table in NAME_TABLES.items() if name in MODELS}
"""All but MOSS-Image, which is in no version of diffusers or ComfyUI that is installed here."""
IN_COMFYUI = [name for name, table in FAMILIES.items() if table.loaded.comfyui]
IN_PIPELINES = [name for name, table in FAMILIES.items() if table.loaded.diffusers]
BUT_FOR_LARGE = mostly_slow(FAMILIES, *(name for name in FAMILIES if name not in ("sd2", "sdxl")))
"""All families; UNets with many modules only in a full run of the tests, but for one."""


def contents_of(family: str) -> list[str]:
    """What LoRAs that we write are of: the rows of docs/formats.md."""
    return [*SCHEMES, *(f"text {scheme}" for scheme in SCHEMES if family in TEXT_ENCODERS)]


def other_schemes_of(family: str) -> list[str]:
    """The schemes that are only read, and have names for the family."""
    return [*OTHER_SCHEMES, *["xlabs"] * (family == "flux1")]


def lora_of(family: str, contents: str) -> LoraFile:
    """The LoRA in a scheme, of the denoiser's blocks or, after `text `, of the text encoders."""
    blocks = loras_of(family, blocks_only=True)
    if contents == "xlabs":
        return LoraFile(family, {}, in_xlabs_names(LoraFile.from_modules(family, blocks, {}, "comfy")))
    if contents in OTHER_SCHEMES:
        return LoraFile(family, {}, in_other_scheme(blocks, contents))
    if contents in SCHEMES:
        return LoraFile.from_modules(family, blocks, {}, contents)
    # Some programs go by the denoiser's names, so that a file without any would be no fair question.
    denoiser = dict(list(blocks.items())[-1:])
    return LoraFile.from_modules(family, {**denoiser, **text_loras_of(family)}, {}, contents.removeprefix("text "))


def whole_lora_of(model: str, scheme: str) -> LoraFile:
    """Of a family, or `small-` and one: of the whole denoiser and the text encoders."""
    texts = text_loras_of(model) if family_of(model) in TEXT_ENCODERS else {}
    return LoraFile.from_modules(family_of(model), {**loras_of(model, blocks_only=False), **texts}, {}, scheme)


def in_other_scheme(modules: Mapping[ModuleId, LoraModule], scheme: str) -> dict[str, Tensor]:
    prefix, is_flat = OTHER_SCHEMES[scheme]
    tensors = {}
    for (_, path), module in modules.items():
        name = prefix + (path.replace(".", "_") if is_flat else path)
        if is_flat:
            tensors |= {f"{name}.lora_down.weight": module.down, f"{name}.lora_up.weight": module.up}
            tensors[f"{name}.alpha"] = torch.tensor(module.alpha)
        else:
            tensors |= {f"{name}.lora_A.weight": module.down, f"{name}.lora_B.weight": module.up * module.scale}
    return tensors


def in_xlabs_names(lora: LoraFile) -> dict[str, Tensor]:
    """The tensors of the attention in double blocks; the numbers of XLabs' names are those of the streams."""
    name = re.compile(r"diffusion_model\.(double_blocks\.\d+)\.(img|txt)_attn\.(qkv|proj)\.lora_([AB])\.weight")
    found = {key: match for key in lora.tensors if (match := name.fullmatch(key))}
    return {
        f"{m[1]}.processor.{m[3]}_lora{1 if m[2] == 'img' else 2}.{'down' if m[4] == 'A' else 'up'}.weight": lora.tensors[
            key
        ]
        for key, m in found.items()
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[tuple[str, str], Path]:
    """(model, scheme) -> a file for ComfyUI."""
    folder = tmp_path_factory.mktemp("loras")
    loras = {OTHER_KINDS: other_kinds()}
    for family in IN_COMFYUI:
        loras |= {(family, scheme): lora_of(family, scheme) for scheme in other_schemes_of(family)}
        loras |= {(model, s): whole_lora_of(model, s) for model in (family, f"small-{family}") for s in SCHEMES}
    paths = {name: folder / f"{' '.join(name)}.safetensors" for name in loras}
    for name, lora in loras.items():
        lora.save(paths[name], torch.float32)
    return paths


@pytest.fixture(scope="module")
def by_comfyui(files) -> dict[tuple[str, str], dict]:
    """(model, scheme) -> what ComfyUI makes of the file; how it changes a weight only of small models."""
    with_changes = {name for name in files if name[0].startswith("small-") or name == OTHER_KINDS}
    models = [name[0] if name in with_changes else f"names-{name[0]}" for name in files]
    return dict(zip(files, run_comfyui(zip(models, files.values(), strict=True)), strict=True))


def in_comfyui(model: str) -> dict[str, Changes]:
    """What each weight of ComfyUI's should change by, of the denoiser and, as `text `, of the text encoders."""
    family = family_of(model)
    originals = in_original_names(family, loras_of(model, blocks_only=False))
    wanted = {"": {f"diffusion_model.{name}": change for name, change in originals.items()}}
    if family in TEXT_ENCODERS:
        prefixes = FAMILIES[family].comfy_prefixes
        wanted["text "] = {
            prefixes[part].removeprefix("text_encoders.") + path: probed(module.down, module.up, module.scale)
            for (part, path), module in text_loras_of(model).items()
        }
    return wanted


@cache
def by_diffusers(family: str) -> dict[str, Changes | str]:
    """Contents of a file -> the changes that it makes, or the error."""
    found = {
        contents: attempt(of_diffusers, family, lora_of(family, contents))
        for contents in (*SCHEMES, *other_schemes_of(family))
    }
    texts = [contents for contents in contents_of(family) if contents not in SCHEMES]
    return found | {contents: attempt(text_of_diffusers, family, lora_of(family, contents)) for contents in texts}


def attempt(read: Callable[[str, LoraFile], Changes], family: str, lora: LoraFile) -> Changes | str:
    try:
        return read(family, lora)
    except (RuntimeError, ValueError, LookupError) as error:
        return f"fails: {type(error).__name__}"


def of_project(family: str, lora: LoraFile) -> Changes:
    # Of the same widths as FLUX.1 are Chroma's blocks: there the metadata decide.
    found = LoraFile.from_tensors(lora.tensors, {"ss_base_model_version": FAMILIES[family].base_versions[0]})
    assert found.family == family
    return changes_of(found.modules())


def documented() -> dict[tuple[str, str], list[str]]:
    """(family, contents) -> cells: this project, ComfyUI, diffusers, peft, InvokeAI."""
    rows = {}
    for line in DOCUMENT.read_text().splitlines():
        if line.count("|") == 8:
            family, scheme, *cells = (cell.strip() for cell in line.strip("|").split("|"))
            family, *text = family.split()
            rows[family, " ".join([*text, scheme])] = cells
    return rows


def rounded(cell: str) -> str:
    """With one word for deviations so small that they are rounding, which is the processor's own."""
    modules, _, deviation = cell.partition(" ")
    return f"{modules} exact" if "/" in modules and float(deviation) < EXACT else cell


def assert_documented(cells: Mapping[tuple[str, str], tuple[str, ...]], columns: tuple[int, ...]) -> None:
    """That the cells stand in these columns of the document."""
    known = documented()
    wrong = {
        name: found
        for name, found in cells.items()
        if [rounded(cell) for cell in found] != [rounded(known[name][column]) for column in columns]
    }
    assert not wrong, f"docs/formats.md, columns {columns}: {wrong}"


@pytest.mark.parametrize("family", BUT_FOR_LARGE)
def test_this_project_diffusers_and_peft_read_our_files_as_the_document_says(family):
    cells = {}
    for contents in contents_of(family):
        lora, is_text = lora_of(family, contents), contents.startswith("text ")
        wanted = changes_of(text_loras_of(family) if is_text else loras_of(family, blocks_only=True))
        found = [
            attempt(of_project, family, lora),
            by_diffusers(family)[contents],
            attempt(text_of_peft if is_text else of_peft, family, lora),
        ]
        cells[family, contents] = tuple(f if isinstance(f, str) else str(compare(f, wanted)) for f in found)
    assert_documented(cells, (0, 2, 3))


@pytest.mark.parametrize("family", BUT_FOR_LARGE)
def test_it_is_known_what_diffusers_loads(family):
    results = by_diffusers(family)
    assert results
    for contents, found in results.items():
        lora = lora_of(family, contents)
        refused, of_text = not_loaded_by("diffusers", lora), contents.startswith("text ")
        entries = [e for e in lora.entries if (e.part != "denoiser") == of_text and e.name not in refused]
        names = {path if part == "denoiser" else f"{part}.{path}" for e in entries for part, path in e.modules}
        assert (set() if isinstance(found, str) else set(found)) == names, contents


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "sd15", "flux1", "qwen-image"))
def test_it_is_known_what_diffusers_makes_of_layers_outside_the_blocks(family):
    for scheme in SCHEMES:
        lora = LoraFile.from_modules(family, loras_of(family, blocks_only=False), {}, scheme)
        found, objections = attempt(of_diffusers, family, lora), read_by("diffusers", lora).objections
        loaded = [e for e in lora.entries if e.name not in objections or objections[e.name].loads]
        names = {path for entry in loaded for _, path in entry.modules}
        changes = {} if isinstance(found, str) else found
        assert set(changes) == names, (scheme, found)
        wanted = changes_of(lora.modules())
        for entry in loaded:
            for _, path in entry.modules:
                is_right = (changes[path] - wanted[path]).norm() < EXACT * wanted[path].norm()
                assert is_right == (entry.name not in objections), (scheme, path)


@pytest.mark.parametrize("family", mostly_slow(IN_PIPELINES, "sd3", "flux1", "ernie-image"))
def test_it_is_known_in_which_forms_of_names_diffusers_loads_a_lora(family):
    # diffusers splits some matrices by the published models' widths.
    is_small = family in IN_DIFFUSERS and family not in ("flux1", "chroma", "lumina2")
    name = f"small-{family}" if is_small else family
    model, modules = model_of(name), loras_of(name, blocks_only=True)
    assert modules and FAMILIES[family].loaded.diffusers & {*SCHEMES}
    for scheme in sorted(FAMILIES[family].loaded.diffusers & {*SCHEMES}):
        plain = LoraFile.from_modules(family, modules, {}, scheme).tensors
        for form, has_alpha in itertools.product(FORMS, (True, False)):
            lora = LoraFile(family, {}, in_form(plain, form, has_alpha))
            found = attempt(partial(of_diffusers, model=model), family, lora)
            assert_as_known(lora, found, (scheme, form, has_alpha))


def assert_as_known(lora: LoraFile, found: Changes | str, case: tuple[object, ...], of_text: bool = False) -> None:
    """That diffusers makes of the denoiser's modules, or of the text encoders', what is said of it."""
    wanted, objections = changes_of(lora.modules()), read_by("diffusers", lora).objections
    entries = [entry for entry in lora.entries if (entry.part != "denoiser") == of_text]
    assert entries
    for entry in entries:
        objection = objections.get(entry.name)
        for part, path in entry.modules:
            name = f"{part}.{path}" if of_text else path
            change = None if isinstance(found, str) else found.get(name)
            is_right = change is not None and (change - wanted[name]).norm() < EXACT * wanted[name].norm()
            assert is_right == (objection is None), (*case, name, found)
            if objection and objection.loads:
                assert change is not None and change.any(), (*case, name)


@pytest.mark.parametrize("family", mostly_slow(IN_PIPELINES, "sd3", "flux1", "ernie-image"))
def test_it_is_known_whose_paths_diffusers_loads(family):
    table, modules = FAMILIES[family], loras_of(family, blocks_only=True)
    assert modules
    namings = [("diffusers", table.diffusers_prefix)] + [("comfy", "diffusion_model.")] * table.original_in_comfy
    for scheme, old_prefix in namings:
        source = LoraFile.from_modules(family, modules, {}, scheme).tensors
        for prefix in ("lora_unet_", "diffusion_model.", table.diffusers_prefix):
            of_sd_scripts = prefix == "lora_unet_" or (prefix == "diffusion_model." and family in ("flux1", "chroma"))
            form = "lora_down" if of_sd_scripts else "lora_A"
            tensors = {}
            for key, tensor in in_form(source, form, has_alpha=prefix == "lora_unet_").items():
                name = re.sub(r"\.(lora_[a-zAB]+\.weight|alpha)$", "", key)
                path = name.removeprefix(old_prefix)
                flat = path.replace(".", "_") if prefix == "lora_unet_" else path
                tensors[prefix + flat + key.removeprefix(name)] = tensor
            lora = LoraFile(family, {}, tensors)
            assert_as_known(lora, attempt(of_diffusers, family, lora), (scheme, prefix))


@pytest.mark.parametrize("family", mostly_slow(["sd15", "flux1"], "sd15"))
def test_it_is_known_in_which_forms_of_names_diffusers_loads_text_encoders(family):
    modules = {**dict(list(loras_of(family, blocks_only=True).items())[:1]), **text_loras_of(family)}
    assert len(modules) > 1 and FAMILIES[family].loaded.diffusers & {*SCHEMES}
    for scheme in sorted(FAMILIES[family].loaded.diffusers & {*SCHEMES}):
        plain = LoraFile.from_modules(family, modules, {}, scheme).tensors
        for form, has_alpha in itertools.product(FORMS, (True, False)):
            lora = LoraFile(family, {}, in_form(plain, form, has_alpha))
            assert_as_known(lora, attempt(text_of_diffusers, family, lora), (scheme, form, has_alpha), of_text=True)


def in_form(tensors: Mapping[str, Tensor], form: str, has_alpha: bool) -> dict[str, Tensor]:
    """The tensors of plain LoRAs under names that end in another way, with an alpha of 0.5 or without."""
    changed = {}
    for key, tensor in tensors.items():
        if match := re.fullmatch(r"(.+)\.lora_(A|B|down|up)\.weight", key):
            is_down = match[2] in ("A", "down")
            changed[f"{match[1]}.{FORMS[form][not is_down]}"] = tensor
            changed |= {f"{match[1]}.alpha": torch.tensor(0.5)} if is_down and has_alpha else {}
    return changed


@pytest.mark.parametrize("family", IN_COMFYUI)
def test_it_is_known_what_comfyui_loads(files, by_comfyui, family):
    names = [name for name in files if family_of(name[0]) == family and name != OTHER_KINDS]
    assert len(names) == 2 * len(SCHEMES) + len(other_schemes_of(family))
    for name in names:
        lora = LoraFile(family, {}, LoraFile.read(files[name]).tensors)
        reported = by_comfyui[name]["not_loaded"]
        modules = {
            re.sub(r"\.(lora_\w+\.weight|alpha|(down|up)\.weight)$", "", message.split(": ")[-1])
            for message in reported
        }
        assert modules == set(not_loaded_by("ComfyUI", lora)), name


@pytest.mark.parametrize("family", IN_COMFYUI)
def test_comfyui_loads_the_modules_that_the_document_counts(by_comfyui, family):
    known, cases = documented(), in_comfyui(family)
    assert cases
    for kind, wanted in cases.items():
        for scheme in SCHEMES:
            count = len(wanted.keys() & comfyui_changes(by_comfyui[family, scheme]).keys())
            expected = known[family, kind + scheme][1].partition(" ")[0]
            assert expected == (f"{count}/{len(wanted)}" if count else "-"), kind + scheme


@pytest.mark.parametrize("family", IN_COMFYUI)
def test_comfyui_changes_the_weights_of_small_models_exactly(by_comfyui, family):
    cases = in_comfyui(f"small-{family}")
    assert cases
    for wanted in cases.values():
        for scheme in SCHEMES:
            cell = compare(comfyui_changes(by_comfyui[f"small-{family}", scheme]), wanted)
            assert cell.deviation < EXACT, scheme
            assert scheme == "diffusers" or cell.matched == cell.total, scheme


@pytest.mark.slow
@pytest.mark.parametrize("family", IN_COMFYUI)
def test_comfyui_changes_the_weights_of_published_widths_as_the_document_says(files, family):
    cells = {}
    results = run_comfyui((family, files[family, scheme]) for scheme in SCHEMES)
    for kind, wanted in in_comfyui(family).items():
        for scheme, result in zip(SCHEMES, results, strict=True):
            cell = compare(comfyui_changes(result), wanted)
            assert scheme == "diffusers" or (cell.matched == cell.total and cell.deviation < EXACT), kind + scheme
            cells[family, kind + scheme] = (str(cell),)
    assert_documented(cells, (1,))


def with_a_module_of_another_size(lora: LoraFile) -> LoraFile:
    key = next(key for key in lora.tensors if key.endswith(("lora_down.weight", "lora_A.weight")))
    return LoraFile(lora.family, {}, {**lora.tensors, key: torch.cat([lora.tensors[key]] * 2, dim=1)})


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, table in FAMILIES.items() if table.loaded.invokeai])
def test_it_is_known_what_invokeai_loads(family, tmp_path):
    """Of whole denoisers, their blocks and text encoders, in every scheme: the modules, and for blocks how they change."""
    loras = {contents: lora_of(family, contents) for contents in (*contents_of(family), *other_schemes_of(family))}
    whole = loras_of(family, blocks_only=False)
    loras |= {f"whole {scheme}": LoraFile.from_modules(family, whole, {}, scheme) for scheme in SCHEMES}
    for name, lora in loras.items():
        lora.save(tmp_path / f"{name}.safetensors", torch.float32)
    scheme = next(s for s in SCHEMES if not not_loaded_by("InvokeAI", loras[s]))
    with_a_module_of_another_size(loras[scheme]).save(tmp_path / "other size.safetensors", torch.float32)
    files = [(family, tmp_path / f"{name}.safetensors") for name in (*loras, "other size")]
    *results, of_other_size = run_invokeai(files, tmp_path)
    assert "is invalid for input of size" in of_other_size["refused"] and not of_other_size["changes"]
    known = documented()
    for (contents, lora), result in zip(loras.items(), results, strict=True):
        loaded = [entry for entry in lora.entries if entry.name not in not_loaded_by("InvokeAI", lora)]
        found = {path.removeprefix("denoiser."): torch.tensor(change) for path, change in result["changes"].items()}
        assert bool(loaded) == bool(found), (contents, result["refused"])
        assert not loaded or len(found) >= len(loaded) or len(found) == len({e.place.fusion.original for e in loaded})
        if contents in SCHEMES:
            blocks = loras_of(family, blocks_only=True)
            wanted = changes_of(blocks) if set(found) & {p for _, p in blocks} else in_original_names(family, blocks)
            cell = compare(found, wanted)
            assert (f"{cell.matched}/{cell.total}" if cell.matched else "-") == known[family, contents][4], contents
            assert cell.deviation < EXACT, contents


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name, table in FAMILIES.items() if table.loaded.invokeai])
def test_it_is_known_in_which_forms_of_names_invokeai_loads_a_lora(family, tmp_path):
    """Of the attention of one block of each kind, or of a UNet's blocks of attention and its text encoder."""
    kept = r"^down_blocks\.2\.attentions\.0\." if FAMILIES[family].is_unet else r"\.0\.(att\w+\.|proj_mlp$)"
    modules = {name: module for name, module in loras_of(family, blocks_only=True).items() if re.search(kept, name[1])}
    if FAMILIES[family].is_unet:
        modules |= {name: module for name, module in text_loras_of(family).items() if ".0." in name[1]}
    loras = {}
    for scheme in dict.fromkeys(scheme for scheme, _ in FAMILIES[family].loaded.invokeai):
        if scheme not in (*SCHEMES, "peft", "bare"):
            continue
        written = partial(LoraFile.from_modules, family, modules, {})
        plain = written(scheme).tensors if scheme in SCHEMES else in_other_scheme(modules, scheme)
        for form, has_alpha in itertools.product(FORMS, (True, False)):
            loras[f"{scheme} {form} {has_alpha}"] = LoraFile(family, {}, in_form(plain, form, has_alpha))
    for name, lora in loras.items():
        lora.save(tmp_path / f"{name}.safetensors", torch.float32)
    assert modules and loras
    results = run_invokeai([(family, tmp_path / f"{name}.safetensors") for name in loras], tmp_path)
    for (name, lora), result in zip(loras.items(), results, strict=True):
        found = {path.removeprefix("denoiser."): torch.tensor(change) for path, change in result["changes"].items()}
        is_original = bool(
            found.keys() & {entry.place.fusion.original for entry in lora.entries} - {p for _, p in modules}
        )
        denoiser = {name: module for name, module in lora.modules().items() if name[0] == "denoiser"}
        wanted = in_original_names(family, denoiser) if is_original else changes_of(denoiser)
        wanted |= changes_of({name: module for name, module in lora.modules().items() if name not in denoiser})
        objections = read_by("InvokeAI", lora).objections
        for entry in lora.entries:
            objection = objections.get(entry.name)
            paths = [entry.place.fusion.original] if is_original else [path for _, path in entry.modules]
            for path in paths if entry.part == "denoiser" else [f"{entry.part}.{path}" for path in paths]:
                change = found.get(path, found.get(path.replace("text_model.", "")))
                is_right = change is not None and (change - wanted[path]).norm() < EXACT * wanted[path].norm()
                assert is_right == (objection is None), (name, path, result["refused"])
                assert (change is not None) == (objection is None or objection.loads), (name, path)


@pytest.mark.parametrize(
    "model", ["small-flux2", pytest.param("flux2", marks=pytest.mark.slow), "zimage", "qwen-image", "small-ernie-image"]
)
@pytest.mark.parametrize("has_alpha", [True, False])
def test_it_is_known_of_which_lokr_files_diffusers_loads_what(model, has_alpha):
    family = family_of(model)
    for scheme, (prefix, is_flat, original) in LOKR_NAMES.items():
        shapes: dict[str, tuple[int, int]] = {}
        for (_, path), module in loras_of(model, blocks_only=True).items():
            fusion, inputs = FAMILIES[family].of_diffusers(path), module.down.shape[1]
            is_whole = original and len(fusion.parts) > 1
            name = prefix + (fusion.original if original else path)
            rows = round(sum(fusion.sizes) * inputs) if is_whole else module.up.shape[0]
            shapes[name.replace(".", "_") if is_flat else name] = (rows, inputs)
        tensors = {}
        for name, (outputs, inputs) in shapes.items():
            tensors[f"{name}.lokr_w1"] = torch.ones(4, 4)
            tensors |= {
                f"{name}.lokr_w2_a": torch.ones(outputs // 4, 2),
                f"{name}.lokr_w2_b": torch.ones(2, inputs // 4),
            }
            tensors |= {f"{name}.alpha": torch.tensor(1.0)} if has_alpha else {}
        lora = LoraFile(family, {}, tensors)
        assert len(lora.entries) == len(shapes) and {entry.kind for entry in lora.entries} == {"lokr"}
        expected = len(shapes) - len(not_loaded_by("diffusers", lora))
        assert lokr_layers_in_diffusers(model, lora) == expected, scheme


def lokr_layers_in_diffusers(name: str, lora: LoraFile) -> int:
    """How many modules diffusers puts a LoKr on; 0 when it refuses the file."""
    import diffusers
    from peft.tuners.lokr import LoKrLayer

    pipeline, model = getattr(diffusers, MODELS[lora.family][2]), model_of(name)
    try:
        state = pipeline.lora_state_dict(copied(lora))
        words = ("lora", "lokr") if lora.family in ("flux2", "zimage") else ("lora",)
        if not all(any(word in key for word in words) for key in state):  # as load_lora_weights begins
            return 0
        pipeline.load_lora_into_transformer(state, transformer=model)
    except ValueError:
        return 0
    return sum(isinstance(layer, LoKrLayer) for layer in model.modules())


def other_kinds() -> LoraFile:
    block = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
    # Without alpha ComfyUI fails at a BOFT.
    down_up = {"lora_down.weight": torch.ones(2, 1280), "lora_up.weight": torch.ones(1280, 2)}
    modules = {
        f"{block}attn1_to_q": {f"hada_w{n}_{x}": torch.ones(1280, 2) for n in "12" for x in "a"}
        | {f"hada_w{n}_b": torch.ones(2, 1280) for n in "12"},
        f"{block}attn1_to_k": {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(320, 320)},
        f"{block}attn1_to_v": {**down_up, "dora_scale": torch.ones(1280, 1)},
        "unet.mid_block.attentions.0.proj_in": {
            "lora_A.weight": torch.ones(2, 1280, 1, 1),
            "lora_B.weight": torch.ones(1280, 2, 1, 1),
            "lora_magnitude_vector": torch.ones(1, 1280, 1, 1),
        },
        f"{block}attn1_to_out_0": {"diff": torch.ones(1280, 1280), "diff_b": torch.ones(1280)},
        f"{block}attn2_to_q": {"oft_blocks": torch.zeros(16, 80, 80), "alpha": torch.ones(())},
        f"{block}attn2_to_out_0": {"oft_blocks": torch.zeros(4, 16, 80, 80), "alpha": torch.ones(())},
        f"{block.replace('lora', 'oft')}ff_net_2": {"oft_blocks": torch.zeros(16, 80, 80), "alpha": torch.ones(())},
    }
    tensors = {f"{name}.{role}": tensor for name, roles in modules.items() for role, tensor in roles.items()}
    lora = LoraFile("sd15", {}, tensors)
    assert len(lora.entries) == len(modules)
    return lora


def test_it_is_known_what_comfyui_makes_of_other_kinds(by_comfyui):
    reported = {message.split(": ")[-1].rpartition(".")[0] for message in by_comfyui[OTHER_KINDS]["not_loaded"]}
    assert reported == set(not_loaded_by("ComfyUI", other_kinds()))
