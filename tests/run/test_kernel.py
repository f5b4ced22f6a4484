from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import numpy as np
import pytest

from taskvec.delta.source import DenseDelta, LowRankDelta, ScaledDelta
from taskvec.run import jobs
from taskvec.run.jobs import Term
from taskvec.run.kernel import Counts

from .checkpoints import MakeKernel, Memory, edit_dense, make_job, run_job
from .reference import DTYPES, Change, Outcome, Stored, Words, edit, numbers, pairs, rounded, specials, ulp, unsigned

ALPHAS = (0.3, -0.3, 1.0, 0.0, 3.0, 1e-3, 1e-42)
OUTS = ("F64", "F32", "F16", "BF16")  # what --out-dtype offers


def of(dtype: str, values: Sequence[float]) -> Stored:
    return Stored(dtype, rounded(np.array(values, np.float64), dtype))


def bits(dtype: str, words: Sequence[int]) -> Stored:
    return Stored(dtype, np.array(words, np.uint64).astype(unsigned(dtype)))


def shuffled(stored: Stored, seed: int) -> Stored:
    return Stored(stored.dtype, np.random.default_rng(seed).permutation(stored.words))


def check(kernel: MakeKernel, base: Stored, changes: Sequence[Change], out: str) -> None:
    """The kernel gives the bits and the counts of the independent formula."""
    words, counts = edit_dense(kernel, base, changes, out)
    expected = edit(base, changes, out)
    wrong = np.flatnonzero(words != expected.words)
    assert len(wrong) == 0, f"{len(wrong)} wrong, first at {wrong[0]}: {words[wrong[0]]:x}, not {expected.words[wrong[0]]:x}"
    assert outcome(words, counts) == expected._replace(words=words)


def outcome(words: Words, counts: Counts) -> Outcome:
    return Outcome(words, counts.intended, counts.changed, counts.overflow, counts.nonfinite)


# the formula, in every dtype


@pytest.mark.parametrize("tuned", DTYPES)
@pytest.mark.parametrize("base", DTYPES)
def test_an_edit_is_the_formula_bit_for_bit(kernel: MakeKernel, base: str, tuned: str) -> None:
    left, right = (Stored(dtype, words) for dtype, words in zip((base, tuned), pairs(base, tuned, 700, 1)))
    for out in dict.fromkeys([base, *OUTS]):
        for alpha in ALPHAS:
            check(kernel, left, [Change(alpha, right, left)], out)


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("base", DTYPES)
def test_the_vector_may_come_from_another_origin(kernel: MakeKernel, base: str, other: str) -> None:
    left, right = (Stored(dtype, words) for dtype, words in zip((base, other), pairs(base, other, 500, 2)))
    origin = shuffled(right, 3)
    half = np.random.default_rng(4).random(len(origin.words)) < 0.5
    tuned = Stored(other, np.where(half, origin.words, right.words))
    for alpha in (0.7, -0.7, 2.0):
        check(kernel, left, [Change(alpha, tuned, origin)], base)
        check(kernel, left, [Change(alpha, right, shuffled(left, 5))], base)  # origin of the dtype of base


@pytest.mark.parametrize("other", DTYPES)
@pytest.mark.parametrize("base", DTYPES)
def test_several_vectors_accumulate_in_the_order_written(kernel: MakeKernel, base: str, other: str) -> None:
    left, right = (Stored(dtype, words) for dtype, words in zip((base, other), pairs(base, other, 500, 6)))
    a, b = Change(0.3, right, left), Change(-1.5, shuffled(right, 7), shuffled(right, 8))
    check(kernel, left, [a, b], base)
    check(kernel, left, [b, a, Change(0.5, right, left)], base)


def test_the_order_of_vectors_shows_in_the_bits(kernel: MakeKernel) -> None:
    base, big, small = of("F32", [1.0]), of("F32", [2.0**24]), of("F32", [1.0 + 2.0**-10])
    changes = [Change(1.0, big, base), Change(-1.0, big, base), Change(1.0, small, base)]
    first, last = edit_dense(kernel, base, changes, "F32")[0], edit_dense(kernel, base, changes[::-1], "F32")[0]
    assert numbers(Stored("F32", first)).tolist() == [1 - 2.0**-10]
    assert numbers(Stored("F32", last)).tolist() != numbers(Stored("F32", first)).tolist()


