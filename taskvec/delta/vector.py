"""TaskVector: a lazy sum of scaled differences. Nothing is read when one is made, added or scaled."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from ..checkpoint.checkpoint import Checkpoint, when_subtracted
from ..errors import UsageError, show
from .adapters import open_adapter
from .dense import FineTune
from .source import DeltaSource
from .stored import StoredVector, told
from .weighting import Depth, Masked, Scaled, Selected

# Set by the floor that can execute an edit: (checkpoint, vector) -> EditedCheckpoint. Rooms do not import upwards.
_edit: list[Callable[[Checkpoint, TaskVector], Any]] = []


# Set by the floor that can write: (vector, output, **options) -> SavedVector.
_save: list[Callable[..., Any]] = []


def when_saved(save: Callable[..., Any]) -> None:
    """Register what `vector.save(…)` does."""
    _save[:] = [save]


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
        origin, trained = _opened(base), _opened(tuned)
        for checkpoint in (origin, trained):
            if told(checkpoint) is not None:
                raise UsageError(
                    f"{show(checkpoint.path)}: a saved vector, and the difference of two models is asked for",
                    hint="Open it with TaskVector.open",
                )
        return cls(((1.0, FineTune(tuned=trained, origin=origin)),))

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

    @classmethod
    def open(cls, source: str | os.PathLike[str], *, force_base: bool = False) -> TaskVector:
        """A vector that `save` or `taskvec extract` wrote, opened by its headers only.

        It fits checkpoints of the names and shapes it was made from; others are refused when it meets them, unless
        `force_base` takes whatever fits tensor by tensor. Raises CheckpointError when the file is no saved vector.
        """
        return cls(((1.0, StoredVector.open(source, force_base=force_base)),))

    def save(self, output: str | os.PathLike[str], **options: Any) -> Any:
        """Write it as safetensors: a file when `output` ends in `.safetensors`, else a folder. Options as in `save_vector`:
        base, dtype ("float32", "bfloat16", "float16"), max_shard_size, include, exclude, overwrite, device, jobs, memory."""
        return _save[0](self, output, **options)

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

    def scaled(self, patterns: Mapping[str, float], otherwise: float = 1.0) -> TaskVector:
        """The vector with a factor per tensor: that of the first shell-style pattern its name matches, else `otherwise`.

        `old.scaled({"*.mlp.*": 0.5, "*": 1.0})`. A pattern that is never the first to match is refused by the plan.
        """
        if not isinstance(patterns, Mapping):
            raise TypeError(
                f"scaled({type(patterns).__name__}): expected a mapping, as in scaled({{'*.mlp.*': 0.5, '*': 1}})"
            )
        pairs = tuple((_pattern(pattern), finite(value, f"the factor of {pattern}")) for pattern, value in patterns.items())
        rest = finite(otherwise, "otherwise")
        return self._through(lambda source: Scaled(source, pairs, otherwise=rest))

    def ramp(self, first: float, last: float, otherwise: float = 1.0) -> TaskVector:
        """The vector with a factor that goes from `first` in the first layer to `last` in the last, linearly in depth
        (LiNeS, Wang et al. 2024, eq. 2, with α = first and β = last − first); `otherwise` outside of the layers."""
        depth = Depth(finite(first, "first"), finite(last, "last"))
        rest = finite(otherwise, "otherwise")
        return self._through(lambda source: Scaled(source, depth=depth, otherwise=rest))

    def only(self, *patterns: str) -> TaskVector:
        """The vector of the tensors whose names match one of the shell-style patterns; the others are not edited."""
        if not patterns:
            raise UsageError("only() without a pattern would leave nothing", hint="Name what to keep, as in only('*.mlp.*')")
        chosen = tuple(_pattern(pattern) for pattern in patterns)
        return self._through(lambda source: Selected(source, only=chosen))

    def without(self, *patterns: str) -> TaskVector:
        """The vector without the tensors whose names match one of the shell-style patterns."""
        unwanted = tuple(_pattern(pattern) for pattern in patterns)
        return self._through(lambda source: Selected(source, without=unwanted)) if unwanted else self

    def masked(self, masks: Checkpoint | str | os.PathLike[str]) -> TaskVector:
        """The vector times the tensors of a safetensors file (or folder), element by element, in float32.

        Names and shapes are those of the tensors they weigh; dtypes floats, BOOL or U8. A tensor without a mask is edited
        as it is, and the plan says so.
        """
        opened = _opened(masks)
        return self._through(lambda source: Masked(source, opened))

    def _through(self, view: Callable[[DeltaSource], DeltaSource]) -> TaskVector:
        return TaskVector(tuple((coefficient, view(source)) for coefficient, source in self.terms))

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


def _pattern(pattern: str) -> str:
    if not isinstance(pattern, str):
        raise TypeError(f"a pattern of tensor names: found {type(pattern).__name__}, expected str")
    return pattern


def _opened(source: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else Checkpoint.open(source)


when_subtracted(TaskVector.between)
