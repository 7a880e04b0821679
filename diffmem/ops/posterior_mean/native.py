"""The posterior mean of uint8 rows by integer products (csrc/posterior_mean): dense at high noise, else a search.

With u = x − c and z_i = y_i − c for a center c of whole numbers, the logit of image i is, but for a constant of the
query, s_i = (u·z_i − ‖z_i‖²/2) / σ². The machine offers exact products of bytes with bytes at four times float32's rate
(AVX-512 with VNNI) or with numbers of 16 bits at twice that (AVX2): digits, in what follows. It offers bounds from
principal components, and float64 for listed pairs. P are m orthonormal
components (within ε = ‖PPᵀ − 1‖), the code of an image ẑ ≈ Pz in bytes, one scale per component, and ρ(z)² = ‖z‖² −
‖Pz‖².

**Search.** ŝ_i = (q·ẑ_i − ‖z_i‖²/2) / σ² with q ≈ Pu in bytes, group of components by group, is one product over m
bytes an image. As u·z = Pu·Pz + u·(1 − PᵀP)z, and 1 − PᵀP is within ε of a projection,

    |u·z_i − q·ẑ_i| ≤ ‖Pu‖·max‖Pz − ẑ‖ + Σ_groups ‖Pu − q‖·max‖ẑ‖ + ρ(u)·ρ(z_i) + ε‖u‖‖z_i‖        (1)

(ρ² with ε‖·‖² added, and 2^-24 of all magnitudes for every rounding to float32). It begins with 64 components, which do
for σ < 0.5, and takes more until few images are left. The exact logit of the image of the largest ŝ is a lower
bound on the largest; only images whose upper bound by (1) comes within Δ = ln(N/ε') of it can hold more than ε'/N of
the mass. These, few, are computed in float64. What is left out holds at most N·exp(−Δ): proven.

**Dense.** u is rounded to one digit or two, u = q + δ, and q·z is exact. What δ does to the logits is made good where
it matters: Pδ·ẑ is another product over the leading components; the rest, at most ρ(δ)·ρ(z), has the direction of
rounding noise. Weights above `cap` times the average are taken out and computed in float64 (by Markov's inequality
N/cap images at most; a fifth of that in practice). The others are rounded to bytes (and what that leaves, to bytes
again, summed over components where these will do; with AVX2 to 15 bits at once): a larger cap leaves fewer images to
float64 and asks for finer products. Nothing is dropped; the error is that of the roundings. Taken as independent, with
λ the variances of the components, R² = E‖z‖², S = min(cap, exp(R²/σ²)), tail(m) = E ρ(z)² and
‖D‖² = ‖mean‖² + Σ λ²/(λ + σ²):

    first product:   rms δ / σ² · (√tail(m) · √(S/N) · R + √Σ_{k>m} λ_k²) / ‖D‖
    second product:  cap/256·√(1/4N) · √tail(m') / ‖D‖;  15 bits: cap/2^15·√(1/12N) · R / ‖D‖          (2)

This is a model and no bound; single queries exceed both lines by a factor of up to six. So the plan is the cheapest
that keeps them below shares of the tolerance (FIRST_SHARE, SECOND_SHARE) that leave room for that. Fitted on seeds
0–255 of CIFAR-10 (JPEG), and checked on 64 other seeds each of sets of 8,000, 20,000 and 50,000 of its images: the
largest error of 12 noise levels from 80 down was half the tolerance, and 0.65 of it on 192 seeds with AVX2 (σ = 8.4).

Where the search gave up but the mass is with few images (σ around 3), the product's scores show which, and the second
product is not made.

**Small sets** have no codes: their components take longer to find than they would save. There, for up to three queries,
and where no plan is good enough or float32 costs less, one call of the core does all of it in float32 (`small_means`;
csrc/posterior_mean/posterior_mean.h says how it keeps to the tolerance). What counts is what is not done: no copy of
the set (cdist makes one per call), no pass over the distances but the exponential, no operation of PyTorch, of which
cdist, softmax and matmul are a dozen: 53 µs for 500 images of 64 values, against 27 for this.

Floors, CIFAR-10 (N = 50,000, d = 3072), 256 queries, 2 cores of 462 Gop/s in 8 bits and 116 Gflop/s in float32: a
product over all bytes is 79 Gop, 85 ms (float32: 340 ms); reading the images once, 153 MB, 8 ms. Predicted before it
was written: dense calls 2.1 (tolerance 1e-3) to 3.4 (1e-5) such products, 0.25 and 0.35 s; search 0.06 s; so 5 times
faster than two float32 products and a softmax at 1e-5, and 8 times at 1e-3, over the 35 calls of 18 steps. Measured
(benchmarks/results/optimum.*.csv): dense calls 0.25–0.36 and 0.43–0.54 s, search 0.02–0.19 s; 5.2 and 7.4 times
faster. With AVX2 (315 of 374 Gop/s that 16-bit digits reach in a loop; 230 Gop/s a core in theory) a product is 250 ms,
and both tolerances need two: 0.55–0.62 and 0.62–0.85 s, search 0.03–0.26 s.

Tried: components beyond 1024 (JPEG leaves 1536 dimensions) make the search prune a little more and the second bytes'
sum short; one scale for all components costs the search its sharpness; rounding weights without a dither loses those
below half a unit, most of them at σ ≈ 10 (in one byte an error of 1.5e-3 instead of 3e-4; in two, of 7e-6 instead of
1e-6); a cap of 6 everywhere put 3 % of the pairs at σ ≈ 13 into float64, half of that call's time.
"""

