"""TaskVector: a lazy sum of scaled differences. Nothing is read when one is made, added or scaled."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..errors import UsageError
from .adapters import open_adapter
from .dense import FineTune
from .source import DeltaSource

# Set by the floor that can execute an edit: (checkpoint, vector) -> EditedCheckpoint. Rooms do not import upwards.
_edit: list[Callable[[Checkpoint, TaskVector], Any]] = []


def when_added(make: Callable[[Checkpoint, TaskVector], Any]) -> None:
    """Register what `checkpoint + vector` makes."""
    _edit[:] = [make]


@dataclass(frozen=True, repr=False)
class TaskVector:
    """coefficient · source + coefficient · source + …, in the order written (Ilharco et al. 2023: τ = θ_ft − θ_pre).

    Scaling and adding are exact bookkeeping: the coefficients stay Python floats until the run, where each is rounded
    to float32 once. `checkpoint + vector` and `checkpoint − vector` give an EditedCheckpoint.
    """

    terms: tuple[tuple[float, DeltaSource], ...]

    @classmethod
    def between(cls, base: Checkpoint | str | os.PathLike[str], tuned: Checkpoint | str | os.PathLike[str]) -> TaskVector:
        """The vector of a full fine-tune, tuned − base. Paths are opened by their headers only."""
        return cls(((1.0, FineTune(tuned=_opened(tuned), origin=_opened(base))),))

    @classmethod
    def from_adapter(
        cls, adapter: str | os.PathLike[str], base: Checkpoint | str | os.PathLike[str] | None = None
    ) -> TaskVector:
        """The vector of a PEFT adapter folder, merged − base.

        With `base`, its tensors are matched right here, so that an adapter of another model is refused at once, and
        the tensors it replaces are differences from that base. Raises AdapterError, NameMismatchError or
        ShapeMismatchError, naming what is not supported or does not fit.
        """
        source = open_adapter(adapter)
        if base is not None:
            source = source.trained_on(_opened(base))
        return cls(((1.0, source),))

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector:
        if isinstance(factor, (TaskVector, Checkpoint)):
            raise TypeError(f"vector · {type(factor).__name__.lower()} has no meaning; scale a vector by a number")
        scale = finite(factor)
        return TaskVector(tuple((finite(coefficient * scale), source) for coefficient, source in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        if isinstance(divisor, (TaskVector, Checkpoint)):
            raise TypeError(f"vector / {type(divisor).__name__.lower()} has no meaning; divide a vector by a number")
        scale = finite(divisor)
        if scale == 0:
            raise UsageError("vector / 0 has no meaning")
        return TaskVector(tuple((finite(coefficient / scale), source) for coefficient, source in self.terms))

    def __add__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            raise TypeError(f"vector + {type(other).__name__}: expected another TaskVector")
        return TaskVector(self.terms + other.terms)

    def __sub__(self, other: TaskVector) -> TaskVector:
        if not isinstance(other, TaskVector):
            raise TypeError(f"vector − {type(other).__name__}: expected another TaskVector (did you mean base − vector?)")
        return self + -other

    def __radd__(self, base: Any) -> Any:
        if isinstance(base, int) and base == 0:  # sum([...]) starts from 0
            return self
        if isinstance(base, Checkpoint):
            return _edit[0](base, self)
        return NotImplemented

    def __rsub__(self, base: Any) -> Any:
        return _edit[0](base, -self) if isinstance(base, Checkpoint) else NotImplemented

    def __repr__(self) -> str:
        return f"TaskVector({formula(self).removeprefix('+ ')})"


def formula(vector: TaskVector) -> str:
    """The vector as a person writes it, signs first: `− 0.3·(old − base) + 0.1·lora`."""
    return " ".join(
        f"{'−' if coefficient < 0 else '+'} {abs(coefficient):.12g}·{source.label}" for coefficient, source in vector.terms
    )


def finite(number: float, what: str = "a scaling coefficient") -> float:
    """`number` as a float. Raises UsageError for nan and inf, TypeError for what is not a real number."""
    if not isinstance(number, Real) or isinstance(number, bool):
        raise TypeError(f"{what}: found {type(number).__name__}, expected a real number")
    try:
        value = float(number)
    except OverflowError:  # an int beyond float64
        value = math.inf
    if not math.isfinite(value):
        raise UsageError(f"{what} is {value}, expected a finite number")
    return value


def _opened(source: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else Checkpoint.open(source)
