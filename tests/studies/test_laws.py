"""Laws of the field on made-up runs whose answers are known: onsets, their exponent and its coverage, leads, phases,
and the report with them."""

import filecmp
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffmem.cli import main
from diffmem.evaluation import LossGap
from diffmem.studies import laws
from diffmem.studies.analysis import student
from diffmem.studies.findings import find_among
from diffmem.studies.laws.early_warning import first_copies, lead
from diffmem.studies.laws.onset import falls_to, generalizations, onset
from diffmem.studies.laws.regression import Time, _LeastSquares, _Likelihood, exponent
from diffmem.studies.laws.spurious import mean_phases, phases
from diffmem.studies.leveling import audit_steps
from diffmem.studies.measure import Result, SnapshotResult
from diffmem.studies.presets import build
from diffmem.studies.report import again, write_studies
from diffmem.studies.trial import Trial
from diffmem.studies.watch import Watched

SIZES = (10, 20, 40, 80, 160)
NAMES = ("onset", "early-warning", "spurious")
SIGMAS = np.geomspace(0.05, 5, 8)


def times(chance, repetitions, b, spread, end=math.inf):
    """Onsets by a power law with intercepts of their own, those after `end` censored."""
    found = []
    for repetition in range(repetitions):
        start = chance.normal(4, 0.3)
        for size in SIZES:
            at = start + b * math.log(size) + chance.normal(0, spread)
            found.append(Time(size, repetition, at, at) if at < end else Time(size, repetition, end, math.inf))
    return found


def test_the_exponent_is_that_of_regressions_with_an_intercept_per_repetition():
    found = times(np.random.default_rng(0), 3, 0.9, 0.2)
    columns = [[float(time.repetition == r) for time in found] for r in range(3)]
    design = np.array([np.log([time.size for time in found]), *columns]).T
    y = np.array([time.low for time in found])
    b, rest, *_ = np.linalg.lstsq(design, y)
    error = math.sqrt(rest[0] / 11 * np.linalg.inv(design.T @ design)[0, 0])
    fit = exponent(found)
    assert (fit.estimate, fit.freedom) == (pytest.approx(b[0]), 11)
    assert fit.interval() == pytest.approx((b[0] - student(0.975, 11) * error, b[0] + student(0.975, 11) * error))
    assert fit.t(1.0) == pytest.approx((b[0] - 1) / error)
    assert fit.p_above(0.8) + fit.p_below(0.8) == pytest.approx(1)
    slopes = fit.slopes()
    assert np.mean(list(slopes.values())) == pytest.approx(fit.estimate)  # all repetitions have the same sizes
    # Without censored runs the likelihood says the same.
    likelihood = _Likelihood(found, [0, 1, 2], 11)
    assert likelihood.best[0] == pytest.approx(fit.estimate, abs=1e-4)
    assert likelihood.interval(2.0) == pytest.approx(_LeastSquares(found, [0, 1, 2], 11).interval(2.0), abs=1e-3)


def test_runs_that_never_got_there_count():
    """The largest sizes never reach their onset: leaving them out, or taking their ends for onsets, is wrong."""
    chance = np.random.default_rng(1)
    estimates = {"censored": [], "ends": []}
    for _ in range(25):
        found = times(chance, 3, 1.0, 0.25, end=4 + math.log(60))
        estimates["censored"].append(exponent(found).estimate)
        estimates["ends"].append(exponent([replace(time, high=time.low) for time in found]).estimate)
    assert np.mean(estimates["censored"]) == pytest.approx(1.0, abs=0.06)
    assert np.mean(estimates["ends"]) < 0.8
    early = [replace(time, low=-math.inf) if time.size == 10 else time for time in times(chance, 3, 1.0, 0.05)]
    assert exponent(early).estimate == pytest.approx(1.0, abs=0.1)
    assert exponent(early).censored == 3


