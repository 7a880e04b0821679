"""The posterior mean by blocks of the training set, for any device and any real dtype.

With u = x − c and z_i = y_i − c for a center c, the logit of image i is, but for a constant of the query,
s_i = (u·z_i − ‖z_i‖²/2) / σ². One product per block (`Products`) gives all of them, each with an error of at most e.
With M the largest s_i so far as computed, an image whose computed s_i is below M − 2e − ln(N/ε) has less than
ε/N of the weight of the image at M: all that are left out hold less than ε of the mass, proven, and what they were is
added up: `dropped`. Blocks where few images are left have these recomputed in float64 from the differences; the others
are added densely, by another product where its rounding is below the tolerance, else in float64. For this the largest
rounding error of a logit is taken as what independent roundings make, and not as the proven e, which is a hundred times
larger: the signs of d roundings do not conspire. This is a model of the rounding, not a proof of it.

`Float32Products` does both products in PyTorch; `diffmem.ops.posterior_mean.tensor_cores` with kernels for GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from diffmem.precision import float32_products

BLOCK_PAIRS = 1 << 24  # pairs of query and image at a time
BLOCK_VALUES = 1 << 26  # values of a block of images
DENSE_SHARE = 1 / 128  # share of pairs that carry weight from which a block is added densely, if need be in float64
REFINE_VALUES = 1 << 24
SMALL = 1 << 27  # multiplications of a product for which float64 is as good as free
DROPPED_SHARE = 0.1  # of the tolerance, for the mass that is left out


class RunningMean:
    """The weighted mean of what has been seen so far, per query: an online log-sum-exp in float64.

    top [B]: the logit that weights are relative to. mass [B]: Σ exp(logit − top). total [B, d]: the same sum of rows.
    dropped [B]: a bound on the mass left out, in the same unit. waits: look whether anything has to be rescaled at all,
    which saves work on the CPU and makes a GPU wait.
    """

    def __init__(self, count: int, dimension: int, device: torch.device, waits: bool = True) -> None:
        self.waits = waits
        self.top = torch.full((count,), -math.inf, dtype=torch.float64, device=device)
        self.mass = torch.zeros(count, dtype=torch.float64, device=device)
        self.dropped = torch.zeros(count, dtype=torch.float64, device=device)
        self.total = torch.zeros(count, dimension, dtype=torch.float64, device=device)

    def raise_top(self, top: torch.Tensor) -> None:
        """Makes `top` [B] the reference where it is higher."""
        higher = torch.maximum(self.top, top)
        factor = (self.top - higher).exp().nan_to_num(0.0)  # −inf − −inf: nothing has been seen
        for part in (self.mass, self.dropped):
            part *= factor
        if not self.waits or not bool((factor == 1).all()):
            self.total *= factor[:, None]
        self.top = higher

    def mean(self) -> torch.Tensor:
        return self.total / self.mass[:, None]


class SupportsBlocks(Protocol):
    """Rows that are had a block at a time."""

    def __len__(self) -> int: ...
    def __getitem__(self, block: slice) -> torch.Tensor: ...


class Products(Protocol):
    """The two products of one call: queries u [B, d] float64, about a center, with weights 1/σ² [B]."""

    def logits(self, rows: torch.Tensor, squared: torch.Tensor | None = None) -> Logits:
        """Of a block of rows [n, d] on the device. squared: their squared norms about the center [n], if known."""

    def add_weighted(self, state: RunningMean, found: Logits) -> None:
        """Adds all images of the block that `found` was computed of; its logits may be overwritten."""


@dataclass(frozen=True)
class Logits:
    """values [B, n] float32; error [B] bounds their distance from the exact ones; rounding [B] models it.

    rows: those they are of. kept: what else `add_weighted` wants of their making.
    """

    values: torch.Tensor
    error: torch.Tensor
    rounding: torch.Tensor
    rows: torch.Tensor
    kept: tuple[torch.Tensor, ...] = ()

    def largest(self) -> torch.Tensor:
        """The largest logit of each query [B]."""
        return self.values.amax(dim=1)


class Float32Products:
    """Products in float32. With γ_n = n·2^-24 / (1 − n·2^-24), a logit's error is at most

        e = (γ_(d+2)·‖u‖·‖z‖ + 2^-23·(‖u‖·‖z‖ + ‖z‖²/2)) / σ²

    (Higham, Accuracy and Stability of Numerical Algorithms, §3.1; the second term is the rounding of what follows the
    product); the model of it is 2·2^-24·‖u‖·‖z‖ / σ². keeps: hold the float32 rows of each block from one product to
    the other, instead of making them again.
    """

    def __init__(
        self, u: torch.Tensor, weight: torch.Tensor, center: torch.Tensor, tolerance: float, *, keeps: bool = True
    ):
        self.narrow, self.weight, self.center, self.keeps = u.float(), weight, center, keeps
        self.lengths = u.norm(dim=1)

    def logits(self, rows: torch.Tensor, squared: torch.Tensor | None = None) -> Logits:
        exact = rows.dtype == torch.uint8  # the center of such rows is one of whole numbers
        wide = rows if exact else rows.double() - self.center  # not looked at where exact
        z = rows.float() - self.center.float() if exact else wide.float()
        if squared is None:
            # Squares of whole numbers below 256 are exact in float32; their sums need more.
            squared = z.square().sum(dim=1, dtype=torch.float64) if exact else wide.square().sum(dim=1)
        longest, d = squared.max().sqrt(), rows.shape[1]
        values = torch.addmm(-0.5 * squared.float(), self.narrow, z.T).mul_(self.weight[:, None].float())
        gamma = (d + 2) * 2.0**-24 / (1 - (d + 2) * 2.0**-24)
        # Where u and z are not exact in float32 they have roundings of their own.
        error = (gamma + 2.0**-22 + (0 if exact else 2.0**-23)) * (self.lengths + longest) * longest * self.weight
        rounding = 2.0**-23 * self.lengths * longest * self.weight
        return Logits(values, error, rounding, rows, (z,) if self.keeps else ())

    def add_weighted(self, state: RunningMean, found: Logits) -> None:
        if found.kept:
            z = found.kept[0]
        elif found.rows.dtype == torch.uint8:
            z = found.rows.float() - self.center.float()
        else:
            z = (found.rows.double() - self.center).float()
        add_weighted(state, found.values, z)


@float32_products("ieee")  # the errors of the logits are those of float32
def posterior_mean_blocked(
    x: torch.Tensor,
    sigma: torch.Tensor,
    training: torch.Tensor | SupportsBlocks,
    tolerance: float,
    center: torch.Tensor,
    products: Callable[..., Products] = Float32Products,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean [B, d], log-sum-exp [B] and dropped share of the mass [B], float64; see `posterior_mean`."""
    count, d = x.shape
    device = x.device
    center = center.to(device, torch.float64)
    u = x.double() - center
    weight = 1 / sigma.double().square()
    state = RunningMean(count, d, device)
    reach = math.log(len(training) / (DROPPED_SHARE * tolerance))
    step = max(1, min(BLOCK_PAIRS // max(count, 1), BLOCK_VALUES // d))
    if count * len(training) * d <= SMALL:
        for start in range(0, len(training), step):
            add_all(state, u, training[start : start + step].to(device).double() - center, weight)
        return state.mean() + center, _log_sum(state, u, weight), state.dropped / state.mass
    both = products(u, weight, center, tolerance)
    for start in range(0, len(training), step):
        rows = training[start : start + step].to(device)
        found = both.logits(rows)
        logits, error = found.values, found.error
        # Of these lower bounds on the largest logit one belongs to this block, the other to what has been seen.
        known = torch.maximum(state.top, logits.amax(dim=1).double() - error)
        least = (known - error - reach).float()
        kept = logits >= least.nextafter(torch.full_like(least, -math.inf))[:, None]
        if int(kept.count_nonzero()) <= DENSE_SHARE * kept.numel():
            queries, images = kept.nonzero(as_tuple=True)
            add_pairs(state, u, rows, center, weight, queries, images)
            state.dropped += (len(rows) - kept.sum(dim=1)) * math.exp(-reach)
        elif float(found.rounding.max()) > 0.5 * tolerance:
            add_all(state, u, rows.double() - center, weight)
        else:
            both.add_weighted(state, found)
    return state.mean() + center, _log_sum(state, u, weight), state.dropped / state.mass


def add_pairs(
    state: RunningMean,
    u: torch.Tensor,
    rows: torch.Tensor,
    center: torch.Tensor,
    inverse_variance: torch.Tensor,
    queries: torch.Tensor,
    images: torch.Tensor,
) -> None:
    """Adds these pairs of query and row, with weights from float64 differences."""
    step = max(1, REFINE_VALUES // u.shape[1])
    parts = list(zip(queries.split(step), images.split(step), strict=True))
    # u·z − ‖z‖²/2 as (2u − z)·z / 2: neither ‖u‖² nor ‖z‖² has to cancel.
    centered = [rows[i].double() - center for _, i in parts] if len(parts) == 1 else None
    logits = []
    for part, (q, i) in enumerate(parts):
        z = centered[part] if centered else rows[i].double() - center
        logits.append(((2 * u[q] - z) * z).sum(dim=1) * (0.5 * inverse_variance[q]))
    if not logits:
        return
    state.raise_top(state.top.scatter_reduce(0, queries, torch.cat(logits), "amax"))
    for part, (q, i) in enumerate(parts):
        z = centered[part] if centered else rows[i].double() - center
        weights = (logits[part] - state.top[q]).exp()
        state.mass.index_add_(0, q, weights)
        state.total.index_add_(0, q, z * weights[:, None])


def add_all(state: RunningMean, u: torch.Tensor, z: torch.Tensor, inverse_variance: torch.Tensor) -> None:
    """Adds all pairs of query and float64 row."""
    half = -0.5 * z.square().sum(dim=1)
    add_weighted(state, torch.addmm(half, u, z.T).mul_(inverse_variance[:, None]), z)


def add_weighted(state: RunningMean, logits: torch.Tensor, z: torch.Tensor) -> None:
    """Adds all rows z [n, d] by their logits [B, n], which are overwritten."""
    state.raise_top(logits.amax(dim=1).double())
    weights = logits.sub_(state.top.to(logits.dtype)[:, None]).exp_()
    state.mass += weights.sum(dim=1, dtype=torch.float64)
    state.total += weights @ z


def _log_sum(state: RunningMean, u: torch.Tensor, inverse_variance: torch.Tensor) -> torch.Tensor:
    """log Σ exp(−‖x − y_i‖² / (2σ²)): the logits carry ‖u‖² / (2σ²) more than that."""
    return state.top + state.mass.log() - 0.5 * u.square().sum(dim=1) * inverse_variance
