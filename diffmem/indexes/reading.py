"""What decides the rows of a shard: which features, how images are read. Both are JSON, so that workers get them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from diffmem.data.decode import PixelOptions
from diffmem.errors import InputError
from diffmem.features import FeatureExtractor, extractor
from diffmem.features.feature_set import Metric

PRECOMPUTED = "precomputed"
STORED = ("float16", "float32")


@dataclass(frozen=True)
class Reading:
    """How images are read; see `diffmem.load_images`, whose parameters these are."""

    key: str | None = None
    layout: str | None = None
    value_range: tuple[float, float] | None = None
    resize: tuple[int, int] | None = None
    center_crop: bool = False
    color: str | None = None
    alpha: str | None = None
    skip_bad: bool = False

    @property
    def pixels(self) -> PixelOptions:
        return PixelOptions("grey" if self.color == "gray" else self.color, self.resize, self.center_crop, self.alpha)

    def to_json(self) -> dict[str, Any]:
        """Without what has its default."""
        default = Reading()
        return {name: value for name, value in asdict(self).items() if value != getattr(default, name)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Reading:
        pairs: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**pairs)


@dataclass(frozen=True)
class Features:
    """What the rows are.

    Attributes:
        name: As for `diffmem.features.extractor`, or "precomputed".
        metric: How two rows are compared; None: as the vectors or the features have it.
        options: Of the extractor: weights, preprocessing, batch, precision.
        dtype: In which floats are stored, "float16" or "float32"; None: as they are.
        fingerprint: What made the vectors, or None where it is unknown.
    """

    name: str = "pixels"
    metric: Metric | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    fingerprint: str | None = None

    @property
    def precomputed(self) -> bool:
        return self.name == PRECOMPUTED

    def extractor(self, device: str = "auto") -> FeatureExtractor:
        """What makes the vectors of images; made once per process."""
        return _extractor(self.name, self.metric, tuple(sorted(self.options.items())), device)

    def stored(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors in the dtype in which they are stored."""
        if vectors.dtype == np.uint8:
            return vectors
        wanted = np.dtype(self.dtype or ("float16" if vectors.dtype == np.float16 else "float32"))
        with np.errstate(over="ignore"):
            return vectors.astype(wanted, copy=False)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "options": dict(self.options)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Features:
        return cls(**values)

    def decides(self) -> dict[str, Any]:
        """What of it decides the rows."""
        kind = self.name.partition(":")[0]  # of a network, whose fingerprint says which
        about = {"features": kind, "fingerprint": self.fingerprint, "metric": self.metric, "dtype": self.dtype}
        return {**about, "batch": self.options.get("batch")}


@lru_cache(maxsize=2)
def _extractor(name: str, metric: Metric | None, options: tuple[tuple[str, Any], ...], device: str) -> FeatureExtractor:
    given = dict(options)
    if name not in ("pixels", "hash"):
        given |= {"device": device, "metric": metric}
    return extractor(name, **given)


def features_of(name: Any, metric: Metric | None, dtype: str | None, device: str, **options: Any) -> Features:
    """The features that are asked for, with the fingerprint of their network.

    Raises:
        InputError: They have no name that a worker could make them by, or have no fingerprint.
    """
    if not isinstance(name, str):
        raise InputError(
            "features must be a name for an index (pixels, hash, sscd, timm:NAME, torchscript:PATH, …, or "
            "precomputed), "
            "by which every worker can make them: save the network as TorchScript or ONNX, or index its vectors with "
            "features='precomputed'"
        )
    if name == "aligned":
        raise InputError(
            "features='aligned' compares pixels: build the index with features='pixels', which such an audit searches"
        )
    if dtype not in (None, *STORED):
        raise InputError(f"dtype must be float16 or float32, got {dtype!r}")
    given = {key: value for key, value in options.items() if value is not None}
    # Workers stand in other folders.
    kind, colon, path = name.partition(":")
    if kind in ("torchscript", "onnx") and path:
        name = f"{kind}{colon}{os.path.abspath(os.path.expanduser(path))}"
    if "weights" in given:
        given["weights"] = os.path.abspath(os.path.expanduser(str(given["weights"])))
    if name == PRECOMPUTED:
        if wrong := given.keys() - {"batch"}:
            raise InputError(f"features='precomputed': does not take {min(wrong)}=…: remove it")
        return Features(name, metric, {}, dtype)
    if name in ("pixels", "hash") and metric is not None:
        raise InputError(f"features={name!r}: does not take metric=…: remove it")
    if name in ("pixels", "hash") and dtype is not None:
        raise InputError(f"features={name!r}: are stored as bytes: remove dtype=…")
    asked = Features(name, metric, given, dtype)
    made = asked.extractor(device)
    if made.fingerprint is None:
        raise InputError(f"features={name!r}: what makes them cannot be told apart from other networks")
    return Features(name, made.metric, given, dtype, made.fingerprint)
