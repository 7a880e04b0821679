"""Image sources: reading them, deriving training sets from them, writing them."""

from diffmem.data.image_set import ImageSet, SkippedFile

__all__ = ["ImageSet", "SkippedFile"]
