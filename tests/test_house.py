"""tools/house.py: rooms import downwards only, nothing imports in a circle, and families are known in few places."""

import ast
import re
import shutil
import subprocess
from importlib import import_module
from pkgutil import iter_modules

import pytest

from core.models import families
from core.models.families import FAMILIES
from core.models.spec import FamilySpec
from core.tensor_names import NAME_TABLES
from tools.house import (
    MOST_BRANCHES,
    MOST_LINES,
    MOST_REPEATS,
    ROOT,
    Import,
    circles,
    families_of,
    functions_of,
    imports_of,
    misplaced_mentions,
    read_lines,
    read_sources,
    repeats,
    room_circles,
    room_of,
    storey_of,
    touched_by_family,
    upward,
)


@pytest.fixture(scope="module")
def sources():
    return read_sources()


@pytest.fixture(scope="module")
def imports(sources):
    return imports_of(sources)


def test_nothing_imports_in_a_circle_not_even_inside_functions(imports):
    assert circles((one.importer, one.imported) for one in imports) == []
    assert room_circles(imports) == []


def test_no_room_imports_from_a_higher_one(imports):
    assert [(one.importer, one.imported) for one in upward(imports)] == []


def test_hardly_anything_imports_the_projects_modules_inside_functions(imports):
    """What should be loaded late is a name that a room's `__init__` hands out, or what a command needs only when it runs."""
    late = [(one.importer, one.line) for one in imports if one.late and not one.importer.startswith("core.cli.")]
    assert len(late) <= 1


def test_no_function_is_too_long(sources):
    functions = functions_of(sources)
    assert [(one.module, one.name, one.lines) for one in functions if one.lines > MOST_LINES] == []
    assert [(one.module, one.name, one.branches) for one in functions if one.branches > MOST_BRANCHES] == []


def test_a_public_name_of_a_class_has_one_meaning(sources):
    places: dict[str, list[str]] = {}
    for module, tree in sources.items():
        for node in tree.body if module.startswith(("core.", "nodes.")) else ():
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


def test_little_is_written_twice_in_the_library_and_the_tests():
    files = read_lines()
    assert {"core/models/base.py", "tests/tooling.py"} <= set(files)
    assert len(repeats(files)) <= MOST_REPEATS, repeats(files)


def test_every_module_has_a_room(sources):
    assert sources and all(storey_of(module) >= 0 for module in sources)


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/add-a-family.md", "CONTRIBUTING.md"])
def test_what_a_page_about_the_source_names_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:core|nodes|tests|tools|lab|web|docs|locales|workflows)/(?!\.)[\w./-]*)`", text))
    assert named and [path for path in sorted(named) if not (ROOT / path).exists()] == []
    for name, path in re.findall(r"`(\w+)` (?:in|of) `([\w/]+\.py)`", text):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), f"{path} has no {name}"


def test_the_architecture_page_locates_each_step_and_lists_every_room(sources):
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\| [^|]+ \| `(core/[\w/]+\.py)` \| ((?:`[\w.]+`(?:, )?)+) \|", text, re.MULTILINE)
    assert len(steps) > 8
    for path, names in steps:
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in re.findall(r"[\w.]+", names):
            for part in name.split("."):
                assert re.search(rf"^ *(def|class) {part}\b", source, re.MULTILINE), f"{path} has no {part}"
    rooms = {room_of(module) for module in sources if module.startswith("core.")}
    assert set(re.findall(r"^\| \d? ?\| `(\w+)` \|", text, re.MULTILINE)) == rooms


def test_an_import_that_runs_late_is_seen_and_closes_a_circle():
    sources = {
        "core.storage.files": "def write():\n    from ..training import loop",
        "core.training.__init__": "",
        "core.training.loop": "from ..storage.files import write\nimport math",
    }
    found = imports_of({name: ast.parse(text) for name, text in sources.items()})
    assert Import("core.storage.files", "core.training.loop", 2, late=True) in found
    assert circles((one.importer, one.imported) for one in found) == [["core.storage.files", "core.training.loop"]]
    assert {one.imported for one in upward(found)} == {"core.training.__init__", "core.training.loop"}


def test_nothing_but_a_familys_own_files_knows_it_by_name(sources):
    assert misplaced_mentions(sources) == []


def test_a_family_touches_three_source_files(sources):
    assert set(families_of(sources)) == set(NAME_TABLES)
    touched = touched_by_family(sources)
    assert set(touched) == set(FAMILIES)
    assert {len(files) for files in touched.values()} == {3}, touched


def test_each_file_of_a_family_is_in_the_list():
    modules = [import_module(f"{families.__name__}.{file.name}") for file in iter_modules(families.__path__)]
    specs = [value for module in modules for value in vars(module).values() if isinstance(value, FamilySpec)]
    assert len(modules) == len(FAMILIES) and {spec.name for spec in specs} == set(FAMILIES)


def test_families_with_comfyui_classes_are_those_that_comfyui_loads():
    trained = {name: table for name, table in NAME_TABLES.items() if name in FAMILIES}
    assert {name for name, table in trained.items() if table.comfyui_classes} == {
        name for name, table in trained.items() if table.loaded.comfyui
    }


AT_THE_TOP = {
    ".ci", ".comfyignore", ".editorconfig", ".github", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md",
    "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "Makefile", "NOTICE", "README.md", "SECURITY.md",
    "__init__.py", "__main__.py", "core", "docs", "install.py", "lab", "locales", "nodes", "py.typed", "pyproject.toml",
    "requirements.txt", "scripts", "subgraphs", "tests", "tools", "web", "workflows",
}  # fmt: skip


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs git and a clone")
def test_nothing_is_committed_beside_what_belongs_at_the_top():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.partition("/")[0] for name in names.splitlines()} == AT_THE_TOP


def test_the_architecture_page_lists_every_address_and_script_of_the_pages():
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    nodes = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "nodes/comfyui").rglob("*.py"))
    addresses, scripts = (
        set(re.findall(r'routes\.\w+\("([^"]+)"', nodes)),
        {path.name for path in ROOT.glob("web/*.js")},
    )
    modules = {path.name for path in (ROOT / "nodes/comfyui/app").glob("[a-z]*.py")}
    assert len(addresses) > 15 and scripts
    assert [name for name in sorted(addresses | scripts | modules) if f"`{name}`" not in text] == []
