"""Power before a study starts: formulas, simulated studies and the analysis itself agree."""

import json
from dataclasses import replace

import numpy as np
import pytest
from studies.test_analysis import ALIKE, MORE
from studies.test_findings import results_of, study

from diffmem.cli import main
from diffmem.studies.analysis import student
from diffmem.studies.findings import find_among
from diffmem.studies.power import SPREAD, plan, power_of_direction, power_of_equivalence, simulated


@pytest.mark.parametrize("repetitions", [2, 4, 9])
@pytest.mark.parametrize("ratio", [0.0, 1.0, 2.5])
def test_formulas_are_those_of_the_t_tests(repetitions, ratio):
    """Of two variants, against 40,000 tests; 0: the error itself."""
    random = np.random.default_rng(0)
    values = random.normal(0.3 * ratio, 0.3, (40_000, repetitions))
    mean, error = values.mean(axis=1), values.std(axis=1, ddof=1) / np.sqrt(repetitions)
    shown = (mean > student(0.975, repetitions - 1) * error).mean()
    assert power_of_direction(0.3 * ratio, 0.3, repetitions, repetitions - 1) == pytest.approx(shown, abs=0.008)
    close = (np.abs(mean) + student(0.95, repetitions - 1) * error < 0.4).mean()
    formula = power_of_equivalence(0.4, 0.3, repetitions, repetitions - 1, effect=0.3 * ratio)
    assert formula == pytest.approx(close, abs=0.008)
    for question, power, effect in (
        (MORE, power_of_direction(0.3, 0.3, repetitions, repetitions - 1), 0.3),
        (ALIKE, power_of_equivalence(0.4, 0.3, repetitions, repetitions - 1), 0.0),
    ):
        found = simulated(question.kind, question.margin, effect, 0.3, 2, {repetitions: 0.05}).mean()
        assert found == pytest.approx(power, abs=0.03)


def test_other_variants_spare_repetitions_and_a_large_effect_is_certain():
    few, many = (simulated(MORE.kind, MORE.margin, 0.6, 0.3, variants, {3: 0.05}).mean() for variants in (2, 6))
    assert many > few + 0.05
    assert power_of_direction(50.0, 0.1, 5, 4) == 1.0
    assert power_of_direction(1.0, 0.1, 1, 0) == power_of_equivalence(1.0, 0.1, 1, 0) == 0.0


def test_a_plan_takes_the_spread_of_the_runs_that_there_are():
    subject = study(MORE, ALIKE, max_repetitions=6)
    seconds = {subject.name: dict.fromkeys(subject.places(), 10.0)}
    assumed = plan([subject], seconds)
    assert [(each.spread, each.seconds) for each in assumed] == [(SPREAD, 40.0)] * 2
    assert all(2 <= each.expected <= 6 for each in assumed)
    shares = {"wide": (0.5, 0.6, 0.56, 0.4), "narrow": (0.35, 0.5, 0.42, 0.3)}
    found = find_among([subject], results_of(subject, shares), {})
    planned = plan([subject], seconds, found)
    latest = found[0].answers[0].latest
    assert planned[0].spread == pytest.approx(latest.logit.error * 2)
    assert planned[0].source == "its 4 pairs of runs"
    assert (planned[0].repetitions < assumed[0].repetitions) == (planned[0].spread < SPREAD)
    assert planned[0].total == planned[0].repetitions * 40.0
    other = replace(subject, name="other", questions=(replace(MORE, text="another"),))
    both = plan([subject, other], seconds | {"other": seconds[subject.name]}, found)
    assert (both[2].spread, both[2].source) == (planned[0].spread, "median of 2 questions with runs")


def test_the_command_says_what_is_needed(capfd, one_thread, tmp_path):
    own = tmp_path / "own.json"
    own.write_text(json.dumps(study(MORE, ALIKE).to_json()))
    arguments = ["study", "plan", str(own), "--effect", "1", "--repetitions", "3", "--sizes", "20", "--device", "cpu"]
    for more in ([], ["--until", "decided", "--max-repetitions", "9", "--json"]):
        with pytest.raises(SystemExit) as end:
            main([*arguments, *more])
        assert end.value.code == 0
    printed = capfd.readouterr().out
    assert "2 questions, wrong together in 5 %; repetitions for a power of 80%" in printed
    planned = json.loads(printed.splitlines()[-1])
    assert [each["question"]["kind"] for each in planned] == ["direction", "equivalence"]
    assert planned[0]["repetitions"] < 20
    assert planned[0]["equivalence"] is None  # with runs that differ as they do, 40 repetitions show no equivalence
    assert 2 <= planned[0]["expected"] <= 9
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--until", "decided"])
    assert end.value.code == 2
    assert "give both" in capfd.readouterr().err
