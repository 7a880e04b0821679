"""`find_emm`: the Effective Model Memorization of a setting, by as few and as short training runs as will do."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any

from diffmem.atomic_io import output_lock
from diffmem.errors import InputError
from diffmem.executors import Executor, InProcess
from diffmem.inert.boundary import parsing
from diffmem.progress import Progress, silent
from diffmem.studies.curve import Observation, Posterior
from diffmem.studies.measure import Result
from diffmem.studies.run import Outcome, run_trials
from diffmem.studies.search import Candidate, Search, carry_out
from diffmem.studies.trial import Setting, Trial
from diffmem.text import counted

_AT_ONCE = 6  # runs: more of them could not make use of what each other finds


@dataclass(frozen=True)
class EMM:
    """What `find_emm` found: EMM_ζ(P, M, T), the largest N at which the expected R_mem is at least 1 − ζ.

    Attributes:
        setting: P, M and T.
        search: What was asked for.
        results: Results of the runs, in the order in which they were made.
        failures: (size, error) of those that failed.
    """

    setting: Setting
    search: Search
    results: tuple[Result, ...]
    failures: tuple[tuple[int, str], ...] = ()

    @cached_property
    def posterior(self) -> Posterior:
        return self.search.posterior([observation(result) for result in self.results])

    @property
    def size(self) -> float:
        """EMM, the median of what it may be."""
        return self.posterior.median

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval: noise of sampling, differences between runs, the shape of the curve, and that R_mem of a
        run is the highest of several estimates, included."""
        return self.posterior.interval()

    @property
    def unresolved(self) -> list[str]:
        """What the runs leave open, in sentences."""
        failed = [f"the run on {size:,} images failed: {error}" for size, error in self.failures]
        return failed + self.search.unresolved([observation(result) for result in self.results])

    @property
    def seconds(self) -> float:
        """Wall-clock time of all runs together."""
        return sum(result.seconds for result in self.results)

    @property
    def outside(self) -> str | None:
        """Where EMM lies beyond the sizes allowed, more likely than not: "below 3, the smallest allowed size";
        None where it does not."""
        if self.size < self.search.low:
            return f"below {self.search.low:,}, the smallest allowed size"
        if self.size > self.search.high:
            return f"above {self.search.high:,}, the largest allowed size"
        return None

    def verdict(self) -> str:
        """One sentence for a person."""
        low, high = self.interval
        if (outside := self.outside) is not None:
            return (
                f"EMM at ζ = {self.search.zeta:g} is probably {outside} (95 % interval {low:,.0f} to {high:,.0f}, from "
                f"the shape of the curve alone), from {counted(len(self.results), 'run')}"
            )
        return (
            f"EMM at ζ = {self.search.zeta:g} is about {self.size:,.0f} training images (95 % interval {low:,.0f} to "
            f"{high:,.0f}), from {counted(len(self.results), 'run')}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain JSON types."""
        return {
            "emm": self.size,
            "interval": list(self.interval),
            "zeta": self.search.zeta,
            "unresolved": self.unresolved,
            "seconds": self.seconds,
            "spread": self.posterior.spread,
            "search": vars(self.search),
            "setting": self.setting.to_json(),
            "runs": [result.to_json() for result in self.results],
            "failures": [{"size": size, "error": error} for size, error in self.failures],
        }

    @staticmethod
    def from_dict(values: Mapping[str, Any], source: str | Path = "values") -> EMM:
        """The EMM that `to_dict` gave: its runs are read, all else is computed again. Raises InputError, naming
        `source`, for anything else."""
        with parsing(source, "the result of a search for EMM"):
            return EMM(
                Setting.from_json(values["setting"]),
                Search(**values["search"]),
                tuple(Result.from_json(run) for run in values["runs"]),
                tuple((failure["size"], failure["error"]) for failure in values["failures"]),
            )

    def save(self, folder: str | Path) -> Path:
        """Writes `emm.json`, `runs.csv`, `emm.svg` and `report.html` into `folder`; returns the page's path."""
        from diffmem.studies.report import write_emm

        return write_emm(self, Path(folder))


def observation(result: Result) -> Observation:
    """What a run says about the curve of R_mem: the counts of its snapshots, or, where only the highest is known, that
    one, and what it would be without what the highest of as many estimates is too high by on average, at most."""
    if counts := [(each.count, each.total) for each in result.snapshots]:
        return Observation.of_snapshots(result.size, counts, result.censored)
    looks, share, alike = result.looks or 1, result.r_mem, None
    if looks > 1:
        # The mean of the highest of so many normal deviates (Blom 1958); snapshots that differ err by less.
        deviation = NormalDist().inv_cdf((looks - 0.375) / (looks + 0.25))
        alike = max(0.0, share - deviation * math.sqrt(share * (1 - share) / result.total))
    return Observation(result.size, result.count, result.total, result.censored, alike)


def find_emm(
    setting: Setting,
    out: str | Path,
    *,
    sizes: tuple[int, int] | None = None,
    zeta: float = 0.1,
    precision: float = 0.1,
    repetitions: int = 5,
    runs: int = 40,
    executor: Executor | None = None,
    on_trial: Callable[[Outcome], None] = lambda outcome: None,
    watch: Callable[[EMM], None] = lambda emm: None,
    progress: Progress = silent,
) -> EMM:
    """EMM_ζ of a setting, with an interval; the runs are kept in `out`, from which a search that ended early resumes.

    The next size is chosen by what is known so far (see `diffmem.studies.search`): the middle of what EMM may be, in ln
    N, and both sides of it. A run ends as soon as it is decided whether its R_mem reaches 1 − ζ, and images are sampled
    in batches until that is decided, or all `setting.samples` are drawn. Subsets are nested and class-balanced within a
    repetition; a repetition has subset and seed of its own.

    Args:
        setting: P, M and T.
        out: Folder of the runs.
        sizes: The smallest and the largest N to try; None: from 2 images of each class to all there are.
        zeta: ζ; R_mem at EMM is 1 − ζ.
        precision: Half of the 95 % interval as a share of EMM at which to stop.
        repetitions: Runs per size at most.
        runs: Runs in all at most.
        executor: See `diffmem.executors`; with several slots, up to six runs are made at once.
        on_trial: Called with every run that ends.
        watch: Called with what is known so far, before every round of runs.
        progress: Called as `progress(stage, done, total)`.

    Raises:
        InputError: Nothing can be found out, because no run succeeds.
    """
    with output_lock(out):
        return _find_emm(setting, out, sizes, zeta, precision, repetitions, runs, executor, on_trial, watch, progress)


def _find_emm(
    setting: Setting,
    out: str | Path,
    sizes: tuple[int, int] | None,
    zeta: float,
    precision: float,
    repetitions: int,
    runs: int,
    executor: Executor | None,
    on_trial: Callable[[Outcome], None],
    watch: Callable[[EMM], None],
    progress: Progress,
) -> EMM:
    executor = InProcess() if executor is None else executor
    classes, largest = setting.limits()
    low, high = (2 * classes, largest) if sizes is None else sizes
    if high > largest:
        raise InputError(
            f"sizes up to {high:,}: {setting.data.source} has {largest:,} images in equal numbers per class"
        )
    search = Search(low, high, zeta, precision, repetitions, runs, step=classes)
    results: list[Result] = []
    failures: list[tuple[int, str]] = []

    def measure(candidates: Sequence[Candidate]) -> list[Observation | None]:
        watch(EMM(setting, search, tuple(results), tuple(failures)))
        trials = [Trial(setting, each.size, each.repetition, at_least=1 - zeta) for each in candidates]
        seen: list[Observation | None] = []
        for outcome in run_trials(trials, out, executor, on_trial=on_trial):
            if outcome.result is None:
                failures.append((outcome.trial.size, outcome.error or ""))
            else:
                results.append(outcome.result)
            seen.append(None if outcome.result is None else observation(outcome.result))
        if not results and len(failures) >= min(3, runs):
            raise InputError(f"the first runs all failed, the last one with: {failures[-1][1]}")
        progress("searching EMM", len(results) + len(failures), runs)
        return seen

    carry_out(search, measure, min(executor.slots, _AT_ONCE))
    return EMM(setting, search, tuple(results), tuple(failures))
