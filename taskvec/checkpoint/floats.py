"""Stored floats to float32/float64 and back in numpy, each by one rounding to nearest-even, without the formula.

numpy has no bfloat16 or float8, and casts float16 one number at a time; so the bits are moved here, in whole-array operations
on buffers the caller owns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .header import DTYPE_BITS

Raw = NDArray[np.uint8]  # [elements * itemsize], bytes as they are in the file
Floats = NDArray[Any]  # [elements], float32 or float64


class Format(NamedTuple):
    """A binary float format: explicit mantissa bits, smallest normal exponent, exponent bias; values ≥ `overflow` in
    magnitude leave its range (IEEE 754: half an ulp above the largest number), `clip` packs to what they become."""

    mantissa: int
    smallest: int
    bias: int
    overflow: float
    clip: float


FORMATS = {
    "F64": Format(52, -1022, 1023, np.inf, np.inf),
    "F32": Format(23, -126, 127, (2 - 2**-24) * 2.0**127, np.inf),
    "BF16": Format(7, -126, 127, (2 - 2**-8) * 2.0**127, 2.0**128),  # float32's inf
    "F16": Format(10, -14, 15, 65520.0, 65536.0),
    "F8_E5M2": Format(2, -14, 15, 61440.0, 65536.0),
    "F8_E4M3": Format(3, -6, 7, float(np.nextafter(np.float32(464), np.float32(np.inf))), 480.0),  # no inf: NaN
}
INTEGERS = {
    "I8": np.int8,
    "U8": np.uint8,
    "I16": np.int16,
    "I32": np.int32,
    "I64": np.int64,
    "BOOL": np.bool_,
}  # what indices come in
_CANONICAL_NAN = {
    "F64": (np.uint64, 0x7FF8 << 48), "F32": (np.uint32, 0x7FC00000), "BF16": (np.uint16, 0x7FC0),
    "F16": (np.uint16, 0x7E00), "F8_E5M2": (np.uint8, 0x7E), "F8_E4M3": (np.uint8, 0x7F),
}  # fmt: skip
_WORDS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def words(raw: Raw, dtype: str) -> NDArray[Any]:
    """The bytes as unsigned integers of the dtype's width: equal words are equal bits."""
    return raw.view(_WORDS[DTYPE_BITS[dtype]])


def canonical_nan(dtype: str) -> Any:
    """The one NaN the arithmetic makes in `dtype`, as an unsigned integer: devices disagree on payloads."""
    kind, bits = _CANONICAL_NAN[dtype]
    return kind(bits)


def decode(raw: Raw, dtype: str, out: Floats) -> Floats:
    """Stored `dtype` -> `out` (float32 or float64). Exact, but for F64 into float32, which is one rounding."""
    if dtype in ("F32", "F64"):
        np.copyto(out, raw.view(np.float32 if dtype == "F32" else np.float64), casting="same_kind")
    elif out.dtype == np.float64:
        np.copyto(out, decode(raw, dtype, np.empty(len(out), np.float32)))
    elif dtype == "BF16":
        bits = out.view(np.uint32)
        np.copyto(bits, raw.view(np.uint16))
        np.left_shift(bits, np.uint32(16), out=bits)
    elif dtype == "F16":
        _decode_half(raw.view(np.int16), out)
    else:
        np.take(_FLOAT8[dtype], raw, out=out, mode="clip")
    return out


def encode(values: Floats, dtype: str, raw: Raw, work: NDArray[np.uint32]) -> None:
    """`values` -> stored `dtype`, one rounding to nearest-even. Destroys `values`; `work` is scratch, [elements].

    What overflows becomes inf (NaN in F8_E4M3, which has no inf). NaNs come out as any bits: the caller repairs them.
    """
    if dtype in ("F32", "F64"):
        np.copyto(raw.view(np.float32 if dtype == "F32" else np.float64), values, casting="same_kind")
    elif dtype == "BF16" and values.dtype == np.float32:
        bits = values.view(np.uint32)
        np.right_shift(bits, np.uint32(16), out=work)
        np.bitwise_and(work, np.uint32(1), out=work)
        np.add(work, np.uint32(0x7FFF), out=work)  # ties to even: half an ulp, less one unless the last bit is set
        np.add(bits, work, out=bits)
        np.right_shift(bits, np.uint32(16), out=bits)
        np.copyto(raw.view(np.uint16), bits, casting="unsafe")
    else:
        _encode_small(values, dtype, raw, work)


