"""Aligned pixel search: which training image an image shows, whatever its brightness, contrast, position and size."""

from diffmem.features.aligned.matcher import AlignedMatcher, AlignedMatches
from diffmem.features.aligned.pairs import Alignments, align_pairs

__all__ = ["AlignedMatcher", "AlignedMatches", "Alignments", "align_pairs"]
