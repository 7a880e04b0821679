"""Aligned pixel search: which training image an image shows, whatever its brightness, contrast, position and size."""

from diffmem.features.aligned.matcher import AlignedMatcher, AlignedMatches
from diffmem.features.aligned.pairs import Alignments, align_pairs
from diffmem.features.aligned.second_look import align_candidates

__all__ = ["AlignedMatcher", "AlignedMatches", "Alignments", "align_candidates", "align_pairs"]
