"""The k nearest training images by blocked matrix products, decided exactly.

One product gives approximate squared distances of a block of queries to a block of training images. They decide
nothing: every pair whose approximate distance could belong to an answer, given the largest error the arithmetic can
have made, is computed again exactly (integers for uint8 images, float64 sums of squared differences for floats), and
only those are ranked.

The margin. With x, y the rows (uint8 rows minus 128, which changes no distance and is exact in float32), the product is
evaluated in a format of unit roundoff u (float32, u = 2^-24, for uint8 rows; float64, u = 2^-53, for floats). Let

    a = fl(fl(‖y‖²) − 2 fl(x·y)),   to be compared with   A = ‖y‖² − 2 x·y = ‖x − y‖² − ‖x‖².

1. Whatever the order of summation, with or without fused multiply-add, |fl(x·y) − x·y| ≤ γ_d Σ|x_i y_i| ≤ γ_d ‖x‖‖y‖
   with γ_d = d·u / (1 − d·u) (Higham, Accuracy and Stability of Numerical Algorithms, §3.1, and Cauchy–Schwarz).
2. fl(‖y‖²) is within relative γ_(d+1) of ‖y‖² (for uint8 rows it is an integer, computed exactly and rounded once).
3. Doubling is exact; the subtraction adds at most u·(|fl(‖y‖²)| + 2|fl(x·y)|).

Together |a − A| ≤ 2γ‖x‖‖y‖ + γ'‖y‖² + u(1 + γ')‖y‖² + 2u(1 + γ)‖x‖‖y‖ ≤ 3γ_(d+2) (‖x‖ + ‖y‖)‖y‖ =: ε, with some
slack that also covers evaluating ε itself, in float64, from ‖y‖ ≤ Y, the largest norm in the block. Let T be an
upper bound on the k-th smallest exact squared distance of the query (any k exact distances give one). A training
image that belongs to the answer has A ≤ T − ‖x‖², so a ≤ T − ‖x‖² + ε: the pairs that fail this test are not in the
answer, ties included, since the test is not strict. For floats the exact distances themselves are rounded (relative
error ≤ γ_(d+2)); T is widened by that. Products of subnormal numbers may underflow, each by at most 2^-1075: covered
by adding the smallest normal number to ε.

Floors, for Q = 10,000, N = 50,000, d = 3072 on 2 cores at about 170 Gflop/s float32: 2QNd = 3.1 Tflop, 18 s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from diffmem.errors import InputError
from diffmem.lazy import torch

QUERY_BLOCK = 2048
TRAINING_BLOCK = 4096
REFINE_BYTES = 1 << 27  # gathered rows at a time when pairs are computed exactly


def nearest_blocked(queries: torch.Tensor, training: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances [Q, k] and indices [Q, k]; see `diffmem.ops.nearest.nearest`."""
    answers = [
        nearest_of_blocks(block, _training_blocks(training, block.device), k) for block in queries.split(QUERY_BLOCK)
    ]
    return torch.cat([squared for squared, _ in answers]), torch.cat([indices for _, indices in answers])


