"""Lint the wording: `python -m tools.wording [FILE ...]` prints each fault as FILE:LINE: MESSAGE, and then exits with 1.

Of a page it reads the prose, of Python code the docstrings, comments, errors and the texts that nodes show, and of a script of
the frontend the texts that are translated. Without files it reads all of them, the help of the commands, and the translations.
"""

import argparse
import ast
import inspect
import io
import json
import re
import sys
import tokenize
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from core.cli import COMMANDS
from core.cli import main as main_of_commands
from core.config import TrainConfig

ROOT = Path(__file__).parents[1]
LOCALES = ROOT / "locales"
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("web/docs/*.md")),
)
CODE = sorted(path for folder in ("core", "nodes") for path in (ROOT / folder).rglob("*.py"))
SCRIPTS = sorted((*ROOT.glob("web/*.js"), *ROOT.glob("nodes/page/*.js")))
CHINESE = [*sorted(ROOT.glob("web/docs/*/zh.md")), *sorted(ROOT.glob("locales/zh/*.json")), ROOT / "web/zh.json"]

LONGEST = 30
"""Words in a sentence."""
HABITS = re.compile(
    r"\b(?:of|to|for|from|on) (?:which|whom)\b|(?<!there )\b(?:is|are) no\b(?! longer)|\bas (?:it|they) stands?\b"
    r"|\bin (?:the |its |their )?place of\b|\ball the same\b|\bby itself\b|\bso it is[.,;]|\bthe one before\b"
    r"|\bthose that are\b|\bhears? of\b",
    re.IGNORECASE,
)
"""Turns of phrase that a reader has to read twice."""
SCREEN_HABITS = re.compile(
    r"\b(?:stands?|lies|goes|comes|wants|says|said|knows|hears|tells)\b|\bas (?:it|they) (?:is|are|was|were|came)\b|; "
    r"|\bwhat (?:is|it is|there is)\b|\bat a time\b|\bthose (?:of|that)\b|\bone a line\b|\bsomebody else\b"
    r"|\b(?:a|the|all|this|another|of|no) trainings?\b(?! (?:adapter|folder|photos?|resolution|run|runs|sample|settings?))",
    re.IGNORECASE,
)
"""Turns of phrase that are also wrong in a tooltip, a button or a message on a page."""
LONGEST_ON_SCREEN = 300
"""Characters of a tooltip or a message."""
SHOWN = ("description", "placeholder", "tooltip")
"""The arguments of a node's schema that are shown."""
NOT_OURS = {
    "蒙版": "遮罩",
    "检查点": "中间 LoRA",
    "(?<!内存)方案": "预设",  # but for the memory plan
    "头像": "形象照",
    "底模": "基础模型",
    "显示卡": "GPU",
}
"""Words that mean the same as one of ours, with ours."""
OPTION = re.compile(r"(^|[^-\w])--[a-z]")
NAMED_COMMANDS = ("pip install --no-deps", "facelora convert", " --to ", " --output ", "ComfyUI with --")
"""Parts of errors that name an option together with its program."""


class Text(NamedTuple):
    """A text, and the line where it begins."""

    line: int
    words: str


class Fault(NamedTuple):
    path: Path
    line: int
    message: str

    def __str__(self) -> str:
        path = self.path.relative_to(ROOT) if self.path.is_relative_to(ROOT) else self.path
        return f"{path}:{self.line}: {self.message}"


class Row(NamedTuple):
    """An input or output of a node, as its help page describes it."""

    part: str
    """`inputs` or `outputs`, as in nodeDefs.json."""
    key: str
    name: str
    tooltip: Text


def check(path: Path) -> Iterator[Fault]:
    """Yield the faults of a file: a page, Python code, a script of the frontend, or Chinese texts."""
    text = path.read_text(encoding="utf-8")
    if path in CHINESE or path.name == "zh.md":
        yield from _chinese_faults(path, text)
    elif path.suffix == ".md":
        yield from prose_faults(path, [Text(1, text)])
        if path.parts[-3:-1] == ("web", "docs"):
            yield from _screen_faults(path, [row.tooltip for row in _rows(text)])
    elif path.suffix == ".js":
        yield from _screen_faults(path, translated_texts(text))
    else:
        tree = ast.parse(text)
        yield from prose_faults(path, [*_comments(text), *_docstrings(tree), *_errors(tree)])
        parts = path.relative_to(ROOT).parts if path.is_relative_to(ROOT) else ()
        if "nodes" in parts:
            yield from _screen_faults(path, _schema_texts(tree))
        elif "cli" not in parts and "bench" not in parts:
            yield from _option_faults(path, tree)


