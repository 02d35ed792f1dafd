"""The tables of docs/, which programs of tools/ and lab/ fill."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from core.storage.files import write_text


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def replace_table(text: str, name: str, content: str) -> str:
    """`text` with what stands between `<!-- table: NAME -->` and `<!-- end -->` replaced."""
    start = f"<!-- table: {name} -->\n"
    before, rest = text.split(start)
    return f"{before}{start}{content}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"


def write_tables(page: Path, tables: Mapping[str, str]) -> None:
    """Put the tables into the page, each in the place of its name."""
    text = page.read_text(encoding="utf-8")
    for name, content in tables.items():
        text = replace_table(text, name, content)
    write_text(page, text)