from __future__ import annotations

import itertools
import math
from array import array
from dataclasses import dataclass
from typing import cast

import torch

from diffmem.errors import InputError
from diffmem.ops.posterior_mean.arguments import BAD_SIGMA, BAD_X
from diffmem.ops.posterior_mean.blocked import DROPPED_SHARE, RunningMean
from diffmem.ops.registry import native_kernel_unavailable, native_module
from diffmem.progress import Progress, silent

FIRST_SHARE, SECOND_SHARE = 1 / 24, 1 / 6  # of the tolerance, for the model's errors of the two products
SMALL_COST = 8.0  # of all of it in float32, in units of a product over all bytes
HUGE = 1e30  # logits beyond which float32 may overflow
FINEST = 2e-6  # tolerance below which sums of weighted rows in float32 are not exact enough
SMALL_SHARE = 1 / 8  # of the tolerance, for the model's error of small sets
EXACT_WORK, QUICK_WORK = 1 << 21, 1 << 17  # multiplications for which float64 is as good as free, and for a quick call
FEW = 3  # queries that make products of vectors rather than of matrices: they are answered as those of small sets
FLOAT_SHARE = 1 / 8  # and for the rounding of scores in float32, where the first product leaves less than that
CAPS = (3.0, 6.0, 12.0, 24.0, 96.0)  # times the average weight: heavier images are computed exactly
PAIR_COST = 100  # of a pair in float64, in units of the same pair's share of a product over all bytes (AVX2: half)
DOUBTFUL_SHARE = 1 / 8  # of the mass: where less remains, approximate weights are compared with approximate ones
LANES = 16  # queries in a vector
INFINITY = torch.tensor(math.inf)
CHUNK = 256  # components of which a product may be rounded to float32, kPixelChunk of csrc/posterior_mean
BLOCK_VALUES = 1 << 25
CODE_BYTES = 1 << 31  # of all images' components in bytes, which are in memory even where images are not
SCORE_BYTES = 1 << 28
LEVELS = (64, 192, 512, 768)  # components after which the search looks how many images are left
LEVEL_SHARE = 1 / 500  # of the pairs: with fewer left the search goes no further
MAX_CANDIDATE_FRACTION = 0.92  # share of the pairs: with more of them left after the first look it stops
SEARCH_SHARE = 1 / 24  # of the pairs: with more of them left the search gives up
SPARSE_SHARE = 1 / 100  # of the pairs: fewer cost less in float64 than a product of bytes (of 16 bits: twice as many)
SEARCH_BELOW = 1 / 4  # noise level over R from which down the search is tried
GROUP_RATIO = 3.0  # of the scales of the components in one group
FINE = 256  # components whose part of δ is rounded to two bytes: its first byte would leave a hundredth of their error
PLANS = 1024  # that are remembered
LARGEST_ROW = 65536  # values whose products 32 bits can add up, kLargestSum of csrc/posterior_mean
ENERGIES = (0, 64, 128, 256, 512, 768, 1024, 1536, 2048, 4096)


def unavailable(device_type: str) -> str | None:
    """Why 8-bit products cannot be had on `device_type`, or None."""
    return native_kernel_unavailable(device_type, "posterior", "AVX2 or NEON")


@dataclass(frozen=True)
class Plan:
    """How the dense products are done. planes: digits of u. corrected: components that make good what they leave.
    cap: times the average weight, above which images are computed exactly. low: components over which the second byte
    of the weights is summed; None: there is none, as where weights have 15 bits."""

    planes: int
    corrected: int
    cap: float
    low: int | None


@dataclass(frozen=True)
class Digit:
    """What the core multiplies rows by: whole numbers −largest … largest of 8 bits, or of 16 where that costs no more
    (AVX2). Weights are from 0 on."""

    bits: int
    largest: int
    weight: torch.dtype
    largest_weight: int

    @property
    def base(self) -> int:
        return 2 * self.largest + 1

    @property
    def itemsize(self) -> int:
        return self.bits // 8


DIGITS = {8: Digit(8, 127, torch.uint8, 255), 16: Digit(16, 32767, torch.int16, 32767)}


Means = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # mean [B, d], log-sum-exp [B], dropped share [B]


class Scratch:
    """Memory that calls use one after the other: pages that the system gives out again for each cost as much as a
    product over a hundred components. Calls that run at the same time get memory of their own."""

    def __init__(self) -> None:
        self.free: list[torch.Tensor] = []

    def take(self, size: int) -> torch.Tensor:
        """`size` bytes, uint8, of any content; to be given back."""
        try:
            found = self.free.pop()
        except IndexError:
            return torch.empty(size, dtype=torch.uint8)
        return found if len(found) >= size else torch.empty(size, dtype=torch.uint8)

    def give(self, memory: torch.Tensor) -> None:
        self.free.append(memory)


