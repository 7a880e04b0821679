"""Samplers against the golden files, seeds against batch sizes, and the order of the solvers."""

from __future__ import annotations

import math

import pytest
import torch
from golden_networks import NAMES, golden_denoiser, relative_error

from diffmem.errors import InputError
from diffmem.sampling import (
    SeededGenerators,
    batches,
    dpmpp_sample,
    general_sample,
    heun_sample,
    sample,
    to_uint8,
    unipc_sample,
)
from diffmem.sampling.batches import SAMPLERS
from diffmem.timing import CompileCost

SEEDS = [0, 1, 2, 12345]


def drawn(denoiser):
    """Latents, class indices and the generators behind them, for the golden seeds."""
    generators = SeededGenerators(SEEDS)
    latents = generators.randn((3, denoiser.resolution, denoiser.resolution))
    return latents, generators.randint(denoiser.label_dim) if denoiser.label_dim else None, generators


@pytest.mark.parametrize("name", NAMES)
def test_heun_golden(name):
    denoiser, tensors = golden_denoiser(name)
    latents, labels, _ = drawn(denoiser)
    assert torch.equal(latents, tensors["latents"])
    if labels is not None:
        assert torch.equal(labels, tensors["sample_class_index"])
    images = heun_sample(denoiser, latents, labels=labels)
    assert images.dtype == torch.float64
    assert relative_error(images, tensors["heun18"]) < 1e-4
    difference = (to_uint8(images).int() - tensors["images_uint8"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() <= 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_churn_golden(name):
    denoiser, tensors = golden_denoiser(name)
    latents, labels, generators = drawn(denoiser)
    images = heun_sample(
        denoiser,
        latents,
        labels=labels,
        steps=8,
        S_churn=4,
        S_min=0.05,
        S_max=50,
        S_noise=1.003,
        noise=lambda: generators.randn(latents.shape[1:], torch.float64),
    )
    assert relative_error(images, tensors["heun8_churn"]) < 1e-4


@pytest.mark.parametrize(
    "variant", ["edm.linear.none.euler", "iddpm.linear.none.heun", "ve.ve.none.heun", "vp.vp.vp.euler"]
)
def test_table_1_golden(variant):
    denoiser, tensors = golden_denoiser("ddpmpp-vp-uncond")
    discretization, schedule, scaling, solver = variant.split(".")
    images = general_sample(
        denoiser,
        tensors["latents"],
        discretization=discretization,
        schedule=schedule,
        scaling=scaling,
        solver=solver,
        steps=10,
    )
    assert relative_error(images, tensors[f"ablation.{variant}"]) < 1e-4


FAST = {"dpm++": dpmpp_sample, "unipc": unipc_sample}


class Gaussian:
    """The exact denoiser of data N(0, deviation²): its flow carries a latent z from √(σ_max² + d²)·… to d·z."""

    deviation = 0.5

    def __call__(self, x, sigma, labels=None):
        return x * self.deviation**2 / (self.deviation**2 + sigma**2)

    def end(self, latents, sigma_max=80.0):
        start = latents.double() * sigma_max
        return start * self.deviation / math.sqrt(self.deviation**2 + sigma_max**2)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 3)])
