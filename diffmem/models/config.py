"""What a denoiser is made of: frozen dataclasses for its network and preconditioning, JSON and back, and the presets.

A configuration decides every parameter's name and shape; a checkpoint stores it beside the tensors.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from diffmem.errors import InputError
from diffmem.inert.boundary import short
from diffmem.models.preconditioning import EDM, IDDPM, VE, VP, Preconditioning

EMBEDDINGS = ("positional", "fourier")
ENCODERS = ("standard", "skip", "residual")
DECODERS = ("standard", "skip")


# Upper limits, far above every network that was ever published: a damaged or forged file must not ask for more layers
# than can be built, or for sizes whose products overflow.
_LARGEST = {
    "resolution": 2**14,
    "channels": 2**12,
    "model_channels": 2**14,
    "channel_mult": 256,
    "channel_mult_emb": 256,
    "channel_mult_noise": 256,
    "num_blocks": 64,
    "label_dim": 10**7,
    "augment_dim": 10**4,
    "attn_resolutions": 2**14,
}
_LONGEST = 16  # entries of a sequence, such as resolutions


def _check(condition: bool, field: str, value: Any, wanted: str) -> None:
    if not condition:
        raise InputError(f"{field} is {short(value)}, but must be {wanted}")


def _is_whole(value: Any, least: int, largest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= largest


def _check_whole(config: Any, field: str, least: int, wanted: str) -> None:
    value = getattr(config, field)
    largest = _LARGEST[field]
    _check(_is_whole(value, least, largest), field, value, f"{wanted}, at most {largest:,}")


def _tuple(config: Any, field: str) -> tuple[Any, ...]:
    """The sequence of a field, made a tuple (JSON brings lists)."""
    value = getattr(config, field)
    _check(isinstance(value, list | tuple), field, value, "a list")
    object.__setattr__(config, field, tuple(value))
    return getattr(config, field)


def _check_shared(config: UNetConfig | ADMConfig) -> None:
    """The fields both networks have."""
    for name in ("channels", "model_channels", "channel_mult_emb", "num_blocks"):
        _check_whole(config, name, 1, "a positive whole number")
    for name in ("label_dim", "augment_dim"):
        _check_whole(config, name, 0, "a whole number, 0 for none")
    for name, least, wanted in (
        ("channel_mult", 1, "positive whole numbers, one per resolution"),
        ("attn_resolutions", 0, "whole numbers, the resolutions with attention"),
    ):
        values, largest = _tuple(config, name), _LARGEST[name]
        _check(
            len(values) <= _LONGEST
            and len(values) >= least
            and all(_is_whole(value, least, largest) for value in values),
            name,
            values,
            f"at most {_LONGEST} {wanted}, each at most {largest:,}",
        )
    factor = 2 ** (len(config.channel_mult) - 1)
    _check(
        _is_whole(config.resolution, factor, _LARGEST["resolution"]) and config.resolution % factor == 0,
        "resolution",
        config.resolution,
        f"a multiple of {factor}, at most {_LARGEST['resolution']:,} (it is halved "
        f"{len(config.channel_mult) - 1} times)",
    )
    _check(
        isinstance(config.dropout, int | float) and 0 <= config.dropout < 1,
        "dropout",
        config.dropout,
        "a probability below 1",
    )


@dataclass(frozen=True)
class UNetConfig:
    """A network of the DDPM++ / NCSN++ family (Song et al., arXiv 2011.13456, as parametrized in EDM, arXiv
    2206.00364).

    Attributes:
        resolution: Height and width of the images, pixels.
        channels: Color channels of the images.
        label_dim: Number of classes, or length of label vectors; 0: unconditional.
        augment_dim: Length of augmentation label vectors; 0: none.
        model_channels: Width: channels at multiplier 1.
        channel_mult: Width multiplier per resolution, from full resolution down.
        channel_mult_emb: Width multiplier of the conditioning vector.
        channel_mult_noise: Width multiplier of the noise embedding.
        num_blocks: Residual blocks per resolution.
        attn_resolutions: Resolutions with self-attention.
        dropout: Probability, in every block.
        embedding: "positional" (DDPM++) or "fourier" (NCSN++).
        encoder: "standard" (DDPM++), "skip" or "residual" (NCSN++).
        decoder: "standard" or "skip".
        resample_filter: Taps of the separable resampling filter: (1, 1) for DDPM++, (1, 3, 3, 1) for NCSN++.
        skip_connections: One switch per connection from the encoder to the decoder, in the encoder's order (full
            resolution first, num_blocks + 1 per resolution); a disabled one feeds zeros. None: all enabled.
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

    def __post_init__(self) -> None:
        _check_shared(self)
        _check_whole(self, "channel_mult_noise", 1, "a positive whole number")
        width = self.model_channels * self.channel_mult_noise
        _check(width % 2 == 0, "model_channels", self.model_channels, "even (the noise embedding has two halves)")
        _check(self.embedding in EMBEDDINGS, "embedding", self.embedding, f"one of {', '.join(EMBEDDINGS)}")
        _check(self.encoder in ENCODERS, "encoder", self.encoder, f"one of {', '.join(ENCODERS)}")
        _check(self.decoder in DECODERS, "decoder", self.decoder, f"one of {', '.join(DECODERS)}")
        taps = _tuple(self, "resample_filter")
        _check(
            0 < len(taps) <= _LONGEST
            and len(taps) % 2 == 0
            and all(isinstance(tap, int | float) and -(2**20) < tap < 2**20 for tap in taps)
            and sum(taps) > 0,
            "resample_filter",
            taps,
            "an even number of taps",
        )
        if self.skip_connections is not None:
            switches = _tuple(self, "skip_connections")
            _check(
                all(isinstance(each, int) and each in (0, 1) for each in switches),
                "skip_connections",
                switches,
                "a list of switches, on or off",
            )
            mask = tuple(bool(enabled) for enabled in switches)
            count = len(self.channel_mult) * (self.num_blocks + 1)
            _check(len(mask) == count, "skip_connections", mask, f"{count} switches")
            # One spelling for one network: a mask of ones is no mask.
            object.__setattr__(self, "skip_connections", None if all(mask) else mask)


