"""Trajectories and audits during training, on runs whose snapshots make a known share of copies: what is audited, what
is remembered, what is answered, what is written."""

import json

import numpy as np
import pytest
import torch

from diffmem.cli import main
from diffmem.data import load_images
from diffmem.errors import InputError
from diffmem.evaluation import AuditEvery, evaluator, trajectory
from diffmem.memorization import SequentialTest
from diffmem.sampling import Samples
from diffmem.training import Callback, TrainingConfig, denoiser_config, read_records, train

BATCH, STEPS = 8, 10
N = 40


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return load_images("builtin:digits").select(slice(0, N))


class Grow(Callback):
    """Makes the k-th snapshot one that copies `shares[k]` of the time: its first parameter says how often."""

    def __init__(self, shares):
        self.shares = iter(shares)

    def on_snapshot(self, snapshot):
        with torch.no_grad():
            next(snapshot.denoiser.parameters()).fill_(next(self.shares))


def config(steps: int = STEPS) -> TrainingConfig:
    network = denoiser_config(8, 1, model_channels=8, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    return TrainingConfig(network, images=steps * BATCH, batch=BATCH, warmup_epochs=0)


@pytest.fixture
def made(monkeypatch, digits):
    """Replaces the sampler: a share of the seeds gives training images, the others their negatives. Returns the seeds
    that were sampled, in order."""
    sampled = []

    def sample_batches(denoiser, seeds, config):
        seeds = list(seeds)
        for start in range(0, len(seeds), config.batch):
            yield batch_of(denoiser, seeds[start : start + config.batch])

    def batch_of(denoiser, seeds):
        share = next(denoiser.parameters()).flatten()[0].item()
        rows = np.asarray(seeds) % N
        copies = (np.asarray(seeds) * 0.381966 % 1 < share)[:, None, None, None]
        images = np.where(copies, digits.images[rows], 255 - digits.images[rows])
        sampled.extend(seeds)
        return Samples(torch.from_numpy(images), torch.tensor(seeds), None)

    monkeypatch.setattr(evaluator, "sample_batches", sample_batches)
    return sampled


def a_run(path, digits, shares=(0.0, 0.1, 0.3, 0.7, 1.0)):
    """A run of five snapshots whose stored denoisers have these shares."""
    from diffmem.models import load, save

    train(config(), digits, path, snapshot_images=STEPS // 5 * BATCH, device="cpu", compile=False)
    for record, share in zip(read_records(path), shares, strict=True):
        folder = path / "snapshots" / f"{record.images:09d}"
        denoiser = load(folder)
        with torch.no_grad():
            next(denoiser.parameters()).fill_(share)
        save(denoiser, folder)
    return path


def test_ratios_memory_and_files(tmp_path, digits, made):
    run = a_run(tmp_path / "run", digits)
    result = trajectory(run, data=digits, seeds=range(100), device="cpu")
    assert [point.ratio for point in result.points] == pytest.approx([0.0, 0.1, 0.3, 0.7, 1.0], abs=0.015)
    assert result.r_mem == 1.0
    assert result.best.images == STEPS * BATCH
    assert result.onset().images == 4 * STEPS // 5 * BATCH
    # The interval of the highest of five is wider than that of one.
    assert result.interval[0] < result.best.interval[0] < 1
    # Newest first; nothing twice; more seeds cost only those.
    assert made[:100] == [*range(100)]
    made.clear()
    again = trajectory(run, data=digits, seeds=range(50, 120), device="cpu")
    assert made == [*range(100, 120)] * 5
    assert [point.total for point in again.points] == [70] * 5
    made.clear()
    again = trajectory(run, data=digits, seeds=range(120), device="cpu")
    assert made == []
    page = again.save()
    assert page == run / "trajectory" / "trajectory.html"
    text = page.read_text()
    assert "100 %" in text
    assert text.count("<figure>") == 24  # first copies, each of another training image
    stored = json.loads((run / "trajectory" / "trajectory.json").read_text())
    assert [one["count"] for one in stored["snapshots"]] == [point.count for point in again.points]
    lines = (run / "trajectory" / "trajectory.csv").read_text().splitlines()
    assert len(lines) == 6
    assert (run / "trajectory" / "trajectory.svg").read_text().startswith("<svg")


def test_by_another_criterion(tmp_path, digits, made):
    """The same images of the same seeds, counted by another criterion; each is remembered by itself."""
    run = a_run(tmp_path / "run", digits)
    by_rule = trajectory(run, data=digits, seeds=range(100), device="cpu")
    by_tiles = trajectory(run, data=digits, seeds=range(100), device="cpu", criterion="tile_max")
    assert len(made) == 2 * 5 * 100
    assert [point.ratio for point in by_tiles.points] == [point.ratio for point in by_rule.points]  # exact copies
    assert (by_tiles.settings["criterion"], "criterion" in by_rule.settings) == ("tile_max", False)
    made.clear()
    m3 = trajectory(run, data=digits, seeds=range(100), device="cpu", criterion="m3", every=STEPS * BATCH)
    assert made == [*range(100)] * len(m3.points)
    trajectory(run, data=digits, seeds=range(100), device="cpu", criterion="tile_max")
    assert made == [*range(100)] * len(m3.points)
    with pytest.raises(InputError, match="criterion='c_t' decides about no single image"):
        trajectory(run, data=digits, criterion="c_t")


def test_an_interrupt_loses_one_batch(tmp_path, digits, made, monkeypatch):
    run = a_run(tmp_path / "run", digits)
    sampler = evaluator.sample_batches
    batches = iter(range(3))

    def interrupted(*arguments, **settings):
        for made in sampler(*arguments, **settings):
            if next(batches, None) is None:
                raise KeyboardInterrupt
            yield made

    monkeypatch.setattr(evaluator, "sample_batches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trajectory(run, data=digits, seeds=range(256), device="cpu")
    assert made == [*range(256)]  # the last batch was sampled, and lost
    made.clear()
    monkeypatch.setattr(evaluator, "sample_batches", sampler)
    trajectory(run, data=digits, seeds=range(256), device="cpu", every=STEPS * BATCH)
    assert made == [*range(192, 256)]


def test_other_weights_or_settings_are_audited_anew(tmp_path, digits, made):
    from diffmem.sampling import SamplerConfig

    run = a_run(tmp_path / "run", digits)
    whole = {"data": digits, "seeds": range(64), "device": "cpu", "every": STEPS * BATCH}
    trajectory(run, **whole)
    made.clear()
    assert trajectory(run, **whole, sampler=SamplerConfig(solver="unipc")).r_mem == 1.0
    assert len(made) == 64
    a_folder = run / "snapshots" / f"{STEPS * BATCH:09d}"
    from diffmem.models import load, save

    denoiser = load(a_folder)
    with torch.no_grad():
        next(denoiser.parameters()).fill_(0.0)
    save(denoiser, a_folder)
    assert trajectory(run, **whole).r_mem == 0.0


def test_audits_of_an_older_version_are_refused_in_one_line(tmp_path, digits, made):
    run = a_run(tmp_path / "run", digits)
    audits = run / "trajectory" / "audits"
    audits.mkdir(parents=True)
    np.savez(audits / "000000016-0123abcd.npz", seeds=np.arange(4), memorized=np.ones(4, bool))
    with pytest.raises(
        InputError, match=r"000000016-0123abcd\.npz: written by an older version of diffmem: delete the"
    ):
        trajectory(run, data=digits, seeds=range(4))
    assert made == []
    for path in audits.glob("*.npz"):
        path.unlink()
    assert trajectory(run, data=digits, seeds=range(4)).points[-1].total == 4


def test_questions_take_few_images_and_bisection_few_snapshots(tmp_path, digits, made):
    run = a_run(tmp_path / "run", digits)
    result = trajectory(
        run, data=digits, seeds=range(2000), device="cpu", stop=SequentialTest(0.5), order="bisect",
    )  # fmt: skip
    assert result.answer is True
    assert [point.images for point in result.points] == [32, 48, 64, 80]
    assert result.left_out == (16,)
    assert len(made) < 600
    assert all(point.answer is (point.ratio > 0.5) for point in result.points)
    never = trajectory(run, data=digits, seeds=range(2000), device="cpu", stop=SequentialTest(0.999), order="oldest")
    assert never.answer is None  # 2,000 images do not tell 1 from 0.999
    low = a_run(tmp_path / "low", digits, (0.0, 0.0, 0.1, 0.1, 0.2))
    assert trajectory(low, data=digits, seeds=range(2000), device="cpu", stop=SequentialTest(0.9)).answer is False


def test_audits_during_training_end_the_run(tmp_path, digits, made):
    told = []
    out = tmp_path / "run"
    watch = AuditEvery(
        digits, out, every=2 * BATCH, samples=400, stop=SequentialTest(0.5), device="cpu", on_audit=told.append
    )  # fmt: skip
    run = train(
        config(), digits, out, snapshot_images=BATCH, device="cpu", compile=False,
        callbacks=[Grow([0.0] * 3 + [0.2] * 2 + [0.9] * 5), watch],
    )  # fmt: skip
    assert (run.ending, run.images) == ("stopped", 6 * BATCH)
    assert "R_mem is at least 0.5" in run.reason
    assert [point.images for point in told] == [2 * BATCH, 4 * BATCH, 6 * BATCH]
    assert [record.score is not None for record in run.snapshots] == [False, True] * 3
    assert told[-1].total < 400
    # Ten steps, an audit every two of them: five share the confidence.
    assert told[-1].test.confidence == pytest.approx(1 - 0.05 / 5)
    assert len(list((out / "trajectory" / "audits").iterdir())) == 3


def test_the_last_snapshot_is_audited(tmp_path, digits, made):
    told = []
    watch = AuditEvery(digits, tmp_path / "run", every=7 * BATCH, samples=8, device="cpu", on_audit=told.append)
    train(config(), digits, tmp_path / "run", snapshot_images=BATCH, device="cpu", compile=False, callbacks=[watch])
    assert [point.images for point in told] == [7 * BATCH, 10 * BATCH]


def test_refusals(tmp_path, digits, made):
    with pytest.raises(InputError, match="not a run of diffmem train"):
        trajectory(tmp_path)
    run = a_run(tmp_path / "run", digits)
    with pytest.raises(InputError, match="does not record where its training set is"):
        trajectory(run)
    with pytest.raises(InputError, match="not the 40 images"):
        trajectory(run, data=digits.select(slice(0, 39)))
    for arguments, message in (({"order": "best"}, "order is"), ({"seeds": []}, "seeds"), ({"every": 0}, "every is 0")):
        with pytest.raises(InputError, match=message):
            trajectory(run, data=digits, **arguments)


def test_command_line_from_training_to_the_page(tmp_path, capfd):
    """Real sampling, no stand-in: a run that audits itself, then its trajectory, found without naming the data."""

    def call(*arguments) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([*map(str, arguments)])
        return end.value.code, *capfd.readouterr()

    out = tmp_path / "run"
    network = ["--num-channels", 8, "--num-blocks", 1, "--channel-mult", 1, "--batch", 16]
    few = ["--audit-solver", "unipc", "--grid", 0]
    train_it = ("train", "--data", "builtin:digits", "--size", 20, *network, *few, "--images", 64, "--out", out)
    status, _, errors = call(*train_it, "--audit-every", 32, "--audit-samples", 4, "--stop-at", 0.9)
    assert status == 0
    assert "R_mem 0 %" in errors
    status, printed, _ = call("trajectory", out, "--seeds", "0-5", "--solver", "unipc", "--json")
    assert status == 0
    result = json.loads(printed)
    assert [(one["images"], one["total"]) for one in result["snapshots"]] == [(32, 6), (64, 6)]
    assert (out / "trajectory" / "trajectory.html").exists()
    for options, message in ((["--stop-at", 0.9], "--audit-every"), (["--audit-every", 32, "--stop-at", 0], "0<x<=1")):
        status, _, errors = call(*train_it, *options)
        assert (status, message in errors) == (2, True)


def test_no_gate_passes_on_a_newest_snapshot_that_has_collapsed(tmp_path, digits, made, monkeypatch, capfd):
    run = a_run(tmp_path / "run", digits, (0.0, 0.0, 0.0, 0.0, 0.0))
    result = trajectory(run, data=digits, seeds=range(40))
    assert result.warnings == ()
    np.savez(tmp_path / "digits.npz", images=digits.images, labels=digits.labels)

    def black(denoiser, seeds, **settings):
        if seeds:
            yield Samples(torch.zeros(len(seeds), 1, 8, 8, dtype=torch.uint8), torch.tensor(seeds), None)

    monkeypatch.setattr(evaluator, "sample_batches", black)
    gate = ["--seeds", "100-299", "--require-below", "0.5", "--device", "cpu"]
    for again in range(2):  # as it is sampled, and as it is remembered
        with pytest.raises(SystemExit) as ended:
            main(["trajectory", str(run), "--data", str(tmp_path / "digits.npz"), *gate])
        assert ended.value.code == 4, again
        assert "200 of 200 images are of a single color" in capfd.readouterr().err
