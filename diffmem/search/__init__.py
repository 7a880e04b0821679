"""Which training images are nearest: exact search, and groups of duplicates."""

from diffmem.search.distinct import DistinctNeighbors
from diffmem.search.duplicates import DuplicateGroups, find_duplicates
from diffmem.search.index import TrainingIndex
from diffmem.search.neighbors import Neighbors

__all__ = ["DistinctNeighbors", "DuplicateGroups", "Neighbors", "TrainingIndex", "find_duplicates"]