def test_order_of_convergence(sampler, order):
    exact, latents = Gaussian(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (40, 80, 160):
        if sampler in FAST:
            images = FAST[sampler](exact, latents, steps=steps, sigma_min=1e-6)
        else:
            images = general_sample(exact, latents, solver=sampler, steps=steps, sigma_min=1e-4)
        errors.append((images - exact.end(latents)).abs().max().item())
    assert errors[1] / errors[2] > 0.8 * 2**order
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("scaling", ["vp", "none"])
@pytest.mark.parametrize("schedule", ["vp", "ve", "linear"])
@pytest.mark.parametrize("discretization", ["vp", "ve", "iddpm", "edm"])
def test_every_variant_solves_the_same_flow(discretization, schedule, scaling):
    exact, latents = Gaussian(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images = general_sample(
        exact, latents, discretization=discretization, schedule=schedule, scaling=scaling, steps=400, M=4000,
        sigma_min=0.002, sigma_max=80.0,
    )  # fmt: skip
    # iDDPM's highest levels lie far apart, farthest in t = σ².
    assert relative_error(images, exact.end(latents)) < 0.03


def test_churn_keeps_the_distribution():
    exact, latents = Gaussian(), torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    images = heun_sample(exact, latents, steps=128, S_churn=16)
    assert images.std().item() == pytest.approx(Gaussian.deviation, rel=0.02)
    assert torch.corrcoef(torch.stack([images.flatten(), latents.flatten().double()]))[0, 1] < 0.9


def test_seeds_are_independent_of_the_batch():
    denoiser, tensors = golden_denoiser("ncsnpp-ve-cond")
    whole = sample(denoiser, SEEDS, batch=64, compile=False)
    assert whole.seeds.tolist() == SEEDS
    assert torch.equal(whole.labels, tensors["sample_class_index"])
    parts = sample(denoiser, SEEDS[::-1], batch=3, compile=False)
    difference = (parts.images.flip(0).int() - whole.images.int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() <= 1e-3
    assert torch.equal(parts.labels.flip(0), whole.labels)
    # A seed counts modulo 2³².
    assert torch.equal(SeededGenerators([2**32 + 1]).randn((2,)), SeededGenerators([1]).randn((2,)))


def test_chosen_classes():
    denoiser, _ = golden_denoiser("ncsnpp-ve-cond")
    one = sample(denoiser, [5, 6, 7], labels=3, batch=2, steps=3, compile=False)
    assert one.labels.tolist() == [3, 3, 3]
    each = sample(denoiser, [5, 6, 7], labels=torch.tensor([3, 3, 1]), batch=2, steps=3, compile=False)
    assert torch.equal(each.images[:2], one.images[:2])
    assert not torch.equal(each.images[2], one.images[2])
    with pytest.raises(InputError, match="0 … 9"):
        sample(denoiser, [5], labels=10)
    with pytest.raises(InputError, match="2 for 1 seeds"):
        sample(denoiser, [5], labels=torch.tensor([1, 2]))


def test_a_given_class_shifts_no_noise():
    """With churn, the images of class K are those that the seeds give when they draw K themselves."""
    denoiser, tensors = golden_denoiser("ncsnpp-ve-cond")
    churn = {"steps": 4, "S_churn": 4, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
    # By hand, in the order of the protocol: latent, class index, noise.
    latents, labels, generators = drawn(denoiser)
    by_hand = to_uint8(
        heun_sample(
            denoiser, latents, labels=labels, noise=lambda: generators.randn(latents.shape[1:], torch.float64), **churn
        )
    )
    assert torch.equal(labels, tensors["sample_class_index"])
    own = sample(denoiser, SEEDS, compile=False, **churn)
    assert torch.equal(own.images, by_hand)
    vectors = torch.eye(denoiser.label_dim)[labels]
    for given in (labels, vectors):
        again = sample(denoiser, SEEDS, labels=given, compile=False, **churn)
        assert (again.images.int() - by_hand.int()).abs().max() <= (0 if given is labels else 1)
    for row, label in enumerate(labels.tolist()):
        of_class = sample(denoiser, SEEDS, labels=label, compile=False, **churn)
        assert torch.equal(of_class.images[row], by_hand[row])
        assert (of_class.images[labels != label] != by_hand[labels != label]).any()


def test_compiled_stage_is_one_graph_for_all_stages(monkeypatch):
    denoiser, _ = golden_denoiser("ddpmpp-vp-skips")
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=backend, fullgraph=True))
    eager = sample(denoiser, [0, 1, 2], steps=3, batch=2, compile=False)
    compiled = sample(denoiser, [0, 1, 2], steps=3, batch=2, compile=True)
    assert (eager.images.int() - compiled.images.int()).abs().max() <= 1
    for solver in ("dpm++", "unipc"):
        again = sample(denoiser, [2], batch=2, solver=solver, steps=4, compile="auto")
        eager = sample(denoiser, [2], batch=2, solver=solver, steps=4, compile=False)
        assert (eager.images.int() - again.images.int()).abs().max() <= 1
    assert len(graphs) == 1


def test_auto_compiles_only_long_runs(monkeypatch):
    denoiser, _ = golden_denoiser("ddpmpp-vp-skips")
    used = []
    monkeypatch.setitem(batches._COMPILING, "cpu", CompileCost(120.0, 0.2, 0))  # the network is a tiny one

    def solver(_denoiser, latents, labels, compiled):
        used.append((compiled, len(latents)))
        return latents

    monkeypatch.setitem(SAMPLERS, "heun", solver)
    clock = iter(range(0, 10**9, 50))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    sample(denoiser, range(5), batch=2)
    assert used == [(False, 2), (False, 2), (False, 1)]
    used.clear()
    sample(denoiser, range(201), batch=2)
    assert used[:2] == [(False, 2), (False, 2)]  # the first warms up
    assert set(used[2:]) == {(True, 2)}


def test_bad_arguments():
    denoiser, tensors = golden_denoiser("ddpmpp-vp-uncond")
    for arguments, message in (
        ({"steps": 1}, "steps is 1"),
        ({"sigma_min": 5.0, "sigma_max": 1.0}, "sigma_min < sigma_max"),
    ):
        with pytest.raises(InputError, match=message):
            heun_sample(denoiser, tensors["latents"], **arguments)
    with pytest.raises(InputError, match="discretization is 'ddim'"):
        general_sample(denoiser, tensors["latents"], discretization="ddim")
    with pytest.raises(InputError, match="solver is 'rk45'"):
        sample(denoiser, [0], solver="rk45")
    with pytest.raises(InputError, match="unconditional"):
        sample(denoiser, [0], labels=1)
    with pytest.raises(InputError, match="none given"):
        sample(denoiser, [])
