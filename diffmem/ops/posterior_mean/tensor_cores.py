"""The two products of `diffmem.ops.posterior_mean.blocked` by the kernels of `triton_kernels`, for uint8 rows.

u is rounded to P bytes of a unit of its own for each query: what that leaves of a logit is at most unit/2·√d·‖z‖/σ²,
proven, and about unit/√12·‖z‖/σ² as a model; products are exact, so float32 comes in only after them. Two bytes do
where the tolerance is 1e-4 or more, three below.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from diffmem.ops.posterior_mean.blocked import DROPPED_SHARE, Logits, RunningMean
from diffmem.ops.posterior_mean.tiles import SPAN

COARSE = 1e-4  # tolerance from which two bytes of u do
FLOAT32 = 4 * 2.0**-24  # roundings of a float32 sum of P + 1 terms and a product, over their sizes


def unfit(rows: torch.Tensor, center: torch.Tensor, order: torch.Tensor | None) -> str | None:
    """Why the kernels cannot take rows [N, d] about this center, or None."""
    if rows.dtype != torch.uint8:
        return f"rows are {rows.dtype}, not uint8"
    if rows.shape[1] > 1 << 16:
        return f"rows of {rows.shape[1]:,} values are longer than 65,536: sums of their products may not fit 32 bits"
    if not bool(((center == center.round()) & (center >= 0) & (center <= 255)).all()):
        return "the center is not integer-valued"
    return None


@dataclass(frozen=True)
class SpanLogits(Logits):
    """Logits with the largest one, and the sum of weights relative to it, of each span of rows."""

    def largest(self) -> torch.Tensor:
        return self.kept[0].amax(dim=1)


class TensorCoreProducts:
    """`Products` on a GPU (or in Triton's interpreter)."""

    def __init__(self, u: torch.Tensor, weight: torch.Tensor, center: torch.Tensor, tolerance: float) -> None:
        self.weight, self.center = weight, center.float()
        self.lengths = u.norm(dim=1)
        self.reach = math.log(1 / (DROPPED_SHARE * tolerance))
        count = 2 if tolerance >= COARSE else 3
        # The largest value that has its rounding: 127 followed by bytes of 127.
        largest = 127 * sum(256**place for place in range(count))
        self.unit = u.abs().amax(dim=1).clamp(min=1e-30) / largest
        left = (u / self.unit[:, None]).round_()
        planes: list[torch.Tensor] = []
        for _ in range(count):  # digits −128 … 127, the lowest first
            digit = (left + 128).remainder(256) - 128
            left = (left - digit) / 256
            planes.insert(0, digit)
        digits = torch.stack(planes, dim=1)
        self.planes = digits.to(torch.int8)
        self.shifts = (digits @ (center - 128)).to(torch.int32)
        self.units = torch.stack([self.unit * 256**place for place in reversed(range(count))], dim=1).float()

    def logits(self, rows: torch.Tensor, squared: torch.Tensor | None = None) -> Logits:
        from diffmem.ops.posterior_mean.triton_kernels import launch_scores  # imports triton

        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        if squared is None:
            # Sums of squares of whole numbers below 256: exact in float32 up to 2^24, so in float64.
            squared = (rows.float() - self.center).square_().sum(dim=1, dtype=torch.float64)
        longest = squared.max().sqrt()
        values, tops, masses = launch_scores(
            self.planes, self.shifts, self.units, self.weight.float(), rows, 0.5 * squared.float()
        )
        arithmetic = FLOAT32 * (self.lengths + longest) * longest
        proven = (0.5 * math.sqrt(rows.shape[1]) * self.unit * longest + 4 * arithmetic) * self.weight
        modeled = (self.unit / math.sqrt(12) * longest + 0.25 * arithmetic) * self.weight
        return SpanLogits(values, proven, modeled, rows, (tops, masses))

    def add_weighted(self, state: RunningMean, found: Logits) -> None:
        from diffmem.ops.posterior_mean.triton_kernels import launch_weighted_sums  # imports triton

        rows, (tops, masses) = found.rows, found.kept
        state.raise_top(tops.amax(dim=1).double())
        share = masses.double() * (tops.double() - state.top[:, None]).exp()
        # A span whose images together hold less than a share of the tolerance is left out. What is so small may have
        # other spans in its tile that are read; the bound counts it as dropped anyway.
        kept = share * len(rows) / SPAN > math.exp(-self.reach) * share.sum(dim=1, keepdim=True)
        top = state.top.float()
        sums = launch_weighted_sums(found.values, top, kept, rows, self.center)
        # Weights were taken relative to the float32 number nearest to the top.
        shrink = (top.double() - state.top).exp()
        state.mass += share.sum(dim=1)
        state.dropped += (share * ~kept).sum(dim=1)
        state.total += sums * shrink[:, None]
