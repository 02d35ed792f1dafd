"""The nodes' texts outside of their code. `python -m tools.node_texts` writes them from what a server reports.

It writes the part below the prose of each help page: the tables of inputs, outputs, recipes and settings. `web/docs/NODE.md` is
the English page. A Chinese page `web/docs/NODE/zh.md` is optional, and so is each text in `locales/zh/nodeDefs.json` and
`locales/zh/help.json`: English is shown instead. `python -m tools.node_texts --missing` lists what isn't translated.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from core.config import TrainConfig
from core.models.families import FAMILIES
from core.photos.ready import TWO_HELD_OUT
from core.training.recipes import COMMON, ENOUGH, FEWER_PICTURES, MEASURED, MEASUREMENTS, RECIPES, recipe_settings
from tests.comfyui.server import PACK, ComfyServer, running_server
from tools.wording import missing_chinese

LOCALES = PACK / "locales"
HELP = PACK / "web" / "docs"
LANGUAGES = ("en", "zh")
TRAIN = "FaceLoRATrain"
WORDS: dict[str, dict[str, str]] = {
    "en": {
        "inputs": "## Inputs\n", "outputs": "## Outputs\n", "recipes": "## Recipes\n", "settings": "## Settings\n",
        "input": "| input | type | default | what it does |", "output": "| output | type | what it is |",
        "recipe": "| base model | recipe | steps × batch | rank | alpha | learning rate | resolution |",
        "setting": "| setting | default | what it does |",
        "advanced": "(advanced)", "or": " or ", "base": "the base model's", "list": ", ", "others": "All others",
        "recipe value": "{} (from the recipe)", "from recipe": "from the recipe", "from input": "from the input `{}`",
        "zero": "`0`: from the recipe (SD1.5: `{}`)", "empty": "empty: `{}`",
        "zero resolution": "`0`: from the recipe or the base model (SD1.5: `{}`)",
        "measured value": "`{}` if likeness is measured, else `{}`",
        "cheap value": "`{}` with fast and balanced if likeness is measured, else `{}`",
        "clip_skip": "from CLIP Set Last Layer",
        "recipes intro": "What `recipe` sets for each base model. More photos take more steps, within the bounds "
        "shown. Inputs and `settings` override these values.\n",
        "common": "All recipes also set {}.\n",
        "measured": "If there are {enough} or more usable photos and the face networks are installed, recipes set "
        "`hold_out = 1`, or `2` from {two} photos on, and {measured}. Likeness is then measured whenever samples are drawn: as "
        "often as `samples`, or {times} times if that is 0. `fast` and `balanced` also set {cheap}.\n",
        "settings intro": "`settings` takes these settings as lines of TOML, such as `text_encoder_lr = 1e-5`. If the default "
        "is from an input or the recipe, a line in `settings` overrides it.\n",
    },
    "zh": {
        "inputs": "## 输入\n", "outputs": "## 输出\n", "recipes": "## 预设\n", "settings": "## 其他设置\n",
        "input": "| 输入 | 类型 | 默认值 | 作用 |", "output": "| 输出 | 类型 | 说明 |",
        "recipe": "| 基础模型 | 预设 | 步数 × 批量 | 秩 | alpha | 学习率 | 分辨率 |",
        "setting": "| 设置 | 默认值 | 作用 |",
        "advanced": "（高级）", "or": " 或 ", "base": "基础模型的分辨率", "list": "、", "others": "其他",
        "recipe value": "{}（来自预设）", "from recipe": "来自预设", "from input": "来自输入 `{}`",
        "zero": "`0`：来自预设（SD1.5：`{}`）", "empty": "留空：`{}`",
        "zero resolution": "`0`：来自预设或基础模型（SD1.5：`{}`）",
        "measured value": "测量相似度时为 `{}`，否则为 `{}`",
        "cheap value": "`fast` 和 `balanced` 测量相似度时为 `{}`，否则为 `{}`",
        "clip_skip": "来自 CLIP Set Last Layer",
        "recipes intro": "下表是 `recipe` 为各个基础模型设定的值。照片越多，步数越多，但不超出所示范围。"
        "输入和 `settings` 优先于这些值。\n",
        "common": "所有预设还会设定 {}。\n",
        "measured": "如果可用的照片达到 {enough} 张，并且安装了人脸识别网络，"
        "预设还会设定 `hold_out = 1`（达到 {two} 张时为 `2`）、{measured}。"
        "每次生成样图时都会测量相似度，次数由 `samples` 决定，`samples` 为 0 时测量 {times} 次。"
        "`fast` 和 `balanced` 另外设定 {cheap}。\n",
        "settings intro": "`settings` 使用 TOML 格式，每行一项，例如 `text_encoder_lr = 1e-5`。"
        "默认值来自输入或预设的设置，写在这里时以这里为准。\n",
    },
}  # fmt: skip
"""The words of the generated tables."""
FROM_INPUTS = {
    "trigger_word": "trigger_word", "class_word": "class_word", "steps": "steps", "rank": "rank",
    "learning_rate": "learning_rate", "resolution": "resolution", "seed": "training_seed", "check_photos": "use",
    "sample_every": "samples", "sample_prompts": "sample_prompts",
}  # fmt: skip
"""The input of Train Face LoRA that sets a setting, by setting."""
Info = Mapping[str, Any]
"""What the server reports about a node."""


def node_infos(server: ComfyServer) -> dict[str, Info]:
    """Return what the server reports about the nodes of this pack, by node id."""
    return {name: info for name, info in server.get("/object_info").items() if info["category"] == "FaceLoRA"}


def inputs(info: Info) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """Return the type and options of every input, by name."""
    given = [pair for part in ("required", "optional") for pair in info["input"].get(part, {}).items()]
    return {name: (kind if isinstance(kind, str) else "COMBO", options) for name, (kind, options) in given}


def english(info: Info) -> dict[str, Any]:
    """Return the node's entry of nodeDefs.json."""
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    entry = {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: {"name": name, "tooltip": options["tooltip"]} for name, (_, options) in inputs(info).items()},
        "outputs": {str(index): {"name": name, "tooltip": tooltip} for index, (name, tooltip) in enumerate(outputs)},
    }
    if "\n" in info["description"]:
        # It depends on this installation, e.g. on invalid style packs: a fixed text would hide that.
        del entry["description"]
    return entry