@dataclass(frozen=True)
class ADMConfig:
    """A network of the ADM family (Dhariwal and Nichol, arXiv 2105.05233, as in EDM).

    Attributes:
        resolution: Height and width of the images, pixels.
        channels: Color channels of the images.
        label_dim: Number of classes, or length of label vectors; 0: unconditional.
        augment_dim: Length of augmentation label vectors; 0: none.
        model_channels: Width: channels at multiplier 1.
        channel_mult: Width multiplier per resolution, from full resolution down.
        channel_mult_emb: Width multiplier of the conditioning vector.
        num_blocks: Residual blocks per resolution.
        attn_resolutions: Resolutions with self-attention.
        dropout: Probability, in every block.
    """

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

    def __post_init__(self) -> None:
        _check_shared(self)
        _check(self.model_channels % 2 == 0, "model_channels", self.model_channels, "even")


@dataclass(frozen=True)
class ModuleConfig:
    """A network of someone else's, as far as diffmem knows it: whoever wants it built has to give it (`load`, `train`).

    Attributes:
        name: Name of its class.
        resolution: Height and width of the images, pixels.
        channels: Color channels of the images.
        label_dim: Number of classes, or length of label vectors; 0: unconditional.
        parameters: How many numbers there are in its parameters.
        preconditioned: Whether it is a network F inside the preconditioning; else it is a denoiser D by itself, and the
            preconditioning decides the loss alone.
        sigma_min: The lowest noise level that it knows.
        sigma_max: The highest.
        sigma_per_image: Whether it is given noise levels as (B,).
        class_indices: Whether it is given classes as indices.
    """

    name: str
    resolution: int
    channels: int
    label_dim: int = 0
    parameters: int = 0
    preconditioned: bool = False
    sigma_min: float = 0.0
    sigma_max: float = math.inf
    sigma_per_image: bool = False
    class_indices: bool = False
    augment_dim: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check(isinstance(self.name, str), "name", self.name, "the name of a class")
        for name in ("resolution", "channels"):
            _check_whole(self, name, 1, "a positive whole number")
        _check_whole(self, "label_dim", 0, "a whole number, 0 for none")
        _check(_is_whole(self.parameters, 0, 2**62), "parameters", self.parameters, "a whole number")
        for name in ("preconditioned", "sigma_per_image", "class_indices"):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("sigma_min", "sigma_max"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _check(number and value >= 0, name, value, "a noise level")


@dataclass(frozen=True)
class DenoiserConfig:
    """A network and the preconditioning around it.

    Attributes:
        network: Configuration of the network F.
        preconditioning: c_skip, c_out, c_in and c_noise as functions of σ; in training it decides the loss.
    """

    network: UNetConfig | ADMConfig | ModuleConfig
    preconditioning: Preconditioning

    def __post_init__(self) -> None:
        # By name: dataclasses.asdict would copy a value of a forged file in depth.
        for name in (field.name for field in dataclasses.fields(self.preconditioning)):
            value = getattr(self.preconditioning, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _check(number and (value == math.inf or abs(value) <= 1e30), name, value, "a number")
            if name == "M":
                _check(_is_whole(value, 1, 10**6), name, value, "a number of steps, at most 1,000,000")
        try:
            levels = self.preconditioning.sigma_min, self.preconditioning.sigma_max
        except (ArithmeticError, ValueError):
            levels = math.nan, math.nan
        if not 0 <= levels[0] <= levels[1]:
            raise InputError(f"the preconditioning's constants give invalid noise levels ({levels[0]} to {levels[1]})")

    def to_json(self) -> dict[str, Any]:
        """The configuration as plain JSON values, each part with its `type`."""
        return {
            "network": {"type": _NETWORK_NAMES[type(self.network)], **_plain(self.network)},
            "preconditioning": {
                "type": _PRECONDITIONING_NAMES[type(self.preconditioning)],
                **_plain(self.preconditioning),
            },
        }

    @staticmethod
    def from_json(values: Any) -> DenoiserConfig:
        """The configuration that `to_json` gave; raises InputError that names an unknown or missing field."""
        if not isinstance(values, dict) or set(values) != {"network", "preconditioning"}:
            raise InputError("a denoiser's configuration must have exactly two parts, network and preconditioning")
        return DenoiserConfig(
            _part(values["network"], "network", {name: kind for kind, name in _NETWORK_NAMES.items()}),
            _part(
                values["preconditioning"],
                "preconditioning",
                {name: kind for kind, name in _PRECONDITIONING_NAMES.items()},
            ),
        )


_NETWORK_NAMES = {UNetConfig: "unet", ADMConfig: "adm", ModuleConfig: "module"}
_PRECONDITIONING_NAMES = {VP: "vp", VE: "ve", IDDPM: "iddpm", EDM: "edm"}


def _plain(part: Any) -> dict[str, Any]:
    """The fields of a part; JSON has no infinity."""
    return {name: "inf" if value == math.inf else value for name, value in dataclasses.asdict(part).items()}


def _part(values: Any, name: str, kinds: dict[str, type]) -> Any:
    if not isinstance(values, dict) or not isinstance(values.get("type"), str) or values["type"] not in kinds:
        raise InputError(f"{name}: type must be one of {', '.join(kinds)}")
    kind = kinds[values["type"]]
    fields = {key: math.inf if value == "inf" else value for key, value in values.items() if key != "type"}
    if unknown := set(fields) - {field.name for field in dataclasses.fields(kind)}:
        raise InputError(f"{name}: unknown field {', '.join(field[:80] for field in sorted(unknown)[:3])}")
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
    """The preset of that name, with fields of its network changed.

    Args:
        name: One of `diffmem.models.PRESETS`.
        **changes: Fields of the network.

    Raises:
        InputError: There is no such preset or field.

    Example:
        >>> preset("ddpmpp_8", channels=1, model_channels=16).network.model_channels
        16
    """
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
