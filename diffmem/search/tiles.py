"""The training image whose largest tile distance is least: images cut into tiles, searched exactly."""

from __future__ import annotations

from typing import Any

import numpy as np

from diffmem.lazy import torch
from diffmem.ops.nearest import exact_squared_distances, native_rows
from diffmem.ops.registry import native_module
from diffmem.progress import Progress, silent
from diffmem.search.bounds import LowerBounds
from diffmem.search.index import TrainingIndex
from diffmem.search.rows import as_rows

TRAINING_BLOCK = 8192
QUERY_BLOCK = 1024
SAMPLE = 256  # training images that show in which tile a query is least like others
PAIRS = 1 << 16  # computed at a time without the compiled core


def cut_tiles(images: np.ndarray, tile: int) -> torch.Tensor:
    """Images as tiles.

    Args:
        images: [n, C, H, W].
        tile: Side of a tile in pixels. Where it does not divide a side, the last tile is narrower: what it lacks is 0.

    Returns:
        [n, tiles, C·tile²], of the images' dtype.
    """
    n, channels, height, width = images.shape
    rows, columns = -(-height // tile), -(-width // tile)
    if (rows * tile, columns * tile) != (height, width):
        images = np.pad(images, ((0, 0), (0, 0), (0, rows * tile - height), (0, columns * tile - width)))
    cells = images.reshape(n, channels, rows, tile, columns, tile).transpose(0, 2, 4, 1, 3, 5)
    return torch.from_numpy(np.array(cells, order="C").reshape(n, rows * columns, channels * tile * tile))


def squared_tile_maxima(
    queries: torch.Tensor, training: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """[pairs]: the largest squared tile distance of queries[rows] and training[columns], both [·, tiles, values]."""
    tiles = queries.shape[1]
    if native_module() is not None:
        squared = torch.empty(len(rows), dtype=torch.int64 if queries.dtype == torch.uint8 else torch.float64)
        native_module().tile_max_pairs(
            native_rows(training.flatten(1)),
            native_rows(queries.flatten(1)),
            tiles,
            rows.data_ptr(),
            columns.data_ptr(),
            len(rows),
            squared.data_ptr(),
            torch.get_num_threads(),
        )
        return squared
    each = torch.arange(tiles)
    found = [
        exact_squared_distances(
            queries.flatten(0, 1),
            training.flatten(0, 1),
            (some[:, None] * tiles + each).flatten(),
            (others[:, None] * tiles + each).flatten(),
        )
        .view(-1, tiles)
        .amax(dim=1)
        for some, others in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True)
    ]
    return torch.cat(found)


def nearest_by_tiles(
    images: np.ndarray,
    training: np.ndarray,
    tile: int,
    guesses: np.ndarray,
    index: TrainingIndex,
    *,
    progress: Progress = silent,
) -> tuple[np.ndarray, np.ndarray]:
    """For each image the training image y with the least max_t ‖x_t − y_t‖² over tiles t, exactly.

    A pair is looked at where `LowerBounds` do not exclude it, and given up at its first tile beyond the least maximum
    so far, which the guesses begin; an image's first tile is the one that the fewest training images come near in.
    Memory does not grow with the number of pairs.

    Args:
        images: [Q, C, H, W], uint8, float32 or float64.
        training: [N, C, H, W], the same dtype; read block by block.
        tile: Side of a tile in pixels.
        guesses: int64 [Q, ≥ 1], training images that are likely near: they decide what the search costs, not what it
            answers.
        index: Index of the training images: the bounds of its code leave out most pairs.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The least squared tile maximum [Q] (int64 for uint8 images, else float64) and of which training image, int64
        [Q], ties to the lower index.
    """
    queries = cut_tiles(images, tile)
    count = len(queries)
    candidates, places = np.unique(guesses, return_inverse=True)
    rows = torch.arange(count).repeat_interleave(guesses.shape[1])
    known = squared_tile_maxima(
        queries, cut_tiles(training[candidates], tile), rows, torch.from_numpy(places.reshape(-1))
    ).view(count, -1)
    limit, answer = known.amin(dim=1), torch.full((count,), len(training))
    sample = training[np.linspace(0, len(training) - 1, min(SAMPLE, len(training))).astype(np.int64)]
    order = _order(queries, cut_tiles(sample, tile), limit)
    # Images with the same first tile side by side, so that they share what is read of the training images.
    grouped = order[:, 0].argsort(stable=True)
    queries, limit, order = queries[grouped].contiguous(), limit[grouped], order[grouped].int().contiguous()
    bounds = LowerBounds(index, as_rows(images)[grouped])
    search = _search_native if native_module() is not None else _search_torch
    for start in range(0, len(training), TRAINING_BLOCK):
        progress("comparing tiles", start, len(training))
        columns = slice(start, start + TRAINING_BLOCK)
        block = cut_tiles(training[columns], tile)
        for first in range(0, count, QUERY_BLOCK):
            part = slice(first, first + QUERY_BLOCK)
            # A pair is no farther than √tiles times its tile maximum.
            near = bounds.may_be_within(part, columns, limit[part].double() * queries.shape[1])
            search(queries[part], block, order[part], start, near, limit[part], answer[part])
    progress("comparing tiles", len(training), len(training))
    squared, indices = torch.empty_like(limit), torch.empty_like(answer)
    squared[grouped], indices[grouped] = limit, answer
    return squared.numpy(), indices.numpy()


def _order(queries: torch.Tensor, sample: torch.Tensor, limit: torch.Tensor) -> torch.Tensor:
    """int64 [Q, tiles]: each query's tiles, first the one in which the fewest of some training images are within its
    limit, the mean distance deciding between equal ones."""
    shares, means = [], []
    for tile in range(queries.shape[1]):
        x, y = queries[:, tile].float(), sample[:, tile].float()  # rounding changes the order, not the answer
        squared = torch.cdist(x, y).square_()
        shares.append((squared <= limit[:, None]).sum(dim=1))
        means.append(squared.mean(dim=1))
    share, mean = torch.stack(shares, dim=1).double(), torch.stack(means, dim=1).double()
    return (share - mean / (mean.amax(dim=1, keepdim=True) + 1)).argsort(dim=1, stable=True)


def _search_native(
    queries: Any, block: Any, order: Any, start: int, near: Any, limit: torch.Tensor, answer: torch.Tensor
) -> None:
    native_module().tile_max_search(
        native_rows(block.flatten(1)),
        native_rows(queries.flatten(1)),
        queries.shape[1],
        order.data_ptr(),
        start,
        near.data_ptr(),
        limit.data_ptr(),
        answer.data_ptr(),
        torch.get_num_threads(),
    )


def _search_torch(
    queries: Any, block: Any, order: Any, start: int, near: Any, limit: torch.Tensor, answer: torch.Tensor
) -> None:
    """The same, a query at a time: its pairs that are left after each tile."""
    tiles = queries.shape[1]
    for query in range(len(queries)):
        columns = torch.nonzero(near[query])[:, 0]
        largest = limit.new_zeros(len(columns))
        for tile in order[query].tolist():
            row = torch.full_like(columns, query * tiles + tile)
            squared = exact_squared_distances(queries.flatten(0, 1), block.flatten(0, 1), row, columns * tiles + tile)
            largest = torch.maximum(largest, squared)
            left = largest <= limit[query]
            columns, largest = columns[left], largest[left]
        if len(columns):
            best = int(largest.argmin())  # the first of equal ones
            if largest[best] < limit[query] or int(columns[best]) + start < int(answer[query]):
                limit[query], answer[query] = largest[best], columns[best] + start
