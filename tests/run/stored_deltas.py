"""Task vectors whose differences the test itself has stored: no adapter format in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from taskvec import Checkpoint
from taskvec.delta.source import LowRankDelta, Resolved, ScaledDelta


@dataclass(frozen=True)
class StoredSource:
    """Δ of `name` = scale · the tensor of that name, or scale · `name.left` @ `name.right`."""

    checkpoint: Checkpoint
    scale: float
    transposed: bool = False

    @property
    def label(self) -> str:
        return self.checkpoint.label

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.checkpoint,)

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        found, own = Resolved(), self.checkpoint.tensors
        for name in filter(keep, base.tensors):
            if name in own:
                found.deltas[name] = ScaledDelta(own[name], self.scale)
            elif f"{name}.left" in own:
                pair = own[f"{name}.left"], own[f"{name}.right"]
                found.deltas[name] = LowRankDelta(*pair, self.scale, self.transposed)
        return found