def test_the_arithmetic_agrees_with_exact_fractions(kernel: MakeKernel) -> None:
    rng = np.random.default_rng(9)
    for dtype, kind in (("F32", np.float32), ("F64", np.float64)):
        b = rng.standard_normal(300).astype(kind)
        t = (b + rng.standard_normal(300).astype(kind) * kind(0.01)).astype(kind)
        base, tuned = (Stored(dtype, values.view(unsigned(dtype))) for values in (b, t))
        words, _ = edit_dense(kernel, base, [Change(0.3, tuned, base)], dtype)
        assert words.view(kind).tolist() == [exact(float(x), float(y), 0.3, dtype) for x, y in zip(b, t)]


def exact(b: float, t: float, alpha: float, dtype: str) -> float:
    """The formula on exact fractions, rounded after each operation. float(Fraction) rounds correctly; to float32, by hand."""

    def near(value: Fraction) -> Fraction:
        if dtype == "F64" or value == 0:
            return Fraction(float(value))
        exponent = value.numerator.bit_length() - value.denominator.bit_length()
        exponent -= abs(value) < Fraction(2) ** exponent
        step = Fraction(2) ** (max(exponent, -126) - 23)
        return round(value / step) * step  # round() of a Fraction goes to even

    scaled = near(near(Fraction(alpha)) * near(Fraction(t) - Fraction(b)))
    return float(near(Fraction(b) - scaled))


# the same with the tempting shortcuts, to show that the data above tells them apart


@pytest.mark.parametrize("shortcut", ["fused", "alpha in float64", "bfloat16 intermediate", "lerp"])
def test_the_shortcuts_would_give_other_bits(kernel: MakeKernel, shortcut: str) -> None:
    b, t = (numbers(Stored("BF16", words)) for words in pairs("BF16", "BF16", 200_000, 10))
    with np.errstate(all="ignore"):
        delta, alpha = t - b, float(np.float32(0.7))  # exact in float64 where it matters
        result = {
            "fused": b - alpha * delta,
            "alpha in float64": near32(b - near32(0.7 * delta)),
            "bfloat16 intermediate": near32(b - near32(alpha * numbers(Stored("BF16", rounded(delta, "BF16"))))),
            "lerp": near32(t - near32((t - b) * near32(np.array([1 + alpha])))),
        }[shortcut]
    base, tuned = (Stored("BF16", rounded(values, "BF16")) for values in (b, t))
    ours, _ = edit_dense(kernel, base, [Change(0.7, tuned, base)], "F32")
    real = np.isfinite(result) & np.isfinite(numbers(Stored("F32", ours)))
    assert np.count_nonzero(rounded(result, "F32")[real] != ours[real]) > 10


def near32(values: np.ndarray) -> np.ndarray:
    return numbers(Stored("F32", rounded(values, "F32")))


def test_float64_to_bfloat16_is_one_rounding(kernel: MakeKernel) -> None:
    base, tuned = of("F64", [1 + 2.0**-8]), of("F64", [1 + 2.0**-8 - 2.0**-40])
    words, _ = edit_dense(kernel, base, [Change(1.0, tuned, base)], "BF16")
    assert words.tolist() == [0x3F81]  # float32 in between would hit the tie, and go down to 0x3F80


def test_alpha_is_a_float32_for_float32_tensors_and_a_float64_for_float64_ones(kernel: MakeKernel) -> None:
    for dtype, alpha in (("F32", float(np.float32(0.1))), ("F64", 0.1)):
        base, tuned = of(dtype, [0.0]), of(dtype, [1.0])
        words, _ = edit_dense(kernel, base, [Change(0.1, tuned, base)], dtype)
        assert numbers(Stored(dtype, words)).tolist() == [-alpha]


def test_the_minus_sign_is_there(kernel: MakeKernel) -> None:
    base, tuned = of("F32", [10.0]), of("F32", [14.0])
    assert numbers(Stored("F32", edit_dense(kernel, base, [Change(0.5, tuned, base)], "F32")[0])).tolist() == [8.0]
    assert numbers(Stored("F32", edit_dense(kernel, base, [Change(-0.5, tuned, base)], "F32")[0])).tolist() == [12.0]