def sentences(text: Text) -> Iterator[Text]:
    """Yield the sentences of a Markdown page, without code, tables, comments and links' addresses."""
    words = re.sub(
        r"```.*?```|<!--.*?-->|<[^>]+>",
        lambda cut: "\0" + "\n" * cut[0].count("\n"),
        text.words,
        flags=re.DOTALL,
    )
    words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", words)
    words = re.sub(r"`[^`]*`", lambda cut: "code" + "\n" * cut[0].count("\n"), words)
    words = re.sub(r"^[ \t]*[|#].*", "", words, flags=re.MULTILINE)
    begun = 0
    ends = r"\0|\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)|(?<=[.!?:])[\"')*_]*\s+(?=[\"'(*_A-Z0-9]|code)"
    for end in [*re.finditer(ends, words), None]:
        part = words[begun : end.start() if end else None]
        if sentence := " ".join(part.split()).lstrip("-* "):
            blank = len(part) - len(part.lstrip())
            yield Text(text.line + words.count("\n", 0, begun + blank), sentence)
        begun = end.end() if end else begun


def prose_faults(path: Path, texts: Iterable[Text], habits: Iterable[re.Pattern[str]] = (HABITS,)) -> Iterator[Fault]:
    """Yield the sentences that are too long or have one of the habits."""
    for text in texts:
        for line, sentence in sentences(text):
            if (count := len(re.findall(r"[\w'’-]+(?:[.,]\d+)*", sentence))) > LONGEST:
                yield Fault(path, line, f"{count} words: {sentence}")
            found = (turn for habit in habits for turn in habit.finditer(sentence))
            yield from (Fault(path, line, f"{turn[0]!r}: {sentence}") for turn in found)


def _screen_faults(path: Path, texts: Collection[Text]) -> Iterator[Fault]:
    """Yield the faults of texts that are shown in the browser."""
    yield from prose_faults(path, texts, (HABITS, SCREEN_HABITS))
    for line, words in texts:
        if len(words) > LONGEST_ON_SCREEN:
            yield Fault(path, line, f"{len(words)} characters, more than {LONGEST_ON_SCREEN}: {words}")


def _comments(code: str) -> Iterator[Text]:
    """Yield the comments of Python code. Lines that have nothing else, one below the other, are one comment."""
    found: list[Text] = []
    last = None
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type != tokenize.COMMENT or re.match(r"#(!| ?(fmt|noqa|pyright|type|ruff):)", token.string):
            continue
        line, words, alone = token.start[0], token.string.lstrip("# "), token.line.lstrip().startswith("#")
        if alone and last == line - 1:
            found[-1] = found[-1]._replace(words=f"{found[-1].words}\n{words}")
        else:
            found.append(Text(line, words))
        last = line if alone else None
    yield from found


