"""The golden case by exact fractions: no numpy, no ml_dtypes, nothing of taskvec. `python -m tests.golden.exact` prints what
test_golden.py has written down.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import NamedTuple

ALPHA = 0.7


class Form(NamedTuple):
    """A binary float format: bits of exponent and mantissa, and the struct-like width in bytes."""

    exponent: int
    mantissa: int
    width: int

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def infinity(self) -> int:
        return ((1 << self.exponent) - 1) << self.mantissa


FORMS = {"F32": Form(8, 23, 4), "F16": Form(5, 10, 2), "BF16": Form(8, 7, 2)}
SINGLE = FORMS["F32"]
# name, dtype, shape, in the order of the file; the I64 tensor is copied
TENSORS = (("ids", "I64", (2,)), ("norm", "F32", (5,)), ("half", "F16", (2, 3)), ("brain", "BF16", (4, 4)))


def inputs(name: str) -> tuple[list[int], list[int]]:
    """The words of base and tuned: a multiplicative hash of the place, near each other; then special values by hand."""
    base, tuned = [], []
    dtype, shape = next((dtype, shape) for known, dtype, shape in TENSORS if known == name)
    for place in range(shape[0] * (shape[1] if len(shape) > 1 else 1)):
        hashed = (place * 2654435761 + len(name) * 40503 + 12345) % 2**32
        if dtype == "I64":
            base.append(hashed)
            tuned.append(hashed + 1)
            continue
        form = FORMS[dtype]
        one, spread = form.bias << form.mantissa, 1 << (form.mantissa + 2)  # from 1/16 to 1
        word = one - spread + hashed % spread
        sign = (hashed >> 31) << (8 * form.width - 1)
        base.append(word | sign)
        tuned.append((word + (hashed >> 8) % (1 << (form.mantissa - 1))) | sign)
    if name == "brain":
        base[:4], tuned[:4] = [0x8000, 0x7F81, 0xFF80, 0x7F7F], [0x8000, 0x7F81, 0xFF80, 0xFF7F]
    return base, tuned


def value(word: int, form: Form) -> Fraction:
    exponent, fraction = (word & (form.infinity | (1 << form.mantissa) - 1)) >> form.mantissa, word & (1 << form.mantissa) - 1
    significand = fraction if exponent == 0 else fraction + (1 << form.mantissa)
    magnitude = significand * Fraction(2) ** (max(exponent, 1) - form.bias - form.mantissa)
    return -magnitude if word >> (8 * form.width - 1) else magnitude


def nearest(number: Fraction, form: Form) -> tuple[Fraction, int]:
    """`number` rounded to nearest-even, as a number and as a word. Not for results of zero, whose sign is lost here."""
    magnitude, exponent = abs(number), 0
    while magnitude >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while magnitude < Fraction(2) ** exponent and exponent > 1 - form.bias:
        exponent -= 1
    step = Fraction(2) ** (exponent - form.mantissa)
    count = round(magnitude / step)  # of a Fraction: ties to even
    sign = 1 if number < 0 else 0
    word = count + ((exponent + form.bias - 1) << form.mantissa)
    word = min(word, form.infinity) | sign << (8 * form.width - 1)
    return (-1 if sign else 1) * count * step, word


def edit(base: int, tuned: int, form: Form) -> int:
    """base − α·(tuned − base), every operation rounded to float32, the last into `form`."""
    if base == tuned:
        return base
    delta = nearest(value(tuned, form) - value(base, form), SINGLE)[0]
    scaled = nearest(nearest(Fraction(ALPHA), SINGLE)[0] * delta, SINGLE)[0]
    return nearest(nearest(value(base, form) - scaled, SINGLE)[0], form)[1]


def stored(words: list[int], dtype: str) -> bytes:
    width = 8 if dtype == "I64" else FORMS[dtype].width
    return b"".join(word.to_bytes(width, "little") for word in words)


def edited(name: str, dtype: str) -> bytes:
    base, tuned = inputs(name)
    words = base if dtype == "I64" else [edit(b, t, FORMS[dtype]) for b, t in zip(base, tuned)]
    return stored(words, dtype)


def file(header: str, data: list[bytes]) -> bytes:
    """A safetensors file: 8 bytes of length, the header, the data."""
    return len(header).to_bytes(8, "little") + header.encode() + b"".join(data)


if __name__ == "__main__":
    for name, dtype, _ in TENSORS:
        print(name, edited(name, dtype).hex())
    print(hashlib.sha256(b"".join(edited(name, dtype) for name, dtype, _ in TENSORS)).hexdigest())
