"""`PosteriorRows`: training rows made ready to be averaged again and again, by the backend that fits best."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch

from diffmem.errors import InputError
from diffmem.ops.arguments import check_shape, check_tensor
from diffmem.ops.posterior_mean import native, tensor_cores
from diffmem.ops.posterior_mean.arguments import (
    BAD_SIGMA,
    BAD_X,
    REAL,
    check_images,
    check_queries,
    check_rows,
    check_values,
)
from diffmem.ops.posterior_mean.blocked import SMALL, SupportsBlocks, posterior_mean_blocked
from diffmem.ops.posterior_mean.float32 import Float32Rows
from diffmem.ops.posterior_mean.reference import posterior_mean_reference
from diffmem.ops.posterior_mean.resident import Request, ResidentRows, fits
from diffmem.ops.registry import Backend, Op, register
from diffmem.ops.triton_ops import triton_unavailable
from diffmem.progress import Progress, silent


def _by_tensor_cores(
    x: torch.Tensor, sigma: torch.Tensor, training: SupportsBlocks, tolerance: float, center: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return posterior_mean_blocked(x, sigma, training, tolerance, center, tensor_cores.TensorCoreProducts)


# `unfit` looks at the training rows, their center, and the order they are taken in; the functions take (x, sigma,
# training, tolerance, center). `PosteriorRows` keeps what "native" and, on GPUs, "triton" and "torch" derive from rows.
OP = register(
    Op(
        "posterior_mean",
        (
            Backend(
                "triton",
                "exact 8-bit products, only of spans with weight",
                _by_tensor_cores,
                triton_unavailable,
                tensor_cores.unfit,
            ),
            Backend(
                "native",
                "integer products, bounds from principal components; small sets in float32, corrected in float64",
                posterior_mean_blocked,
                native.unavailable,
                native.unfit,
            ),
            Backend(
                "torch",
                "float32 products, corrected in float64 where these are not accurate enough",
                posterior_mean_blocked,
            ),
            Backend("reference", "every difference, in float64", posterior_mean_reference),
        ),
    )
)


class PosteriorMean(NamedTuple):
    """mean [B, d], log_sum [B] (log Σ_i exp(−‖x − y_i‖² / 2σ²)) and dropped [B], float64.

    dropped: a bound on the share of the weights' sum that was left out; where it comes from approximate scores (dense
    products in 8 bits), it is as good as their model of rounding, not a proof.
    """

    mean: torch.Tensor
    log_sum: torch.Tensor
    dropped: torch.Tensor


class ListedRows:
    """Rows [n, d] of a larger set, which are gathered only as blocks of them are asked for."""

    def __init__(self, rows: torch.Tensor, images: torch.Tensor) -> None:
        self.rows, self.images = rows, images

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.images), self.rows.shape[1]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, block: slice) -> torch.Tensor:
        return self.rows[self.images[block]]


class PosteriorRows:
    """Training rows [N, d] uint8, float32 or float64, and what the backend derives from them.

    rows: anywhere. Where `device` is a GPU with room for them they are sent there once, with their norms
        (`diffmem.ops.posterior_mean.resident`); else they are sent block by block at each call.
    order: int64 [N]: what is row 0, 1, … to those who ask is here; rows are gathered block by block then, which
        "native" does not do.
    center: [d] float64, a point in their middle, from which distances are reckoned; whole numbers for uint8 rows. It
        decides about rounding only.
    device: where queries come from and answers go. basis: leading principal components [m, d] of the rows, which
        "native" makes use of. length: of the mean row, for what a relative error is relative to (default: ‖center‖).
        impl: forces a backend. resident: whether the rows are to live on the device; None: where it is a GPU
        and they fit.
    Raises InputError where the rows are none, a center of uint8 rows is not one of whole numbers, or the backend cannot
    be used here.
    """

    def __init__(
        self,
        rows: torch.Tensor,
        center: torch.Tensor,
        device: torch.device,
        *,
        order: torch.Tensor | None = None,
        basis: torch.Tensor | None = None,
        length: float | None = None,
        impl: str | None = None,
        resident: bool | None = None,
        progress: Progress = silent,
    ):
        check_rows(rows)
        check_tensor("posterior_mean", "center", center, REAL)
        check_shape("posterior_mean", "center", center, (rows.shape[1],), f"[{rows.shape[1]}]")
        if order is not None:
            check_images(order, len(rows))
        if rows.is_floating_point() and rows.device.type == "cpu" and not bool(rows.isfinite().all()):
            raise InputError("posterior_mean: training must be finite, but holds NaN or infinity")
        if rows.dtype == torch.uint8 and not bool((center == center.round()).all()):
            raise InputError("center: must be integer-valued for uint8 rows")
        self.rows, self.order, self.center, self.device = rows, order, center.double(), device
        self.backend = OP.select(device.type, impl, rows, self.center, order)
        self.length = length = float(self.center.norm()) if length is None else length
        self.native: native.NativeRows | None = None
        if self.backend.name == "native":
            self.native = native.NativeRows(rows, self.center, length, basis, progress)
        self.float32: Float32Rows | None = None
        if self.backend.name == "torch" and device.type == "cpu" and not resident:
            self.float32 = Float32Rows(rows, self.center, length, order)
        self.resident: ResidentRows | None = None
        if self.backend.name in ("triton", "torch") and (fits(rows, device) if resident is None else resident):
            products = {"products": tensor_cores.TensorCoreProducts} if self.backend.name == "triton" else {}
            self.resident = ResidentRows(rows, self.center, device, order, **products)

    def is_quick(self, queries: int, tolerance: float, dtype: torch.dtype) -> bool:
        """Whether `quick` has a way for so many of this type."""
        if self.native is not None:
            if not self.native.small(queries):
                return False
        elif self.float32 is None:
            return False
        if dtype is torch.float32:
            return tolerance >= native.FINEST
        return dtype is torch.float64 and not self._in_float64(queries, self.count, tolerance, True)

    def _in_float64(self, queries: int, images: int, tolerance: float, wide: bool) -> bool:
        """Whether all of it is to be in float64: sums in float32 would not do, or the queries are float64 and their
        products take no more than a moment."""
        return tolerance < native.FINEST or (wide and queries * images * self.dimension <= SMALL)

    def quick(
        self, x: torch.Tensor, sigma: torch.Tensor | float, tolerance: float, unit: float, shift: float
    ) -> torch.Tensor | None:
        """The mean [B, …] of all rows alone, in x's dtype and units, by the way that takes the fewest calls; None where
        there is none. unit·x + shift is in units of the rows.

        x: [B, …] of B > 0 rows of any shape, float32 or float64, on the CPU. sigma: [B] float64, in units of the rows,
        or one for all.

        Raises:
            InputError: x or sigma is not finite, or sigma not positive.
        """
        if not self.is_quick(x.shape[0], tolerance, x.dtype):
            return None
        if self.native is not None:
            return self.native.small_means(x, sigma, tolerance, 0, self.native.count, unit, shift, details=False)[0]
        assert self.float32 is not None
        least, largest = (sigma, sigma) if isinstance(sigma, float) else (float(sigma.min()), float(sigma.max()))
        if not (least > 0 and largest < math.inf):
            raise InputError(BAD_SIGMA)
        flat = x.flatten(1)
        mean = self.float32.means(flat, sigma, tolerance, (0, self.float32.count), unit, shift, details=False)[0]
        if not math.isfinite(mean.sum().item()):
            raise InputError(BAD_X)
        return mean.view(x.shape)

    @property
    def count(self) -> int:
        """N, or the number of rows that `order` lists."""
        return len(self.rows) if self.order is None else len(self.order)

    @property
    def dimension(self) -> int:
        return self.rows.shape[1]

    def slice(self, start: int, stop: int) -> torch.Tensor | ListedRows:
        """Rows start … stop − 1, not copied."""
        if self.order is None:
            return self.rows[start:stop]
        return ListedRows(self.rows, self.order[start:stop])

    def means(
        self, requests: list[Request], tolerance: float, checks: dict[str, torch.Tensor], wide: bool = True
    ) -> list[PosteriorMean]:
        """The posterior mean of each request, after the checks of their inputs.

        wide: answers are wanted in float64, not in float32.

        checks: what is wrong where a 0-dimensional bool tensor is false. On a GPU that holds the rows they are looked
            at together with what the computation has to know: one synchronization in all.
        Raises InputError with the words of the first check that failed.
        """
        if self.resident is None:
            _require(checks, [bool(check) for check in checks.values()])
            return [self.mean(x, sigma, tolerance, images, wide) for x, sigma, images in requests]
        means, passed = self.resident.means(requests, tolerance, list(checks.values()))
        _require(checks, passed)
        return [PosteriorMean(*mean) for mean in means]

    def mean(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        tolerance: float,
        images: tuple[int, int] | torch.Tensor | None = None,
        wide: bool | None = None,
    ) -> PosteriorMean:
        """The posterior mean of x [B, d] at sigma [B], over the rows start … stop − 1, a list of rows, or all.

        tolerance: the relative error aimed at, see `posterior_mean`. wide: as in `means`; None: where x is float64.
        """
        images = (0, self.count) if images is None else images
        check_queries(x, sigma, tolerance, self.dimension, self.device)
        check_images(images, self.count)
        if self.resident is not None:
            means, _ = self.resident.means([Request(x, sigma, images)], tolerance)
            return PosteriorMean(*means[0])
        check_values(x, sigma)
        wide = x.dtype == torch.float64 if wide is None else wide
        some = len(images) if isinstance(images, torch.Tensor) else images[1] - images[0]
        exact = self._in_float64(len(x), some, tolerance, wide)
        if self.native is not None and not isinstance(images, torch.Tensor):
            result = None if exact and self.native.small(len(x)) else self.native.mean(x, sigma, tolerance, *images)
            if result is not None:
                return PosteriorMean(*result)
        if self.backend.name in ("native", "torch") and self.device.type == "cpu" and len(x) and not exact:
            if self.float32 is None:
                self.float32 = Float32Rows(self.rows, self.center, self.length, self.order, keep=False)
            found = self.float32.means(x.double(), sigma.double(), tolerance, images)
            return PosteriorMean(*cast(native.Means, found))
        if isinstance(images, torch.Tensor):
            listed = images if self.order is None else self.order[images]
            chosen: torch.Tensor | ListedRows = ListedRows(self.rows, listed)
        else:
            chosen = self.slice(*images)
        return PosteriorMean(*self.backend.function(x, sigma, chosen, tolerance, self.center))


def _require(checks: dict[str, torch.Tensor], passed: list[bool]) -> None:
    for message, good in zip(checks, passed, strict=True):
        if not good:
            raise InputError(message)
