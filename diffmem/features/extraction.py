"""Vectors of whole image sets, kept beside their source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffmem.data import ImageSet, load_images
from diffmem.data.storage import allocate
from diffmem.data.value_range import extremes
from diffmem.errors import InputError
from diffmem.features.builtin import PerceptualHash, Pixels
from diffmem.features.feature_set import FeatureExtractor, FeatureSet
from diffmem.features.named import extractor
from diffmem.features.precomputed import read_own
from diffmem.logs import logger
from diffmem.progress import Progress, silent

_log = logger(__name__)
_NO_FILE = ("array", "tensor")  # sources of images that were made in memory


def extract(
    source: Any,
    features: str | Callable[..., Any] | FeatureExtractor = "pixels",
    *,
    cache: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> FeatureSet:
    """The vectors of images.

    Identical images get identical vectors: each different image is put to the network once.

    Args:
        source: The images: anything that `diffmem.load_images` reads; uint8 for all features but pixels.
        features: What makes the vectors, as for `extractor`.
        cache: Whether the vectors of networks are kept beside the source, as `SOURCE.diffmem-features-….safetensors`,
            and read from there where images and network are the same. Where they cannot be kept, a note says so.
        progress: A callback (`diffmem.progress`), or None.
        **options: As for `extractor`.

    Raises:
        InputError: As `load_images` and `extractor` do; images of another dtype; a function that does not return one
            vector per image, or NaN.

    Example:
        >>> import diffmem
        >>> digits = diffmem.load_images("builtin:digits")
        >>> extract(digits, "hash").vectors.shape, extract(digits).vectors.dtype
        ((1797, 64), dtype('uint8'))
    """
    progress = progress or silent
    images = load_images(source, progress=progress)
    maker = extractor(features, **options)
    about: dict[str, Any] = {"names": images.names, "source": images.source, "features": maker.name}
    if isinstance(maker, Pixels):
        return FeatureSet(images.images.reshape(len(images), -1), maker.metric, _pixels(images), **about)
    if images.images.dtype != np.uint8:
        low, high = extremes(images.images)
        raise InputError(
            f"{images.source}: {maker.name} features are made of gray levels (uint8), these are {images.images.dtype}, "
            f"{low:.4g} to {high:.4g}: give the values of black and white with value_range=(-1, 1) or (0, 1)"
        )
    target, key = _place(images, maker), {}
    if cache and target is not None:
        key = {"images": images.pixel_fingerprint, "features": maker.fingerprint, "metric": maker.metric}
        kept = _kept(target, key)
        if kept is not None:
            return replace(kept, names=images.names, source=images.source)
        if target.exists():
            _log.info("%s: features of other images, or damaged: computed again", target)
    made = FeatureSet(_vectors(images, maker, progress), maker.metric, maker.fingerprint, **about)
    if cache and target is not None:
        try:
            if not target.parent.stat().st_mode & 0o222:  # root could write there, against the owner's will
                raise InputError(f"{target.parent} is marked read-only")
            made._write(target, key)
        except InputError as error:
            note = f"the {maker.name} features were not cached: {error}"
            _log.info("%s: %s", images.source, note)
            made = replace(made, notes=(*made.notes, note))
    return made


def _pixels(images: ImageSet) -> str:
    return f"pixels {'x'.join(map(str, images.image_shape))}"


def _vectors(images: ImageSet, maker: FeatureExtractor, progress: Progress) -> np.ndarray:
    """[N, d], each different image put to `maker` once."""
    stage = f"computing {maker.name} features"
    first: dict[bytes, int] = {}
    of = np.empty(len(images), np.int64)
    for row in range(len(images)):
        key = hashlib.sha256(np.ascontiguousarray(images.images[row]).data).digest()
        of[row] = first.setdefault(key, row)
    leaders = np.flatnonzero(of == np.arange(len(images)))
    vectors: np.ndarray | None = None
    for start in range(0, len(leaders), maker.batch):
        progress(stage, start, len(leaders))
        rows = leaders[start : start + maker.batch]
        made = maker(images.images[rows])
        if vectors is None:
            vectors = allocate((len(images), made.shape[1]), made.dtype)
        elif made.shape[1] != vectors.shape[1]:
            raise InputError(
                f"features {maker.name}: vectors of {made.shape[1]} values after vectors of {vectors.shape[1]}: the "
                "length must be the same for every image"
            )
        vectors[rows] = made
    progress(stage, len(leaders), len(leaders))
    copies = np.flatnonzero(of != np.arange(len(images)))
    assert vectors is not None  # there is an image
    vectors[copies] = vectors[of[copies]]
    return vectors


def _place(images: ImageSet, maker: FeatureExtractor) -> Path | None:
    """Where the vectors are kept, or None where they are cheap, or their maker or their source has no name."""
    if maker.fingerprint is None or isinstance(maker, Pixels | PerceptualHash) or images.source in _NO_FILE:
        return None
    path = Path(images.source)
    if not path.exists():  # built-in sets, iterables
        return None
    digest = hashlib.sha256(f"{maker.fingerprint} {maker.metric}".encode()).hexdigest()[:12]
    return path.resolve().parent / f"{path.resolve().name}.diffmem-features-{digest}.safetensors"


def _kept(target: Path, key: dict[str, Any]) -> FeatureSet | None:
    """The vectors in `target`, or None where they are absent, damaged, or of other images."""
    if not target.is_file():
        return None
    try:
        kept, theirs = read_own(target)
    except InputError:
        return None
    return kept if theirs == key else None
