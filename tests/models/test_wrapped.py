"""Models of one's own as denoisers: what is recognized, how they are called, what is said where they do not fit."""

import numpy as np
import pytest
import torch
from torch import nn

from diffmem.data import load_images
from diffmem.errors import InputError
from diffmem.evaluation import generate
from diffmem.models import Denoiser, as_denoiser, preset
from diffmem.sampling import SamplerConfig, sample

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = SamplerConfig(steps=4, compile="off", batch=8)


class Gaussian(nn.Module):
    """The denoiser of images that are all N(mean, 0.25), with a parameter, dropout, and a mean per class if need be."""

    channels, resolution, label_dim = 1, 8, 0

    def __init__(self, classes: int = 0, dropout: float = 0.0):
        super().__init__()
        self.label_dim = classes
        self.means = nn.Parameter(torch.linspace(-0.6, 0.6, max(classes, 1)))
        self.drop = nn.Dropout(dropout)

    def forward(self, x, sigma, class_labels=None):
        mean = self.means.mean() if class_labels is None else (class_labels @ self.means)[:, None, None, None]
        return self.drop(mean + (x - mean) * 0.25 / (0.25 + sigma**2))


class PerImage(Gaussian):
    """Wants a noise level and a class index per image, under other names, and passes on what it is told of itself."""

    def __init__(self):
        super().__init__(3)
        self.embed = nn.Embedding(3, 1)
        with torch.no_grad():
            self.embed.weight.copy_(self.means[:, None])

    def forward(self, x, sigma, labels):
        mean = self.embed(labels)[:, :, None, None]
        return mean + (x - mean) * (0.25 / (0.25 + sigma[:, None, None, None] ** 2))


def images(model, seeds=range(6), **arguments):
    return generate(model, seeds, sampler=QUICK, **arguments).samples


def test_a_module_is_sampled_as_the_same_denoiser_of_ours_is():
    """Against a plain object with the samplers' interface: float64 x and a 0-d sigma go in, as for our own."""
    model = Gaussian()

    class Plain:
        channels, resolution, label_dim = 1, 8, 0

        def parameters(self):
            return model.parameters()

        def __call__(self, x, sigma, labels=None):
            return model(x.float(), sigma.float())

    expected = sample(Plain(), range(6), steps=4, compile=False).images
    assert torch.equal(images(model).images, expected)
    assert torch.equal(sample(model, range(6), steps=4, compile=False).images, expected)
    assert torch.equal(images(nn.DataParallel(model)).images, expected)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(images(compiled).images, expected)
    bare = as_denoiser(lambda x, sigma: model(x, sigma), channels=1, resolution=8)
    assert torch.equal(images(bare).images, expected)
    assert "images 1x8x8, 1 parameters, unconditional" in as_denoiser(model).summary()


def test_sigma_and_labels_come_in_the_form_that_the_model_takes():
    one_hot, per_image = images(Gaussian(3)), images(PerImage())
    assert torch.equal(one_hot.labels, per_image.labels)
    assert torch.equal(one_hot.images, per_image.images)
    chosen = generate(PerImage(), range(4), sampler=SamplerConfig(steps=4, compile="off", class_index=2)).samples
    assert chosen.labels.tolist() == [2] * 4
    with pytest.raises(InputError, match=r"PerImage: cannot be called as model\(x, sigma, class_labels\)"):
        as_denoiser(PerImage(), sigma_per_image=False)


def test_modes_and_precisions():
    model = Gaussian(dropout=0.5)
    model.drop.eval()
    model.drop.training = True
    assert torch.equal(images(model).images, images(Gaussian()).images)  # no dropout while it samples
    assert model.training
    assert model.drop.training
    for own in (Denoiser(preset("ddpmpp_8", channels=1, model_channels=8)).train(), Gaussian(dropout=0.5)):
        assert torch.equal(images(own).images, images(own).images)
        assert own.training
    # Inputs are rounded to half precision at all noise levels: coarse, but the same images.
    half = images(Gaussian().half()).images.int()
    assert (half - images(Gaussian()).images.int()).abs().double().mean() < 4
    assert images(Gaussian().bfloat16()).images.double().std() > 20
    double = images(Gaussian().double())
    assert (double.images.int() - images(Gaussian()).images.int()).abs().max() <= 1


