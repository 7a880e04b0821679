"""Which points lie in which balls: counts over all pairs of two sets, exactly, without a matrix of all pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from diffmem.lazy import torch
from diffmem.progress import Progress, silent
from diffmem.search.bounds import LowerBounds
from diffmem.search.index import TrainingIndex
from diffmem.search.tiles import squared_tile_maxima

QUERY_BLOCK = 1024
BLOCK = 8192


@dataclass(frozen=True)
class BallCounts:
    """Pairs (query, row) at a distance below the radius of a ball, counted.

    Attributes:
        of_queries: int64 [Q], in how many rows' balls each query is.
        of_rows: int64 [N], how many queries are in each row's ball.
        in_queries: int64 [N], in how many queries' balls each row is.
    """

    of_queries: np.ndarray
    of_rows: np.ndarray
    in_queries: np.ndarray


def count_in_balls(
    index: TrainingIndex,
    rows: torch.Tensor,
    queries: torch.Tensor,
    row_radii: torch.Tensor,
    query_radii: torch.Tensor,
    *,
    progress: Progress = silent,
) -> BallCounts:
    """Counts who is inside whose ball; a point on the edge is outside.

    Args:
        index: Index of the rows: the bounds of its code leave out most pairs.
        rows: [N, d].
        queries: [Q, d], the same dtype.
        row_radii: [N], squared radii, int64 for uint8 rows, else float64.
        query_radii: [Q], likewise.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The counts.
    """
    bounds = LowerBounds(index, queries)
    of_queries, of_rows, in_queries = (torch.zeros(n, dtype=torch.int64) for n in (len(queries), len(rows), len(rows)))
    queries, rows = queries.contiguous(), rows.contiguous()
    for first in range(0, len(queries), QUERY_BLOCK):
        progress("comparing neighborhoods", first, len(queries))
        part = slice(first, first + QUERY_BLOCK)
        block = queries[part, None]
        for start in range(0, len(rows), BLOCK):
            columns = slice(start, start + BLOCK)
            near = bounds.may_be_within(part, columns, query_radii[part], row_radii[columns])
            some, others = torch.nonzero(near, as_tuple=True)
            squared = squared_tile_maxima(block, rows[columns, None], some, others)
            inside = squared < row_radii[columns][others]
            of_queries[part] += torch.bincount(some[inside], minlength=len(block))
            of_rows[columns] += torch.bincount(others[inside], minlength=len(rows[columns]))
            inside = squared < query_radii[part][some]
            in_queries[columns] += torch.bincount(others[inside], minlength=len(rows[columns]))
    progress("comparing neighborhoods", len(queries), len(queries))
    return BallCounts(of_queries.numpy(), of_rows.numpy(), in_queries.numpy())
