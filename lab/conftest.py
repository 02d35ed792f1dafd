"""The fixtures and hooks that the lab's tests share with the others."""

from tests.conftest import (  # noqa: F401
    own_cache,
    photo_folder,
    pytest_collection_finish,
    pytest_collection_modifyitems,
    pytest_xdist_make_scheduler,
    small_sd15,
    small_sdxl,
)
