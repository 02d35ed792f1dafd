"""How readable the texts are: `python -m tests.prose [FILE ...]` prints sentences to rewrite, and how long all are.

Of a page it reads the prose, of a Python file the docstrings, comments and errors, and the texts that nodes show. Of a script
of the frontend it reads the texts that are translated. Without files it reads all pages.
"""

import ast
import inspect
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("web/docs/*/en.md")),
)
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
SHOWN = ("description", "placeholder", "tooltip")
"""The arguments of a node's schema that are shown."""


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a Markdown page, without code, tables, comments and links' addresses."""
    text = re.sub(r"```.*?```|<!--.*?-->|<[^>]+>", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`[^`]*`", "code", text)
    lines = (line for line in text.splitlines() if not re.match(r"\s*(\||#)", line))
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d+\.)\s)", "\n".join(lines)):
        for sentence in re.split(r"(?<=[.!?:])[\"')*_]*\s+(?=[\"'(*_A-Z0-9]|code)", " ".join(block.split())):
            if sentence := sentence.lstrip("-* "):
                yield sentence


def words(sentence: str) -> int:
    """Count the words of a sentence; a number is one too."""
    return len(re.findall(r"[\w'’-]+(?:[.,]\d+)*", sentence))


def faults(text: str, *, on_screen: bool = False) -> list[str]:
    """List the sentences that are too long or have one of HABITS, each with the reason. `on_screen` adds SCREEN_HABITS."""
    found = []
    for sentence in sentences(text):
        if (count := words(sentence)) > LONGEST:
            found.append(f"{count} words: {sentence}")
        for habits in (HABITS, SCREEN_HABITS) if on_screen else (HABITS,):
            found += [f"{habit.group()!r}: {sentence}" for habit in habits.finditer(sentence)]
    return found


def texts_of(path: Path) -> str:
    """Return the text of a page, or the docstrings, comments and errors of a Python file as paragraphs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    found = [shown_texts(path), *comments(text)]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.append(inspect.cleandoc(node.value.value))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found += [_spoken(argument) for argument in node.exc.args[:1]]
    return "\n\n".join(found)


def comments(code: str) -> list[str]:
    """Return the comments of Python code. Lines that have nothing else, one below the other, are one comment."""
    found: list[str] = []
    last = None
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if token.type != tokenize.COMMENT or re.match(r"#(!| ?(fmt|noqa|pyright|type|ruff):)", token.string):
            continue
        text, alone = token.string.lstrip("# "), token.line.lstrip().startswith("#")
        if alone and last == token.start[0] - 1:
            found[-1] += f" {text}"
        else:
            found.append(text)
        last = token.start[0] if alone else None
    return found


def shown_texts(path: Path) -> str:
    """Return what a node's schema or a script of the frontend shows on the page, as paragraphs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".js":
        return "\n\n".join(sorted(translated_texts(text)))
    if "nodes" not in path.parts:
        return ""
    return "\n\n".join(
        _spoken(argument.value)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        for argument in node.keywords
        if argument.arg in SHOWN
    )


def translated_texts(script: str) -> set[str]:
    """Return the texts that a script of the frontend gives to `say`, itself or in a table that is marked with `// say`."""
    tables = "".join(re.findall(r"// say\n((?:.*\S.*\n)+)", script))
    return {
        *re.findall(r'\bsay\(\s*"((?:[^"\\]|\\.)+)"', script),
        *re.findall(r'(?:: |\[|, )"((?:[^"\\]|\\.)+)"', tables),
    }


def _spoken(message: ast.expr) -> str:
    """Return the text of a message, with `x` for each value that is put into it."""
    if isinstance(message, ast.BinOp):
        return _spoken(message.left) + _spoken(message.right)
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    return "".join(str(part.value) if isinstance(part, ast.Constant) else "`x`" for part in parts)


def main(pages: list[Path]) -> None:
    lengths = []
    for page in pages or PAGES:
        text = texts_of(page)
        lengths += [words(sentence) for sentence in sentences(text)]
        for fault in faults(text):
            print(f"{page.name}: {fault}")
    lengths.sort()
    share = sum(length > LONGEST for length in lengths) / len(lengths)
    print(
        f"{len(lengths)} sentences: median {lengths[len(lengths) // 2]} words, 90th percentile "
        f"{lengths[len(lengths) * 9 // 10]}, {share:.0%} above {LONGEST}"
    )


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
