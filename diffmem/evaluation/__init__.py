"""Sample, judge, remember, stop: the images of many seeds (`evaluate`), in one file (`generate`), of the snapshots of a
run, afterwards (`trajectory`) or while it trains (`AuditEvery`); whether two models agree (`agreement`); and how far
losses on unseen images are above those on training images (`LossGapMeter`)."""

from __future__ import annotations

from diffmem.evaluation.agreements import Agreement, agreement
from diffmem.evaluation.detectors import sample_detector
from diffmem.evaluation.evaluator import Evaluation, evaluate, identity_of
from diffmem.evaluation.generation import Generated, generate, work_folder
from diffmem.evaluation.loss_gap import GapWarning, LevelGap, LossGap, LossGapMeter, first_warning, first_warnings
from diffmem.evaluation.seed_ranges import checked_seeds, format_seeds, parse_seeds
from diffmem.evaluation.seed_store import SeedRecords, SeedStore
from diffmem.evaluation.training_callback import AuditEvery
from diffmem.evaluation.trajectories import Point, Trajectory, trajectory
from diffmem.evaluation.trajectory_report import draw

__all__ = [
    "Agreement",
    "AuditEvery",
    "Evaluation",
    "GapWarning",
    "Generated",
    "LevelGap",
    "LossGap",
    "LossGapMeter",
    "Point",
    "SeedRecords",
    "SeedStore",
    "Trajectory",
    "agreement",
    "checked_seeds",
    "draw",
    "evaluate",
    "first_warning",
    "first_warnings",
    "format_seeds",
    "generate",
    "identity_of",
    "parse_seeds",
    "sample_detector",
    "trajectory",
    "work_folder",
]
