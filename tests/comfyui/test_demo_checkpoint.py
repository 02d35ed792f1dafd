"""The checkpoint that the other tests draw faces with."""

import numpy as np
import pytest

from core.base import load_base
from core.demo import BASE_FILE, GUIDANCE
from core.generate import GenerateConfig, Job, generate

from .demo_checkpoint import PICTURE_SIZE, write_demo_checkpoint

pytestmark = [pytest.mark.comfyui, pytest.mark.slow]


def test_it_draws_what_the_demo_base_draws(tmp_path):
    wide = write_demo_checkpoint(tmp_path / "demo.safetensors")
    jobs = [Job("a photo of person", seed, size=PICTURE_SIZE, guidance=GUIDANCE, steps=8) for seed in (1, 2)]
    ours, theirs = (
        [np.asarray(picture.image, dtype=float) for picture in generate(load_base(file), [], jobs, GenerateConfig())]
        for file in (BASE_FILE, wide)
    )
    for a, b in zip(ours, theirs, strict=True):
        assert np.abs(a - b).mean() < 1  # 16-bit weights round
