"""Studies of memorization: EMM found by search, and grids of training runs that resume, spread and end in a report."""

from __future__ import annotations

from diffmem.studies.measure import Result, run_unit
from diffmem.studies.run import Outcome, run_units
from diffmem.studies.study import Claim, Study, Variant, load_study
from diffmem.studies.unit import DataRecipe, Setting, Unit

__all__ = [
    "Claim",
    "DataRecipe",
    "Outcome",
    "Result",
    "Setting",
    "Study",
    "Unit",
    "Variant",
    "load_study",
    "run_unit",
    "run_units",
]
