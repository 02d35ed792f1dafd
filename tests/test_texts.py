"""Texts and numbers that would take minutes and gigabytes are refused in one short line, wherever they come from."""

import time
from collections.abc import Callable

import pytest
from PIL import Image

from core.config import TrainConfig
from core.errors import BadConfig, BadPhoto, BadStylePack, FaceLoraError
from core.lora.metadata import personal_part
from core.photos import Photo
from core.pictures import PictureJob, Subject, find_style_packs
from core.studio import Order
from tests.tooling import write_quick_pack

pytestmark = pytest.mark.ci

LONG = "a" * 4001


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Photo.from_image(Image.new("RGB", (64, 64)), "me", LONG), BadPhoto, "me: its caption"),
        (lambda: TrainConfig(trigger_word=LONG), BadConfig, "trigger_word"),
        (lambda: TrainConfig(sample_every=1, sample_prompts=(LONG,)), BadConfig, "sample_prompts"),
        (lambda: PictureJob(LONG, 1), BadConfig, "prompt"),
        (lambda: PictureJob("a", 1, LONG), BadConfig, "negative"),
    ],
    ids=["caption", "trigger word", "sample prompt", "prompt", "negative"],
)
def test_a_long_text_is_refused(make: Callable[[], object], error: type[FaceLoraError], words: str):
    with pytest.raises(error, match=f"^{words}: 4,001 characters; the limit is 4,000$"):
        make()


def test_a_long_prompt_of_a_style_is_refused(tmp_path):
    pack = find_style_packs([write_quick_pack(tmp_path / "packs")]).pick("quick")
    with pytest.raises(BadStylePack, match=r"4,0\d\d characters; the limit is"):
        pack.prompts(Subject(LONG), "sd15", 1, 1)


@pytest.mark.parametrize("count", [0, 10_001, 10**9])
def test_the_number_of_pictures_has_a_limit(count, tmp_path):
    pack = find_style_packs([write_quick_pack(tmp_path / "packs")]).pick("quick")
    for make in (
        lambda: pack.prompts(Subject("sks"), "sd15", count, 1),
        lambda: Order("a", TrainConfig(), pack, count),
    ):
        with pytest.raises(BadConfig, match=f"count = {count}: must be between 1 and 10000"):
            make()


def test_a_message_is_short_whatever_it_quotes():
    assert len(str(BadConfig("a" * 10**6))) < 4000


def test_a_long_word_is_searched_for_a_photos_name_in_linear_time():
    begun = time.process_time()
    assert personal_part("a" * 200_000, ["a"]) is None
    assert personal_part(f"see {'a' * 200_000}.jpg") == f"the file name '{'a' * 80}'"
    assert time.process_time() - begun < 3
