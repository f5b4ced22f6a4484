"""Where the edited models of a sweep come from: a folder that is made anew for each α, or a model in memory that is edited
and put back.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..delta.vector import TaskVector, formula
from ..run.edited import EditedCheckpoint
from ..run.in_memory import applied
from ..run.plan import Plan

if TYPE_CHECKING:
    import torch

Place = Callable[[], Path]  # makes the name of a folder that is not there yet, and that is gone after the sweep


@dataclass(frozen=True)
class OnDisk:
    """Candidates that are folders, one at a time."""

    base: Checkpoint
    options: Mapping[str, Any]

    @contextmanager
    def made(self, vector: TaskVector, alpha: float, place: Place) -> Iterator[Path]:
        """model − α·vector, saved, and gone afterwards with whatever was put beside it."""
        folder = place()
        try:
            path = folder / "candidate"
            EditedCheckpoint(self.base, -alpha * vector).save(path, fsync=False, **self.options)
            yield path
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def inputs(self, vector: TaskVector) -> list[Checkpoint]:
        return [self.base, *inputs(vector)]

    def plan(self, vector: TaskVector) -> Plan:
        """Of the candidate at α = 1. Raises what can be raised before the first is made."""
        return EditedCheckpoint(self.base, -vector).plan(**self._chosen("include", "exclude", "out_dtype"))

    def random(self, path: Path, vector: TaskVector, seed: int) -> TaskVector:
        """The random vector, written to `path`."""
        from .random_vector import save_random

        chosen = self._chosen("include", "exclude", "device", "jobs", "memory")
        save_random(vector, path, seed=seed, base=self.base, **chosen)
        return TaskVector.open(path)

    def formula(self, vector: TaskVector) -> str:
        return f"{self.base.label} − α·{_bracketed(vector)}"

    def _chosen(self, *names: str) -> dict[str, Any]:
        return {name: self.options[name] for name in names if name in self.options}


@dataclass(frozen=True)
class InMemory:
    """The model itself, edited and put back each time."""

    model: torch.nn.Module | Mapping[str, torch.Tensor]
    base: Checkpoint | None
    jobs: int | None

    @contextmanager
    def made(self, vector: TaskVector, alpha: float, place: Place) -> Iterator[Any]:
        """As it was, bit for bit, afterwards."""
        with applied(self.model, -alpha * vector, jobs=self.jobs):
            yield self.model

    def inputs(self, vector: TaskVector) -> list[Checkpoint]:
        return inputs(vector)

    def plan(self, vector: TaskVector) -> None:
        """There is none: the first trial refuses what does not fit."""

    def random(self, path: Path, vector: TaskVector, seed: int) -> TaskVector:
        """The random vector, written to `path`."""
        from .random_vector import save_random

        save_random(vector, path, seed=seed, base=self.base)
        return TaskVector.open(path)

    def formula(self, vector: TaskVector) -> str:
        return f"model − α·{_bracketed(vector)}"


def inputs(vector: TaskVector) -> list[Checkpoint]:
    return [checkpoint for _, source in vector.terms for checkpoint in source.inputs]


def _bracketed(vector: TaskVector) -> str:
    text = formula(vector).removeprefix("+ ").removeprefix("1·")
    return text if len(vector.terms) == 1 and vector.terms[0][0] == 1 else f"[{text}]"
