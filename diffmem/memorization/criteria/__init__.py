"""Measures of copying, a file each: `CRITERIA` by name, and the ratio rule that `diffmem.audit` decides by."""

from __future__ import annotations

from collections.abc import Iterable

from diffmem.errors import InputError
from diffmem.memorization.criteria.authenticity import AUTHENTICITY
from diffmem.memorization.criteria.c_t import C_T, C_T_GLOBAL
from diffmem.memorization.criteria.calibrated_l2 import CALIBRATED_L2
from diffmem.memorization.criteria.comparison import Comparison, Points, Searches
from diffmem.memorization.criteria.criterion import Criterion, Measured, Value, Variant
from diffmem.memorization.criteria.dcr_protection import DCR_PROTECTION
from diffmem.memorization.criteria.disjoint_halves import DISJOINT_HALVES
from diffmem.memorization.criteria.distances import DISTANCE_RATIO, NEAREST_DISTANCE
from diffmem.memorization.criteria.exact_rule import parse_threshold, published_rule, ratio_rule
from diffmem.memorization.criteria.m3 import M3
from diffmem.memorization.criteria.mifid import MIFID, MIFID_DISTANCE
from diffmem.memorization.criteria.precision_recall import PRECISION_RECALL
from diffmem.memorization.criteria.ratio import F_MEM, RATIO
from diffmem.memorization.criteria.similarity import TOP1_SIMILARITY
from diffmem.memorization.criteria.three_phases import THREE_PHASES
from diffmem.memorization.criteria.tile_max import TILE_MAX

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        RATIO,
        F_MEM,
        CALIBRATED_L2,
        NEAREST_DISTANCE,
        DISTANCE_RATIO,
        TILE_MAX,
        TOP1_SIMILARITY,
        AUTHENTICITY,
        M3,
        C_T,
        C_T_GLOBAL,
        DCR_PROTECTION,
        MIFID_DISTANCE,
        MIFID,
        THREE_PHASES,
        DISJOINT_HALVES,
        PRECISION_RECALL,
    )
}


def find_criterion(name: str) -> tuple[Criterion, Variant | None]:
    """The criterion of that name, or that gives the value of that name, and the variant that is asked for.

    Args:
        name: Name of a criterion ("authenticity"), of one of its values ("c_t_global"), or of a variant
            ("authenticity:fld").

    Returns:
        The criterion, and the variant or None.

    Raises:
        InputError: There is none.
    """
    base, colon, variant = name.partition(":")
    criterion = CRITERIA.get(base) or next((each for each in CRITERIA.values() if base in each.values), None)
    if criterion is None:
        raise InputError(f"measures={name!r} is not one of {', '.join(names())}")
    if not colon:
        return criterion, None
    if variant not in criterion.variants:
        known = ", ".join(f"{criterion.name}:{each}" for each in criterion.variants) or "none"
        raise InputError(f"measures={name!r}: {criterion.name} has no such variant; there are: {known}")
    return criterion, criterion.variants[variant]


def names(variants: bool = True) -> Iterable[str]:
    """The names of all criteria, each followed by those of its variants."""
    for criterion in CRITERIA.values():
        yield criterion.name
        if variants:
            yield from (f"{criterion.name}:{variant}" for variant in criterion.variants)


__all__ = [
    "CRITERIA",
    "Comparison",
    "Criterion",
    "Measured",
    "Points",
    "Searches",
    "Value",
    "Variant",
    "find_criterion",
    "names",
    "parse_threshold",
    "published_rule",
    "ratio_rule",
]
