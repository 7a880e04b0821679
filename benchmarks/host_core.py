"""The CUDA search on the CPU: its source compiled against the host stand-in for CUDA (csrc/simt), and the functions of
`diffmem.ops.nearest.cuda` with CPU tensors in the place of CUDA tensors. For tests and dry runs; it is very slow."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch

from diffmem.ops.nearest import cuda

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "csrc" / "nearest" / "nearest_cuda.cu", ROOT / "tests" / "csrc" / "nearest_simt.cpp")


class SimtCore:
    """The CUDA entry points of `diffmem._C`, on the host stand-in: host addresses instead of device addresses."""

    with_cuda = True
    nearest_cuda_max_neighbors = 64

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.simt_error.restype = ctypes.c_char_p
        self.library.simt_centered_row.restype = ctypes.c_int64

    def call(self, name: str, *arguments) -> int:
        """Code that the launcher returned; every integer is passed as 64 bits."""
        return getattr(self.library, f"simt_{name}")(
            *(ctypes.c_int64(each) if isinstance(each, int) else each for each in arguments)
        )

    def checked(self, name: str, *arguments) -> None:
        code = self.call(name, *arguments)
        if code != 0:
            raise RuntimeError(self.library.simt_error(code).decode())

    def nearest_cuda_centered_row(self, d):
        return self.library.simt_centered_row(ctypes.c_int64(d))

    def nearest_cuda_center(self, images, n, d, centered, norms, stream):
        self.checked("center", images, n, d, centered, norms, stream)

    def nearest_cuda_search_workspace(self, queries, n, d, k):
        size = ctypes.c_int64(-1)
        self.checked("search_workspace", queries, n, d, k, ctypes.byref(size))
        return size.value

    def nearest_cuda_search(
        self, query_images, query_norms, queries, training_images, training_norms, n, d, k, workspace, workspace_bytes,
        indices, squared_distances, stream,
    ):  # fmt: skip
        self.checked("search", query_images, query_norms, queries, training_images, training_norms, n, d, k, workspace,
                     workspace_bytes, indices, squared_distances, stream)  # fmt: skip

    def nearest_cuda_refine(
        self, query_images, queries, training_images, n, d, candidates, offsets, k, indices, squared_distances, stream
    ):
        self.checked("refine", query_images, queries, training_images, n, d, candidates, offsets, k, indices,
                     squared_distances, stream)  # fmt: skip


def build_core(output: Path) -> SimtCore:
    """The library `output`, compiled by g++. Raises OSError where there is none, CalledProcessError where it fails."""
    command = [
        "g++",
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-shared",
        "-Wno-unknown-pragmas",
        f"-I{ROOT / 'csrc'}",
        "-x",
        "c++",
    ]
    subprocess.run([*command, *map(str, SOURCES), "-o", str(output)], check=True)
    return SimtCore(output)


@contextmanager
def on_the_stand_in(core: SimtCore) -> Iterator[None]:
    """`diffmem.ops.nearest.cuda` by `core` while it lasts."""
    with (
        mock.patch.object(cuda, "native_module", return_value=core),
        mock.patch.object(cuda, "DEVICE_TYPE", "cpu"),
        mock.patch.object(cuda, "_stream", return_value=0),
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
    ):
        yield
