"""taskvec: add and subtract what a fine-tune taught a model, straight on checkpoint files. Importing it imports no torch, and
nothing of its own but this: the first name that is asked for brings the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoint.checkpoint import Checkpoint
    from .delta.vector import TaskVector
    from .errors import (
        AdapterError,
        CheckpointError,
        HeaderError,
        HubError,
        MismatchError,
        NameMismatchError,
        NotEnoughDiskError,
        OutputError,
        OutputExistsError,
        OutputOverlapError,
        QuantizedError,
        ShapeMismatchError,
        SourceChangedError,
        TaskvecError,
        UsageError,
        VerificationError,
    )
    from .hub.push import Pushed, push
    from .insight.diff import Diff, diff
    from .insight.inspect import Inspection, inspect
    from .insight.sweep import Sweep, sweep
    from .run.edited import EditedCheckpoint, Report, add, subtract
    from .run.extract import SavedVector, extract
    from .run.in_memory import Applied, applied, apply_
    from .run.lora.extract import ExtractedLora, extract_lora
    from .run.plan import Plan
    from .run.verify import Verification, verify

__all__ = [
    "AdapterError",
    "Applied",
    "Checkpoint",
    "CheckpointError",
    "Diff",
    "EditedCheckpoint",
    "ExtractedLora",
    "HeaderError",
    "HubError",
    "Inspection",
    "MismatchError",
    "NameMismatchError",
    "NotEnoughDiskError",
    "OutputError",
    "OutputExistsError",
    "OutputOverlapError",
    "Plan",
    "Pushed",
    "QuantizedError",
    "Report",
    "SavedVector",
    "ShapeMismatchError",
    "SourceChangedError",
    "Sweep",
    "TaskVector",
    "TaskvecError",
    "UsageError",
    "Verification",
    "VerificationError",
    "__version__",
    "add",
    "applied",
    "apply_",
    "diff",
    "extract",
    "extract_lora",
    "inspect",
    "push",
    "subtract",
    "sweep",
    "verify",
]

_HOMES = (  # where the names are
    ".checkpoint.checkpoint",
    ".delta.vector",
    ".errors",
    ".hub.push",
    ".insight.diff",
    ".insight.inspect",
    ".insight.sweep",
    ".run.edited",
    ".run.extract",
    ".run.in_memory",
    ".run.lora.extract",
    ".run.plan",
    ".run.verify",
)


def __getattr__(name: str) -> Any:
    """All public names at once: some know of each other only when their modules are there (`checkpoint − vector`)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for home in [importlib.import_module(home, __name__) for home in _HOMES]:
        globals().update({public: getattr(home, public) for public in __all__ if hasattr(home, public)})
    return globals()[name]


def __dir__() -> list[str]:
    return list(__all__)
