"""What a search that may miss neighbors does to the count of copies, and an interval of their share that covers it.

An index of quantized vectors proposes candidates, whose distances are computed exactly. So the distances it finds are
never too small: d1 ≤ found d1 and d2 ≤ found d2. A missed nearest image hides a copy, a missed second one makes an
image a copy that is none. Three things keep the count honest: what can be proved, then double sampling (Tenenbein
1970):

1. *Settled by a bound.* The search says how far away all images are at least that it did not look at
   (`Neighbors.unseen`). Where none of them could change the verdict, it is that of exact search (`Rule.settled`).
2. *Verified.* Images of the others are searched exactly: all of them where they are few, else a random sample of each
   stratum; what exact search says of them is their verdict. The strata: called a copy or not, near the threshold or
   not.
3. *Estimated.* The share of copies in a stratum of N images of which n are verified is that of its sample.

The interval has two parts. With K copies among the Q images by exact search, estimated by K̂ = Σ_h N_h k_h / n_h,

    low  = p̂ − √( (p̂ − L(K̂, Q))² + Σ_h (N_h/Q)² (k_h/n_h − l_h)² )
    high = p̂ + √( (U(K̂, Q) − p̂)² + Σ_h (N_h/Q)² (u_h − k_h/n_h)² ),      p̂ = K̂/Q,

where (L, U) is Clopper and Pearson's interval of a share, and (l_h, u_h) the exact (hypergeometric) one of the share of
copies in stratum h: independent errors add in squares (Zou and Donner 2008, "MOVER"). It holds the true share of copies
with at least 95 % (`tests/memorization/test_verification.py` counts it: see `Verification.interval`), and where nothing
is open it is the interval of an exact audit: Wilson's, which holds the share with 95 % on average over shares, but with
less at some (83.8 % where just below 0.18 copies are to be expected: one copy then has a lower end of 0.18/Q).
benchmarks/results/verification.csv has the coverage in 72 settings. What is not covered: single verdicts of images that
were neither settled nor verified, and the images called near.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from math import sqrt
from typing import Any

import numpy as np

from diffmem.memorization.statistics import exact_interval, wilson_interval

LEAST_RECALL = 0.95  # below which neighbors, names and single verdicts are not to be relied on
VERIFIED = 1000  # images that are searched exactly where nothing else is asked for
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Stratum:
    """Images that are alike in what may be wrong about them, and what exact search says of some of them.

    Attributes:
        called: Whether the search calls them copies.
        settled: Whether a bound proves that exact search does not change this.
        certified: Whether it proves that both neighbors are the true ones.
        near: Whether their score is near the rule's threshold.
        images: N, how many they are.
        verified: n, how many of them, chosen at random, were searched exactly.
        copies: How many of these exact search calls copies.
        nearest: Of how many of these the search had found the nearest training image.
        second: The same of the second nearest, as the rule wants it.
    """

    called: bool
    settled: bool
    certified: bool
    near: bool
    images: int
    verified: int = 0
    copies: int = 0
    nearest: int = 0
    second: int = 0

    @property
    def known(self) -> bool:
        """Whether it is known of every image whether it is a copy."""
        # A bound that exact search contradicts proves nothing.
        held = self.copies == (self.verified if self.called else 0)
        return self.verified == self.images or (self.settled and held)

    @property
    def found(self) -> tuple[int, int, int]:
        """(N, n, k): images, those that stand for them, and the copies among these."""
        if self.verified == self.images or not self.known:
            return self.images, self.verified, self.copies
        return self.images, self.images, self.images if self.called else 0


@dataclass(frozen=True)
class Verification:
    """What exact search says of the verdicts of a search that may miss neighbors.

    Attributes:
        strata: Every image lies in one of them.

    Example:
        >>> some = Verification((Stratum(True, False, False, False, 40, 40, 38, 40, 38),
        ...                      Stratum(False, False, False, False, 960, 300, 0, 297, 290)))
        >>> some.estimate, some.count_interval, round(some.recall_nearest, 4)
        (38.0, (38, 48), 0.9904)
    """

    strata: tuple[Stratum, ...]

    @classmethod
    def of_dict(cls, values: Mapping[str, Any]) -> Verification:
        """What `to_dict` gave."""
        return cls(tuple(Stratum(**stratum) for stratum in values["strata"]))

    @property
    def images(self) -> int:
        """Q, how many images there are."""
        return sum(stratum.images for stratum in self.strata)

    @property
    def verified(self) -> int:
        """How many of them were searched exactly."""
        return sum(stratum.verified for stratum in self.strata)

    @property
    def settled(self) -> int:
        """Of how many a bound proves that exact search calls them the same."""
        return sum(stratum.images for stratum in self.strata if stratum.settled and stratum.known)

    @property
    def complete(self) -> bool:
        """Whether it is known of every image whether it is a copy."""
        return all(stratum.known for stratum in self.strata)

    @property
    def estimate(self) -> float:
        """How many copies exact search would find, as estimated."""
        return _combined(stratum.found for stratum in self.strata)[0]

    @property
    def count_interval(self) -> tuple[int, int]:
        """Between which numbers of copies exact search would find, with 95 % confidence."""
        _, low, high = _combined(stratum.found for stratum in self.strata)
        return int(np.ceil(low - 1e-9)), int(np.floor(high + 1e-9))

    @property
    def recall_nearest(self) -> float:
        """Estimated share of the images of which the search found the nearest training image; equal distances count as
        found."""
        return self._recall("nearest")

    @property
    def recall_second(self) -> float:
        """The same of the second nearest, as the rule wants it."""
        return self._recall("second")

    def _recall(self, which: str) -> float:
        counts = [
            (each.images, each.images, each.images) if each.certified else
            (each.images, each.verified, getattr(each, which))
            for each in self.strata
            if each.certified or each.verified
        ]  # fmt: skip
        images = sum(total for total, *_ in counts)
        return sum(total * found / drawn for total, drawn, found in counts) / images if images else 1.0

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """An interval of the share of copies among all images that could be generated: it covers the choice of the
        images and what the search may have missed, with `confidence`."""
        images = self.images
        estimate, low, high = _combined((stratum.found for stratum in self.strata), confidence)
        if self.complete:
            return wilson_interval(round(estimate), images, confidence)
        share = estimate / images
        lower, upper = _share_interval(estimate, images, confidence)
        below = sqrt((share - lower) ** 2 + ((estimate - low) / images) ** 2)
        above = sqrt((upper - share) ** 2 + ((high - estimate) / images) ** 2)
        return max(0.0, share - below), min(1.0, share + above)

    def to_dict(self) -> dict[str, Any]:
        """Figures and strata, in plain JSON types."""
        return {
            "recall_nearest": self.recall_nearest,
            "recall_second": self.recall_second,
            "verified": self.verified,
            "settled": self.settled,
            "estimate": self.estimate,
            "count_interval": list(self.count_interval),
            "strata": [asdict(stratum) for stratum in self.strata],
        }


def _combined(counts: Iterable[tuple[int, int, int]], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """(K̂, low, high): how many of all images are copies, from (N, n, k) of each stratum."""
    estimate = below = above = 0.0
    for total, drawn, found in counts:
        expected = total * found / drawn if drawn else total / 2
        low, high = marked_interval(found, drawn, total, confidence)
        estimate += expected
        below += (expected - low) ** 2
        above += (high - expected) ** 2
    return estimate, estimate - sqrt(below), estimate + sqrt(above)


@lru_cache(65536)
def _share_interval(count: float, total: int, confidence: float) -> tuple[float, float]:
    """Clopper and Pearson's interval, also of an estimated count."""
    return exact_interval(count, total, confidence)  # type: ignore[arg-type]


