"""Image sources: reading them, deriving training sets from them, writing them."""

from diffmem.data.dataset_spec import DatasetSpec, read_data
from diffmem.data.image_set import ImageRecipe, ImageSet, SkippedFile
from diffmem.data.image_source import ImageSource
from diffmem.data.load import load_images
from diffmem.data.subsets import (
    DerivedSet,
    Mix,
    at_resolution,
    class_balanced,
    derive,
    first_classes,
    mixed,
    one_class,
    random_labels,
    unique_labels,
    without_labels,
)
from diffmem.data.write import write_edm_zip, write_folder, write_images, write_npz

__all__ = [
    "DatasetSpec",
    "DerivedSet",
    "ImageRecipe",
    "ImageSet",
    "ImageSource",
    "Mix",
    "SkippedFile",
    "at_resolution",
    "class_balanced",
    "derive",
    "first_classes",
    "load_images",
    "mixed",
    "one_class",
    "random_labels",
    "read_data",
    "unique_labels",
    "without_labels",
    "write_edm_zip",
    "write_folder",
    "write_images",
    "write_npz",
]
