"""The values at which a photo's verdict changes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import BadConfig


@dataclass(frozen=True)
class Thresholds:
    """The values at which verdicts change: starting points, each with its source. docs/photos.md shows their effect."""

    face_pixels_reject: float = 200
    """The face size, in pixels of the photo, below which a face is rejected: half of what headshot services ask for."""
    face_pixels_review: float = 410
    """The face size, in pixels, below which a face is reviewed: HeadshotPro's minimum, 40 % of a 1024 pixel picture."""
    in_frame_review: float = 0.95
    """The share of the face's box inside the picture below which it is reviewed. Two photos cut beside an eye (package
    face_recognition) have 0.87 and 0.92, whole faces 0.98 or more. A photo with an eye or the mouth cut off is rejected."""
    sharpness_side: float = 256
    """The face size, in pixels, at which sharpness is judged, whatever the camera: 40 % of the resolution, the size at which a
    close-up is trained, and at most this."""
    sharpness_reject: float = 0.015
    """The `measure.sharpness` below which a face is rejected. Blurring by 2 pixels or enlarging 6 times gives 0.006 to
    0.015."""
    sharpness_review: float = 0.05
    """The sharpness below which a face is reviewed. Sharp portraits and ORL have 0.06 to 1.4, soft group pictures 0.01 to
    0.09."""
    highlights_reject: float = 40
    """The `measure.highlights` below which a face is rejected as dark: portraits darkened to 15 % have 24 to 29."""
    highlights_review: float = 80
    """The highlights below which a face is reviewed: portraits darkened to 30 % have 54 to 59, all of ORL is above 130."""
    midtone_review: float = 225
    """The `measure.midtone` above which a face is reviewed as bright: ordinary faces have 50 to 175."""
    midtone_reject: float = 245
    """The midtone above which a face is rejected: portraits brightened 2.5 times have 234 to 255."""
    likeness_reject: float = 0.40
    """The cosine to the set's most typical photo below which a face is someone else's: SFace's equal-error threshold."""
    likeness_review: float = 0.55
    """The cosine below which a face is reviewed: 98.7 % of ORL's photos reach it, and no photo of someone else does."""
    same_picture: int = 2
    """The bits, of 64, by which hashes of copies differ: 0 to 2 when scaled, recompressed or recoloured, rarely 4."""
    similar_picture: int = 6
    """The bits by which hashes of similar pictures differ: 2 to 6 for copies cropped by 2 % or turned by 1 degree."""
    same_picture_likeness: float = 0.85
    """The lowest cosine of the faces at which pictures with equal hashes count as copies: copies have 0.90 to 0.99."""
    face_share_crop: float = 0.12
    """The share of the picture (square roots of the areas) below which a face is small: 120 of 1024 pixels are too few."""
    other_face: float = 0.3
    """The share of the largest face's size below which a face counts as background."""
    turned: float = 0.12
    """The yaw (`measure.pose`) at which a face counts as half-turned: about 15 degrees. Nine in ten ORL photos are below."""
    side: float = 0.35
    """The yaw at which a face counts as a side view: about 38 degrees."""
    photos_needed: int = 5
    """The fewest usable photos to train on: one less than headshot services accept."""
    photos_wanted: int = 10
    """The number of usable photos that is enough: headshot services ask for 6 to 20, and 8 to 15 work best."""
    turned_wanted: int = 3
    """The number of usable photos with a turned head, so that the LoRA learns the person and not the view."""
    chest_up_wanted: int = 3
    """The number of usable photos that show more than the face."""
    lights_wanted: int = 3
    """The number of kinds of light (`measure.light`) among the usable photos."""
    backgrounds_wanted: int = 3
    """The number of kinds of background (`measure.background`), so that no wall becomes part of the person."""

    @classmethod
    def for_resolution(cls, resolution: int, network: str = "sface") -> Thresholds:
        """Return the thresholds for training at a resolution, in pixels, with likeness measured by a face network.

        The defaults are for 1024 pixels; face sizes grow in proportion. A photo that is soft at its own size can be sharp at
        the size at which it is trained. A network that is not in LIKENESS_LIMITS is treated like SFace. Raises BadConfig for a
        resolution below 1.
        """
        if resolution < 1:
            raise BadConfig(f"resolution = {resolution}: must be at least 1")
        default = cls()
        reject, review, same_picture = LIKENESS_LIMITS.get(network, LIKENESS_LIMITS["sface"])
        return replace(
            default,
            face_pixels_reject=default.face_pixels_reject * resolution / 1024,
            face_pixels_review=default.face_pixels_review * resolution / 1024,
            sharpness_side=min(default.sharpness_side, max(LEAST_SHARPNESS_SIDE, 0.4 * resolution)),
            likeness_reject=reject,
            likeness_review=review,
            same_picture_likeness=same_picture,
        )


LEAST_SHARPNESS_SIDE = 48
"""The size of a face, in pixels, below which sharpness says little: detail and edges of the face are the same."""
LIKENESS_LIMITS = {
    "sface": (Thresholds.likeness_reject, Thresholds.likeness_review, Thresholds.same_picture_likeness),
    "dlib": (0.93, 0.95, 0.985),
}
"""The (likeness_reject, likeness_review, same_picture_likeness) measured for each face network.

On ORL, dlib's equal-error threshold is 0.925. 98.0 % of the photos reach 0.95, and no photo of someone else exceeds 0.942.
Copies that are scaled, recompressed, cropped by 2 % or turned by 1 degree have 0.992 or more.
"""
