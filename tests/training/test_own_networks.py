"""Networks of one's own in training: the same step as by hand, exact resume, checkpoints, refusals."""

import copy
import dataclasses

import pytest
import torch
from click.testing import CliRunner
from numerics import assert_close
from safetensors.torch import load_file
from test_training_loop import same
from torch import nn

from diffmem.cli import cli
from diffmem.data import DatasetSpec, load_images
from diffmem.errors import InputError
from diffmem.evaluation import AuditEvery, generate, trajectory
from diffmem.models import EDM, VE, VP, Denoiser, DenoiserConfig, ModuleConfig, as_denoiser, load, save
from diffmem.sampling import SamplerConfig
from diffmem.training import EMA, Callback, RunFolder, TrainingConfig, denoising_loss, plan_training, train
from diffmem.training.losses import draw
from diffmem.training.seeds import seed_of

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = SamplerConfig(steps=3, compile="off", batch=8)


class Net(nn.Module):
    """A network with what one may have: norm with running means, dropout, a tied and a frozen weight, classes."""

    channels, resolution = 1, 8

    def __init__(self, label_dim: int = 10):
        super().__init__()
        self.label_dim = label_dim
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner, self.again = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.again.weight = self.inner.weight
        self.level, self.classes = nn.Linear(1, 6), nn.Linear(max(label_dim, 1), 6)
        self.drop = nn.Dropout(0.2)
        self.last = nn.Conv2d(6, 1, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(3, 6)[:, ::2].t(), requires_grad=True)  # with gaps in memory
        self.fixed = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x, noise, class_labels=None):
        h = self.norm(self.first(x)) + self.level(noise[:, None])[:, :, None, None]
        if self.label_dim:
            h = h + self.classes(class_labels)[:, :, None, None]
        h = self.again(nn.functional.silu(self.inner(h))) * self.scale.sum()
        return self.last(self.drop(h)) * self.fixed


class Direct(Net):
    """The same as a denoiser by itself."""

    def forward(self, x, sigma, class_labels=None):
        return super().forward(x, sigma.log(), class_labels)


@pytest.fixture(scope="module")
def digits():
    return load_images("builtin:digits").select(slice(0, 24))


def wrapped(kind=Net, preconditioning=None, **options):
    torch.manual_seed(0)
    if kind is Net and preconditioning is None:
        preconditioning = EDM()
    return as_denoiser(kind(), preconditioning=preconditioning, **options)


def configured(denoiser, steps=4, **changes) -> TrainingConfig:
    values = {"images": steps * 8, "batch": 8, "lr": 1e-2, "warmup_epochs": 0, "ema": EMA("target", target=0.5)}
    return TrainingConfig(denoiser.config, **{**values, **changes})


@pytest.mark.parametrize("kind", [Net, Direct])
def test_one_step_is_the_step_by_hand(kind, digits, tmp_path):
    """A whole batch, SGD: the weights move against the gradient of the loss; the buffers as the module moves them."""
    denoiser = wrapped(kind, sigma_per_image=True)
    before = copy.deepcopy(denoiser.model.state_dict())
    config = configured(denoiser, steps=1, batch=24, images=24, optimizer="sgd", lr=0.1)
    train(config, digits, tmp_path / "run", device="cpu", model=denoiser)
    assert same(denoiser.model.state_dict(), before)  # a copy was trained
    assert all(parameter.grad is None for parameter in denoiser.parameters())

    by_hand = copy.deepcopy(denoiser).train()
    order = load_file(tmp_path / "run" / "state" / "000000024" / "state.safetensors")["order"]
    images = torch.from_numpy(digits.images[order]) / 127.5 - 1
    labels = torch.from_numpy(digits.labels[order])
    generator = torch.Generator().manual_seed(seed_of(0, "noise", 0))
    draws = draw(EDM(), images.shape, "cpu", generator)
    torch.manual_seed(seed_of(0, "dropout", 0, 0))
    loss = denoising_loss(by_hand, images, EDM(), labels, draws=draws).sum(dim=(1, 2, 3))
    (loss.sum() / 24).backward()
    found = load(tmp_path / "run", model=denoiser).model.state_dict()
    share = EMA("target", target=0.5).beta(0, 24, 24)
    moved = 0
    for name, parameter in by_hand.model.named_parameters():
        step = 0 if parameter.grad is None else -0.1 * parameter.grad * (1 - share)
        assert_close("weights after a step by hand", found[name], parameter.detach() + step)
        moved += bool((found[name] != before[name]).any())
    assert moved >= 8
    assert torch.equal(found["fixed"], before["fixed"])
    for name, buffer in by_hand.model.named_buffers():
        assert torch.equal(found[name], buffer), name
        assert not torch.equal(buffer, before[name])
    assert found["scale"].shape == (3, 3)