@lru_cache(65536)
def marked_interval(found: int, drawn: int, total: int, confidence: float = CONFIDENCE) -> tuple[int, int]:
    """How many of `total` images are marked, where `found` of `drawn` are that were chosen at random among them.

    The exact interval of the hypergeometric distribution: the least and the largest number K for which so many marked
    ones or more, and so many or fewer, have a probability above (1 − confidence)/2 each.

    Example:
        >>> marked_interval(0, 300, 960), marked_interval(5, 5, 5)
        ((0, 10), (5, 5))
    """
    if not 0 <= found <= drawn <= total:
        raise ValueError(f"{found} of {drawn} of {total}")
    side = (1 - confidence) / 2
    least, most = found, total - (drawn - found)
    low, high = least, most
    if found:  # the least K with P(X ≥ found) > side
        low = _first(lambda k: 1 - _at_most(found - 1, k, drawn, total) > side, least, most)
    if found < drawn:  # one less than the first K with P(X ≤ found) ≤ side
        high = _first(lambda k: _at_most(found, k, drawn, total) <= side, least, most + 1) - 1
    return low, max(low, high)


def _first(holds: Any, low: int, high: int) -> int:
    """The least number from low to high for which a monotone condition holds; high where none does."""
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _at_most(found: int, marked: int, drawn: int, total: int) -> float:
    """P(X ≤ found) of the hypergeometric distribution."""
    if marked > total or found >= min(drawn, marked):
        return 1.0 if marked <= total else 0.0
    logs = log_factorials(total)

    def choose(n: Any, k: Any) -> Any:
        return logs[n] - logs[k] - logs[n - k]

    x = np.arange(max(0, drawn - (total - marked)), found + 1)
    if not len(x):
        return 0.0
    terms = choose(marked, x) + choose(total - marked, drawn - x) - choose(total, drawn)
    return float(min(1.0, np.exp(terms).sum()))


def log_factorials(total: int) -> np.ndarray:
    """log 0!, …, log total!, and some more."""
    return _factorial_table(1 << total.bit_length())


@lru_cache(4)
def _factorial_table(size: int) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, size)))])


Key = tuple[bool, bool, bool, bool]  # called, settled, certified, near


def allocate(sizes: Mapping[Key, int], budget: int) -> dict[Key, int]:
    """How many images of each stratum are searched exactly.

    An eighth for settled images, for the sake of the recall; a quarter each for images called copies near the threshold
    and far from it, and for others near it; the rest, and what these leave, for the others, which are the most.

    Args:
        sizes: Images by stratum.
        budget: How many in all.
    """
    chosen = dict.fromkeys(sizes, 0)
    open_ones = [key for key in sizes if not key[1]]
    settled = [key for key in sizes if key[1] and not key[2]]
    left = min(budget, sum(sizes[key] for key in (*open_ones, *settled)))

    def give(keys: list[Key], most: int) -> None:
        """At most so many to these, as their sizes are."""
        nonlocal left
        waiting = sum(sizes[key] - chosen[key] for key in keys)
        share = min(most, left, waiting)
        for key in keys:
            size = sizes[key] - chosen[key]
            part = min(size, left, -(-share * size // waiting) if waiting else 0)
            chosen[key] += part
            left -= part

    give(settled, budget // 8)
    for called, near in ((True, True), (True, False), (False, True)):
        give([key for key in open_ones if (key[0], key[3]) == (called, near)], budget // 4)
    give([key for key in open_ones if not key[0] and not key[3]], budget)
    for keys in ([key for key in open_ones if key[0]], open_ones, settled):
        give(keys, budget)
    return chosen
