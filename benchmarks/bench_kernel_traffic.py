"""Bytes that the Triton kernels move, counted: `benchmarks/kernel_traffic.py` says how."""

import importlib.util

from benchmarks import kernel_traffic
from benchmarks.harness import Bench

VALUES, MINUTES = kernel_traffic.RESULT.name, 5


def run(bench: Bench) -> None:
    if importlib.util.find_spec("triton") is None:
        print("kernel_traffic: Triton is not installed (pip install 'diffmem[triton]')")
    elif not bench.quick:
        kernel_traffic.main()
