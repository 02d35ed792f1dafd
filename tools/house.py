"""Read the house from its sources: circles of imports, imports that point to a higher storey, long functions, what a new model
family touches, and what is written twice. `tests/test_house.py` checks it.

The sources are read, not run. An import inside a function counts like one at the top of its file, and one for type
checkers like one that runs.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("core", "nodes", "tools", "lab")
STOREYS: tuple[tuple[str, ...], ...] = (
    ("errors", "lazy_names", "threads", "progress", "version", "config", "device", "doctor", "storage"),
    ("tensor_names",),
    ("faces",),
    ("photos", "models"),
    ("lora",),
    ("pictures",),
    ("training",),
    ("studio", "demo"),
    ("cli", "nodes", "tools"),
    ("lab",),
)
"""The rooms from the lowest storey to the highest. A module may import from its own storey and from those below."""
FAMILY_ROOMS = ("core.models.families.", "core.tensor_names.")
"""Where families may be known by name."""
MOST_LINES, MOST_BRANCHES = 80, 25
"""What a function may have."""
SAME_LINES, MOST_REPEATS = 6, 16
"""How many lines in a row make a repeat, and how many repeats there may be, those of the tests among them."""
_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.ExceptHandler, ast.comprehension, ast.BoolOp, ast.match_case)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@dataclass(frozen=True)
class Import:
    """One module of the project that another one names."""

    importer: str
    imported: str
    line: int
    late: bool
    """Whether it stands inside a function."""


@dataclass(frozen=True, order=True)
class Mention:
    """A place that knows a model family by name."""

    module: str
    line: int
    family: str


@dataclass(frozen=True, order=True)
class Repeat:
    """Two places, each a file and the number of a line, from which on the same lines stand."""

    first: str
    first_line: int
    second: str
    second_line: int


@dataclass(frozen=True)
class Function:
    module: str
    name: str
    lines: int
    branches: int


def read_sources(root: Path = ROOT) -> dict[str, ast.Module]:
    """Dotted name of every module in TOPS -> its syntax tree."""
    found = {}
    for top in TOPS:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts)] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def room_of(module: str) -> str:
    """The room that a module is in: its folder in `core/`, or itself where it stands at the top of it."""
    top, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    return ("cli" if room in ("__init__", "__main__") else room) if top == "core" else top


def storey_of(module: str) -> int:
    """How high the room of a module is."""
    return next(height for height, rooms in enumerate(STOREYS) if room_of(module) in rooms)


def imports_of(modules: Mapping[str, ast.Module]) -> list[Import]:
    """Every import of one module of the project by another."""
    found = set()
    for importer, tree in modules.items():
        late = {id(inner) for node in ast.walk(tree) if isinstance(node, _FUNCTIONS) for inner in ast.walk(node)}
        for node in ast.walk(tree):
            for name in _imported(node, importer):
                imported = name if name in modules else f"{name}.__init__"
                if imported in modules and imported != importer:
                    found.add(Import(importer, imported, node.lineno, id(node) in late))  # pyright: ignore
    return sorted(found, key=lambda found: (found.importer, found.line, found.imported))


def _imported(node: ast.AST, importer: str) -> Iterator[str]:
    """The dotted names that an import statement may mean: `from .a import b` both `a` and its `b`, where there are such."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        package = importer.split(".")[: -node.level] if node.level else []
        base = ".".join([*package, *(node.module.split(".") if node.module else [])])
        submodules = [f"{base}.{alias.name}" for alias in node.names]
        yield from submodules
        if node.module:
            yield base


def circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The sets of names in which each leads to each other one along the arrows, largest first."""
    targets: dict[str, set[str]] = {}
    for source, target in arrows:
        targets.setdefault(source, set()).add(target)
    reached = {name: _reached(name, targets) for name in targets}
    found: list[list[str]] = []
    for name in sorted(targets):
        circle = sorted(other for other in reached[name] if name in reached.get(other, ()))
        if name in reached[name] and circle not in found:
            found.append(circle)
    return sorted(found, key=len, reverse=True)


def _reached(start: str, targets: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        for target in targets.get(waiting.pop(), set()) - reached:
            reached.add(target)
            waiting.append(target)
    return reached


def room_circles(imports: Iterable[Import]) -> list[list[str]]:
    """The circles of rooms: two rooms of one storey may not import each other either."""
    rooms = ((room_of(one.importer), room_of(one.imported)) for one in imports)
    return circles((source, target) for source, target in rooms if source != target)


def upward(imports: Iterable[Import]) -> list[Import]:
    """The imports of a room on a higher storey."""
    return [one for one in imports if storey_of(one.imported) > storey_of(one.importer)]


def functions_of(modules: Mapping[str, ast.Module]) -> list[Function]:
    """Every function and method, the longest first. What stands in an inner function counts for the outer one too."""
    found = [
        Function(module, node.name, (node.end_lineno or node.lineno) - node.lineno + 1, _branches(node))
        for module, tree in modules.items()
        for node in ast.walk(tree)
        if isinstance(node, _FUNCTIONS)
    ]
    return sorted(found, key=lambda function: -function.lines)


def _branches(function: ast.AST) -> int:
    return sum(isinstance(node, _BRANCHES) for node in ast.walk(function))


def families_of(modules: Mapping[str, ast.Module]) -> dict[str, str]:
    """Short name of each family -> name of the constant that is its NameTable."""
    return {
        ast.literal_eval(keyword.value): target.id
        for module, tree in modules.items()
        if room_of(module) == "tensor_names"
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if isinstance(node.value.func, ast.Name) and node.value.func.id == "NameTable"
        for target in node.targets
        if isinstance(target, ast.Name)
        for keyword in node.value.keywords
        if keyword.arg == "name"
    }


def family_mentions(modules: Mapping[str, ast.Module]) -> list[Mention]:
    """Every place of core/ and nodes/ that names a family: in a string that is no docstring, or as its NameTable."""
    families = families_of(modules)
    # Titles for people (SDXL) are written otherwise; `sd15` is also found in `default: sd15`.
    names = re.compile(rf"(?<![\w-])({'|'.join(map(re.escape, families))})(?![\w-])")
    tables = {constant: family for family, constant in families.items()}
    found = set()
    for module, tree in modules.items():
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found |= {Mention(module, node.lineno, name) for name in names.findall(node.value)}
            elif isinstance(node, ast.ImportFrom) and "tensor_names" in (module + (node.module or "")):
                constants = {alias.name for alias in node.names} & set(tables)
                found |= {Mention(module, node.lineno, tables[constant]) for constant in constants}
    return sorted(one for one in found if not one.module.startswith(("tools.", "lab.")))


def misplaced_mentions(modules: Mapping[str, ast.Module]) -> list[Mention]:
    """The places that name a family where none should."""
    return [one for one in family_mentions(modules) if not one.module.startswith(FAMILY_ROOMS)]


def touched_by_family(modules: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    """Each family that can be trained -> the modules that name it: those that a new one touches."""
    found: dict[str, set[str]] = {}
    for one in family_mentions(modules):
        found.setdefault(one.family, set()).add(one.module)
    is_trained = {one.family for one in family_mentions(modules) if one.module.startswith(FAMILY_ROOMS[0])}
    return {family: sorted(found[family]) for family in families_of(modules) if family in is_trained}


def read_lines(root: Path = ROOT) -> dict[str, list[tuple[int, str]]]:
    """Path of every source file, the tests among them -> number and text of its lines of code."""
    patterns = ("*.py", "[!.]*/**/*.py")  # not what the tests download
    files = sorted(path for top in (*TOPS, "tests") for pattern in patterns for path in (root / top).glob(pattern))
    return {path.relative_to(root).as_posix(): code_lines(path.read_text(encoding="utf-8")) for path in files}


def code_lines(text: str) -> list[tuple[int, str]]:
    """Number and text of the lines of code, in which all white space is one blank.

    What says nothing by itself is no line of code: imports, comments, and lines without a letter or digit.
    """
    imports = {
        number
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = ((number, " ".join(line.split())) for number, line in enumerate(text.splitlines(), 1))
    return [(n, line) for n, line in lines if n not in imports and re.search(r"\w", line) and not line.startswith("#")]


def repeats(files: Mapping[str, list[tuple[int, str]]]) -> list[Repeat]:
    """Every pair of places with the same SAME_LINES lines of code, or more, in a row: these are one pair, as far as they go."""
    places: dict[tuple[str, ...], list[tuple[str, int]]] = {}
    for file, lines in files.items():
        for start in range(len(lines) - SAME_LINES + 1):
            window = tuple(line for _, line in lines[start : start + SAME_LINES])
            places.setdefault(window, []).append((file, start))
    pairs = {pair for found in places.values() for pair in combinations(found, 2)}

    def begins(pair: tuple[tuple[str, int], tuple[str, int]]) -> bool:
        (first, i), (second, j) = pair
        return ((first, i - 1), (second, j - 1)) not in pairs

    return sorted(
        Repeat(first, files[first][i][0], second, files[second][j][0])
        for (first, i), (second, j) in filter(begins, pairs)
    )
