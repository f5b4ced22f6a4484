"""`diff`: how far two checkpoints lie apart, per tensor and summed by layer and kind of module. Here is what is compared and
what is told; the numbers come from compare.py, which reads the files.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import exists, fetch
from ..checkpoint.header import StoredTensor
from ..checkpoint.locate import read_json
from ..delta.source import FLOATS
from ..errors import CheckpointError, NameMismatchError, QuantizedError, UsageError, listing, show
from ..run.name_filter import patterns
from ..run.output import RECORD


@dataclass
class Sums:
    """What is added up over the elements of A and B, in float64. Δ = B − A.

    Attributes:
        elements, changed: all of them; those whose bits differ (of two dtypes: whose values do).
        moved: those whose bits in B are not what A's value is in B's dtype (of one dtype: the changed ones).
        nonfinite: inf or NaN in A or B; these are in no sum of squares.
        delta, a, b, product: Σ Δ², Σ A², Σ B², Σ A·B.
        largest: the largest |Δ|.
        weights: elements that a quantiser would take; `int8`, `nf4`: how many of them land in another bin (bins.py).
    """

    elements: int = 0
    changed: int = 0
    moved: int = 0
    nonfinite: int = 0
    delta: float = 0.0
    a: float = 0.0
    b: float = 0.0
    product: float = 0.0
    largest: float = 0.0
    weights: int = 0
    int8: int = 0
    nf4: int = 0

    def add(self, other: Sums) -> None:
        largest = max(self.largest, other.largest)
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        self.largest = largest

    @property
    def norm(self) -> float:
        """‖Δ‖."""
        return math.sqrt(self.delta)

    @property
    def relative(self) -> float:
        """‖Δ‖ / ‖A‖; inf where A is zero and B is not."""
        return math.sqrt(self.delta) / math.sqrt(self.a) if self.a else math.inf if self.delta else 0.0

    @property
    def cosine(self) -> float:
        """A·B / (‖A‖·‖B‖); nan where one is zero."""
        found = self.product / (math.sqrt(self.a) * math.sqrt(self.b)) if self.a and self.b else math.nan
        return math.copysign(1.0, found) if 1 < abs(found) < 1.001 else found  # rounding alone leads out of −1 … 1

    def summary(self) -> dict[str, Any]:
        """As plain data, JSON-ready; what is no finite number is null."""
        return {
            "elements": self.elements,
            "elements_changed": self.changed,
            "elements_not_finite": self.nonfinite,
            "norm": _plain(self.norm),
            "relative": _plain(self.relative),
            "cosine": _plain(self.cosine),
            "largest": _plain(self.largest),
            "elements_quantizable": self.weights,
            "elements_in_another_int8_bin": self.int8,
            "elements_in_another_nf4_bin": self.nf4,
        }


class Place(NamedTuple):
    """Where a tensor is in a model, told by its name: the stack of layers (model.layers), the number in it, and the kind of
    module (self_attn.q_proj; numbers of experts are *). Outside of layers `stack` is empty and `layer` None."""

    stack: str
    layer: int | None
    kind: str

    @classmethod
    def of(cls, name: str) -> Place:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts[:-1]) if _is_number(part)), None)
        rest = parts if at is None else parts[at + 1 :]
        kind = ".".join("*" if _is_number(part) else part for part in (rest[:-1] or rest))
        return cls("", None, kind) if at is None else cls(".".join(parts[:at]), int(parts[at]), kind)


class Pair(NamedTuple):
    """Two stored tensors of one name and shape: both floats, or both of one dtype."""

    a: StoredTensor
    b: StoredTensor


@dataclass(frozen=True)
class TensorDiff:
    """One tensor. `meant`: how many elements the edit that made it meant to change, `lost`: how many of these rounding left
    as they were; None if the record of B does not tell, or is not of these two."""

    pair: Pair
    sums: Sums
    meant: int | None = None
    lost: int | None = None

    @property
    def name(self) -> str:
        return self.pair.a.name

    @property
    def same(self) -> bool:
        return not self.sums.changed and self.pair.a.dtype == self.pair.b.dtype

    def summary(self) -> dict[str, Any]:
        """As plain data, JSON-ready."""
        stored, (stack, layer, kind) = self.pair, Place.of(self.name)
        about = {"name": self.name, "stack": stack, "layer": layer, "kind": kind, "shape": list(stored.a.shape)}
        return {**about, "dtypes": [stored.a.dtype, stored.b.dtype], "elements_lost": self.lost, **self.sums.summary()}


@dataclass(frozen=True)
class Diff:
    """What differs between checkpoint A and checkpoint B. `unlike`: tensors of one name that cannot be compared, with what
    each side has."""

    a: str
    b: str
    tensors: tuple[TensorDiff, ...]
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()
    unlike: tuple[tuple[str, str, str], ...] = ()

    @property
    def same(self) -> bool:
        """Whether names, shapes, dtypes and every bit are the same."""
        return not (self.only_in_a or self.only_in_b or self.unlike) and all(tensor.same for tensor in self.tensors)

    @property
    def total(self) -> Sums:
        return _summed(self.tensors)

    @property
    def lost(self) -> int | None:
        """Elements that the edit of A meant to change and rounding into B's dtype did not: where Δ was not zero and the bits
        are A's. Only the record of B knows what was meant (two checkpoints show what came of it); None when B has no record,
        when its counts are not those of A and B (another base, other files), and when they could not tell (`_fits`)."""
        known = [tensor.lost for tensor in self.tensors if tensor.lost is not None]
        return sum(known) if known else None

    @property
    def lost_share(self) -> float | None:
        """`lost` as a share of the elements that the edit meant to change."""
        meant = sum(tensor.meant or 0 for tensor in self.tensors)
        return (self.lost or 0) / meant if meant else None

    @property
    def groups(self) -> dict[Place, Sums]:
        """The sums of each layer and kind of module, in the order of A's files."""
        held: dict[Place, list[TensorDiff]] = {}
        for tensor in self.tensors:
            held.setdefault(Place.of(tensor.name), []).append(tensor)
        return {place: _summed(tensors) for place, tensors in held.items()}

    def summary(self) -> dict[str, Any]:
        """Everything as plain data, JSON-ready, totals first."""
        totals = {
            "tensors": len(self.tensors),
            "tensors_that_differ": sum(not tensor.same for tensor in self.tensors),
            **self.total.summary(),
            "elements_lost_to_rounding": self.lost,
            "lost_share_of_intended": self.lost_share,
        }
        groups = [{**place._asdict(), **sums.summary()} for place, sums in self.groups.items()]
        return {
            "a": self.a,
            "b": self.b,
            "same": self.same,
            "totals": totals,
            "only_in_a": list(self.only_in_a),
            "only_in_b": list(self.only_in_b),
            "unlike": [{"name": name, "a": a, "b": b} for name, a, b in self.unlike],
            "groups": groups,
            "tensors": [tensor.summary() for tensor in self.tensors],
        }


