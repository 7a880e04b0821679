"""Early warning: the gap between losses on unseen and on training images opens before copies appear.

That a model's loss on unseen images rises above that on training images where it memorizes is in Bonnaire et al. 2025
(arXiv 2505.17638), and that one can tell memorization from denoising errors at a noise level in Carlini et al. 2023
(arXiv 2301.13188). The sentence tested here is about time: does the gap show first?

Both times are those of audits of one run, each tested at every audit with an error of 5 % over all audits that the
run may have: that of the gap, over all noise levels together (`diffmem.evaluation.first_warning`), and that of copies,
when R_mem is above the share of unseen images that the rule calls copies (Fisher's exact test, one-sided). Their ratio
is the lead. A gap at the first audit may have opened before, and a run that ended without copies had none: both make
the lead that is counted too small. A run with copies and without a gap counts as if the gap showed at its last audit.

Verdict. The gap warns early where the mean log lead over runs is above 0 (Student's t, two-sided at 5 %), and is late
where it is below. Runs of one repetition share images; a lead that changes with N widens the interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from diffmem.evaluation import LossGap, first_warning, first_warnings
from diffmem.html_report import percent
from diffmem.studies.analysis import ALPHA
from diffmem.studies.laws.finding import Estimate, LawFinding, Test, mean_of, tested
from diffmem.studies.measure import Result

SOURCE = "Bonnaire et al. 2025 (arXiv 2505.17638), Carlini et al. 2023 (arXiv 2301.13188)"
TEXT = "the gap between losses on unseen and on training images opens before copies appear"
_STEP = math.log(2) / 2  # between audits: leads are known no better


@dataclass(frozen=True)
class Lead:
    """One run.

    Attributes:
        size: N.
        repetition: Of the run.
        gap: Images seen when the gap shows; None: never.
        copies: Images seen when copies show; None: never.
        end: Images seen at the last audit.
        r_mem: At the audit at which the gap shows.
        sigma: The noise level that shows it most clearly there.
        levels: By noise level, images seen when it shows the gap alone.
    """

    size: int
    repetition: int
    gap: int | None
    copies: int | None
    end: int
    r_mem: float | None
    sigma: float | None
    levels: dict[float, int | None]

    @property
    def log(self) -> float | None:
        """Log of the lead; None where neither showed."""
        if self.gap is None and self.copies is None:
            return None
        return math.log((self.copies or self.end) / (self.gap or self.end))


def lead(result: Result) -> Lead | None:
    """The lead in one run; None where its snapshots were not watched."""
    watched = [each.watched for each in result.snapshots if each.watched is not None]
    if not watched or len(watched) < len(result.snapshots) or result.alarms is None:
        return None
    looks = result.looks or len(watched)
    gaps = [LossGap.from_json(each.gap) for each in watched]
    lengths = [each.images for each in result.snapshots]
    warning = first_warning(gaps, looks)
    copies = first_copies([(each.count, each.total) for each in result.snapshots], result.alarms, looks)
    levels = {sigma: None if at is None else lengths[at] for sigma, at in first_warnings(gaps, looks).items()}
    return Lead(
        result.size, result.repetition, None if warning is None else lengths[warning.place],
        None if copies is None else lengths[copies], lengths[-1],
        None if warning is None else result.snapshots[warning.place].ratio,
        None if warning is None else warning.sigma, levels,
    )  # fmt: skip


def first_copies(counts: Sequence[tuple[int, int]], alarms: tuple[int, int], looks: int) -> int | None:
    """The place of the first audit with more copies than the rule's false alarms explain, at 5 % over all looks.

    Args:
        counts: (copies, images) of each audit.
        alarms: The same of unseen images.
        looks: How many audits there may be.
    """
    from scipy.stats import hypergeom  # scikit-learn brings it

    for place, (count, total) in enumerate(counts):
        everything, copies = total + alarms[1], count + alarms[0]
        if hypergeom.sf(count - 1, everything, copies, total) < ALPHA / looks:
            return place
    return None


def judge(results: Sequence[Result]) -> LawFinding:
    """What the runs say of the law.

    Args:
        results: Runs of one setting, of several sizes.
    """
    leads = [each for each in map(lead, results) if each is not None]
    logs = [each.log for each in leads if each.log is not None]
    notes, estimates, test = [], [], Test(TEXT)
    if len(logs) > 1:
        mean = mean_of(logs, _STEP / math.sqrt(12))
        low, high = map(math.exp, mean.interval())
        name = "lead of the gap, as a factor of training time"
        estimates.append(Estimate(name, math.exp(mean.estimate), (low, high), f"{len(logs)} runs"))
        later, earlier = min(1.0, 2 * mean.p_above), min(1.0, 2 * (1 - mean.p_above))
        test = tested(TEXT, later, earlier, f"{name}: {estimates[0].figures}; asked: above 1")
    warned = [each for each in leads if each.gap is not None]
    if warned:
        share = sum(each.r_mem or 0.0 for each in warned) / len(warned)
        notes.append(f"When the gap showed, R_mem was {percent(share)} on average ({len(warned)} runs).")
    if first := first_levels(leads):
        most = max(first.values())
        best = [f"{sigma:.2g}" for sigma, share in first.items() if share == most]
        notes.append(
            f"σ = {', '.join(best)}: in {percent(most)} of the runs in which single levels show the gap no other level "
            "shows it before."
        )
    for count, what in (
        (sum(each.copies is None for each in leads), "ended without copies: their leads are lower bounds"),
        (sum(each.gap is None and each.copies is not None for each in leads), "had copies and no gap"),
        (sum(each.log is None for each in leads), "had neither and do not count"),
    ):
        if count:
            notes.append(f"{count} of {len(leads)} runs {what}.")
    details = {
        "runs": [{**asdict(each), "levels": {f"{s:.4g}": at for s, at in each.levels.items()}} for each in leads],
        "first": {f"{sigma:.4g}": share for sigma, share in first.items()},
    }
    return LawFinding("early-warning", SOURCE, (test,), tuple(estimates), tuple(notes), details)


def first_levels(leads: Sequence[Lead]) -> dict[float, float]:
    """By noise level, the share of runs in which no other level shows the gap before it."""
    runs = [each.levels for each in leads if any(at is not None for at in each.levels.values())]
    if not runs:
        return {}
    found = dict.fromkeys(sorted({sigma for levels in runs for sigma in levels}), 0.0)
    for levels in runs:
        earliest = min(at for at in levels.values() if at is not None)
        for sigma, at in levels.items():
            found[sigma] += at == earliest
    return {sigma: count / len(runs) for sigma, count in found.items()}
