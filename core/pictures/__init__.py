"""Draw pictures with a base model and LoRAs: style packs, batches of headshots, groups, and the pages that show them."""

from typing import TYPE_CHECKING

from ..lazy_names import lazy_names

if TYPE_CHECKING:
    from .drawing_model import DrawingModel as DrawingModel
    from .drawing_model import with_speed_lora as with_speed_lora
    from .gallery import SAME_PERSON as SAME_PERSON
    from .generate import GenerateConfig as GenerateConfig
    from .generate import Job as Job
    from .generate import Picture as Picture
    from .generate import PictureJob as PictureJob
    from .group import Group as Group
    from .group import GroupMember as GroupMember
    from .group import Mask as Mask
    from .group import RelativeBox as RelativeBox
    from .group import generate_group as generate_group
    from .group import side_by_side as side_by_side
    from .group_batch import GroupReference as GroupReference
    from .group_batch import make_group_pictures as make_group_pictures
    from .group_batch import redraw_faces as redraw_faces
    from .headshot import FacePass as FacePass
    from .headshot import Headshot as Headshot
    from .headshot import redrawn_of as redrawn_of
    from .headshots import CONTACT_SHEET as CONTACT_SHEET
    from .headshots import OVERVIEW as OVERVIEW
    from .headshots import batch_summary as batch_summary
    from .headshots import make_headshots as make_headshots
    from .publication import Publication as Publication
    from .publication import publish as publish
    from .sampling import decode_latents as decode_latents
    from .sampling import encode_pictures as encode_pictures
    from .sampling import encode_prompts as encode_prompts
    from .sampling import sample_latents as sample_latents
    from .sheet import contact_sheet as contact_sheet
    from .style_pack import FoundPacks as FoundPacks
    from .style_pack import StyledPrompt as StyledPrompt
    from .style_pack import StylePack as StylePack
    from .style_pack import Subject as Subject
    from .style_pack import check_count as check_count
    from .style_pack import find_style_packs as find_style_packs
    from .style_pack import long_prompts as long_prompts
else:
    __getattr__, __dir__, __all__ = lazy_names(__name__, __file__)
