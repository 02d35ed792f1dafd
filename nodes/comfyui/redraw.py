"""The node Redraw Faces: the face pass on pictures that ComfyUI has drawn."""

# pyright: reportMissingImports=false

from comfy_api.latest import io
from PIL import Image

from nodes import VAEDecode, VAEEncode  # pyright: ignore  # those of ComfyUI

from ...core.faces import Reference
from ...core.pictures.headshot import FacePass, blend, cut_out, face_share
from .convert import FacePhotos, image_tensor, photos_of, pictures
from .folders import says_no_server_paths
from .sampler import first_step, sampled, settings_of_each


class RedrawFaces(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceLoRARedraw",
            display_name="Redraw Faces",
            category="FaceLoRA",
            description="Draws small faces again at a larger size. A new face is used if it is not less like the person.",
            search_aliases=["face detailer", "face pass", "adetailer", "restore faces", "inpaint face"],
            is_input_list=True,
            inputs=[
                io.Image.Input("images", tooltip="The drawn pictures. All lists below have one item for each of them."),
                io.MultiType.Input(
                    "reference", [FacePhotos, io.Image],
                    tooltip="Photos of the person, to measure likeness before and after.",
                ),
                io.Model.Input("model", tooltip="The model that has drawn the pictures, with the LoRA."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                io.Conditioning.Input("positive", tooltip="The prompt of each picture, from CLIP Text Encode."),
                io.Conditioning.Input("negative", tooltip="The negative prompt of each picture, from CLIP Text Encode."),
                *settings_of_each(),
                io.Float.Input(
                    "below", default=FacePass.below, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="Faces smaller than this share of the picture's side are drawn again.",
                ),
                io.Float.Input(
                    "denoise", default=FacePass.denoise, min=0.01, max=1.0, step=0.01, optional=True, advanced=True,
                    tooltip="The share of the sampling steps that are repeated. A larger share changes the face more.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="images", is_output_list=True, tooltip="The pictures in the same order, with new faces."
                )
            ],
        )  # fmt: skip

    @classmethod
    @says_no_server_paths
    def execute(
        cls, images, reference, model, vae, positive, negative, seed, steps, cfg, sampler_name, scheduler,
        below=(FacePass.below,), denoise=(FacePass.denoise,),
    ) -> io.NodeOutput:  # fmt: skip
        person = Reference.on(photo.image(shorter_side=640) for photo in photos_of(reference))
        lists = (model, vae, seed, steps, cfg, sampler_name, scheduler, positive, negative)
        drawn = [image for batch in images for image in pictures(batch)]
        face_pass, redrawn = FacePass(below[0], denoise[0]), []
        for index, picture in enumerate(drawn):
            given = (one[min(index, len(one) - 1)] for one in lists)
            redrawn.append(image_tensor(_redrawn(picture, person, face_pass, *given)))
        return io.NodeOutput(redrawn)


def _redrawn(
    picture: Image.Image, person: Reference, face_pass: FacePass, model, vae, seed, steps, *given
) -> Image.Image:
    """Return the picture with a new face if its largest is small and likeness doesn't fall; else the picture."""
    (before, face), *_ = person.compare([picture])
    side = round((picture.width * picture.height) ** 0.5)
    if face is None or before is None or not face_pass.wants(face, side):
        return picture
    # Transformers take squares of two latents a side.
    part = cut_out(picture, face, face_share(person), side, 2 * vae.spacial_compression_encode())
    if part is None:
        return picture
    (latent,) = VAEEncode().encode(vae, image_tensor(part.image))
    drawn = sampled(model, seed, steps, *given, latent, first=first_step(steps, face_pass.denoise))
    (decoded,) = VAEDecode().decode(vae, drawn)
    changed = blend(picture, part, next(pictures(decoded)))
    after, *_ = person.likeness([changed])
    return changed if after is not None and after >= before else picture
