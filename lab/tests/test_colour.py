"""The training of a base model in colour: it goes on exactly, and its filters and words are right."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from lab.colour import captions, sources, training


def test_a_stopped_run_goes_on_exactly(tmp_path):
    def run(name, *ends):
        for end in ends:
            torch.manual_seed(1)
            layer = nn.Linear(8, 8)
            state = training.Training(tmp_path / name, {"layer": layer}, rate=1e-2, decay=0.9)
            inputs = lambda: torch.randn(4, 8, generator=state.random)  # noqa: B023, E731
            state.run(lambda: (layer(inputs()) - 1).square().mean(), 1, end, 1, lambda: None)  # noqa: B023
        return torch.load(tmp_path / name, weights_only=True)

    whole, parts = run("whole", 9), run("parts", 4, 9)
    assert whole["step"] == parts["step"] == 9
    for kind in ("weights", "average"):
        assert all(torch.equal(value, parts[kind][name]) for name, value in whole[kind].items())


@pytest.mark.parametrize(
    "colour, name",
    [((20, 20, 25), "black"), ((240, 240, 238), "white"), ((40, 60, 180), "blue"), ((30, 40, 90), "navy blue")],
)
def test_a_colour_has_its_plain_word(colour, name):
    assert captions.colour_name(np.array(colour)) == name


def test_a_caption_has_only_what_is_known():
    known = {"source": "person", "share": 0.5, "who": "woman", "hair": "red", "glasses": True}
    words = {
        word for seed in range(50) for word in captions.caption(known, random.Random(seed)).replace(",", "").split()
    }
    assert words == set(["a", "photo", "of", "woman", "person", "red", "hair", "glasses", "portrait"])


def test_prompts_of_children_and_names_are_left_out():
    looks, more = sources.read_words()
    assert {"old", "beard", "woman"} <= looks < more and "wizard" in more - looks
    assert not more & {"child", "girl", "boy", "baby", "teen", "obama", "anime", "zombie"}


def test_a_cut_picture_has_the_face_in_its_middle():
    from PIL import Image

    face = sources.Face((40.0, 30.0, 80.0, 80.0), np.zeros((5, 2)), 0.9)
    crop, share = sources._cut(Image.new("RGB", (200, 200)), face, 1.9)
    assert crop.size == sources.SIZE and share == pytest.approx(1 / 1.9)
