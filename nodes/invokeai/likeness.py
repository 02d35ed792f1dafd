"""The node Likeness, which sorts pictures by their likeness to a person."""

# pyright: reportMissingImports=false, reportIncompatibleMethodOverride=false

from invokeai.invocation_api import (
    BaseInvocationOutput,
    ImageField,
    InputField,
    InvocationContext,
    OutputField,
    invocation,
    invocation_output,
)

from ...core.errors import BadPhoto
from ...core.faces import Reference
from .photos import FACE_SIDE, PhotosInvocation
from .progress import NodeProgress


@invocation_output("facelora_likeness_output")
class LikenessOutput(BaseInvocationOutput):
    pictures: list[ImageField] = OutputField(description="The pictures, highest likeness first.")
    best: ImageField = OutputField(description="The picture with the highest likeness.")
    likenesses: list[float] = OutputField(
        description="The likeness of each picture. 0.55 or more is usually the same person, below 0.40 usually someone "
        "else. -1 means that no face was found."
    )


@invocation(
    "facelora_likeness",
    title="Likeness",
    tags=["facelora", "face", "likeness", "rank"],
    category="FaceLoRA",
    version="1.0.0",
    use_cache=False,
)
class LikenessInvocation(PhotosInvocation):
    """Sort pictures by how much their faces look like the person in the photos."""

    pictures: list[ImageField] = InputField(description="The pictures to compare with the photos.")

    def invoke(self, context: InvocationContext) -> LikenessOutput:
        if not self.pictures:
            raise BadPhoto("no pictures: add pictures to compare with the photos")
        progress = NodeProgress(context)
        photos = self.read_photos(context, progress)
        person = Reference.on(photo.image(shorter_side=FACE_SIDE) for photo in photos)
        scores = []
        for done, picture in enumerate(self.pictures):
            progress.phase("pictures", done, len(self.pictures))
            (score,) = person.likeness([context.images.get_pil(picture.image_name, "RGB")])
            scores.append(-1.0 if score is None else score)
        ranked = sorted(zip(scores, self.pictures, strict=True), key=lambda pair: -pair[0])
        return LikenessOutput(
            pictures=[picture for _, picture in ranked],
            best=ranked[0][1],
            likenesses=[score for score, _ in ranked],
        )
