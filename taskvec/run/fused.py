"""The formula of `kernel` for one dense term as a single GPU kernel, in Triton: each byte is read once and written once, and
what happened is counted on the way. Fused multiply-add is off, and bfloat16 is rounded by its bits, so that the result is
that of every other kernel bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_LENGTH = 4096  # elements of one program
_STRIP = 1024  # columns of one program of a product
_WORDS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}
_NANS = {torch.float32: 0x7FC00000, torch.float16: 0x7E00, torch.bfloat16: 0x7FC0}
_LIMITS = {torch.float32: float("inf"), torch.float16: 65520.0, torch.bfloat16: (2 - 2**-8) * 2.0**127}
DTYPES = tuple(_WORDS)


def edit(base: torch.Tensor, tuned: torch.Tensor, alpha: float, out: torch.Tensor, counts: torch.Tensor) -> None:
    """out = base − alpha·(tuned − base), rounded once into base's dtype; `out` may be `base`.

    base, out: [n] of one of DTYPES; tuned: [n] of one of DTYPES, perhaps another. counts: [4] int64, added to: elements
    where tuned is not base, changed, overflowed, not finite. `alpha` is a float32 number.
    """
    size = base.numel()
    _edit[(triton.cdiv(size, _LENGTH),)](
        base.view(_WORDS[base.dtype]),
        tuned.view(_WORDS[tuned.dtype]),
        out.view(_WORDS[out.dtype]),
        counts,
        size,
        abs(alpha),
        _LIMITS[base.dtype],
        NEGATED=alpha < 0,
        CANONICAL=_NANS[base.dtype],
        BASE=str(base.dtype).removeprefix("torch."),
        TUNED=str(tuned.dtype).removeprefix("torch."),
        LENGTH=_LENGTH,
        enable_fp_fusion=False,
    )


@triton.jit
def _edit(  # type: ignore[no-untyped-def]
    base_at, tuned_at, out_at, counts_at, size, alpha, limit,
    NEGATED: tl.constexpr, CANONICAL: tl.constexpr, BASE: tl.constexpr, TUNED: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """base, tuned, out: [size] words; counts: [4]; `alpha` ≥ 0."""
    at = tl.program_id(0).to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    inside = at < size
    word = tl.load(base_at + at, mask=inside, other=0)
    other = tl.load(tuned_at + at, mask=inside, other=0)
    base, tuned = _decoded(word, BASE), _decoded(other, TUNED)
    same = base.to(tl.int32, bitcast=True) == tuned.to(tl.int32, bitcast=True)
    if BASE != TUNED:
        same = same | ((base != base) & (tuned != tuned))
    delta = base - tuned if NEGATED else tuned - base
    value = base - alpha * delta
    nan = value != value
    kept = same | (nan & (base != base))
    result = tl.where(kept, word, tl.where(nan, CANONICAL, _encoded(value, BASE)).to(word.dtype))
    tl.store(out_at + at, result, mask=inside)
    ends = tl.where(kept, ~(tl.abs(base) < float("inf")), ~(tl.abs(value) < limit)) & inside
    finite = (tl.abs(base) < float("inf")) & (tl.abs(tuned) < float("inf"))
    tl.atomic_add(counts_at, tl.sum((~same & inside).to(tl.int64)))
    tl.atomic_add(counts_at + 1, tl.sum(((result != word) & inside).to(tl.int64)))
    tl.atomic_add(counts_at + 2, tl.sum((ends & finite).to(tl.int64)))
    tl.atomic_add(counts_at + 3, tl.sum(ends.to(tl.int64)))


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, [rows, columns] float32, as ((0 + l₀·r₀) + l₁·r₁) + …, each operation rounded: the bits of the CPU.

    left: [rows, rank], right: [rank, columns], both float32 and contiguous by rows (right may be a slice of columns).
    """
    rows, columns = left.shape[0], right.shape[1]
    out = torch.empty((rows, columns), dtype=torch.float32, device=left.device)
    _product[(rows, triton.cdiv(columns, _STRIP))](
        left, right, out, columns, right.stride(0), RANK=left.shape[1], LENGTH=_STRIP, enable_fp_fusion=False
    )
    return out


@triton.jit
def _product(left_at, right_at, out_at, columns, stride, RANK: tl.constexpr, LENGTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """One strip of one row."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * LENGTH + tl.arange(0, LENGTH)
    inside = at < columns
    total = tl.zeros([LENGTH], tl.float32)
    for k in range(RANK):
        total = total + tl.load(left_at + row * RANK + k) * tl.load(right_at + k * stride + at, mask=inside, other=0)
    tl.store(out_at + row * columns + at, total, mask=inside)


@triton.jit
def _decoded(word, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stored words -> float32, exactly."""
    if KIND == "float32":
        return word.to(tl.float32, bitcast=True)
    if KIND == "float16":
        return word.to(tl.float16, bitcast=True).to(tl.float32)
    return (word.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _encoded(value, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 -> stored words, one rounding to nearest-even; a NaN comes out as any bits."""
    if KIND == "float32":
        return value.to(tl.int32, bitcast=True)
    if KIND == "float16":
        return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    bits = value.to(tl.uint32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int32)


def counts_on(device: Any) -> torch.Tensor:
    """Four zeros for `edit` to count in."""
    return torch.zeros(4, dtype=torch.int64, device=device)