@pytest.mark.parametrize("kind", [Net, Direct])
def test_interrupted_and_continued_to_the_same_bits(kind, digits, tmp_path):
    """From a module and from what makes one; sampled, audited and told of on the way."""
    denoiser = wrapped(kind, sigma_per_image=True)
    seen = []

    class Watch(Callback):
        def on_snapshot(self, snapshot):
            seen.append(generate(snapshot.denoiser, range(4), sampler=QUICK).samples.images)

    spec = DatasetSpec("builtin:digits", limit=24)
    config = configured(denoiser, window=0.5, xflip=True)
    for model in (denoiser, kind):
        straight, broken = tmp_path / f"{len(seen)} straight", tmp_path / f"{len(seen)} broken"
        audit = AuditEvery(digits, straight, every=16, samples=8, sampler=QUICK, device="cpu")
        run = train(
            config, spec, straight, device="cpu", model=model, snapshot_images=16, batch_gpu=4,
            callbacks=[Watch(), audit],
        )  # fmt: skip
        train(dataclasses.replace(config, images=16), spec, broken, device="cpu", model=model, batch_gpu=4)
        train(config, spec, broken, device="cpu", model=model, batch_gpu=4, resume=True)
        ends = [load_file(out / "snapshots" / "000000032" / "model.safetensors") for out in (straight, broken)]
        assert same(*ends)
        assert "again.weight" in ends[0]
        assert [record.images for record in run.snapshots] == [16, 32]
        trained = load(straight, model=model)
        assert not trained.training
        assert torch.equal(generate(trained, range(4), sampler=QUICK).samples.images, seen[-1])
        plain = kind()
        plain.load_state_dict(ends[0])  # under its own names
    audited = trajectory(straight, seeds=range(8), sampler=QUICK, model=kind, device="cpu")
    assert [point.images for point in audited.points] == [16, 32]
    with pytest.raises(InputError, match="a network of your own"):
        trajectory(straight, seeds=range(8), sampler=QUICK, device="cpu")
    told = CliRunner().invoke(cli, ["info", str(straight)], catch_exceptions=False).output
    assert f"{kind.__name__}, your own network" in told
    folder = RunFolder.open(straight)
    assert folder.config == config
    assert folder.training_images().fingerprint == digits.fingerprint
    assert not torch.equal(seen[1], seen[3])  # another start: the factory's, by the run's seed


def test_a_denoiser_of_ours_is_trained_further(digits, tmp_path):
    from test_training_loop import tiny

    config = tiny(1, lr=0.0)
    start = Denoiser(config.denoiser)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.add_(1.0)
    train(config, digits, tmp_path / "run", device="cpu", compile=False, model=start)
    assert same(load(tmp_path / "run").state_dict(), start.state_dict())


def test_a_checkpoint_of_the_weights_and_back(tmp_path):
    for kind, preconditioning in ((Net, EDM(0.4)), (Net, VP()), (Net, VE()), (Direct, None)):
        denoiser = wrapped(kind, preconditioning, sigma_per_image=True).eval()
        stored = save(denoiser, tmp_path / "net")
        other = kind()
        found = load(stored, model=other)
        assert found.config == denoiser.config
        assert DenoiserConfig.from_json(denoiser.config.to_json()) == denoiser.config
        assert found.fingerprint == denoiser.fingerprint
        x, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
        assert torch.equal(found(x, 2.0, labels), denoiser(x, 2.0, labels))
        assert found.model is not other
    with pytest.raises(InputError, match=r"holds the weights of Direct, a network of your own.* as model"):
        load(stored)
    with pytest.raises(InputError, match=r"model is Net with .* but must be Direct"):
        load(stored, model=Net())
    with pytest.raises(InputError, match="model is a Tensor, but must be a module"):
        load(stored, model=lambda: torch.zeros(3))
    with pytest.raises(InputError, match="is a function, which cannot be stored"):
        save(as_denoiser(lambda x, sigma: x, channels=1, resolution=8), tmp_path / "function")
    ours = Denoiser(TrainingConfig(DenoiserConfig.from_json(CONFIG), images=1).denoiser)
    with pytest.raises(InputError, match="holds a network of diffmem"):
        load(save(ours, tmp_path / "ours"), model=Net())


