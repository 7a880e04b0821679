"""The check inside other people's training and evaluation: what looks at a model as it trains, in whatever framework.

`MemorizationMonitor` is for loops of one's own. What a framework calls lies in the module that has its name, which
imports it: `diffmem.integrations.torchmetrics`, `.lightning`, `.diffusers` and `.transformers`.
"""

from __future__ import annotations

from diffmem.integrations.loggers import FolderLogger, as_logger
from diffmem.integrations.monitor import MemorizationMonitor, MonitorResult

__all__ = [
    "FolderLogger",
    "MemorizationMonitor",
    "MonitorResult",
    "as_logger",
]
