"""Networks with the training settings that go with them: the reference protocol's, and two that a CPU can train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffmem.errors import InputError
from diffmem.models import PRESETS


@dataclass(frozen=True)
class TrainingPreset:
    """A network and its training by name.

    Attributes:
        description: In words.
        network: Arguments of `denoiser_config`.
        training: Fields of `TrainingConfig` (`ema` as those of `EMA`).
    """

    description: str
    network: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


PROTOCOL = "protocol"
TRAINING_PRESETS: dict[str, TrainingPreset] = {
    PROTOCOL: TrainingPreset("the reference protocol's network (Gu et al., arXiv 2310.02664)"),
    # The studies' digits scale: it learns 20 digits by heart in 64,000 images.
    "small_8": TrainingPreset(
        "a network of 16 channels for images up to 12x12, trained in batches of 64",
        {"precond": "edm", "model_channels": 16, "channel_mult": (1, 1), "num_blocks": 1, "dropout": 0.0},
        {"batch": 64, "lr": 3e-3, "warmup_epochs": 20.0, "ema": {"rule": "target", "target": 0.99}},
    ),
    "small_16": TrainingPreset(
        "a network of 32 channels for images up to 24x24, trained in batches of 64",
        {"precond": "edm", "model_channels": 32, "channel_mult": (1, 2), "num_blocks": 1, "dropout": 0.0},
        {"batch": 64, "lr": 1e-3, "warmup_epochs": 20.0, "ema": {"rule": "target", "target": 0.99}},
    ),
}


def fitting_preset(resolution: int) -> str:
    """The name of the training preset for images of that size: small ones need no network of 35 million parameters.

    Args:
        resolution: Height and width, in pixels.

    Example:
        >>> fitting_preset(8), fitting_preset(16), fitting_preset(32)
        ('small_8', 'small_16', 'protocol')
    """
    if resolution <= 12:
        return "small_8"
    return "small_16" if resolution <= 24 else PROTOCOL


def training_preset(name: str) -> TrainingPreset:
    """The preset of that name, or the network of one of `diffmem.models.PRESETS` with the protocol's training.

    Args:
        name: "protocol", "small_16", "small_8", or a key of `PRESETS`.

    Raises:
        InputError: There is none of that name.
    """
    if name in TRAINING_PRESETS:
        return TRAINING_PRESETS[name]
    if name in PRESETS:
        return TrainingPreset("the network of that name, trained by the reference protocol", {"preset_name": name})
    raise InputError(f"no preset {name!r}; choose from {', '.join([*TRAINING_PRESETS, *PRESETS])}")
