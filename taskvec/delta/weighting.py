"""A source seen through weights of its own for every tensor: by patterns of names, by depth, by masks. Nothing is read; the
weights meet the Δ's in the plan.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.header import StoredTensor
from ..errors import NameMismatchError, ShapeMismatchError, UsageError, counted, listing, show
from .source import FLOATS, DeltaSource, Resolved

_LAYER = re.compile(r"(?P<stack>(?:(?![0-9]+\.)[^.]*\.)*)(?P<layer>[0-9]{1,9})\.")  # the first number
_FEWEST_LAYERS = 2
_MASK_DTYPES = (*FLOATS, "BOOL", "U8")


@dataclass(frozen=True)
class Depth:
    """A ramp over the layers: first + (last − first) · l / (L − 1) in layer l of L (LiNeS, Wang et al. 2024, eq. 2)."""

    first: float
    last: float

    def of(self, names: Iterable[str]) -> dict[str, float]:
        """tensor name -> coefficient, for tensors in a stack of layers. A stack is a prefix followed by the numbers 0, 1, …;
        a model may have several (encoder, decoder), each with a ramp of its own."""
        stacks: dict[str, dict[str, int]] = defaultdict(dict)
        for name in names:
            found = _LAYER.match(name)
            if found:
                stacks[found["stack"]][name] = int(found["layer"])
        ramp: dict[str, float] = {}
        for layers in stacks.values():
            count = max(layers.values()) + 1
            if count >= _FEWEST_LAYERS and len(set(layers.values())) == count:
                step = (self.last - self.first) / (count - 1)
                ramp.update({name: self.first + step * layer for name, layer in layers.items()})
        return ramp


@dataclass(frozen=True)
class Scaled:
    """`source` with a coefficient per tensor: of the first of `patterns` that its name matches, else of its depth, else
    `otherwise`."""

    source: DeltaSource
    patterns: tuple[tuple[str, float], ...] = ()
    depth: Depth | None = None
    otherwise: float = 1.0

    @property
    def label(self) -> str:
        parts = [f"{pattern} {value:.12g}" for pattern, value in self.patterns]
        parts += [f"layers {self.depth.first:.12g} to {self.depth.last:.12g}"] if self.depth else []
        parts += [f"else {self.otherwise:.12g}"] if self.otherwise != 1 else []
        return f"{self.source.label}[{', '.join(parts)}]"

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self.source.inputs

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        """As the source; raises UsageError too, when there are no layers to ramp over."""
        found = self.source.resolve(base, keep)
        ramp = self.depth.of([*base.tensors, *found.added]) if self.depth else {}
        stacks = dict.fromkeys(_LAYER.match(name)["stack"] for name in ramp)  # type: ignore[index]
        if stacks:
            found.notes.append(f"the ramp goes over {listing(stack.rstrip('.') or 'the first numbers' for stack in stacks)}")
        if self.depth and not ramp:
            raise UsageError(
                f"{show(base.path)}: no tensor names with layers to ramp over",
                hint=f"Its names are like {listing(base.tensors, 3)}",
            )
        chosen = Patterns("pattern", tuple(pattern for pattern, _ in self.patterns))
        for name in (*found.deltas, *found.unchanged):
            place = chosen.first(name)
            factor = ramp.get(name, self.otherwise) if place is None else self.patterns[place][1]
            found.factors[name] = found.factors.get(name, 1.0) * factor
        found.use_patterns(chosen)
        return found


@dataclass(frozen=True)
class Selected:
    """`source` without the tensors whose names match no pattern of `only`, or one of `without`."""

    source: DeltaSource
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        parts = [f"only {pattern}" for pattern in self.only] + [f"without {pattern}" for pattern in self.without]
        return f"{self.source.label}[{', '.join(parts)}]"

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return self.source.inputs

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        """As the source."""
        only, without = Patterns("only", self.only), Patterns("without", self.without)

        def chosen(name: str) -> bool:
            wanted = only.any(name) if self.only else True
            return not without.any(name) and wanted and keep(name)

        found = self.source.resolve(base, chosen)
        found.use_patterns(only, without)
        return found


@dataclass(frozen=True)
class Masked:
    """`source` times a weight per element: masks of zeros and ones, Fisher weights and the like, by tensor name."""

    source: DeltaSource
    masks: Checkpoint

    @property
    def label(self) -> str:
        return f"{self.masks.label}⊙{self.source.label}"

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (*self.source.inputs, self.masks)

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        """As the source. Raises NameMismatchError for masks of tensors that base lacks, ShapeMismatchError for other shapes.

        Tensors that have no mask are edited as they are, and a note counts them.
        """
        found = self.source.resolve(base, keep)
        known = {**base.tensors, **found.added}
        unknown = [name for name in self.masks.tensors if name not in known]
        if unknown:
            raise NameMismatchError(
                f"{show(self.masks.path)}: {counted(len(unknown), 'mask')} of tensors that {show(base.path)} lacks: "
                f"{listing(unknown)}"
            )
        for name in found.deltas:
            if name in self.masks.tensors:
                mask = self.masks.tensors[name]
                _check_mask(mask, known[name])
                found.masks[name] = (*found.masks.get(name, ()), mask)
        if found.deltas and not found.masks:
            raise UsageError(
                f"{show(self.masks.path)}: no mask of a tensor that is edited",
                hint=f"Its names are like {listing(self.masks.tensors, 2)}, the edited ones like {listing(found.deltas, 2)}",
            )
        bare = [name for name in found.deltas if name not in self.masks.tensors]
        if bare:
            found.notes.append(f"{counted(len(bare), 'tensor')} without a mask in {show(self.masks.label)}: {listing(bare)}")
        return found


def leaf(source: DeltaSource) -> DeltaSource:
    """The input that a source is a view of."""
    while isinstance(source, (Scaled, Selected, Masked)):
        source = source.source
    return source


@dataclass
class Patterns:
    """Shell-style patterns of tensor names, and which of them were ever the first to match."""

    what: str
    patterns: tuple[str, ...]
    used: set[int] = field(default_factory=set)

    def first(self, name: str) -> int | None:
        """The place of the first pattern that matches."""
        found = next(iter(self._matching(name)), None)
        if found is not None:
            self.used.add(found)
        return found

    def any(self, name: str) -> bool:
        """Whether one matches; all that do count as used."""
        matching = self._matching(name)
        self.used.update(matching)
        return bool(matching)

    def _matching(self, name: str) -> list[int]:
        return [place for place, pattern in enumerate(self.patterns) if fnmatch.fnmatchcase(name, pattern)]

    def usage(self) -> Mapping[tuple[str, str], bool]:
        """(what, pattern) -> whether it was used, in every place it is written."""
        unused = {pattern for place, pattern in enumerate(self.patterns) if place not in self.used}
        return {(self.what, pattern): pattern not in unused for pattern in self.patterns}


def _check_mask(mask: StoredTensor, target: StoredTensor) -> None:
    if mask.shape != target.shape:
        raise ShapeMismatchError(
            f"{show(mask.path)}: tensor {show(mask.name)}: found shape {list(mask.shape)}, expected {list(target.shape)} "
            f"as in {show(target.path)}"
        )
    if mask.dtype not in _MASK_DTYPES:
        raise ShapeMismatchError(
            f"{show(mask.path)}: tensor {show(mask.name)}: found {mask.dtype}, expected floats, BOOL or U8 to multiply with"
        )
