"""The nodes that this pack adds to InvokeAI, which registers each when its module is imported."""

from . import headshots, likeness, photos, style_pack, train

__all__ = ["headshots", "likeness", "photos", "style_pack", "train"]
