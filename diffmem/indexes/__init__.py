"""Indexes of training sets that are larger than one machine's memory: a folder of shards that never change.

    OUT/
      index.json                      sealed: what the vectors are, the sources, the shards in their order, what was
                                      derived from all of them
      shards/ADDRESS/
        vectors.npy                   [rows, d] uint8 (pixels, bits), float16 or float32: to be memory-mapped
        digests.npy                   uint8 [rows, 16]: of each row's contents
        images.npy                    uint8 [rows, 16]: of the decoded pixels, where the rows are features of images
        places.npy                    int64 [rows, 2]: where images lie in their tar archive, and their bytes
        lengths.npy                   float64 [rows]: Euclidean lengths, of float16 compared by the cosine
        names.npy, name_ends.npy      UTF-8 of all names, one after the other; int64 [rows], where each ends
        skipped.json                  sealed: files that could not be used and were skipped, with reasons
        shard.json                    sealed: what it was made from and how, and the SHA-256 of each file
      quantizers/ID/                  `--index ivf…`: quantizer.faiss, quantizer.json, ADDRESS.npy (codes of a shard)
      codes/                          of the exact search over float vectors, made when it is first used
      duplicates.npz                  rows that are duplicates of others, across all shards
      sources.json                    SHA-256 of source files by path, size and time, so that none is read twice

ADDRESS is a hash of the contents that a shard was made from (the source file's SHA-256, or what an object store says of
it), which of its rows, and all that decides the vectors: features, network, reading. So a finished shard is never made
again, whoever needs it, and no shard is ever changed. Rows are numbered through the shards in the order of
`index.json`, which is that of the sources as they were given and of the files in each.
"""

from diffmem.indexes.build import add_to_index, build_index
from diffmem.indexes.duplicates import StoredDuplicates
from diffmem.indexes.folder import IndexFolder, Shard, open_index
from diffmem.indexes.verify import Verified, verify_index

__all__ = [
    "IndexFolder",
    "Shard",
    "StoredDuplicates",
    "Verified",
    "add_to_index",
    "build_index",
    "open_index",
    "verify_index",
]
