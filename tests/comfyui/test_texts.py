"""The nodes' texts in locales and help pages. After a change of the nodes: `python -m tests.comfyui.texts`."""

import json
import re
from dataclasses import fields

import pytest

from core.config import TrainConfig
from core.models.families import FAMILIES
from core.training.recipes import RECIPES, recipe_settings
from tests.prose import faults

from .texts import HELP, LANGUAGES, LOCALES, WORDS, definitions, english, inputs, node_infos, page, tables

pytestmark = pytest.mark.comfyui

NODES = sorted(folder.name for folder in HELP.iterdir() if folder.is_dir())


@pytest.fixture(scope="module")
def infos(server):
    return node_infos(server)


def test_every_node_has_a_help_page(infos):
    assert sorted(infos) == NODES


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", NODES)
def test_a_help_page_has_prose_and_describes_exactly_the_inputs_and_outputs(infos, name, language):
    mark = WORDS[language]["inputs"]
    prose, found, rest = page(name, language).read_text(encoding="utf-8").partition(mark)
    assert prose.startswith(f"# {infos[name]['display_name']}\n")
    assert len(prose) > (200 if language == "en" else 100)
    assert found + rest == tables(name, infos[name], language)


@pytest.mark.parametrize("name", NODES)
def test_a_help_page_is_served_in_english_in_chinese_and_for_all_other_languages(infos, server, name):
    """The frontend asks for NAME/LANGUAGE.md, and for NAME.md if that is missing."""
    address = f"/extensions/{infos[name]['python_module'].removeprefix('custom_nodes.')}/docs/{name}"
    served = {end: server.read(f"{address}{end}").decode() for end in ("/en.md", "/zh.md", ".md")}
    assert served["/en.md"] == served[".md"] == page(name, "en").read_text(encoding="utf-8")
    assert served["/zh.md"] == page(name, "zh").read_text(encoding="utf-8")


def test_the_help_of_training_has_the_recipes_and_the_defaults_that_they_set():
    help_page = page("FaceLoRATrain", "en").read_text(encoding="utf-8")
    sdxl = FAMILIES["sdxl"].recipes
    for recipe in RECIPES:
        chosen = recipe_settings(recipe, sdxl, {"sample_every": 0})
        row = next(
            line for line in help_page.splitlines() if line.startswith(f"| {FAMILIES['sdxl'].title} | {recipe} |")
        )
        assert f"| {chosen['steps']} × {chosen['batch_size']} | {chosen['rank']} |" in row
        assert f"{chosen['learning_rate']:.0e}".replace("e-0", "e-") in row
    assert "| `steps` | INT | `0`: from the recipe (SD1.5: `800`) |" in help_page
    assert "| `prior_prediction` | `0.5` (from the recipe) |" in help_page


def test_every_input_and_output_has_a_tooltip(infos):
    for name, info in infos.items():
        assert all(options.get("tooltip") for _, options in inputs(info).values()), name
        assert all(info["output_tooltips"]), name


def test_what_is_shown_as_a_tooltip_fits_one_and_is_easy_to_read(infos):
    for name, info in infos.items():
        shown = [
            info["description"].partition("\nNot used")[0],
            *(options["tooltip"] for _, options in inputs(info).values()),
            *info["output_tooltips"],
        ]
        assert max(map(len, shown)) <= 300, name
        assert faults("\n\n".join(shown), on_screen=True) == [], name


@pytest.mark.parametrize("name", ["FaceLoRAApply", "FaceLoRASave"])
def test_a_lora_is_said_to_come_from_the_nodes_that_give_one(infos, server, name):
    everything = server.get("/object_info").values()
    _, options = inputs(infos[name])["lora"]
    assert all(info["display_name"] in options["tooltip"] for info in everything if "LORA_MODEL" in info["output"])
    assert "loader" not in options["tooltip"]


def test_every_text_of_a_node_has_a_chinese_one(infos, server):
    chinese = json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(chinese) == set(infos)
    for name, info in infos.items():
        ours, given = english(info), chinese[name]
        assert given["display_name"] == ours["display_name"], "the nodes' names are the same everywhere"
        assert given.keys() == ours.keys()
        for part in ("inputs", "outputs"):
            assert given[part].keys() == ours[part].keys(), name
            for key, texts in given[part].items():
                assert texts["name"] and re.search("[\u4e00-\u9fff]", texts["tooltip"]), f"{name}: {key}"
    assert server.get("/i18n")["zh"]["nodeDefs"]["FaceLoRATrain"] == chinese["FaceLoRATrain"]


def test_a_chinese_text_names_the_same_options_numbers_and_files(infos):
    """A tooltip that changes in English is seen here when it has another number, option or file name than the Chinese one."""
    for name, info in infos.items():
        for key, (_, options) in inputs(info).items():
            chinese = definitions("zh", name, info)["inputs"][key]["tooltip"]
            facts = re.findall(r"\d+(?:\.\d+)?|NAME[\w-]*(?:\.\w+)*|\w+\.\w{3,}", options["tooltip"])
            assert [fact for fact in facts if fact not in chinese] == [], f"{name}: {key}"


def test_every_setting_has_a_chinese_text():
    texts = json.loads((LOCALES / "zh" / "help.json").read_text(encoding="utf-8"))
    assert list(texts["settings"]) == [setting.name for setting in fields(TrainConfig)]
