"""core/photos: buckets, captions, crops and tensors."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.errors import BadConfig, BadPhoto
from core.photos import Photo, Region, assign_bucket, bucket_sizes, prepare, reading

SIDE = st.integers(64, 5000)


def gradient(size=(96, 64)):
    """Red grows to the right, green downwards: a pixel tells where it was."""
    x, y = np.meshgrid(np.linspace(0, 255, size[0]), np.linspace(0, 255, size[1]))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], -1).round().astype(np.uint8))


def dataset(photos, **options):
    return prepare(photos, **{"resolution": 64, "size_multiple": 8, "trigger": "sks", "class_word": "person"} | options)


def test_sdxl_buckets_are_those_of_the_sdxl_paper():
    # arXiv:2307.01952, appendix I lists these (height x width) near 1024²; our list keeps aspects up to 2:1.
    paper = {(1024, 1024), (960, 1088), (896, 1152), (832, 1216), (768, 1344), (704, 1408)}
    assert set(bucket_sizes(1024, 64)) == paper | {(height, width) for width, height in paper}


@given(width=SIDE, height=SIDE, resolution=st.integers(64, 1536), multiple=st.sampled_from([8, 16, 32, 64]))
def test_a_bucket_is_a_valid_size_never_larger_than_the_photo(width, height, resolution, multiple):
    bucket = assign_bucket((width, height), resolution, multiple)
    assert bucket[0] % multiple == bucket[1] % multiple == 0
    assert bucket[0] * bucket[1] <= resolution**2
    assert bucket[0] <= width and bucket[1] <= height
    assert max(bucket) <= 2 * min(bucket)


@given(width=SIDE, height=SIDE)
def test_a_large_photo_loses_little_by_its_bucket(width, height):
    bucket = assign_bucket((width, height), 1024, 64, upscale=True)
    aspect = min(2.0, max(0.5, width / height))
    # Neighbouring buckets of SDXL's list are at most 1.22 apart in aspect; half of that, as a ratio, is 1.11.
    assert abs(math.log(bucket[0] / bucket[1] / aspect)) <= math.log(1.11)


def test_a_small_photo_gets_a_smaller_bucket_of_its_aspect():
    assert assign_bucket((300, 200), 512, 64) == (256, 192)
    assert assign_bucket((300, 200), 512, 64, upscale=True) == (640, 384)


def test_each_photo_is_trained_on_at_every_resolution_that_it_is_large_enough_for():
    large, small = (Photo.from_image(gradient(size), name) for size, name in (((96, 64), "large"), ((48, 32), "small")))
    images = dataset([large, small], resolution=64, more_resolutions=(48, 32), flip=True).images
    found = [(image.photo.name, image.bucket) for image in images if not image.flip]
    assert found == [
        ("large", (80, 48)), ("large", (56, 40)), ("large", (40, 24)), ("small", (48, 32)), ("small", (40, 24)),
    ]  # fmt: skip
    assert sum(image.flip for image in images) == len(found)


def test_too_small_photos_and_too_small_resolutions_are_refused():
    with pytest.raises(BadPhoto, match="63x200 pixels are too few: each side needs at least 64"):
        assign_bucket((63, 200), 512, 64)
    with pytest.raises(BadPhoto, match="3x200 pixels are too few: each side needs at least 16"):
        assign_bucket((3, 200), 512, 64, upscale=True)
    with pytest.raises(BadPhoto, match="8x200 pixels are too few: each side needs at least 16"):
        assign_bucket((8, 200), 512, 8)
    with pytest.raises(BadConfig, match="resolution 32 is below 64"):
        assign_bucket((500, 500), 32, 64)


def test_the_photo_that_is_too_small_is_named():
    with pytest.raises(BadPhoto, match=r"^small\.jpg: 40x40 pixels"):
        dataset([Photo.from_image(gradient((40, 40)), "small.jpg")], resolution=64, size_multiple=64)


def test_captions_are_the_sidecar_or_trigger_and_class_word():
    photos = [Photo.from_image(gradient(), "a"), Photo.from_image(gradient(), "b", caption="sks person, outdoors")]
    images = dataset(photos, class_photos=[Photo.from_image(gradient(), "c")]).images
    assert [(image.caption, image.is_class) for image in images] == [
        ("a photo of sks person", False),
        ("sks person, outdoors", False),
        ("a photo of person", True),
    ]


def test_a_caption_without_the_trigger_word_is_mentioned():
    photos = [Photo.from_image(gradient(), "a.jpg", caption="a person with masks")]
    (note,) = dataset(photos).warnings
    assert note.startswith("a.jpg: the caption lacks the trigger word 'sks'")


def test_pixels_are_the_crop_scaled_to_the_bucket():
    (image,) = dataset([Photo.from_image(gradient((960, 640)), "a")]).images
    pixels = image.pixels()
    assert pixels.dtype == torch.float32 and pixels.shape == (3, image.bucket[1], image.bucket[0])
    assert image.bucket == (80, 48)
    # 80x48 of 960x640: the width is used whole, of the height 960 * 48 / 80 = 576 pixels from 32 on.
    assert image.crop == (0, 32, 960, 608)
    assert pixels[1, 0, 30].item() == pytest.approx((32 + 6) / 320 - 1, abs=0.02)
    assert pixels[1, -1, 30].item() == pytest.approx((608 - 6) / 320 - 1, abs=0.02)
    assert pixels[0, 30, -1].item() == pytest.approx((960 - 6) / 480 - 1, abs=0.02)


def test_pixels_of_a_very_large_photo_are_the_same_part(monkeypatch):
    photo = Photo.from_image(gradient((192, 128)), "a")
    (image,) = dataset([photo]).images
    whole = image.pixels()
    monkeypatch.setattr(reading, "MOST_PIXELS_AT_ONCE", 20_000)
    assert photo.image().size == (96, 64)
    assert torch.allclose(image.pixels(), whole, atol=0.02)


def test_a_flipped_copy_mirrors_pixels_and_mask():
    mask = Image.new("L", (960, 640), 0)
    mask.paste(255, (0, 0, 480, 640))
    straight, mirrored = dataset([Photo.from_image(gradient((960, 640)), "a", mask=mask)], flip=True).images
    assert torch.equal(mirrored.pixels(), straight.pixels().flip(-1))
    straight_mask, mirrored_mask = straight.mask(), mirrored.mask()
    assert straight_mask is not None and mirrored_mask is not None
    assert straight_mask.shape == (1, 48, 80) and straight_mask[0, 0, 0] == 1 and straight_mask[0, 0, -1] == 0
    assert torch.equal(mirrored_mask, straight_mask.flip(-1))


def test_sdxl_conditioning_is_the_size_before_and_the_crop_after_scaling():
    (image,) = dataset([Photo.from_image(gradient((960, 640)), "a")]).images
    assert image.original_size == (960, 640)
    assert image.crop_top_left == (0, round(32 * 80 / 960))


def test_regions_become_pictures_of_their_own():
    def regions(photo):
        return [Region((0, 0, *photo.size)), Region((480, 320, 640, 480), "a close-up of sks person")]

    whole, close_up = dataset([Photo.from_image(gradient((960, 640)), "a")], regions=regions).images
    assert (whole.caption, close_up.caption) == ("a photo of sks person", "a close-up of sks person")
    assert (close_up.crop, close_up.bucket, close_up.original_size) == ((480, 320, 640, 480), (64, 64), (160, 160))
    assert close_up.crop_top_left == (0, 0)


def test_counts_for_the_metadata():
    photos = [
        Photo.from_image(gradient((64, 64)), "a", caption="sks person, Outdoors", repeats=10),
        Photo.from_image(gradient((64, 64)), "b", caption="sks person", repeats=10),
        Photo.from_image(gradient((48, 80)), "c"),
    ]
    made = dataset(photos, class_photos=[Photo.from_image(gradient((64, 64)), "d")])
    assert made.bucket_counts() == {(48, 80): 1, (64, 64): 21}
    assert made.tag_counts() == {"sks person": 2, "outdoors": 1, "a photo of sks person": 1}
