"""The posterior mean of rows on the CPU by PyTorch alone, never slower than cdist, softmax and a matmul.

Two float32 products and a softmax, as one writes it first, but about a center, with the norms of the rows at hand, and
with float64 where float32 would not do. A logit s_i = (u·z_i − ‖z_i‖²/2) / σ² is off by at most

    E = γ_(d+4)·(‖u‖ + ‖z‖)·‖z‖ / σ²,    γ_n = n·2^-24 / (1 − n·2^-24)

(Higham, Accuracy and Stability of Numerical Algorithms, §3.1), and as a rule by

    e = 2^-24·R·(6k‖u‖/√d + (0.7 + 1.3k)·R) / σ²,    k = √(min(d, 384) / 384)

(R: rms of ‖z‖), which is what independent roundings make where a library adds up 384 products at a time. Measured for
d = 64 to 12,288 and σ = 0.1 to 80 of images in [-1, 1]: 0.3 to 0.9 times that. An error of one logit moves the mean by
w·(z − mean), and z − mean is 1 − w times the way from the mean of all other images. So where errors are independent the
mean is off by e·√Σv², v = w(1 − w), times √2 the spread of the images; √Σv² is at most 0.385, and 0 where one image has
all the weight. That is compared with half the tolerance for the weights as they are; where it is more, the query's
weights with v above θ = (allowed / e)² are corrected by their logits in float64 (of short rows all of them), and what
is left obeys it. Where e itself is large, all images whose upper bound by E comes within reach of the best one are
computed in float64, and no others: what is left out holds at most N·exp(−reach), proven.
"""

from __future__ import annotations

import math
from typing import cast

import torch

from diffmem.ops.posterior_mean.blocked import DROPPED_SHARE
from diffmem.precision import float32_products, rounds_on_cpu

KEPT_BYTES = 1 << 30  # of rows in float32, made once
WIDE_VALUES = 1 << 20  # of rows of a set so small that float64 costs no more than the calls
WIDE_WORK = 1 << 16  # multiplications with these
EXACT_WORK = 1 << 21  # and where more is asked than the mean in float32
BLOCK_PAIRS = 1 << 24
BLOCK_VALUES = 1 << 24  # of rows that are not kept
PAIR_VALUES = 1 << 16  # of pairs at a time: they stay in the cache
SHARE = 1 / 2  # of the tolerance, for the model's error
MOST = 0.385  # the largest √Σ(w(1 − w))² of weights
SHORT = 128  # values of rows of which all logits of a query are corrected
HUGE = 2.0**100  # logits beyond which float32 may overflow
SEARCHED = 1 / 64  # error of a logit from which all that matter are computed in float64

NOTHING = torch.empty(0, dtype=torch.int64)

