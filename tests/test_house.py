"""tools/house.py: rooms import downwards only, and nothing imports in a circle."""

import ast

import pytest

from tools.house import Import, circles, imports_of, read_sources, room_circles, storey_of, upward


@pytest.fixture(scope="module")
def imports():
    return imports_of(read_sources())


def test_nothing_imports_in_a_circle_not_even_inside_functions(imports):
    assert circles((one.importer, one.imported) for one in imports) == []
    assert room_circles(imports) == []


def test_no_room_imports_from_a_higher_one(imports):
    assert [(one.importer, one.imported) for one in upward(imports)] == []


def test_hardly_anything_imports_the_projects_modules_inside_functions(imports):
    """What should be loaded late is a string in the table of commands, or a name that a room's `__init__` hands out."""
    assert len([(one.importer, one.line) for one in imports if one.late]) <= 5


def test_every_module_has_a_room():
    assert all(storey_of(module) >= 0 for module in read_sources())


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
