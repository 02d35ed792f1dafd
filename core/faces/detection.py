"""Find faces in a picture with YuNet, down to about 2 % of its long side.

github.com/ShiqiYu/libfacedetection.train, "YuNet: A Tiny Millisecond-level Face Detector" (2023)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .face import Face, check_open

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

STRIDES = (8, 16, 32)
MIN_SCORE = 0.7
MAX_OVERLAP = 0.3


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