Means = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class Float32Rows:
    """Rows [N, d] of any kind on the CPU, and their norms about the center; with `keep` in float32 too where there is
    room.

    length: of the mean of the rows, as far as relative errors are concerned (its distance from what counts as 0).
    """

    def __init__(
        self,
        rows: torch.Tensor,
        center: torch.Tensor,
        length: float,
        order: torch.Tensor | None = None,
        keep: bool = True,
    ):
        self.rows, self.center, self.length, self.order = rows, center.double(), length, order
        self.count, self.d = len(rows) if order is None else len(order), rows.shape[1]
        room = keep and 4 * self.count * self.d <= KEPT_BYTES
        self.kept = torch.empty(self.count, self.d) if room else None
        self.half_norms = torch.empty(self.count, dtype=torch.float64)
        for start in range(0, self.count, step := max(1, BLOCK_VALUES // self.d)):
            part = slice(start, min(self.count, start + step))
            z = self._rows(part).double() - self.center
            self.half_norms[part] = z.square().sum(dim=1) / 2
            if self.kept is not None:
                self.kept[part] = z
        self.narrow_half_norms = self.half_norms.float()
        self.spread = max(math.sqrt(2 * float(self.half_norms.mean())), 1e-6)
        self.longest = math.sqrt(2 * float(self.half_norms.max()))
        self.affine: dict[tuple[float, float], _Affine] = {}
        self.wide = self.kept.double() if self.kept is not None and self.kept.numel() <= WIDE_VALUES else None

    def means(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        tolerance: float,
        images: tuple[int, int] | torch.Tensor,
        unit: float = 1.0,
        shift: float = 0.0,
        details: bool = True,
    ) -> Means:
        """Mean [B, d] in the units of x, log-sum-exp and dropped share [B] float64 (without `details` None).

        x: [B, d] float32 or float64, B > 0, unit·x + shift being in units of the rows. sigma: [B] float64, in these
        units, or one for all. What is not finite makes means that are not.
        """
        if rounds_on_cpu():
            with float32_products("ieee"):
                return self.means(x, sigma, tolerance, images, unit, shift, details)
        if isinstance(sigma, torch.Tensor):
            low, high = float(sigma.min()), float(sigma.max())
            if high >= 2 * low:  # bounds are those of the lowest level of a call
                return self._by_octave(x, sigma, tolerance, images, unit, shift, details)
            sigma = sigma if low < high else low
        affine = self.affine.get((unit, shift))
        if affine is None:
            affine = self.affine[unit, shift] = _Affine(unit, shift - self.center)
        start, stop = (0, len(images)) if isinstance(images, torch.Tensor) else images
        count = x.shape[0]
        work = count * (stop - start) * self.d
        if work <= WIDE_WORK and self.wide is not None and not details and stop - start == self.count:
            return self._at_once(x, sigma, affine), None, None
        queries = _Queries(x, sigma, affine)
        if (details or x.dtype == torch.float64) and work <= EXACT_WORK:
            chosen = images if isinstance(images, torch.Tensor) else slice(start, stop)
            return self._in_float64(
                queries, self._rows(chosen).double() - self.center, self.half_norms[chosen], details
            )
        rows = BLOCK_VALUES // self.d if self.kept is None or isinstance(images, torch.Tensor) else stop
        step = max(1, min(BLOCK_PAIRS // count, rows))
        reach = math.log((stop - start) / (DROPPED_SHARE * tolerance))
        more = details or step < stop - start
        found = []
        for first in range(start, stop, step):
            part = slice(first, min(stop, first + step))
            chosen = images[part] if isinstance(images, torch.Tensor) else part
            found.append(self._block(queries, tolerance, reach, chosen, more))
        mean, log_mass, dropped = found[0]
        if len(found) > 1:
            masses = torch.stack([cast(torch.Tensor, each) for _, each, _ in found])
            shares = torch.softmax(masses, dim=0)
            mean = torch.stack([share[:, None] * each for share, (each, _, _) in zip(shares, found, strict=True)]).sum(
                0
            )
            mean, log_mass = mean.to(x.dtype), torch.logsumexp(masses, dim=0)
            dropped = (shares * torch.stack([cast(torch.Tensor, each) for _, _, each in found])).sum(dim=0)
        if not details:
            return mean, None, None
        return mean, cast(torch.Tensor, log_mass) - queries.half_squares(), dropped

    def _by_octave(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor,
        tolerance: float,
        images: tuple[int, int] | torch.Tensor,
        unit: float,
        shift: float,
        details: bool,
    ) -> Means:
        mean = torch.empty_like(x)
        sums = torch.empty(2, len(x), dtype=torch.float64)
        octave = sigma.log2().floor()
        for each in octave.unique():
            some = octave == each
            found = self.means(x[some], sigma[some], tolerance, images, unit, shift, details)
            mean[some] = found[0]
            if details:
                sums[0, some], sums[1, some] = cast(torch.Tensor, found[1]), cast(torch.Tensor, found[2])
        return (mean, sums[0], sums[1]) if details else (mean, None, None)

    def _rows(self, images: slice | torch.Tensor) -> torch.Tensor:
        return self.rows[images] if self.order is None else self.rows[self.order[images]]

    def _chosen(self, of_all: torch.Tensor, images: slice | torch.Tensor) -> torch.Tensor:
        every = isinstance(images, slice) and images.stop - images.start == self.count
        return of_all if every else of_all[images]

    def _narrow(self, images: slice | torch.Tensor) -> torch.Tensor:
        """Rows less the center, float32."""
        if self.kept is not None:
            return self._chosen(self.kept, images)
        rows = self._rows(images)
        exact = rows.dtype == torch.uint8  # the center is one of whole numbers then
        return rows.float().sub_(self.center.float()) if exact else (rows.double() - self.center).float()

    def _at_once(self, x: torch.Tensor, sigma: torch.Tensor | float, affine: _Affine) -> torch.Tensor:
        """The mean of all rows in float64, by as few operations as there can be: each costs as much as it computes."""
        assert self.wide is not None
        assert self.kept is not None
        if affine.bias is None:
            affine.bias = self.wide @ affine.offset - self.half_norms
        if isinstance(sigma, torch.Tensor):
            logits = torch.addmm(affine.bias, x.double(), self.wide.T, alpha=affine.unit)
            logits = logits.div_(sigma.square()[:, None])
        else:
            weight = sigma**-2
            logits = torch.addmm(affine.bias, x.double(), self.wide.T, beta=weight, alpha=affine.unit * weight)
        weights = torch.softmax(logits, dim=1)
        if x.dtype is torch.float32:
            return torch.addmm(affine.narrow_back, weights.float(), self.kept, alpha=1 / affine.unit)
        return torch.addmm(affine.back, weights, self.wide, alpha=1 / affine.unit)

    def _in_float64(self, of: _Queries, z: torch.Tensor, half: torch.Tensor, details: bool) -> Means:
        logits = of.logits(half, of.wide(), z)
        mean = torch.addmm(of.affine.back, torch.softmax(logits, dim=1), z, alpha=1 / of.unit).to(of.x.dtype)
        if not details:
            return mean, None, None
        log_sum = torch.logsumexp(logits, dim=1) - of.half_squares()
        return mean, log_sum, torch.zeros_like(log_sum)

    def _block(
        self, of: _Queries, tolerance: float, reach: float, images: slice | torch.Tensor, details: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Of rows `images`: the mean in the units and the dtype of x [B, d], and with `details` the logarithm of the
        weights' sum and the dropped share."""
        count, d = of.x.shape
        z = self._narrow(images)
        u, half = of.narrow(), self._chosen(self.narrow_half_norms, images)
        longest = (torch.linalg.vector_norm(u, dim=1).max() if count > 1 else torch.linalg.vector_norm(u)).item()
        if not longest * self.longest < HUGE * of.least**2:  # or no number at all
            return self._in_parts(of, images)
        unit = 2.0**-24 / of.least**2
        depth = math.sqrt(min(d, 384) / 384)
        typical = 6 * depth * longest / math.sqrt(d) + (0.7 + 1.3 * depth) * self.spread
        typical *= unit * self.spread
        allowed = SHARE * tolerance * self._length(of.largest) / (math.sqrt(2) * self.spread)
        if typical > SEARCHED:
            logits = of.logits(half, u, z)
            bound = (d + 4) * unit / (1 - (d + 4) * 2.0**-24) * (longest + self.longest) * self.longest
            return self._searched(of, logits, 2 * bound, reach, images, z, details)
        logits = of.logits(half, u, z)
        weights = torch.softmax(logits, dim=1)
        log_mass = dropped = None
        if details:
            dropped = torch.zeros(count, dtype=torch.float64)
            top = logits.amax(dim=1)
            log_mass = top.double() + (logits - top[:, None]).exp_().sum(dim=1, dtype=torch.float64).log()
        if MOST * typical > allowed:
            heavy = _movable(weights, allowed / typical)
            if heavy.numel():
                mass = self._correct(of, heavy, weights, logits, allowed / typical, images, z)
                if log_mass is not None:
                    log_mass[heavy] += mass.log()
        if of.x.dtype == torch.float32:
            return torch.addmm(of.affine.narrow_back, weights, z, alpha=1 / of.unit), log_mass, dropped
        return of.answer(weights @ z), log_mass, dropped

    def _correct(
        self,
        of: _Queries,
        heavy: torch.Tensor,
        weights: torch.Tensor,
        logits: torch.Tensor,
        allowed: float,
        images: slice | torch.Tensor,
        z: torch.Tensor,
    ) -> torch.Tensor:
        """Puts right the weights [B, n] of these queries; returns what they summed up to in units of what they had."""
        before = weights.index_select(0, heavy)
        if self.d <= SHORT:  # all of them: to list them would take longer
            wide = z.double() if self.wide is None else self.wide[images]
            exact = of.some(heavy).logits(self.half_norms[images], of.wide()[heavy], wide)
            after = (exact - logits[heavy]).exp_().mul_(before)
        else:
            moving = torch.addcmul(before, before, before, value=-1)
            queries, found = torch.nonzero(moving > allowed**2, as_tuple=True)
            change = self._exact(of, heavy[queries], found, images, z) - logits[heavy[queries], found]
            after = before.double()
            after[queries, found] *= change.exp()
        mass = after.sum(dim=1)
        weights[heavy] = after.div_(mass[:, None]).float()
        return mass

    def _in_parts(self, of: _Queries, images: slice | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`_block` in float64, some rows at a time."""
        chosen = images if isinstance(images, torch.Tensor) else torch.arange(images.start, images.stop)
        parts = chosen.split(max(1, BLOCK_VALUES // self.d))
        logits = torch.cat(
            [of.logits(self.half_norms[part], of.wide(), self._rows(part).double() - self.center) for part in parts],
            dim=1,
        )
        weights = torch.softmax(logits, dim=1).split(len(parts[0]), dim=1)
        mean = torch.zeros(of.wide().shape, dtype=torch.float64)
        for weight, part in zip(weights, parts, strict=True):
            mean.addmm_(weight, self._rows(part).double() - self.center)
        log_mass = torch.logsumexp(logits, dim=1)
        return of.answer(mean), log_mass, torch.zeros_like(log_mass)

    def _searched(
        self,
        of: _Queries,
        logits: torch.Tensor,
        slack: float,
        reach: float,
        images: slice | torch.Tensor,
        z: torch.Tensor,
        details: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """`_block` of images whose logits are within reach and slack of the best, in float64."""
        count, d = of.x.shape
        top = logits.amax(dim=1, keepdim=True)
        queries, found = torch.nonzero(logits >= top - (slack + reach) * (1 + 2.0**-20), as_tuple=True)
        if not details and len(queries) == count:  # one each
            return of.answer(z.index_select(0, found)), None, None
        if not details and count == 1:
            shares = torch.softmax(self._exact(of, queries, found, images, z), dim=0)
            return of.answer((shares.float() @ z[found])[None]), None, None
        weights = torch.ones(len(queries), dtype=torch.float64)
        highest, mass = torch.empty(2, count, dtype=torch.float64)
        asked: slice | torch.Tensor = slice(None)
        if not details:  # those that are alone have all the weight
            asked = (torch.bincount(queries, minlength=count)[queries] > 1).nonzero().flatten()
        some = queries[asked]
        exact = self._exact(of, some, found[asked], images, z)
        highest.fill_(-math.inf).scatter_reduce_(0, some, exact, "amax")
        weights[asked] = (exact - highest[some]).exp()
        mass.fill_(0).index_add_(0, queries, weights)
        weights /= mass[queries]
        matter = weights > math.exp(-reach)
        queries, found, weights = queries[matter], found[matter], weights[matter]
        if len(queries) == count:
            mean = z.index_select(0, found)
        elif len(queries) * 16 > count * len(z):
            mean = torch.zeros(count, len(z)).index_put_((queries, found), weights.float()) @ z
        else:
            mean = torch.zeros(count, d)
            for part in _parts(len(queries), d):
                mean.index_add_(0, queries[part], z.index_select(0, found[part]).mul_(weights[part, None].float()))
        if not details:
            return of.answer(mean), None, None
        left_out = len(z) - torch.bincount(queries, minlength=count)
        return of.answer(mean), highest + mass.log(), left_out * math.exp(-reach)

    def _exact(
        self, of: _Queries, queries: torch.Tensor, found: torch.Tensor, images: slice | torch.Tensor, z: torch.Tensor
    ) -> torch.Tensor:
        """Logits of pairs in float64."""
        products = torch.empty(len(queries), dtype=torch.float64)
        wide = of.wide()
        for part in _parts(len(queries), self.d):
            place = found[part]
            if self.wide is not None and isinstance(images, slice):
                rows = self.wide[images].index_select(0, place)
            elif self.rows.dtype == torch.uint8:
                rows = z.index_select(0, place).double()
            else:
                place = images[place] if isinstance(images, torch.Tensor) else place + images.start
                rows = self._rows(place).double() - self.center
            products[part] = rows.mul_(wide.index_select(0, queries[part])).sum(dim=1)
        return (products - self.half_norms[images][found]) * of.weight(queries)

    def _length(self, sigma: float) -> float:
        """About how long results are, see `diffmem.ops.posterior_mean.native`."""
        energy = self.spread**2 / 2
        return math.sqrt(self.length**2 + energy**2 / (energy + sigma**2))


class _Affine:
    """From queries x to u = unit·x + offset about the center, and from means about the center to the units of x."""

    def __init__(self, unit: float, offset: torch.Tensor) -> None:
        self.unit, self.offset, self.back = unit, offset, offset * (-1 / unit)
        self.narrow_offset, self.narrow_back = offset.float(), self.back.float()
        self.bias: torch.Tensor | None = None  # of rows z: offset·z − ‖z‖²/2


class _Queries:
    """Queries x [B, d], u of each, and one noise level or one each."""

    def __init__(self, x: torch.Tensor, sigma: torch.Tensor | float, affine: _Affine) -> None:
        self.x, self.sigma, self.affine, self.unit = x, sigma, affine, affine.unit
        self._wide: torch.Tensor | None = None
        if isinstance(sigma, torch.Tensor):
            self.least, self.largest = float(sigma.min()), float(sigma.max())
        else:
            self.least = self.largest = sigma

    def narrow(self) -> torch.Tensor:
        """u in float32."""
        if self.x.dtype == torch.float32:
            return torch.add(self.affine.narrow_offset, self.x, alpha=self.unit)
        return self.wide().float()

    def wide(self) -> torch.Tensor:
        """u in float64."""
        if self._wide is None:
            self._wide = torch.add(self.affine.offset, self.x, alpha=self.unit)
        return self._wide

    def some(self, queries: torch.Tensor) -> _Queries:
        """Those listed."""
        sigma = self.sigma[queries] if isinstance(self.sigma, torch.Tensor) else self.sigma
        return _Queries(self.x[queries], sigma, self.affine)

    def answer(self, mean: torch.Tensor) -> torch.Tensor:
        """A mean about the center as it is asked for."""
        if self.x.dtype == mean.dtype == torch.float32:
            return torch.add(self.affine.narrow_back, mean, alpha=1 / self.unit)
        return torch.add(self.affine.back, mean, alpha=1 / self.unit).to(self.x.dtype)

    def half_squares(self) -> torch.Tensor:
        """‖u‖² / (2σ²) [B]."""
        return self.wide().square().sum(dim=1) / (2 * self.sigma**2)

    def weight(self, queries: torch.Tensor) -> torch.Tensor | float:
        """1 / σ² of some queries."""
        return 1 / (self.sigma[queries] if isinstance(self.sigma, torch.Tensor) else self.sigma) ** 2

    def logits(self, half: torch.Tensor, u: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """(u·z − half) / σ² [B, n]."""
        if not isinstance(self.sigma, torch.Tensor):
            weight = self.sigma**-2
            # Without factors PyTorch adds the bias while it multiplies; else it copies the bias into the result before.
            return torch.addmm(half * -weight, u * weight, z.T)
        return torch.addmm(half, u, z.T, beta=-1).div_(self.sigma.square().to(u.dtype)[:, None])


def _movable(weights: torch.Tensor, most: float) -> torch.Tensor:
    """Queries whose weights w [B, n] have √Σ(w(1 − w))² > most."""
    # The others sum up to 1 − the largest, and none of them is larger than that, nor is the largest one's v.
    rest = 1 - weights.amax(dim=1)
    if math.sqrt(2) * rest.max().item() <= most:
        return NOTHING
    heavy = (rest > most / math.sqrt(2)).nonzero().view(-1)
    some = weights.index_select(0, heavy)
    moving = torch.addcmul(some, some, some, value=-1)
    return heavy[torch.linalg.vector_norm(moving, dim=1) > most]


def _parts(count: int, d: int) -> list[slice]:
    step = max(32, PAIR_VALUES // d)
    return [slice(start, start + step) for start in range(0, count, step)]
