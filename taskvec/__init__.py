"""taskvec: add and subtract what a fine-tune taught a model, straight on checkpoint files. Importing it imports no torch."""

from ._version import __version__
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
from .insight.inspect import Inspection, inspect
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
    "TaskVector",
    "TaskvecError",
    "UsageError",
    "Verification",
    "VerificationError",
    "__version__",
    "add",
    "applied",
    "apply_",
    "extract",
    "extract_lora",
    "inspect",
    "push",
    "subtract",
    "verify",
]
