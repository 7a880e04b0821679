"""Does the search for EMM keep its promise, and what does it save?

`python -m benchmarks emm` simulates memorization: curves of R_mem over N, of the model's shape (logistic) and of others
(probit, and the two log-log curves), at random places and of random steepness, runs that differ, and R_mem that rises
with training. EMM of each curve is searched by `diffmem.studies`, and read off fixed grids of sizes, every run at
full length with 10,000 samples of 10 snapshots. Their intervals come from the same posterior, and the grid that counts
is the cheapest of a family (5, 9 or 17 sizes, 1 to 8 runs each) whose interval is as narrow as the search's on the same
curve, or the largest where none is. "grid": over all sizes allowed, as the search has to start; "near grid": sizes from
a third of the true EMM to three times it, as one who knows it already would choose them. Costs are in training steps of
one image, an evaluation of the network in sampling being a third of one. results/emm.csv holds a row per shape: how
many of the 95 % intervals hold the true EMM, half their width (median, as a share of EMM), runs per search, and how
much more the grids cost (median ratio).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import RESULTS, Bench
from diffmem.memorization import SequentialTest
from diffmem.studies.curve import Observation, Posterior
from diffmem.studies.search import Candidate, Search, carry_out, half_width

VALUES, MINUTES = "emm.csv", 30
CURVES, COMPARED = 120, 12  # curves per shape, and how many of them are gridded too
PRECISION = 0.1
COLUMNS = ("shape", "curves", "covered", "half_width", "runs", "unresolved", "grid_costs", "near_grid_costs")
LOW, HIGH, ZETA = 100, 10_000, 0.1
EPOCHS, SNAPSHOTS, SAMPLES, CALLS, BATCH = 40_000, 10, 10_000, 35, 250
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(61)


def _probit(eta):
    # 1.702 gives it the slope of the logistic curve.
    return 0.5 * (1 + _erf(np.asarray(eta) / 1.702 / math.sqrt(2)))


_erf = np.vectorize(math.erf)
SHAPES: dict[str, Callable] = {
    "logistic": lambda eta: 1 / (1 + np.exp(-eta)),
    "probit": _probit,
    "log-log": lambda eta: np.exp(-np.exp(-eta)),
    "complementary log-log": lambda eta: 1 - np.exp(-np.exp(eta)),
}


def run(bench: Bench) -> None:
    rows = [summary(shape, 4 if bench.quick else CURVES, 2 if bench.quick else COMPARED) for shape in SHAPES]
    path = RESULTS / f"emm{'.quick' if bench.quick else ''}.csv"
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def summary(shape: str, curves: int, compared: int) -> dict[str, str]:
    """A row: the search on so many curves of a shape."""
    search = Search(LOW, HIGH, ZETA, PRECISION)
    answers, grids, near_grids = [], [], []
    for index in range(curves):
        generator = np.random.default_rng([index, len(shape)])
        curve = Curve.drawn(shape, generator)
        found = searched(curve, generator, search)
        answers.append(found)
        if index < compared:
            grids.append(cheapest_grid(curve, generator, found.width).cost / found.cost)
            near = round(curve.emm / 3), round(curve.emm * 3)
            near_grids.append(cheapest_grid(curve, generator, found.width, *near).cost / found.cost)
    row = {
        "shape": shape,
        "curves": str(curves),
        "covered": f"{np.mean([found.covered for found in answers]):.3f}",
        "half_width": f"{np.median([found.width for found in answers]):.3f}",
        "runs": f"{np.median([found.runs for found in answers]):.0f}",
        "unresolved": f"{np.mean([found.width > PRECISION for found in answers]):.3f}",
        "grid_costs": f"{np.median(grids):.1f}",
        "near_grid_costs": f"{np.median(near_grids):.1f}",
    }
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    return row


@dataclass(frozen=True)
class Curve:
    """A simulated setting. place: ln N where η is 0; steepness: of η over ln N; spread: of runs, in η."""

    shape: str
    place: float
    steepness: float
    spread: float

    @staticmethod
    def drawn(shape: str, generator: np.random.Generator) -> Curve:
        return Curve(
            shape,
            generator.uniform(math.log(3 * LOW), math.log(HIGH / 2)),
            math.exp(generator.normal(math.log(3.0), 0.4)),
            generator.uniform(0.05, 0.6),
        )

    def share(self, size: float, z: np.ndarray | float = 0.0, progress: float = 1.0) -> np.ndarray:
        """R_mem of a run whose deviation is z, after a part of its training."""
        eta = self.steepness * (self.place - math.log(size)) + self.spread * np.asarray(z) + 4 * math.log(progress)
        return np.clip(SHAPES[self.shape](eta), 0, 1)

    @property
    def emm(self) -> float:
        """Where the expected R_mem is 1 − ζ."""
        low, high = math.log(LOW) - 6, math.log(HIGH) + 6
        while high - low > 1e-9:
            middle = (low + high) / 2
            expected = (self.share(math.exp(middle), _NODES) * _WEIGHTS).sum() / _WEIGHTS.sum()
            low, high = (middle, high) if expected >= 1 - ZETA else (low, middle)
        return math.exp(low)


class Simulation:
    """Runs on a curve, and what they cost."""

    def __init__(self, curve: Curve, generator: np.random.Generator) -> None:
        self.curve, self.generator = curve, generator
        self.cost = 0.0

    def search_run(self, candidate: Candidate) -> Observation:
        """A run as a trial with a question makes it: ended when decided."""
        question = SequentialTest(1 - ZETA).shared_among(SNAPSHOTS)
        z = self.generator.normal()
        best: Observation | None = None
        for snapshot in range(1, SNAPSHOTS + 1):
            self.cost += candidate.size * EPOCHS / SNAPSHOTS
            share = float(self.curve.share(candidate.size, z, snapshot / SNAPSHOTS))
            count = total = 0
            while total < SAMPLES and question.answer(count, total) is None:
                count, total = count + int(self.generator.binomial(BATCH, share)), total + BATCH
            self.cost += total * CALLS / 3
            censored = bool(question.answer(count, total)) and snapshot < SNAPSHOTS
            if best is None or count / total >= best.count / best.total:
                best = Observation(candidate.size, count, total, censored)
            if censored:
                break
        return best

    def grid_run(self, size: int) -> Observation:
        """A run of full length, with all samples."""
        share = float(self.curve.share(size, self.generator.normal()))
        self.cost += size * EPOCHS + SNAPSHOTS * SAMPLES * CALLS / 3
        return Observation(size, int(self.generator.binomial(SAMPLES, share)), SAMPLES)


@dataclass(frozen=True)
class Answer:
    """covered: whether the interval holds the true EMM; width: its half, as a share of the median; cost."""

    covered: bool
    width: float
    cost: float
    runs: int


def answer(posterior: Posterior, simulation: Simulation, runs: int) -> Answer:
    low, high = posterior.interval()
    return Answer(low <= simulation.curve.emm <= high, half_width(posterior), simulation.cost, runs)


def searched(curve: Curve, generator: np.random.Generator, search: Search) -> Answer:
    """EMM of a curve by the search."""
    simulation = Simulation(curve, generator)
    made = carry_out(search, lambda candidates: [simulation.search_run(candidate) for candidate in candidates])
    return answer(search.posterior([seen for _, seen in made]), simulation, len(made))


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
