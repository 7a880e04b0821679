"""Passes replayed as a graph, with a stand-in for CUDA graphs, and the precisions of training."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from click.testing import CliRunner
from numerics import approximately
from test_training_loop import RICH, losses, same, tiny, weights

from diffmem.cli import cli
from diffmem.data import load_images
from diffmem.errors import InputError
from diffmem.timing import timing_of
from diffmem.training import Callback, StopDecision, plan_training, planning, train
from diffmem.training.passes import WARM_UP, GraphedPass, forward_backward
from diffmem.training.run_folder import description as description_module
from diffmem.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def digits():
    return load_images("builtin:digits").select(slice(0, 40))


def capture_by_calls(run):
    """A graph on the CPU: a replay runs the same function on the same tensors and leaves its result where it was."""
    for _ in range(WARM_UP):
        run()
    result = run()
    return lambda: result.copy_(run()), result


def graphed(config, digits, micro, capture=capture_by_calls) -> Trainer:
    trainer = Trainer(config, digits, "cpu", batch_gpu=micro, compile=False)
    trainer.cuda_graph = True
    run = partial(forward_backward, trainer.objective, config.batch)
    trainer.passes = GraphedPass(run, [trainer.flat.values.grad], capture)
    return trainer


@pytest.mark.parametrize("micro", [4, 8])
def test_a_graph_trains_to_the_same_bits(digits, micro):
    """With labels, augmentation, dropout and several parts of a batch; capturing leaves no trace."""
    config = tiny(5, **RICH)
    plain, ours = Trainer(config, digits, "cpu", batch_gpu=micro, compile=False), graphed(config, digits, micro)
    for _ in range(5):
        plain.step()
        ours.step()
    assert torch.equal(plain.flat.values, ours.flat.values)
    assert torch.equal(plain.flat_averaged.values, ours.flat_averaged.values)
    assert plain.mean_losses() == ours.mean_losses()


def test_a_replay_reads_what_it_is_given(digits):
    """A graph that forgot to copy its inputs, or to draw new random numbers, would train to other weights."""
    config = tiny(4, **RICH)
    plain, ours = Trainer(config, digits, "cpu", compile=False), graphed(config, digits, 8)
    plain.step()
    ours.step()
    ours.passes.held = tuple(None if each is None else each.clone() for each in ours.passes.held)
    plain.step()
    ours.step()  # writes to tensors that the captured run does not read
    assert not torch.equal(plain.flat.values, ours.flat.values)


def test_graphs_are_for_gpus(digits):
    with pytest.raises(InputError, match="cuda_graph is True, but the device is cpu"):
        Trainer(tiny(), digits, "cpu", cuda_graph=True)
    with pytest.raises(InputError, match="cuda_graph is 'always'"):
        Trainer(tiny(), digits, "cpu", cuda_graph="always")
    assert plan_training(tiny(), digits, device="cpu", compile=False).graphed is False


@pytest.mark.parametrize(("eager", "graph", "expected"), [
    (0.05, 0.01, True), (0.05, 0.06, False), (1.0, 0.01, False), (0.05, RuntimeError("not permitted"), False),
])  # fmt: skip
def test_a_graph_is_used_where_it_was_faster(digits, monkeypatch, eager, graph, expected):
    trainer = Trainer(tiny(), digits, "cpu", compile=False)

    def seconds(run, budget):
        assert trainer.cuda_graph is True
        if isinstance(graph, Exception):
            raise graph
        return timing_of([graph])

    monkeypatch.setattr(planning, "measure", seconds)
    assert planning.graph_pays(trainer, eager) is expected
    assert trainer.cuda_graph == "auto"
    assert trainer.passes is None


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_precisions_train_alike(digits, tmp_path, precision):
    """Losses near float32's; weights, gradients and averages stay float32; the switches are left as they were."""
    config = tiny(6, network={"dropout": 0.0})
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    seen = []

    class Watch(Callback):
        def on_snapshot(self, snapshot):
            seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return StopDecision()

    train(config, digits, tmp_path / "ieee", device="cpu", compile=False)
    other = dataclasses.replace(config, precision=precision)
    train(other, digits, tmp_path / precision, device="cpu", compile=False, callbacks=[Watch()])
    for ours, theirs in zip(losses(tmp_path / precision), losses(tmp_path / "ieee"), strict=True):
        assert ours == approximately("losses of bfloat16 products", theirs)
    found, exact = weights(tmp_path / precision, 48), weights(tmp_path / "ieee", 48)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert same(found, exact) == (precision == "tf32")  # which is for GPUs; bf16 really was used
    assert seen == [(False, False)]  # what a snapshot samples is sampled in float32
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    recorded = json.loads((tmp_path / precision / "config.json").read_text())
    assert recorded["config"]["precision"] == precision


def test_precision_belongs_to_the_run(digits, tmp_path):
    """A run goes on in its own precision only; one from before there was a choice was in float32."""
    config = tiny(2)
    train(config, digits, tmp_path, device="cpu", compile=False)
    with pytest.raises(InputError, match=r"other settings: precision \(ieee there, bf16 here\)"):
        train(dataclasses.replace(config, precision="bf16", images=64), digits, tmp_path, device="cpu", resume=True)
    description = json.loads((tmp_path / "config.json").read_text())
    older = {**description, "config": {name: value for name, value in description["config"].items()
                                       if name != "precision"}}  # fmt: skip
    description_module._check_same_run(tmp_path, description, older)
    with pytest.raises(InputError, match="precision is 'fp16', but must be one of ieee, tf32, bf16"):
        dataclasses.replace(config, precision="fp16")


def test_command_line(tmp_path):
    network = ["--num-channels", "8", "--num-blocks", "1", "--channel-mult", "1", "--batch", "8"]
    command = ["train", "--data", "builtin:digits", "--size", "20", *network, "--images", "16", "--device", "cpu"]
    done = CliRunner().invoke(cli, [*command, "--precision", "bf16", "--cuda-graph", "no", "--dry-run"])
    assert done.exit_code == 0, done.output
    assert '"precision": "bf16"' in done.output
    assert "(not compiled, in bf16)" in done.output
