"""How readable the texts are: `python -m tests.prose [FILE ...]` prints sentences to rewrite, and how long all are.

Of a page it reads the prose, of a Python file the docstrings and the errors. Without files it reads all pages.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = (
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("web/docs/*.md")),
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


def faults(text: str) -> list[str]:
    """List the sentences of a page that are too long or have one of HABITS, each with the reason."""
    found = []
    for sentence in sentences(text):
        if (count := words(sentence)) > LONGEST:
            found.append(f"{count} words: {sentence}")
        found += [f"{habit.group()!r}: {sentence}" for habit in HABITS.finditer(sentence)]
    return found


def texts_of(path: Path) -> str:
    """Return the text of a page, or the docstrings and the errors of a Python file as paragraphs."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            found.append(inspect.cleandoc(node.value.value))
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            found += [_spoken(argument) for argument in node.exc.args[:1]]
    return "\n\n".join(found)


def _spoken(message: ast.expr) -> str:
    """Return the text of a message, with `x` for each value that is put into it."""
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