def reaches(values: Floats, limit: float) -> bool:
    """Whether any |value| ≥ limit, or is NaN: two passes over the bits, no temporary."""
    if len(values) == 0:
        return False
    unsigned, signed = (np.uint32, np.int32) if values.dtype == np.float32 else (np.uint64, np.int64)
    with np.errstate(over="ignore"):  # a limit beyond float32 is its inf
        least = int(np.array(limit).astype(values.dtype).view(unsigned))
    sign = 1 << (values.dtype.itemsize * 8 - 1)
    return int(values.view(signed).max()) >= least or int(values.view(unsigned).max()) >= sign + least


def _decode_half(stored: NDArray[np.int16], out: Floats) -> None:
    # sign-extended and shifted, sign, exponent and mantissa lie where float32 wants them, the exponent 112 too small
    bits = out.view(np.int32)
    np.copyto(bits, stored)
    np.left_shift(bits, np.int32(13), out=bits)
    np.bitwise_and(bits, np.int32(-0x70002000), out=bits)
    np.multiply(out, np.float32(2.0**112), out=out)
    if reaches(out, 65536.0):  # inf and NaN have come out as numbers from 65536 on
        np.copyto(out, stored.view(np.float16))


def _encode_small(values: Floats, dtype: str, raw: Raw, work: NDArray[np.uint32]) -> None:
    form = FORMATS[dtype]
    negative = np.signbit(values)
    np.absolute(values, out=values)
    np.minimum(values, values.dtype.type(form.clip), out=values)
    _round_to_grid(values, form)
    exact = values if values.dtype == np.float32 else values.astype(np.float32)
    if form.bias != 127:
        np.multiply(exact, np.float32(2.0 ** (form.bias - 127)), out=exact)
    np.right_shift(exact.view(np.uint32), np.uint32(23 - form.mantissa), out=work)
    width = DTYPE_BITS[dtype]
    np.left_shift(negative, np.uint32(width - 1), out=exact.view(np.uint32), dtype=np.uint32)
    np.bitwise_or(work, exact.view(np.uint32), out=work)
    np.copyto(words(raw, dtype), work, casting="unsafe")


def _round_to_grid(magnitudes: Floats, form: Format) -> None:
    """Round to `form`'s numbers in place: adding 2^(e + m − p) and taking it away rounds at bit p, ties to even.

    e is the value's own exponent (at least the smallest normal one, below which the grid is that of subnormals), m the
    mantissa bits of the array, p those of the format.
    """
    single = magnitudes.dtype == np.float32
    kind, bits, bias = (np.uint32, 23, 127) if single else (np.uint64, 52, 1023)
    magic = np.bitwise_and(magnitudes.view(kind), kind(((1 << (31 - bits if single else 63 - bits)) - 1) << bits))
    np.maximum(magic, kind((form.smallest + bias) << bits), out=magic)
    np.add(magic, kind((bits - form.mantissa) << bits), out=magic)
    np.add(magnitudes, magic.view(magnitudes.dtype), out=magnitudes)
    np.subtract(magnitudes, magic.view(magnitudes.dtype), out=magnitudes)


def _float8_table(dtype: str) -> NDArray[np.float32]:
    form, codes = FORMATS[dtype], np.arange(256)
    exponent, mantissa = (codes & 0x7F) >> form.mantissa, codes & ((1 << form.mantissa) - 1)
    fraction = mantissa / (1 << form.mantissa)
    values = np.where(
        exponent == 0, fraction * 2.0**form.smallest, (1 + fraction) * np.exp2(exponent.astype(float) - form.bias)
    )
    if dtype == "F8_E4M3":
        values[(codes & 0x7F) == 0x7F] = np.nan
    else:
        values[exponent == 31] = np.where(mantissa[exponent == 31] == 0, np.inf, np.nan)
    return np.where(codes & 0x80, -values, values).astype(np.float32)


_FLOAT8 = {dtype: _float8_table(dtype) for dtype in ("F8_E4M3", "F8_E5M2")}
