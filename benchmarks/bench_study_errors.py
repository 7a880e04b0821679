"""Do the verdicts of studies keep their error, and do their intervals cover?

`python -m benchmarks study_errors` simulates questions: logit R_mem of a repetition and a variant is
m + a_r + δ_v + e_rv, a_r normal with τ, e_rv with σ, of one variant of those compared with `ratio`·σ; a run is the
highest of three snapshots of 500 images each, all of them as good. The analysis is that of `diffmem.studies`.
results/study-errors.csv holds a row per kind of study:
`false`, how often no difference is called one, in either direction; `false_equivalent`, how often a difference of just
the margin is called none; `covered`, how often the 95 % interval holds a difference of 0.8; `power`, how often that is
found; `equivalent`, how often no difference is found to be none. Of `looks` after every repetition from 2 on (0: none),
all of them together count. Standard errors are 1.1 points at 5 % and 2 points at 20 %.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from benchmarks.harness import RESULTS, Bench
from benchmarks.rows import write_table
from diffmem.data import DatasetSpec
from diffmem.studies import Question, Result, Setting, Study, Variant
from diffmem.studies.analysis import CONTRARY, EQUIVALENT, HOLDS
from diffmem.studies.findings import answer, corrected

VALUES, MINUTES = "study-errors.csv", 15
STUDIES = 400
SAMPLES, SNAPSHOTS, EFFECT = 500, 3, 0.8
SIGMA, TAU = 0.25, 0.6  # about those of small digits
COLUMNS = (
    "variants", "repetitions", "looks", "r_mem", "tau", "sigma", "ratio", "studies", "false", "false_equivalent",
    "covered", "power", "equivalent",
)  # fmt: skip
KINDS = [
    *[(variants, repetitions, 0, 0.8, TAU, SIGMA, 1.0) for variants in (2, 5) for repetitions in (2, 3, 4, 6, 8, 12)],
    *[(variants, repetitions, 0, 0.8, TAU, SIGMA, 2.0) for variants in (2, 5) for repetitions in (2, 3, 4, 8)],
    *[(3, 4, 0, r_mem, TAU, SIGMA, 1.0) for r_mem in (0.01, 0.05, 0.5, 0.95, 0.99, 0.998)],
    *[(3, 4, 0, 0.8, tau, sigma, 1.0) for tau, sigma in ((0.0, 0.25), (1.2, 0.25), (0.6, 0.0), (0.6, 0.6))],
    *[(variants, repetitions, 1, 0.8, TAU, SIGMA, 1.0) for variants in (2, 3) for repetitions in (6, 12)],
]


def run(bench: Bench) -> None:
    rows = [row(*kind, studies=10 if bench.quick else STUDIES) for kind in KINDS]
    path = RESULTS / f"study-errors{'.quick' if bench.quick else ''}.csv"
    write_table(path, rows, COLUMNS)


def row(
    variants: int, repetitions: int, looks: int, r_mem: float, tau: float, sigma: float, ratio: float, studies: int
) -> dict:
    """A line of the table."""
    random = np.random.default_rng([variants, repetitions, looks, round(1000 * r_mem), round(100 * ratio)])
    setting = Setting(DatasetSpec("builtin:digits"), {"images": 64})
    levels = tuple(Variant(f"v{index}", replace(setting, samples=index + 1)) for index in range(variants))
    question = Question("", "v1", "v0")
    study = Study("s", "S", "f", levels, (50,), repetitions, questions=(question,))
    if looks:
        study = replace(study, repetitions=2, max_repetitions=repetitions)
    middle = math.log(r_mem / (1 - r_mem))
    found: dict[float, list] = {0.0: [], question.margin: [], EFFECT: []}
    for difference, answers in found.items():
        for _ in range(studies):
            logits = middle + random.normal(0, tau, (repetitions, 1)) + random.normal(0, sigma, (repetitions, variants))
            logits[:, 1] += random.normal(0, sigma * math.sqrt(ratio**2 - 1), repetitions)
            logits[:, 1] += difference
            shares = 1 / (1 + np.exp(-logits))
            counts = random.binomial(SAMPLES, shares, (SNAPSHOTS, *shares.shape)).max(axis=0)
            cells = {
                (level.name, 50): {r: _result(int(n), r) for r, n in enumerate(column)}
                for level, column in zip(levels, counts.T, strict=True)
            }
            answers += corrected([answer(study, question, cells)])
    none, margin, effect = found.values()
    covered = []
    for each in effect:
        low, high = each.simultaneous("logit") if looks else each.interval("logit")
        covered.append(low <= EFFECT <= high)

    def share(answers: list, *verdicts: str) -> str:
        return f"{np.mean([each.verdict in verdicts for each in answers]):.3f}"

    values = (
        variants, repetitions, f"2 to {repetitions}" if looks else 0, r_mem, tau, sigma, ratio, studies,
        share(none, HOLDS, CONTRARY), share(margin, EQUIVALENT), f"{np.mean(covered):.3f}", share(effect, HOLDS),
        share(none, EQUIVALENT),
    )  # fmt: skip
    return dict(zip(COLUMNS, values, strict=True))


def _result(count: int, repetition: int) -> Result:
    return Result(
        "", 50, repetition, count, SAMPLES, None, False, 1, 1.0, 1, 1, 0.0, 0.0, "", (), {}, looks=SNAPSHOTS
    )  # fmt: skip
