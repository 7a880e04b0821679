"""diffmem: measure, reproduce and study memorization in diffusion models.

The names below are the front door; everything else lives in the subpackages, which resolve as attributes
(`diffmem.search`, `diffmem.models`, …) without an import of their own. All are loaded when first used, and
so is PyTorch (`diffmem.lazy`): `import diffmem` costs little.
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffmem import (
        data,
        errors,
        evaluation,
        features,
        indexes,
        integrations,
        memorization,
        models,
        optimum,
        sampling,
        search,
        studies,
        training,
    )
    from diffmem.data import ImageSet, load_images
    from diffmem.errors import InputError
    from diffmem.indexes import build_index, open_index
    from diffmem.memorization import Audit, CopyDetector, Measures, audit, measure
    from diffmem.search import Neighbors, TrainingIndex

__version__ = "0.1.0"

# What was skipped, resumed, made again or must not be relied on is logged under "diffmem". The command line, which
# prints such things itself, and programs that ask for no log see nothing of it.
logging.getLogger(__name__).addHandler(logging.NullHandler())

_NAMES = {
    "Audit": "diffmem.memorization",
    "CopyDetector": "diffmem.memorization",
    "ImageSet": "diffmem.data",
    "InputError": "diffmem.errors",
    "Measures": "diffmem.memorization",
    "Neighbors": "diffmem.search",
    "TrainingIndex": "diffmem.search",
    "audit": "diffmem.memorization",
    "build_index": "diffmem.indexes",
    "load_images": "diffmem.data",
    "measure": "diffmem.memorization",
    "open_index": "diffmem.indexes",
}
_SUBPACKAGES = (
    "data",
    "errors",
    "evaluation",
    "features",
    "indexes",
    "integrations",
    "memorization",
    "models",
    "optimum",
    "sampling",
    "search",
    "studies",
    "training",
)

__all__ = [
    "Audit",
    "CopyDetector",
    "ImageSet",
    "InputError",
    "Measures",
    "Neighbors",
    "TrainingIndex",
    "__version__",
    "audit",
    "build_index",
    "data",
    "errors",
    "evaluation",
    "features",
    "indexes",
    "integrations",
    "load_images",
    "measure",
    "memorization",
    "models",
    "open_index",
    "optimum",
    "sampling",
    "search",
    "studies",
    "training",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"diffmem.{name}")
    raise AttributeError(f"module 'diffmem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
