"""What an audit compares: what makes the features, or the vectors that came with the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffmem.data import ImageSet
from diffmem.errors import InputError
from diffmem.features import FeatureExtractor, FeatureSet, extractor, load_features

PRECOMPUTED, ALIGNED = "precomputed", "aligned"
SETS = ("generated", "training", "holdout")

Features = str | Callable[..., Any] | FeatureExtractor | Mapping[str, Any]


@dataclass(frozen=True)
class Compared:
    """The features of an audit.

    Attributes:
        name: "pixels", "aligned", "precomputed", or the extractor's name.
        metric: "euclidean", "cosine", "hamming" or "aligned"; None: not known before the vectors are read.
        maker: What makes vectors of images; None for pixels, aligned and given vectors.
        given: Vectors that came beside images, by set.
    """

    name: str
    metric: str | None
    maker: FeatureExtractor | None = None
    given: Mapping[str, FeatureSet] = field(default_factory=dict)

    @classmethod
    def of(cls, features: Features, device: str) -> Compared:
        """What `features`, as `diffmem.audit` takes it, means.

        Raises:
            InputError: Unknown features, weights that are not there, vectors that cannot be read.
        """
        if isinstance(features, str) and features in (PRECOMPUTED, ALIGNED):
            return cls(features, None if features == PRECOMPUTED else ALIGNED)
        if isinstance(features, Mapping):
            if unknown := set(features) - set(SETS):
                raise InputError(f"features: {', '.join(map(str, unknown))} is not one of the sets {', '.join(SETS)}")
            if "training" not in features:
                raise InputError("features: the vectors of the training images are missing: give 'training' too")
            given = {name: load_features(source) for name, source in features.items()}
            return cls(PRECOMPUTED, given["training"].metric, given=given)
        maker = extractor(features, device=device)
        if maker.name == "pixels":
            return cls("pixels", "euclidean")
        return cls(maker.name, maker.metric, maker)

    @property
    def vectors_only(self) -> bool:
        """Whether all sets are vectors, without images."""
        return self.name == PRECOMPUTED and not self.given

    @property
    def one_size(self) -> bool:
        """Whether all images must be of the training images' size."""
        return not self.given and not (self.maker is not None and self.maker.resizes)

    def beside(self, which: str, images: ImageSet, vectors: Any = None) -> FeatureSet | None:
        """The vectors given beside a set of images, or None where the features are made.

        Args:
            which: "generated", "training" or "holdout".
            images: The set.
            vectors: The vectors, where they were not given with the others.

        Raises:
            InputError: They are missing, not wanted, or not as many as the images.
        """
        if not self.given:
            if vectors is not None:
                raise InputError(
                    "vectors= needs a detector with precomputed features of the training images: remove it"
                )
            return None
        found = self.given.get(which) if vectors is None else load_features(vectors)
        if found is None:
            raise InputError(f"features: the vectors of the {which} images are missing: give '{which}' too")
        if len(found) != len(images):
            raise InputError(
                f"features: {len(found):,} vectors ({found.source}) for {len(images):,} {which} images "
                f"({images.source}): give one for each image, in their order"
            )
        return found
