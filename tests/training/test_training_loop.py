"""The loop: exact resume after kill -9, processes that share a run, refusals, snapshots, warm-up, divergence."""

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from numerics import approximately, assert_close
from processes import as_ranks, start_script
from safetensors.torch import load_file

from diffmem.data import load_images
from diffmem.errors import InputError
from diffmem.models import load
from diffmem.timing import CompileCost
from diffmem.training import (
    EMA,
    Callback,
    DivergedError,
    Grids,
    KeepLast,
    StopDecision,
    TrainingConfig,
    denoiser_config,
    images_of,
    plan_training,
    planning,
    read_records,
    train,
)
from diffmem.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return load_images("builtin:digits").select(slice(0, 40))


def tiny(steps: int = 6, batch: int = 8, **changes) -> TrainingConfig:
    network = {"model_channels": 8, "channel_mult": (1, 1), "num_blocks": 1, "dropout": 0.2}
    network |= changes.pop("network", {})
    values = {"images": steps * batch, "batch": batch, "lr": 1e-3, "warmup_epochs": 0, **changes}
    return TrainingConfig(denoiser_config(8, 1, **network), **values)


def weights(out: Path, images: int) -> dict[str, torch.Tensor]:
    return load_file(out / "snapshots" / f"{images:09d}" / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "stats.jsonl").read_text().splitlines()]


# Everything that could be forgotten: conditional, dropout, augmentation, mixing order, momentum, accumulation.
RICH = {"network": {"label_dim": 10, "augment_dim": 9}, "augment": 0.5, "window": 0.5, "xflip": True}

