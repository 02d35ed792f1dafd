"""The fixtures that the lab's tests share with the others, and the mark `lab` of each of them."""

from pathlib import Path

import pytest

from tests.conftest import (  # noqa: F401
    own_cache,
    photo_folder,
    pytest_collection_finish,
    pytest_xdist_make_scheduler,
    small_sd15,
    small_sdxl,
)

LAB = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if LAB in item.path.parents:
            item.add_marker("lab")
