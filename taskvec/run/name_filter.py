"""Which tensors are edited: those of names that --include and --exclude choose."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from ..checkpoint.checkpoint import Checkpoint
from ..delta.vector import TaskVector
from ..errors import UsageError, listing, show


def patterns(given: str | Sequence[str]) -> tuple[str, ...]:
    """One pattern or several."""
    return (given,) if isinstance(given, str) else tuple(given)


class NameFilter:
    """Which tensor names are edited; it remembers the names it was asked about."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include = include
        self._exclude = exclude
        self._asked: set[str] = set()

    def __call__(self, name: str) -> bool:
        self._asked.add(name)
        included = not self._include or any(fnmatch.fnmatchcase(name, p) for p in self._include)
        return included and not any(fnmatch.fnmatchcase(name, p) for p in self._exclude)

    def check_used(self, base: Checkpoint, vector: TaskVector) -> None:
        """Raises UsageError for a pattern that matches no tensor: it is a typing error."""
        inputs = {name for _, source in vector.terms for checkpoint in source.inputs for name in checkpoint.tensors}
        edited = self._asked | base.tensors.keys()
        for option, chosen, known in (
            ("--include", self._include, edited),
            ("--exclude", self._exclude, edited | inputs),
        ):
            for pattern in chosen:
                if not any(fnmatch.fnmatchcase(name, pattern) for name in known):
                    raise UsageError(
                        f"{option} '{show(pattern)}' matches no tensor of {show(base.path)}",
                        hint=f"Its names are like {listing(base.tensors, 3)}",
                    )
