"""diffmem: measure, reproduce and study memorization in diffusion models.

The names below are the front door; everything else lives in the rooms `data`, `ops`, `search` and `memorization`.
They are loaded when first used, so that `import diffmem` costs little beyond `import torch`.
"""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_FRONT_DOOR = {
    "Audit": "diffmem.memorization",
    "ImageSet": "diffmem.data",
    "InputError": "diffmem.errors",
    "Neighbors": "diffmem.search",
    "TrainingIndex": "diffmem.search",
    "audit": "diffmem.memorization",
    "load_images": "diffmem.data",
}

__all__ = [*_FRONT_DOOR, "__version__"]


def __getattr__(name: str):
    if name in _FRONT_DOOR:
        value = getattr(importlib.import_module(_FRONT_DOOR[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'diffmem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_FRONT_DOOR])