class BlockSums:
    """Σ rows [k] float64 over the images of a block of uint8 rows [N, k]; kept for the block asked for last."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows
        self.last: tuple[slice, torch.Tensor] | None = None

    def __call__(self, block: slice) -> torch.Tensor:
        if self.last is None or self.last[0] != block:
            step = max(1, BLOCK_VALUES // self.rows.shape[1])
            parts = (part.sum(dim=0, dtype=torch.int64) for part in self.rows[block].split(step))
            self.last = block, sum(parts, torch.zeros(self.rows.shape[1], dtype=torch.int64)).double()
        return self.last[1]


class Codes:
    """Principal components of rows in bytes.

    p [m, d] float64; scale [m]: of a code's unit; bytes uint8 [N, m], Pz ≈ scale·(bytes − 128); groups: (begin, end,
    largest ‖ẑ‖ in units of the scale) of components of like scale. For each of `levels`, which are numbers of leading
    components: rho float32 [levels, N], ρ(z) rounded up, and errors, the largest ‖Pz − ẑ‖.
    """

    def __init__(self, rows: torch.Tensor, center: torch.Tensor, p: torch.Tensor, progress: Progress) -> None:
        p = p[: max(LANES, CODE_BYTES // len(rows))]
        self.p = torch.linalg.qr(p.double().T).Q.T.contiguous()
        n, m = len(rows), len(self.p)
        self.defect = float((self.p @ self.p.T - torch.eye(m, dtype=torch.float64)).abs().sum(dim=1).max()) + 1e-12
        self.levels = [*(level for level in LEVELS if level < m), m]
        parts = list(zip([0, *self.levels], self.levels, strict=False))
        middle = center.double()
        self.bytes = torch.empty(n, m, dtype=torch.uint8)
        self.rho = torch.empty(len(self.levels), n)
        step = max(1, BLOCK_VALUES // rows.shape[1])
        blocks = [slice(start, min(n, start + step)) for start in range(0, n, step)]
        known = torch.empty(n, m) if 4 * n * m <= CODE_BYTES else None  # else everything is computed twice
        largest = torch.zeros(m, dtype=torch.float64)
        energy = torch.zeros(m, dtype=torch.float64)
        for number, block in enumerate(blocks):
            progress("components of training images", number, 2 * len(blocks))
            # In float64: the rounding of float32 products, as far as it can be proven, would be the largest part of ρ.
            z = rows[block].double().sub_(middle)
            coordinates = z @ self.p.T
            if known is not None:
                known[block] = coordinates
            largest = torch.maximum(largest, coordinates.abs().amax(dim=0))
            energy += coordinates.square_().sum(dim=0)
            inside = torch.stack([coordinates[:, begin:end].sum(dim=1) for begin, end in parts]).cumsum(dim=0)
            squared = z.square_().sum(dim=1)
            outside = (squared - inside).clamp(min=0) + (self.defect + 1e-9) * squared
            self.rho[:, block] = outside.sqrt().float() * (1 + 1e-6)
        self.energy = energy / n
        self.scale = (largest / 127).clamp(min=1e-12)
        errors = torch.zeros(len(self.levels), dtype=torch.float64)
        for number, block in enumerate(blocks):
            progress("components of training images", len(blocks) + number, 2 * len(blocks))
            coordinates = (rows[block].double() - middle) @ self.p.T if known is None else known[block].double()
            units = (coordinates / self.scale).round_()
            self.bytes[block] = (units + 128).to(torch.uint8)
            gap = (coordinates - units.mul_(self.scale)).square_()
            gap = torch.stack([gap[:, begin:end].sum(dim=1) for begin, end in parts]).cumsum(dim=0).sqrt_()
            # Coordinates may have been rounded to float32 in between.
            size = coordinates.norm(dim=1)
            errors = torch.maximum(errors, (gap + 2.0**-23 * size).amax(dim=1))
        progress("components of training images", 2 * len(blocks), 2 * len(blocks))
        self.errors = errors.tolist()
        self.groups = self._groups()
        self.sums = BlockSums(self.bytes)

    def _groups(self) -> list[tuple[int, int, float]]:
        order = self.scale.tolist()
        groups, begin = [], 0
        for k in range(4, len(order) + 4, 4):
            part = order[begin : min(k + 4, len(order))]
            if k >= len(order) or k in self.levels or max(part) > GROUP_RATIO * min(part):
                end = min(k, len(order))
                longest = max(
                    float((block[:, begin:end].float() - 128).norm(dim=1).max()) for block in self.bytes.split(16384)
                )
                groups.append((begin, end, longest * (1 + 1e-6)))
                begin = end
            if begin >= len(order):
                break
        return groups


class NativeRows:
    """uint8 rows [N, d] and, where `basis` [m, d] is given, the codes of their principal components.

    length: of the mean of the rows, as far as relative errors are concerned (its distance from what counts as 0).
    """

    def __init__(
        self,
        rows: torch.Tensor,
        center: torch.Tensor,
        length: float,
        basis: torch.Tensor | None,
        progress: Progress = silent,
    ):
        self.length = length
        self.count, self.d = rows.shape
        self.rows = rows if rows.stride(1) == 1 else rows.contiguous()
        self.center = center.to(torch.uint8)
        middle = center.double()
        step = max(1, BLOCK_VALUES // rows.shape[1])
        self.half_norms = torch.cat(
            [block.double().sub_(middle).square_().sum(dim=1) / 2 for block in self.rows.split(step)]
        )
        self.narrow_half_norms = self.half_norms.float()
        self.longest = math.sqrt(2 * float(self.half_norms.max()))
        self.spread = max(math.sqrt(2 * float(self.half_norms.mean())), 1e-6)  # R
        self.codes = None if basis is None else Codes(self.rows, middle, basis, progress)
        self.plans: dict[tuple[float, float, int, int], Plan | None] = {}
        self.sums = BlockSums(self.rows)
        self.scratch = Scratch()
        self.core = native_module()
        self.byte_rows = self.byte_rows_from(0)

    def mean(self, x: torch.Tensor, sigma: torch.Tensor, tolerance: float, start: int, stop: int) -> Means | None:
        """Mean, log-sum-exp and dropped share as of `posterior_mean_blocked`; None where no plan is good enough."""
        if not len(x):
            return None
        if self.small(len(x)):
            x = x.double()
            return cast(Means, self.small_means(x, sigma.double(), tolerance, start, stop))
        u = x.double() - self.center.double()
        count = len(u)
        if float(u.abs().max()) * self.d * self.longest > HUGE * min(1.0, float(sigma.min()) ** 2):
            return None
        plans = {level: self.plan(level, tolerance, stop - start) for level in sigma.unique().tolist()}
        mean = torch.empty_like(u)
        log_sum, dropped = torch.empty(count, dtype=torch.float64), torch.empty(count, dtype=torch.float64)
        most = max(LANES, SCORE_BYTES // (4 * self.core.posterior_largest_sum) // LANES * LANES)
        for search, plan in {self._key(level, plan) for level, plan in plans.items()}:
            same = [level for level in plans if self._key(level, plans[level]) == (search, plan)]
            chosen = torch.isin(sigma, torch.tensor(same, dtype=sigma.dtype)).nonzero().flatten()
            for part in chosen.split(most):
                columns = -(-len(part) // LANES) * LANES
                longest = min(stop - start, self.core.posterior_largest_sum)
                memory = self.scratch.take(6 * (longest + 4) * columns)
                state = _Call(self, u[part], sigma[part], tolerance, plan, memory).run(start, stop, search)
                self.scratch.give(memory)
                if state is None:  # no product of digits is exact enough
                    if tolerance < FINEST or 4 * columns * (stop - start) > SCORE_BYTES:
                        return None
                    found = self.small_means(x[part].double(), sigma[part].double(), tolerance, start, stop)
                    mean[part], log_sum[part], dropped[part] = found[0] - self.center, found[1], found[2]
                    continue
                mean[part] = state.mean()
                squared = u[part].square().sum(dim=1)
                log_sum[part] = state.top + state.mass.log() - squared / (2 * sigma[part].square())
                dropped[part] = state.dropped / state.mass
        return mean + self.center.double(), log_sum, dropped

    def small(self, queries: int) -> bool:
        """Whether all of it at once, by `small_means`, is the way."""
        return self.codes is None or queries <= FEW

    def small_means(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        tolerance: float,
        start: int,
        stop: int,
        unit: float = 1.0,
        shift: float = 0.0,
        details: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Mean in x's dtype and shape, log-sum-exp and dropped share, by one call of the core.

        x: [B, …], d values each, float32 or float64, unit·x + shift being in units of the rows. sigma: [B] float64, in
        these units, or one for all. details: without them the latter two are None.

        Raises:
            InputError: x or sigma is not finite, or sigma not positive.
        """
        x, count, share = x.contiguous(), x.shape[0], SMALL_SHARE * tolerance / self.spread
        if isinstance(sigma, float):
            levels = array("d", [sigma]) * count
            allowed = array("d", [share * self._length(sigma) if sigma > 0 else share]) * count
        else:
            levels = array("d", sigma.tolist())
            allowed = array("d", [share * self._length(level) if level > 0 else share for level in levels])
        work = count * (stop - start) * self.d
        exact = count <= FEW or work <= (EXACT_WORK if details or x.dtype == torch.float64 else QUICK_WORK)
        mean = torch.empty_like(x)
        log_sum = dropped = None
        if details:
            log_sum, dropped = torch.empty(2, count, dtype=torch.float64)
        wrong = self.core.posterior_small_means(
            self.byte_rows if start == 0 else self.byte_rows_from(start), stop - start,
            self.half_norms.data_ptr() + 8 * start,
            self.spread, self.longest, x.data_ptr(), x.dtype == torch.float64, count, unit, shift,
            levels.buffer_info()[0], allowed.buffer_info()[0],
            math.log((stop - start) / (DROPPED_SHARE * tolerance)), exact, mean.data_ptr(),
            log_sum.data_ptr() if log_sum is not None else 0, dropped.data_ptr() if dropped is not None else 0,
            torch.get_num_threads(),
        )  # fmt: skip
        if wrong:
            raise InputError(BAD_X if wrong == 1 else BAD_SIGMA)
        return mean, log_sum, dropped

    def byte_rows_from(self, start: int):
        rows = self.rows[start:]
        stride = rows.stride(0) if len(rows) > 1 else rows.shape[1]
        return self.core.PosteriorRows(rows.data_ptr(), stride, rows.shape[1], self.center.data_ptr())

    def _key(self, sigma: float, plan: Plan | None) -> tuple[bool, Plan | None]:
        return sigma < SEARCH_BELOW * self.spread, plan

    def plan(self, sigma: float, tolerance: float, images: int) -> Plan | None:
        """The cheapest plan whose model error (2) is small enough, None where there is none."""
        key = sigma, tolerance, images, self.core.posterior_digit_bits()
        if key not in self.plans:
            if len(self.plans) >= PLANS:
                self.plans.clear()
            self.plans[key] = self._plan(*key[:3], DIGITS[key[3]])
        return self.plans[key]

    def _plan(self, sigma: float, tolerance: float, images: int, digit: Digit) -> Plan | None:
        d, components = self.rows.shape[1], len(self.codes.scale)
        choices = sorted({m for m in (*ENERGIES, components) if m <= components})
        rounding = max(4 * sigma, self.longest / math.sqrt(d)) / digit.largest / math.sqrt(12)
        length = self._length(sigma)
        tails = {m: self._tail(m) for m in choices}
        best, least = None, math.inf
        for cap in CAPS:
            concentration = min(cap, math.exp(min(50.0, (self.spread / sigma) ** 2)))
            first, second = None, None
            for planes, corrected in itertools.product((1, 2), choices):
                tail, variances = tails[corrected]
                noise = rounding / digit.base ** (planes - 1) / sigma**2
                error = noise * (math.sqrt(tail * concentration / images) * self.spread + variances) / length
                if planes * digit.itemsize > 2:  # beside which the rounding of the float32 scores counts
                    score = (2 + self.spread / (2 * sigma)) * self.spread / sigma
                    narrow = 2.0**-24 * score * math.sqrt(concentration / images) * self.spread / length
                    error += narrow * FIRST_SHARE / FLOAT_SHARE
                cost = planes + (corrected + (min(corrected, FINE) if digit.bits == 8 else 0)) / d
                if error < FIRST_SHARE * tolerance and (first is None or cost < first[0]):
                    first = cost, planes, corrected
            # Rounding up or down by a dither has up to three times the variance of rounding to the nearest, as is done
            # with weights of 15 bits but for the least.
            variance = 1 / 4 if digit.bits == 8 else 1 / 12
            unit = cap * math.sqrt(variance / images) / length / (digit.largest_weight + 1)
            for low in (None, *choices[1:], d) if digit.bits == 8 else (None,):
                left = self.spread if low is None else math.sqrt(tails[low][0]) if low < d else self.spread / 256
                if unit * left < SECOND_SHARE * tolerance:
                    second = 1.0 if low is None else 1.1 + low / d, low
                    break
            if first is None or second is None:
                continue
            cost = first[0] + second[0] + PAIR_COST / digit.itemsize * self._heavy(sigma, cap)
            if cost < least:
                best, least = Plan(first[1], first[2], cap, second[1]), cost
        # Products of float32, which take four times what those of bytes take, need no plan.
        return best if least < SMALL_COST / digit.itemsize else None

    def _heavy(self, sigma: float, cap: float) -> float:
        """About which share of the images has more than `cap` times the average weight.

        Of logits that are normal with variance τ² = Σ λ(λ + σ²)/σ⁴ it is Φ(−ln cap/τ − τ/2). Their tail being what
        real logits do not have where few images hold the mass, it is taken not to fall again beyond its maximum.
        """
        energy = self.codes.energy
        spread = math.sqrt(float((energy * (energy + sigma**2)).sum())) / sigma**2
        spread = min(spread, math.sqrt(2 * math.log(cap)))
        return math.erfc((math.log(cap) / spread + spread / 2) / math.sqrt(2)) / 2

    def _length(self, sigma: float) -> float:
        """About how long results are: of Gaussian data with these variances, ‖D‖² = ‖mean‖² + Σ λ²/(λ + σ²)."""
        if self.codes is None:
            energy = self.spread**2 / 2
            return math.sqrt(self.length**2 + energy**2 / (energy + sigma**2))
        spectrum = self.codes.energy
        return math.sqrt(self.length**2 + float((spectrum.square() / (spectrum + sigma**2)).sum()))

    def _tail(self, components: int) -> tuple[float, float]:
        """Mean energy beyond the leading components, and the root of the sum of the squared variances there."""
        energy = self.codes.energy
        beyond = max(self.spread**2 - float(energy.sum()), 0.0)
        rest = energy[components:]
        coarse = float(self.codes.scale[:components].square().sum()) / 12  # of the leading ones, by their bytes
        return float(rest.sum()) + beyond + coarse, math.sqrt(
            float(rest.square().sum()) + beyond**2 / max(1, self.rows.shape[1] - len(energy))
        )


