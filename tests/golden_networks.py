"""The golden files of networks and samplers: weights, inputs and outputs computed with EDM's own code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffmem.models import Denoiser
from diffmem.models.edm_snapshot import config_from_edm

NAMES = ("ddpmpp-vp-uncond", "ddpmpp-vp-skips", "ncsnpp-ve-cond", "adm-edm-cond")
_FOLDERS = (Path(__file__).parent / "golden", Path(__file__).parents[2] / "shared" / "golden")


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """EDM's constructor arguments {"precond", "kwargs"} and the tensors of a golden file, or a skip."""
    for folder in _FOLDERS:
        path = folder / f"{name}.safetensors"
        if path.exists():
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
                return json.loads(file.metadata()["config"]), tensors
    pytest.skip(f"{name}.safetensors (over 3 MB) is not in ../shared/golden")


def state_dict(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The network's own tensors."""
    return {key.removeprefix("net."): value for key, value in tensors.items() if key.startswith("net.")}


def golden_denoiser(name: str) -> tuple[Denoiser, dict[str, torch.Tensor]]:
    """The golden file's denoiser, in evaluation mode, and its tensors."""
    config, tensors = golden(name)
    denoiser = Denoiser(config_from_edm(config["precond"], config["kwargs"]))
    denoiser.load_state_dict(state_dict(tensors))
    return denoiser.eval(), tensors
