"""`ImageSource`: what `load_images`, and so everything that takes images, reads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, Union

import numpy as np

from diffmem.data.image_set import ImageRecipe, ImageSet

if TYPE_CHECKING:
    import torch


class MapDataset(Protocol):
    """A data set that is read by index, as torch's are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


# A path or name; an array or tensor [N, C, H, W]; images with their names and labels, or how to make them; a torch
# dataset; images or batches one after the other.
ImageSource: TypeAlias = Union[
    str, "os.PathLike[str]", np.ndarray, "torch.Tensor", ImageSet, ImageRecipe, MapDataset, Iterable[Any]
]
