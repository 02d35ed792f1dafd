"""The nodes' texts in locales and help pages. After a change of the nodes: `python -m tools.node_texts`."""

import json

import pytest

from tools.node_texts import HELP, LANGUAGES, LOCALES, WORDS, english, inputs, node_infos, page, tables

pytestmark = pytest.mark.comfyui

NODES = sorted(folder.name for folder in HELP.iterdir() if folder.is_dir())


@pytest.fixture(scope="module")
def infos(server):
    return node_infos(server)


def test_every_node_has_a_help_page(infos):
    assert sorted(infos) == NODES


@pytest.mark.parametrize("name", NODES)
def test_a_help_page_describes_exactly_the_inputs_and_outputs_and_is_served(infos, server, name):
    """The frontend asks for NAME/LANGUAGE.md, and for NAME.md if that is missing."""
    address = f"/extensions/{infos[name]['python_module'].removeprefix('custom_nodes.')}/docs/{name}"
    for language in LANGUAGES:
        text = page(name, language).read_text(encoding="utf-8")
        prose, mark, rest = text.partition(WORDS[language]["inputs"])
        assert prose.startswith(f"# {infos[name]['display_name']}\n") and len(prose) > 100
        assert mark + rest == tables(name, infos[name], language)
        assert server.read(f"{address}/{language}.md").decode() == text
    assert server.read(f"{address}.md") == server.read(f"{address}/en.md")


def test_every_input_and_output_has_a_tooltip(infos):
    shown = [options.get("tooltip") for info in infos.values() for _, options in inputs(info).values()]
    shown += [tooltip for info in infos.values() for tooltip in info["output_tooltips"]]
    assert shown and all(shown)


@pytest.mark.parametrize("name", ["FaceLoRAApply", "FaceLoRASave"])
def test_the_tooltip_of_a_lora_input_names_the_nodes_that_output_one(infos, server, name):
    everything = server.get("/object_info").values()
    _, options = inputs(infos[name])["lora"]
    assert all(info["display_name"] in options["tooltip"] for info in everything if "LORA_MODEL" in info["output"])
    assert "loader" not in options["tooltip"]


def test_the_chinese_texts_match_the_nodes_and_are_served(infos, server):
    chinese = json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(chinese) == set(infos)
    for name, info in infos.items():
        ours, given = english(info), chinese[name]
        assert given.keys() == ours.keys() and given["display_name"] == ours["display_name"]
        assert all(list(given[part]) == list(ours[part]) for part in ("inputs", "outputs")), name
    assert server.get("/i18n")["zh"]["nodeDefs"]["FaceLoRATrain"] == chinese["FaceLoRATrain"]
