"""What is compared: pixels, perceptual hashes, any network's features, and vectors that were computed elsewhere."""

from diffmem.features.builtin import Function
from diffmem.features.extraction import extract
from diffmem.features.feature_set import FeatureExtractor, FeatureSet, check_comparable
from diffmem.features.named import extractor
from diffmem.features.precomputed import load_features

__all__ = [
    "FeatureExtractor",
    "FeatureSet",
    "Function",
    "check_comparable",
    "extract",
    "extractor",
    "load_features",
]