CHILD = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_flush_denormal(True)
from test_training_loop import RICH, tiny
from diffmem.data import load_images
from diffmem.training import train
digits = load_images("builtin:digits").select(slice(0, 40))
train(tiny(400, **RICH), digits, {out!r}, batch_gpu=4, snapshot_images=24, state_minutes=0)
"""


def test_killed_and_continued_ends_with_the_same_bits(digits, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    code = CHILD.format(tests=str(Path(__file__).parent), out=str(killed))
    with start_script(code, env={"OMP_NUM_THREADS": "1"}) as process:
        stats = killed / "stats.jsonl"
        while process.poll() is None and not (stats.exists() and stats.read_text().count("\n") >= 8):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        errors = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL, errors
    seen = max(int(path.name) for path in (killed / "state").iterdir() if path.name.isdigit())
    assert seen >= 7 * 8

    config = dataclasses.replace(tiny(1, **RICH), images=seen + 5 * 8)  # a longer or shorter run is the same run
    continued = train(config, digits, killed, batch_gpu=4, snapshot_images=24, resume=True)
    straight = train(config, digits, whole, batch_gpu=4, snapshot_images=24)
    assert continued.images == straight.images == config.images
    assert same(weights(killed, config.images), weights(whole, config.images))
    assert losses(killed) == losses(whole)
    assert continued.snapshots == straight.snapshots
    assert len(continued.snapshots) == -(-config.images // 24)
    for name in ("weights", "averaged", "optimizer.exp_avg", "optimizer.exp_avg_sq", "order"):
        states = [load_file(out / "state" / f"{config.images:09d}" / "state.safetensors") for out in (killed, whole)]
        assert torch.equal(states[0][name], states[1][name]), name


def test_states_hold_everything_in_the_order_of_edms_tensors(digits):
    """Weights, averages and moments, tensor after tensor at multiples of 64 bytes, as states of older versions do,
    though the network regroups its queries, keys and values; and restoring one gives back every bit."""
    trainer = Trainer(tiny(3, **RICH), digits, device="cpu")
    before = trainer.state()[0]["weights"]
    trainer.step()
    metadata, tensors = (each := trainer.state())[1], {name: value.clone() for name, value in each[0].items()}
    start, regrouped = 0, 0
    names = [name for name, _ in trainer.denoiser.named_parameters()]
    for name in names:
        value, average = trainer.denoiser.state_dict()[name], trainer.averaged.state_dict()[name]
        regrouped += "qkv" in name
        for stored, expected in (("weights", value), ("averaged", average)):
            if expected.ndim == 4:  # channels_last
                expected = expected.permute(0, 2, 3, 1)
            elif name.endswith("map_label.weight"):  # column by column
                expected = expected.t()
            assert torch.equal(tensors[stored][start : start + expected.numel()], expected.flatten()), (stored, name)
        start += -(-value.numel() // 16) * 16
    assert start == len(before)
    assert regrouped >= 2
    # Adam's first step goes against the sign of its first moment, everywhere.
    moved = tensors["weights"] - before
    assert torch.equal(torch.sign(moved)[moved != 0], -torch.sign(tensors["optimizer.exp_avg"])[moved != 0])
    assert (moved != 0).sum() > 1000

    again = Trainer(tiny(3, **RICH), digits, device="cpu")
    again.restore(metadata, tensors)
    for one, other in ((again.flat, trainer.flat), (again.flat_averaged, trainer.flat_averaged)):
        assert torch.equal(one.values, other.values)
    restored, kept = (each.optimizer.state[each.flat.values] for each in (again, trainer))
    assert restored.keys() == kept.keys()
    assert all(torch.equal(restored[name], kept[name]) for name in kept)


def test_two_processes_train_as_one_does(digits, tmp_path):
    config = tiny(4, **RICH)
    train(config, digits, tmp_path / "one", batch_gpu=4)
    code = (
        CHILD.format(tests=str(Path(__file__).parent), out=str(tmp_path / "two"))
        .replace("import torch\n", "import torch\ntorch.distributed.init_process_group('gloo')\n")
        .replace("400", "4")
        .replace("snapshot_images=24, ", "")
    )
    result = as_ranks(2, start_script, code)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == approximately("losses by two processes", losses(tmp_path / "one"))
    one, two = weights(tmp_path / "one", 32), weights(tmp_path / "two", 32)
    for name in one:
        assert_close("weights after training by two processes", two[name], one[name])


def test_accumulation_changes_only_rounding(digits, tmp_path):
    config = tiny(3, network={"dropout": 0.0})
    for part in (8, 2):
        train(config, digits, tmp_path / str(part), batch_gpu=part)
    assert losses(tmp_path / "2") == approximately("losses of other parts of a batch", losses(tmp_path / "8"))
    with pytest.raises(InputError, match="choose a divisor"):
        train(config, digits, tmp_path / "3", batch_gpu=3)


def test_other_settings_are_refused(digits, tmp_path):
    train(tiny(1), digits, tmp_path)
    with pytest.raises(InputError, match="already holds a run: continue it with resume=True"):
        train(tiny(1), digits, tmp_path)
    other = tiny(1, lr=2e-3, network={"model_channels": 16}, ema=EMA("constant"))
    with pytest.raises(InputError) as refusal:
        train(other, digits, tmp_path, resume=True)
    for field in ("denoiser.network.model_channels (8 there, 16 here)", "lr (0.001 there, 0.002 here)", "ema.rule"):
        assert field in str(refusal.value)
    with pytest.raises(InputError, match=r"data\.images .40 there, 39 here"):
        train(tiny(1), digits.select(slice(0, 39)), tmp_path, resume=True)
    with pytest.raises(InputError, match="the network takes"):
        train(tiny(1), load_images("builtin:digits", resize=16, limit=9), tmp_path / "new")


def test_a_run_from_before_a_field_has_its_default(digits, tmp_path):
    train(tiny(1), digits, tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["config"]["ema"].pop("protocol") == "paper"
    del description["sha256"]  # which came after that field
    (tmp_path / "config.json").write_text(json.dumps(description))
    shutil.rmtree(tmp_path / "state")
    with pytest.raises(InputError, match=r"ema.protocol \(paper there, published here\)"):
        train(tiny(1, ema=EMA(protocol="published")), digits, tmp_path, resume=True)
    assert train(tiny(1), digits, tmp_path, resume=True).ending == "finished"
    assert TrainingConfig.from_json(description["config"]) == tiny(1)


def test_snapshots_are_the_averaged_weights_and_are_kept_by_rule(digits, tmp_path):
    class Judge(Callback):
        def __init__(self):
            self.calls, self.seen = [], []

        def on_start(self, plan):
            self.calls.append("started")

        def on_snapshot(self, snapshot):
            stored = load(snapshot.folder)
            assert same(stored.state_dict(), snapshot.denoiser.state_dict())
            self.seen.append(snapshot.images)
            return StopDecision(score=-abs(snapshot.images - 16), stop=snapshot.images == 48, reason="seen enough")

        def on_end(self):
            self.calls.append("finished")

    judge = Judge()
    run = train(tiny(20), digits, tmp_path, snapshot_images=16, keep=KeepLast(1), callbacks=[judge, Grids(tmp_path, 5)])
    assert (run.ending, run.reason, run.images) == ("stopped", "seen enough", 48)
    assert judge.seen == [16, 32, 48]
    assert judge.calls == ["started", "finished"]
    assert [record.kept for record in run.snapshots] == [True, False, True]
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["000000016", "000000048"]
    assert read_records(tmp_path) == list(run.snapshots)
    assert len(list((tmp_path / "grids").glob("*.png"))) == 3
    assert not list(tmp_path.rglob("*.partial"))


def test_a_small_set_is_learned(digits, tmp_path):
    """The loss falls far below what an untrained network has."""
    network = {"model_channels": 16, "dropout": 0.0}
    config = tiny(100, 16, lr=3e-3, network=network, ema=EMA("target", target=0.9))
    train(config, digits.select(slice(0, 8)), tmp_path)
    history = losses(tmp_path)
    assert sum(history[-20:]) / 20 < 0.5 * sum(history[:15]) / 15


def test_plan_writes_nothing_and_changes_nothing(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = plan_training(tiny(3), digits, batch_gpu=4)
    assert (plan.steps, plan.images, plan.size, plan.batch_gpu, plan.compiled) == (3, 24, 40, 4, False)
    assert plan.seconds_per_step > 0
    assert plan.seconds_range[0] < plan.seconds < plan.seconds_range[1]
    assert not list(tmp_path.iterdir())
    assert not plan_training(tiny(10**9), digits).compiled  # a network this small does not gain by it
    monkeypatch.setitem(planning._COMPILING, "cpu", CompileCost(170.0, 0.07, 0))
    assert plan_training(tiny(10**9), digits).compiled  # long enough for a large one


def test_divergence_stops_with_advice(digits, tmp_path):
    with pytest.raises(DivergedError, match="lower learning rate"):
        train(tiny(30, lr=1e30, optimizer="sgd"), digits, tmp_path, state_minutes=0)
    state = max((tmp_path / "state").iterdir())
    assert load_file(state / "state.safetensors")["loss_sums"].isfinite().all()


def test_learning_rate_and_length():
    config = tiny(1, lr=1.0, warmup_epochs=200)
    assert config.learning_rate(0, 1000) == 0
    assert config.learning_rate(50_000, 1000) == 0.25
    assert config.learning_rate(10**9, 1000) == 1
    assert config.learning_rate(1000, 13) == 0.5  # 2600 images are floored to 2 kimg
    assert config.learning_rate(0, 4) == 1  # 0 kimg: no warm-up
    assert images_of(1000, duration=2000) == 40_000_000
    assert images_of(1000, epochs=1.5) == 1500
    with pytest.raises(InputError, match="exactly one"):
        images_of(1000, epochs=1, images=5)


def test_configurations_survive_json():
    config = tiny(3, ema=EMA("target", target=0.5), betas=(0.8, 0.99))
    assert TrainingConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    for field, value in (("lr", -1.0), ("window", 2.0), ("optimizer", "lion"), ("seed", -1), ("augment", 0.5)):
        with pytest.raises(InputError, match="augment_dim" if field == "augment" else field):
            dataclasses.replace(config, **{field: value})


def test_global_random_numbers_are_left_alone(digits, tmp_path):
    torch.manual_seed(4)
    before = torch.get_rng_state()
    train(tiny(1), digits, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_compiled_training_is_the_same_training(digits, tmp_path, monkeypatch):
    """Traced as a whole, forward and backward, without a break; the generated code itself is Inductor's business, and
    takes a minute to make."""
    config = tiny(2, network={"channel_mult": (1,), "attn_resolutions": (8,), "label_dim": 10, "dropout": 0.0})
    train(config, digits, tmp_path / "eager", compile=False)
    traced = []

    def compile(module, **arguments):
        traced.append(arguments)
        return whole(module, backend="aot_eager", fullgraph=True, **arguments)

    whole = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    train(config, digits, tmp_path / "compiled", compile=True)
    assert traced == [{"dynamic": False}]
    found, expected = (losses(tmp_path / name) for name in ("compiled", "eager"))
    assert found == approximately("losses after compiled training", expected)
    eager, compiled = (weights(tmp_path / name, config.images) for name in ("eager", "compiled"))
    for name in eager:
        assert_close("weights after compiled training", compiled[name], eager[name])
