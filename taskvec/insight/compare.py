"""The numbers of a diff: pairs of stored tensors are read side by side, some thousand elements at a time, by several threads.
Memory depends on the number of threads alone. Sums are float64 and are added in the order of the files, so that they are
the same whatever the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.files import FileIdentity, InputFiles
from ..checkpoint.floats import Raw, canonical_nan, decode, encode, words
from ..checkpoint.header import DTYPE_BITS, StoredTensor
from ..delta.source import FLOATS
from .bins import BLOCK, Values, int8, nf4
from .diff import Pair, Sums

_CHUNK = 1 << 16  # elements that are looked at together: what they take in float64 fits into a processor's cache
_STEP = 1 << 22  # elements that a thread takes at once
_POLL = 0.1  # seconds between two looks of the main thread; Ctrl-C is seen this soon


class Step(NamedTuple):
    """Elements `start` to `end` of the pair in place `pair`: whole rows, for what has any."""

    pair: int
    start: int
    end: int


def compare(
    pairs: Sequence[Pair], identities: dict[Path, FileIdentity], threads: int, progress: Callable[[int, int], None]
) -> list[Sums]:
    """The sums of each pair. Raises CheckpointError for a file that cannot be read or changed since it was opened."""
    run = _Run(pairs, InputFiles(identities))
    total = sum(stored.nbytes for pair in pairs for stored in pair)
    pool = ThreadPoolExecutor(threads)
    try:
        working = [pool.submit(run.work) for _ in range(threads)]
        while not all(done.done() for done in working):
            wait(working, timeout=_POLL)
            progress(run.done, total)
        for done in working:
            done.result()
        progress(run.done, total)
        run.files.check_unchanged()
    finally:
        run.stop.set()
        pool.shutdown()
        run.files.close()
    return run.collected()


def steps(pairs: Sequence[Pair]) -> Iterator[Step]:
    """Cut into what one thread does at once: by rows, where there are any."""
    for place, pair in enumerate(pairs):
        elements, columns = pair.a.elements, row_length(pair.a)
        size = max(1, _STEP // columns) * columns if columns else _STEP
        for start in range(0, elements, size):
            yield Step(place, start, min(start + size, elements))


def row_length(stored: StoredTensor) -> int:
    """How many elements share an int8 scale: the last axis of a matrix or of a stack of them (experts); 0 for tensors that
    no quantiser takes: biases and norms, kernels of convolutions, and what is not float."""
    return stored.shape[-1] if len(stored.shape) in (2, 3) and stored.dtype in FLOATS else 0


class _Run:
    def __init__(self, pairs: Sequence[Pair], files: InputFiles) -> None:
        self.files = files
        self.stop = threading.Event()
        self.done = 0  # bytes
        self._pairs = pairs
        self._steps = enumerate(steps(pairs))
        self._lock = threading.Lock()
        self._found: dict[int, tuple[int, Sums]] = {}

    def work(self) -> None:
        """What one thread does: step after step, until none is left or another thread failed."""
        try:
            reader = _Reader(self.files)
            while not self.stop.is_set():
                with self._lock:
                    number, step = next(self._steps, (-1, None))
                if step is None:
                    return
                pair = self._pairs[step.pair]
                sums = reader.step(pair, step)
                with self._lock:
                    self._found[number] = (step.pair, sums)
                    self.done += sum((step.end - step.start) * DTYPE_BITS[stored.dtype] // 8 for stored in pair)
        except BaseException:
            self.stop.set()
            raise

    def collected(self) -> list[Sums]:
        totals = [Sums() for _ in self._pairs]
        for number in sorted(self._found):
            place, sums = self._found[number]
            totals[place].add(sums)
        return totals


class _Reader:
    """The buffers of one thread."""

    def __init__(self, files: InputFiles) -> None:
        self._files = files
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def step(self, pair: Pair, step: Step) -> Sums:
        """All chunks of a step."""
        total, columns = Sums(), row_length(pair.a)
        if pair.a.dtype not in FLOATS:
            return self._bytes(pair, step)
        if columns <= _CHUNK:
            size = max(1, _CHUNK // columns) * columns if columns else _CHUNK
            for start in range(step.start, step.end, size):
                total.add(self._floats(pair, start, min(start + size, step.end), None))
            return total
        for row in range(step.start, step.end, columns):  # too long to be looked at whole: its maximum comes first
            parts = [(start, min(start + _CHUNK, row + columns)) for start in range(row, row + columns, _CHUNK)]
            largest = tuple(max(self._largest(pair, side, *part) for part in parts) for side in (0, 1))
            for start, end in parts:
                total.add(self._floats(pair, start, end, largest))
        return total

    def _bytes(self, pair: Pair, step: Step) -> Sums:
        """Of what is not float only the bits are compared. Elements smaller than a byte count as their bytes."""
        bits = DTYPE_BITS[pair.a.dtype]
        changed, width = 0, max(1, bits // 8)
        first, last = step.start * bits // 8, -(-step.end * bits // 8)
        for at in range(first, last, _CHUNK * width):
            a, b = (self._read(pair, side, at, min(_CHUNK * width, last - at)) for side in (0, 1))
            changed += int(np.count_nonzero((a != b).reshape(-1, width).any(axis=1)))
        return Sums(elements=step.end - step.start, changed=changed, moved=changed)

    def _floats(self, pair: Pair, start: int, end: int, largest: tuple[float, ...] | None) -> Sums:
        """`largest`: the maxima of the one row of A and B that this is a part of; None for whole rows."""
        columns = row_length(pair.a)
        low, high = start, end
        if columns:  # NF4 takes whole blocks
            low, high = start // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, pair.a.elements)
        own = slice(start - low, end - low)
        raws = [self._elements(pair, side, low, high) for side in (0, 1)]
        wide = [decode(raw, stored.dtype, np.empty(high - low)) for raw, stored in zip(raws, pair)]
        sums = Sums(elements=end - start, weights=end - start if columns else 0)
        parts = [_part(raw, stored, own) for raw, stored in zip(raws, pair)]
        sums.changed = _changed(parts, [w[own] for w in wide], pair)
        sums.moved = sums.changed if pair.a.dtype == pair.b.dtype else _moved(parts, pair)
        finite = np.isfinite(wide[0]) & np.isfinite(wide[1])
        if not finite.all():
            sums.nonfinite = end - start - int(np.count_nonzero(finite[own]))
            for values in wide:
                values[~finite] = 0
        _measure(sums, wide[0][own], wide[1][own])
        if columns and not (wide[0] == wide[1]).all():
            codes = [nf4(values)[own] for values in wide]
            sums.nf4 = int(np.count_nonzero(codes[0] != codes[1]))
        if columns and (sums.largest or largest):
            rows = [values[own].reshape(-1, columns if largest is None else end - start) for values in wide]
            tops = [np.abs(part).max(axis=1) for part in rows] if largest is None else [np.array([top]) for top in largest]
            sums.int8 = int(np.count_nonzero(int8(rows[0], tops[0]) != int8(rows[1], tops[1])))
        return sums

    def _largest(self, pair: Pair, side: int, start: int, end: int) -> float:
        both = [decode(self._elements(pair, s, start, end), pair[s].dtype, np.empty(end - start)) for s in (0, 1)]
        finite = np.isfinite(both[0]) & np.isfinite(both[1])
        return float(np.abs(both[side][finite]).max(initial=0.0))

    def _elements(self, pair: Pair, side: int, start: int, end: int) -> Raw:
        width = DTYPE_BITS[pair[side].dtype] // 8
        return self._read(pair, side, start * width, (end - start) * width)

    def _read(self, pair: Pair, side: int, start: int, nbytes: int) -> Raw:
        stored = pair[side]
        if len(self._buffers[side]) < nbytes:
            self._buffers[side] = np.empty(nbytes, np.uint8)
        buffer = self._buffers[side][:nbytes]
        self._files.read(stored.path, buffer.data, stored.offset + start, stored.name)
        return buffer


def _part(raw: Raw, stored: StoredTensor, own: slice) -> Raw:
    width = DTYPE_BITS[stored.dtype] // 8
    return raw[own.start * width : own.stop * width]


def _changed(raws: list[Raw], values: list[Values], pair: Pair) -> int:
    """Elements whose bits differ; where the dtypes do, whose values differ (a NaN is a NaN)."""
    if pair.a.dtype == pair.b.dtype:
        one, other = (words(raw, pair.a.dtype) for raw in raws)
        return int(np.count_nonzero(one != other))
    nan: NDArray[np.bool_] = np.isnan(values[0]) & np.isnan(values[1])
    return int(np.count_nonzero((values[0] != values[1]) & ~nan))


def _moved(raws: list[Raw], pair: Pair) -> int:
    """Elements whose bits in B are not what A's value is in B's dtype, by the run's own rounding."""
    kind = np.float64 if pair.a.dtype == "F64" else np.float32
    values = decode(raws[0], pair.a.dtype, np.empty(len(words(raws[0], pair.a.dtype)), kind))
    nan: NDArray[np.bool_] = np.isnan(values)
    cast = np.empty(len(raws[1]), np.uint8)
    with np.errstate(over="ignore"):
        encode(values, pair.b.dtype, cast, np.empty(len(values), np.uint32))
    words(cast, pair.b.dtype)[nan] = canonical_nan(pair.b.dtype)
    return int(np.count_nonzero(words(cast, pair.b.dtype) != words(raws[1], pair.b.dtype)))


def _measure(sums: Sums, a: Values, b: Values) -> None:
    """Σ of squares and products. einsum, not a BLAS: the same bits for every number of threads."""
    with np.errstate(over="ignore", invalid="ignore"):  # float64 tensors may hold what has no square
        delta = b - a
        sums.a, sums.b = float(np.einsum("i,i->", a, a)), float(np.einsum("i,i->", b, b))
        sums.product = float(np.einsum("i,i->", a, b))
        sums.delta = float(np.einsum("i,i->", delta, delta))
        sums.largest = float(np.abs(delta).max(initial=0.0))