def pairs_within(
    queries: torch.Tensor, training: torch.Tensor, squared_radius: int | float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All pairs at a squared distance of at most `squared_radius`, as (query rows, training rows, squared
    distances)."""
    found = []
    for start in range(0, len(queries), QUERY_BLOCK):
        block = queries[start : start + QUERY_BLOCK]
        limit = torch.full((len(block),), float(squared_radius), dtype=torch.float64, device=block.device)
        products = _Products(block)
        for offset, chunk in _training_blocks(training, block.device):
            rows, columns = products.pairs_at_most(products.scores(chunk), limit)
            squared = exact_squared_distances(block, chunk, rows, columns)
            near = squared <= squared_radius
            found.append((rows[near] + start, columns[near] + offset, squared[near]))
    if not found:
        empty = torch.empty(0, dtype=torch.int64, device=queries.device)
        return empty, empty, empty
    rows, columns, squared = (torch.cat(parts) for parts in zip(*found, strict=True))
    return rows, columns, squared


def exact_squared_distances(
    queries: torch.Tensor, training: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """‖queries[rows] − training[columns]‖² for each pair: int64 for rows of bytes, float64 for floats."""
    integer = queries.dtype in (torch.uint8, torch.int8)
    # A square of a difference of bytes is below 2^16 and fits int32; the sums are int64.
    difference_type = torch.int32 if integer else torch.float64
    sum_type = torch.int64 if integer else torch.float64
    squared = torch.empty(len(rows), dtype=sum_type, device=queries.device)
    step = max(1, REFINE_BYTES // (8 * queries.shape[1]))
    for start in range(0, len(rows), step):
        pair = slice(start, start + step)
        difference = queries[rows[pair]].to(difference_type) - training[columns[pair]].to(difference_type)
        squared[pair] = difference.mul_(difference).sum(dim=1, dtype=sum_type)
    return squared


class _Products:
    """Approximate squared distances (less ‖x‖²) of one block of queries, and their guaranteed error.

    single: products of float rows in float32, too. Only of rows whose norms `fit_single`.
    """

    def __init__(self, queries: torch.Tensor, single: bool = False) -> None:
        self.integer = queries.dtype == torch.uint8
        single = single or self.integer
        self.format = torch.float32 if single else torch.float64
        unit = 2.0**-24 if single else 2.0**-53
        self.gamma = (queries.shape[1] + 2) * unit / (1 - (queries.shape[1] + 2) * unit)
        # Values that underflow, or are flushed to zero, each add at most the smallest normal number.
        self.tiny = 4 * (queries.shape[1] + 2) * torch.finfo(self.format).tiny
        self.x = self._centered(queries)
        self.squared_norms = self._squared_norms(self.x)

    def _centered(self, rows: torch.Tensor) -> torch.Tensor:
        rows = rows.to(self.format)
        return rows.sub_(128) if self.integer else rows

    def _squared_norms(self, centered: torch.Tensor) -> torch.Tensor:
        # Integers below 2^53 are exact in float64, so these norms are exact for uint8 rows.
        norms = centered.double().square().sum(dim=1)
        if not bool(torch.isfinite(norms).all()):
            raise InputError("images hold NaN, infinity, or values too large to be squared: clean or rescale them")
        return norms

    def scores(self, training: torch.Tensor, norms: torch.Tensor | None = None) -> torch.Tensor:
        """a for each pair of the block, [q, n]; keeps what `margin` needs. norms: of float rows, squared, if known."""
        from diffmem.precision import float32_products

        y = self._centered(training)
        norms = self._squared_norms(y) if norms is None else norms
        self.largest_norm = norms.max().sqrt()
        with float32_products("ieee"):
            return torch.addmm(norms.to(self.format), self.x, y.T, alpha=-2)

    def margin(self) -> torch.Tensor:
        """ε per query, for the block that `scores` saw last."""
        largest = self.largest_norm
        return 3 * self.gamma * (self.squared_norms.sqrt() + largest) * largest + self.tiny

    def pairs_at_most(self, scores: torch.Tensor, limit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the pairs whose exact squared distance may be at most `limit` (float64, one per
        query)."""
        if not self.integer:
            limit = limit * (1 + 2 * self.gamma)
        # Rounded up to the format of the scores, so that the comparison loses nothing.
        bound = (limit - self.squared_norms + self.margin()).to(self.format)
        bound = torch.nextafter(bound, torch.full_like(bound, torch.inf))
        rows, columns = torch.nonzero(scores <= bound[:, None], as_tuple=True)
        return rows, columns


def nearest_of_blocks(
    queries: torch.Tensor,
    blocks: Iterable[tuple[int, torch.Tensor]],
    k: int,
    *,
    single: bool = False,
    exact_of: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances and indices [Q, k] of the k nearest rows that come in blocks.

    Args:
        queries: [Q, d].
        blocks: Training rows in ascending order, each with the number of its first one; at least k rows together.
        k: How many neighbors.
        single: Products of float rows in float32 instead of float64 where their lengths allow it: twice as fast.
        exact_of: What computes the exact distances of pairs; default `exact_squared_distances`.
    """
    exact_of = exact_squared_distances if exact_of is None else exact_of
    wide = _Products(queries)
    narrow = _Products(queries, True) if single and _fits_single(wide.squared_norms) else None
    count = len(queries)
    squared: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    for offset, chunk in blocks:
        if len(chunk) == 0:
            continue
        norms = None if narrow is None else torch.linalg.vector_norm(chunk, dim=1, dtype=torch.float64).square_()
        products = narrow if narrow is not None and norms is not None and _fits_single(norms) else wide
        scores = products.scores(chunk, norms if products is narrow else None)
        if squared is None:  # any k exact distances give a first upper bound on the k-th smallest
            guess = scores.topk(min(k, len(chunk)), dim=1, largest=False).indices
            rows = torch.arange(count, device=queries.device).repeat_interleave(guess.shape[1])
            limit = exact_of(queries, chunk, rows, guess.flatten()).view(guess.shape).amax(dim=1).double()
            if guess.shape[1] < k:
                limit = torch.full_like(limit, torch.inf)
        elif squared.shape[1] == k:
            limit = squared[:, -1].double()
        rows, columns = products.pairs_at_most(scores, limit)
        exact = exact_of(queries, chunk, rows, columns)
        squared, indices = _merge(squared, indices, rows, columns + offset, exact, count, k)
    assert squared is not None and indices is not None  # noqa: PT018 (there is a block)
    return squared, indices


def _fits_single(squared_norms: torch.Tensor) -> bool:
    """Whether no product of such rows overflows float32, and underflow is small beside the longest."""
    largest = float(squared_norms.max()) if len(squared_norms) else 1.0
    return 1e-20 < largest < 1e30


def _merge(
    squared: torch.Tensor | None,
    indices: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    exact: torch.Tensor,
    count: int,
    k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of each query among its answer so far and the new pairs, by (distance, index)."""
    if squared is not None and indices is not None:
        kept = squared.shape[1]
        known = torch.arange(count, device=rows.device).repeat_interleave(kept)
        rows, columns = torch.cat([known, rows]), torch.cat([indices.flatten(), columns])
        exact = torch.cat([squared.flatten(), exact])
    order = columns.argsort(stable=True)
    order = order[exact[order].argsort(stable=True)]
    order = order[rows[order].argsort(stable=True)]
    per_query = torch.bincount(rows, minlength=count)
    width = min(k, int(per_query.min()))  # below k only while fewer than k images have been seen
    first = (per_query.cumsum(0) - per_query)[:, None] + torch.arange(width, device=rows.device)
    best = order[first]
    return exact[best], columns[best]


def _training_blocks(training: torch.Tensor, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    for offset in range(0, len(training), TRAINING_BLOCK):
        yield offset, training[offset : offset + TRAINING_BLOCK].to(device)
