"""Samplers against the golden files, seeds against batch sizes, and the order of the solvers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden_networks import NAMES, golden_denoiser
from numerics import assert_relative

from diffmem.errors import InputError
from diffmem.models.preconditioning import IDDPM
from diffmem.sampling import (
    Churn,
    SamplerConfig,
    SeededGenerators,
    batches,
    clip_range,
    round_sigmas,
    sample,
    sample_dpmpp_2m,
    sample_euler,
    sample_general,
    sample_heun,
    sample_latents,
    sample_unipc,
    sigmas_iddpm,
    sigmas_karras,
    sigmas_logistic,
    sigmas_ve,
    sigmas_vp,
    to_uint8,
    vp_betas,
    vp_sigma,
)
from diffmem.timing import CompileCost

SEEDS = [0, 1, 2, 12345]


RANGES = {"vp": (vp_sigma(1e-3), vp_sigma(1.0)), "ve": (0.02, 100.0), "iddpm": (0.002, 81.0), "edm": (0.002, 80.0)}


def table_1(denoiser, latents, steps, discretization, sigma_min=None, sigma_max=None, M=1000, **arguments):
    """The general sampler as the golden files use it: VP's betas fitted to the clipped range."""
    low, high = RANGES[discretization]
    low, high = clip_range(denoiser, low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max)
    betas = vp_betas(low, high)
    sigmas = {
        "vp": lambda: sigmas_vp(steps, *betas),
        "ve": lambda: sigmas_ve(steps, low, high),
        "iddpm": lambda: sigmas_iddpm(steps, low, high, M=M),
        "edm": lambda: sigmas_karras(steps, low, high),
    }[discretization]()
    sigmas = round_sigmas(sigmas, denoiser)
    return sample_general(denoiser, latents.double() * sigmas[0], sigmas, betas=betas, **arguments)


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
    images = sample_latents(denoiser, latents, labels=labels)
    assert images.dtype == torch.float64
    assert_relative("a sampler, golden", images, tensors["heun18"])
    difference = (to_uint8(images).int() - tensors["images_uint8"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).double().mean() <= 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_churn_golden(name):
    denoiser, tensors = golden_denoiser(name)
    latents, labels, generators = drawn(denoiser)
    images = sample_latents(
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
    assert_relative("a sampler, golden", images, tensors["heun8_churn"])


@pytest.mark.parametrize(
    "variant", ["edm.linear.none.euler", "iddpm.linear.none.heun", "ve.ve.none.heun", "vp.vp.vp.euler"]
)
def test_table_1_golden(variant):
    denoiser, tensors = golden_denoiser("ddpmpp-vp-uncond")
    discretization, schedule, scaling, solver = variant.split(".")
    images = table_1(
        denoiser, tensors["latents"], 10, discretization, solver=solver, schedule=schedule, scaling=scaling
    )  # fmt: skip
    assert_relative("a sampler, golden", images, tensors[f"ablation.{variant}"])


FAST = {"dpm++": sample_dpmpp_2m, "unipc": sample_unipc}


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
            images = sample_latents(exact, latents, solver=sampler, steps=steps, sigma_min=1e-6)
        else:
            images = table_1(exact, latents, steps, "edm", 1e-4, solver=sampler)
        errors.append((images - exact.end(latents)).abs().max().item())
    assert errors[1] / errors[2] > 0.8 * 2**order
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("scaling", ["vp", "none"])
@pytest.mark.parametrize("schedule", ["vp", "ve", "linear"])
@pytest.mark.parametrize("discretization", ["vp", "ve", "iddpm", "edm"])
def test_every_variant_solves_the_same_flow(discretization, schedule, scaling):
    exact, latents = Gaussian(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    images = table_1(exact, latents, 400, discretization, 0.002, 80.0, M=4000, schedule=schedule, scaling=scaling)
    assert_relative("every variant, 400 steps", images, exact.end(latents))


def test_churn_keeps_the_distribution():
    exact, latents = Gaussian(), torch.randn(1, 1, 200, 200, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    images = sample_latents(exact, latents, steps=128, S_churn=16)
    assert images.std().item() == pytest.approx(Gaussian.deviation, rel=0.02)
    assert torch.corrcoef(torch.stack([images.flatten(), latents.flatten().double()]))[0, 1] < 0.9


@pytest.mark.parametrize(
    ("name", "solver"), [("euler", None), ("heun", "heun"), ("dpmpp_2m", "dpm++"), ("unipc", "unipc")]
)
def test_any_schedule_can_be_cut_in_two(name, solver):
    """A schedule that ends above 0 gives the state there: what goes on from it ends as the whole does."""
    exact, latents = Gaussian(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    sampler = {"euler": sample_euler, "heun": sample_heun, **{"dpmpp_2m": sample_dpmpp_2m, "unipc": sample_unipc}}[name]
    sigmas = sigmas_logistic(60, 0.002) if name == "unipc" else sigmas_karras(60)
    x = latents * sigmas[0]
    whole = sampler(exact, x, torch.tensor(sigmas, dtype=torch.float64))
    middle = sampler(exact, x, sigmas[:31])
    variance = (Gaussian.deviation**2 + sigmas[30] ** 2) / (Gaussian.deviation**2 + sigmas[0] ** 2)
    assert_relative(
        "half a schedule by Euler" if name == "euler" else "half a schedule", middle, x * math.sqrt(variance)
    )
    again = sampler(exact, middle, sigmas[30:])
    if name in ("euler", "heun"):
        assert torch.equal(again, whole)
    else:  # a multistep method forgets the evaluations before the cut
        assert_relative("a multistep method begun again", again, whole)
    if solver is not None:  # SamplerConfig is the same sampler over its own schedule
        config = SamplerConfig(solver=solver, steps=9)
        levels = config.sigmas(exact)
        assert torch.equal(sample_latents(exact, latents, config), sampler(exact, latents * levels[0], levels))


def test_callback_sees_each_step():
    """StepInfo: the state and its denoised image at the noise level of each step; the images stay as they are."""
    exact, latents = Gaussian(), torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0)).double()
    sigmas = sigmas_karras(7)
    for sampler, options in (
        (sample_heun, {}),
        (sample_general, {"schedule": "vp", "scaling": "vp"}),
        (sample_dpmpp_2m, {}),
        (sample_unipc, {}),
    ):
        seen = []
        images = sampler(exact, latents * sigmas[0], sigmas, callback=seen.append, **options)
        assert torch.equal(images, sampler(exact, latents * sigmas[0], sigmas, **options))
        assert [(info.step, info.steps) for info in seen] == [(i, 7) for i in range(7)]
        assert [info.sigma for info in seen] == pytest.approx(sigmas[:-1])
        for info in seen:
            assert_relative("what a callback sees", info.denoised, exact(info.x, info.sigma))
        assert_relative("the last state a callback sees", seen[-1].denoised, images)
    churned = []
    sample_heun(exact, latents * sigmas[0], sigmas, churn=Churn(S_churn=2.0), callback=churned.append)
    assert all(info.sigma > sigma for info, sigma in zip(churned, sigmas, strict=False))


def test_the_plan_is_built_once_per_run(monkeypatch):
    denoiser, _ = golden_denoiser("ddpmpp-vp-skips")
    plans, callbacks = [], []
    plan = SamplerConfig.plan
    monkeypatch.setattr(SamplerConfig, "plan", lambda *arguments: plans.append(plan(*arguments)) or plans[-1])
    made = sample(denoiser, range(5), steps=3, batch=2, compile=False, callback=callbacks.append)
    assert len(plans) == 1
    assert plans[0].nfe == 5
    assert [info.step for info in callbacks] == [0, 1, 2] * 3
    own = sample(denoiser, range(5), batch=2, compile=False, sigmas=SamplerConfig(steps=3).sigmas(denoiser))
    assert torch.equal(own.images, made.images)


def test_schedules():
    """Against the formulas, in numbers that were computed by hand, and the network's own range and rounding."""
    assert sigmas_ve(3, 0.01, 1.0) == pytest.approx([1.0, 0.1, 0.01, 0.0])
    assert sigmas_karras(3, 1.0, 9.0, rho=2) == pytest.approx([9.0, 4.0, 1.0, 0.0])
    assert sigmas_logistic(3, 0.25, 4.0)[1] == pytest.approx(1.0)
    assert sigmas_vp(5)[0] == pytest.approx(math.sqrt(math.exp(19.9 / 2 + 0.1) - 1))
    levels = IDDPM(0.001, 0.008, 1000).levels
    assert set(sigmas_iddpm(20)[:-1]) <= set(levels)
    for low, high in ((0.002, 80.0), (0.02, 100.0)):
        betas = vp_betas(low, high)
        assert (vp_sigma(1e-3, *betas), vp_sigma(1.0, *betas)) == pytest.approx((low, high))

    class Coarse(Gaussian):
        sigma_min, sigma_max = 0.05, 40.0

        @staticmethod
        def round_sigma(sigma):
            return round(sigma * 2) / 2 or 0.5

    assert clip_range(Coarse(), 0.002, 80.0) == (0.05, 40.0)
    assert SamplerConfig(steps=3).sigmas(Coarse()) == [40.0, round(sigmas_karras(3, 0.05, 40.0)[1] * 2) / 2, 0.5, 0.0]
    with pytest.raises(InputError, match="steps is 40, more than the network has distinct noise levels"):
        SamplerConfig(solver="dpm++", steps=40).plan(Coarse())


def test_config_as_json():
    for config in (
        SamplerConfig(),
        SamplerConfig(solver="unipc", compile=False),
        SamplerConfig(S_churn=3.0, S_max=9.0),
        SamplerConfig(classes=(5, 2, 5)),
    ):
        values = config.to_json()
        assert SamplerConfig.from_json(json.loads(json.dumps(values, allow_nan=False))) == config
    with pytest.raises(InputError, match="sampler's configuration"):
        SamplerConfig.from_json({"solvers": "heun"})


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


def test_classes_without_images_are_drawn_again_and_other_images_stay():
    denoiser, tensors = golden_denoiser("ncsnpp-ve-cond")
    every = sample(denoiser, SEEDS, steps=3, compile=False)
    occupied = sorted(set(tensors["sample_class_index"].tolist()))[::2]
    some = sample(denoiser, SEEDS, steps=3, batch=3, compile=False, classes=tuple(occupied))
    kept = torch.isin(every.labels, torch.tensor(occupied))
    assert kept.any()
    assert not kept.all()
    assert set(some.labels.tolist()) <= set(occupied)
    assert torch.equal(some.labels[kept], every.labels[kept])
    assert (some.images[kept].int() - every.images[kept].int()).abs().max() <= 1
    # Those drawn again have the class of the second draw, from the latent that they had.
    second = sample(denoiser, SEEDS, labels=some.labels, steps=3, batch=3, compile=False)
    assert torch.equal(second.images, some.images)
    # Uniform over the occupied classes: each of 4 among 10 about 500 times in 2,000.
    counts = torch.bincount(SeededGenerators(range(2000)).randint_among(10, (1, 4, 5, 9)), minlength=10)
    assert counts[[0, 2, 3, 6, 7, 8]].sum() == 0
    assert (counts[[1, 4, 5, 9]] - 500).abs().max() < 90  # 4.6 standard deviations
    for classes, message in (((), "at least one"), ((3, 10), "0 … 9")):
        with pytest.raises(InputError, match=message):
            sample(denoiser, [5], classes=classes)
    with pytest.raises(InputError, match="class_index and classes"):
        SamplerConfig(class_index=1, classes=(1, 2))


def test_a_given_class_shifts_no_noise():
    """With churn, the images of class K are those that the seeds give when they draw K themselves."""
    denoiser, tensors = golden_denoiser("ncsnpp-ve-cond")
    churn = {"steps": 4, "S_churn": 4, "S_min": 0.05, "S_max": 50, "S_noise": 1.003}
    # By hand, in the order of the protocol: latent, class index, noise.
    latents, labels, generators = drawn(denoiser)
    by_hand = to_uint8(
        sample_latents(
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

    def run_plan(_plan, _denoiser, x, *, compiled, **_):
        used.append((compiled, len(x)))
        return x

    monkeypatch.setattr(batches, "run_plan", run_plan)
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
            sample_latents(denoiser, tensors["latents"], **arguments)
    with pytest.raises(InputError, match="schedule is 'cosine'"):
        sample_general(denoiser, tensors["latents"], [1.0, 0.0], schedule="cosine")
    for sigmas, message in (
        ([1.0], "at least two"),
        ([1.0, 2.0, 0.0], "decreasing"),
        ([1.0, 0.0, 0.0], "only the last may be 0"),
        ([math.nan, 0.0], "finite"),
        ([2.0, 1.0, -1.0], "positive"),
    ):
        with pytest.raises(InputError, match=message):
            sample_heun(denoiser, tensors["latents"], sigmas)
    with pytest.raises(InputError, match="equal"):
        sample_unipc(denoiser, tensors["latents"], [2.0, 1.0, 1.0, 0.0])
    with pytest.raises(InputError, match="steps given in addition"):
        sample(denoiser, [0], SamplerConfig(), steps=3)
    with pytest.raises(InputError, match="solver is 'rk45'"):
        sample(denoiser, [0], solver="rk45")
    with pytest.raises(InputError, match="unconditional"):
        sample(denoiser, [0], labels=1)
    with pytest.raises(InputError, match="none given"):
        sample(denoiser, [])
