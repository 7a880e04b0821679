"""What is concluded from results: differences with their intervals, verdicts on the paper's claims, costs ahead."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from studies.tiny import TINY

from diffmem.integrity import sealed
from diffmem.studies import EMM, Question, Result, Study, Trial, Variant
from diffmem.studies.emm import observation
from diffmem.studies.figures import draw_verdicts
from diffmem.studies.findings import Answer, Cell, Spread, after, find_among, findings, spread_of
from diffmem.studies.folder import find_all
from diffmem.studies.measure import RESULT, SnapshotResult
from diffmem.studies.report import HIGHEST, by_other_criteria, made_with, write_emm, write_studies
from diffmem.studies.run import trial_folder
from diffmem.studies.schedule import Cost, costs, schedule
from diffmem.studies.search import Search


def result(trial, count, total=1000) -> Result:
    return Result(
        trial.key, trial.size, trial.repetition, count, total, None, False, 100, 5.0, 100, 10, 1.0, 0.5, "", (), {}
    )


def study(*questions: Question, repetitions: int = 2, **fields) -> Study:
    wide = replace(TINY, network={**TINY.network, "model_channels": 8})
    variants = (Variant("narrow", TINY, 4), Variant("wide", wide, 8))
    return Study("width", "Width", "channels", variants, (20, 30), repetitions, questions=questions, **fields)


def results_of(subject: Study, shares: dict[str, tuple[float, ...]]) -> dict[str, Result]:
    """By key: a run of each variant and repetition at every size, with these shares of copies."""
    runs = replace(subject, repetitions=max(map(len, shares.values())), max_repetitions=None)
    return {
        trial.key: result(trial, round(1000 * shares[variant.name][trial.repetition]))
        for variant, trial in runs.cells()
        if trial.repetition < len(shares.get(variant.name, ()))
    }


def answer(question: Question, shares: dict[str, tuple[float, ...]], **fields) -> Answer:
    subject = study(question, **fields)
    return findings(subject, results_of(subject, shares), {}).answers[0]


def test_a_mean_covers_though_each_run_is_its_highest_snapshot():
    """Four runs, each with three snapshots of R_mem 0.5: the interval of their mean covers it in 95 % of cases, which
    it would not if each run were one estimate."""
    random, subject = np.random.default_rng(0), study(repetitions=4)
    highest = random.binomial(100, 0.5, (100, 4, 3)).max(axis=2)
    covered = 0
    for counts in highest.tolist():
        results = tuple(
            replace(result(trial, count, 100), looks=3) for trial, count in zip(subject.trials(), counts, strict=False)
        )
        low, high = Cell(subject.variants[0], 20, results, Spread(0.0, 50)).interval
        covered += low <= 0.5 <= high
    assert covered >= 95
    assert np.mean(highest.mean(axis=1) / 100 - 1.96 * np.sqrt(0.25 / 400) <= 0.5) < 0.75


def test_spread_between_runs_is_learnt_from_repetitions():
    trials = study(repetitions=30).trials()
    # Logits alternate between ±0.8: a standard deviation of 0.8 but for the noise of sampling.
    groups = [[result(trial, 310 + 380 * (trial.repetition % 2), 1000) for trial in trials if trial.size == 20]]
    assert spread_of(groups).tau == pytest.approx(0.8, abs=0.05)
    assert spread_of([]).tau == pytest.approx(0.4)
    assert spread_of([[result(trials[0], 500)]]).freedom == spread_of([]).freedom


def test_what_is_missing_and_what_failed_is_counted():
    subject = study()
    first, second, *rest = subject.trials()
    found = findings(subject, {first.key: result(first, 500)}, {second.key: "diverged"})
    assert found.missing == len(rest)
    assert found.failures == (("narrow", 30, 0, "diverged"),)


def test_a_cell_holds_every_finished_run_of_its_trial_whichever_study_asked_for_it(tmp_path):
    """Two repetitions were asked for, and a third lies in the folder: made for another study, or when more were."""
    subject = study()
    counts = {0: 300, 1: 400, 2: 800}
    for trial in replace(subject, repetitions=3).trials():
        if trial.repetition < 2 or trial.size == 30:
            folder = trial_folder(tmp_path, trial)
            folder.mkdir(parents=True)
            (folder / RESULT).write_text(json.dumps(sealed(result(trial, counts[trial.repetition]).to_json())))
    for found in find_all([subject], tmp_path):
        assert [[each.repetition for each in cell.results] for cell in found.cells] == [[0, 1], [0, 1, 2]] * 2
        assert [cell.r_mem for cell in found.cells] == pytest.approx([0.35, 0.5] * 2)
        assert found.missing == 0
        assert found.cells[0].spread.freedom == spread_of([]).freedom + 2 * (1 + 2)


def test_two_variants_with_one_setting_are_two_cells():
    subject = Study("s", "S", "f", (Variant("a", TINY), Variant("b", TINY)), (20, 20))
    trial = subject.trials()[0]
    assert [cell.variant.name for cell in findings(subject, {trial.key: result(trial, 5)}, {}).cells] == ["a", "b"]


def test_a_run_whose_highest_snapshot_alone_is_known_may_be_lower_by_what_the_highest_adds():
    """As much as the highest of estimates that are alike adds on average."""
    trial = Trial(replace(TINY, samples=500), 20, 0, 0.9)
    highest = np.random.default_rng(0).binomial(500, 0.9, (100_000, 3)).max(axis=1).mean() / 500 - 0.9
    known = observation(replace(result(trial, 450, 500), looks=3))
    assert 0.9 - known.alike == pytest.approx(highest, rel=0.06)
    assert observation(replace(result(trial, 450, 500), looks=1)).alike is None
    audited = [SnapshotResult(1, 1.0, 0.1, count, 500, 1.0, 1.0) for count in (100, 440, 450)]
    assert observation(replace(result(trial, 450, 500), snapshots=tuple(audited))).alike == pytest.approx(0.89)


def test_the_interval_of_emm_covers_that_r_mem_is_the_highest_of_several():
    trials = [Trial(TINY, size, repetition, 0.9) for size in (20, 40, 80) for repetition in (0, 1)]
    alone = EMM(TINY, Search(20, 200), tuple(result(trial, 960 - 2 * trial.size) for trial in trials))
    several = replace(alone, results=tuple(replace(each, looks=10) for each in alone.results))
    assert several.interval[0] < alone.interval[0]
    assert several.size < alone.size
    old = {**several.to_dict(), "upward": {"snapshots": 3, "samples": 500, "points": 0.01, "emm": 30.0}}
    assert EMM.from_dict(old).interval == several.interval


def test_the_page_of_a_search_that_runs_reloads_itself_and_says_what_is_known_so_far(tmp_path):
    trials = [Trial(TINY, size, at_least=0.9) for size in (20, 40)]
    nothing = EMM(TINY, Search(20, 200), ())
    page = write_emm(nothing, tmp_path, running=True).read_text()
    assert 'http-equiv="refresh"' in page
    assert "No run has ended yet" in page
    found = replace(nothing, results=tuple(result(trial, 900) for trial in trials))
    page = write_emm(found, tmp_path, running=True).read_text()
    assert "The search is running; this page reloads itself." in page
    assert "from 2 runs" in page
    page = found.save(tmp_path).read_text()
    assert "refresh" not in page
    assert "The search is running" not in page
    assert "None" not in re.sub("<pre>.*?</pre>", "", page, flags=re.DOTALL)


def test_what_runs_were_made_with_is_told_apart():
    trial = study().trials()[0]
    one, other = {"torch": "2.13.0"}, {"torch": "2.14.0"}
    ways = [(one, "cpu", 1), (other, "cuda", None), (one, "cpu", 1), ({}, None, None)]
    made = made_with([replace(result(trial, 1), versions=v, device=d, threads=t) for v, d, t in ways])
    assert made == [
        ("torch 2.13.0, on the CPU, 1 thread", 2),
        ("torch 2.14.0, on a GPU", 1),
        ("versions and device not recorded", 1),
    ]


def test_a_schedule_fills_its_workers():
    trials = study().trials()
    estimates = [Cost(trial, seconds, 0.0) for trial, seconds in zip(trials, (4, 3, 2, 1, 1, 1, 5, 1), strict=True)]
    assert schedule(estimates, 1).seconds == schedule(estimates, 1).work == 18
    assert schedule(estimates, 100).seconds == 5
    # In order: 4 1 5 | 3 1 1 1 … as each worker gets free.
    assert schedule(estimates, 2).seconds == 11
    assert schedule([replace(cost, done=True) for cost in estimates], 2).seconds == 0


def test_costs_are_measured_per_network_and_grow_with_length(tmp_path):
    short, long = (next(iter(study().trials())) for _ in range(2))
    long = replace(long, setting=replace(long.setting, length={"images": 480}, samples=200))
    first, second = costs([short, long], tmp_path, "cpu")
    assert second.training == pytest.approx(10 * first.training)
    assert second.sampling == pytest.approx(10 * first.sampling)
    assert first.training > 0


def test_r_mem_is_read_at_one_length_and_the_highest_stands_beside_it():
    """After 100 epochs, where variants differ, and at the end, where all are copies; one run leveled off before."""
    subject = study(Question("width raises R_mem", "wide", "narrow"))
    curves = {"wide": ((50, 300), (100, 800), (200, 1000)), "narrow": ((50, 10), (100, 200), (200, 1000))}
    results = {}
    for variant, trial in subject.cells():
        audits = tuple(
            SnapshotResult(epochs * trial.size, float(epochs), 0.1, count, 1000, 1.0, 1.0)
            for epochs, count in curves[variant.name]
        )
        run = result(trial, 1000)
        results[trial.key] = replace(run, snapshots=audits, epochs=200.0, best_images=200 * trial.size)
    (found,) = find_among([replace(subject, read_at=100)], results, {})
    assert {(cell.variant.name, cell.r_mem) for cell in found.cells} == {("wide", 0.8), ("narrow", 0.2)}
    assert {run.r_mem for run in found.runs} == {1.0}
    assert found.answers[0].estimate.points.estimate == pytest.approx(0.6)
    (highest,) = by_other_criteria([found])[HIGHEST]
    assert highest.answers[0].estimate.points.estimate == pytest.approx(0)
    assert found.emm == highest.emm
    one = next(iter(results.values()))
    early = replace(one, snapshots=(*one.snapshots[:1], replace(one.snapshots[1], count=1000)), epochs=100.0)
    assert after(early, 150).r_mem == 1.0
    assert after(one, 150) is None
    assert after(one, 101).count == one.snapshots[1].count


def test_runs_that_were_never_audited_where_r_mem_is_read_are_not_denied(tmp_path):
    subject = study(Question("width raises R_mem", "wide", "narrow"))
    results = {trial.key: result(trial, 900) for trial in subject.trials()}
    audits = tuple(SnapshotResult(100 * at, 5.0 * at, 0.1, 900, 1000, 1.0, 1.0) for at in (1, 2))
    results = {key: replace(run, snapshots=audits) for key, run in results.items()}
    found = find_among([replace(subject, read_at=77)], results, {})
    assert (found[0].cells, len(found[0].unread)) == ((), len(results))
    page = " ".join(write_studies(found, tmp_path, tmp_path / "report").read_text().split())
    assert "8 runs of this study are done, but none was audited after 77 epochs" in page
    assert "Let the study read it at one of 5, 10 (read_at)" in page


def test_a_page_says_that_a_verdict_is_a_look_ahead_of_plan(tmp_path):
    subject = study(Question("width raises R_mem", "wide", "narrow"), repetitions=4)
    trials = [trial for trial in subject.trials() if trial.repetition < 2]
    results = {trial.key: result(trial, 100 if trial.setting is TINY else 900) for trial in trials}
    page = write_studies(find_among([subject], results, {}), tmp_path, tmp_path / "report").read_text()
    assert "8 of 16 planned runs are missing: verdicts here are a look ahead of plan" in page
    assert "2 of 4" in page
    whole = replace(subject, repetitions=2)
    page = write_studies(find_among([whole], results, {}), tmp_path, tmp_path / "whole").read_text()
    assert "ahead of plan" not in page


def test_verdicts_are_drawn_for_two_questions_or_more():
    more = Question("width raises R_mem", "wide", "narrow")
    asked = more, replace(more, text="width makes no difference", kind="equivalence")
    shares = {"wide": (0.8, 0.86, 0.8), "narrow": (0.3, 0.4, 0.3)}
    both, one = (find_among([subject], results_of(subject, shares), {}) for subject in (study(*asked), study(asked[0])))
    drawing = draw_verdicts(both)
    assert all(text in drawing for text in (*(question.text for question in asked), "holds", "contrary"))
    assert draw_verdicts(one) == ""


def test_no_difference_is_beyond_a_hundred_points_though_the_line_of_a_trend_is():
    question = Question("R_mem falls with N", kind="trend", over="size", falls=True)
    subject = replace(study(question), sizes=(20, 30, 40, 50), variants=study().variants[:1])
    shares = {20: 1000, 30: 1000, 40: 0, 50: 0}
    results = {trial.key: result(trial, shares[trial.size]) for trial in subject.trials()}
    (found,) = findings(subject, results, {}).answers
    assert abs(found.estimate.points.estimate) > 1.1
    assert abs(found.difference("points")) == 1.0
    assert all(-1 <= end <= 1 for end in found.interval("points"))
    assert found.difference("logit") == found.estimate.logit.estimate
