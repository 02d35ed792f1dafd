"""The nodes Likeness Score and Contact Sheet."""

# pyright: reportMissingImports=false

from collections.abc import Sequence

from comfy_api.latest import io

from ...core.errors import BadPhoto, MissingPackage
from ...core.faces import Reference
from ...core.pictures.gallery import SAME_PERSON, SOMEONE_ELSE
from ...core.pictures.sheet import contact_sheet
from ...core.progress import counting
from .app.state import app
from .convert import FacePhotos, image_tensor, moving_bar, photos_of, picture_key, pictures
from .folders import says_no_server_paths
from .plot import score_plot
from .save import preview


class LikenessScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRALikeness",
            display_name="Likeness Score",
            category="FaceLoRA",
            description="Measures how much the faces in pictures look like the person in the reference photos, with a "
            "face-recognition network. It sorts the pictures by likeness.",
            search_aliases=["face similarity", "face score", "rank images"],
            is_input_list=True,
            is_output_node=True,
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Image.Input("images", tooltip="The pictures to measure."),
                io.MultiType.Input(
                    "reference",
                    [FacePhotos, io.Image],
                    tooltip="Photos of the person. Photos that were not used for training give the fairest result.",
                ),
                io.Boolean.Input(
                    "required", default=True, optional=True, advanced=True,
                    tooltip="On (default): the node stops with an error if the face networks are missing or the "
                    "reference shows no face. Off: it passes the pictures on unsorted instead.",
                ),
                io.String.Input(
                    "labels", optional=True, force_input=True,
                    tooltip="One label for each picture, in the same order, to show beside its likeness. With fewer "
                    "labels, each is for an equal share of the pictures.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", is_output_list=True, tooltip="The pictures, highest likeness first."),
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="The likeness of each picture, in the same order. 0.55 or more is usually the same person, "
                    "below 0.40 usually someone else. -1 means that no face was found.",
                ),
                io.Image.Output(
                    display_name="sheet",
                    tooltip="The pictures in this order with their likeness, as one image.",
                ),
                io.Image.Output(
                    display_name="plot",
                    tooltip="A chart of the likeness of each picture, with lines at 0.55 and 0.40.",
                ),
                io.String.Output(
                    display_name="labels", is_output_list=True,
                    tooltip="The likeness and the label of each picture, in the same order.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    @says_no_server_paths
    def execute(cls, images, reference, required=(True,), labels=()) -> io.NodeOutput:
        judged, title = [image for batch in images for image in pictures(batch)], "likeness"
        try:
            person = Reference.on([photo.image(shorter_side=640) for photo in photos_of(reference)])
            likenesses = person.likeness(counting(judged, moving_bar()))
        except (MissingPackage, BadPhoto) as problem:
            if required[0]:
                raise
            likenesses, title = [None] * len(judged), f"not compared: {problem}"
        scores = [-1.0 if score is None else score for score in likenesses]
        order = sorted(range(len(scores)), key=lambda index: -scores[index])
        app().rank(cls.hidden.unique_id, [(index, scores[index]) for index in order])
        for image, likeness in zip(judged, likenesses, strict=True):
            app().likenesses[picture_key(image)] = likeness
        words, given = [f"{score:.2f}" if score > -1 else "no face" for score in scores], _labels(labels, len(judged))
        texts = [", ".join(filter(None, (words[index], given[index]))) for index in order]
        sheet = contact_sheet([(title, [judged[index] for index in order])], tile=256, labels=[texts])
        return io.NodeOutput(
            [image_tensor(judged[index]) for index in order],
            [scores[index] for index in order],
            image_tensor(sheet),
            image_tensor(score_plot([scores[index] for index in order], limits=(SAME_PERSON, SOMEONE_ELSE))),
            texts,
            ui=preview(sheet),
        )


class ContactSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRAContactSheet",
            display_name="Contact Sheet",
            category="FaceLoRA",
            description="Arranges pictures on one sheet, with a label below each.",
            search_aliases=["grid", "image grid", "collage"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input("images", tooltip="The pictures to arrange. They can have different sizes."),
                io.Int.Input("columns", default=4, min=1, max=50, tooltip="Number of pictures per row."),
                io.Int.Input(
                    "height", default=256, min=32, max=2048, tooltip="Height of each picture on the sheet, in pixels."
                ),
                io.String.Input("title", default="", tooltip="Optional title above the sheet."),
                io.String.Input(
                    "labels", optional=True, force_input=True,
                    tooltip="One label for each picture, in the same order. With fewer labels, each is for an equal "
                    "share of the pictures.",
                ),
            ],
            outputs=[io.Image.Output(display_name="sheet", tooltip="The sheet as one image.")],
        )  # fmt: skip

    @classmethod
    @says_no_server_paths
    def execute(cls, images, columns, height, title, labels=None) -> io.NodeOutput:
        shown = [image for batch in images for image in pictures(batch)]
        texts = _labels(labels or (), len(shown))
        rows = [("", shown[start : start + columns[0]]) for start in range(0, len(shown), columns[0])]
        split = [texts[start : start + columns[0]] for start in range(0, len(shown), columns[0])]
        sheet = contact_sheet(rows, tile=height[0], labels=split if labels else None, title=title[0])
        return io.NodeOutput(image_tensor(sheet), ui=preview(sheet))


def _labels(given: Sequence[object], count: int) -> list[str]:
    """Return a label for each of `count` pictures, "" without any. Fewer labels are for an equal share of the pictures each."""
    return [str(given[index * min(len(given), count) // count]) if given else "" for index in range(count)]
