"""core/photos/crops.py and captions: a mix of crops that never enlarge, without other people; masks; hints."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.errors import BadConfig
from core.faces import TEMPLATE, Face
from core.models.clip import load_tokenizer
from core.photos import Photo, Thresholds, check_photos, face_regions, prepare, trigger_hint, with_masks
from core.photos.crops import draw_mask
from core.photos.report import CROP, Finding, PhotoReport, SetReport
from tests.face_samples import orl


def face_at(left, top, width, height):
    """Landmarks at the usual places in the box."""
    landmarks = (TEMPLATE - 30) / 70 * [width, height] + [left, top]
    return Face((left, top, left + width, top + height), landmarks, 1.0)


def report_of(photo, face, others=(), crop=False, view="front", framing="body"):
    findings = (Finding(CROP, "other people"),) if crop else ()
    item = PhotoReport(photo, findings, 1 + len(others), face, tuple(others), view=view, framing=framing)
    return SetReport((item,), Thresholds(), "test", 1, 1, ())


def blank(size, caption=None):
    return Photo.from_image(Image.new("RGB", size), "a.jpg", caption)


def regions_of(photo, face, others=(), crop=False, resolution=512, **options):
    return face_regions(report_of(photo, face, others, crop), resolution, "sks", "person", **options)(photo)


def test_a_large_photo_gives_the_whole_and_a_close_up_with_captions_that_name_them():
    photo = blank((3000, 4000))
    whole, close_up = regions_of(photo, face_at(1200, 800, 500, 650))
    assert whole.box == (0, 0, 3000, 4000)
    assert whole.caption == "a medium shot of sks person, facing the camera"
    # 650 pixels of face, 0.6 of them above and 0.5 below: a square of 1365 pixels around the middle, x = 1450.
    assert np.allclose(close_up.box, (767, 410, 2132, 1775), atol=2)
    assert close_up.caption == "a close-up photo of sks person, facing the camera"


def test_a_small_photo_gives_one_picture():
    (whole,) = regions_of(blank((600, 600)), face_at(200, 150, 200, 260))
    assert whole.box == (0, 0, 600, 600)


def test_a_small_face_gives_a_chest_up_part_and_no_crop_below_the_resolution():
    boxes = [region.box for region in regions_of(blank((4000, 3000)), face_at(2000, 900, 120, 150), crop=True)]
    (box,) = boxes
    width, height = box[2] - box[0], box[3] - box[1]
    assert 512**2 <= width * height < 1.01 * 512**2
    assert box[0] < 2000 and box[2] > 2120 and box[1] < 900 and box[3] > 1050


def test_other_people_are_cut_off_at_the_cheapest_side():
    others = [face_at(200, 500, 300, 400), face_at(1500, 400, 300, 400)]
    regions = regions_of(blank((2000, 1500)), face_at(800, 400, 320, 420), others, crop=True)
    assert regions
    for region in regions:
        left, _, right, _ = region.box
        assert left >= 500 and right <= 1500 and left < 800 and right > 1120


def test_a_face_that_cannot_be_cut_off_stays_in_the_picture_and_out_of_the_mask():
    other = face_at(1000, 450, 300, 400)  # cheek to cheek: the boxes overlap
    photo, face = blank((2000, 1500)), face_at(720, 400, 320, 420)
    assert any(region.box[2] > 1100 for region in regions_of(photo, face, [other], crop=True))
    (masked,) = with_masks([photo], report_of(photo, face, [other]))
    mask = masked.mask()
    assert mask is not None and mask.size == (2000, 1500)
    weights = np.asarray(mask)
    assert weights[600, 880] == 255 and weights[550, 1200] < 10


def test_a_sidecar_caption_stays_and_a_closer_crop_says_so():
    photo = blank((3000, 4000), caption="sks person on a beach")
    captions = [region.caption for region in regions_of(photo, face_at(1200, 800, 500, 650))]
    assert captions == ["sks person on a beach", "sks person on a beach, close-up"]


def test_a_photo_without_a_face_or_a_report_is_used_whole():
    reported, unknown = blank((800, 600)), Photo.from_image(Image.new("RGB", (700, 600), "red"), "b.jpg")
    regions = face_regions(report_of(reported, None), 512, "sks", "person")
    assert [(region.box, region.caption) for photo in (reported, unknown) for region in regions(photo)] == [
        ((0, 0, 800, 600), None),
        ((0, 0, 700, 600), None),
    ]


@given(
    width=st.integers(300, 6000),
    height=st.integers(300, 6000),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    share=st.floats(0.03, 0.6),
    resolution=st.sampled_from([64, 512, 1024]),
    crop=st.booleans(),
)
def test_regions_are_inside_the_photo_and_never_enlarged(width, height, place, share, resolution, crop):
    side = share * min(width, height)
    face = face_at(place[0] * (width - side), place[1] * (height - side), side, side)
    photo = dataclasses.replace(blank((1, 1)), size=(width, height))  # no pixels are looked at
    regions = regions_of(photo, face, crop=crop, resolution=resolution)
    assert regions
    for region in regions:
        left, top, right, bottom = region.box
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        # A part has the resolution's pixels, unless a side of the photo is too short for that.
        assert (right - left) * (bottom - top) >= resolution**2 or right - left == width or bottom - top == height
        assert (
            left <= face.box[0] + 1
            and right >= face.box[2] - 1
            and top <= face.box[1] + 1
            and bottom >= face.box[3] - 1
        )


def test_regions_become_training_images_in_their_buckets(network):
    canvas = Image.new("RGB", (1500, 2000), "slategray")
    canvas.paste(orl(5, 9).resize((460, 560), Image.Resampling.BICUBIC), (500, 400))
    photo = Photo.from_image(canvas, "a.png")
    regions = face_regions(check_photos([photo], network), 512, "sks", "person")
    dataset = prepare([photo], resolution=512, size_multiple=64, trigger="sks", class_word="person", regions=regions)
    assert [image.bucket for image in dataset.images] == [(448, 576), (512, 512)]
    assert [image.caption.split(" photo")[0] for image in dataset.images] == ["a chest-up", "a close-up"]
    assert all(len(network.detect(image.photo.image().crop(image.crop))) == 1 for image in dataset.images)


def test_the_person_counts_fully_and_the_background_a_little():
    face = face_at(400, 200, 200, 260)
    person = np.asarray(draw_mask((1000, 1000), face, []))
    head = np.asarray(draw_mask((1000, 1000), face, [], part="face"))
    assert person[330, 500] == head[330, 500] == 255
    assert person[900, 500] == 255 and head[900, 500] == 26  # the chest; 26 = 0.1 * 255
    assert person[50, 50] == head[50, 50] == 26
    assert head.mean() < person.mean() < 255


def test_masks_of_large_photos_are_drawn_small():
    photo, face = blank((6000, 4000)), face_at(2500, 1000, 900, 1200)
    (masked,) = with_masks([photo], report_of(photo, face))
    assert isinstance(masked.mask_source, Image.Image) and max(masked.mask_source.size) == 1024
    mask = masked.mask()
    assert mask is not None and mask.size == (6000, 4000)


def test_a_mask_of_the_users_own_stays():
    own = Photo.from_image(Image.new("RGB", (400, 400)), "a", mask=Image.new("L", (400, 400), 77))
    assert with_masks([own], report_of(own, face_at(100, 100, 100, 130))) == [own]


def test_an_unknown_part_of_a_mask_is_refused():
    with pytest.raises(BadConfig, match="'person' or 'face', not 'hair'"):
        draw_mask((100, 100), face_at(10, 10, 50, 60), [], part="hair")


# Pieces as CLIP's published vocabulary has them: "sks" is entry 48136, "anna" 2160, "john" 2004 + "smith" 2915.
@pytest.mark.parametrize(
    ("trigger", "hint"),
    [
        ("sks", None),
        ("ohwx", None),
        ("zwx", None),
        ("anna", "'anna' is one word, and the model has pictures for 'anna'"),
        ("johnsmith", "'johnsmith' is read as 'john' + 'smith', and the model has pictures for 'john' and 'smith'"),
    ],
)
def test_a_trigger_word_that_means_something_is_called_out(trigger, hint):
    found = trigger_hint(trigger, load_tokenizer())
    assert found is None if hint is None else hint in str(found)
