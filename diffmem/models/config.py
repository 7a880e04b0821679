"""What a denoiser is made of: frozen dataclasses for its network and preconditioning, JSON and back, and the presets.

A configuration decides every parameter's name and shape; a checkpoint stores it beside the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from diffmem.errors import InputError
from diffmem.models.preconditioning import EDM, IDDPM, VE, VP, Preconditioning

EMBEDDINGS = ("positional", "fourier")
ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")


def _check(condition: bool, field: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{field} is {value!r}, but must be {wanted}")


def _check_shared(config: UNetConfig | ADMConfig) -> None:
    """The fields both networks have, sequences made tuples (JSON brings lists)."""
    for name in ("channel_mult", "attn_resolutions"):
        object.__setattr__(config, name, tuple(getattr(config, name)))
    for name in ("channels", "model_channels", "channel_mult_emb", "num_blocks"):
        value = getattr(config, name)
        _check(isinstance(value, int) and value >= 1, name, value, "a positive whole number")
    for name in ("label_dim", "augment_dim"):
        value = getattr(config, name)
        _check(isinstance(value, int) and value >= 0, name, value, "a whole number, 0 for none")
    _check(
        len(config.channel_mult) > 0 and all(isinstance(m, int) and m >= 1 for m in config.channel_mult),
        "channel_mult",
        config.channel_mult,
        "positive whole numbers, one per resolution",
    )
    factor = 2 ** (len(config.channel_mult) - 1)
    _check(
        isinstance(config.resolution, int) and config.resolution >= factor and config.resolution % factor == 0,
        "resolution",
        config.resolution,
        f"a multiple of {factor} (it is halved {len(config.channel_mult) - 1} times)",
    )
    _check(0 <= config.dropout < 1, "dropout", config.dropout, "a probability below 1")


@dataclass(frozen=True)
class UNetConfig:
    """A network of the DDPM++ / NCSN++ family (Song et al., arXiv 2011.13456, as parametrized in EDM, arXiv
    2206.00364).

    resolution      height and width of the images, pixels
    channels        colour channels of the images
    label_dim       number of classes, or length of label vectors; 0: unconditional
    augment_dim     length of augmentation label vectors; 0: none
    model_channels  width: channels at multiplier 1
    channel_mult    width multiplier per resolution, from full resolution down
    channel_mult_emb, channel_mult_noise   width multipliers of the conditioning vector and of the noise embedding
    num_blocks      residual blocks per resolution
    attn_resolutions   resolutions with self-attention
    dropout         probability, in every block
    embedding       "positional" (DDPM++) or "fourier" (NCSN++)
    encoder         "standard" (DDPM++), "skip" or "residual" (NCSN++)
    decoder         "standard" or "skip"
    resample_filter   taps of the separable resampling filter: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++
    skip_connections  one switch per connection from the encoder to the decoder, in the encoder's order (full resolution
                    first, num_blocks + 1 per resolution); a disabled one feeds zeros. None: all enabled
    """

    resolution: int = 32
    channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 128
    channel_mult: tuple[int, ...] = (2, 2, 2)
    channel_mult_emb: int = 4
    channel_mult_noise: int = 1
    num_blocks: int = 4
    attn_resolutions: tuple[int, ...] = (16,)
    dropout: float = 0.1
    embedding: str = "positional"
    encoder: str = "standard"
    decoder: str = "standard"
    resample_filter: tuple[int, ...] = (1, 1)
    skip_connections: tuple[bool, ...] | None = None

    def __post_init__(self):
        _check_shared(self)
        _check(
            isinstance(self.channel_mult_noise, int) and self.channel_mult_noise >= 1,
            "channel_mult_noise",
            self.channel_mult_noise,
            "a positive whole number",
        )
        width = self.model_channels * self.channel_mult_noise
        _check(width % 2 == 0, "model_channels", self.model_channels, "even (the noise embedding has two halves)")
        _check(self.embedding in EMBEDDINGS, "embedding", self.embedding, f"one of {', '.join(EMBEDDINGS)}")
        _check(self.encoder in ENCODERS, "encoder", self.encoder, f"one of {', '.join(ENCODERS)}")
        _check(self.decoder in DECODERS, "decoder", self.decoder, f"one of {', '.join(DECODERS)}")
        object.__setattr__(self, "resample_filter", tuple(self.resample_filter))
        taps = self.resample_filter
        _check(
            len(taps) > 0 and len(taps) % 2 == 0 and sum(taps) > 0, "resample_filter", taps, "an even number of taps"
        )
        if self.skip_connections is not None:
            mask = tuple(bool(enabled) for enabled in self.skip_connections)
            count = len(self.channel_mult) * (self.num_blocks + 1)
            _check(len(mask) == count, "skip_connections", mask, f"{count} switches")
            # One spelling for one network: a mask of ones is no mask.
            object.__setattr__(self, "skip_connections", None if all(mask) else mask)


@dataclass(frozen=True)
class ADMConfig:
    """A network of the ADM family (Dhariwal and Nichol, arXiv 2105.05233, as in EDM). Fields as in UNetConfig."""

    resolution: int = 64
    channels: int = 3
    label_dim: int = 0
    augment_dim: int = 0
    model_channels: int = 192
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    channel_mult_emb: int = 4
    num_blocks: int = 3
    attn_resolutions: tuple[int, ...] = (32, 16, 8)
    dropout: float = 0.1

    def __post_init__(self):
        _check_shared(self)
        _check(self.model_channels % 2 == 0, "model_channels", self.model_channels, "even")


@dataclass(frozen=True)
class DenoiserConfig:
    """A network and the preconditioning around it."""

    network: UNetConfig | ADMConfig
    preconditioning: Preconditioning

    def __post_init__(self):
        for name, value in dataclasses.asdict(self.preconditioning).items():
            _check(isinstance(value, int | float) and not math.isnan(value), name, value, "a number")

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values, each part with its `type`."""
        return {
            "network": {"type": _NETWORK_NAMES[type(self.network)], **dataclasses.asdict(self.network)},
            "preconditioning": {
                "type": _PRECONDITIONING_NAMES[type(self.preconditioning)],
                # JSON has no infinity.
                **{
                    name: "inf" if value == math.inf else value
                    for name, value in dataclasses.asdict(self.preconditioning).items()
                },
            },
        }

    @staticmethod
    def from_json(values: Any) -> DenoiserConfig:
        """The configuration that `to_json` gave; raises InputError that names an unknown or missing field."""
        if not isinstance(values, dict) or set(values) != {"network", "preconditioning"}:
            raise InputError("a denoiser's configuration has exactly the parts network and preconditioning")
        return DenoiserConfig(
            _part(values["network"], "network", {name: kind for kind, name in _NETWORK_NAMES.items()}),
            _part(
                values["preconditioning"],
                "preconditioning",
                {name: kind for kind, name in _PRECONDITIONING_NAMES.items()},
            ),
        )


