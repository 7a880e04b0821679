"""Does the interval of an audit that may miss neighbors hold the share of copies as often as it says?

`python -m benchmarks verification` simulates audits through an index with codes: Q images are drawn of a population
with a share of copies; the verdict of some is open (no bound settles it). The search finds the copies among these with
its recall, and calls a thousandth of the others copies that are not. So many of the open images, chosen by strata as
`diffmem audit --verify` does it, are searched exactly. results/verification.csv holds a row per setting: how many of
the audits' intervals hold the share of copies of the population, how many intervals of the count hold that of exact
search, and how wide they are beside Wilson's interval of an exact audit (median).

Where nothing is open, the interval is Wilson's, that of an exact audit; its coverage is computed, not simulated, and
that of Clopper and Pearson's exact interval is beside it ("exact_covered"). Wilson's holds the share with 95 % on
average over shares, but less at some: 83.8 % at the worst, where just below 0.18 copies are to be expected: its lower
end for one copy is 0.18/Q then, and one is seen in 16 % of audits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import product

import numpy as np

from benchmarks.harness import RESULTS, Bench
from benchmarks.rows import write_table
from diffmem.memorization import verification
from diffmem.memorization.statistics import exact_interval, wilson_interval
from diffmem.memorization.verification import Key, Stratum, Verification, allocate

VALUES, MINUTES = "verification.csv", 5
MANY = 5000  # images
# Per setting, of fewer images than that and of more: coverage of 95 % is known within 1.4 and 2.1 points.
AUDITS, AUDITS_OF_MANY = 1000, 400
ALARMS = 0.001  # of open images that are not copies: called copies where the second nearest was missed
COLUMNS = (
    "images", "verified", "copies", "open", "recall", "audits", "covered", "counted", "width", "wilson_covered",
    "exact_covered",
)  # fmt: skip
Setting = tuple[int, int, float, float, float]  # images, verified, share of copies, open share, recall


def settings() -> Iterator[Setting]:
    """All of them, the most first where nothing is open."""
    sizes = ((300, 100), (2000, 400), (10_000, 1000))
    for images, verified in sizes:
        # Where Wilson's dips first, and elsewhere.
        yield from ((images, verified, copies, 0.0, 1.0) for copies in (0.17 / images, 0.002, 0.02, 0.2, 0.6, 0.98))
    for (images, verified), copies in product(sizes, (0.002, 0.05, 0.5)):
        yield from ((images, verified, copies, some, recall) for some, recall in product((0.1, 0.9), (0.6, 0.9, 0.99)))


def run(bench: Bench) -> None:
    for count in (0, 1, 17.5, 300):  # not the real one, which takes most of the time
        assert np.allclose(share_interval(count, 300, 0.95), verification._share_interval(count, 300, 0.95), atol=1e-9)
    verification._share_interval = share_interval
    rows = [
        summary(setting, 10 if bench.quick else AUDITS if setting[0] < MANY else AUDITS_OF_MANY)
        for setting in settings()
    ]
    path = RESULTS / f"verification{'.quick' if bench.quick else ''}.csv"
    write_table(path, rows, COLUMNS)
    open_ones = [row for row in rows if row["audits"] != "0"]
    print(f"{len(rows)} settings", flush=True)
    for name in ("covered", "counted"):
        worst = min(open_ones, key=lambda row: float(row[name]))
        print(f"{len(open_ones)} settings, {name}: at least {worst[name]} ({worst})", flush=True)


def summary(setting: Setting, audits: int) -> dict[str, str]:
    """A row."""
    images, verified, copies, some, recall = setting
    shares = {"wilson_covered": coverage(wilson_interval, images, copies),
              "exact_covered": coverage(exact_interval, images, copies)}  # fmt: skip
    if some == 0:
        audits, figures = 0, {"covered": shares["wilson_covered"], "counted": 1.0, "width": 1.0}
    else:
        figures = simulated(setting, audits)
    given = dict(zip(COLUMNS, (images, verified, copies, some, recall, audits), strict=False))
    return {name: f"{value:g}" for name, value in given.items()} | {
        name: f"{value:.3f}" for name, value in {**figures, **shares}.items()
    }


@lru_cache(None)
def share_interval(count: float, total: int, confidence: float) -> tuple[float, float]:
    """Clopper and Pearson's interval by scipy, which is fast."""
    from scipy.special import betaincinv

    side = (1 - confidence) / 2
    low = float(betaincinv(count, total - count + 1, side)) if count > 0 else 0.0
    return low, 1 - float(betaincinv(total - count, count + 1, side)) if count < total else 1.0


def coverage(interval, images: int, copies: float) -> float:
    """With which probability an interval of a share holds it."""
    counts = np.arange(images + 1)
    logs = verification.log_factorials(images)[: images + 1]
    log_choose = logs[-1] - logs - logs[::-1]
    chance = np.exp(log_choose + counts * math.log(copies) + (images - counts) * math.log1p(-copies))
    likely = np.flatnonzero(chance > 1e-9)
    inside = [low <= copies <= high for low, high in (interval(int(count), images) for count in likely)]
    return float(chance[likely][inside].sum())


def audited(
    drawn: Mapping[tuple[bool, bool, bool], int], budget: int, rng: np.random.Generator
) -> tuple[Verification, int]:
    """What an audit of so many images knows once `budget` of those that are open are searched exactly, and how many
    copies there are among all.

    drawn: images by whether they are called copies, whether that is settled, and whether they are copies.
    """
    truth: dict[Key, list[int]] = {}
    for (called, settled, copy), number in drawn.items():
        # Wrong verdicts lie near the threshold in half the cases, right ones seldom.
        close = 0 if settled else int(rng.binomial(number, 0.5 if called != copy else 0.05))
        for near, part in ((True, close), (False, number - close)):
            entry = truth.setdefault((called, settled, False, near), [0, 0])
            entry[0] += part
            entry[1] += part * copy
    chosen = allocate({key: size for key, (size, _) in truth.items()}, budget)
    strata = [
        Stratum(*key, size, chosen[key], int(rng.hypergeometric(right, size - right, chosen[key])))
        for key, (size, right) in truth.items()
        if size
    ]
    return Verification(tuple(strata)), sum(right for _, right in truth.values())


def simulated(setting: Setting, audits: int) -> dict[str, float]:
    """Coverage of the share and of the count, and the width beside Wilson's, of so many audits."""
    images, budget, copies, some, recall = setting
    rng = np.random.default_rng([images, *(round(1e4 * each) for each in (copies, some, recall))])
    # (called, settled, is a copy): what is settled is called what it is.
    kinds = {
        (True, True, True): copies * (1 - some), (False, True, False): (1 - copies) * (1 - some),
        (True, False, True): copies * some * recall, (False, False, True): copies * some * (1 - recall),
        (True, False, False): (1 - copies) * some * ALARMS, (False, False, False): (1 - copies) * some * (1 - ALARMS),
    }  # fmt: skip
    covered = counted = 0
    widths = []
    for drawn in rng.multinomial(images, list(kinds.values()), size=audits).tolist():
        found, right = audited(dict(zip(kinds, drawn, strict=True)), budget, rng)
        low, high = found.interval()
        covered += low <= copies <= high
        least, most = found.count_interval
        counted += least <= right <= most
        exact = wilson_interval(right, images)
        widths.append((high - low) / (exact[1] - exact[0]))
    return {"covered": covered / audits, "counted": counted / audits, "width": float(np.median(widths))}