# what does not change keeps its bits


def quiet(dtype: str) -> Words:
    """The finite ones of the special values: a tile with nothing to repair."""
    words = specials(dtype)
    return words[np.isfinite(numbers(Stored(dtype, words)))]


@pytest.mark.parametrize("values", [quiet, specials])
@pytest.mark.parametrize("alpha", [0.3, -0.3, 1.0, -1.0, 1e30, -1e-42])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_element_that_tuned_leaves_alone_keeps_its_bits(
    kernel: MakeKernel, dtype: str, alpha: float, values: Callable[[str], Words]
) -> None:
    base = Stored(dtype, values(dtype))
    words, counts = edit_dense(kernel, base, [Change(alpha, Stored(dtype, base.words.copy()), base)], dtype)
    assert np.array_equal(words, base.words)
    assert (counts.intended, counts.changed, counts.overflow) == (0, 0, 0)


@pytest.mark.parametrize("alpha", [0.3, -0.3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_does_so_too_among_elements_that_change(kernel: MakeKernel, dtype: str, alpha: float) -> None:
    base = Stored(dtype, np.concatenate([specials(dtype), of(dtype, [1.0] * 20).words]))
    tuned = Stored(dtype, np.concatenate([specials(dtype), of(dtype, [np.nan] * 10 + [2.0] * 10).words]))
    words, counts = edit_dense(kernel, base, [Change(alpha, tuned, base)], dtype)
    assert np.array_equal(words[:-20], specials(dtype))
    assert counts.intended == counts.changed == 20


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_of_base_keeps_its_payload_whatever_tuned_says(kernel: MakeKernel, dtype: str) -> None:
    words = specials(dtype)
    nans = words[np.isnan(numbers(Stored(dtype, words)))]
    base = Stored(dtype, nans)
    assert np.array_equal(edit_dense(kernel, base, [Change(0.5, of(dtype, [1.0] * len(nans)), base)], dtype)[0], nans)


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != "F8_E4M3"])
def test_inf_and_nan_on_one_side_only_follow_ieee_754_and_make_one_nan(kernel: MakeKernel, dtype: str) -> None:
    inf, nan = np.inf, np.nan
    base = of(dtype, [1.0, 1.0, 1.0, inf, inf, inf, -inf, -inf])
    tuned = of(dtype, [inf, -inf, nan, 1.0, -inf, nan, 1.0, inf])
    words, counts = edit_dense(kernel, base, [Change(0.5, tuned, base)], dtype)
    assert np.array_equal(words, of(dtype, [-inf, inf, nan, inf, inf, nan, -inf, -inf]).words)
    assert (counts.overflow, counts.nonfinite) == (0, 8)
    back, _ = edit_dense(kernel, base, [Change(-0.5, tuned, base)], dtype)
    assert np.array_equal(back, of(dtype, [inf, -inf, nan, nan, nan, nan, nan, nan]).words)


def test_a_vector_that_leaves_an_inf_alone_does_not_spoil_what_another_does_to_it(kernel: MakeKernel) -> None:
    base, same, other = of("BF16", [-np.inf, 1.0]), of("BF16", [-np.inf, 1.0]), of("BF16", [0.0, 2.0])
    changes = [Change(0.5, same, base), Change(0.5, other, base)]
    for order in (changes, changes[::-1]):
        assert np.array_equal(edit_dense(kernel, base, order, "BF16")[0], of("BF16", [-np.inf, 0.5]).words)


def test_minus_zero_survives_alpha_of_either_sign_and_a_zero_delta(kernel: MakeKernel) -> None:
    base, tuned = of("F32", [-0.0, -0.0, 0.0]), of("F32", [-0.0, 0.0, -0.0])
    for alpha in (0.5, -0.5):
        words, _ = edit_dense(kernel, base, [Change(alpha, tuned, base)], "F32")
        assert words[0] == 0x80000000
        check(kernel, base, [Change(alpha, tuned, base)], "F32")


# counts


