"""Read, check, crop, mask, caption and bucket photos."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .agreement import Agreement as Agreement
    from .agreement import agreement_of as agreement_of
    from .agreement import check_agreed as check_agreed
    from .agreement import keep_agreement as keep_agreement
    from .agreement import person_file as person_file
    from .agreement import read_person_file as read_person_file
    from .agreement import write_agreement as write_agreement
    from .alike import Candidate as Candidate
    from .alike import check_chosen as check_chosen
    from .alike import check_real as check_real
    from .alike import choose_alike as choose_alike
    from .captions import trigger_hint as trigger_hint
    from .crops import about_small_faces as about_small_faces
    from .crops import face_regions as face_regions
    from .crops import with_masks as with_masks
    from .dataset import Dataset as Dataset
    from .dataset import Region as Region
    from .dataset import TrainingImage as TrainingImage
    from .dataset import assign_bucket as assign_bucket
    from .dataset import bucket_sizes as bucket_sizes
    from .dataset import prepare as prepare
    from .measure import Thresholds as Thresholds
    from .reading import PHOTO_SUFFIXES as PHOTO_SUFFIXES
    from .reading import Photo as Photo
    from .reading import PhotoLike as PhotoLike
    from .reading import as_photo as as_photo
    from .reading import count_photos as count_photos
    from .reading import read_photo_files as read_photo_files
    from .reading import read_photos as read_photos
    from .ready import Ready as Ready
    from .ready import make_ready as make_ready
    from .ready import usual_hold_out as usual_hold_out
    from .report import REJECT as REJECT
    from .report import PhotoReport as PhotoReport
    from .report import SetReport as SetReport
    from .report import check_photos as check_photos
    from .sheet import SHEET_KEY as SHEET_KEY
    from .sheet import format_report as format_report
    from .sheet import is_sheet as is_sheet
    from .sheet import save_sheet as save_sheet
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
