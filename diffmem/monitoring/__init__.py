"""Memorization over training time: R_mem of a run's snapshots, afterwards (`trajectory`) or while it trains
(`AuditEvery`)."""

from diffmem.monitoring.audit_every import AuditEvery
from diffmem.monitoring.over_time import Point, Trajectory, trajectory
from diffmem.monitoring.page import draw
from diffmem.monitoring.snapshot_audit import SnapshotAudit, audit_snapshot

__all__ = ["AuditEvery", "Point", "SnapshotAudit", "Trajectory", "audit_snapshot", "draw", "trajectory"]