def test_a_change_below_half_an_ulp_is_counted_as_lost(kernel: MakeKernel) -> None:
    base, tuned = of("BF16", [1.0] * 4), of("F32", [1.0, 1 + 2.0**-12, 1 + 2.0**-12, 2.0])
    _, counts = edit_dense(kernel, base, [Change(1.0, tuned, base)], "BF16")
    assert (counts.intended, counts.changed, counts.lost) == (3, 1, 2)


@pytest.mark.parametrize(
    ("dtype", "largest", "word"),
    [("F16", 65504.0, 0x7C00), ("BF16", 3.3895313892515355e38, 0x7F80), ("F8_E5M2", 57344.0, 0x7C), ("F8_E4M3", 448.0, 0x7F)],
)
def test_overflow_is_counted_and_never_saturates(kernel: MakeKernel, dtype: str, largest: float, word: int) -> None:
    base, tuned = of(dtype, [largest, 1.0, largest]), of(dtype, [largest / 2, 1.0, largest])
    words, counts = edit_dense(kernel, base, [Change(1.0, tuned, base)], dtype)
    assert words.tolist() == [word, *base.words[1:]]
    assert (counts.intended, counts.changed, counts.overflow, counts.nonfinite) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("dtype", "largest", "half"),
    [
        ("F16", 65504.0, 16.0),
        ("BF16", 3.3895313892515355e38, 2.0**119),
        ("F8_E5M2", 57344.0, 4096.0),
        ("F8_E4M3", 448.0, 16.5),
    ],
)
def test_overflow_begins_half_an_ulp_above_the_largest_number(
    kernel: MakeKernel, dtype: str, largest: float, half: float
) -> None:
    base = of(dtype, [largest, -largest, largest])
    tuned = of("F32", [largest - half, half - largest, largest - half * 0.96875])
    words, counts = edit_dense(kernel, base, [Change(1.0, tuned, base)], dtype)
    found = numbers(Stored(dtype, words))
    assert (np.isfinite(found).tolist(), found[2]) == ([False, False, True], largest)
    assert (counts.intended, counts.changed, counts.overflow, counts.nonfinite) == (3, 2, 2, 2)


def test_counts_add_up() -> None:
    total = Counts(10, 7, 1, 2, 3)
    total.add(Counts(5, 5, 0, 1, 1))
    assert (total, total.lost) == (Counts(15, 12, 1, 3, 4), 3)


# casts


@pytest.mark.parametrize("out", OUTS)
@pytest.mark.parametrize("base", DTYPES)
def test_a_tensor_without_vector_is_cast_by_one_rounding(kernel: MakeKernel, base: str, out: str) -> None:
    stored = Stored(base, pairs(base, base, 2000, 11)[1])
    if out == base:
        return
    words, counts = edit_dense(kernel, stored, [], out)
    assert np.array_equal(words, rounded(numbers(stored), out))
    assert outcome(words, counts) == edit(stored, [], out)._replace(words=words)
    assert counts.changed == 0


# shapes and tiles


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 3), (3, 0), (7,), (5, 3), (2, 129), (3, 4, 5), (1, 1000), (300, 1)])
def test_every_shape_and_every_tile_size_gives_the_same_bits(
    kernel: MakeKernel, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]
) -> None:
    count = int(np.prod(shape, dtype=int))
    base, tuned = (Stored("BF16", words[-count:] if count else words[:0]) for words in pairs("BF16", "BF16", 1000, 12))
    for out in ("BF16", "F64"):
        expected = edit(base, [Change(0.3, tuned, base)], out)
        for tile_bytes in (64, 256, 1 << 20):
            monkeypatch.setattr(jobs, "TILE_BYTES", tile_bytes)
            words, counts = edit_dense(kernel, base, [Change(0.3, tuned, base)], out, shape=shape)
            assert np.array_equal(words, expected.words)
            assert outcome(words, counts) == expected._replace(words=words)


@pytest.mark.parametrize(("shape", "dtype"), [((700_001,), "BF16"), ((2, 600_000), "BF16"), ((1, 140_000), "F64")])
def test_tensors_and_rows_larger_than_the_real_tile_are_edited_whole(
    kernel: MakeKernel, shape: tuple[int, ...], dtype: str
) -> None:
    base, tuned = (Stored(dtype, words[-int(np.prod(shape)) :]) for words in pairs(dtype, dtype, 1_300_000, 13))
    words, counts = edit_dense(kernel, base, [Change(0.3, tuned, base)], dtype, shape=shape)
    expected = edit(base, [Change(0.3, tuned, base)], dtype)
    assert np.array_equal(words, expected.words)
    assert outcome(words, counts) == expected._replace(words=words)


