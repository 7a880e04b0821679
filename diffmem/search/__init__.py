"""Which training images are nearest: exact search, and groups of duplicates."""

from diffmem.search.duplicates import DuplicateGroups, find_duplicates
from diffmem.search.index import QueryStats, TrainingIndex
from diffmem.search.neighbors import Neighbors

__all__ = ["DuplicateGroups", "Neighbors", "QueryStats", "TrainingIndex", "find_duplicates"]
