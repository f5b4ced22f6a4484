"""What a task vector is made of: per tensor a Delta (which stored tensors, which formula), per input a DeltaSource.

Deltas are descriptions; `taskvec.run.kernel` evaluates them. Each is f32 and has the shape of the base tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.header import StoredTensor

FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # the dtypes that are edited; all others are copied


@dataclass(frozen=True)
class DenseDelta:
    """Δ = f32(tuned) − f32(origin), elementwise."""

    tuned: StoredTensor
    origin: StoredTensor


@dataclass(frozen=True)
class LowRankDelta:
    """Δ = scale · left @ right, [out, r] @ [r, in]; transposed when the base stores the weight as [in, out]."""

    left: StoredTensor
    right: StoredTensor
    scale: float
    transposed: bool = False


@dataclass(frozen=True)
class ScaledDelta:
    """Δ = scale · value: a difference that is stored as such."""

    value: StoredTensor
    scale: float


Delta: TypeAlias = DenseDelta | LowRankDelta | ScaledDelta


@dataclass
class Resolved:
    """A source matched to one base, by names and shapes.

    Attributes:
        deltas: base tensor name -> Δ.
        compared: base tensor name -> tuned tensor, for tensors that are copied but named if their bytes differ.
        missing: base tensors the source lacks; `unused`: the source's tensors that base lacks.
        notes: one line each for the person; nothing is lost by any of them.
    """

    deltas: dict[str, Delta] = field(default_factory=dict)
    compared: dict[str, StoredTensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


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


class AdapterSource(DeltaSource, Protocol):
    """A source whose replaced tensors are differences from the model it was trained on."""

    @property
    def config_sha256(self) -> str:
        """What pins the adapter's config."""
        ...

    def trained_on(self, origin: Checkpoint) -> AdapterSource:
        """The same adapter, matched to `origin` at once. Raises MismatchError if it does not fit."""
        ...