def diff(
    a: Checkpoint | str | os.PathLike[str],
    b: Checkpoint | str | os.PathLike[str],
    *,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    jobs: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Diff:
    """How far checkpoint B is from checkpoint A: norms, cosines, elements changed, and how many of them quantisation undoes.

    The two may be of other dtypes and sharded differently; saved task vectors are compared as well. Files are read a little
    at a time by `jobs` threads (by default one per processor, at most 8); the numbers do not depend on how many.

    Args:
        include, exclude: shell-style patterns of tensor names.
        progress: called in this thread with the bytes that were read, and of how many.

    Raises UsageError for patterns that match nothing, NameMismatchError when no tensor name is in common, QuantizedError for
    quantised weights, CheckpointError for what cannot be read.
    """
    left, right = _opened(a), _opened(b)
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs {jobs}, expected at least 1")
    kept = _Filter(include, exclude, left, right)
    found = _matched(left, right, kept)
    if left.tensors and right.tensors and left.tensors.keys().isdisjoint(right.tensors):
        raise NameMismatchError(
            f"{show(right.path)}: no tensor name in common with {show(left.path)}: found "
            f"{listing(right.tensors, 2)}, expected {listing(left.tensors, 2)}",
            hint="These are different models, or one was saved with another prefix",
        )
    from .compare import compare

    fetch(dict.fromkeys(stored.path for pair in found.pairs for stored in pair))
    identities = {shard.path: shard.identity for checkpoint in (left, right) for shard in checkpoint.shards}
    sums = compare(found.pairs, identities, jobs or _processors(), progress)
    recorded = _recorded_edit(left, right)
    if not _fits(recorded, found.pairs, sums):
        recorded = {}
    tensors = tuple(TensorDiff(pair, own, *recorded.get(pair.a.name, ())) for pair, own in zip(found.pairs, sums))
    return Diff(left.label, right.label, tensors, found.only_in_a, found.only_in_b, found.unlike)


@dataclass
class _Matched:
    pairs: list[Pair] = field(default_factory=list)
    unlike: tuple[tuple[str, str, str], ...] = ()
    only_in_a: tuple[str, ...] = ()
    only_in_b: tuple[str, ...] = ()


class _Filter:
    """Which tensors are compared. Raises UsageError for a pattern that matches no tensor: it is a typing error."""

    def __init__(self, include: str | Sequence[str], exclude: str | Sequence[str], a: Checkpoint, b: Checkpoint) -> None:
        self._include, self._exclude = patterns(include), patterns(exclude)
        names = {**a.tensors, **b.tensors}
        for option, chosen in (("--include", self._include), ("--exclude", self._exclude)):
            for pattern in chosen:
                if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                    raise UsageError(
                        f"{option} '{show(pattern)}' matches no tensor of {show(a.path)} or {show(b.path)}",
                        hint=f"Their names are like {listing(names, 3)}",
                    )

    def __call__(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            included = not self._include or any(fnmatch.fnmatchcase(name, p) for p in self._include)
            if included and not any(fnmatch.fnmatchcase(name, p) for p in self._exclude):
                yield name


def _matched(a: Checkpoint, b: Checkpoint, kept: _Filter) -> _Matched:
    found, unlike = _Matched(), []
    for name in kept(a.tensors):
        if name not in b.tensors:
            continue
        one, other = a.tensors[name], b.tensors[name]
        floats = one.dtype in FLOATS and other.dtype in FLOATS
        if one.shape != other.shape or not (floats or one.dtype == other.dtype):
            unlike.append((name, f"{one.dtype} {list(one.shape)}", f"{other.dtype} {list(other.shape)}"))
        else:
            found.pairs.append(Pair(one, other))
    found.unlike = tuple(unlike)
    found.only_in_a = tuple(name for name in kept(a.tensors) if name not in b.tensors)
    found.only_in_b = tuple(name for name in kept(b.tensors) if name not in a.tensors)
    return found


class _Edit(NamedTuple):
    """What a record says of a tensor: how many elements the edit meant to change, and how many of these rounding lost."""

    meant: int
    lost: int


def _recorded_edit(a: Checkpoint, b: Checkpoint) -> dict[str, _Edit]:
    """Tensor name -> its edit, as B's record says, if that is of an edit and of files with the headers of A and B."""
    path = b.folder / RECORD if b.folder else None
    if path is None or not exists(path):
        return {}
    try:
        record = read_json(path)
        base = [file["header_sha256"] for file in record["base"]["files"]]
        made = [shard["header_sha256"] for shard in record["shards"]]
        counts = {name: (own["changed"], own.get("lost", 0)) for name, own in record["tensors"].items() if "changed" in own}
        found = {name: _Edit(int(changed) + int(lost), int(lost)) for name, (changed, lost) in counts.items()}
        edited = "changes" in record
    except (CheckpointError, KeyError, TypeError, AttributeError, ValueError):
        return {}
    own = [sorted(shard.header_sha256 for shard in checkpoint.shards) for checkpoint in (a, b)]
    return found if edited and own == [sorted(map(str, base)), sorted(map(str, made))] else {}


def _fits(recorded: Mapping[str, _Edit], pairs: Sequence[Pair], sums: Sequence[Sums]) -> bool:
    """Whether the edit that was recorded is what made B of A. All models of an architecture have the same headers; but with
    another base, or weights that were written over since, not every tensor keeps as many elements as the record counted.
    Where an edit changed all elements, any two models would fit: that is taken for no. What passes for the base is a model
    that differs from it in nothing but elements that the edit changed, such as the same edit with another α."""
    edits = [(own, recorded.get(pair.a.name, _Edit(0, 0))) for pair, own in zip(pairs, sums)]
    told = any(edit.lost or 0 < own.moved < own.elements for own, edit in edits)
    return told and all(own.moved == edit.meant - edit.lost for own, edit in edits)


def _opened(source: Checkpoint | str | os.PathLike[str]) -> Checkpoint:
    opened = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
    try:
        opened.refuse_quantized()
    except QuantizedError as error:
        raise QuantizedError(error.message, hint="Compare the unquantised models") from error
    return opened


def _summed(tensors: Iterable[TensorDiff]) -> Sums:
    total = Sums()
    for tensor in tensors:
        total.add(tensor.sums)
    return total


def _processors() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10


def _plain(number: float) -> float | None:
    return number if math.isfinite(number) else None
