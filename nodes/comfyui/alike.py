"""The node Choose Alike, which passes on the drawn pictures that show the person on real photos."""

# pyright: reportMissingImports=false

from comfy_api.latest import io

from ...core.errors import counted
from ...core.faces import load_faces, second_network
from ...core.photos import Candidate, Photo, check_real, choose_alike
from ...core.pictures.sheet import contact_sheet
from .convert import FacePhotos, image_tensor, moving_bar, photos_of, pictures
from .folders import says_no_server_paths
from .save import preview

COLUMNS = 6
"""How many pictures are in a row of the sheet."""


class ChooseAlike(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRAChooseAlike",
            display_name="Choose Alike",
            category="FaceLoRA",
            description="Compares drawn pictures with real photos of a person, and passes on the ones that show this person. "
            "They differ in view and light, and none nearly repeats another. The report has a reason for each one left out.",
            search_aliases=["filter faces", "select pictures", "one photo dataset", "same person"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Image.Input(
                    "images", lazy=True, tooltip="Pictures that a model has drawn of the person, such as edits of a photo."
                ),
                io.MultiType.Input(
                    "photos", [FacePhotos, io.Image],
                    tooltip="Real photos of the person, at least one. Nobody else may be as prominent on them.",
                ),
                io.Int.Input(
                    "count", default=12, min=0, max=1000,
                    tooltip="How many pictures to pass on. The ones that differ most from the photos and from each other are "
                    "chosen. 0 passes on all that show the person.",
                ),
                io.Boolean.Input(
                    "required", default=True, optional=True, advanced=True,
                    tooltip="On (default): the node stops with an error if no picture shows the person. Off: it then passes on "
                    "none, and training uses only the photos.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", is_output_list=True,
                    tooltip="The chosen pictures, for drawn_photos of Train Face LoRA.",
                ),
                io.String.Output(
                    display_name="report", tooltip="The likeness of each picture, and why it was left out."
                ),
                io.Image.Output(
                    display_name="sheet", tooltip="The chosen pictures and the others with their likeness, as one image."
                ),
            ],
        )  # fmt: skip

    @classmethod
    @says_no_server_paths
    def check_lazy_status(cls, images=None, photos=(), **_) -> list[str]:
        """Check the photos before the pictures are drawn, which takes minutes."""
        if images is None or images[0] is None:
            check_real(photos_of(photos), load_faces(), moving_bar())
        return ["images"]

    @classmethod
    @says_no_server_paths
    def execute(cls, images, photos, count=(12,), required=(True,)) -> io.NodeOutput:
        given = [image for batch in images for image in pictures(batch)]
        drawn = [Photo.from_image(image, f"picture {number}") for number, image in enumerate(given, start=1)]
        network = load_faces()
        second = second_network(network)
        candidates = choose_alike(
            drawn, photos_of(photos), network, second, count=count[0], required=required[0], on_progress=moving_bar()
        )
        chosen, others = ([one for one in candidates if bool(one.reason) == left] for left in (False, True))
        by = f"{network.name} and {second.name}" if second else network.name
        title = f"{counted(len(chosen), 'picture')} of {len(candidates)} chosen by {by}"
        rows = [(name, row) for name, row in (("chosen", chosen), ("left out", others)) if row]
        sheet = contact_sheet(
            [(name, [one.report.photo.image(shorter_side=256) for one in row]) for name, row in rows],
            tile=256, labels=[[_label(one) for one in row] for _, row in rows], title=title, columns=COLUMNS,
        )  # fmt: skip
        return io.NodeOutput(
            [image_tensor(one.report.photo.image()) for one in chosen],
            "\n".join([title, *map(str, candidates)]),
            image_tensor(sheet),
            ui=preview(sheet),
        )


def _label(one: Candidate) -> str:
    """Return the picture's number, its likeness, and the reason in a word or two."""
    alike = "" if one.report.likeness is None else f" {one.report.likeness:.2f}"
    return f"{one.report.photo.name.removeprefix('picture ')}:{alike} {one.cause}".rstrip()
