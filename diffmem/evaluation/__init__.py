"""Sample, judge, remember, stop: the images of many seeds in one file, audited as they come (`generate`), and R_mem
of a run's snapshots, afterwards (`trajectory`) or while it trains (`AuditEvery`)."""

from __future__ import annotations

from diffmem.evaluation.generation import Generated, generate
from diffmem.evaluation.resume_store import work_folder
from diffmem.evaluation.running_audit import RunningAudit, sample_detector
from diffmem.evaluation.seed_ranges import checked_seeds, format_seeds, parse_seeds
from diffmem.evaluation.snapshot_audit import SnapshotAudit, audit_snapshot
from diffmem.evaluation.training_callback import AuditEvery
from diffmem.evaluation.trajectories import Point, Trajectory, trajectory
from diffmem.evaluation.trajectory_report import draw

__all__ = [
    "AuditEvery",
    "Generated",
    "Point",
    "RunningAudit",
    "SnapshotAudit",
    "Trajectory",
    "audit_snapshot",
    "checked_seeds",
    "draw",
    "format_seeds",
    "generate",
    "parse_seeds",
    "sample_detector",
    "trajectory",
    "work_folder",
]
