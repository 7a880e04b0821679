"""Images as rows: what the search sees of an image set, an array or a tensor."""

from __future__ import annotations

import hashlib
import math
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.lazy import torch
from diffmem.ops.nearest import dtype_name

if TYPE_CHECKING:
    Images = ImageSet | np.ndarray | torch.Tensor
else:
    Images = Any


def as_rows(images: Images, what: str = "images") -> torch.Tensor:
    """The images as [N, d] rows, uint8, float32 or float64, sharing memory with the input where its layout allows."""
    if isinstance(images, ImageSet):
        images = images.images
    if isinstance(images, np.ndarray):
        if any(stride < 0 for stride in images.strides):  # a mirrored view; torch has no negative strides
            images = images.copy()
        with warnings.catch_warnings():  # a read-only memory map is only read here
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            images = torch.from_numpy(images)
    if not isinstance(images, torch.Tensor):
        raise InputError(f"{what} must be an ImageSet, an array or a tensor, got {type(images).__name__}")
    if images.ndim < 2:
        raise InputError(
            f"{what} must have an axis for the images and at least one more, got shape {tuple(images.shape)}"
        )
    if images.dtype not in (torch.uint8, torch.float32, torch.float64):
        raise InputError(f"{what} must be uint8, float32 or float64, got {images.dtype}")
    return images.flatten(1)


def byte_rows(images: Images) -> np.ndarray | None:
    """Images of bytes in an array, or an ImageSet, as rows [N, d] whose values are adjacent; None for others. Sharing
    memory with the input where its layout allows, and without PyTorch."""
    array = images.images if isinstance(images, ImageSet) else images
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim < 2:
        return None
    rows = np.asarray(array).reshape(len(array), math.prod(array.shape[1:]))
    return rows if rows.strides[1] == 1 and rows.strides[0] >= 0 else np.ascontiguousarray(rows)


def fingerprint(rows: np.ndarray | torch.Tensor) -> str:
    """SHA-256 over shape, dtype and values: equal for equal rows, wherever they lie; `ImageSet.pixel_fingerprint`."""
    digest = hashlib.sha256(repr((tuple(rows.shape), f"torch.{dtype_name(rows)}")).encode())
    for start in range(0, len(rows), 4096):
        block = rows[start : start + 4096]
        digest.update(np.ascontiguousarray(block if isinstance(block, np.ndarray) else block.cpu().numpy()).data)
    return digest.hexdigest()


def same_images(images: Images, rows: torch.Tensor, rows_fingerprint: str) -> bool:
    """Whether `images` have the shape, dtype and values of `rows` [N, d], which have this fingerprint."""
    theirs = as_rows(images)
    if (theirs.shape, theirs.dtype) != (rows.shape, rows.dtype):
        return False
    return rows_fingerprint == (images.pixel_fingerprint if isinstance(images, ImageSet) else fingerprint(theirs))


def check_finite(rows: Any, what: str) -> None:
    """Raises InputError where float rows [N, d] hold values that are not finite, or too large to be squared."""
    if dtype_name(rows) == "uint8":
        return
    for block in rows.split(max(1, (1 << 24) // rows.shape[1])):
        if not bool(torch.isfinite(block.double().square().sum())):
            raise InputError(f"{what} hold NaN, infinity, or values too large to be squared: clean or rescale them")


def mirror(images: np.ndarray) -> np.ndarray:
    """The images [N, C, H, W] mirrored left to right."""
    return np.ascontiguousarray(images[..., ::-1])
