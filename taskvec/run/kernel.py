"""The arithmetic of one tile, on the CPU in numpy. The formula is `subtract_scaled`, and it is stated once.

    r = f32(base) − f32(α)·Δ,   Δ = f32(tuned) − f32(origin)   each operation rounded to float32, no fused multiply-add;
    several terms accumulate in the order written; then ONE rounding, to nearest-even, into the output dtype.
    float64 tensors: the same in float64. Low-rank Δ: f32(α·s) is folded into `left`, then the products are added in order.
    Δ by another formula: computed in float64, rounded to float32 once, and multiplied by f32(α).

Task arithmetic: Ilharco et al. 2023 (section 2); subtraction before learning: Ni et al. 2024, eq. 3-4. An element that no
term changes keeps base's bits, NaN and ±inf included; a NaN the arithmetic makes is the canonical one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.floats import FORMATS, INTEGERS, Floats, Raw, canonical_nan, decode, encode, reaches, words
from ..checkpoint.header import StoredTensor
from ..delta.source import DenseDelta, FormulaDelta, LowRankDelta
from .jobs import KEPT_FACTORS, LARGE_FACTOR, Job, Tile, matrix_shape, tile_height, unit_bytes

_SURVEYED = 1 << 19  # elements of a weight that a survey is given at once, or one row


@dataclass
class Counts:
    """What an edit did, in elements. `intended`: Δ is not zero there; `changed`: the output's bits differ from base's;
    `overflow`: finite inputs, output inf or NaN; `nonfinite`: all inf and NaN of the output; `differs`: of a copied
    tensor, bytes that are others in tuned (of several, in the one that differs most).
    """

    intended: int = 0
    changed: int = 0
    overflow: int = 0
    nonfinite: int = 0
    differs: int = 0

    @property
    def lost(self) -> int:
        """Elements whose change was lost to rounding."""
        return max(0, self.intended - self.changed)

    def add(self, other: Counts) -> None:
        self.intended += other.intended
        self.changed += other.changed
        self.overflow += other.overflow
        self.nonfinite += other.nonfinite
        self.differs += other.differs


class ReadStored(Protocol):
    """Reads `nbytes` bytes of a stored tensor, from byte `start` of it on, into memory of their own."""

    def __call__(self, stored: StoredTensor, start: int, nbytes: int) -> Raw: ...


def subtract_scaled(xp: ModuleType, accumulator: Any, delta: Any, alpha: float) -> None:
    """accumulator −= α·Δ in place, as two rounded operations. `xp` is numpy or torch; `delta` is destroyed."""
    xp.multiply(delta, alpha, out=delta)
    xp.subtract(accumulator, delta, out=accumulator)


def difference(xp: ModuleType, tuned: Any, origin: Any, alpha: float, out: Any) -> float:
    """out = tuned − origin; for a negative α its negation. Returns |α|: −α·Δ and α·(−Δ) have the same bits, but this
    way Δ = 0 is +0 and an untouched −0 stays −0."""
    if alpha < 0:
        tuned, origin = origin, tuned
    xp.subtract(tuned, origin, out=out)
    return abs(alpha)


def single(number: float) -> float:
    """`number` rounded to float32, as a Python float."""
    return float(np.float32(number))


class NumpyKernel:
    """The scratch memory of one worker thread, reused for every tile. Not thread-safe; make one per thread."""

    def __init__(self, read_stored: ReadStored) -> None:
        self._read_stored = read_stored
        self._scratch: dict[tuple[str, str], NDArray[Any]] = {}
        self._prepared: tuple[Job, dict[int, Any]] | None = None
        self._read: dict[tuple[StoredTensor, type], Floats] = {}

    def host_buffer(self, nbytes: int) -> Raw:
        """Plain memory."""
        return np.empty(nbytes, np.uint8)

    def edit(self, job: Job, tile: Tile, raw: Mapping[StoredTensor, Raw]) -> tuple[Raw, Counts]:
        """The output bytes of one tile, valid until the next call, and what happened in it.

        `raw` holds the tile's bytes of each of `job.elementwise`.
        """
        with np.errstate(all="ignore"):
            values, intended = self._accumulate(job, tile, raw)
            beyond = reaches(values, FORMATS[job.dtype].overflow)
            out = self._buffer("out", "u1", tile.units * unit_bytes(job.dtype))
            encode(values, job.dtype, out, self._buffer("work", "u4", tile.units))
            reference = raw[job.base] if job.dtype == job.base.dtype else self._cast(job, tile, raw)
            counts = Counts(intended=intended)
            if beyond:
                self._repair(job, tile, raw, out, reference, counts)
            counts.changed = self._differing(out, reference, job.dtype)
            return out, counts

    def _accumulate(
        self, job: Job, tile: Tile, raw: Mapping[StoredTensor, Raw], *, repairing: bool = False
    ) -> tuple[Floats, int]:
        """base − Σ α·Δ, unrounded, [count]; and in how many elements Δ is not zero.

        `repairing`: where tuned equals origin Δ is 0, though both be inf or NaN.
        """
        kind = "f8" if job.base.dtype == "F64" else "f4"
        values = decode(raw[job.base], job.base.dtype, self._buffer("values", kind, tile.units))
        untouched: NDArray[np.bool_] | None = None
        for position in range(len(job.terms)):
            delta = self._buffer("delta", kind, tile.units)
            origin = values if position == 0 else None
            same, alpha = self._delta(job, position, tile, raw, delta, origin)
            if repairing:
                delta[same] = 0
            subtract_scaled(np, values, delta, alpha if kind == "f8" else single(alpha))
            untouched = same if untouched is None else np.logical_and(untouched, same)
        intended = 0 if untouched is None else tile.units - int(np.count_nonzero(untouched))
        return values, intended

    def _delta(
        self, job: Job, position: int, tile: Tile, raw: Mapping[StoredTensor, Raw], out: Floats, base: Floats | None
    ) -> tuple[NDArray[np.bool_], float]:
        """Δ of one term into `out`, times its masks; where it is nothing, and the factor that is still to be multiplied in.

        `base` is base's decoded tile while nothing was subtracted from it yet.
        """
        same, alpha = self._unmasked(job, position, tile, raw, out, base)
        for mask in job.terms[position].masks:
            weight = self._mask(mask, raw[mask], out)
            np.multiply(out, weight, out=out)
            np.add(out, 0, out=out)  # −0 to +0, as below
            np.logical_or(same, weight == 0, out=same)
        return same, alpha

    def _mask(self, mask: StoredTensor, raw: Raw, like: Floats) -> Floats:
        out: Floats = self._buffer("mask", like.dtype.str[1:], len(like))
        if mask.dtype in FORMATS:
            return decode(raw, mask.dtype, out)
        np.copyto(out, raw.view(INTEGERS[mask.dtype]))
        return out

    def _unmasked(
        self, job: Job, position: int, tile: Tile, raw: Mapping[StoredTensor, Raw], out: Floats, base: Floats | None
    ) -> tuple[NDArray[np.bool_], float]:
        alpha, delta, masks = job.terms[position]
        same = self._buffer("same" if position == 0 else "also", "?", tile.units)
        if isinstance(delta, DenseDelta):
            tuned = decode(raw[delta.tuned], delta.tuned.dtype, out)
            if base is not None and delta.origin == job.base:
                origin = base
            else:
                origin = self._buffer("origin", out.dtype.str[1:], tile.units)
                decode(raw[delta.origin], delta.origin.dtype, origin)
            self._equal_bits(delta, raw, tuned, origin, same)
            return same, difference(np, tuned, origin, alpha, out)
        if isinstance(delta, LowRankDelta):
            self._product(job, position, tile, out)
            return np.equal(out, 0, out=same), 1.0
        if isinstance(delta, FormulaDelta):
            self.evaluate(job, position, tile, raw, out)
        else:
            decode(raw[delta.value], delta.value.dtype, out)
            alpha *= delta.scale
        if masks:  # α comes after them, as for a fine-tune
            np.negative(out, out=out) if alpha < 0 else None
            return np.equal(out, 0, out=same), abs(alpha)
        np.multiply(out, out.dtype.type(alpha), out=out)
        np.add(out, 0, out=out)  # −0 to +0: subtracting it must not turn base's −0 to +0
        return np.equal(out, 0, out=same), 1.0

    def _equal_bits(
        self, delta: DenseDelta, raw: Mapping[StoredTensor, Raw], tuned: Floats, origin: Floats, same: NDArray[np.bool_]
    ) -> None:
        if delta.tuned.dtype == delta.origin.dtype:
            dtype = delta.tuned.dtype
            np.equal(words(raw[delta.tuned], dtype), words(raw[delta.origin], dtype), out=same)
        else:
            bits = np.uint32 if tuned.dtype == np.float32 else np.uint64
            np.equal(tuned.view(bits), origin.view(bits), out=same)
            same |= np.isnan(tuned) & np.isnan(origin)  # dtypes and devices disagree on payloads

    def evaluate(self, job: Job, position: int, tile: Tile, raw: Mapping[StoredTensor, Raw], out: Floats) -> None:
        """Δ of a term that has a formula, rounded to float32.

        It is evaluated in blocks of rows that do not depend on the batch: a BLAS may give other bits for other heights.
        """
        delta = job.terms[position].delta
        assert isinstance(delta, FormulaDelta)
        state, weight = self.prepared(job, position), None
        width = delta.columns or matrix_shape(job.base)[1]
        if delta.formula.uses_weight:
            weight = decode(raw[delta.origin], delta.origin.dtype, np.empty(tile.units, np.float64)).reshape(-1, width)
        height = tile_height(job.dtype, width)
        start, end = tile.start, tile.start + tile.units
        top = start // width
        for first in range(top - top % height, -(-end // width), height):
            last = min(first + height, job.base.elements // width)
            given = None if weight is None else weight[first - top : last - top]
            block = delta.formula.delta(state, slice(first, last), given).astype(np.float32).reshape(-1)
            low, high = max(start, first * width), min(end, last * width)
            out[low - start : high - start] = block[low - first * width : high - first * width]

    def prepared(self, job: Job, position: int) -> Any:
        """What the tiles of a job have in common: the two factors of a low-rank term, the state of a formula."""
        if self._prepared is None or self._prepared[0] is not job:
            self._prepared = (job, {})
            self._forget()
        states = self._prepared[1]
        if position not in states:
            alpha, delta, _ = job.terms[position]
            if isinstance(delta, LowRankDelta):
                states[position] = self._load_factors(alpha, delta)
            elif isinstance(delta, FormulaDelta):
                tensors = [self._whole(tensor, np.float64) for tensor in delta.tensors]
                states[position] = delta.formula.prepare(tensors, lambda: self._blocks(delta.origin))
        return states[position]

    def _blocks(self, stored: StoredTensor) -> Iterator[Floats]:
        """A stored weight from its first row to its last, in float64, some rows at a time."""
        (rows, columns), unit = matrix_shape(stored), unit_bytes(stored.dtype)
        step = max(1, _SURVEYED // columns)
        for row in range(0, rows, step):
            units = min(step, rows - row) * columns
            raw = self._read_stored(stored, row * columns * unit, units * unit)
            yield decode(raw, stored.dtype, np.empty(units, np.float64)).reshape(-1, columns)

    def _product(self, job: Job, position: int, tile: Tile, out: Floats) -> None:
        """α·s·(left @ right), or its transpose, of one tile: [rows, r] @ [r, columns] in float32."""
        rows, columns = self.prepared(job, position)
        left = rows[tile.row : tile.row + tile.rows]
        right = columns[:, tile.column : tile.column + tile.columns]
        product = out if out.dtype == np.float32 else self._buffer("product", "f4", tile.units)
        self._multiply(left, right, product.reshape(tile.rows, tile.columns))
        if product is not out:
            np.copyto(out, product)

    def _multiply(self, left: Floats, right: Floats, out: Floats) -> None:
        """out = left @ right as ((0 + l₀·r₀) + l₁·r₁) + …, each operation rounded to float32: the same bits on every
        machine and for every shape of tile, which no BLAS promises."""
        step = self._buffer("step", "f4", out.size).reshape(out.shape)
        out.fill(0)
        for k in range(left.shape[1]):
            np.multiply(left[:, k, None], right[k], out=step)
            np.add(out, step, out=out)

    def _load_factors(self, alpha: float, delta: LowRankDelta) -> tuple[Floats, Floats]:
        """The two factors as (what gives rows, what gives columns) of the stored weight, α·s folded in."""
        left, right = delta.factors(*(self._whole(tensor, np.float32) for tensor in delta.tensors))  # [out, r], [r, in]
        left = np.multiply(left, np.float32(alpha * delta.scale), dtype=np.float32)
        if delta.transposed:
            left, right = right.T, left.T
        return np.ascontiguousarray(left), np.ascontiguousarray(right)

    def _forget(self) -> None:
        """Let go of what was read for another job, but for the last large tensors: each of many experts is a part of them."""
        large = [key for key, values in self._read.items() if values.nbytes >= LARGE_FACTOR]
        self._read = {key: self._read[key] for key in large[-KEPT_FACTORS:]}

    def _whole(self, tensor: StoredTensor, kind: type[np.floating[Any]]) -> Floats:
        """A tensor of an adapter, read once for a job however many terms name it."""
        key = (tensor, kind)
        if key in self._read:
            self._read[key] = self._read.pop(key)  # the last to be forgotten
        else:
            raw = self._read_stored(tensor, 0, tensor.nbytes)
            if tensor.dtype in FORMATS:
                values = decode(raw, tensor.dtype, np.empty(tensor.elements, kind))
            else:
                values = raw.view(INTEGERS[tensor.dtype]).astype(kind)
            self._read[key] = values.reshape(tensor.shape)
        return self._read[key]

    def _cast(self, job: Job, tile: Tile, raw: Mapping[StoredTensor, Raw]) -> Raw:
        """base's own values in the output dtype: what `changed` is measured against when the dtype changes."""
        kind = "f8" if job.base.dtype == "F64" else "f4"
        values = decode(raw[job.base], job.base.dtype, self._buffer("values", kind, tile.units))
        nan = np.isnan(values)
        out = self._buffer("reference", "u1", tile.units * unit_bytes(job.dtype))
        encode(values, job.dtype, out, self._buffer("work", "u4", tile.units))
        words(out, job.dtype)[nan] = canonical_nan(job.dtype)
        return out

    def _repair(
        self, job: Job, tile: Tile, raw: Mapping[StoredTensor, Raw], out: Raw, reference: Raw, counts: Counts
    ) -> None:
        """The rare tile with inf or NaN in it: base's bits where nothing was to change, canonical NaN elsewhere."""
        values, counts.intended = self._accumulate(job, tile, raw, repairing=True)
        nan = np.isnan(values)
        encode(values, job.dtype, out, self._buffer("work", "u4", tile.units))
        untouched = np.ones(tile.units, bool)
        finite = np.ones(tile.units, bool)
        for stored in job.elementwise:
            if stored.dtype in FORMATS:
                finite &= np.isfinite(decode(raw[stored], stored.dtype, np.empty(tile.units, np.float64)))
        for position in range(len(job.terms)):
            delta = self._buffer("delta", values.dtype.str[1:], tile.units)
            untouched &= self._delta(job, position, tile, raw, delta, None)[0]
        base_nan = np.isnan(decode(raw[job.base], job.base.dtype, np.empty(tile.units, np.float64)))
        result, base_words = words(out, job.dtype), words(reference, job.dtype)
        result[nan] = canonical_nan(job.dtype)
        kept = untouched | (nan & base_nan)
        result[kept] = base_words[kept]
        stored_nonfinite = ~np.isfinite(decode(out, job.dtype, np.empty(tile.units, np.float64)))
        counts.nonfinite = int(np.count_nonzero(stored_nonfinite))
        counts.overflow = int(np.count_nonzero(stored_nonfinite & finite))

    def _differing(self, out: Raw, reference: Raw, dtype: str) -> int:
        left, right = words(out, dtype), words(reference, dtype)
        different = self._buffer("different", "?", len(left))
        return int(np.count_nonzero(np.not_equal(left, right, out=different)))

    def _buffer(self, name: str, kind: str, count: int) -> NDArray[Any]:
        held = self._scratch.get((name, kind))
        if held is None or len(held) < count:
            held = self._scratch[name, kind] = np.empty(count, kind)
        return held[:count]
