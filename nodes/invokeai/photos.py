"""The photos that nodes take, from a board or a list, and the node Photo Report."""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false

from collections.abc import Iterable
from functools import partial

from invokeai.invocation_api import (
    BaseInvocation,
    BaseInvocationOutput,
    BoardField,
    ImageField,
    Input,
    InputField,
    InvocationContext,
    ModelIdentifierField,
    OutputField,
    WithBoard,
    invocation,
    invocation_output,
)

from ...core.errors import BadPhoto, counted
from ...core.faces import Reference, faces_if_installed
from ...core.photos import Photo, Thresholds, check_photos, format_report, read_photo_files
from ...core.photos.report import VERDICTS
from ...core.pictures.sheet import contact_sheet
from . import services
from .models import MAIN_MODEL, base_of
from .progress import NodeProgress

FACE_SIDE = 640
"""The shorter side of a photo as the face networks see it, in pixels."""
TILE = 256
"""The height of a photo on a sheet, in pixels."""


def read_named(context: InvocationContext, names: Iterable[str], progress: NodeProgress) -> list[Photo]:
    """Read the pictures that InvokeAI has under these names, without those that can't be read."""
    return read_photo_files([services.photo_path(context, name) for name in names], on_warning=progress.warning)


class PhotosInvocation(BaseInvocation):
    """A node that takes photos of a person."""

    photos: list[ImageField] | None = InputField(
        default=None, description="Photos of one person. You can drop files here."
    )
    photo_board: BoardField | None = InputField(
        default=None, description="A board with more photos of the person, in addition to photos.", input=Input.Direct
    )

    photo_names: list[str] | None = InputField(
        default=None, description="Photos from Train Face LoRA or Photo Report.", input=Input.Connection
    )

    def image_names(self, context: InvocationContext) -> list[str]:
        """Return InvokeAI's names of the photos, without duplicates."""
        names = [*(photo.image_name for photo in self.photos or ()), *(self.photo_names or ())]
        if self.photo_board:
            names += context.boards.get_all_image_names_for_board(self.photo_board.board_id)
        return list(dict.fromkeys(names))

    def read_photos(self, context: InvocationContext, progress: NodeProgress) -> list[Photo]:
        """Read the photos. Raises BadPhoto if there are none, or none can be read."""
        names = self.image_names(context)
        if not names:
            raise BadPhoto("no photos: add 10 to 20 photos of one person, or choose a board that has them")
        photos = read_named(context, names, progress)
        if not photos:
            raise BadPhoto(f"none of the {counted(len(names), 'photo')} can be read. Add others as jpg or png files")
        return photos

    def reference(self, context: InvocationContext, progress: NodeProgress) -> Reference | None:
        """Return the person to compare pictures with; None without photos or face networks."""
        if not self.image_names(context):
            return None
        network = faces_if_installed(progress.warning)
        if network is None:
            return None
        photos = self.read_photos(context, progress)
        return Reference.on((photo.image(shorter_side=FACE_SIDE) for photo in photos), network)


@invocation_output("facelora_photo_report_output")
class PhotoReportOutput(BaseInvocationOutput):
    report: str = OutputField(description="The verdict on each photo, the reasons, and what to add.")
    sheet: ImageField = OutputField(description="The photos with their verdicts, best first.")
    # These are names, because the page treats every image of a result as a new one.
    photo_names: list[str] = OutputField(description="The photos that are not rejected, for Train Face LoRA.")


@invocation(
    "facelora_photo_report",
    title="Photo Report",
    tags=["facelora", "lora", "face", "photos"],
    category="FaceLoRA",
    version="1.0.0",
    use_cache=False,
)
class PhotoReportInvocation(PhotosInvocation, WithBoard):
    """Check photos of a person: which help, which don't, and what to add."""

    model: ModelIdentifierField | None = InputField(
        default=None,
        description="The base model to train on. It decides how large a face must be. Without it, 1024 pixels are assumed.",
        **MAIN_MODEL,
    )

    def invoke(self, context: InvocationContext) -> PhotoReportOutput:
        progress = NodeProgress(context)
        progress.show("checking the photos")
        photos, names = self.read_photos(context, progress), self.image_names(context)
        resolution = base_of(context, self.model).resolution if self.model else 1024
        network = faces_if_installed(progress.warning)
        report = check_photos(
            photos, network, Thresholds.for_resolution(resolution), on_progress=partial(progress.phase, "photos")
        )
        if network and not any(item.faces for item in report.photos):
            raise BadPhoto(
                f"none of the {counted(len(photos), 'photo')} shows a face. Add photos in which the face is visible"
            )
        good = {item.photo.name for item in report.usable}
        items = sorted(report.photos, key=lambda item: VERDICTS.index(item.verdict))
        images = [item.photo.image(shorter_side=TILE) for item in items]
        labels = [[item.verdict for item in items]]
        sheet = contact_sheet([(report.headline, images)], tile=TILE, labels=labels, columns=6)
        return PhotoReportOutput(
            report="\n".join([*progress.notes, format_report(report)]),
            sheet=ImageField(image_name=context.images.save(sheet).image_name),
            photo_names=[name for name in names if name in good],
        )
