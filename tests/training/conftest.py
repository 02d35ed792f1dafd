"""What the tests of trainings share: small Stable Diffusion models, and two pictures that are encoded for each."""

import pytest

from core.models import Base, load_base
from core.training.encode import LatentCache
from tests.tooling import cache_of


@pytest.fixture(scope="module")
def bases(small_sd15, small_sdxl) -> dict[str, Base]:
    return {"sd15": load_base(small_sd15), "sdxl": load_base(small_sdxl)}


@pytest.fixture(scope="module")
def caches(bases) -> dict[str, LatentCache]:
    return {name: cache_of(base, 2) for name, base in bases.items()}
