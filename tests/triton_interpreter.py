"""Whether Triton's interpreter runs here."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

import numpy as np


def why_not() -> str | None:
    """Why kernels cannot be interpreted here, or None."""
    if find_spec("triton") is None:
        return "no triton here: pip install 'diffmem[triton]'"
    if tuple(map(int, version("triton").split(".")[:2])) < (3, 9):
        try:
            int(np.ones(1))  # older interpreters do so; numpy 2.5 refuses
        except (TypeError, DeprecationWarning):
            return f"the interpreter of triton {version('triton')} does not run with numpy {np.__version__}"
    return None
