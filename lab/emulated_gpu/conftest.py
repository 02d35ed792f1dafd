"""A process in which torch finds a fake CUDA device."""

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

from lab.emulated_gpu import trials


@pytest.fixture(scope="session")
def fake_process() -> Iterator[ProcessPoolExecutor]:
    """A process of its own, since fake_cuda.py must be imported before torch. It runs functions of `trials.py`."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=trials.begin) as process:
        yield process
