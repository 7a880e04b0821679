"""The search for EMM: which run to make next, and when to stop. How runs are made is not its affair."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from diffmem.errors import InputError
from diffmem.studies.curve import Observation, Posterior
from diffmem.text import counted

# Runs before the answer counts as precise. Fewer say too little of how much runs differ. Of the simulated searches that
# ended after just eight, 97 % have intervals that hold EMM: ending where few runs seem to do costs no coverage.
_FEWEST_RUNS = 8

# Where the next run goes, in turns: to the middle of what EMM may be, or to one side of it, to a quantile of its
# posterior and at least so far that the expected logit R_mem differs by so much from that at EMM. Runs that all lie
# near EMM say little of how steep the curve is, and so of how far away EMM is from them. Larger sizes are preferred: a
# run below EMM is ended by its answer, and says "at least" only.
_TURNS = ((0.5, 0.0), (0.25, 0.5), (0.7, -0.8), (0.4, 0.0), (0.1, 1.0), (0.6, -0.4), (0.5, 0.0), (0.75, -1.2))


@dataclass(frozen=True)
class Candidate:
    """A run that the search asks for: `size` training images, repetition 0, 1, …"""

    size: int
    repetition: int


@dataclass(frozen=True)
class Search:
    """How to look for EMM within the sizes low … high.

    zeta: R_mem at EMM is 1 − zeta. precision: the search is over when half of the 95 % interval of EMM is this share of
    EMM at most. repetitions: runs per size at most; runs: in all at most. step: sizes are multiples of it (the number
    of classes, for subsets that are balanced and nested).
    """

    low: int
    high: int
    zeta: float = 0.1
    precision: float = 0.1
    repetitions: int = 5
    runs: int = 40
    step: int = 1

    def __post_init__(self) -> None:
        for name in ("repetitions", "runs", "step"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 < self.precision < 1:
            raise InputError(f"precision is {self.precision}, but must lie between 0 and 1")
        if self._ceiling(self.low) > self._floor(self.high) or self.low < 2:
            raise InputError(f"sizes {self.low}:{self.high} contain no multiple of {self.step} that is at least 2")
        self.posterior([])  # checks the rest

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest size that may be tried: multiples of `step`."""
        return self._ceiling(self.low), self._floor(self.high)

    def posterior(self, seen: Sequence[Observation]) -> Posterior:
        return _posterior(tuple(seen), self.low, max(self.high, self.low + 1), self.zeta)

    def precise(self, seen: Sequence[Observation]) -> bool:
        """Whether the interval of EMM is as narrow as was asked for, and rests on runs enough."""
        return len(seen) >= _FEWEST_RUNS and half_width(self.posterior(seen)) <= self.precision

    def next_candidates(
        self, seen: Sequence[Observation], tried: Sequence[Candidate], count: int = 1
    ) -> list[Candidate]:
        """Up to `count` runs to be made at the same time, after those that were `tried`; none where nothing is left to
        try or to find out."""
        if self.precise(seen):
            return []
        posterior = self.posterior(seen)
        chosen: list[Candidate] = []
        while len(chosen) < count and len(tried) + len(chosen) < self.runs:
            made = [candidate.size for candidate in (*tried, *chosen)]
            turn = len(made) % len(_TURNS)
            found = [_wanted(posterior, *each) for each in (*_TURNS[turn:], *_TURNS[:turn])]
            sizes = [min(max(self._nearest(size), self._ceiling(self.low)), self._floor(self.high)) for size in found]
            # Steps may be wider than the interval of EMM: the neighbors then tell as much.
            sizes += [size + shift for size in sizes[:1] for shift in (-self.step, self.step)]
            possible = [s for s in sizes if self.low <= s <= self.high and made.count(s) < self.repetitions]
            if not possible:
                break
            chosen.append(Candidate(possible[0], made.count(possible[0])))
        return chosen

    def unresolved(self, seen: Sequence[Observation]) -> list[str]:
        """What the runs leave open, in sentences; none where the answer is as precise as was asked for."""
        posterior = self.posterior(seen)
        half, found, made = half_width(posterior), [], counted(len(seen), "run")
        if posterior.below(self.high) < 0.975:
            found.append(
                f"EMM may lie above {self.high:,}, the largest allowed size (probability "
                f"{1 - posterior.below(self.high):.0%}): allow larger sizes"
            )
        if posterior.below(self.low) > 0.025:
            found.append(
                f"EMM may lie below {self.low:,}, the smallest allowed size (probability "
                f"{posterior.below(self.low):.0%}): allow smaller sizes"
            )
        if len(seen) < _FEWEST_RUNS:
            found.append(
                f"{made} {'says' if len(seen) == 1 else 'say'} too little about how much runs differ for a reliable "
                f"interval: allow {_FEWEST_RUNS} or more"
            )
        if half > self.precision:
            found.append(
                f"the interval is ±{half:.0%}, not ±{self.precision:.0%}, after {made}: allow more runs or "
                f"repetitions (runs of one size differ by {posterior.spread:.2g} in logit R_mem)"
            )
        return found

    def _nearest(self, size: float) -> int:
        return max(1, round(size / self.step)) * self.step

    def _ceiling(self, size: int) -> int:
        return math.ceil(size / self.step) * self.step

    def _floor(self, size: int) -> int:
        return size // self.step * self.step


def _wanted(posterior: Posterior, probability: float, logits: float) -> float:
    """The size at a quantile of EMM, and so far at least from its median that the expected logit R_mem is that much
    more than at EMM."""
    sizes = posterior.quantile(probability), posterior.median * math.exp(-logits / posterior.steepness)
    return min(sizes) if probability < 0.5 else max(sizes)


@lru_cache(maxsize=4)  # what stops a search, what it tries next and its page ask for the same one
def _posterior(seen: tuple[Observation, ...], low: float, high: float, zeta: float) -> Posterior:
    return Posterior(seen, low, high, zeta)


def half_width(posterior: Posterior) -> float:
    """Half of the 95 % interval of EMM, as a share of its median."""
    lower, upper = posterior.interval()
    return (upper - lower) / 2 / posterior.median


def carry_out(
    search: Search, measure: Callable[[Sequence[Candidate]], Sequence[Observation | None]], at_once: int = 1
) -> list[tuple[Candidate, Observation | None]]:
    """Every run that the search asked for, with what was seen; None for a run that failed.

    measure: makes some runs and returns what each showed. at_once: how many it is asked for at a time.
    """
    made: list[tuple[Candidate, Observation | None]] = []
    while True:
        seen = [observation for _, observation in made if observation is not None]
        candidates = search.next_candidates(seen, [candidate for candidate, _ in made], at_once)
        if not candidates:
            return made
        made += zip(candidates, measure(candidates), strict=True)
