"""Does the search for EMM keep its promise, and what does it save?

`python -m benchmarks emm` simulates memorization: curves of R_mem over N of many kinds (`KINDS`: symmetric and not,
with light and heavy tails, steep and shallow, with knees, steps and plateaus; runs that differ by a normal deviation,
by a heavy-tailed one, by more at large N than at small ones, or of which some fail), at random places and of random
steepness, and R_mem that rises with training or has leveled off. EMM of each curve is searched by `diffmem.studies`,
one run at a time and from the ninth on two, 24 at most, and read off fixed grids of sizes, every run at full length
with all samples of all snapshots. Their intervals come from the same posterior, and the grid that counts is the
cheapest of a family (5, 9 or 17 sizes, 1 to 8 runs each) whose interval is as narrow as the search's on the same curve,
or the largest where none is. "grid": over all sizes allowed, as the search has to start; "near grid": sizes from a
third of the true EMM to three times it, as one who knows it already would choose them. Costs are in training steps of
one image, an evaluation of the network in sampling being a third of one.

results/emm.csv holds a row per kind: how many of the 95 % intervals hold the true EMM, with Wilson's interval, half
their width (median, as a share of EMM), runs per search, cost of a search (median, in full runs at its EMM), and how
much more the grids cost (median ratio).
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial

import numpy as np
from scipy import special

from benchmarks.harness import RESULTS, Bench
from diffmem.memorization import SequentialTest, wilson_interval
from diffmem.studies.curve import Observation, Posterior
from diffmem.studies.search import Candidate, Search, half_width

VALUES, MINUTES = "emm.csv", 60
CURVES, COMPARED = 480, 12  # curves per kind, and how many of them are gridded too
PRECISION, RUNS = 0.1, 24
COLUMNS = (
    "kind", "searches", "covered", "covered_low", "covered_high", "half_width", "runs", "unresolved", "full_runs",
    "grid_costs", "near_grid_costs",
)  # fmt: skip
LOW, HIGH, ZETA = 100, 10_000, 0.1
EPOCHS, CALLS = 40_000, 35
_PARTS = (np.arange(4000) + 0.5) / 4000  # of the runs, by how far they deviate

Link = Callable[[np.ndarray, float], np.ndarray]  # R by η; the number, uniform in 0 … 1, is the curve's own


def _knee(eta, own):
    """Three times as steep below (own < 0.5) or above a knee, at a logit of 0.5 to 3.5 (R 62 to 97 %)."""
    knee = 0.5 + 6 * (own % 0.5)
    below, above = (3.0, 1.0) if own < 0.5 else (1.0, 3.0)
    return special.expit(knee + np.where(eta < knee, below, above) * (eta - knee))


def _steps(eta, own):
    """One part of the images is lost at smaller N than the other."""
    return (0.3 + 0.4 * own) * special.expit(eta) + (0.7 - 0.4 * own) * special.expit(eta + 4)


@dataclass(frozen=True)
class Kind:
    """Curves that are simulated.

    link: R by η. steepness: its median. deviations: the quantiles of a run's deviation, in units of the spread. growth:
    ln of how much the spread grows from N to e·N. rise, leveled_off: η grows by `rise` times ln of the part of
    training, up to the part at which R_mem levels off. samples, batch, snapshots: images per snapshot and per batch,
    and snapshots per run. same_seeds: whether the samples of snapshots depend on each other, as those of the same seeds
    do.
    """

    link: Link
    steepness: float = 3.0
    deviations: Callable[[np.ndarray], np.ndarray] = special.ndtri
    growth: float = 0.0
    rise: float = 4.0
    leveled_off: float = 1.0
    same_seeds: bool = False
    samples: int = 10_000
    batch: int = 250
    snapshots: int = 10


def _logistic(eta, own):
    return special.expit(eta)


@lru_cache
def _contaminated_quantiles():
    z = np.linspace(-25, 25, 20_001)
    return 0.9 * special.ndtr(z) + 0.1 * special.ndtr(z / 5), z


def _contaminated(parts):
    """Tukey's contaminated normal distribution."""
    return np.interp(parts, *_contaminated_quantiles())


def _failing(parts):
    """One run in twelve lies 8 spreads lower."""
    failed = parts < 1 / 12
    return special.ndtri(np.where(failed, 12 * parts, (12 * parts - 1) / 11)) - 8 * failed


