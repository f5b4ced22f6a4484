"""What a task vector is made of: per tensor a Delta (which stored tensors, which formula), per input a DeltaSource.

Deltas are descriptions; `taskvec.run.kernel` evaluates them. Each is f32 and has the shape of the base tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.header import StoredTensor

if TYPE_CHECKING:
    from numpy import float32, float64
    from numpy.typing import NDArray

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # the dtypes that are edited; all others are copied


@dataclass(frozen=True)
class DenseDelta:
    """Δ = f32(tuned) − f32(origin), elementwise."""

    tuned: StoredTensor
    origin: StoredTensor


def matrices(left: NDArray[float32], right: NDArray[float32]) -> tuple[NDArray[float32], NDArray[float32]]:
    """Two factors as they are stored; [r, in, k, …] and [out, r, 1, …] of a convolution as [r, in·k·…] and [out, r]."""
    return left.reshape(len(left), -1), right.reshape(len(right), -1)


@dataclass(frozen=True)
class LowRankDelta:
    """Δ = scale · left @ right, [out, r] @ [r, in]; transposed when the base stores the weight as [in, out].

    `factors` makes left and right, in float32, from the stored tensors `left`, `right` and `more`, which are read whole.
    """

    left: StoredTensor
    right: StoredTensor
    scale: float
    transposed: bool = False
    more: tuple[StoredTensor, ...] = ()
    factors: Callable[..., tuple[NDArray[float32], NDArray[float32]]] = matrices

    @property
    def tensors(self) -> tuple[StoredTensor, ...]:
        return (self.left, self.right, *self.more)


@dataclass(frozen=True)
class ScaledDelta:
    """Δ = scale · value: a difference that is stored as such."""

    value: StoredTensor
    scale: float


class Formula(ABC):
    """Δ of a weight W, [rows, columns], from an adapter's tensors and W itself, in float64; the run rounds it to float32.

    W and Δ are as they are stored, all axes but the first in one; of one axis as [1, n]. Subclasses are frozen dataclasses
    of plain numbers. Rows are evaluated independently of each other, after `prepare` saw what they have in common.

    Attributes:
        uses_weight: whether Δ of some rows depends on those rows of W.
        surveys_weight: whether `prepare` reads W: the tensor is then handled by one worker.
        judges_tensors: whether `prepare` may refuse the adapter's tensors: they are then shown to it before anything runs.
        judges_tensors: whether `prepare` may refuse the adapter's tensors: they are then shown to it before anything runs.
        replaces: whether it puts new values in the place of some of W's, whatever they are.
    """

    uses_weight: bool = True
    surveys_weight: bool = False
    judges_tensors: bool = False
    replaces: bool = False

    def prepare(self, tensors: list[NDArray[float64]], blocks: Callable[[], Iterable[NDArray[float64]]]) -> Any:
        """What all rows need, from the adapter's tensors. `blocks()` reads W from its first row to its last, a few rows
        at a time; only for formulas that survey it."""
        return tensors

    @abstractmethod
    def delta(self, state: Any, rows: slice, weight: NDArray[float64] | None) -> NDArray[float64]:
        """Δ of some rows, [rows, columns]. `weight`: those rows of W if the formula uses them, else None."""

    def scratch(self, rows: int, columns: int) -> int:
        """Bytes that `prepare` and its result take for a weight of this size, beyond the adapter's tensors in float64."""
        return 0


@dataclass(frozen=True)
class FormulaDelta:
    """Δ by a formula of the adapter's `tensors`, read whole, and of `origin`, the weight the adapter was trained on.

    `columns`: how wide the formula takes a row to be, if not all of what follows the first axis.
    """

    formula: Formula
    tensors: tuple[StoredTensor, ...]
    origin: StoredTensor
    columns: int = 0


Delta: TypeAlias = DenseDelta | LowRankDelta | ScaledDelta | FormulaDelta


@dataclass
class Resolved:
    """A source matched to one base, by names and shapes.

    Attributes:
        deltas: base tensor name -> Δ.
        unchanged: float tensors of base for which the source says that Δ is zero.
        compared: base tensor name -> tuned tensor, for tensors that are copied but named if their bytes differ.
        missing: base tensors the source lacks; `unused`: the source's tensors that base lacks.
        notes: one line each for the person; nothing is lost by any of them.
        added: output tensors that base has no tensor of that name for -> the tensor of base they start from.
        config: values of config.json that the edit changes.
        factors: base tensor name -> what the coefficient of its Δ is multiplied by, where that is not 1.
        masks: base tensor name -> tensors of its shape that Δ is multiplied by, element by element.
        patterns: (option, pattern) of what chose among names -> whether it chose any.
    """

    deltas: dict[str, Delta] = field(default_factory=dict)
    unchanged: list[str] = field(default_factory=list)
    compared: dict[str, StoredTensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    added: dict[str, StoredTensor] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    masks: dict[str, tuple[StoredTensor, ...]] = field(default_factory=dict)
    patterns: dict[tuple[str, str], bool] = field(default_factory=dict)

    def use_patterns(self, *used: PatternUse) -> None:
        """Remember which patterns chose something; one that is used in any place is used."""
        for patterns in used:
            for pattern, did in patterns.usage().items():
                self.patterns[pattern] = did or self.patterns.get(pattern, False)


class PatternUse(Protocol):
    """Patterns that know which of them were used."""

    def usage(self) -> Mapping[tuple[str, str], bool]: ...


class DeltaSource(Protocol):
    """One input of a task vector: a fine-tune, an adapter, a saved vector."""

    @property
    def label(self) -> str:
        """How a formula writes it."""
        ...

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        """The checkpoints whose files it reads."""
        ...

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        """Match it to `base`; tensors that `keep` rejects are left out. Raises MismatchError if it does not fit."""
        ...


@runtime_checkable
class AdapterSource(DeltaSource, Protocol):
    """An adapter: a source whose tensors are not those of a model."""

    @property
    def family(self) -> str:
        """Which kind of adapter, as its config names it."""
        ...

    @property
    def weights(self) -> Checkpoint:
        """Its file."""
        ...

    @property
    def origin(self) -> Checkpoint | None:
        """The model it was trained on, if that is not the edited one."""
        ...

    @property
    def config_sha256(self) -> str:
        """What pins the adapter's config."""
        ...

    def trained_on(self, origin: Checkpoint) -> AdapterSource:
        """The same adapter, matched to `origin` at once. Raises MismatchError if it does not fit."""
        ...

    def summary(self) -> Mapping[str, Any]:
        """What there is to know about it, for a person: ranks, scales, targets; plain data."""
        ...


def stored_tensors(deltas: Iterable[Delta]) -> Sequence[StoredTensor]:
    """Every stored tensor that the deltas name, each once."""
    found: dict[StoredTensor, None] = {}
    for delta in deltas:
        if isinstance(delta, DenseDelta):
            own: tuple[StoredTensor, ...] = (delta.tuned, delta.origin)
        elif isinstance(delta, ScaledDelta):
            own = (delta.value,)
        else:
            own = delta.tensors
        found.update(dict.fromkeys(own))
    return list(found)