# low-rank and stored deltas

RANK, ROWS, COLUMNS = 8, 30, 50


class LowRank:
    """A job with base of `dtype` and Δ = scale · left @ right, and the same in float64."""

    def __init__(self, dtype: str, *, transposed: bool = False, factors: str = "F32", scale: float = 2.0) -> None:
        rng = np.random.default_rng(14)
        self.memory, self.dtype = Memory(), dtype
        left, right = (of(factors, rng.standard_normal(size).ravel() * 0.03) for size in ((ROWS, RANK), (RANK, COLUMNS)))
        self.delta = LowRankDelta(
            self.memory.store(left, (ROWS, RANK)), self.memory.store(right, (RANK, COLUMNS)), scale, transposed
        )
        down, up = numbers(left).reshape(ROWS, RANK), numbers(right).reshape(RANK, COLUMNS)
        product = scale * down @ up  # [out, in]
        self.product = product.T if transposed else product
        self.absolute = (scale * np.abs(down) @ np.abs(up)).ravel()
        self.values = of(dtype, rng.standard_normal(self.product.size) * 0.5)
        self.base = self.memory.store(self.values, self.product.shape)

    def expected(self, alpha: float) -> np.ndarray:
        return numbers(self.values) - alpha * self.product.ravel()

    def found(self, kernel: MakeKernel, alpha: float, out: str | None = None) -> tuple[np.ndarray, Counts]:
        job = make_job(self.base, [Term(alpha, self.delta)], out)
        words, counts = run_job(kernel, job, self.memory)
        return numbers(Stored(job.dtype, words)), counts


@pytest.mark.parametrize("tile_bytes", [64, 1 << 20])
@pytest.mark.parametrize("alpha", [0.7, -1.0, 3.0])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2"])
def test_a_low_rank_edit_is_within_an_ulp_of_float64(
    kernel: MakeKernel, monkeypatch: pytest.MonkeyPatch, dtype: str, transposed: bool, alpha: float, tile_bytes: int
) -> None:
    monkeypatch.setattr(jobs, "TILE_BYTES", tile_bytes)
    case = LowRank(dtype, transposed=transposed)
    found, counts = case.found(kernel, alpha)
    expected = case.expected(alpha)
    assert (np.abs(found - expected) <= ulp(expected, dtype)).all()
    assert counts.intended == found.size
    assert counts.changed == np.count_nonzero(found != numbers(case.values))


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_a_low_rank_edit_of_float32_and_float64_has_the_error_of_a_float32_product(kernel: MakeKernel, dtype: str) -> None:
    case = LowRank(dtype)
    found, expected = case.found(kernel, 0.7)[0], case.expected(0.7)
    error = RANK * 2.0**-24 * 0.7 * case.absolute  # of the sum of products: Higham 2002, section 3.1
    error += 2.0**-23 * 0.7 * np.abs(case.product).ravel()  # of α·s, and of the product's own last bit
    assert (np.abs(found - expected) <= error + ulp(expected, dtype)).all()
    assert np.count_nonzero(found != numbers(case.values)) == found.size


@pytest.mark.parametrize("factors", ["F16", "BF16", "F64"])
def test_factors_may_be_of_any_float_dtype(kernel: MakeKernel, factors: str) -> None:
    case = LowRank("BF16", factors=factors)
    expected = case.expected(0.7)
    assert (np.abs(case.found(kernel, 0.7)[0] - expected) <= ulp(expected, "BF16")).all()


def test_alpha_and_scale_are_one_float32_factor(kernel: MakeKernel) -> None:
    memory = Memory()
    left, right = memory.store(of("F32", [1.0]), (1, 1)), memory.store(of("F32", [1.0]), (1, 1))
    base = memory.store(of("F32", [0.0]), (1, 1))
    words, _ = run_job(kernel, make_job(base, [Term(0.1, LowRankDelta(left, right, 0.3))]), memory)
    assert numbers(Stored("F32", words)).tolist() == [-float(np.float32(0.1 * 0.3))]


