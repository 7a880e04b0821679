"""Trials through executors: failures, deaths, interruptions; what is done is done once."""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from studies.tiny import TINY

from diffmem.errors import InputError
from diffmem.evaluation import evaluator
from diffmem.sampling import Samples
from diffmem.studies import Processes, Setting, Study, Trial, Variant, run_studies, run_trial, run_trials
from diffmem.studies.ledger import DONE, FAILED, Ledger
from diffmem.studies.measure import Result, SnapshotResult, pack, read_result
from diffmem.studies.run import trial_folder

pytestmark = pytest.mark.usefixtures("one_thread")


def numbers(result):
    """What must not depend on how a result came about."""
    return result.count, result.total, [(each.images, each.loss, each.count) for each in result.snapshots]


def test_one_failure_does_not_sink_the_others_and_nothing_runs_twice(tmp_path):
    wrong = replace(TINY, network={**TINY.network, "model_channels": 3})
    trials = [Trial(TINY, 20), Trial(wrong, 20), Trial(TINY, 30)]
    told = []
    outcomes = run_trials(trials, tmp_path, on_trial=told.append)
    assert [outcome.result is None for outcome in outcomes] == [False, True, False]
    assert "model_channels is 3" in outcomes[1].error
    assert len(told) == 3  # wrong input is not tried again
    result = outcomes[0].result
    assert (result.size, result.total, len(result.snapshots)) == (20, 20, 3)
    assert result.count == max(each.count for each in result.snapshots)
    entries = Ledger(tmp_path).entries()
    assert [entries[trial.key].state for trial in trials] == [DONE, FAILED, DONE]
    assert [path.name for path in sorted(tmp_path.glob("trials/*/result.json"))] == ["result.json"] * 2

    written = (trial_folder(tmp_path, trials[0]) / "result.json").stat().st_mtime_ns
    again = []
    assert [o.result for o in run_trials(trials, tmp_path, on_trial=again.append)] == [o.result for o in outcomes]
    assert again == []
    assert (trial_folder(tmp_path, trials[0]) / "result.json").stat().st_mtime_ns == written
    # A ledger that was lost is made again from the folders.
    (tmp_path / "ledger.sqlite").unlink()
    assert run_trials(trials[:1], tmp_path)[0].result == result
    assert Ledger(tmp_path).entries()[trials[0].key].state == DONE


def test_an_interrupted_trial_waits_and_continues_to_the_same_result(tmp_path):
    trial = Trial(replace(TINY, length={"images": 160}, snapshots=10), 20)
    whole = run_trial(trial, tmp_path / "whole")

    def interrupt() -> None:
        while not (trial_folder(tmp_path / "root", trial) / "audits.json").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run_trials([trial], tmp_path / "root")
    thread.join()
    assert Ledger(tmp_path / "root").entries()[trial.key].state == "waiting"
    assert read_result(trial_folder(tmp_path / "root", trial)) is None
    outcome = run_trials([trial], tmp_path / "root")[0]
    assert numbers(outcome.result) == numbers(whole)
    assert [each.epochs for each in whole.snapshots] == trial.setting.audit_epochs(20)


def test_another_criterion_counts_the_images_of_the_same_run(tmp_path):
    rule, authenticity = (replace(TINY, criterion=name) for name in (None, "authenticity"))
    assert Trial(replace(TINY, criterion="ratio"), 20).key == Trial(TINY, 20).key != Trial(authenticity, 20).key
    by_rule, by_authenticity = (
        run_trial(Trial(each, 20), tmp_path / str(each.criterion)) for each in (rule, authenticity)
    )
    assert by_rule.images == by_authenticity.images
    assert by_authenticity.total == 20
    assert Setting.from_json(authenticity.to_json()) == authenticity
    with pytest.raises(InputError, match="criterion='c_t'"):
        replace(TINY, criterion="c_t")


