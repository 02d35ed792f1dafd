"""Reading, checking, cropping, masking, captioning and bucketing of photos."""

from .buckets import assign_bucket, bucket_sizes
from .captions import trigger_hint
from .crops import face_regions, with_masks
from .dataset import Dataset, Region, TrainingImage, prepare
from .reading import Photo, read_photo_files, read_photos
from .report import PhotoReport, SetReport, Thresholds, check_photos
from .sheet import format_report, save_sheet

__all__ = [
    "Dataset",
    "Photo",
    "PhotoReport",
    "Region",
    "SetReport",
    "Thresholds",
    "TrainingImage",
    "assign_bucket",
    "bucket_sizes",
    "check_photos",
    "face_regions",
    "format_report",
    "prepare",
    "read_photo_files",
    "read_photos",
    "save_sheet",
    "trigger_hint",
    "with_masks",
]
