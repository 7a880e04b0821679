"""Image sources: reading them, deriving training sets from them, writing them."""

from diffmem.data.image_set import ImageSet, SkippedFile
from diffmem.data.load import load_images
from diffmem.data.write import write_edm_zip, write_folder, write_images, write_npz

__all__ = ["ImageSet", "SkippedFile", "load_images", "write_edm_zip", "write_folder", "write_images", "write_npz"]