def test_a_question_ends_the_run_once_it_is_answered(tmp_path):
    # Two images are soon known by heart: half of the samples are copies after 1600 images seen.
    two = replace(
        TINY,
        data=replace(TINY.data, only_class=1),
        network={**TINY.network, "model_channels": 8},
        training={**TINY.training, "lr": 1e-2, "ema": {"rule": "target", "target": 0.9}},
        length={"images": 2400},
        samples=200,
        sampling={"solver": "unipc", "batch": 50},
    )
    yes = run_trial(Trial(two, 2, at_least=0.2), tmp_path / "yes")
    assert (yes.decided, yes.censored, yes.images) == (True, True, 1600)
    assert yes.total < 200
    no = run_trial(Trial(replace(TINY, samples=200), 20, at_least=0.99), tmp_path / "no")
    assert (no.decided, no.censored, len(no.snapshots)) == (False, False, 3)
    assert no.total < 200
    with pytest.raises(InputError, match="at_least is 0"):
        Trial(TINY, 20, at_least=0)


def test_processes_survive_the_death_of_one(tmp_path):
    trials = [Trial(TINY, 20), Trial(replace(TINY, length={"images": 400}, snapshots=10), 20), Trial(TINY, 30)]
    long = trial_folder(tmp_path, trials[1])
    executor = Processes(2, threads=1)

    def kill() -> None:
        while not (long / "audits.json").exists():
            time.sleep(0.01)
        for process, future in zip(executor._processes, executor._busy, strict=True):
            if future is not None and not future.done():
                os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        outcomes = run_trials(trials, tmp_path, executor)
    finally:
        executor.close()
        thread.join()
    assert all(outcome.error is None for outcome in outcomes)
    assert Ledger(tmp_path).entries()[trials[1].key].attempts >= 1
    assert numbers(outcomes[0].result) == numbers(run_trial(trials[0], tmp_path / "here"))
    assert outcomes[1].result.images == 400


def seen_by_a_worker(name, device):
    used = os.times()
    return os.environ.get(name), used.user + used.system


@pytest.mark.skipif(sys.platform != "linux", reason="workers are started fresh elsewhere")
def test_workers_have_this_environment_and_import_nothing_again(monkeypatch):
    executor = Processes(1, threads=1)
    try:
        executor.submit(seen_by_a_worker, "DIFFMEM_SOMETHING").result()  # starts the server, where there is none yet
        executor.close()
        for value in ("one", "two"):
            monkeypatch.setenv("DIFFMEM_SOMETHING", value)
            seen, seconds = executor.submit(seen_by_a_worker, "DIFFMEM_SOMETHING").result()
            assert seen == value
            assert seconds < 0.5  # importing PyTorch takes more
            executor.close()
    finally:
        executor.close()


def test_threads_are_those_of_the_trial_whoever_runs_it(tmp_path):
    """A result depends on its key, not on the threads of the process that made it; other threads are another trial."""
    trial = Trial(replace(TINY, length={"images": 400}, network={**TINY.network, "model_channels": 16}), 20)
    many = torch.get_num_threads() + 3
    torch.set_num_threads(many)
    here = run_trial(trial, tmp_path / "here")
    assert torch.get_num_threads() == many
    torch.set_num_threads(1)
    executor = Processes(1, threads=2)
    try:
        found = run_trials([trial], tmp_path / "there", executor)[0].result
    finally:
        executor.close()
    assert numbers(found) == numbers(here)
    assert (here.threads, here.device) == (1, "cpu")
    assert Trial(replace(trial.setting, threads=2), 20).key != trial.key
    old = {name: value for name, value in trial.setting.to_json().items() if name != "threads"}
    assert Trial(Setting.from_json(old), 20).key == trial.key  # what was run before there was a choice is not run again
    with pytest.raises(InputError, match="threads is 0"):
        replace(TINY, threads=0)