_NETWORK_NAMES = {UNetConfig: "unet", ADMConfig: "adm"}
_PRECONDITIONING_NAMES = {VP: "vp", VE: "ve", IDDPM: "iddpm", EDM: "edm"}


def _part(values: Any, name: str, kinds: dict[str, type]) -> Any:
    if not isinstance(values, dict) or values.get("type") not in kinds:
        raise InputError(f"{name}: type must be one of {', '.join(kinds)}")
    kind = kinds[values["type"]]
    fields = {key: math.inf if value == "inf" else value for key, value in values.items() if key != "type"}
    unknown = set(fields) - {field.name for field in dataclasses.fields(kind)}
    if unknown:
        raise InputError(f"{name}: unknown field {', '.join(sorted(unknown))}")
    try:
        return kind(**fields)
    except TypeError as error:
        raise InputError(f"{name}: a field has the wrong type ({error})") from None


_DDPMPP = UNetConfig(num_blocks=2, dropout=0.13)
_NCSNPP = UNetConfig(
    num_blocks=2,
    dropout=0.13,
    embedding="fourier",
    channel_mult_noise=2,
    encoder="residual",
    resample_filter=(1, 3, 3, 1),
)

PRESETS: dict[str, DenoiserConfig] = {
    # The reference protocol (Gu et al., arXiv 2310.02664): two blocks per resolution.
    "ddpmpp_cifar10": DenoiserConfig(_DDPMPP, VP()),
    "ncsnpp_cifar10": DenoiserConfig(_NCSNPP, VE()),
    # As released with EDM: four blocks per resolution, EDM preconditioning.
    "edm_ddpmpp_cifar10": DenoiserConfig(dataclasses.replace(_DDPMPP, num_blocks=4), EDM()),
    "edm_ncsnpp_cifar10": DenoiserConfig(dataclasses.replace(_NCSNPP, num_blocks=4), EDM()),
    "adm_imagenet64": DenoiserConfig(ADMConfig(label_dim=1000), EDM()),
    # Small enough for experiments on a CPU: the factor grid's 16×16 and 8×8 images.
    "ddpmpp_16": DenoiserConfig(
        dataclasses.replace(_DDPMPP, resolution=16, model_channels=64, attn_resolutions=(8,)), VP()
    ),
    "ddpmpp_8": DenoiserConfig(
        dataclasses.replace(_DDPMPP, resolution=8, model_channels=64, attn_resolutions=(4,)), VP()
    ),
}


def preset(name: str, **changes: Any) -> DenoiserConfig:
    """The preset of that name, with fields of its network changed: `preset("ddpmpp_cifar10", label_dim=10)`."""
    if name not in PRESETS:
        raise InputError(f"no preset {name!r}; choose from {', '.join(PRESETS)}")
    config = PRESETS[name]
    known = {field.name for field in dataclasses.fields(config.network)}
    unknown = set(changes) - known
    if unknown:
        raise InputError(
            f"preset {name}: no field {', '.join(sorted(unknown))}; its fields are {', '.join(sorted(known))}"
        )
    return dataclasses.replace(config, network=dataclasses.replace(config.network, **changes))
