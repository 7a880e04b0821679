"""The folder of a run. Each file in it has one module here, which writes it and reads it.

    config.json          what the run is (`description`)
    stats.jsonl          a line every so many steps (`stats`)
    state/<images>/      all that it takes to continue exactly (`state`)
    snapshots/<images>/  checkpoints of the EMA weights, listed in snapshots.json (`snapshots`)

`RunFolder` (`folder`) is all of it for those who come after the run.
"""

from __future__ import annotations

from diffmem.training.run_folder.description import CONFIG, holds_run
from diffmem.training.run_folder.folder import RunFolder
from diffmem.training.run_folder.snapshots import (
    KeepLast,
    KeepRule,
    SnapshotRecord,
    keep_all,
    read_records,
    snapshot_folder,
)
from diffmem.training.run_folder.stats import Stats

__all__ = [
    "CONFIG",
    "KeepLast",
    "KeepRule",
    "RunFolder",
    "SnapshotRecord",
    "Stats",
    "holds_run",
    "keep_all",
    "read_records",
    "snapshot_folder",
]
