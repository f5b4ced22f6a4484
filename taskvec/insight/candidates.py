"""Where the edited models of a sweep come from: a folder that is made anew for each α, or a model in memory that is edited
and put back.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..delta.vector import TaskVector, formula
from ..errors import OutputExistsError
from ..run.edited import EditedCheckpoint
from ..run.in_memory import applied
from ..run.output import RECORD, Target, check_target

if TYPE_CHECKING:
    import torch

_CANDIDATE = "candidate"  # the one model in a sweep's folder; it is gone when it was evaluated


@dataclass(frozen=True)
class OnDisk:
    """Candidates that are folders, one at a time under the same name."""

    base: Checkpoint
    folder: Path
    options: Mapping[str, Any]

    @contextmanager
    def made(self, vector: TaskVector, alpha: float) -> Iterator[Path]:
        """model − α·vector, saved, and gone afterwards."""
        path, edited = self.folder / _CANDIDATE, EditedCheckpoint(self.base, -alpha * vector)
        self._clear(vector)
        try:
            edited.save(path, fsync=False, **self.options)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def check(self, vector: TaskVector) -> None:
        """Everything that can be refused before the first candidate is made."""
        self._may_clear(vector)
        EditedCheckpoint(self.base, -vector).plan(**self._chosen("include", "exclude", "out_dtype"))

    def random(self, path: Path, vector: TaskVector, seed: int) -> TaskVector:
        """The random vector, written to `path`."""
        from .random_vector import save_random

        chosen = self._chosen("include", "exclude", "device", "jobs", "memory")
        save_random(vector, path, seed=seed, base=self.base, **chosen)
        return TaskVector.open(path)

    def formula(self, vector: TaskVector) -> str:
        return f"{self.base.label} − α·{_bracketed(vector)}"

    def key(self, vector: TaskVector, more: list[Any]) -> str:
        """What pins the inputs of a sweep, and `more`: results of other inputs are not results of these. A file here is
        pinned by its size and time, one of the Hub by its commit."""
        from ..run.record import recipe

        plan = EditedCheckpoint(self.base, -vector).plan(**self._chosen("include", "exclude", "out_dtype"))
        opened = [self.base, *(c for _, source in vector.terms for c in source.inputs)]
        here = [(s.path.name, *s.identity[:2]) for c in opened if c.hub is None for s in c.shards]
        text = json.dumps([recipe(plan, None), here, more], sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()

    def _chosen(self, *names: str) -> dict[str, Any]:
        return {name: self.options[name] for name in names if name in self.options}

    def _may_clear(self, vector: TaskVector) -> None:
        """Raises OutputError when the candidate cannot be there. What a killed sweep left there is no obstacle, whatever
        the evaluator has put beside it; an input is, and what no sweep made."""
        path = self.folder / _CANDIDATE
        inputs = [self.base, *(c for _, source in vector.terms for c in source.inputs)]
        try:
            check_target(Target.of(path), inputs, overwrite=True)
        except OutputExistsError:
            if path.is_symlink() or not (path / RECORD).is_file():
                raise

    def _clear(self, vector: TaskVector) -> None:
        self._may_clear(vector)
        left = [self.folder / _CANDIDATE, *self.folder.glob(f".{_CANDIDATE}.taskvec-partial-*")]
        for path in left:
            if path.exists():
                shutil.rmtree(path)


@dataclass(frozen=True)
class InMemory:
    """The model itself, edited and put back each time."""

    model: torch.nn.Module | Mapping[str, torch.Tensor]
    base: Checkpoint | None
    jobs: int | None

    @contextmanager
    def made(self, vector: TaskVector, alpha: float) -> Iterator[Any]:
        """As it was, bit for bit, afterwards."""
        with applied(self.model, -alpha * vector, jobs=self.jobs):
            yield self.model

    def check(self, vector: TaskVector) -> None:
        """The first trial refuses what does not fit."""

    def random(self, path: Path, vector: TaskVector, seed: int) -> TaskVector:
        """The random vector, written to `path`."""
        from .random_vector import save_random

        save_random(vector, path, seed=seed, base=self.base)
        return TaskVector.open(path)

    def formula(self, vector: TaskVector) -> str:
        return f"model − α·{_bracketed(vector)}"


def _bracketed(vector: TaskVector) -> str:
    text = formula(vector).removeprefix("+ ").removeprefix("1·")
    return text if len(vector.terms) == 1 and vector.terms[0][0] == 1 else f"[{text}]"
