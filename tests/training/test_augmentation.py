"""Augmentations: exact where they can be, labeled as the paper labels them, and moving pixels where they say."""

import math

import torch

from diffmem.training.augmentation import augment, augmentation_labels, draw_augmentation


def actions(**values) -> torch.Tensor:
    names = ("xflip", "yflip", "scaling", "rotation", "along", "stretch", "x", "y")
    return torch.tensor([[values.get(name, 0.0) for name in names]], dtype=torch.float64)


def blob(size: int = 32) -> torch.Tensor:
    """A smooth spot right of and above the center, (1, 1, size, size)."""
    at = (torch.arange(size) + 0.5) / size * 2 - 1
    x, y = at[None, :], at[:, None]
    return (2 * torch.exp(-((x - 0.4) ** 2 + (y + 0.2) ** 2) / 0.05) - 1)[None, None]


def center(image: torch.Tensor) -> tuple[float, float]:
    size = image.shape[-1]
    at = (torch.arange(size) + 0.5) / size * 2 - 1
    mass = image[0, 0] + 1
    return ((mass.sum(0) * at).sum() / mass.sum()).item(), ((mass.sum(1) * at).sum() / mass.sum()).item()


def test_nothing_and_mirrorings_are_exact():
    x = torch.randn(1, 3, 8, 8).clamp(-1, 1)
    assert torch.equal(augment(x, actions()), x)
    assert torch.equal(augment(x, actions(xflip=1.0)), x.flip(3))
    assert torch.equal(augment(x, actions(xflip=1.0, yflip=1.0)), x.flip(2, 3))
    mixed = torch.cat([actions(xflip=1.0), actions(rotation=0.3)])
    assert torch.equal(augment(x.expand(2, -1, -1, -1), mixed)[:1], x.flip(3))


def test_the_spot_goes_where_it_is_sent():
    def near(place, wanted):
        assert math.dist(place, wanted) < 0.03, (place, wanted)

    near(center(blob()), (0.4, -0.2))
    near(center(augment(blob(), actions(x=1.0))), (0.4 + 0.25, -0.2))
    near(center(augment(blob(), actions(y=-1.0))), (0.4, -0.2 - 0.25))
    near(center(augment(blob(), actions(rotation=math.pi / 2))), (-0.2, -0.4))
    near(center(augment(blob(), actions(scaling=1.5))), (0.4 * 2**0.3, -0.2 * 2**0.3))
    near(center(augment(blob(), actions(stretch=1.5))), (0.4 * 2**0.3, -0.2 / 2**0.3))
    near(center(augment(blob(), actions(stretch=1.5, along=math.pi / 2))), (0.4 / 2**0.3, -0.2 * 2**0.3))


def test_labels_are_those_of_the_paper():
    drawn = draw_augmentation(2000, 0.12, torch.Generator().manual_seed(0))
    labels = augmentation_labels(drawn)
    assert labels.shape == (2000, 9)
    assert torch.equal(augmentation_labels(actions()), torch.zeros(1, 9))
    share = (labels != 0).double().mean(dim=0)
    # Mirroring along x is always drawn, as a fair coin; everything else with the given probability.
    expected = torch.tensor([0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12, 0.12])
    assert (share - expected).abs().max() < 0.035
    turned = augmentation_labels(actions(rotation=0.3, along=0.4, stretch=2.0))
    wanted = [0, 0, 0, math.cos(0.3) - 1, math.sin(0.3), 2 * math.cos(0.4), 2 * math.sin(0.4), 0, 0]
    torch.testing.assert_close(turned, torch.tensor([wanted]))
    assert not draw_augmentation(100, 0.0)[:, 1:].any()
