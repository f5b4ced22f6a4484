"""The numeric contract a second time, by other means than the code under test: every operation is done in float64, where
it is exact or its second rounding is harmless (53 ≥ 2·24 + 2 bits), and rounded with frexp and rint; ml_dtypes decodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Words = NDArray[Any]  # unsigned integers of the dtype's width

TYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
}  # fmt: skip
DTYPES = tuple(TYPES)
MASKS = ("BOOL", "U8")  # what masks come in, besides floats
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
CANONICAL = {"F64": 0x7FF8 << 48, "F32": 0x7FC00000, "F16": 0x7E00, "BF16": 0x7FC0, "F8_E4M3": 0x7F, "F8_E5M2": 0x7E}
# significant bits with the hidden one, exponent of the smallest normal number, largest number
GRIDS = {
    "F32": (24, -126, float(np.finfo(np.float32).max)), "F16": (11, -14, 65504.0),
    "BF16": (8, -126, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
    "F8_E4M3": (4, -6, 448.0), "F8_E5M2": (3, -14, 57344.0),
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    words: Words


class Change(NamedTuple):
    """α, the two tensors of Δ = tuned − origin, and what Δ is multiplied by."""

    alpha: float
    tuned: Stored
    origin: Stored
    masks: tuple[Stored, ...] = ()


class Outcome(NamedTuple):
    """The output words, and the counts by brute force."""

    words: Words
    intended: int
    changed: int
    overflow: int
    nonfinite: int


def unsigned(dtype: str) -> Any:
    return UNSIGNED[np.dtype(TYPES[dtype]).itemsize]


def numbers(stored: Stored) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):  # signaling NaNs
        return stored.words.view(TYPES.get(stored.dtype, stored.words.dtype)).astype(np.float64)


def rounded(values: NDArray[np.float64], dtype: str) -> Words:
    """float64 -> `dtype` by one rounding to nearest-even; overflow to inf (NaN in F8_E4M3, sign kept); one NaN."""
    values = np.asarray(values, np.float64)
    if dtype == "F64":
        words = values.view(np.uint64).copy()
    else:
        precision, smallest, largest = GRIDS[dtype]
        magnitude = np.where(np.isfinite(values), np.abs(values), 0.0)
        exponent = np.maximum(np.frexp(magnitude)[1] - precision, smallest - precision + 1)
        with np.errstate(over="ignore"):
            near = np.ldexp(np.rint(np.ldexp(magnitude, -exponent)), exponent)
        beyond = (near > largest) | np.isinf(values)
        near = np.copysign(np.where(beyond, np.inf, near), values)
        with np.errstate(all="ignore"):
            words = near.astype(TYPES[dtype]).view(unsigned(dtype)).copy()
        if dtype == "F8_E4M3":
            words[beyond] = np.where(np.signbit(values[beyond]), 0xFF, 0x7F)
    words[np.isnan(values)] = CANONICAL[dtype]
    return words


def edit(base: Stored, changes: Sequence[Change], out: str) -> Outcome:
    """base − Σ α·Δ in the order given; each operation rounded to float32 (float64 for a float64 base), once to `out`."""
    compute = "F64" if base.dtype == "F64" else "F32"

    def step(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return numbers(Stored(compute, rounded(values, compute)))

    start = step(numbers(base))
    result, untouched = start, np.ones(len(start), bool)
    with np.errstate(all="ignore"):
        for alpha, tuned, origin, masks in changes:
            t, o = step(numbers(tuned)), step(numbers(origin))
            same = _same(tuned, origin, t, o)
            delta = step(t - o) if alpha >= 0 else -step(o - t)  # a Δ of zero is subtracted as +0: −0 stays −0
            for mask in masks:
                weight = step(numbers(mask))
                delta = step(weight * delta)
                same = same | (weight == 0)
            scaled = step(float(step(np.array([alpha]))[0]) * delta)
            scaled = np.where((delta == 0) & bool(masks), 0.0, scaled)
            result = np.where(same, result, step(result - scaled))  # a term that is nothing changes nothing
            untouched &= same
    kept = base.words if out == base.dtype else rounded(numbers(base), out)
    keep = untouched | (np.isnan(result) & np.isnan(start))
    words = np.where(keep, kept, rounded(result, out))
    finite = np.isfinite(numbers(base))
    for _, *stored, masks in changes:
        for held in (*stored, *masks):
            finite &= np.isfinite(numbers(held))
    ends = ~np.isfinite(numbers(Stored(out, words)))
    return Outcome(
        words,
        intended=int((~untouched).sum()) if changes else 0,
        changed=int((words != kept).sum()),
        overflow=int((ends & finite).sum()),
        nonfinite=int(ends.sum()),
    )


def _same(tuned: Stored, origin: Stored, t: NDArray[np.float64], o: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Equal bits; of different dtypes, equal values in the arithmetic's dtype, the sign of zero included, all NaNs alike."""
    if tuned.dtype == origin.dtype:
        return tuned.words == origin.words
    return (t.view(np.uint64) == o.view(np.uint64)) | (np.isnan(t) & np.isnan(o))


def ulp(values: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """The distance of `dtype`'s numbers around each value."""
    if dtype == "F64":
        return np.spacing(np.abs(values))
    precision, smallest, _ = GRIDS[dtype]
    return np.ldexp(1.0, np.maximum(np.frexp(np.abs(values))[1] - precision, smallest - precision + 1))


def specials(dtype: str) -> Words:
    """The values where arithmetic goes wrong: zeros, subnormals, limits, infinities, NaNs with and without payload."""
    kind, width = unsigned(dtype), np.dtype(TYPES[dtype]).itemsize * 8
    sign, quiet = 1 << (width - 1), CANONICAL[dtype]
    infinity, one = (int(word) for word in rounded(np.array([np.inf, 1.0]), dtype))
    smallest_normal = {"F64": 1 << 52, "F32": 1 << 23, "F16": 1 << 10, "BF16": 1 << 7, "F8_E4M3": 8, "F8_E5M2": 4}[dtype]
    largest = infinity - 1  # E4M3: the code below its NaN
    positive = [0, 1, smallest_normal - 1, smallest_normal, one - 1, one, one + 1, largest, infinity, quiet]
    payload = [quiet | 1, infinity + 1] if dtype != "F8_E4M3" else []
    return np.array([w | s for w in positive + payload for s in (0, sign)], np.uint64).astype(kind)


def pairs(base: str, tuned: str, count: int, seed: int) -> tuple[Words, Words]:
    """Words of two tensors: every pair of specials, then equal values, close ones, and any bits; `count` of each."""
    rng = np.random.default_rng(seed)
    left, right = (grid.reshape(-1) for grid in np.meshgrid(specials(base), specials(tuned)))
    weights = rng.standard_normal(count) * 0.02
    coarse = numbers(Stored("F8_E5M2", rounded(weights, "F8_E5M2")))  # exact in every dtype but E4M3
    b = [left, rounded(coarse, base), rounded(weights, base), _any(base, count, rng)]
    t = [
        right,
        rounded(coarse, tuned),
        rounded(weights + rng.standard_normal(count) * 0.002, tuned),
        _any(tuned, count, rng),
    ]
    return np.concatenate(b), np.concatenate(t)


def _any(dtype: str, count: int, rng: np.random.Generator) -> Words:
    return rng.integers(0, 256, count * np.dtype(TYPES[dtype]).itemsize, np.uint8).view(unsigned(dtype))
