"""The smallest trials that still train, sample and audit: half a second each."""

from diffmem.data import DatasetSpec
from diffmem.studies import Setting

TINY = Setting(
    DatasetSpec("builtin:digits", resolution=4),
    length={"images": 48},
    network={"precond": "edm", "model_channels": 4, "channel_mult": [1], "num_blocks": 1, "dropout": 0.0},
    training={"batch": 8, "lr": 1e-3, "warmup_epochs": 0},
    snapshots=3,
    samples=20,
    sampling={"solver": "unipc", "steps": 4, "batch": 10},
)