def definitions(language: str, name: str, info: Info) -> Mapping[str, Any]:
    """Return the texts of a node's inputs and outputs, in the form of nodeDefs.json: English where the language has none."""
    texts = english(info)
    if language == "en":
        return texts
    given = json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")).get(name, {})
    return {
        part: {key: one | given.get(part, {}).get(key, {}) for key, one in texts[part].items()}
        for part in ("inputs", "outputs")
    }


def page(name: str, language: str) -> Path:
    """Return the path of a node's help page."""
    return HELP / f"{name}.md" if language == "en" else HELP / name / f"{language}.md"


def tables(name: str, info: Info, language: str) -> str:
    """Return the part of a help page that starts with the table of inputs."""
    words, texts = WORDS[language], definitions(language, name, info)
    lines = [words["inputs"], words["input"], "|---|---|---|---|"]
    for key, (kind, options) in inputs(info).items():
        shown = texts["inputs"][key]
        notes = [shown["tooltip"], words["advanced"]] if options.get("advanced") else [shown["tooltip"]]
        default = _input_default(name, key, options, words)
        lines.append(_row(_label(key, shown["name"]), kind.replace(",", words["or"]), default, " ".join(notes)))
    lines += ["", words["outputs"], words["output"], "|---|---|---|"]
    for index, (key, kind) in enumerate(zip(info["output_name"], info["output"], strict=True)):
        shown = texts["outputs"][str(index)]
        lines.append(_row(_label(key, shown["name"]), kind, shown["tooltip"]))
    if name == TRAIN:
        lines += ["", *_recipes(words), "", *_settings(words, language)]
    return "\n".join(lines) + "\n"


def _label(key: str, label: str) -> str:
    """Return an input's or output's id, with its label on the node if that differs."""
    return f"`{key}`" if label == key else f"`{key}` {label}"


def _input_default(name: str, key: str, options: Mapping[str, Any], words: Mapping[str, str]) -> str:
    """Return the default of an input. For one that leaves the value to the recipe, it has the recipe's value."""
    default = options.get("default")
    if name == TRAIN and key == "sample_prompts":
        return words["empty"].format("a photo of sks person")
    if name == TRAIN and key in FROM_INPUTS.values() and default == 0:
        family = FAMILIES["sd15"]
        value = recipe_settings("balanced", family.recipes).get(key, family.resolution)
        return words["zero resolution" if key == "resolution" else "zero"].format(_toml(value))
    return f"`{default}`" if default not in (None, "") else ""


