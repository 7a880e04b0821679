"""`TrainingIndex`: a training set made ready to be searched."""

from __future__ import annotations

import torch

from diffmem.errors import InputError
from diffmem.ops.nearest import nearest
from diffmem.progress import Progress, silent
from diffmem.search.neighbors import Neighbors
from diffmem.search.rows import Images, as_rows

QUERY_BLOCK = 2048


class TrainingIndex:
    """The training images, searchable for the exact nearest of any query images.

    images: [N, ...] uint8, float32 or float64; arrays on disk stay there.
    device: "cpu", "cuda" or "auto" (a GPU where there is one).
    Raises InputError for an empty set or other dtypes.
    """

    def __init__(self, images: Images, *, device: str = "auto"):
        self.rows = as_rows(images, "training images")
        if len(self.rows) == 0:
            raise InputError("the training set is empty")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)

    def __len__(self) -> int:
        return len(self.rows)

    def query(self, images: Images, k: int = 2, *, progress: Progress = silent) -> Neighbors:
        """The k nearest training images of each query image, exactly, ties to the lower index.

        images: [Q, ...], of the training images' size and dtype.
        Raises InputError where they differ, or for k > N.
        """
        queries = as_rows(images, "query images")
        squared, indices = [], []
        for start in range(0, len(queries) or 1, QUERY_BLOCK):
            progress("searching nearest training images", start, len(queries))
            block = queries[start : start + QUERY_BLOCK].to(self.device)
            block_squared, block_indices = nearest(block, self.rows, k)
            squared.append(block_squared.cpu())
            indices.append(block_indices.cpu())
        progress("searching nearest training images", len(queries), len(queries))
        return Neighbors(torch.cat(indices).numpy(), torch.cat(squared).numpy(), queries.shape[1])
