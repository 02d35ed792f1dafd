"""What the tests of trainings share: small Stable Diffusion models, and two pictures that are encoded for each."""

import pytest

from core.models import Base, load_base
from core.training.encode import LatentCache
from tests.tooling import cache_of


@pytest.fixture(scope="module")
def base(small_sd15) -> Base:
    return load_base(small_sd15)


@pytest.fixture(scope="module")
def caches(bases) -> dict[str, LatentCache]:
    return {name: cache_of(base, 2) for name, base in bases.items()}