CONFIG = {
    "network": {"type": "unet", "resolution": 8, "channels": 1, "model_channels": 4, "channel_mult": [1],
                "num_blocks": 1},
    "preconditioning": {"type": "edm"},
}  # fmt: skip


def test_preconditioning_around_a_network():
    """c_skip·x + c_out·F(c_in·x; c_noise), in formulas of the paper (EDM's Table 1)."""
    network = Net().eval()
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.5, 1.0, 7.0])
    labels = torch.eye(10)[:3]
    d = 0.3
    s = sigma[:, None, None, None]
    inside = network(x / (s**2 + d**2).sqrt(), sigma.log() / 4, labels)
    expected = d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * inside
    denoiser = as_denoiser(network, preconditioning=EDM(d))
    torch.testing.assert_close(denoiser(x, sigma, labels), expected)
    torch.testing.assert_close(denoiser(x, 1.0, labels)[1], expected[1])
    assert (denoiser.sigma_min, denoiser.sigma_max) == (0, float("inf"))
    assert as_denoiser(network, preconditioning=VE()).sigma_max == 100
    assert "EDM preconditioning" in denoiser.summary()


class Frozen(Net):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


def test_what_does_not_fit_is_one_line(digits, tmp_path):
    denoiser = wrapped()
    config = configured(denoiser)
    ours = dataclasses.replace(config, denoiser=DenoiserConfig.from_json(CONFIG))
    half = as_denoiser(Net().double(), preconditioning=EDM())
    for model, settings, words in (
        (None, config, "is of Net, a network of your own: pass it as model"),
        (Net(), ours, r"model is a Net, but the configuration's denoiser is one of diffmem's"),
        (Direct, config, r"model is Direct with .* but must be Net with"),
        (wrapped(Direct), config, r"model is Direct.*, but the configuration's denoiser is another"),
        (Denoiser(ours.denoiser), config, "the configuration's denoiser is another"),
        (3, config, "model is a int, but must be a module"),
        (half, configured(half), "is of torch.float64, but training keeps weights in float32"),
        (Frozen, configured(as_denoiser(Frozen(), preconditioning=EDM())), "there is nothing to train"),
    ):
        with pytest.raises(InputError, match=words):
            train(settings, digits, tmp_path / "run", device="cpu", model=model)
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(InputError, match=r"augment is 0\.5, but must be 0 for a network of your own"):
        configured(denoiser, augment=0.5)
    with pytest.raises(InputError, match=r"preconditioning is .*, but must be VP\(\), VE\(\) or EDM\(\)"):
        as_denoiser(Net(), preconditioning="edm")
    with pytest.raises(InputError, match="no labels, but the network has label_dim 10"):
        train(config, load_images(digits.images), tmp_path / "run", device="cpu", model=denoiser)
    for field, value in (("name", 3), ("sigma_min", -1), ("preconditioned", "yes"), ("parameters", -1)):
        with pytest.raises(InputError, match=f"{field} is {value!r}, but must be"):
            ModuleConfig(**{"name": "Net", "resolution": 8, "channels": 1, field: value})
    plan = plan_training(config, digits, device="cpu", model=denoiser)
    assert (plan.compiled, plan.graphed) == (False, False)
    train(config, digits, tmp_path / "run", device="cpu", model=denoiser)
    other = configured(wrapped(preconditioning=VP()))
    with pytest.raises(InputError, match=r"other settings: .*preconditioning"):
        train(other, digits, tmp_path / "run", device="cpu", model=Net, resume=True)