@pytest.mark.parametrize("xflip", [False, True])
def test_the_gallery_counts_copies_as_the_audit_does(tmp_path, xflip, monkeypatch):
    """Images that mirror training images: copies where the run counts mirrored images, in the gallery too."""
    trial = Trial(replace(TINY, training={**TINY.training, "xflip": xflip}), 20)
    training = trial.setting.training_set(20).images
    mirrored = np.ascontiguousarray(training[..., ::-1])

    def sampled(denoiser, seeds, **settings):
        images = torch.from_numpy(mirrored[np.asarray(seeds) % 20])
        return Samples(images, torch.tensor(list(seeds)), None)

    monkeypatch.setattr(evaluator, "sample_batches", lambda *a, **settings: iter([sampled(*a, **settings)]))
    result = run_trial(trial, tmp_path)
    with np.load(tmp_path / "gallery.npz") as gallery:
        share = gallery["memorized"].mean()
        assert (gallery["nearest"] == gallery["generated"]).all() == xflip
    assert share == (
        1.0 if xflip else np.mean([image.tobytes() in {t.tobytes() for t in training} for image in mirrored[:16]])
    )
    assert (result.r_mem == 1.0) == xflip


def test_a_trial_folder_that_holds_something_else_is_named(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({"count": 1}))
    with pytest.raises(InputError, match="not the result of a trial"):
        read_result(Path(tmp_path))


def test_a_folder_of_an_earlier_version_is_continued_once_it_is_renamed(tmp_path):
    outcome = run_trials([Trial(TINY, 20)], tmp_path)[0]
    (tmp_path / "trials").rename(tmp_path / "units")
    (tmp_path / "ledger.sqlite").unlink()
    study = Study("tiny", "", "none", (Variant("one", TINY),), (20,))
    for start in (lambda: run_trials([Trial(TINY, 20)], tmp_path), lambda: run_studies([study], tmp_path)):
        with pytest.raises(
            InputError, match=f"{tmp_path.name}: its runs are in units/.*: rename that folder to trials"
        ):
            start()
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["units"]
    (tmp_path / "units").rename(tmp_path / "trials")
    written = (trial_folder(tmp_path, outcome.trial) / "result.json").stat().st_mtime_ns
    assert run_trials([Trial(TINY, 20)], tmp_path) == [outcome]
    assert (trial_folder(tmp_path, outcome.trial) / "result.json").stat().st_mtime_ns == written


def test_ray_runs_trials_and_reports_their_errors_as_they_are(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="the extra ray is not installed")
    from diffmem.studies import Ray

    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # a cluster that is not asked for
    wrong = replace(TINY, network={**TINY.network, "model_channels": 3})
    executor = Ray(num_cpus=2, include_dashboard=False, cpus=2)  # one worker: each imports PyTorch
    try:
        assert executor.slots == 1
        outcomes = run_trials([Trial(TINY, 20), Trial(wrong, 20)], tmp_path, executor)
    finally:
        executor.close()
    assert numbers(outcomes[0].result) == numbers(run_trial(Trial(TINY, 20), tmp_path / "here"))
    assert outcomes[1].error.startswith("InputError: model_channels is 3")


def test_verdicts_are_kept_with_the_counts():
    """They narrow the interval of a run's R_mem, and must be those that were counted."""
    generator = np.random.default_rng(0)
    verdicts = [generator.permutation(np.arange(1000) < count) for count in (0, 30)] + [np.arange(1000) < 880] * 4
    audited = [SnapshotResult(1, 1.0, 0.1, int(each.sum()), 1000, 1.0, 1.0, copies=pack(each)) for each in verdicts]
    assert all((one.memorized == each).all() for one, each in zip(audited, verdicts, strict=True))
    found = Result("key", 20, 0, 880, 1000, None, False, 100, 5.0, 100, 10, 1.0, 0.5, "", tuple(audited), {}, looks=6)
    assert Result.from_json(json.loads(json.dumps(found.to_json()))) == found
    unknown = replace(found, snapshots=tuple(replace(each, copies=None) for each in audited))
    assert unknown.interval[0] < found.interval[0] < 0.88 < found.interval[1] == unknown.interval[1]
    with pytest.raises(InputError, match="verdicts say copy"):
        replace(audited[2], count=879)
