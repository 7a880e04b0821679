"""The largest cosines between two sets, exactly, in both directions at once.

From the code of the filtered search (diffmem.search.bounds): with x' = (Ax, ρ(x)) of x less the mean, ‖x − y‖ ≥ ‖x' −
y'‖, so that

    cos(x, y) = (‖x‖² + ‖y‖² − ‖x − y‖²) / 2‖x‖‖y‖ ≤ (‖x‖² + ‖y‖² − ‖x' − y'‖²) / 2‖x‖‖y‖,

which is a sum of products of what belongs to x and what belongs to y: one narrow matrix product bounds all
pairs. What the code is off by (at most E in ‖x' − y'‖) adds E (‖x'‖ + ‖y'‖) / ‖x‖‖y‖, which is such a sum too. Pairs
whose bound is below the best cosine so far of both ends are left out, all others computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffmem.lazy import torch
from diffmem.ops.registry import native_module
from diffmem.progress import Progress, silent
from diffmem.search.bounds import LowerBounds
from diffmem.search.index import TrainingIndex
from diffmem.search.tiles import squared_tile_maxima

LEVELS = 2  # of the code: cosines of pixels lie close together
QUERY_BLOCK = 1024
BLOCK = 8192
# Share of a block's pairs beyond which all are computed by a product: a pair costs the core what it costs a product in
# float64, and gathering its values much more.
MOST_PAIRS = {True: 0.5, False: 0.02}
PAIR_VALUES = 1 << 24


@dataclass(frozen=True)
class LargestCosines:
    """float64: the largest cosine of each query with a row, and of each row with a query; −2 where there is none."""

    of_queries: np.ndarray
    of_rows: np.ndarray


def squared_lengths(rows: torch.Tensor) -> torch.Tensor:
    """float64 [n]: ‖x‖², exact for uint8 rows."""
    if rows.dtype == torch.uint8:
        places = torch.arange(len(rows))
        zero = rows.new_zeros(1, 1, rows.shape[1])
        return squared_tile_maxima(rows[:, None], zero, places, torch.zeros_like(places)).double()
    step = max(1, PAIR_VALUES // rows.shape[1])
    return torch.cat([block.double().square().sum(dim=1) for block in rows.split(step)])


def largest_cosines(
    index: TrainingIndex,
    queries: torch.Tensor,
    rows: torch.Tensor,
    *,
    own: np.ndarray | None = None,
    guesses: np.ndarray | None = None,
    of_rows: bool = True,
    absolute: bool = False,
    progress: Progress = silent,
) -> LargestCosines:
    """The largest cosines between queries and rows.

    Args:
        index: Index of the rows, for the bounds of its code. Without one, all cosines are computed, in float64.
        queries: [Q, d]; those of zeros have no cosine.
        rows: [N, d], of the same dtype; likewise.
        own: int64 [Q], for queries that are rows: which. They are not compared with themselves.
        guesses: int64 [Q, k], rows that are likely near: they decide what this costs, not what it answers.
        of_rows: Whether those of the rows are wanted too.
        absolute: Whether the largest |cosine| is wanted.
        progress: Called as `progress(stage, done, total)`.

    Returns:
        The largest cosines. Those of bytes are exact up to the last division and root.
    """
    search = _Search(index, queries.contiguous(), rows.contiguous(), own, of_rows, absolute)
    if guesses is not None:
        some = torch.arange(len(queries)).repeat_interleave(guesses.shape[1])
        search.pairs(some, torch.from_numpy(guesses.reshape(-1)))
    for first in range(0, len(queries), QUERY_BLOCK):
        progress("comparing directions", first, len(queries))
        for start in range(0, len(rows), BLOCK):
            search.block(
                torch.arange(first, min(first + QUERY_BLOCK, len(queries))), search.order[start : start + BLOCK]
            )
    progress("comparing directions", len(queries), len(queries))
    return LargestCosines(*(torch.where(best > 1.5, -2.0, best).numpy() for best in (search.best, search.best_of_rows)))


class _Search:
    def __init__(
        self,
        index: Any,
        queries: torch.Tensor,
        rows: torch.Tensor,
        own: np.ndarray | None,
        of_rows: bool,
        absolute: bool,
    ) -> None:
        self.queries, self.rows, self.of_rows, self.absolute = queries, rows, of_rows, absolute
        self.own = None if own is None else torch.from_numpy(own)
        self.native = queries.dtype == torch.uint8 and native_module() is not None
        self.squares, self.row_squares = squared_lengths(queries), squared_lengths(rows)
        self.lengths, self.row_lengths = self.squares.sqrt(), self.row_squares.sqrt()
        self.best = torch.full((len(queries),), -2.0, dtype=torch.float64)
        self.best_of_rows = torch.full((len(rows),), -2.0, dtype=torch.float64)
        # What has no direction is not looked for.
        self.best[self.lengths == 0], self.best_of_rows[self.row_lengths == 0] = 2.0, 2.0
        self.order = torch.arange(len(rows))
        bounds = LowerBounds(index, queries, LEVELS)
        self.factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        if bounds.coded is None:
            return
        self.outside = torch.zeros(len(queries), dtype=torch.bool)
        self.outside[bounds.outside] = True
        scale = bounds.coded.scale
        error = (float(bounds.errors.max()) * (1 + 1e-6) + bounds.slack) / scale if scale > 0 else 0.0
        for sign in (1, -1) if absolute else (1,):
            self.factors.append(self._factors(bounds, scale, error, sign))
        self.lengths_of_factors = [(x.norm(dim=1), y.norm(dim=1)) for x, y in self.factors]
        # Rows of like factors side by side, so that the rounding of a block's product is that of its own rows.
        self.order = self.lengths_of_factors[0][1].argsort(stable=True)

    def _factors(self, bounds: LowerBounds, scale: float, error: float, sign: int) -> tuple[torch.Tensor, torch.Tensor]:
        """X, Y with cos(x, y) ≤ X·Y, or for sign −1 with −cos(x, y) ≤ X·Y: then ‖x − y‖² ≤ ‖Ax − Ay‖² + (ρ(x) + ρ(y))²,
        which changes the sign of one coordinate."""
        parts = []
        for code, lengths, squares in (
            (bounds.queries, self.lengths, self.squares),
            (bounds.training, self.row_lengths, self.row_squares),
        ):
            code = code.double() / scale if scale > 0 else code.double()
            inverse = torch.where(lengths > 0, 1 / lengths, 0)
            norms = code.norm(dim=1)
            apart = (squares - norms.square()) / 2  # its share of (‖x‖² + ‖y‖² − ‖x'‖² − ‖y'‖²) / 2
            parts.append((code * inverse[:, None], inverse, (sign * apart + error * (norms + error)) * inverse))
        (x, x_inverse, x_apart), (y, y_inverse, y_apart) = parts
        x = x * sign
        if sign < 0:
            x[:, -1] *= -1
        # Scaled so that both factors are of the size of 1, and the rounding of their product is too.
        unit = self.row_lengths[self.row_lengths > 0].mean()
        x = torch.cat([x, x_apart[:, None] / unit, x_inverse[:, None] * unit], dim=1)
        y = torch.cat([y, y_inverse[:, None] * unit, y_apart[:, None] / unit], dim=1)
        return x.float(), y.float()

    def block(self, some: torch.Tensor, others: torch.Tensor) -> None:
        """The pairs of some queries and other rows."""
        from diffmem.precision import float32_products

        if not self.factors or bool(self.outside[some].any()):
            self._all(some, others)
            return
        may = torch.zeros(len(some), len(others), dtype=torch.bool)
        for (x, y), (x_lengths, y_lengths) in zip(self.factors, self.lengths_of_factors, strict=True):
            with float32_products("ieee"):
                bound = x[some] @ y[others].T
            # Of the product, and of factors that were rounded to float32.
            margin = (x.shape[1] + 8) * 2.0**-23 * x_lengths[some].double() * y_lengths[others].max()
            bound += _up(margin)[:, None]
            if self.own is not None:
                bound[self.own[some][:, None] == others] = -torch.inf
            self._guess(bound, some, others)
            may |= bound >= _down(self.best[some])[:, None]
            if self.of_rows:
                may |= bound >= _down(self.best_of_rows[others])
        rows, columns = torch.nonzero(may, as_tuple=True)
        if len(rows) > MOST_PAIRS[self.native] * may.numel():
            self._all(some, others)
        else:
            self.pairs(some[rows], others[columns])

    def _guess(self, bound: torch.Tensor, some: torch.Tensor, others: torch.Tensor) -> None:
        """Computes the pairs that the bound puts first."""
        first = bound.argmax(dim=1)
        self.pairs(some, others[first])
        if self.of_rows:
            self.pairs(some[bound.argmax(dim=0)], others)

    def pairs(self, some: torch.Tensor, others: torch.Tensor) -> None:
        """Computes some pairs."""
        there = (self.lengths[some] > 0) & (self.row_lengths[others] > 0)
        if self.own is not None:
            there &= self.own[some] != others
        some, others = some[there], others[there]
        self._offer(some, others, self._exact(some, others))

    def _offer(self, some: torch.Tensor, others: torch.Tensor, cosines: torch.Tensor) -> None:
        if self.absolute:
            cosines = cosines.abs()
        self.best.scatter_reduce_(0, some, cosines, "amax")
        if self.of_rows:
            self.best_of_rows.scatter_reduce_(0, others, cosines, "amax")

    def _exact(self, some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        lengths = (self.squares[some] * self.row_squares[others]).sqrt()
        if self.queries.dtype == torch.uint8:
            squared = squared_tile_maxima(self.queries[:, None], self.rows[:, None], some, others)
            return (self.squares[some] + self.row_squares[others] - squared) / 2 / lengths
        products = torch.empty(len(some), dtype=torch.float64)
        step = max(1, PAIR_VALUES // self.queries.shape[1])
        for start in range(0, len(some), step):
            part = slice(start, start + step)
            products[part] = (self.queries[some[part]].double() * self.rows[others[part]].double()).sum(dim=1)
        return products / self.lengths[some] / self.row_lengths[others]

    def _all(self, some: torch.Tensor, others: torch.Tensor) -> None:
        x, y = self.queries[some].double(), self.rows[others].double()
        lengths = self.lengths[some][:, None] * self.row_lengths[others]
        if self.queries.dtype == torch.uint8:
            lengths = (self.squares[some][:, None] * self.row_squares[others]).sqrt()
        cosines = torch.where(lengths > 0, (x @ y.T) / lengths, -2.0)
        if self.own is not None:
            cosines[self.own[some][:, None] == others] = -2.0
        if self.absolute:
            cosines = torch.where(cosines < -1.5, cosines, cosines.abs())
        self.best[some] = torch.maximum(self.best[some], cosines.amax(dim=1))
        if self.of_rows:
            self.best_of_rows[others] = torch.maximum(self.best_of_rows[others], cosines.amax(dim=0))


def _up(values: torch.Tensor) -> torch.Tensor:
    rounded = values.float()
    return torch.nextafter(rounded, torch.full_like(rounded, torch.inf))


def _down(values: torch.Tensor) -> torch.Tensor:
    rounded = values.float()
    return torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))
