"""Leading principal components of a training set, as the filtered search needs them.

The search asks one thing of the basis for its answers to be exact: a spectral norm of at most 1
(csrc/nearest/nearest.h). That is proven here from the rows as they are used. How close they come to the true components
only decides how much is pruned, so float32 and a randomized method are good enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from diffmem.lazy import torch

SAMPLE = 4096  # rows the components are computed from
SAMPLE_VALUES = 1 << 26  # and at most that many values: wide images are sampled less
EXTRA = 8  # dimensions beyond those asked for (Halko, Martinsson & Tropp 2011, section 4.2)
POWER_ITERATIONS = 2


def sample_rows(rows: Any) -> Any:
    """Evenly spaced rows of the training set, of an array or a tensor."""
    wanted = min(len(rows), SAMPLE, max(64, SAMPLE_VALUES // rows.shape[1]))
    return rows[np.linspace(0, len(rows) - 1, wanted).astype(np.int64)]


def principal_components(centered: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` leading right singular vectors of `centered` [n, d], nearly orthonormal rows, float32 [<= count, d].

    Randomized subspace iteration: Halko, Martinsson & Tropp, Finding structure with randomness, SIAM Review 2011,
    algorithms 4.4 and 5.1. Fewer rows come back where n or d is smaller.
    """
    n, d = centered.shape
    width = min(count + EXTRA, n, d)
    generator = torch.Generator().manual_seed(0)
    subspace = torch.linalg.qr(centered.T @ torch.randn(n, width, generator=generator)).Q
    for _ in range(POWER_ITERATIONS):
        subspace = torch.linalg.qr(centered.T @ (centered @ subspace)).Q
    projected = centered @ subspace
    _, rotation = torch.linalg.eigh((projected.T @ projected).double())
    return (subspace @ rotation.flip(1)[:, :count].float()).T.contiguous()


@dataclass(frozen=True)
class ByteBasis:
    """An integer basis for uint8 rows: coordinates of x are P(x − mean) / norm.

    p: int16 [coordinates, d] with 128·Σ_j |P_ij| < 2^31, so that products with (x − 128) are exact in int32.
    norm: at least the spectral norm of P.
    mean: uint8 [d].
    shift: int64 [coordinates], P(mean − 128).
    """

    p: np.ndarray
    norm: float
    mean: np.ndarray
    shift: np.ndarray

    @property
    def largest_norm(self) -> float:
        """The largest ‖x − mean‖ that any uint8 row can have."""
        mean = self.mean.astype(np.float64)
        return float(np.sqrt(np.square(np.maximum(mean, 255 - mean)).sum()))


def byte_basis(rows: np.ndarray, coordinates: int) -> ByteBasis:
    """Basis of `coordinates` rows for the uint8 rows [N, d]; rows beyond the rank of the sample are zero."""
    sample = sample_rows(rows).astype(np.float32)
    mean = sample.mean(axis=0, dtype=np.float64).round()
    sample -= mean.astype(np.float32)
    components = _components_of_array(sample, coordinates).astype(np.float64)
    p = np.zeros((coordinates, rows.shape[1]))
    # The largest scale at which every entry fits int16 and no product overflows, less what rounding can add.
    longest = max(float(np.abs(components).sum(axis=1).max(initial=0)), 1e-9)
    largest = max(float(np.abs(components).max(initial=0)), 1e-9)
    scale = min((2.0**24 - 1 - rows.shape[1]) / longest, 32766 / largest)
    p[: len(components)] = (components * scale).round()
    # ‖P‖² = ‖PPᵀ‖ is at most the largest absolute row sum of PPᵀ: integers below 2^53, so exact up to the square root.
    norm = float(np.sqrt(np.abs(p @ p.T).sum(axis=1).max())) * (1 + 1e-12)
    shift = (p @ (mean - 128)).round().astype(np.int64)
    return ByteBasis(p.astype(np.int16), norm, mean.astype(np.uint8), shift)


def _components_of_array(centered: np.ndarray, count: int) -> np.ndarray:
    """`principal_components` of an array, without PyTorch: another random start, and so components that are as good
    and not the same."""
    n, d = centered.shape
    width = min(count + EXTRA, n, d)
    start = np.random.default_rng(0).standard_normal((n, width), np.float32)
    subspace = _orthonormal(centered.T @ start)
    for _ in range(POWER_ITERATIONS):
        subspace = _orthonormal(centered.T @ (centered @ subspace))
    projected = centered @ subspace
    _, rotation = np.linalg.eigh((projected.T @ projected).astype(np.float64))
    return (subspace @ rotation[:, ::-1][:, :count].astype(np.float32)).T


def _orthonormal(columns: np.ndarray) -> np.ndarray:
    """An orthonormal basis, float32, of what the columns float32 [d, width] span, without directions in which they are
    hardly longer than their rounding. By their Gram matrix, in float64: two products and a small matrix, where LAPACK's
    QR makes very many small steps, each of which waits for all threads."""
    wide = columns.astype(np.float64)
    squares, rotation = np.linalg.eigh(wide.T @ wide)
    kept = squares > 1e-12 * squares.max(initial=0)
    return (wide @ (rotation[:, kept] / np.sqrt(squares[kept]))).astype(np.float32)


@dataclass(frozen=True)
class FloatBasis:
    """A basis for float rows: coordinates of x are A(x − mean), ‖A‖ <= 1. a: float64 [coordinates, d]; mean: [d]."""

    a: np.ndarray
    mean: np.ndarray

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Coordinates [n, coordinates] and ‖x − mean‖² [n] of float rows [n, d], in float64."""
        centered = rows.double() - torch.from_numpy(self.mean)
        return centered @ torch.from_numpy(self.a).T, centered.square().sum(dim=1)


def float_basis(rows: torch.Tensor, coordinates: int) -> FloatBasis:
    """Basis of `coordinates` rows for the float rows [N, d]; rows beyond the rank of the sample are zero."""
    sample = sample_rows(rows).double()
    mean = sample.mean(dim=0)
    centered = sample - mean
    # Scaled to a largest magnitude of 1, so that float32 neither overflows nor underflows.
    magnitude = centered.abs().max()
    if magnitude > 0:
        centered /= magnitude
    a = torch.zeros(coordinates, rows.shape[1], dtype=torch.float64)
    components = principal_components(centered.float(), coordinates).double()
    a[: len(components)] = components
    # The row sums of AAᵀ are computed with a relative error below (d + 2)·2^-53·Σ|a||a|: far below the slack of 1e-9.
    norm = float((a @ a.T).abs().sum(dim=1).max().sqrt()) * (1 + 1e-9)
    return FloatBasis((a / norm).numpy() if norm > 0 else a.numpy(), mean.numpy())
