"""What the CUDA kernels use of a GPU, by compiling them: `benchmarks/cuda_resources.py` says how."""

import shutil

from benchmarks import cuda_resources
from benchmarks.harness import Bench

VALUES, MINUTES = cuda_resources.RESULT.name, 3


def run(bench: Bench) -> None:
    if shutil.which("nvcc") is None:
        print("cuda_kernels: nvcc was not found")
    elif not bench.quick:
        cuda_resources.main()
