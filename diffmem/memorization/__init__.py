"""Which generated images are copies: criteria, statistics, the audit and its report."""

from diffmem.memorization.criteria import parse_threshold, published_rule, ratio_rule
from diffmem.memorization.criterion_detector import CriterionDetector, check_criterion, deciding_criteria
from diffmem.memorization.detector import CopyDetector, Detection, audit
from diffmem.memorization.gate import Gate, decide_gate
from diffmem.memorization.indexed import is_index
from diffmem.memorization.inputs import check_sets
from diffmem.memorization.measures import Measures, measure
from diffmem.memorization.result import Audit, CopiedImage, SeenImage, UnkeptImages
from diffmem.memorization.statistics import (
    CopyRate,
    ReportsRate,
    SequentialTest,
    anytime_interval,
    exact_interval,
    highest_interval,
    wilson_interval,
)

__all__ = [
    "Audit",
    "CopiedImage",
    "CopyDetector",
    "CopyRate",
    "CriterionDetector",
    "Detection",
    "Gate",
    "Measures",
    "ReportsRate",
    "SeenImage",
    "SequentialTest",
    "UnkeptImages",
    "anytime_interval",
    "audit",
    "check_criterion",
    "check_sets",
    "decide_gate",
    "deciding_criteria",
    "exact_interval",
    "highest_interval",
    "is_index",
    "measure",
    "parse_threshold",
    "published_rule",
    "ratio_rule",
    "wilson_interval",
]
