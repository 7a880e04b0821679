"""Random numbers of a run, without a state to carry: every draw's seed follows from the run's seed and the step.

A run that was interrupted therefore draws what it would have drawn, and so does one on another number of processes.
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF


def seed_of(seed: int, purpose: str, step: int = 0, offset: int = 0) -> int:
    """A 32-bit seed (CPU generators use no more). For a run's seed, purpose and offset, no two steps share one."""
    key = _mix(seed & _MASK)
    for value in (seed >> 32, *purpose.encode(), offset):
        key = _mix(key ^ (value & _MASK))
    return _mix((step ^ key) & _MASK)


def _mix(value: int) -> int:
    """A bijection of 32-bit words that spreads every bit over all (the finalizer of MurmurHash3, Appleby)."""
    value ^= value >> 16
    value = value * 0x85EBCA6B & _MASK
    value ^= value >> 13
    value = value * 0xC2B2AE35 & _MASK
    return value ^ value >> 16