def test_a_model_is_audited_resumed_and_told_apart(tmp_path):
    digits = load_images("builtin:digits", limit=50)
    pixels = torch.from_numpy(digits.images).double() / 127.5 - 1

    class Copies(nn.Module):
        img_channels, img_resolution = 1, 8  # EDM's names

        def __init__(self):
            super().__init__()
            self.register_buffer("pixels", pixels)

        def forward(self, x, sigma, class_labels=None):
            weights = (-(torch.cdist(x.flatten(1), self.pixels.flatten(1)) ** 2) / (2 * sigma**2)).softmax(dim=1)
            return (weights @ self.pixels.flatten(1)).reshape(x.shape)

    result = generate(Copies(), range(16), training=digits, out=tmp_path / "copies.npz", sampler=QUICK)
    assert result.audit.ratio == 1.0
    assert np.load(tmp_path / "copies.npz")["images"].shape == (16, 1, 8, 8)
    assert as_denoiser(Gaussian()).fingerprint == as_denoiser(Gaussian()).fingerprint
    other = Gaussian()
    nn.init.constant_(other.means, 0.5)
    assert as_denoiser(other).fingerprint != as_denoiser(Gaussian()).fingerprint
    assert as_denoiser(Gaussian().bfloat16()).fingerprint != as_denoiser(Gaussian()).fingerprint
    bare = [as_denoiser(lambda x, sigma: x, channels=1, resolution=8) for _ in range(2)]
    assert bare[0].fingerprint != bare[1].fingerprint == bare[1].fingerprint
    named = as_denoiser(lambda x, sigma: x, channels=1, resolution=8, fingerprint="identity")
    assert named.fingerprint == "identity"


class Sized(nn.Module):
    channels, resolution = 1, 8

    def __init__(self, answer, **attributes):
        super().__init__()
        self.answer = answer
        vars(self).update(attributes)

    def forward(self, x, sigma):
        return self.answer(x)


class Unlabeled(Gaussian):
    """Needs class labels, and does not say how many classes there are."""

    label_dim = 0

    def forward(self, x, sigma, class_labels):
        return x * class_labels


class Keywords(Gaussian):
    """Takes labels among other keywords."""

    def forward(self, x, sigma, **options):
        return super().forward(x, sigma, options["class_labels"])


def test_labels_are_passed_among_keywords():
    assert torch.equal(images(Keywords(3)).images, images(Gaussian(3)).images)


def broken(x):
    raise KeyError("weights")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Conv2d(1, 1, 1), "Conv2d: does not say its channels: give it an attribute `channels`, or call"),
        (lambda x, sigma: x, "does not say its channels"),
        (Sized(lambda x: x[:, :, :4]), r"returns \(2, 1, 4, 8\) for noisy images \(2, 1, 8, 8\)"),
        (Sized(lambda x: (x,)), "returns a tuple, but must return the denoised images, a tensor: give a function"),
        (Sized(broken), "KeyError: 'weights'"),
        (Sized(lambda x: x[:1].expand(2, 1, 8, 8)), r"returns \(2, 1, 8, 8\) for noisy images \(3, 1, 8, 8\)"),
        (Sized(lambda x: x.reshape(2, 1, 8, 8)), r"Sized: fails on images \(3, 1, 8, 8\) at sigma 80 \(RuntimeError"),
        (Sized(lambda x: x + 1j), "returns torch.complex64, but must return denoised images as floats"),
        (Sized(lambda x: x > 0), "returns torch.bool"),
        (Sized(lambda x: x, resolution=(8, 8)), r"resolution is \[8, 8\], but must be a whole number from 1 to 65,536"),
        (Sized(lambda x: x, resolution=True), "resolution is True"),
        (Sized(lambda x: x, resolution=10**7), "resolution is 10000000"),
        (Sized(lambda x: x, label_dim=-1), "label_dim is -1"),
        (Sized(lambda x: x, sigma_min=float("nan")), "sigma_min is nan, but must be a noise level"),
        (Sized(lambda x: x, round_sigma=3), "round_sigma is 3, but must be a function"),
        (Sized(lambda x: x, round_sigma=lambda sigma: 1 / 0), r"fails in round_sigma\(80\) \(ZeroDivisionError"),
        (Gaussian().to("meta"), "Gaussian: has no weights yet"),
        (Unlabeled(), "needs labels must state its number of classes: label_dim=…"),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(model, words):
    with pytest.raises(InputError, match=words) as refusal:
        generate(model, range(3), sampler=QUICK)
    assert "\n" not in str(refusal.value)


def test_a_range_of_noise_levels_and_rounding_are_the_models():
    class Discrete(Gaussian):
        sigma_min, sigma_max = 0.1, 10.0
        seen: list = []  # noqa: RUF012

        def round_sigma(self, sigma):
            return torch.as_tensor(sigma).mul(4).round().clamp(min=1).div(4)

        def forward(self, x, sigma, class_labels=None):
            self.seen.append(sigma.item())
            return super().forward(x, sigma)

    images(Discrete())
    assert all(level * 4 == round(level * 4) for level in Discrete.seen)
    assert max(Discrete.seen) == 10.0