@pytest.mark.parametrize(
    ("repetitions", "end", "runs"), [(1, math.inf, 400), (2, math.inf, 400), (2, 4 + math.log(100), 40)]
)
def test_intervals_of_the_exponent_cover(repetitions, end, runs):
    """95 % of 95 % intervals hold the true exponent; fewer than 91 % (85 % of 40) would be no chance."""
    chance = np.random.default_rng(repetitions)
    held, wrong = 0, 0
    for _ in range(runs):
        fit = exponent(times(chance, repetitions, 0.8, 0.2, end))
        held += fit is None or fit.interval()[0] <= 0.8 <= fit.interval()[1]
        wrong += fit is not None and fit.p_within(0.8, 1.25) < 0.05  # the true one lies on the margin
    assert held >= (0.915 if runs > 100 else 0.85) * runs
    assert wrong <= (0.085 if runs > 100 else 0.15) * runs


def test_the_planned_interval_is_the_one_that_comes():
    chance = np.random.default_rng(5)
    found = [exponent(times(chance, 2, 1.0, 0.2)).interval() for _ in range(200)]
    reach = np.mean([(high - low) / 2 for low, high in found])
    assert laws.expected_reach(SIZES, 2, spread=0.2) == pytest.approx(reach, rel=0.08)
    assert laws.expected_reach((10,), 5) == laws.expected_reach((10, 20), 1) == math.inf


def test_too_few_runs_have_no_exponent():
    found = times(np.random.default_rng(2), 1, 1.0, 0.1)
    assert exponent(found[:2]) is None
    assert exponent([replace(time, size=10) for time in found]) is None
    assert exponent([replace(time, high=math.inf) for time in found]) is None
    assert exponent([]) is None
    # One run before the end of a repetition, the rest never: no upper end of the exponent is known.
    censored = [*found[:3], *(replace(time, high=math.inf) for time in found[3:])]
    assert exponent(censored).freedom == 1


def test_onsets_between_audits():
    lengths, level = [100, 200, 400, 800], 0.5
    exact = onset(lengths, [0, 0, 500, 1000], [1000] * 4, 0.1)
    assert 200 < exact.value < 400
    assert 0 < exact.error < 0.1
    # A logistic curve in log time is found again.
    shares = [1 / (1 + math.exp(-3 * math.log(each / 330))) for each in lengths]
    counts = [round(1e6 * share) for share in shares]
    assert onset(lengths, counts, [10**6] * 4, level).value == pytest.approx(330, rel=1e-3)
    assert onset(lengths, counts, [10**6] * 4, 0.9).value == pytest.approx(330 * 9 ** (1 / 3), rel=1e-3)
    never = onset(lengths, [0, 0, 1, 40], [400] * 4, level)
    assert (never.low, never.high) == (math.log(800), math.inf)
    before = onset(lengths, [300, 300, 390, 400], [400] * 4, level)
    assert (before.low, before.high) == (-math.inf, math.log(100))
    # A single high estimate that later audits contradict is no onset.
    assert onset(lengths, [0, 44, 30, 400], [400] * 4, 0.1).value > 350


@given(st.lists(st.integers(0, 50), min_size=2, max_size=8), st.sampled_from([0.1, 0.5]))
@settings(max_examples=60, deadline=None)
def test_onsets_lie_within_the_audits(counts, level):
    lengths = [100 * 2**place for place in range(len(counts))]
    time = onset(lengths, counts, [50] * len(counts), level)
    assert time.low <= time.high
    assert time.error >= 0
    if time.known:
        assert lengths[0] <= time.value <= lengths[-1] * (1 + 1e-9)


def test_errors_of_an_onset_are_those_of_sampling():
    chance = np.random.default_rng(3)
    lengths, shares = [100, 141, 200, 283, 400], [0.0, 0.02, 0.16, 0.55, 0.9]
    found = [onset(lengths, chance.binomial(300, shares).tolist(), [300] * 5, 0.1) for _ in range(400)]
    spread = np.std([time.low for time in found])
    assert np.mean([time.error for time in found]) == pytest.approx(spread, rel=0.2)


def test_falling_to_a_level():
    assert falls_to([100, 200, 400], [3.0, 2.0, 1.0], 1.5).value == pytest.approx(200 * math.sqrt(2))
    assert falls_to([100, 200], [3.0, 2.0], 1.0) == Time(0, 0, math.log(200), math.inf)
    assert falls_to([100, 200], [1.0, 2.0], 1.0) == Time(0, 0, -math.inf, math.log(100))


