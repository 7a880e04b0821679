"""The posterior of EMM and the search: exact cases, and simulated curves of other shapes than the model's."""

import math

import numpy as np
import pytest

from benchmarks.bench_emm import HIGH, KINDS, LOW, ZETA, Curve, Simulation, cheapest_grid, decisions, searched
from diffmem.errors import InputError
from diffmem.memorization import SequentialTest
from diffmem.studies import curve as model
from diffmem.studies.curve import Observation, Posterior
from diffmem.studies.search import Candidate, Search, carry_out


def test_a_share_of_exactly_one_minus_zeta_puts_emm_there():
    seen = [Observation(1000, 9000, 10_000)] * 8
    posterior = Posterior(seen, 100, 10_000)
    assert posterior.median == pytest.approx(1000, rel=0.04)
    low, high = posterior.interval()
    assert low < 1000 < high
    assert high / low < 1.6
    other = Posterior([Observation(1000, 5000, 10_000)] * 8, 100, 10_000, zeta=0.5)
    assert other.median == pytest.approx(1000, rel=0.04)


def test_more_copies_mean_a_larger_emm_and_more_runs_a_narrower_interval():
    medians = [Posterior([Observation(1000, count, 10_000)], 100, 10_000).median for count in (10, 2000, 9000, 9990)]
    assert medians == sorted(medians)
    widths = []
    for runs in (1, 3, 9):
        low, high = Posterior(
            [Observation(900, 9300, 10_000), Observation(1100, 8700, 10_000)] * runs, 100, 10_000
        ).interval()
        widths.append(high / low)
    assert widths == sorted(widths, reverse=True)


def test_a_run_ended_by_its_answer_says_at_least():
    """950 of 1000 at the end of training put EMM near; 950 of 1000 when it was ended leave it open upwards."""
    closed, open_ = (Posterior([Observation(1000, 950, 1000, censored)], 100, 100_000) for censored in (False, True))
    assert open_.quantile(0.025) > closed.quantile(0.025)
    assert open_.quantile(0.5) > 10 * closed.quantile(0.5)


def test_the_curve_passes_through_what_was_seen():
    seen = [Observation(size, count, 1000) for size, count in ((500, 990), (1000, 900), (2000, 500), (4000, 120))] * 3
    low, middle, high = Posterior(seen, 500, 4000).curve([500, 1000, 2000, 4000]).T
    assert np.allclose(middle, [0.99, 0.9, 0.5, 0.12], atol=0.04)
    assert (low <= middle).all()
    assert (middle <= high).all()


def test_the_search_keeps_to_its_limits():
    search = Search(20, 200, step=10, repetitions=2, runs=12, precision=0.02)
    asked = []

    def measure(candidates):
        asked.extend(candidates)
        return [
            None if candidate.size == 100 else Observation(candidate.size, 50 if candidate.size > 60 else 98, 100)
            for candidate in candidates
        ]

    made = carry_out(search, measure, at_once=3)
    assert len(made) == len(set(asked)) <= 12
    assert all(
        candidate.size % 10 == 0 and 20 <= candidate.size <= 200 and candidate.repetition < 2 for candidate in asked
    )
    seen = [observation for _, observation in made if observation is not None]
    assert 40 < search.posterior(seen).median < 100
    assert any("allow more runs" in line for line in search.unresolved(seen))


@pytest.mark.parametrize(("count", "words"), [(0, "may lie below 100"), (1000, "may lie above 1,000")])
def test_an_emm_outside_the_sizes_is_said_to_be_unresolved(count, words):
    search = Search(100, 1000)
    made = carry_out(search, lambda candidates: [Observation(candidate.size, count, 1000) for candidate in candidates])
    assert any(words in line for line in search.unresolved([seen for _, seen in made]))


@pytest.mark.parametrize("arguments", [(200, 100), (11, 19, 0.1, 0.1, 1, 1, 10), (100, 200, 1.5), (100, 200, 0.1, 2.0)])
def test_impossible_searches_are_refused(arguments):
    with pytest.raises(InputError):
        Search(*arguments)