def test_two_low_rank_vectors_and_a_dense_one_add_up(kernel: MakeKernel) -> None:
    case = LowRank("F32")
    tuned = of("F32", np.random.default_rng(15).standard_normal(case.product.size))
    dense = DenseDelta(case.memory.store(tuned, case.product.shape), case.base)
    terms = [Term(0.5, case.delta), Term(0.25, dense), Term(-1.0, case.delta)]
    words, _ = run_job(kernel, make_job(case.base, terms), case.memory)
    expected = case.expected(-0.5) - 0.25 * (numbers(tuned) - numbers(case.values))
    assert (np.abs(numbers(Stored("F32", words)) - expected) <= 3 * 2.0**-24 * (1 + np.abs(expected) * 2)).all()


@pytest.mark.parametrize("values", [quiet, specials])
@pytest.mark.parametrize("alpha", [0.7, -0.7])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_low_rank_delta_of_zero_keeps_every_bit_of_base(
    kernel: MakeKernel, dtype: str, alpha: float, values: Callable[[str], Words]
) -> None:
    memory, words = Memory(), values(dtype)
    left = memory.store(of("F32", [0.0] * len(words)), (len(words), 1))  # B is zero before training
    right = memory.store(of("F32", [1.0]), (1, 1))
    base = memory.store(Stored(dtype, words), (len(words), 1))
    found, counts = run_job(kernel, make_job(base, [Term(alpha, LowRankDelta(left, right, 2.0))]), memory)
    assert np.array_equal(found, words)
    assert (counts.intended, counts.changed) == (0, 0)


@pytest.mark.parametrize("alpha", [0.7, -0.7])
def test_a_low_rank_delta_leaves_nan_and_inf_of_base_as_they_are(kernel: MakeKernel, alpha: float) -> None:
    memory, words = Memory(), specials("BF16")
    ends = words[~np.isfinite(numbers(Stored("BF16", words)))]
    left, right = memory.store(of("F32", [1.0] * len(ends)), (len(ends), 1)), memory.store(of("F32", [1.0]), (1, 1))
    base = memory.store(Stored("BF16", ends), (len(ends), 1))
    found, counts = run_job(kernel, make_job(base, [Term(alpha, LowRankDelta(left, right, 2.0))]), memory)
    assert np.array_equal(found, ends)
    assert (counts.intended, counts.changed, counts.overflow, counts.nonfinite) == (len(ends), 0, 0, len(ends))


def test_a_product_beyond_float32_is_counted_as_overflow(kernel: MakeKernel) -> None:
    memory = Memory()
    left, right = memory.store(of("F32", [1e30, 1.0]), (2, 1)), memory.store(of("F32", [1e30]), (1, 1))
    base = memory.store(of("BF16", [1.0, 1.0]), (2, 1))
    found, counts = run_job(kernel, make_job(base, [Term(1.0, LowRankDelta(left, right, 1.0))]), memory)
    assert found[0] == of("BF16", [-np.inf]).words[0]
    assert (counts.overflow, counts.nonfinite) == (1, 1)


@pytest.mark.parametrize("value", DTYPES)
@pytest.mark.parametrize("base", DTYPES)
def test_a_stored_difference_is_subtracted_by_two_rounded_operations(kernel: MakeKernel, base: str, value: str) -> None:
    left, right = (Stored(dtype, words) for dtype, words in zip((base, value), pairs(base, value, 500, 16)))
    with np.errstate(invalid="ignore"):
        change = 0.3 * numbers(right) if base == "F64" else near32(np.float32(0.3) * near32(numbers(right)))
    keep = np.isfinite(change) & (change != 0)  # a change that is nothing has a test of its own
    left, right = Stored(base, left.words[keep]), Stored(value, right.words[keep])
    memory = Memory()
    at, delta = memory.store(left), ScaledDelta(memory.store(right), 0.5)
    words, _ = run_job(kernel, make_job(at, [Term(0.6, delta)]), memory)
    zero = Stored(value, np.zeros(len(right.words), unsigned(value)))
    assert np.array_equal(words, edit(left, [Change(0.6 * 0.5, right, zero)], base).words)