class _Call:
    """One batch of queries u [B, d] float64, sigma [B]. memory: 6 bytes for each pair of an image of a block, padded to
    whole fours, and a query, padded to whole vectors."""

    def __init__(
        self,
        rows: NativeRows,
        u: torch.Tensor,
        sigma: torch.Tensor,
        tolerance: float,
        plan: Plan | None,
        memory: torch.Tensor,
    ):
        self.memory = memory
        self.data, self.core, self.u, self.tolerance, self.plan = rows, rows.core, u.contiguous(), tolerance, plan
        self.count, self.d = u.shape
        self.columns = -(-self.count // LANES) * LANES
        self.weight = 1 / sigma.double().square()
        self.threads = torch.get_num_threads()
        self.digit = DIGITS[self.core.posterior_digit_bits()]
        self.lengths = u.norm(dim=1)
        self.state = RunningMean(self.count, self.d, u.device)

    def run(self, start: int, stop: int, search: bool) -> RunningMean | None:
        self.reach = math.log((stop - start) / (DROPPED_SHARE * self.tolerance))
        for first in range(start, stop, self.core.posterior_largest_sum):
            block = slice(first, min(stop, first + self.core.posterior_largest_sum))
            if search and self._search(block):
                continue
            if self.plan is None:
                return None
            self._dense(block, search)
        return self.state

    # Search

    def _search(self, block: slice) -> bool:
        """Adds the images of this block that can hold mass; False, with nothing done, where they are too many."""
        codes, n = self.data.codes, block.stop - block.start
        squared, known = self.lengths.square(), self.state.top
        inside, rounding = torch.zeros_like(squared), torch.zeros_like(squared)
        begin = additions = 0
        for number, level in enumerate(codes.levels):
            coordinates = self.u @ codes.p[begin:level].T
            groups = [group for group in codes.groups if begin <= group[0] < level]
            terms, error = self._code_terms(coordinates, block, groups)
            additions += sum(-(-(end - first) // CHUNK) for first, end, _ in groups)
            scores = self._scores(terms, block, add=number > 0)
            inside, rounding, begin = inside + coordinates.square().sum(dim=1), rounding + error, level
            rho = (squared * (1 + codes.defect) - inside).clamp(min=0).sqrt() + 1e-9 * self.lengths
            fixed = inside.sqrt() * codes.errors[number] + rounding + codes.defect * self.lengths * self.data.longest
            fixed += 2.0**-24 * (additions + 4) * (self.lengths + self.data.longest) * self.data.longest
            where = self._top(scores)[1]
            best = self._logits(torch.arange(self.count + 1), where.to(torch.int32), block)
            known = torch.maximum(known, best)
            share = SEARCH_SHARE if level == codes.levels[-1] else LEVEL_SHARE
            total, pairs = self._select(
                scores,
                known - self.reach - fixed * self.weight,
                rho * self.weight,
                codes.rho[number, block],
                int(share * self.count * n),
            )
            if pairs is not None:
                self._add_pairs(*pairs, block)
                return True
            if total > MAX_CANDIDATE_FRACTION * self.count * n:
                break
        return False

    def _add_pairs(self, starts: torch.Tensor, images: torch.Tensor, block: slice) -> None:
        """Adds listed pairs by their exact logits, those without weight left out."""
        logits = self._logits(starts, images, block)
        column = torch.repeat_interleave(torch.arange(self.count), starts.diff())
        top = torch.full((self.count,), -math.inf, dtype=torch.float64).scatter_reduce(0, column, logits, "amax")
        self.state.raise_top(top)
        kept = logits >= self.state.top[column] - self.reach
        column, logits = column[kept], logits[kept]
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(column, minlength=self.count).cumsum(0)])
        weights = (logits - self.state.top[column]).exp()
        self.state.mass += torch.zeros_like(self.state.mass).index_add_(0, column, weights)
        self.state.total += self._sums(weights, starts, images[kept], block)
        self.state.dropped += (block.stop - block.start - starts.diff()) * math.exp(-self.reach)

    # Dense

    def _dense(self, block: slice, concentrated: bool) -> None:
        plan, codes, n = self.plan, self.data.codes, block.stop - block.start
        terms, left = self._pixel_terms(block)
        if plan.corrected:
            coordinates = left @ codes.p[: plan.corrected].T.float()
            groups = [(b, min(e, plan.corrected), size) for b, e, size in codes.groups if b < plan.corrected]
            terms += self._code_terms(coordinates.double(), block, groups, FINE)[0]
        scores = self._scores(terms, block)
        top = self._top(scores)[0]
        mass = self._mass(scores, top)
        pairs = None
        if concentrated:  # so much that the images that matter may be few
            limit = torch.minimum(top.double(), top.double() + (self.tolerance * mass / n).log()).float()
            share = self.digit.itemsize * SPARSE_SHARE
            pairs = self._select(scores, limit.nextafter(INFINITY).double(), None, None, int(share * n * self.count))[1]
        if pairs is None:
            limit = torch.minimum(top.double(), top.double() + (plan.cap * mass / n).log()).float()
            pairs = self._select(scores, limit.nextafter(INFINITY).double(), None, None, n * self.count)[1]
        starts, images = pairs
        logits = self._logits(starts, images, block)
        column = torch.repeat_interleave(torch.arange(self.count), starts.diff())
        reference = top.double().scatter_reduce(0, column, logits, "amax")
        self.state.raise_top(reference)
        weights = (logits - self.state.top[column]).exp()
        self.state.mass.index_add_(0, column, weights)
        total = self._sums(weights, starts, images, block)
        # What remains, where it is anything.
        heavy = torch.zeros_like(mass).index_add_(0, column, weights) * (self.state.top - top.double()).exp()
        light = (mass - heavy).clamp(min=0)
        doubtful = light < DOUBTFUL_SHARE * mass  # where exact weights less approximate ones may hide what remains
        some = doubtful[column].nonzero().flatten()
        approximate = (scores[images[some].long(), column[some]] - top[column[some]]).double().exp()
        listed = torch.zeros_like(mass).index_add_(0, column[some], approximate)
        light = torch.where(doubtful, (mass - listed).clamp(min=0), light)
        chosen = (light > DROPPED_SHARE * self.tolerance * mass).nonzero().flatten().to(torch.int32)
        if len(chosen):
            some = chosen.long()
            factor = (limit.double() - self.state.top)[some].exp()
            light_mass, light_total = self._rounded_sums(scores, limit, chosen, block)
            self.state.mass[some] += factor * light_mass
            total[some] += factor[:, None] * light_total
        left_out = torch.ones(self.count, dtype=torch.bool)
        left_out[chosen.long()] = False
        self.state.dropped += left_out * light * (top.double() - self.state.top).exp()
        self.state.total += total

    def _rounded_sums(
        self, scores: torch.Tensor, limit: torch.Tensor, chosen: torch.Tensor, block: slice
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Σ ŵ and Σ ŵ·z over the images below the limit, ŵ = exp(s − limit) rounded, for the chosen queries."""
        n, count, low = block.stop - block.start, len(chosen), self.plan.low
        stride = 4 * -(-n // 4)
        part = self.memory[4 * n * self.columns :]
        high = part[: self.digit.itemsize * count * stride].view(self.digit.weight).view(count, stride)
        low_bytes = part[count * stride : 2 * count * stride].view(count, stride) if low is not None else None
        sums, high_sums = torch.empty(count, dtype=torch.int64), torch.empty(count, dtype=torch.int64)
        limits = self._padded(limit)
        self.core.posterior_round_weights(
            scores.data_ptr(), n, self.columns, limits.data_ptr(), chosen.data_ptr(), count, high.data_ptr(),
            0 if low_bytes is None else low_bytes.data_ptr(), sums.data_ptr(), high_sums.data_ptr(), self.threads,
        )  # fmt: skip
        offset = 128 - self.data.center.double()
        total = self._weighted(self.data.rows[block], high) + high_sums.double()[:, None] * offset
        if low_bytes is None:
            return sums.double() / self.digit.largest_weight, total / self.digit.largest_weight
        total *= 256
        if low == self.d:
            rows = self.data.rows[block]
            part = self._weighted(rows, low_bytes) - 128 * (self.data.sums(block) - 128 * n)
            total += part + (sums - 256 * high_sums).double()[:, None] * offset
        else:
            codes = self.data.codes.bytes[block]
            part = self._weighted(codes, low_bytes, low)
            part -= 128 * (self.data.codes.sums(block)[:low] - 128 * n)
            total += ((part * self.data.codes.scale[:low]).float() @ self.data.codes.p[:low].float()).double()
        return sums.double() / 65280, total / 65280

    # Terms

    def _pixel_terms(self, block: slice) -> tuple[list, torch.Tensor]:
        """Products of the rows with u rounded to `planes` digits, and what that leaves of u [B, d], float32."""
        rows, planes, digit = self.data.rows[block], self.plan.planes, self.digit
        largest = self.u.abs().amax(dim=1).clamp(min=1e-30)
        # The largest number that has its rounding: all digits the largest.
        unit = largest / (digit.largest * sum(digit.base**place for place in range(planes)))
        left = values = (self.u / unit[:, None]).round_()
        digits = []
        for _ in range(planes - 1):  # the lowest first
            part = (left + digit.base // 2).remainder_(digit.base).sub_(digit.base // 2)
            digits.append(part)
            left = (left - part).div_(digit.base)
        digits.append(left)
        terms = [
            self._term(rows, self.d, part, float(digit.base) ** place * unit, self.data.center)
            for place, part in reversed(list(enumerate(digits)))
        ]
        return terms, (self.u - values * unit[:, None]).float()

    def _code_terms(
        self,
        coordinates: torch.Tensor,
        block: slice,
        groups: list[tuple[int, int, float]],
        fine: int = 0,
    ) -> tuple[list, torch.Tensor]:
        """Products of the codes with coordinates rounded to digits, and a bound on what that changes.

        coordinates: [B, components], those of the groups, which follow one another. fine: groups that begin before
        this component have their coordinates rounded to two bytes, where digits have one.
        """
        codes, first = self.data.codes, groups[0][0]
        if self.digit.bits > 8:  # which do for scales as different as those of all components
            groups = [(first, groups[-1][1], math.hypot(*(longest for _, _, longest in groups)))]
        folded = coordinates * codes.scale[first : first + coordinates.shape[1]]
        terms, error = [], torch.zeros(self.count, dtype=torch.float64)
        for begin, end, longest in groups:
            part, rows = folded[:, begin - first : end - first], codes.bytes[block, begin:end]
            offset = torch.full((end - begin,), 128, dtype=torch.uint8)
            for _ in range(2 if begin < fine and self.digit.bits == 8 else 1):
                unit = part.abs().amax(dim=1).clamp(min=1e-30) / self.digit.largest
                values = (part / unit[:, None]).round_()
                part = part - values * unit[:, None]
                terms.append(self._term(rows, end - begin, values, unit, offset))
            error += part.norm(dim=1) * longest
        return terms, error

    def _term(self, rows: torch.Tensor, k: int, values: torch.Tensor, unit: torch.Tensor, offset: torch.Tensor):
        """A product of uint8 rows [n, k] less `offset` with digits [B, k], times unit [B] / σ²."""
        values, scale = values.to(torch.int16), self._padded((unit * self.weight).float())
        self.kept = [*getattr(self, "kept", []), values, offset, scale]
        return self.core.PosteriorTerm(
            rows=rows.data_ptr(), stride=rows.stride(0) if len(rows) > 1 else k, k=k, count=self.count,
            values=values.data_ptr(), offset=offset.data_ptr(), scale=scale.data_ptr(),
        )  # fmt: skip

    # The core

    def _padded(self, values: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        result = torch.full((self.columns,), fill, dtype=values.dtype)
        result[: self.count] = values
        return result

    def _scores(self, terms: list, block: slice, add: bool = False) -> torch.Tensor:
        """The scores of the images of a block [n, columns]; `add`: to those that the last call made."""
        n = block.stop - block.start
        scores = self.memory[: 4 * n * self.columns].view(torch.float32).view(n, self.columns)
        half_norms, weight = self.data.narrow_half_norms[block], self._padded(self.weight.float())
        self.core.posterior_scores(
            terms, n, self.columns, half_norms.data_ptr(), weight.data_ptr(), add, scores.data_ptr(),
            self.threads,
        )  # fmt: skip
        self.kept = []
        return scores

    def _top(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        top, where = torch.empty(self.columns), torch.empty(self.columns, dtype=torch.int64)
        self.core.posterior_column_top(
            scores.data_ptr(), len(scores), self.columns, top.data_ptr(), where.data_ptr(), self.threads
        )
        return top[: self.count], where[: self.count]

    def _mass(self, scores: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        tops, mass = self._padded(top), torch.empty(self.columns, dtype=torch.float64)
        self.core.posterior_column_mass(
            scores.data_ptr(), len(scores), self.columns, tops.data_ptr(), mass.data_ptr(), self.threads
        )
        return mass[: self.count]

    def _select(
        self,
        scores: torch.Tensor,
        threshold: torch.Tensor,
        reach: torch.Tensor | None,
        slack: torch.Tensor | None,
        limit: int,
    ) -> tuple[int, tuple[torch.Tensor, torch.Tensor] | None]:
        """How many pairs have score + reach·slack >= threshold, and which they are, as (starts [B + 1], images), unless
        they are more than the limit."""
        n = len(scores)
        lowered = threshold.float().nextafter(torch.tensor(-math.inf)) if reach is not None else threshold.float()
        thresholds = self._padded(lowered, math.inf)
        reaches = self._padded(torch.zeros(self.count) if reach is None else reach.float() * (1 + 2.0**-20))
        slack = torch.zeros(n) if slack is None else slack.contiguous()
        pairs = self.core.posterior_select(
            scores.data_ptr(), n, self.columns, thresholds.data_ptr(), reaches.data_ptr(), slack.data_ptr(), limit,
            self.threads,
        )  # fmt: skip
        if not pairs.complete:
            return pairs.total, None
        starts = torch.empty(self.columns + 1, dtype=torch.int64)
        images = torch.empty(pairs.total, dtype=torch.int32)
        pairs.copy(starts.data_ptr(), images.data_ptr())
        return pairs.total, (starts[: self.count + 1], images)

    def _logits(self, starts: torch.Tensor, images: torch.Tensor, block: slice) -> torch.Tensor:
        logits = torch.empty(len(images), dtype=torch.float64)
        half_norms = self.data.half_norms[block]
        self.core.posterior_pair_logits(
            self.data.byte_rows_from(block.start), self.u.data_ptr(), half_norms.data_ptr(), self.weight.data_ptr(),
            starts.data_ptr(), images.data_ptr(), self.count, logits.data_ptr(), self.threads,
        )  # fmt: skip
        return logits

    def _sums(self, weights: torch.Tensor, starts: torch.Tensor, images: torch.Tensor, block: slice) -> torch.Tensor:
        total = torch.empty(self.count, self.d, dtype=torch.float64)
        self.core.posterior_pair_sums(
            self.data.byte_rows_from(block.start), weights.data_ptr(), starts.data_ptr(), images.data_ptr(), self.count,
            total.data_ptr(), self.threads,
        )  # fmt: skip
        return total

    def _weighted(self, rows: torch.Tensor, weights: torch.Tensor, k: int | None = None) -> torch.Tensor:
        k = rows.shape[1] if k is None else k
        sums = torch.empty(len(weights), k, dtype=torch.float64)
        self.core.posterior_weighted_sums(
            rows.data_ptr(), rows.stride(0) if len(rows) > 1 else k, k, len(rows), weights.data_ptr(), len(weights),
            sums.data_ptr(), self.threads,
        )  # fmt: skip
        return sums


def unfit(rows: torch.Tensor, center: torch.Tensor, order: torch.Tensor | None) -> str | None:
    """Why rows [N, d] about this center cannot be taken, or None."""
    if rows.dtype != torch.uint8:
        return f"rows are {rows.dtype}, not uint8"
    if rows.device.type != "cpu":
        return "rows are on another device"
    if rows.shape[1] > LARGEST_ROW:
        return f"rows of {rows.shape[1]:,} values are longer than {LARGEST_ROW:,}"
    if order is not None:
        return "rows are not in the requested order"
    if not bool(((center == center.round()) & (center >= 0) & (center <= 255)).all()):
        return "the center is not integer-valued"
    return None
