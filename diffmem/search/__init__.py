"""Which training images are nearest: exact search, search through FAISS, shards, groups of duplicates."""

from diffmem.search.distinct import DistinctNeighbors, SearchIndex, Views
from diffmem.search.duplicates import DuplicateGroups, check_index, find_duplicates
from diffmem.search.faiss_index import FaissIndex, FaissStats, faiss_factory
from diffmem.search.index import QueryStats, TrainingIndex
from diffmem.search.neighbors import Neighbors
from diffmem.search.sharded import ShardedIndex
from diffmem.search.vectors import VectorIndex

__all__ = [
    "DistinctNeighbors",
    "DuplicateGroups",
    "FaissIndex",
    "FaissStats",
    "Neighbors",
    "QueryStats",
    "SearchIndex",
    "ShardedIndex",
    "TrainingIndex",
    "VectorIndex",
    "Views",
    "check_index",
    "faiss_factory",
    "find_duplicates",
]
