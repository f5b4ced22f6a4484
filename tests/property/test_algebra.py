"""What must hold for every model and every number: the algebra of task vectors (Ilharco et al. 2023, section 2)."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from taskvec import Checkpoint, TaskVector
from taskvec.run.kernel import NumpyKernel

from ..run.checkpoints import edit_dense, opened, read_model, tensor
from ..run.reference import DTYPES, Change, Stored, edit, numbers, unsigned

FINITE = st.floats(-1e6, 1e6, allow_subnormal=True)
ALPHAS = st.floats(-8, 8, allow_subnormal=False)
COUNT = 24
WEIGHTS = arrays(np.float64, COUNT, elements=FINITE)
Floats = NDArray[np.float64]


def words(dtype: str) -> st.SearchStrategy[Stored]:
    """Any bits at all."""
    kind = unsigned(dtype)
    return arrays(kind, COUNT, elements=st.integers(0, np.iinfo(kind).max)).map(lambda found: Stored(dtype, found))


TENSORS = st.sampled_from(DTYPES).flatmap(words)


def f64(values: Floats) -> Stored:
    return Stored("F64", values.copy().view(np.uint64))


def edited(base: Floats, *changes: tuple[float, Floats, Floats]) -> Floats:
    """base − Σ α·(tuned − origin) in float64, by the kernel."""
    stored = [Change(alpha, f64(tuned), f64(origin)) for alpha, tuned, origin in changes]
    return edit_dense(NumpyKernel, f64(base), stored, "F64")[0].view(np.float64)


def slack(*sizes: Floats) -> Floats:
    """Four roundings at the size of the largest number on the way."""
    return 4 * np.spacing(np.maximum.reduce([np.abs(size) for size in sizes]))


@given(WEIGHTS, WEIGHTS, ALPHAS)
def test_what_is_subtracted_and_added_back_is_base_again(base: Floats, tuned: Floats, alpha: float) -> None:
    less = edited(base, (alpha, tuned, base))
    assert (np.abs(edited(less, (-alpha, tuned, base)) - base) <= slack(base, less, alpha * (tuned - base))).all()
    at_once = edited(base, (alpha, tuned, base), (-alpha, tuned, base))
    assert (np.abs(at_once - base) <= slack(base, less, alpha * (tuned - base))).all()


@given(WEIGHTS, WEIGHTS, WEIGHTS, ALPHAS, ALPHAS)
def test_the_order_of_two_vectors_matters_only_to_the_last_bits(
    base: Floats, a: Floats, b: Floats, x: float, y: float
) -> None:
    one = edited(base, (x, a, base), (y, b, base))
    other = edited(base, (y, b, base), (x, a, base))
    assert (np.abs(one - other) <= slack(base, x * (a - base), y * (b - base), one) * 2).all()


@given(WEIGHTS, WEIGHTS, ALPHAS, ALPHAS)
def test_coefficients_of_one_vector_add_up(base: Floats, tuned: Floats, x: float, y: float) -> None:
    apart, together = edited(base, (x, tuned, base), (y, tuned, base)), edited(base, (x + y, tuned, base))
    assert (np.abs(apart - together) <= slack(base, x * (tuned - base), y * (tuned - base)) * 2).all()


@given(WEIGHTS, WEIGHTS)
def test_subtracting_minus_one_of_the_vector_is_tuned(base: Floats, tuned: Floats) -> None:
    assert (np.abs(edited(base, (-1.0, tuned, base)) - tuned) <= slack(base, tuned)).all()


@given(TENSORS, st.floats(-1e38, 1e38, allow_subnormal=False))
def test_a_vector_of_nothing_changes_no_bit_of_anything(base: Stored, alpha: float) -> None:
    same = Stored(base.dtype, base.words.copy())
    found, counts = edit_dense(NumpyKernel, base, [Change(alpha, same, base)], base.dtype)
    assert np.array_equal(found, base.words)
    assert (counts.intended, counts.changed) == (0, 0)


@given(st.data(), st.floats(-1e3, 1e3))
def test_any_bits_at_all_are_edited_as_the_contract_says(data: st.DataObject, alpha: float) -> None:
    base, tuned = data.draw(TENSORS, "base"), data.draw(TENSORS, "tuned")
    origin = data.draw(st.one_of(st.just(base), TENSORS), "origin")
    out = data.draw(st.sampled_from([base.dtype, "F64", "F32", "F16", "BF16"]), "out")
    changes = [Change(alpha, tuned, origin), Change(0.5, origin, tuned)]
    found, counts = edit_dense(NumpyKernel, base, changes, out)
    expected = edit(base, changes, out)
    assert np.array_equal(found, expected.words)
    assert (counts.intended, counts.changed, counts.overflow, counts.nonfinite) == expected[1:]


# the same through the public face and files


def checkpoint(folder: Path, name: str, stored: Stored) -> Checkpoint:
    return opened(folder / f"{name}.safetensors", {"w": tensor(stored.dtype, stored.words)})


@settings(max_examples=25)
@given(st.data())
def test_base_minus_zero_times_a_vector_has_base_s_bytes(data: st.DataObject) -> None:
    base, tuned = data.draw(TENSORS, "base"), data.draw(TENSORS, "tuned")
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        at = checkpoint(folder, "base", base)
        vector = TaskVector.between(at, checkpoint(folder, "tuned", tuned))
        report = (at - 0 * vector).save(folder / "out.safetensors", fsync=False)
        assert read_model(folder / "out.safetensors") == {"w": base.words.tobytes()}
        assert report.changes["elements_changed"] == 0


@settings(max_examples=25)
@given(WEIGHTS, WEIGHTS, WEIGHTS, st.floats(-4, 4), st.floats(-4, 4))
def test_a_plus_b_is_b_plus_a_in_files_too(base: Floats, a: Floats, b: Floats, x: float, y: float) -> None:
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        at = checkpoint(folder, "base", f64(base))
        first, second = (TaskVector.between(at, checkpoint(folder, name, f64(v))) for name, v in (("a", a), ("b", b)))
        results = []
        for place, total in enumerate((x * first + y * second, y * second + x * first)):
            (at + total).save(folder / f"{place}.safetensors", fsync=False)
            results.append(numbers(Stored("F64", np.frombuffer(read_model(folder / f"{place}.safetensors")["w"], np.uint64))))
        sizes = slack(base, x * (a - base), y * (b - base), results[0]) * 2
        assert (np.abs(results[0] - results[1]) <= sizes).all()
        assert (np.abs(results[0] - (base + x * (a - base) + y * (b - base))) <= sizes).all()


@given(WEIGHTS, WEIGHTS, ALPHAS, ALPHAS)
def test_a_mask_of_one_number_is_a_coefficient(base: Floats, tuned: Floats, x: float, y: float) -> None:
    mask = f64(np.full(COUNT, y))
    masked = edit_dense(NumpyKernel, f64(base), [Change(x, f64(tuned), f64(base), (mask,))], "F64")[0].view(np.float64)
    assert (np.abs(masked - edited(base, (x * y, tuned, base))) <= slack(base, x * y * (tuned - base))).all()


@given(WEIGHTS, WEIGHTS, arrays(bool, COUNT), ALPHAS)
def test_a_mask_and_its_complement_add_up_to_the_whole(
    base: Floats, tuned: Floats, chosen: NDArray[np.bool_], alpha: float
) -> None:
    parts = [Change(alpha, f64(tuned), f64(base), (Stored("BOOL", part.view(np.uint8)),)) for part in (chosen, ~chosen)]
    found = edit_dense(NumpyKernel, f64(base), parts, "F64")[0].view(np.float64)
    assert np.array_equal(found, edited(base, (alpha, tuned, base)))


@given(st.data(), st.floats(-1e3, 1e3))
def test_any_bits_at_all_are_masked_as_the_contract_says(data: st.DataObject, alpha: float) -> None:
    base, tuned, mask = (data.draw(TENSORS, name) for name in ("base", "tuned", "mask"))
    changes = [Change(alpha, tuned, base, (mask,)), Change(0.5, mask, tuned, (base, tuned))]
    found, counts = edit_dense(NumpyKernel, base, changes, base.dtype)
    expected = edit(base, changes, base.dtype)
    assert np.array_equal(found, expected.words)
    assert (counts.intended, counts.changed, counts.overflow, counts.nonfinite) == expected[1:]


@settings(max_examples=25)
@given(st.data(), st.floats(0.01, 4))
def test_a_saved_vector_is_the_vector(data: st.DataObject, alpha: float) -> None:
    """For any bits at all of 32 or fewer, but a −0 that becomes +0: a difference of zero does not tell."""
    base, tuned = (data.draw(TENSORS.filter(lambda stored: stored.dtype != "F64"), name) for name in ("base", "tuned"))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        at = checkpoint(folder, "base", base)
        vector = TaskVector.between(at, checkpoint(folder, "tuned", tuned))
        vector.save(folder / "v.safetensors", fsync=False)
        (at - alpha * vector).save(folder / "direct.safetensors", fsync=False)
        (at - alpha * TaskVector.open(folder / "v.safetensors")).save(folder / "saved.safetensors", fsync=False)
        direct, saved = (
            np.frombuffer(read_model(folder / f"{way}.safetensors")["w"], unsigned(base.dtype)) for way in ("direct", "saved")
        )
        zeros = (numbers(Stored(base.dtype, direct)) == 0) & (numbers(Stored(base.dtype, saved)) == 0)
        assert np.array_equal(direct[~zeros], saved[~zeros])