KINDS: dict[str, Kind] = {
    "logistic": Kind(_logistic),
    "probit": Kind(lambda eta, own: special.ndtr(eta / 1.702)),  # of the logistic curve's slope
    "log-log": Kind(lambda eta, own: np.exp(-np.exp(-np.clip(eta, -30, 30)))),
    "complementary log-log": Kind(lambda eta, own: -np.expm1(-np.exp(np.clip(eta, -30, 30)))),
    "Cauchy": Kind(lambda eta, own: 0.5 + np.arctan(eta * math.pi / 4) / math.pi),
    "Student's t(2)": Kind(lambda eta, own: special.stdtr(2, eta / math.sqrt(2))),
    "knee": Kind(_knee),
    "two steps": Kind(_steps),
    "plateau at 93 to 99 %": Kind(lambda eta, own: (0.93 + 0.06 * own) * special.expit(eta)),
    "steep": Kind(_logistic, steepness=9.0),
    "shallow": Kind(_logistic, steepness=1.0),
    "deviations of Student's t(3)": Kind(_logistic, deviations=partial(special.stdtrit, 3)),
    "one run in ten deviates five times as much": Kind(_logistic, deviations=_contaminated),
    "one run in twelve fails": Kind(_logistic, deviations=_failing),
    "spread grows with N": Kind(_logistic, growth=1.0),
    "spread falls with N": Kind(_logistic, growth=-1.0),
    "level from half of training, 512 samples": Kind(
        _logistic, leveled_off=0.5, same_seeds=True, samples=512, batch=64
    ),
    "rising slowly, 512 samples": Kind(_logistic, rise=1.0, same_seeds=True, samples=512, batch=64),
}


def run(bench: Bench) -> None:
    path = RESULTS / f"emm{'.quick' if bench.quick else ''}.csv"
    with ProcessPoolExecutor(os.cpu_count()) as pool, path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for kind in KINDS:
            row = summary(kind, 4 if bench.quick else CURVES, 2 if bench.quick else COMPARED, pool.map)
            writer.writerow(row)
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def summary(kind: str, curves: int, compared: int, apply: Callable = map) -> dict[str, str]:
    """A row: the search on so many curves of a kind."""
    answers = list(apply(partial(answer_of, kind, compared), range(curves)))
    found = [each[0] for each in answers]
    covered = sum(each.covered for each in found)
    low, high = wilson_interval(covered, curves)
    grids = np.array([each[1:] for each in answers[:compared]])
    return {
        "kind": kind,
        "searches": str(curves),
        "covered": f"{covered / curves:.3f}",
        "covered_low": f"{low:.3f}",
        "covered_high": f"{high:.3f}",
        "half_width": f"{np.median([each.width for each in found]):.3f}",
        "runs": f"{np.median([each.runs for each in found]):.0f}",
        "unresolved": f"{np.mean([each.width > PRECISION for each in found]):.3f}",
        "full_runs": f"{np.median([each.full_runs for each in found]):.1f}",
        "grid_costs": f"{np.median(grids[:, 0]):.1f}",
        "near_grid_costs": f"{np.median(grids[:, 1]):.1f}",
    }


def answer_of(kind: str, compared: int, index: int) -> tuple[Answer, float, float]:
    """What the search finds on a curve, and how much more the two grids cost (NaN from curve `compared` on)."""
    generator = np.random.default_rng([index, list(KINDS).index(kind)])
    curve = Curve.drawn(kind, generator)
    found = searched(curve, generator, Search(LOW, HIGH, ZETA, PRECISION, runs=RUNS))
    if index >= compared:
        return found, math.nan, math.nan
    near = round(curve.emm / 3), round(curve.emm * 3)
    costs = [cheapest_grid(curve, generator, found.width, *ends).cost / found.cost for ends in ((LOW, HIGH), near)]
    return found, costs[0], costs[1]


@dataclass(frozen=True)
class Curve:
    """A simulated setting. place: ln N where η is 0; steepness: of η over ln N; spread: of runs, in η; own: the number
    that its link takes."""

    name: str
    place: float
    steepness: float
    spread: float
    own: float = 0.5

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @staticmethod
    def drawn(name: str, generator: np.random.Generator) -> Curve:
        """With EMM anywhere from 2.5 times the smallest size to 0.4 times the largest, evenly in ln N."""
        steepness = math.exp(generator.normal(math.log(KINDS[name].steepness), 0.4))
        curve = Curve(name, 0.0, steepness, generator.uniform(0.05, 0.6), generator.uniform())
        emm = generator.uniform(math.log(2.5 * LOW), math.log(0.4 * HIGH))
        # The spread depends on N less its value at the curve's place, so that a shift of that shifts all.
        return Curve(name, emm - math.log(curve.emm), curve.steepness, curve.spread, curve.own)

    def share(self, size: float, z: np.ndarray | float = 0.0, progress: float = 1.0) -> np.ndarray:
        """R_mem of a run whose deviation is z, after a part of its training."""
        behind = math.log(size) - self.place
        spread = self.spread * math.exp(np.clip(self.kind.growth * behind, -1.5, 1.5))
        grown = self.kind.rise * min(0.0, math.log(progress / self.kind.leveled_off))
        eta = -self.steepness * behind + spread * np.asarray(z) + grown
        return np.clip(self.kind.link(eta, self.own), 0, 1)

    @cached_property
    def emm(self) -> float:
        """Where the expected R_mem is 1 − ζ."""
        deviations = self.kind.deviations(_PARTS)
        low, high = self.place - 12.0, self.place + 12.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            expected = self.share(math.exp(middle), deviations).mean()
            low, high = (middle, high) if expected >= 1 - ZETA else (low, middle)
        return math.exp(low)


