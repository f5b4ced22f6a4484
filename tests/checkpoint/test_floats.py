from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from taskvec.checkpoint.floats import FORMATS, canonical_nan, decode, encode, reaches

from ..run.reference import CANONICAL, DTYPES, GRIDS, TYPES, Stored, numbers, rounded, specials, unsigned

SMALL = ("BF16", "F16", "F8_E4M3", "F8_E5M2")
FLOAT8 = ("F8_E4M3", "F8_E5M2")


def encoded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """The words of `values`, with the kernel's promise that NaNs are someone else's business."""
    raw = np.full(len(values) * np.dtype(TYPES[dtype]).itemsize, 0xAA, np.uint8)
    with np.errstate(all="ignore"):
        encode(values.copy(), dtype, raw, np.empty(len(values), np.uint32))
    return raw.view(unsigned(dtype))


def decoded(words: NDArray[Any], dtype: str, kind: type = np.float32) -> NDArray[Any]:
    with np.errstate(all="ignore"):
        return decode(words.view(np.uint8), dtype, np.full(len(words), 77, kind))


def every_word(dtype: str) -> NDArray[Any]:
    kind = unsigned(dtype)
    return np.arange(np.iinfo(kind).max + 1, dtype=np.uint32).astype(kind)


def magnitudes(dtype: str) -> NDArray[Any]:
    """The words of all finite numbers ≥ 0, in order; one more word is what the largest overflows to."""
    words = every_word(dtype)
    finite = np.isfinite(numbers(Stored(dtype, words)))
    return words[finite & (words < len(words) // 2)]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", SMALL)
def test_every_bit_pattern_decodes_to_the_value_ml_dtypes_gives_it(dtype: str, kind: type) -> None:
    words = every_word(dtype)
    found = decoded(words, dtype, kind)
    with np.errstate(invalid="ignore"):
        expected = numbers(Stored(dtype, words)).astype(kind)
    assert found.dtype == kind
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    real = ~np.isnan(expected)
    assert np.array_equal(found[real], expected[real])
    assert np.array_equal(np.signbit(found[real]), np.signbit(expected[real]))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", SMALL)
def test_every_number_survives_decoding_and_encoding(dtype: str, kind: type) -> None:
    words = every_word(dtype)
    words = words[~np.isnan(numbers(Stored(dtype, words)))]
    assert np.array_equal(encoded(decoded(words, dtype, kind), dtype), words)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", SMALL)
def test_every_tie_goes_to_the_even_neighbour_and_its_neighbours_to_the_near_one(dtype: str, sign: int, kind: type) -> None:
    below = magnitudes(dtype)
    above = below + below.dtype.type(1)
    low = numbers(Stored(dtype, below))
    high = np.append(low[1:], 2 * low[-1] - low[-2])  # beyond the largest: the number the format would have next
    middle = ((low + high) / 2).astype(kind)
    assert np.array_equal(middle, (low + high) / 2)
    top = 1 << (below.dtype.itemsize * 8 - 1) if sign < 0 else 0
    even = np.where(below % 2 == 0, below, above) | top
    assert np.array_equal(encoded(sign * middle, dtype), even)
    assert np.array_equal(encoded(sign * np.nextafter(middle, kind(0)), dtype), below | top)
    assert np.array_equal(encoded(sign * np.nextafter(middle, kind(np.inf)), dtype), above | top)


def test_encoding_float64_to_bfloat16_rounds_once_and_not_by_way_of_float32() -> None:
    value = np.array([1 + 2.0**-8 + 2.0**-40, -(1 + 3 * 2.0**-8 - 2.0**-40)])
    twice = value.astype(np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert encoded(value, "BF16").tolist() == [0x3F81, 0xBF81]
    assert twice.tolist() == [0x3F80, 0xBF82]


@pytest.mark.parametrize("dtype", SMALL)
def test_encoding_random_float32_agrees_with_ml_dtypes(dtype: str) -> None:
    rng = np.random.default_rng(5)
    anything = rng.integers(0, 2**32, 300_000, np.uint64).astype(np.uint32).view(np.float32)
    _, smallest, largest = GRIDS[dtype]
    near = np.exp2(rng.uniform(smallest - 12, np.log2(largest) + 2, 300_000)) * rng.choice([-1, 1], 300_000)
    with np.errstate(over="ignore"):
        values = np.concatenate([anything, near.astype(np.float32)])
    values = values[~np.isnan(values)]
    with np.errstate(all="ignore"):
        expected = values.astype(TYPES[dtype]).view(unsigned(dtype))
    assert np.array_equal(encoded(values, dtype), expected)


@pytest.mark.parametrize("dtype", [*SMALL, "F32"])
def test_encoding_random_float64_is_one_rounding(dtype: str) -> None:
    rng = np.random.default_rng(6)
    anything = rng.integers(0, 2**64, 200_000, np.uint64).view(np.float64)
    _, smallest, largest = GRIDS[dtype]
    near = np.exp2(rng.uniform(smallest - 26, np.log2(largest) + 2, 200_000)) * rng.choice([-1, 1], 200_000)
    values = np.concatenate([anything, near])
    values = values[~np.isnan(values)]
    assert np.array_equal(encoded(values, dtype), rounded(values, dtype))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinities_and_the_largest_numbers_overflow_to_inf_and_in_e4m3_to_nan(dtype: str, kind: type) -> None:
    largest = np.finfo(kind).max
    values = np.array([np.inf, -np.inf, largest, -largest], kind)
    if dtype == "F8_E4M3":
        expected = np.array([0x7F, 0xFF, 0x7F, 0xFF])
    else:
        with np.errstate(over="ignore"):
            expected = values.astype(TYPES[dtype]).view(unsigned(dtype))
    assert np.array_equal(encoded(values, dtype), expected)


def test_no_power_of_two_of_float64_comes_out_of_bfloat16_as_nan() -> None:
    values = np.array([sign * 2.0**exponent for exponent in range(-1074, 1024) for sign in (1, -1)])
    assert np.array_equal(encoded(values, "BF16"), rounded(values, "BF16"))


def test_float64_decodes_to_float32_by_one_rounding() -> None:
    rng = np.random.default_rng(7)
    words = np.concatenate([rng.integers(0, 2**64, 100_000, np.uint64), specials("F64")])
    wide = numbers(Stored("F64", words))
    found, expected = decoded(words, "F64"), rounded(wide, "F32").view(np.float32)
    real = ~np.isnan(wide)
    assert np.array_equal(found[real].view(np.uint32), expected[real].view(np.uint32))
    assert np.isnan(found[~real]).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reaches_is_true_exactly_when_a_magnitude_overflows_or_is_nan(dtype: str, kind: type) -> None:
    limit = FORMATS[dtype].overflow
    with np.errstate(over="ignore"):
        edge = kind(limit)
    below = np.nextafter(edge, kind(0))
    calm = np.array([0.0, -0.0, 1.0, below, -below], kind)
    assert not reaches(calm, limit)
    for loud in (edge, -edge, kind(np.inf), kind(-np.inf), kind(np.nan), -kind(np.nan)):
        assert reaches(np.append(calm, loud).astype(kind), limit)
        assert reaches(np.append(-calm, loud).astype(kind), limit)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_overflow_limit_is_the_least_float32_that_rounds_out_of_range(dtype: str) -> None:
    with np.errstate(over="ignore"):
        limit = np.float32(FORMATS[dtype].overflow)
    around = np.array([np.nextafter(limit, np.float32(0)), limit], np.float64)
    finite = np.isfinite(numbers(Stored(dtype, rounded(around, dtype))))
    assert finite.tolist() == [True, False]


def test_no_float_reaches_anything_in_an_empty_tile() -> None:
    assert not reaches(np.empty(0, np.float32), 0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_canonical_nan_is_the_quiet_positive_one_without_payload(dtype: str) -> None:
    word = canonical_nan(dtype)
    assert word == CANONICAL[dtype]
    assert np.isnan(numbers(Stored(dtype, np.array([word]))))[0]