def _docstrings(tree: ast.AST) -> Iterator[Text]:
    """Yield the docstrings, without what is indented in them, such as equations."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            words = inspect.cleandoc(node.value.value)
            yield Text(node.lineno, re.sub(r"^ {4}.*", "", words, flags=re.MULTILINE))


def _errors(tree: ast.AST) -> Iterator[Text]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield from (Text(node.lineno, _spoken(argument)) for argument in node.exc.args[:1])


def _schema_texts(tree: ast.AST) -> list[Text]:
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    shown = (argument.value for call in calls for argument in call.keywords if argument.arg in SHOWN)
    return [Text(value.lineno, _spoken(value)) for value in shown]


def _rows(page: str) -> Iterator[Row]:
    """Yield the inputs and outputs on the help page of a node. These tables are made from the running nodes."""
    part, outputs = "", count()
    for line, words in enumerate(page.splitlines(), 1):
        if words.startswith("## "):
            part = {"## Inputs": "inputs", "## Outputs": "outputs"}.get(words, "")
        elif part and (cells := re.match(r"\| `(\w+)` .*\| (.*) \|$", words)):
            yield Row(part, cells[1] if part == "inputs" else f"{next(outputs)}", cells[1], Text(line, cells[2]))


def _spoken(message: ast.expr) -> str:
    """Return the text of a message, with `x` for each value that is put into it."""
    if isinstance(message, ast.BinOp):
        return _spoken(message.left) + _spoken(message.right)
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "`x`" for part in parts)


def translated_texts(script: str) -> list[Text]:
    """Return the texts that a script of the frontend gives to `say`, itself or in a table that is marked with `// say`."""
    string = r'"((?:[^"\\]|\\.)+)"'
    places = [(one.start(1), one[1]) for one in re.finditer(rf"\bsay\(\s*{string}", script)]
    for table in re.finditer(r"// say\n((?:.*\S.*\n)+)", script):
        values = re.compile(rf"(?:: |\[|, ){string}").finditer(script, table.start(1), table.end())
        places += [(one.start(1), one[1]) for one in values]
    return [Text(script.count("\n", 0, place) + 1, words) for place, words in sorted(places)]


def _option_faults(path: Path, tree: ast.AST) -> Iterator[Fault]:
    """Yield the errors that name an option of a command. They are read in ComfyUI and in scripts too."""
    raised = (node for node in ast.walk(tree) if isinstance(node, ast.Raise))
    for text in (node for error in raised for node in ast.walk(error) if isinstance(node, ast.Constant)):
        if OPTION.search(words := str(text.value)) and not any(named in words for named in NAMED_COMMANDS):
            yield Fault(path, text.lineno, f"an error outside the command line names an option: {words}")


def check_help() -> Iterator[Fault]:
    """Yield the faults of what `--help-all` prints for each command."""
    add, options, texts = argparse.ArgumentParser.add_argument, set[str](), set[str]()

    def noted(parser: Any, *names: Any, **settings: Any) -> argparse.Action:
        if names[0] != "-h":
            options.add(settings.get("help") or f"{names[0]} has none")
        return add(parser, *names, **settings)

    def printed(parser: argparse.ArgumentParser) -> None:
        texts.update(filter(None, (parser.description, parser.epilog)))

    with (
        patch("argparse._ActionsContainer.add_argument", noted),
        patch("argparse.ArgumentParser.print_help", printed),
    ):
        for command in COMMANDS:
            with suppress(SystemExit):
                main_of_commands([command, "--help"])
    options -= {argparse.SUPPRESS}
    for text in options:
        if text[0].islower() or text[0] == "-":
            yield Fault(*_place_of(text), f"the help of an option is missing or in lower case: {text}")
    for text in options | texts:
        path, line = _place_of(text)
        yield from prose_faults(path, [Text(line, text)])


def _place_of(text: str) -> tuple[Path, int]:
    """Return the file and line of the command line or the settings where a text begins, as far as it is written there."""
    for path in (*sorted(ROOT.glob("core/cli/*.py")), ROOT / "core/config.py"):
        for line, code in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if text[1:40] in code:  # the first letter of a description is another
                return path, line
    return ROOT / "core/cli/__init__.py", 1


def _chinese_faults(path: Path, text: str) -> Iterator[Fault]:
    """Yield words of another term, and half-width punctuation after a Chinese character."""
    for line, words in enumerate(text.splitlines(), 1):
        for other, ours in NOT_OURS.items():
            if found := re.search(other, words):
                yield Fault(path, line, f"{found[0]}: write {ours}")
        for found in re.findall(r"[\u4e00-\u9fff][,;:?!](?=[^\d]|$)", words):
            yield Fault(path, line, f"half-width punctuation: {found}")


def check_translations() -> Iterator[Fault]:
    """Yield Chinese texts of the frontend and the settings that are left over, or have other values than the English ones."""
    words_file, help_file = ROOT / "web/zh.json", ROOT / "locales/zh/help.json"
    needed = {words for words, _ in said()}
    for line, english, chinese in _chinese_words():
        if english not in needed:
            yield Fault(words_file, line, f"nothing shows this text: {english}")
        if english.count("{}") != chinese.count("{}"):
            yield Fault(words_file, line, f"not a place for each value: {chinese}")
    if left := _read_chinese("help.json")["settings"].keys() - {setting.name for setting in fields(TrainConfig)}:
        yield Fault(help_file, 1, f"not settings: {sorted(left)}")


def check_node_texts() -> Iterator[Fault]:
    """Yield Chinese texts of nodes that are left over, or lack a number, an option or a file name."""
    file, nodes = ROOT / "locales/zh/nodeDefs.json", _read_chinese("nodeDefs.json")
    for page in ROOT.glob("web/docs/*.md"):
        node, rows = nodes.get(page.stem, {}), list(_rows(page.read_text(encoding="utf-8")))
        given = {(part, key): text for part in ("inputs", "outputs") for key, text in node.get(part, {}).items()}
        for row in rows:
            text = given.pop((row.part, row.key), {}).get("tooltip")
            facts = re.findall(r"\d+(?:\.\d+)?|NAME[\w-]*(?:\.\w+)*|\w+\.\w{3,}", row.tooltip.words)
            lacks = ", ".join(fact for fact in facts if text and fact not in text)
            if lacks or (text and not re.search("[\u4e00-\u9fff]", text)):
                yield Fault(page, row.tooltip.line, f"{row.name}: not in the Chinese text: {lacks or 'all of it'}")
        for part, key in given:
            yield Fault(file, 1, f"{page.stem}: the node has no {key} among its {part}")


def missing_chinese() -> Iterator[Fault]:
    """Yield each text that is shown in English on a Chinese page, because it has not been translated."""
    nodes, settings = _read_chinese("nodeDefs.json"), _read_chinese("help.json")["settings"]
    for page in sorted(ROOT.glob("web/docs/*.md")):
        node = nodes.get(page.stem, {})
        if not (page.with_suffix("") / "zh.md").exists():
            yield Fault(page, 1, "the help page")
        if not node:
            yield Fault(page, 1, "the node's name and description")
        for row in _rows(page.read_text(encoding="utf-8")):
            if "tooltip" not in node.get(row.part, {}).get(row.key, {}):
                yield Fault(page, row.tooltip.line, f"{row.name} among the {row.part}")
    given = {english for _, english, _ in _chinese_words()}
    yield from (Fault(*place, words) for words, place in dict(said()).items() if words not in given)
    for setting in fields(TrainConfig):
        if setting.name not in settings:
            yield Fault(ROOT / "core/config.py", 1, f"the setting {setting.name}")


def _read_chinese(name: str) -> dict[str, Any]:
    return json.loads((LOCALES / "zh" / name).read_text(encoding="utf-8"))


def _chinese_words() -> Iterator[tuple[int, str, str]]:
    """Yield the texts of the frontend: line, English text, Chinese text."""
    for line, code in enumerate((ROOT / "web/zh.json").read_text(encoding="utf-8").splitlines(), 1):
        if found := re.match(r'  "(.+?)": "(.+)",?$', code):
            yield line, found[1], found[2]


def said() -> Iterator[tuple[str, tuple[Path, int]]]:
    """Yield each text that the frontend translates, and its place: the scripts' own, and those that the server sends."""
    for path in SCRIPTS:
        text = path.read_text(encoding="utf-8")
        yield from ((words, (path, line)) for line, words in translated_texts(text) if path.name != "words.js")
        curves = re.finditer(r'name: "([a-z ]+)"', text) if path.name == "progress.js" else ()
        yield from ((one[1], (path, text.count("\n", 0, one.start()) + 1)) for one in curves)
    phases = r'(?:callbacks\.progress\(|"phase": |^LOADING = |^READING = )"([^"]+)"'
    callbacks, nodes = ROOT / "core/training/callbacks.py", ROOT / "nodes/comfyui"
    senders = (ROOT / "core/progress.py", nodes / "app/prompts.py", nodes / "train.py")
    for path in (*ROOT.glob("core/training/**/*.py"), *senders):
        text = path.read_text(encoding="utf-8")
        for one in re.finditer(phases, text, re.MULTILINE):
            yield one[1], (path, text.count("\n", 0, one.start()) + 1)
    for node in ast.walk(ast.parse(callbacks.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and node.name == "likeness_word":
            for constant in ast.walk(ast.Module(node.body[1:], [])):
                if isinstance(constant, ast.Constant):
                    yield str(constant.value), (callbacks, constant.lineno)


def main(paths: list[Path]) -> int:
    found = [fault for path in paths or (*PAGES, *CODE, *SCRIPTS, *CHINESE) for fault in check(path)]
    if not paths:
        found += [*check_help(), *check_translations(), *check_node_texts()]
    for fault in sorted({*found}):
        print(fault)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main([Path(name).resolve() for name in sys.argv[1:]]))
