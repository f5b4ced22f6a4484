"""The arithmetic of one tile, on the CPU in numpy. The formula is `subtract_scaled`, and it is stated once.

    r = f32(base) − f32(α)·Δ,   Δ = f32(tuned) − f32(origin)   each operation rounded to float32, no fused multiply-add;
    several terms accumulate in the order written; then ONE rounding, to nearest-even, into the output dtype.
    float64 tensors: the same in float64. Low-rank Δ: f32(α·s) is folded into `left`, then the products are added in order.

Task arithmetic: Ilharco et al. 2023 (section 2); subtraction before learning: Ni et al. 2024, eq. 3-4. An element that no
term changes keeps base's bits, NaN and ±inf included; a NaN the arithmetic makes is the canonical one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint.header import StoredTensor
from ..delta.source import DenseDelta, LowRankDelta
from .floats import FORMATS, Floats, Raw, canonical_nan, decode, encode, reaches, words
from .jobs import Job, Tile, unit_bytes


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


ReadWhole = Callable[[StoredTensor], Raw]


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

    def __init__(self, read_whole: ReadWhole) -> None:
        self._read_whole = read_whole
        self._scratch: dict[tuple[str, str], NDArray[Any]] = {}
        self._factors: tuple[Job, list[tuple[Floats, Floats]]] | None = None

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
        """Δ of one term into `out`; where it is nothing, and the factor that is still to be multiplied in.

        `base` is base's decoded tile while nothing was subtracted from it yet.
        """
        alpha, delta = job.terms[position]
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
        decode(raw[delta.value], delta.value.dtype, out)
        np.multiply(out, out.dtype.type(alpha * delta.scale), out=out)
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

    def _product(self, job: Job, position: int, tile: Tile, out: Floats) -> None:
        """α·s·(left @ right), or its transpose, of one tile: [rows, r] @ [r, columns] in float32."""
        if self._factors is None or self._factors[0] is not job:
            self._factors = (job, self._load_factors(job))
        rows, columns = self._factors[1][position]
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

    def _load_factors(self, job: Job) -> list[tuple[Floats, Floats]]:
        """Per term the two factors as (what gives rows, what gives columns) of the stored weight, α·s folded in."""
        loaded = []
        for alpha, delta in job.terms:
            if not isinstance(delta, LowRankDelta):
                loaded.append((np.empty((0, 0), np.float32),) * 2)
                continue
            left = self._whole(delta.left)  # [out, r]
            right = self._whole(delta.right)  # [r, in]
            np.multiply(left, np.float32(alpha * delta.scale), out=left)
            pair = (np.ascontiguousarray(right.T), np.ascontiguousarray(left.T)) if delta.transposed else (left, right)
            loaded.append(pair)
        return loaded

    def _whole(self, tensor: StoredTensor) -> Floats:
        out = np.empty(tensor.elements, np.float32)
        return decode(self._read_whole(tensor), tensor.dtype, out).reshape(tensor.shape)

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