def made(name, repetitions=4, b=1.0, lead=2.5, peak=1.0):
    """Results of a study by key: onsets at 1200·N^b, gaps `lead` times as early, spurious images where a part of the
    images is memorized (peak 0: nowhere)."""
    study = replace(build(name), repetitions=repetitions)
    chance = np.random.default_rng(4)
    found = {}
    for repetition in range(repetitions):
        for size in study.sizes:
            trial = Trial(study.variants[0].setting, size, repetition)
            onset_at = 1200 * (size / 10) ** (b - 1) * size * math.exp(chance.normal(0, 0.05))
            snapshots = []
            for step in audit_steps(16):
                images = min(step * 23 * 64, 524_288)
                share, open_ = (1 / (1 + math.exp(-4 * math.log(images / at))) for at in (onset_at, onset_at / lead))
                gap = [
                    [sigma, 0.05 * (1 - 0.9 * open_ * part), 0.05, 0.004, 0.3 * 10 ** (-9 * open_ * part)]
                    for sigma, part in zip(SIGMAS.tolist(), (0.8, 0.9, 1, 1, 0.9, 0.6, 0.4, 0.2), strict=True)
                ]
                memorized, between = int(300 * share**2), int(300 * 2 * peak * share * (1 - share))
                watched = Watched(gap, memorized, between, 300 - memorized - between)
                count = int(chance.binomial(300, share))
                snapshots.append(SnapshotResult(images, images / size, 0.3, count, 300, 1.0, 1.0, None, watched))
                if count >= 180 and images >= 32_000:
                    break
            best = max(snapshots, key=lambda each: each.ratio)
            found[trial.key] = Result(
                trial.key, size, repetition, best.count, 300, None, True, images, images / size, best.images, 7, 1.0,
                1.0, "", tuple(snapshots), {"diffmem": "0"}, None, 16, "cpu", 1, alarms=(2, 400), delta=17.75,
            )  # fmt: skip
    return study, found


@pytest.mark.parametrize(
    ("options", "verdicts"),
    [
        ({}, ["holds", "holds", "holds"]),
        ({"b": 0.4, "lead": 0.5, "peak": 0.0}, ["contrary", "contrary", "undecided"]),
        ({"repetitions": 1}, ["holds", "holds", "not measured"]),
    ],
)
def test_verdicts_on_made_up_runs(options, verdicts):
    found = []
    for name in NAMES:
        study, results = made(name, **options)
        (each,) = find_among([study], results, {})
        assert each.emm == {}
        found.append(each.law.tests[0].verdict)
    assert found == verdicts


def test_estimates_of_made_up_runs():
    _, results = made("onset")
    runs = list(results.values())
    low, high = laws.judge("onset", runs).estimates[0].interval
    assert 0.9 < low < high < 1.1
    warned = laws.judge("early-warning", runs)
    assert 1.2 < warned.estimates[0].value < 3
    assert set(warned.details["first"]) == {f"{sigma:.4g}" for sigma in SIGMAS}
    assert warned.details["first"]["0.1864"] == 1 > warned.details["first"]["2.59"]
    middle = laws.judge("spurious", runs).details["phases"]
    for each in middle:
        assert each["memorized"] < each["peak"] < each["generalized"]


def test_the_time_to_generalize_is_that_of_the_unseen_error():
    """Whatever N, the unseen error falls to its level before the audit at 11,776 images."""
    _, results = made("onset")
    runs = []
    for result in results.values():
        snapshots = []
        for each in result.snapshots:
            unseen = 0.05 + max(0.0, math.log(10_000 / each.images)) + (0.001 if result.size == 10 else 0.0)
            gap = [[sigma, 0.04, unseen, 0.004, 0.5] for sigma in SIGMAS]
            snapshots.append(replace(each, watched=replace(each.watched, gap=gap)))
        runs.append(replace(result, snapshots=tuple(snapshots)))
    found = generalizations(runs)
    assert all(8_832 < time.value < 11_776 for time in found)
    test = laws.judge("onset", runs).tests[1]
    assert (test.text, test.verdict) == ("the time until unseen images are denoised well hardly depends on N", "holds")


