"""Reading, checking, cropping, masking, captioning and bucketing of photos."""

from .buckets import assign_bucket, bucket_sizes
from .dataset import Dataset, Region, TrainingImage, prepare
from .reading import Photo, read_photos

__all__ = [
    "Dataset",
    "Photo",
    "Region",
    "TrainingImage",
    "assign_bucket",
    "bucket_sizes",
    "prepare",
    "read_photos",
]
