"""Candidates from a FAISS index, and how far away everything is at least that it did not propose.

A query q gets its `width` best by the distance to their codes. Let x be a row that is not among them, T the index's
linear transform (‖T(q) − T(x)‖ ≤ s ‖q − x‖), x̂ what x's code stands for and e ≥ ‖T(x) − x̂‖ for every row.

- x lies in an inverted list that was visited, or there are none: its code was compared and was not better than the
  worst proposal, so ‖T(q) − T(x)‖ ≥ A − e, with the distance A of that proposal's code.
- x lies in the list of a centroid c that was not visited: c is nearer to x than q's nearest centroid b is, so that x
  lies beyond the plane halfway between them, ‖T(q) − T(x)‖ ≥ (‖T(q) − c‖² − ‖T(q) − b‖²) / 2‖b − c‖.

Rounding is allowed for in both: FAISS computes in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np

BLOCK = 4096
REFERENCES = 4  # of the nearest centroids, each of which gives a bound
_CODED = ("IndexFlat", "IndexFlatL2", "IndexScalarQuantizer", "IndexPQ")
_LISTS = ("IndexIVFFlat", "IndexIVFScalarQuantizer", "IndexIVFPQ")
_UNIT = 2.0**-23  # twice the unit roundoff of float32


class Candidates:
    """A FAISS index, with what bounds the rows that it does not propose.

    Args:
        faiss: The module.
        index: A trained index of METRIC_L2, on the CPU.

    Attributes:
        bounded: Whether there is a bound: of inverted lists with a flat quantizer, or none, and codes that are
            vectors, scalars or products. Of others (graphs) all that is not proposed may be anywhere.
        error: e, the largest distance of a row from what its code stands for, so far.
        largest: The largest length of a row, so far.
    """

    def __init__(self, faiss: Any, index: Any, error: float = 0.0, largest: float = 0.0) -> None:
        self.error, self.largest = error, largest
        inner, self._stretch = index, 1.0
        self._transforms: list[tuple[np.ndarray, np.ndarray]] = []
        kind = type(inner).__name__
        bounded = True
        if kind == "IndexPreTransform":
            for number in range(index.chain.size()):
                transform = faiss.downcast_VectorTransform(index.chain.at(number))
                if not hasattr(transform, "A"):
                    bounded = False
                    continue
                matrix = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
                moved_by = faiss.vector_to_array(transform.b) if transform.have_bias else np.zeros(1, np.float32)
                self._transforms.append((matrix, moved_by))
                matrix = matrix.astype(np.float64)
                excess = float(np.linalg.norm(matrix @ matrix.T - np.eye(len(matrix))))
                self._stretch *= np.sqrt(1 + excess)
            inner = faiss.downcast_index(index.index)
            kind = type(inner).__name__
        self._inner = inner
        self.lists: int | None = None
        self._centroids: np.ndarray | None = None
        ivf = faiss.try_extract_index_ivf(index)
        if ivf is not None:
            self.lists = int(ivf.nlist)
            quantizer = faiss.downcast_index(ivf.quantizer)
            if kind in _LISTS and type(quantizer).__name__ in ("IndexFlat", "IndexFlatL2"):
                self._centroids = quantizer.reconstruct_n(0, self.lists).astype(np.float64)
            else:
                bounded = False
        elif kind not in _CODED:
            bounded = False
        self.bounded = bounded
        self.exact_codes = kind in ("IndexFlat", "IndexFlatL2", "IndexIVFFlat")

    def note(self, rows: np.ndarray, codes: np.ndarray | None = None) -> None:
        """Takes rows, float32 [n, d], into account that are added to the index; their codes, where they are known."""
        if not self.bounded or not len(rows):
            return
        self.largest = max(self.largest, float(np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64).max())))
        if self.exact_codes:
            return
        moved = self._apply(rows)
        stands_for = self._inner.sa_decode(self._inner.sa_encode(moved) if codes is None else codes)
        apart = np.square(moved.astype(np.float64) - stands_for).sum(axis=1)
        self.error = max(self.error, float(np.sqrt(apart.max())))

    def unseen(
        self, queries: np.ndarray, proposed: np.ndarray, squared: np.ndarray, visited: int | None, total: int
    ) -> np.ndarray:
        """float64 [q]: no row that is not among the proposals is nearer than this.

        Args:
            queries: float32 [q, d].
            proposed: int64 [q, width], −1 where there were not so many.
            squared: float32 [q, width], squared distances as FAISS gave them.
            visited: Inverted lists that were visited, where there are any.
            total: Rows of the index.
        """
        if not self.bounded:
            return np.zeros(len(queries))
        moved = self._apply(queries).astype(np.float64)
        lengths = np.sqrt(np.square(moved).sum(axis=1))
        reach = lengths + max(self.largest * self._stretch, self._longest()) + self.error
        slack = moved.shape[1] * _UNIT * np.square(reach)
        worst = squared[:, -1].astype(np.float64)
        coded = np.sqrt(np.maximum(worst - slack, 0)) - self.error
        bound = np.where(proposed[:, -1] >= 0, coded, np.inf)
        if self._centroids is not None and visited is not None and visited < len(self._centroids):
            bound = np.minimum(bound, self._beyond(moved, visited, slack))
        if self._transforms:  # they were applied in float32
            bound = bound - queries.shape[1] * _UNIT * reach
        bound[(proposed >= 0).sum(axis=1) == total] = np.inf
        return np.maximum(bound, 0) / self._stretch

    def _beyond(self, moved: np.ndarray, visited: int, slack: np.ndarray) -> np.ndarray:
        """float64 [q]: how far rows are at least that lie in lists which were not visited."""
        assert self._centroids is not None
        centroids = self._centroids
        squares = np.square(centroids).sum(axis=1)
        step = max(1, (1 << 25) // len(centroids))
        found = np.empty(len(moved))
        for start in range(0, len(moved), step):
            part = moved[start : start + step]
            apart = np.square(part).sum(axis=1)[:, None] - 2 * part @ centroids.T + squares
            few = min(REFERENCES, len(centroids))
            nearest = np.argpartition(apart, few - 1, axis=1)[:, :few]
            bounds = np.zeros_like(apart)
            for column in range(few):
                base = nearest[:, column]
                which, where = np.unique(base, return_inverse=True)
                between = squares[which][:, None] - 2 * centroids[which] @ centroids.T + squares
                between = np.sqrt(np.maximum(between, 0))[where]
                gained = apart - np.take_along_axis(apart, base[:, None], 1) - 2 * slack[start : start + step, None]
                with np.errstate(divide="ignore", invalid="ignore"):
                    half = np.where(between > 0, gained / (2 * between), 0.0)
                np.maximum(bounds, half, out=bounds)
            # A list counts as visited where rounding cannot have put another in its place.
            limit = np.partition(apart, visited - 1, axis=1)[:, visited - 1] - slack[start : start + step]
            bounds[apart < limit[:, None]] = np.inf
            found[start : start + step] = bounds.min(axis=1)
        return found

    def _longest(self) -> float:
        return 0.0 if self._centroids is None else float(np.sqrt(np.square(self._centroids).sum(axis=1).max()))

    def _apply(self, rows: np.ndarray) -> np.ndarray:
        for matrix, moved_by in self._transforms:
            rows = rows @ matrix.T + moved_by
        return np.ascontiguousarray(rows, np.float32)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_inner": None}  # of FAISS; nothing is added any more
