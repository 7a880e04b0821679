"""Training of denoisers under the paper's factors: losses, EMA weights, the loop, states to resume from."""

from __future__ import annotations

from diffmem.training.callbacks import Callback, Grids, Snapshot, StopDecision, TensorBoard
from diffmem.training.config import TrainingConfig, differences, images_of
from diffmem.training.configure import TrainingParts, training_config, training_parts
from diffmem.training.ema import EMA
from diffmem.training.factors import denoiser_config
from diffmem.training.loop import DivergedError, Run, plan_training, train
from diffmem.training.losses import denoising_loss
from diffmem.training.planning import Plan
from diffmem.training.presets import TrainingPreset, fitting_preset, training_preset
from diffmem.training.run_folder import (
    KeepLast,
    RunFolder,
    SnapshotRecord,
    Stats,
    keep_all,
    read_records,
    snapshot_folder,
)

__all__ = [
    "EMA",
    "Callback",
    "DivergedError",
    "Grids",
    "KeepLast",
    "Plan",
    "Run",
    "RunFolder",
    "Snapshot",
    "SnapshotRecord",
    "Stats",
    "StopDecision",
    "TensorBoard",
    "TrainingConfig",
    "TrainingParts",
    "TrainingPreset",
    "denoiser_config",
    "denoising_loss",
    "differences",
    "fitting_preset",
    "images_of",
    "keep_all",
    "plan_training",
    "read_records",
    "snapshot_folder",
    "train",
    "training_config",
    "training_parts",
    "training_preset",
]
