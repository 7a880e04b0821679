"""Denoisers of the EDM family: networks, preconditioning, checkpoints, and EDM's own snapshots read safely."""

from __future__ import annotations

from diffmem.models.checkpoint import checkpoint_path, fingerprint, import_edm, load, save
from diffmem.models.config import PRESETS, ADMConfig, DenoiserConfig, ModuleConfig, UNetConfig, preset
from diffmem.models.denoiser import Denoiser
from diffmem.models.networks import ADM, UNet
from diffmem.models.preconditioning import EDM, IDDPM, VE, VP
from diffmem.models.wrapped import Model, WrappedDenoiser, as_denoiser, evaluating, is_denoiser

__all__ = [
    "ADM",
    "EDM",
    "IDDPM",
    "PRESETS",
    "VE",
    "VP",
    "ADMConfig",
    "Denoiser",
    "DenoiserConfig",
    "Model",
    "ModuleConfig",
    "UNet",
    "UNetConfig",
    "WrappedDenoiser",
    "as_denoiser",
    "checkpoint_path",
    "evaluating",
    "fingerprint",
    "import_edm",
    "is_denoiser",
    "load",
    "preset",
    "save",
]
