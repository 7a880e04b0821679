"""Studies of memorization: EMM found by search, and grids of training runs that resume, spread and end in a report."""

from __future__ import annotations

from diffmem.executors import InProcess, Processes, Ray
from diffmem.studies.emm import EMM, find_emm
from diffmem.studies.folder import report_studies, run_studies
from diffmem.studies.measure import Result, run_trial
from diffmem.studies.run import Outcome, run_trials
from diffmem.studies.study import Question, Study, Variant, load_study
from diffmem.studies.trial import Setting, Trial

__all__ = [
    "EMM",
    "InProcess",
    "Outcome",
    "Processes",
    "Question",
    "Ray",
    "Result",
    "Setting",
    "Study",
    "Trial",
    "Variant",
    "find_emm",
    "load_study",
    "report_studies",
    "run_studies",
    "run_trial",
    "run_trials",
]