def test_tables_hold_the_mean_likelihood_over_runs():
    """Against sums over the deviations, one by one; and the expected R_mem at EMM is 1 − ζ for every shape."""
    seen, (kind, spread, shape) = Observation(1000, 850, 1000), (0, 3, 6)
    column = (kind * len(model._SPREADS) + spread) * len(model._SHAPES) + shape
    place = model._crossings(0.1)[kind * len(model._SPREADS) + spread, shape]
    above, below = (bends[at] for bends, at in zip((model._ABOVE, model._BELOW), model._SHAPES[shape], strict=True))
    z = np.linspace(-6, 6, 2001)
    weights = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()

    def shares(x):
        at = place + x + model._SPREADS[spread] * z
        bent = np.where(at > 0, np.log1p(-above * np.maximum(at, 0)), -np.expm1(-below * np.minimum(at, 0)))
        bent /= np.where(at > 0, -above, below)
        return 1 / (1 + np.exp(-math.log(9) - bent))

    table, means = model._table(seen, 0.1)[:, column], model._means(0.1)
    scale = 1 / (1000 * (850.5 / 1001) * (150.5 / 1001) * model._STEP**2)
    assert scale < 1  # more images than count beside the grid's step
    for x in (-1.5, -0.5, 0.0, 0.7):
        r = shares(x)
        logs = scale * (850 * np.log(r / 0.85) + 150 * np.log((1 - r) / 0.15))
        index = round((x - model._ETA[0]) / model._STEP)
        assert table[index] == pytest.approx(math.log((weights * np.exp(logs)).sum()), abs=0.03)
        assert means[index, column] == pytest.approx((weights * r).sum(), abs=2e-3)
    assert np.allclose(means[len(model._ETA) // 2], 0.9, atol=2e-3)


@pytest.mark.parametrize("kind", ["logistic", "probit", "log-log", "complementary log-log", "Cauchy", "Student's t(2)"])
def test_the_shapes_come_near_every_link(kind):
    """Some shape and steepness are nowhere off by more than 2.5 points between R_mem 60 and 98 %."""
    eta = np.linspace(-4, 40, 20_001)
    shares = KINDS[kind].link(eta, 0.5)
    middle = np.interp(0.9, shares, eta)
    there = (shares > 0.6) & (shares < 0.98)
    off = [
        np.abs(np.interp((eta[there] - middle) * steepness, model._ETA, shape) - shares[there]).max()
        for shape in model._links(0.1)
        for steepness in np.geomspace(0.2, 4, 60)
    ]
    assert min(off) < 0.025


def test_snapshots_that_cannot_be_told_apart_lower_what_a_run_may_have():
    assert Observation.of_snapshots(100, [(10, 500), (440, 500)]) == Observation(100, 440, 500)
    assert Observation.of_snapshots(100, [(440, 500), (460, 500), (448, 500)]).alike == pytest.approx(1348 / 1500)
    assert Observation.of_snapshots(100, [(470, 500), (126, 128)], True) == Observation(100, 126, 128, True, 596 / 628)
    sizes = (600, 800, 1000, 1200, 1500) * 2
    alone = [Observation(size, 1150 - size // 4, 1000) for size in sizes]
    alike = [Observation(size, 1150 - size // 4, 1000, alike=(1130 - size // 4) / 1000) for size in sizes]
    taken_off = [Observation(size, 1130 - size // 4, 1000) for size in sizes]
    best, both, lower = (Posterior(seen, 100, 10_000) for seen in (alone, alike, taken_off))
    assert lower.interval()[0] == pytest.approx(both.interval()[0], rel=0.02)
    assert lower.interval()[1] * 1.005 < both.interval()[1] < best.interval()[1]
    assert lower.median < both.median < best.median


def test_the_interval_covers_and_the_search_is_cheap_on_curves_that_are_none_of_the_models():
    """A fast form of `python -m benchmarks emm`, whose table holds the large one. With 34 searches, coverage of 95 %
    falls below 85 % once in 130 times, were the seeds not fixed."""
    answers, ratios = [], []
    for index in range(34):
        kind = [name for name in KINDS if name != "one run in twelve fails"][index % 17]
        generator = np.random.default_rng([17, index])
        curve = Curve.drawn(kind, generator)
        found = searched(curve, generator, Search(LOW, HIGH, ZETA, precision=0.15, runs=24))
        answers.append(found)
        if index == 1:  # whose grid is quick to simulate
            ratios.append(cheapest_grid(curve, generator, found.width).cost / found.cost)
    assert np.mean([found.covered for found in answers]) >= 0.85
    assert np.median([found.width for found in answers]) <= 0.15
    assert np.median(ratios) >= 1.5


def test_the_simulation_is_what_it_claims():
    curve = Curve("probit", math.log(1000), 3.0, 0.3)
    shares = [Simulation(curve, np.random.default_rng(seed)).grid_run(round(curve.emm)) for seed in range(400)]
    assert np.mean([seen.count / seen.total for seen in shares]) == pytest.approx(1 - ZETA, abs=0.01)
    simulation = Simulation(curve, np.random.default_rng(0))
    assert simulation.search_run(Candidate(300, 0)).censored
    assert simulation.cost < 300 * 40_000 + 10 * 10_000 * 35 / 3
    question = SequentialTest(0.9)
    totals, no, yes = decisions(question, 50, 120)
    assert totals.tolist() == [50, 100, 120]
    for total, largest, smallest in zip(totals.tolist(), no.tolist(), yes.tolist(), strict=True):
        answers = [
            question.answer(count, total) for count in (largest, largest + 1, smallest - 1, min(smallest, total))
        ]
        assert answers == [False, None, None, True if smallest <= total else None]
