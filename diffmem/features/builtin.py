"""Features that need no network: the pixels themselves, perceptual hashes, and any function."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from diffmem.data.arrays import to_numpy
from diffmem.errors import InputError
from diffmem.features.feature_set import Metric
from diffmem.lazy import torch

HASH_SIDE, HASH_FACTOR = 8, 4  # as imagehash.phash has them


class Pixels:
    """The gray levels as they are: squared distances are exact integers."""

    name = fingerprint = "pixels"
    metric: Metric = "euclidean"
    batch, resizes = 4096, False

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return images.reshape(len(images), -1)


class PerceptualHash:
    """64 bits that survive compression and resizing: which of the 8 × 8 lowest frequencies of the gray image, brought
    to 32 × 32, lie above their median; the bits of `imagehash.phash` (Krawetz 2011). Compared by the number of bits
    that differ."""

    name, fingerprint = "hash", "phash 8x8 of 32x32"
    metric: Metric = "hamming"
    batch, resizes = 4096, True

    def __call__(self, images: np.ndarray) -> np.ndarray:
        from PIL import Image
        from scipy.fft import dct

        side = HASH_SIDE * HASH_FACTOR
        reduced = np.empty((len(images), side, side))
        for row, image in enumerate(images):
            if image.shape[0] not in (1, 3, 4):
                raise InputError(f"features='hash' hashes gray and color images, not {image.shape[0]} channels")
            pixels = image[0] if image.shape[0] == 1 else np.moveaxis(image[:3], 0, -1)
            picture = Image.fromarray(np.ascontiguousarray(pixels)).convert("L")
            reduced[row] = np.asarray(picture.resize((side, side), Image.Resampling.LANCZOS))
        low = dct(dct(reduced, axis=1), axis=2)[:, :HASH_SIDE, :HASH_SIDE]
        return (low > np.median(low, axis=(1, 2), keepdims=True)).reshape(len(images), -1).astype(np.uint8)


class Function:
    """The vectors that a function of the caller's makes.

    Args:
        function: Takes uint8 images [B, C, H, W] as a torch tensor on `device` (floats, where `prepare` makes such of
            them) and returns one vector or array of numbers for each, as a tensor or array [B, …].
        name: Name of the features; default the function's.
        metric: How two vectors are compared.
        batch: Images per call.
        device: Where the images are handed over.
        prepare: What is done to a batch first, or None.
        fingerprint: See `FeatureExtractor`.
        resizes: See `FeatureExtractor`.
    """

    def __init__(
        self,
        function: Callable[[torch.Tensor], Any],
        *,
        name: str | None = None,
        metric: Metric = "cosine",
        batch: int = 64,
        device: torch.device | str = "cpu",
        prepare: Callable[[torch.Tensor], torch.Tensor] | None = None,
        fingerprint: str | None = None,
        resizes: bool = False,
    ):
        self.function, self.metric, self.batch = function, metric, batch
        self.name: str = name or str(getattr(function, "__name__", type(function).__name__))
        self.device, self.prepare = torch.device(device), prepare
        self.fingerprint, self.resizes = fingerprint, resizes

    def __call__(self, images: np.ndarray) -> np.ndarray:
        with warnings.catch_warnings():  # a memory map that must not be written to is only read here
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            batch = torch.from_numpy(np.ascontiguousarray(images)).to(self.device)
        if self.prepare is not None:
            batch = self.prepare(batch)
        with torch.inference_mode(), _evaluating(self.function):
            try:
                answer = self.function(batch)
            except (RuntimeError, ValueError, TypeError) as error:
                hint = ""
                if self.prepare is None and isinstance(self.function, torch.nn.Module):
                    hint = "; a network needs floats: choose them with preprocessing='imagenet' or another preset"
                raise InputError(
                    f"features {self.name}: failed on a batch {batch.dtype} {list(batch.shape)}: "
                    f"{str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}{hint}"
                ) from error
        vectors = to_numpy(answer, f"features {self.name}")
        if vectors.ndim < 1 or len(vectors) != len(images) or vectors.dtype.kind not in "uifb":
            raise InputError(
                f"features {self.name}: for {len(images)} images it returned {type(answer).__name__} of shape "
                f"{vectors.shape} and dtype {vectors.dtype}, not one vector of numbers per image"
            )
        vectors = vectors.reshape(len(images), -1)
        return vectors.astype(np.uint8 if self.metric == "hamming" else np.float32)


@contextmanager
def _evaluating(function: Any) -> Iterator[None]:
    """A module in training mode answers for evaluation while this lasts: no dropout, no batch statistics."""
    parts = [part for part in function.modules() if part.training] if isinstance(function, torch.nn.Module) else []
    for part in parts:
        part.training = False
    try:
        yield
    finally:
        for part in parts:
            part.training = True