@pytest.mark.parametrize("values", [quiet, specials])
@pytest.mark.parametrize("alpha", [0.5, -0.5])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_stored_difference_of_zero_keeps_every_bit_of_base(
    kernel: MakeKernel, zero: float, alpha: float, values: Callable[[str], Words]
) -> None:
    memory, words = Memory(), values("F16")
    delta = ScaledDelta(memory.store(of("BF16", [zero] * len(words))), 2.0)
    found, counts = run_job(kernel, make_job(memory.store(Stored("F16", words)), [Term(alpha, delta)]), memory)
    assert np.array_equal(found, words)
    assert (counts.intended, counts.changed) == (0, 0)


def test_a_kernel_keeps_nothing_of_one_job_for_the_next(kernel: MakeKernel) -> None:
    """One kernel runs jobs of different dtypes and sizes in turn, as a worker does."""
    memory = Memory()
    worker = kernel(memory.read_stored)
    for round_, dtype in enumerate(["BF16", "F64", "F8_E4M3", "F32", "F16", "BF16"]):
        left, right = (Stored(dtype, words) for words in pairs(dtype, dtype, 100 * (7 - round_), round_))
        base, tuned = memory.store(left), memory.store(right)
        job = make_job(base, [Term(0.3, DenseDelta(tuned, base))])
        words, _ = run_job(lambda _: worker, job, memory)
        assert np.array_equal(words, edit(left, [Change(0.3, right, left)], dtype).words)


# masks

WEIGHTS = (*DTYPES, "BOOL", "U8")


def masked(alpha: float, tuned: Stored, origin: Stored, *masks: Stored) -> Change:
    return Change(alpha, tuned, origin, masks)


def weights(dtype: str, count: int, seed: int, *, wild: bool = False) -> Stored:
    """Zeros, ones and numbers between; with `wild`, the special values of the dtype too."""
    rng = np.random.default_rng(seed)
    if dtype in ("BOOL", "U8"):
        return Stored(dtype, rng.integers(0, 2 if dtype == "BOOL" else 256, count).astype(np.uint8))
    words = rounded(rng.choice([0.0, -0.0, 1.0, 0.5, -1.0, 0.3, 2.0], count), dtype)
    if wild:
        words[::3] = rng.choice(specials(dtype), len(words[::3]))
    return Stored(dtype, words)


@pytest.mark.parametrize("mask", WEIGHTS)
@pytest.mark.parametrize("base", DTYPES)
def test_a_masked_edit_is_the_formula_bit_for_bit(kernel: MakeKernel, base: str, mask: str) -> None:
    for tuned in dict.fromkeys([base, "F32"]):
        left, right = (Stored(dtype, words) for dtype, words in zip((base, tuned), pairs(base, tuned, 500, 21)))
        weight = weights(mask, len(left.words), 22)
        for alpha in (0.3, -0.3, 1.0, -1.0, 3.0):
            for out in dict.fromkeys([base, "F32", "BF16"]):
                check(kernel, left, [masked(alpha, right, left, weight)], out)


@pytest.mark.parametrize("mask", DTYPES)
@pytest.mark.parametrize("base", ["F64", "F32", "BF16", "F8_E4M3"])
def test_masks_of_inf_and_nan_and_negative_numbers_follow_the_formula_too(kernel: MakeKernel, base: str, mask: str) -> None:
    left, right = (Stored(base, words) for words in pairs(base, base, 400, 23))
    weight = weights(mask, len(left.words), 24, wild=True)
    for alpha in (0.7, -0.7, 1.0):
        check(kernel, left, [masked(alpha, right, left, weight)], base)


@pytest.mark.parametrize("base", ["F64", "BF16"])
def test_masks_multiply_in_the_order_written_and_belong_to_their_own_term(kernel: MakeKernel, base: str) -> None:
    left, right = (Stored(base, words) for words in pairs(base, base, 400, 25))
    one, other = weights("F32", len(left.words), 26), weights("BF16", len(left.words), 27)
    check(kernel, left, [masked(0.3, right, left, one, other)], base)
    elsewhere = shuffled(right, 28)
    for changes in (
        [masked(0.3, right, left, one), Change(-0.4, elsewhere, shuffled(right, 29))],
        [Change(-0.4, elsewhere, shuffled(right, 29)), masked(-1.0, right, left, other)],
        [masked(0.3, right, left, one), masked(-0.3, right, left, other)],
    ):
        check(kernel, left, changes, base)


