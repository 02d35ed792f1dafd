"""The nodes' texts in locales and help pages. After a change of the nodes: `python -m tools.node_texts`."""

import json
import re
import shutil
from urllib.error import HTTPError

import pytest

from tools import node_texts, wording
from tools.node_texts import HELP, LANGUAGES, LOCALES, WORDS, english, inputs, node_infos, page, tables

NODES = sorted(file.stem for file in HELP.glob("*.md"))


@pytest.fixture(scope="module")
def infos(server):
    return node_infos(server)


def test_every_node_has_a_help_page(infos):
    assert sorted(infos) == NODES, "write its title and text into web/docs/NODE.md, and run python -m tools.node_texts"


@pytest.mark.parametrize("name", NODES)
def test_a_help_page_describes_exactly_the_inputs_and_outputs_and_is_served_in_english_if_it_is_not_translated(
    infos, server, name
):
    address = f"/extensions/{infos[name]['python_module'].removeprefix('custom_nodes.')}/docs/{name}"
    english_page = page(name, "en").read_text(encoding="utf-8")
    for language in (*LANGUAGES, "fr"):
        exists = page(name, language).exists()
        text = page(name, language).read_text(encoding="utf-8") if exists else english_page
        assert server.read(f"{address}/{language}.md").decode() == text
        if exists:
            prose, mark, rest = text.partition(WORDS[language]["inputs"])
            assert prose.startswith(f"# {infos[name]['display_name']}\n") and len(prose) > 100
            assert mark + rest == tables(name, infos[name], language)
    assert server.read(f"{address}.md").decode() == english_page
    for picture in re.findall(r"!\[.+\]\((.+)\)", english_page):  # ComfyUI puts the folder of all help pages before it
        assert server.read(f"{address.removesuffix(name)}{picture}").startswith(b"\xff\xd8"), "a JPEG"


def test_the_help_page_of_an_unknown_node_is_missing(infos, server):
    module = infos[NODES[0]]["python_module"].removeprefix("custom_nodes.")
    for path in ("docs/Nothing/en.md", "docs/..%2F..%2FREADME/en.md", "docs/x/..%2F..%2F..%2FREADME.md"):
        with pytest.raises(HTTPError, match=r"40[34]"):
            server.read(f"/extensions/{module}/{path}")


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


def test_the_chinese_texts_are_of_the_nodes_and_are_served(infos, server):
    chinese = json.loads((LOCALES / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))
    for name, given in chinese.items():
        ours = english(infos[name])
        assert given.keys() <= ours.keys() and given["display_name"] == ours["display_name"]
        assert all({*given[part]} <= {*ours[part]} for part in ("inputs", "outputs")), name
    assert server.get("/i18n")["zh"]["nodeDefs"]["FaceLoRATrain"] == chinese["FaceLoRATrain"]


def test_what_has_no_chinese_text_is_english_and_listed(infos, tmp_path, monkeypatch, capsys):
    locales, name = tmp_path / "locales" / "zh", "FaceLoRASaveHeadshots"
    shutil.copytree(LOCALES, tmp_path / "locales")
    chinese = json.loads((locales / "nodeDefs.json").read_text(encoding="utf-8"))
    del chinese[name]["inputs"]["lora_name"], chinese["FaceLoRAInspect"]
    (locales / "nodeDefs.json").write_text(json.dumps(chinese), encoding="utf-8")
    node_texts.main(["--missing"])
    before = set(capsys.readouterr().out.splitlines())
    for module in (node_texts, wording):
        monkeypatch.setattr(module, "LOCALES", tmp_path / "locales")
    shown = node_texts.definitions("zh", name, infos[name])["inputs"]
    assert shown["lora_name"] == english(infos[name])["inputs"]["lora_name"] != shown["images"]
    assert list(wording.check_node_texts()) == []
    node_texts.main(["--missing"])
    listed = [line for line in capsys.readouterr().out.splitlines() if line not in before]
    assert any(line.endswith("lora_name among the inputs") for line in listed) and len(listed) == 6, listed
