"""Task vectors applied to a model that is in memory, for pipelines that have one. torch is imported when one is edited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..delta.vector import TaskVector

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Applied:
    """What an edit in memory did: names of the edited parameters, and totals in elements."""

    tensors: tuple[str, ...]
    elements_changed: int
    elements_lost_to_rounding: int
    elements_overflowed: int


def apply_(model: torch.nn.Module | Mapping[str, torch.Tensor], vector: TaskVector, *, jobs: int | None = None) -> Applied:
    """model ← model + vector, in place: a module, or a state dict's own tensors.

    Each parameter is edited once, where it lives (CPU or GPU), with the bits a run on files would give; tied parameters
    are one. The vector carries its sign: `apply_(model, -0.3 * old)`. `jobs`: threads, by default one per processor.

    Raises MismatchError before anything is changed when names or shapes do not fit, QuantizedError for quantised modules.
    An error while reading the vector's files leaves the model edited in part; `applied` puts it back.
    """
    from .live import Edit

    with Edit(model, vector) as edit:
        return edit.run(jobs)


@contextmanager
def applied(
    model: torch.nn.Module | Mapping[str, torch.Tensor], vector: TaskVector, *, jobs: int | None = None
) -> Iterator[Applied]:
    """Within the block the model is model + vector; after it, and after an exception, every bit is what it was.

    A copy of the parameters that the vector touches is held in the host's memory meanwhile. Raises as `apply_`.
    """
    from .live import Edit

    with Edit(model, vector) as edit, edit.restoring():
        yield edit.run(jobs)