def _recipes(words: Mapping[str, str]) -> list[str]:
    """Return the lines about the recipes of the base models. Equal recipes share their rows."""
    groups: dict[tuple[tuple[str, ...], ...], list[str]] = {}
    for family in FAMILIES.values():
        rows = tuple(_recipe(recipe, family.recipes, words) for recipe in RECIPES)
        groups.setdefault(rows, []).append(family.title)
    largest = max(groups, key=lambda rows: len(groups[rows]))
    groups.pop(largest)
    groups[largest] = [words["others"]]  # the last row
    lines = [words["recipes"], words["recipes intro"], words["recipe"], "|---|---|---|---|---|---|---|"]
    lines += [_row(words["list"].join(titles), *row) for rows, titles in groups.items() for row in rows]
    measured = words["measured"].format(
        enough=ENOUGH, two=TWO_HELD_OUT, measured=_lines(MEASURED, words), times=MEASUREMENTS,
        cheap=_lines(FEWER_PICTURES, words),
    )  # fmt: skip
    return [*lines, "", words["common"].format(_lines(COMMON, words)), measured.rstrip("\n")]


def _recipe(name: str, recipes: Mapping[str, Any], words: Mapping[str, str]) -> tuple[str, ...]:
    """Return the cells of a recipe after the base model."""
    chosen, most = (recipe_settings(name, recipes, {"sample_every": 0}, photos) for photos in (1, 1000))
    bounds = dict.fromkeys(str(one["steps"]) for one in (chosen, most))  # with few and with many photos
    steps, batch, rate = (
        "–".join(bounds),
        chosen["batch_size"],
        f"{chosen['learning_rate']:.1e}".replace(".0e", "e").replace("e-0", "e-"),
    )
    rate += f", {chosen['schedule']}" if "schedule" in chosen else ""
    side = f"{chosen['resolution']} px" if "resolution" in chosen else words["base"]
    return name, f"{steps} × {batch}", f"{chosen['rank']}", f"{chosen.get('alpha', chosen['rank']):g}", rate, side


def _lines(settings: Mapping[str, Any], words: Mapping[str, str]) -> str:
    return words["list"].join(f"`{name} = {_toml(value)}`" for name, value in settings.items())


def _settings(words: Mapping[str, str], language: str) -> list[str]:
    """Return the lines about everything that the input `settings` takes."""
    file = LOCALES / language / "help.json"
    helps = json.loads(file.read_text(encoding="utf-8"))["settings"] if file.exists() else {}
    chosen = [
        recipe_settings(recipe, family.recipes, {"sample_every": 0})
        for family in FAMILIES.values()
        for recipe in RECIPES
    ]
    lines = [words["settings"], words["settings intro"], words["setting"], "|---|---|---|"]
    for setting in fields(TrainConfig):
        name = setting.name
        values = (
            {_toml(one.get(name, setting.default)) for one in chosen} if any(name in one for one in chosen) else set()
        )
        if name in FROM_INPUTS:
            default = words["from input"].format(FROM_INPUTS[name])
        elif name == "clip_skip":
            default = words["clip_skip"]
        elif name == "hold_out":
            default = words["measured value"].format(f"1`{words['or']}`2", setting.default)
        elif name in MEASURED:
            default = words["measured value"].format(_toml(MEASURED[name]), _toml(setting.default))
        elif name in FEWER_PICTURES:
            default = words["cheap value"].format(_toml(FEWER_PICTURES[name]), _toml(setting.default))
        elif values:
            few = words["or"].join(f"`{value}`" for value in sorted(values)) if len(values) <= 2 else ""
            default = words["recipe value"].format(few) if few and "None" not in values else words["from recipe"]
        else:
            default = "" if setting.default in (MISSING, None, "", ()) else f"`{_toml(setting.default)}`"
        lines.append(_row(f"`{name}`", default, helps.get(name, setting.metadata["help"])))
    return lines


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _toml(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | str) else f"{value}"


def write_all() -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models" / "loras").mkdir(parents=True)
        (Path(folder) / "input").mkdir()
        with running_server(Path(folder)) as server:
            infos = node_infos(server)
    for name, info in infos.items():
        for language in LANGUAGES:
            file = page(name, language)
            if language == "en" or file.exists():
                prose = file.read_text(encoding="utf-8") if file.exists() else f"# {info['display_name']}\n\n"
                prose = prose.partition(WORDS[language]["inputs"])[0]
                file.write_text(prose + tables(name, info, language), encoding="utf-8")


def main(options: list[str]) -> None:
    if options == ["--missing"]:
        for text in missing_chinese():
            print(f"warning: not in Chinese: {text}")
    else:
        write_all()


if __name__ == "__main__":
    main(sys.argv[1:])
