"""Aligned pixel search: which training image an image shows, whatever its brightness, contrast, position and size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffmem.features.aligned.pairs import Alignments, align_pairs
from diffmem.features.aligned.second_look import align_candidates

if TYPE_CHECKING:
    from diffmem.features.aligned.matcher import AlignedMatcher, AlignedMatches

__all__ = ["AlignedMatcher", "AlignedMatches", "Alignments", "align_candidates", "align_pairs"]


def __getattr__(name: str) -> Any:
    """The matcher, when it is first asked for: it imports PyTorch."""
    if name not in ("AlignedMatcher", "AlignedMatches"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from diffmem.features.aligned import matcher

    return getattr(matcher, name)
