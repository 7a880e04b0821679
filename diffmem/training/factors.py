"""From the paper's factors to a denoiser's configuration: architecture, width, depth, embedding, skip connections."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from diffmem.errors import InputError
from diffmem.models import EDM, PRESETS, VE, VP, ADMConfig, DenoiserConfig, ModuleConfig, UNetConfig, preset
from diffmem.models.preconditioning import Preconditioning

_ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "ddpmpp": (PRESETS["ddpmpp_cifar10"].network, VP()),
    "ncsnpp": (PRESETS["ncsnpp_cifar10"].network, VE()),
    "adm": (PRESETS["adm_imagenet64"].network, EDM()),
}
_PRECONDITIONINGS: dict[str, Preconditioning] = {"vp": VP(), "ve": VE(), "edm": EDM()}
ARCHITECTURES, PRECONDITIONINGS = tuple(_ARCHITECTURES), tuple(_PRECONDITIONINGS)


def denoiser_config(
    resolution: int,
    channels: int,
    *,
    arch: str = "ddpmpp",
    precond: str | None = None,
    preset_name: str | None = None,
    skips: Sequence[str] | None = None,
    **changes: Any,
) -> DenoiserConfig:
    """The configuration of a denoiser for images of that size, from an architecture or a preset.

    Attention stays at the same depth (half the resolution in the reference network) unless `attn_resolutions` is given.

    Args:
        resolution: Height and width of the images, pixels.
        channels: Channels of the images.
        arch: "ddpmpp" (with VP unless precond says otherwise), "ncsnpp" (VE) or "adm" (EDM).
        precond: "vp", "ve" or "edm".
        preset_name: One of `diffmem.models.PRESETS` instead of both, or of the architecture alone.
        skips: The enabled skip connections, see `skip_mask`; None: all.
        **changes: Fields of the network (`model_channels`, `num_blocks`, `dropout`, `embedding`, `label_dim`,
            `augment_dim`, …); None leaves a field as it is.

    Raises:
        InputError: An unknown name.
    """
    network: UNetConfig | ADMConfig
    if preset_name is not None:
        base = preset(preset_name)
        assert not isinstance(base.network, ModuleConfig)
        network, preconditioning = base.network, base.preconditioning
    elif arch in _ARCHITECTURES:
        network, preconditioning = _ARCHITECTURES[arch]
    else:
        raise InputError(f"arch {arch!r}: choose from {', '.join(ARCHITECTURES)}")
    if precond is not None:
        if precond not in _PRECONDITIONINGS:
            raise InputError(f"precond {precond!r}: choose from {', '.join(PRECONDITIONINGS)}")
        preconditioning = _PRECONDITIONINGS[precond]
    changes = {name: value for name, value in changes.items() if value is not None}
    known = {field.name for field in dataclasses.fields(network)}
    if unknown := set(changes) - known:
        kind = "an ADM network" if isinstance(network, ADMConfig) else "this network"
        raise InputError(f"{kind} has no field {', '.join(sorted(unknown))}")
    attention = tuple(resolution * at // network.resolution for at in network.attn_resolutions)
    network = dataclasses.replace(
        network, **{"resolution": resolution, "channels": channels, "attn_resolutions": attention, **changes}
    )
    if skips is not None:
        if isinstance(network, ADMConfig):
            raise InputError("an ADM network always has all its skip connections")
        network = dataclasses.replace(network, skip_connections=skip_mask(network, skips))
    return DenoiserConfig(network, preconditioning)


def skip_names(network: UNetConfig) -> list[str]:
    """The names of the network's skip connections in the encoder's order: "32.0", "32.1", …, "8.2"."""
    resolutions = [network.resolution >> level for level in range(len(network.channel_mult))]
    return [f"{resolution}.{index}" for resolution in resolutions for index in range(network.num_blocks + 1)]


def skip_mask(network: UNetConfig, enabled: Sequence[str]) -> tuple[bool, ...]:
    """One switch per skip connection; `enabled` holds names (see `skip_names`) or resolutions, "32" for all of them."""
    names = skip_names(network)
    known = {*names, *(name.partition(".")[0] for name in names)}
    if unknown := [name for name in enabled if name not in known]:
        raise InputError(f"skip connection {unknown[0]}: there are {', '.join(names)}, or a resolution for all of its")
    return tuple(name in enabled or name.partition(".")[0] in enabled for name in names)