def test_leads_with_ends_that_are_open():
    _, results = made("early-warning", repetitions=1)
    result = list(results.values())[3]
    full = lead(result)
    assert full.gap < full.copies <= full.end
    assert full.log == pytest.approx(math.log(full.copies / full.gap))
    silent = replace(result, snapshots=tuple(replace(each, count=0) for each in result.snapshots))
    assert lead(silent).copies is None
    assert lead(silent).log == pytest.approx(math.log(full.end / full.gap))
    closed = [[*level[:4], 0.9] for level in result.snapshots[0].watched.gap]
    blind = replace(
        result,
        snapshots=tuple(replace(each, watched=replace(each.watched, gap=closed)) for each in result.snapshots),
    )
    assert lead(blind).gap is None
    assert lead(blind).log == pytest.approx(math.log(full.copies / full.end))
    neither = replace(blind, snapshots=tuple(replace(each, count=0) for each in blind.snapshots))
    assert lead(neither).log is None
    assert lead(replace(result, alarms=None)) is None
    assert not LossGap.from_json(closed).p < 1


def test_copies_are_more_than_false_alarms():
    assert first_copies([(0, 300), (1, 300), (40, 300)], (2, 400), looks=16) == 2
    assert first_copies([(0, 300), (9, 300)], (0, 400), looks=16) == 1
    assert first_copies([(0, 300), (40, 300)], (50, 400), looks=16) is None  # the rule calls as many unseen images so


def test_phases_by_hand():
    shares = {10: (0.9, 0.1, 0.0), 20: (0.5, 0.4, 0.1), 40: (0.2, 0.4, 0.4), 80: (0.0, 0.1, 0.9)}
    found = phases(0, shares)
    assert found.step == pytest.approx(math.log(2))
    assert math.exp(found.memorized) == pytest.approx(20)
    assert math.exp(found.peak) == pytest.approx(20 * math.sqrt(2))
    assert 40 < math.exp(found.generalized) < 80
    assert (found.height, found.rise) == (0.4, pytest.approx(0.3))
    assert (
        mean_phases(0, [{10: (0.4, 0.6, 0.0), 20: (0, 0, 1), 40: (0, 0, 1)}, shares]) == found
    )  # the first is left out
    ends = phases(0, {10: (0.2, 0.5, 0.3), 20: (0.1, 0.4, 0.5), 40: (0.0, 0.3, 0.7)})
    assert (math.exp(ends.memorized), math.exp(ends.peak)) == (pytest.approx(10), pytest.approx(10))
    assert phases(0, {10: (1, 0, 0), 20: (0, 0, 1)}) is None


def test_the_report_and_the_report_again(tmp_path):
    studies, results = [], {}
    for name in NAMES:
        study, results = made(name, repetitions=2)
        studies.append(study)
    found = find_among(studies, results, {})
    page = write_studies(found, tmp_path, tmp_path / "report").read_text()
    assert "The training time until copies appear grows about in proportion to N: <b>" in page
    assert page.count("<svg") == 3
    again(tmp_path / "report", tmp_path / "again")
    for path in (tmp_path / "report").iterdir():
        assert filecmp.cmp(path, tmp_path / "again" / path.name, shallow=False), path.name
    values = json.loads((tmp_path / "again" / "studies.json").read_text())
    assert [each["law"]["tests"][0]["verdict"] for each in values[:2]] == ["holds", "holds"]
    assert values[0]["law"]["tests"][0]["family"] == 3  # the time to generalize could not be measured
    (tmp_path / "again" / "loss-gaps.csv").write_text("key,images\nx,y\n")
    with pytest.raises(SystemExit) as end:
        main(["study", "report", "--runs", str(tmp_path / "again")])
    assert end.value.code == 1


def test_laws_are_shown(capsys):
    with pytest.raises(SystemExit) as end:
        main(["study", "show", "onset"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert "asks: the training time until copies appear grows about in proportion to N (Bonnaire et al. 2025" in shown
    assert "10, 20, 30, 40, 80, 160" in shown
    keys = [{trial.key for trial in build(name).trials()} for name in NAMES]
    assert keys[0] == keys[1] == keys[2]


def test_a_plan_says_of_every_law_what_it_knows(capsys):
    with pytest.raises(SystemExit) as end:
        main(["study", "plan", "onset", "halves"])
    assert end.value.code == 0
    onset_says, halves_say = capsys.readouterr().out.splitlines()
    assert onset_says.startswith("onset: 4 repetitions tell the exponent")
    assert halves_say.startswith("halves: asks about a law")
