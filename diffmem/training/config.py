"""Everything that decides the result of a training run, as one frozen dataclass that JSON can hold."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from diffmem.errors import InputError
from diffmem.models import DenoiserConfig, ModuleConfig
from diffmem.precision import TRAINING_PRECISIONS
from diffmem.training.augmentation import LABELS
from diffmem.training.ema import EMA
from diffmem.training.losses import check_tikhonov, check_trainable

OPTIMIZERS = ("adam", "adamw", "sgd")
EPOCHS_PER_DURATION = 20


def images_of(
    size: int, *, images: int | None = None, epochs: float | None = None, duration: float | None = None
) -> int:
    """The length of a run in images seen, from exactly one of images, epochs and duration.

    Args:
        size: N, images of the training set.
        images: Images seen.
        epochs: Epochs of `size` images.
        duration: In the paper's unit of 20 epochs (Gu et al., arXiv 2310.02664).

    Raises:
        InputError: None is given, or several, or a length of nothing.

    Example:
        >>> images_of(1000, duration=2000)
        40000000
    """
    asked = {"images": images, "epochs": epochs, "duration": duration}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise InputError("the length of training: give exactly one of images=…, epochs=… and duration=…")
    ((name, value),) = given.items()
    factor = {"images": 1, "epochs": size, "duration": EPOCHS_PER_DURATION * size}[name]
    if not (math.isfinite(value) and value * factor >= 1):
        raise InputError(f"{name} is {value}, but must be large enough to train on at least one image")
    return math.ceil(value * factor)


@dataclass(frozen=True)
class TrainingConfig:
    """What decides the result of a run; the defaults are the reference protocol's (Gu et al., arXiv 2310.02664).

    Attributes:
        denoiser: Network and preconditioning; the latter decides the loss. Of a network of your own, the `config` of
            `as_denoiser(model, …)`.
        images: Length of the run, images seen (see `images_of`); the last step may see a few more.
        batch: Images per step, over all processes.
        seed: Seed of the initial weights, the order of the data, the noise, dropout and augmentation.
        optimizer: "adam", "adamw" or "sgd".
        lr: Learning rate after warm-up.
        betas: Betas of Adam and AdamW.
        eps: Epsilon of Adam and AdamW.
        momentum: Momentum of SGD.
        weight_decay: L2 penalty of Adam and SGD, decoupled for AdamW.
        warmup_epochs: Epochs in which the learning rate grows linearly from 0 (counted in whole thousands of images).
        ema: The rule of the EMA weights, and the protocol of its half-life.
        window: Share of the training set over which the order mixes; 0: the same order every epoch.
        xflip: The mirrored images count as images too: the training set is twice as large.
        augment: Probability of EDM's non-leaking augmentations; the network's augment_dim must be 9; 0: none.
        tikhonov: Weight of the score's Tikhonov regularization.
        precision: Precision of the network's products: "ieee" (the protocol's), "tf32" or "bf16", see
            `diffmem.precision`.

    Raises:
        InputError: A value that makes no sense; the message names the field.

    Example:
        >>> from diffmem.models import preset
        >>> config = TrainingConfig(preset("ddpmpp_8", channels=1), images=10_000, batch=64)
        >>> TrainingConfig.from_json(config.to_json()) == config
        True
    """

    denoiser: DenoiserConfig
    images: int
    batch: int = 512
    seed: int = 0
    optimizer: str = "adam"
    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0
    weight_decay: float = 0.0
    warmup_epochs: float = 200.0
    ema: EMA = field(default_factory=EMA)
    window: float = 0.0
    xflip: bool = False
    augment: float = 0.0
    tikhonov: float = 0.0
    precision: str = "ieee"

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        check_trainable(self.denoiser.preconditioning)
        check_tikhonov(self.tikhonov)
        for name, low in (("images", 1), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            _check(isinstance(value, int) and value >= low, name, value, f"a whole number of at least {low}")
        for name in ("lr", "eps", "momentum", "weight_decay", "warmup_epochs"):
            value = getattr(self, name)
            _check(math.isfinite(value) and value >= 0, name, value, "a finite number of at least 0")
        for name in ("window", "augment"):
            value = getattr(self, name)
            _check(0 <= value <= 1, name, value, "a share in 0 … 1")
        _check(self.optimizer in OPTIMIZERS, "optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}")
        names = ", ".join(TRAINING_PRECISIONS)
        _check(self.precision in TRAINING_PRECISIONS, "precision", self.precision, f"one of {names}")
        _check(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", self.betas, "two numbers below 1")
        own = isinstance(self.denoiser.network, ModuleConfig)
        _check(not (own and self.augment), "augment", self.augment, "0 for a network of your own")
        dim, wanted = self.denoiser.network.augment_dim, LABELS if self.augment else 0
        _check(dim == wanted, "augment_dim", dim, f"{wanted} where augment is {self.augment:g}")

    def learning_rate(self, images_seen: int, size: int) -> float:
        """The rate of the step that follows `images_seen`, on a training set of `size` images."""
        warmup = math.floor(self.warmup_epochs * size / 1000) * 1000
        return self.lr * (min(images_seen / warmup, 1.0) if warmup else 1.0)

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return values | {
            "denoiser": self.denoiser.to_json(),
            "ema": dataclasses.asdict(self.ema),
            "betas": list(self.betas),
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> TrainingConfig:
        """The configuration that `to_json` gave; raises InputError for what is none."""
        try:
            parts = {"denoiser": DenoiserConfig.from_json(values["denoiser"]), "ema": EMA(**values["ema"])}
            return TrainingConfig(**{**values, **parts})
        except (TypeError, KeyError) as error:
            raise InputError(
                f"a training configuration: a field is missing, unknown or of the wrong type ({error})"
            ) from None


def differences(ours: Any, theirs: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """The fields in which two JSON objects differ: (dotted name, our value, theirs).

    Args:
        ours: An object of dicts, lists and plain values.
        theirs: Another.
        name: Put before the names.

    Example:
        >>> differences({"a": {"b": 1}}, {"a": {"b": 2}})
        [('a.b', 1, 2)]
    """
    if isinstance(ours, dict) and isinstance(theirs, dict):
        found = []
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            found += differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
        return found
    return [] if ours == theirs else [(name, ours, theirs)]


def _check(condition: bool, field: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{field} is {value!r}, but must be {wanted}")
