"""The nodes' texts in locales and help pages. After a change of the nodes: `python -m tests.comfyui.texts`."""

import json

import pytest

from .texts import HELP, LOCALES, TABLES, english, inputs, node_infos, tables

pytestmark = pytest.mark.comfyui

NODES = [page.stem for page in sorted(HELP.glob("*.md"))]


@pytest.fixture(scope="module")
def infos(server):
    return node_infos(server)


def definitions(language: str) -> dict:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_every_node_has_a_help_page(infos):
    assert sorted(infos) == NODES


@pytest.mark.parametrize("name", NODES)
def test_a_help_page_has_prose_and_describes_exactly_the_inputs_and_outputs(infos, server, name):
    page = (HELP / f"{name}.md").read_text(encoding="utf-8")
    prose, mark, rest = page.partition(TABLES)
    assert prose.startswith(f"# {infos[name]['display_name']}\n")
    assert len(prose) > 200
    assert mark + rest == tables(name, infos[name])
    assert server.read(f"/extensions/ComfyUI-FaceLoRA/docs/{name}.md").decode() == page


def test_every_input_and_output_has_a_tooltip(infos):
    for name, info in infos.items():
        assert all(options.get("tooltip") for _, options in inputs(info).values()), name
        assert all(info["output_tooltips"]), name


def test_what_is_shown_as_a_tooltip_fits_one(infos):
    for name, info in infos.items():
        shown = [
            info["description"].partition("\nNot used")[0],
            *(options["tooltip"] for _, options in inputs(info).values()),
            *info["output_tooltips"],
        ]
        assert max(map(len, shown)) <= 300, name


@pytest.mark.parametrize("name", ["FaceLoRAApply", "FaceLoRASave"])
def test_a_lora_is_said_to_come_from_the_nodes_that_give_one(infos, server, name):
    everything = server.get("/object_info").values()
    _, options = inputs(infos[name])["lora"]
    assert all(info["display_name"] in options["tooltip"] for info in everything if "LORA_MODEL" in info["output"])
    assert "loader" not in options["tooltip"]


def test_the_english_texts_are_the_nodes_own(infos, server):
    assert definitions("en") == {name: english(info) for name, info in infos.items()}
    assert server.get("/i18n")["en"]["nodeDefs"]["FaceLoRATrain"] == english(infos["FaceLoRATrain"])


def test_the_chinese_texts_are_of_nodes_and_inputs_that_there_are(infos):
    ours = definitions("zh")
    assert {"FaceLoRALoadPhotos", "FaceLoRATrain", "FaceLoRAApply", "FaceLoRAStylePack"} <= set(ours)
    for name, entry in ours.items():
        assert entry["display_name"] == infos[name]["display_name"], "the nodes' names are the same everywhere"
        assert set(entry.get("inputs", ())) <= set(inputs(infos[name])), name