@pytest.mark.parametrize("mask", WEIGHTS)
@pytest.mark.parametrize("alpha", [0.7, -0.7, 1.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_under_a_zero_of_a_mask_base_keeps_every_bit_whatever_tuned_says(
    kernel: MakeKernel, dtype: str, alpha: float, mask: str
) -> None:
    left, right = (Stored(dtype, words) for words in pairs(dtype, dtype, 50, 30))
    zeros = Stored(mask, np.zeros(len(left.words), np.uint8 if mask in ("BOOL", "U8") else unsigned(mask)))
    words, counts = edit_dense(kernel, left, [masked(alpha, right, left, zeros)], dtype)
    assert np.array_equal(words, left.words)
    assert (counts.intended, counts.changed, counts.overflow) == (0, 0, 0)


@pytest.mark.parametrize("alpha", [0.3, -0.3, 1.0])
@pytest.mark.parametrize("base", ["F64", "F32", "F16", "BF16", "F8_E5M2"])
def test_a_masked_stored_difference_is_what_the_masked_fine_tune_is(kernel: MakeKernel, base: str, alpha: float) -> None:
    rng = np.random.default_rng(31)
    left, right = (of(base, rng.standard_normal(3000) * 0.02) for _ in range(2))
    delta = of("F64" if base == "F64" else "F32", numbers(right) - numbers(left))
    weight = weights("BF16", 3000, 32)
    memory = Memory()
    term = Term(alpha, ScaledDelta(memory.store(delta), 1.0), (memory.store(weight),))
    words, _ = run_job(kernel, make_job(memory.store(left), [term]), memory)
    assert np.array_equal(words, edit(left, [masked(alpha, right, left, weight)], base).words)


@pytest.mark.parametrize("alpha", [0.7, -0.7])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E5M2"])
def test_a_masked_low_rank_edit_is_within_an_ulp_of_float64(
    kernel: MakeKernel, dtype: str, transposed: bool, alpha: float
) -> None:
    case = LowRank(dtype, transposed=transposed)
    weight = weights("F32", case.product.size, 33)
    mask = case.memory.store(weight, case.product.shape)
    words, counts = run_job(kernel, make_job(case.base, [Term(alpha, case.delta, (mask,))]), case.memory)
    expected = numbers(case.values) - alpha * numbers(weight) * case.product.ravel()
    assert (np.abs(numbers(Stored(dtype, words)) - expected) <= ulp(expected, dtype)).all()
    off = numbers(weight) == 0
    assert np.array_equal(words[off], case.values.words[off])
    assert counts.intended == np.count_nonzero(~off)


def test_an_inf_in_a_stored_difference_is_no_overflow_of_the_edit(kernel: MakeKernel) -> None:
    memory = Memory()
    delta = ScaledDelta(memory.store(of("F32", [np.inf, np.nan, 1.0, 3e38])), 1.0)
    base = memory.store(of("BF16", [1.0, 1.0, 1.0, -3e38]))
    words, counts = run_job(kernel, make_job(base, [Term(1.0, delta)]), memory)
    assert np.array_equal(words, of("BF16", [-np.inf, np.nan, 0.0, -np.inf]).words)
    assert (counts.intended, counts.overflow, counts.nonfinite) == (4, 1, 3)


@pytest.mark.parametrize("tile_bytes", [64, 256])
def test_masks_are_cut_into_tiles_like_the_tensor_they_weigh(
    kernel: MakeKernel, monkeypatch: pytest.MonkeyPatch, tile_bytes: int
) -> None:
    left, right = (Stored("BF16", words[-516:]) for words in pairs("BF16", "BF16", 600, 34))
    change = masked(0.3, right, left, weights("F32", 516, 35))
    monkeypatch.setattr(jobs, "TILE_BYTES", tile_bytes)
    for shape in ((4, 129), (516,), (129, 4)):
        assert np.array_equal(edit_dense(kernel, left, [change], "BF16", shape)[0], edit(left, [change], "BF16").words)
