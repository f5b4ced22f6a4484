"""The compiled kernel gives the bits and the counts of the numpy kernel, in every combination of dtypes it takes."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from taskvec.checkpoint.header import StoredTensor
from taskvec.delta.source import DenseDelta, ScaledDelta
from taskvec.run import native
from taskvec.run.jobs import Job, Term, Tile
from taskvec.run.kernel import NumpyKernel

from .reference import UNSIGNED, specials, unsigned

needs_library = pytest.mark.skipif(native._library() is None, reason="native.c was not compiled with this installation")
DTYPES = ("F32", "F16", "BF16")
COUNT = 5000  # several blocks of native.c, and a part of one


def stored(name: str, dtype: str) -> StoredTensor:
    return StoredTensor(name, dtype, (COUNT,), Path(name), 0, COUNT * np.dtype(unsigned(dtype)).itemsize)


def bits(dtype: str, seed: int) -> np.ndarray:
    """Random bit patterns, ordinary weights and every special value, as bytes."""
    generator, kind = np.random.default_rng(seed), unsigned(dtype)
    words = generator.integers(0, np.iinfo(kind).max, COUNT, kind, endpoint=True)
    special = specials(dtype)
    places = generator.permutation(COUNT)[: COUNT // 2]
    words[places] = special[generator.integers(0, len(special), len(places))]
    return words.view(np.uint8)


def job(dtypes: tuple[str, ...], alphas: tuple[float, ...]) -> tuple[Job, dict[StoredTensor, np.ndarray]]:
    """base and out dtype, then one tuned and one origin dtype per term; every third element of tuned equals its origin."""
    base, out = stored("base", dtypes[0]), dtypes[1]
    raw = {base: bits(dtypes[0], 0)}
    terms = []
    for place, alpha in enumerate(alphas):
        tuned, origin = stored(f"tuned{place}", dtypes[2]), base if place == 0 else stored("origin", dtypes[3])
        raw.setdefault(origin, bits(origin.dtype, 7))
        raw[tuned] = bits(tuned.dtype, place + 1)
        if tuned.dtype == origin.dtype:
            width = np.dtype(unsigned(tuned.dtype)).itemsize
            raw[tuned].view(UNSIGNED[width])[::3] = raw[origin].view(UNSIGNED[width])[::3]
        terms.append(Term(alpha, DenseDelta(tuned, origin)))
    nbytes = COUNT * np.dtype(unsigned(out)).itemsize
    return Job("base", out, (COUNT,), 0, nbytes, base, tuple(terms)), raw


def assert_equal(case: Job, raw: dict[StoredTensor, np.ndarray]) -> None:
    tile = Tile(0, COUNT, 0, 1, 0, COUNT)
    expected, expected_counts = NumpyKernel(lambda tensor: raw[tensor]).edit(case, tile, raw)
    found, counts = native.NativeKernel(lambda tensor: raw[tensor]).edit(case, tile, raw)
    assert counts == expected_counts
    assert found.tobytes() == expected.tobytes()


@needs_library
@pytest.mark.parametrize("dtypes", list(product(DTYPES, repeat=4)), ids="-".join)
@pytest.mark.parametrize("alphas", [(0.3,), (-1.7,), (0.3, -0.9)], ids=str)
def test_the_compiled_kernel_gives_the_bits_of_numpy(dtypes: tuple[str, ...], alphas: tuple[float, ...]) -> None:
    assert_equal(*job(dtypes, alphas))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stored_difference_gives_the_bits_of_numpy(dtype: str) -> None:
    case, raw = job((dtype, dtype, dtype, dtype), (0.5,))
    value = stored("value", "F32")
    numbers = np.random.default_rng(3).standard_normal(COUNT).astype(np.float32)
    numbers[::4] = 0
    raw[value] = numbers.view(np.uint8)
    assert_equal(case._replace(terms=(*case.terms, Term(-0.25, ScaledDelta(value, 1.5)))), raw)


@needs_library
@pytest.mark.parametrize("base", DTYPES)
@pytest.mark.parametrize("out", DTYPES)
def test_a_cast_without_terms_gives_the_bits_of_numpy(base: str, out: str) -> None:
    case, raw = job((base, out, base, base), ())
    assert_equal(case, raw)


def test_without_the_library_the_cpu_kernel_is_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: None)
    assert type(native.cpu_kernel(lambda tensor: np.empty(0, np.uint8))) is NumpyKernel


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_ABI", -1)
    native._library.cache_clear()
    try:
        assert native._library() is None
    finally:
        native._library.cache_clear()


@needs_library
@pytest.mark.parametrize("rank", [1, 3, 8, 13, 64])
@pytest.mark.parametrize("columns", [1, 511, 512, 1300])
def test_products_have_the_bits_of_numpy_and_of_sums_in_order(rank: int, columns: int) -> None:
    generator = np.random.default_rng(rank)
    left = generator.standard_normal((7, rank)).astype(np.float32)
    wide = generator.standard_normal((rank, columns + 9)).astype(np.float32)
    right = wide[:, 4 : 4 + columns]  # a slice of columns, as a tile takes it
    found, by_numpy = np.empty((7, columns), np.float32), np.empty((7, columns), np.float32)
    native.NativeKernel(lambda tensor: wide)._multiply(left, right, found)
    NumpyKernel(lambda tensor: wide)._multiply(left, right, by_numpy)
    expected = np.zeros((7, columns))
    for k in range(rank):  # float64 holds each product exactly, and its sum is rounded to float32 once
        product = (left[:, k, None].astype(np.float64) * right[k]).astype(np.float32)
        expected = (expected + product).astype(np.float32).astype(np.float64)
    assert found.tobytes() == by_numpy.tobytes() == expected.astype(np.float32).tobytes()