@lru_cache
def decisions(question: SequentialTest, batch: int, samples: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """After every batch: images so far, the largest count that answers no, and the smallest that answers yes."""
    totals = np.minimum(np.arange(batch, samples + batch, batch), samples)
    no, yes = [], []
    for total in totals.tolist():
        low, high = -1, total + 1  # answers no, answers otherwise
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if question.answer(middle, total) is False else (low, middle)
        no.append(low)
        low, high = low, total + 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if question.answer(middle, total) else (middle, high)
        yes.append(high)
    return totals, np.array(no), np.array(yes)


class Simulation:
    """Runs on a curve, and what they cost."""

    def __init__(self, curve: Curve, generator: np.random.Generator) -> None:
        self.curve, self.generator = curve, generator
        self.cost = 0.0

    def deviation(self) -> float:
        return float(self.curve.kind.deviations(self.generator.uniform()))

    def search_run(self, candidate: Candidate) -> Observation:
        """A run as a trial with a question makes it: ended when decided."""
        kind = self.curve.kind
        question = SequentialTest(1 - ZETA).shared_among(kind.snapshots)
        totals, no, yes = decisions(question, kind.batch, kind.samples)
        batches = np.diff(totals, prepend=0)
        z, seeds, counts = self.deviation(), self.generator.normal(size=kind.samples if kind.same_seeds else 0), []
        for snapshot in range(1, kind.snapshots + 1):
            self.cost += candidate.size * EPOCHS / kind.snapshots
            share = float(self.curve.share(candidate.size, z, snapshot / kind.snapshots))
            if kind.same_seeds:
                # All snapshots are sampled from the same seeds, whose images are copies together more often than not.
                copies = math.sqrt(0.5) * (seeds + self.generator.normal(size=len(seeds))) < special.ndtri(share)
                found = np.cumsum(copies)[totals - 1]
            else:
                found = np.cumsum(self.generator.binomial(batches, share))
            end = int(np.argmax((found <= no) | (found >= yes) | (totals == kind.samples)))
            counts.append((int(found[end]), int(totals[end])))
            self.cost += totals[end] * CALLS / 3
            if found[end] >= yes[end]:
                break
        return Observation.of_snapshots(candidate.size, counts, len(counts) < kind.snapshots)

    def grid_run(self, size: int) -> Observation:
        """A run of full length, with all samples."""
        kind = self.curve.kind
        share = float(self.curve.share(size, self.deviation()))
        self.cost += size * EPOCHS + kind.snapshots * kind.samples * CALLS / 3
        return Observation(size, int(self.generator.binomial(kind.samples, share)), kind.samples)


@dataclass(frozen=True)
class Answer:
    """covered: whether the interval holds the true EMM; width: its half, as a share of the median; cost; full_runs: the
    same in runs of full length at EMM."""

    covered: bool
    width: float
    cost: float
    full_runs: float
    runs: int


def answer(posterior: Posterior, simulation: Simulation, runs: int) -> Answer:
    (low, high), emm, kind = posterior.interval(), simulation.curve.emm, simulation.curve.kind
    full = emm * EPOCHS + kind.snapshots * kind.samples * CALLS / 3
    return Answer(low <= emm <= high, half_width(posterior), simulation.cost, simulation.cost / full, runs)


def searched(curve: Curve, generator: np.random.Generator, search: Search) -> Answer:
    """EMM of a curve by the search."""
    simulation = Simulation(curve, generator)
    tried: list[Candidate] = []
    seen: list[Observation] = []
    while candidates := search.next_candidates(seen, tried, 1 if len(tried) < 8 else 2):
        tried += candidates
        seen += [simulation.search_run(each) for each in candidates]
    return answer(search.posterior(seen), simulation, len(seen))


def cheapest_grid(
    curve: Curve, generator: np.random.Generator, width: float, low: int = LOW, high: int = HIGH
) -> Answer:
    """EMM of a curve from the cheapest grid over low … high whose interval is as narrow as `width`, or the largest."""
    for runs, points in sorted((points * repetitions, points) for points in (5, 9, 17) for repetitions in (1, 2, 4, 8)):
        sizes = [round(size) for size in np.geomspace(low, high, points)]
        found = gridded(curve, generator, sizes, runs // points)
        if found.width <= width:
            break
    return found


def gridded(curve: Curve, generator: np.random.Generator, sizes: Sequence[int], repetitions: int) -> Answer:
    """EMM of a curve from a fixed grid."""
    simulation = Simulation(curve, generator)
    seen = [simulation.grid_run(size) for size in sizes for _ in range(repetitions)]
    return answer(Posterior(seen, LOW, HIGH, ZETA), simulation, len(seen))
