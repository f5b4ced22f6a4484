"""Task vectors applied to a model that is in memory, for pipelines that have one. torch is imported when one is edited."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..delta.vector import TaskVector

if TYPE_CHECKING:
    import torch

    from .live import Edit


@dataclass(frozen=True)
class Applied:
    """What an edit in memory did: names of the edited tensors, as the checkpoint has them; totals in elements; and notes."""

    tensors: tuple[str, ...]
    elements_changed: int
    elements_lost_to_rounding: int
    elements_overflowed: int
    notes: tuple[str, ...] = ()


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


class applied:  # noqa: N801  # as it is used: `with applied(model, vector):`
    """Within the block the model is model + vector; after it, and after an exception, every bit is what it was.

    A copy of the tensors that the vector touches is held in the host's memory meanwhile. Raises as `apply_`.
    """

    def __init__(
        self, model: torch.nn.Module | Mapping[str, torch.Tensor], vector: TaskVector, *, jobs: int | None = None
    ) -> None:
        self._model, self._vector, self._jobs = model, vector, jobs
        self._edit: Edit | None = None

    def __enter__(self) -> Applied:
        from .live import Edit

        with Edit(self._model, self._vector) as edit:
            edit.keep()
            self._edit = edit
            try:
                return edit.run(self._jobs)
            except BaseException:
                edit.restore()
                raise

    def __exit__(self, *exception: object) -> None:
        if self._edit is not None:
            self._edit.restore()
