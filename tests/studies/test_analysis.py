"""Questions and their verdicts: by pairs, at 5 % for a whole report, also where one looks after every repetition."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from studies.test_findings import answer, result, results_of, study
from studies.tiny import TINY

from diffmem.errors import InputError
from diffmem.studies import Question, Study, Trial, Variant
from diffmem.studies.analysis import (
    CONTRARY,
    EQUIVALENT,
    HOLDS,
    PAIRS,
    POOLED,
    UNDECIDED,
    UNMEASURED,
    Effect,
    estimate,
    holm,
    spent,
    student,
    up_to,
)
from diffmem.studies.findings import answer as question_answered
from diffmem.studies.findings import corrected, find_among

MORE = Question("width raises R_mem", "wide", "narrow")
ALIKE = replace(MORE, kind="equivalence")


def test_verdicts_follow_the_pairs():
    """Repetitions differ by far more than the variants do within each."""
    low, high = (0.2, 0.5, 0.8, 0.4), (0.3, 0.62, 0.87, 0.53)
    assert answer(MORE, {"wide": high, "narrow": low}).verdict == HOLDS
    assert answer(MORE, {"wide": low, "narrow": high}).verdict == CONTRARY
    # The same runs, paired otherwise.
    assert answer(MORE, {"wide": high, "narrow": low[::-1]}).verdict == UNDECIDED
    assert answer(MORE, {"wide": high}).verdict == UNMEASURED
    # One pair decides nothing, however large the difference.
    assert answer(MORE, {"wide": (0.9,), "narrow": (0.1,)}).verdict == UNDECIDED
    near = (0.21, 0.49, 0.8, 0.41)
    assert answer(MORE, {"wide": near, "narrow": low}).verdict == EQUIVALENT
    assert answer(ALIKE, {"wide": near, "narrow": low}).verdict == EQUIVALENT
    assert answer(replace(ALIKE, margin=0.02), {"wide": near, "narrow": low}).verdict == UNDECIDED
    assert answer(ALIKE, {"wide": tuple(1 - each for each in low), "narrow": low}).verdict == UNDECIDED
    assert answer(ALIKE, {"wide": (0.8, 0.93, 0.97, 0.9), "narrow": low}).verdict == CONTRARY


def test_a_difference_is_that_of_the_means_and_both_scales_are_given():
    found = answer(MORE, {"wide": (0.8, 0.6), "narrow": (0.3, 0.2)})
    assert found.sizes == (20, 30)
    assert found.estimate.points.estimate == pytest.approx(0.45)
    logit = [math.log((1000 * p + 0.5) / (1000 * (1 - p) + 0.5)) for p in (0.8, 0.6, 0.3, 0.2)]
    assert found.estimate.logit.estimate == pytest.approx((logit[0] + logit[1] - logit[2] - logit[3]) / 2)
    assert found.estimate.logit.freedom == 1
    low, high = found.estimate.points.interval()
    assert high - low == pytest.approx(2 * 12.706 * 0.05, rel=1e-3)  # two pairs: 0.5 and 0.4
    assert found.interval("points") == found.simultaneous("points") == (low, 1.0)  # one question


def test_where_r_mem_is_saturated_points_decide():
    found = answer(MORE, {"wide": (1.0, 0.999, 1.0), "narrow": (0.995, 0.996, 0.994)})
    assert (found.estimate.scale, found.verdict) == ("points", HOLDS)
    alike = {"wide": (1.0, 1.0, 1.0), "narrow": (1.0, 1.0, 1.0)}
    assert answer(ALIKE, alike).verdict == UNDECIDED  # the rule cannot tell
    assert answer(ALIKE, {"wide": (0.0, 0.0, 0.0), "narrow": (0.5, 0.6, 0.5)}).verdict == CONTRARY
    # At one end only one of the two is saturated: the logits say it.
    found = answer(MORE, {"wide": (0.5, 0.6, 0.7), "narrow": (0.0, 0.0, 0.0)})
    assert (found.estimate.scale, found.verdict) == ("logit", HOLDS)


def test_trends_are_straight_lines_over_levels_or_sizes():
    subject = study(Question("", kind="trend"), log_axis=True)
    assert subject.contrast(subject.questions[0]) == pytest.approx(
        {("wide", 20): 0.5, ("wide", 30): 0.5, ("narrow", 20): -0.5, ("narrow", 30): -0.5}
    )
    falls = Question("", kind="trend", over="size", falls=True)
    assert falls.compared == "smallest N against largest, on the straight line through all of them"
    assert Question("", kind="trend").compared == "last level against first, on the straight line through all of them"
    subject = replace(study(falls), sizes=(10, 20, 40))
    weights = subject.contrast(falls)
    assert weights == pytest.approx(
        {(name, size): w for name in ("narrow", "wide") for size, w in ((10, 0.5), (20, 0.0), (40, -0.5))}
    )
    # R_mem that falls by 2 in logit for every factor of e falls by 2 ln 4 over all sizes.
    assert sum(w * -2 * math.log(size) for (_, size), w in weights.items()) == pytest.approx(2 * math.log(4))
    assert subject.contrast(falls, {("wide", 10)}) == {}


def test_a_question_that_makes_no_sense_is_refused():
    with pytest.raises(InputError, match="kind is 'more'"):
        replace(MORE, kind="more")
    with pytest.raises(InputError, match="needs two variants"):
        Question("", "wide")
    with pytest.raises(InputError, match="which is not a variant"):
        study(Question("", "wide", "wider"))
    with pytest.raises(InputError, match="below repetitions"):
        study(MORE, max_repetitions=1)
    old = study(MORE).to_json()
    old["claims"] = [{"text": "", "higher": "wide", "lower": "narrow", "sizes": None, "about_equal": True}]
    del old["questions"]
    assert Study.from_json(old).questions == (Question("", "wide", "narrow", kind="equivalence"),)


def test_student():
    """Exact where there are few pairs."""
    assert [student(0.975, freedom) for freedom in (1, 2, 3, 11)] == pytest.approx(
        [12.706, 4.303, 3.182, 2.201], abs=1e-3
    )
    assert Effect(1.0, 0.0, 3).p_difference == 0
    assert Effect(0.5, 0.25, 4).p_difference == pytest.approx(0.1161, abs=1e-4)
    assert Effect(0.1, 0.1, 4).p_equivalence(0.4) == pytest.approx(0.0200, abs=1e-4)


@given(st.lists(st.integers(0, 200), min_size=1, max_size=8))
def test_holm_is_step_down(thousandths):
    """Rejected one by one: the smallest at α/m, the next at α/(m − 1), until one is not."""
    values = [each / 1000 for each in thousandths]
    for alpha in (0.0501, 0.3001):
        order, rejected = np.argsort(values, kind="stable"), set()
        for rank, index in enumerate(order):
            if (len(values) - rank) * values[index] > alpha:
                break
            rejected.add(int(index))
        assert {index for index, p in enumerate(holm(values)) if p <= alpha} == rejected


@given(st.integers(2, 6), st.integers(0, 12))
def test_looks_spend_all_of_alpha_and_no_more(first, more):
    shares = spent(first, first + more)
    assert list(shares) == list(range(first, first + more + 1))
    assert sum(shares.values()) == pytest.approx(1)
    assert min(shares.values()) > 0


def test_more_questions_and_more_looks_ask_for_more():
    shares = {"wide": (0.5, 0.6, 0.56, 0.4), "narrow": (0.35, 0.5, 0.42, 0.3)}
    once = answer(MORE, shares)
    assert once.verdict == HOLDS
    several = study(*[MORE] * 40)
    many = find_among([several], results_of(several, shares), {})[0].answers
    assert {each.verdict for each in many} == {UNDECIDED}
    assert many[0].p == once.p
    assert many[0].family == 40
    low, high = many[0].simultaneous("logit")
    assert low < once.interval("logit")[0] < once.interval("logit")[1] < high
    looked = answer(MORE, shares, max_repetitions=8)
    assert looked.looks == tuple(range(2, 9))
    assert looked.p > once.p


def test_looking_after_every_repetition_keeps_the_error():
    """No difference, and up to eight pairs: the verdicts of all looks together are wrong in 5 % at most, where tests
    of 5 % each would be in more than 10 %."""
    random, subject = np.random.default_rng(0), replace(study(MORE, max_repetitions=8), sizes=(20,))
    trials = {(variant.name, trial.size): trial for variant, trial in subject.cells()}
    wrong = naive = 0
    for _ in range(150):
        logits = random.normal(0, 0.8, 8) + random.normal(0, 0.3, (2, 8))
        counts = random.binomial(500, 1 / (1 + np.exp(-logits)))
        cells = {
            (name, 20): {r: result(trials[name, 20], int(n), 500) for r, n in enumerate(row)}
            for name, row in zip(("wide", "narrow"), counts, strict=True)
        }
        (found,) = corrected([question_answered(subject, MORE, cells)])
        wrong += found.verdict in (HOLDS, CONTRARY)
        naive += any(
            estimate(MORE, subject.contrast(MORE), up_to(cells, n)).logit.p_difference < 0.05 for n in range(2, 9)
        )
    assert wrong <= 10  # of 150, where 5 % are allowed
    assert naive >= 15


def layout(logits: np.ndarray, total: int = 10**6) -> tuple[Study, Question, dict]:
    """A study of as many variants as `logits` [repetition, variant] has, at one size, its first question, its cells."""
    names = [f"v{index}" for index in range(logits.shape[1])]
    variants = tuple(Variant(name, replace(TINY, samples=1 + index)) for index, name in enumerate(names))
    question = Question("", names[0], names[1])
    subject = Study("s", "S", "f", variants, (20,), questions=(question,))
    cells = {}
    for variant, column in zip(variants, logits.T, strict=True):
        counts = np.round(total / (1 + np.exp(-column)))
        runs = [Trial(variant.setting, 20, r) for r in range(len(counts))]
        found = {t.repetition: result(t, int(n), total) for t, n in zip(runs, counts, strict=True) if np.isfinite(n)}
        cells[variant.name, 20] = found
    return subject, question, cells


def test_the_spread_of_all_variants_counts_where_it_is_the_larger_one():
    """Balanced: the residual mean square of the two-way layout, with (R − 1)(V − 1) degrees of freedom."""
    random = np.random.default_rng(1)
    logits = random.normal(0, 1, (3, 1)) + random.normal(0, 0.3, (3, 4))
    logits[:, 1] = logits[:, 0] - 0.2 + 0.01 * np.arange(3)  # the question's own pairs differ less
    subject, question, cells = layout(logits)
    found = estimate(question, subject.contrast(question), cells)
    rest = logits - logits.mean(axis=0) - logits.mean(axis=1, keepdims=True) + logits.mean()
    assert found.method == POOLED
    assert found.logit.freedom == 6
    assert found.logit.estimate == pytest.approx((logits[:, 0] - logits[:, 1]).mean(), abs=1e-4)
    assert found.logit.error == pytest.approx(math.sqrt(2 / 3 * (rest**2).sum() / 6), rel=1e-3)
    # The question's own pairs differ more than the others: these alone decide.
    logits[:, 1] = logits[:, 0] + np.array([-3.0, 0.0, 3.0])
    subject, question, cells = layout(logits)
    found = estimate(question, subject.contrast(question), cells)
    assert (found.method, found.logit.freedom) == (PAIRS, 2)
    assert found.logit.error == pytest.approx(3 / math.sqrt(3), rel=1e-3)
    # Two variants have nobody else.
    subject, question, cells = layout(logits[:, :2])
    assert estimate(question, subject.contrast(question), cells).method == PAIRS


def test_runs_without_a_partner_count_where_the_others_tell_their_repetition():
    """Repetition 2 lacks v0: v1 and v2 there tell of their difference, which the estimate of v0 − v1 need not heed, and
    of the spread."""
    logits = np.array([[0.1, 0.3, 0.9], [1.2, 1.36, 2.2], [np.nan, -0.5, 0.4]])
    subject, question, cells = layout(logits)
    found = estimate(question, subject.contrast(question), cells)
    assert (found.repetitions, found.logit.freedom) == (2, 3)
    rows = [(r, v) for r in range(3) for v in range(3) if np.isfinite(logits[r, v])]
    design = np.array([[float(v == k) for k in range(3)] + [float(r == k) for k in (1, 2)] for r, v in rows])
    y = np.array([logits[row] for row in rows])
    fitted, squares, *_ = np.linalg.lstsq(design, y, rcond=None)
    contrast = np.array([1, -1, 0, 0, 0])
    error = math.sqrt(squares[0] / 3 * contrast @ np.linalg.inv(design.T @ design) @ contrast)
    assert found.logit.estimate == pytest.approx(fitted[0] - fitted[1], abs=1e-3)
    assert found.logit.error == pytest.approx(error, rel=1e-2)


def test_noise_of_sampling_is_the_least_that_runs_differ_by():
    """All runs alike, of 20 images: what sampling alone does remains."""
    subject, question, cells = layout(np.zeros((3, 3)), 20)
    found = estimate(question, subject.contrast(question), cells)
    assert found.logit.error == pytest.approx(math.sqrt(2 * (2 / 10.5) / 3))
