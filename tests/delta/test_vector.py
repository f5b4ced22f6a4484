from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskvec import Checkpoint, TaskVector, UsageError
from taskvec.delta.vector import finite, formula

from ..run.checkpoints import opened, tensor


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return opened(tmp_path / "base", {"w": tensor("F32", np.arange(4, dtype=np.uint32))})


@pytest.fixture
def old(base: Checkpoint, tmp_path: Path) -> TaskVector:
    return TaskVector.between(base, opened(tmp_path / "old", {"w": tensor("F32", np.arange(4, dtype=np.uint32))}))


@pytest.fixture
def new(base: Checkpoint, tmp_path: Path) -> TaskVector:
    return TaskVector.between(base, opened(tmp_path / "new", {"w": tensor("F32", np.arange(4, dtype=np.uint32))}))


def coefficients(vector: TaskVector) -> list[float]:
    return [coefficient for coefficient, _ in vector.terms]


def test_a_vector_is_opened_from_paths_or_from_checkpoints(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    assert TaskVector.between(tmp_path / "base", str(tmp_path / "old")) == old
    assert TaskVector.between(base, Checkpoint.open(tmp_path / "old")) == old


def test_scaling_is_exact_on_python_floats(old: TaskVector) -> None:
    assert coefficients(0.3 * old) == coefficients(old * 0.3) == [0.3]
    assert coefficients(-old) == [-1.0]
    assert coefficients(old / 4) == [0.25]
    assert coefficients(0.1 * (3 * old)) == [0.1 * 3.0]
    assert coefficients(old * np.float32(0.5)) == coefficients(np.float64(0.5) * old) == [0.5]
    assert coefficients(old * Fraction(1, 4)) == [0.25]
    assert coefficients(0 * old) == [0.0]


def test_sums_keep_the_order_written_and_merge_nothing(old: TaskVector, new: TaskVector) -> None:
    total = 0.5 * old + 2 * new - old
    assert coefficients(total) == [0.5, 2.0, -1.0]
    assert [source for _, source in total.terms] == [old.terms[0][1], new.terms[0][1], old.terms[0][1]]
    assert coefficients(-(old - 2 * new)) == [-1.0, 2.0]
    assert coefficients((old + new) / 2) == [0.5, 0.5]


def test_the_builtin_sum_adds_vectors(old: TaskVector, new: TaskVector) -> None:
    assert sum([old, 2 * new]) == old + 2 * new
    assert sum([old]) == old


def test_the_average_of_vectors_reads_as_one(old: TaskVector, new: TaskVector) -> None:
    vectors = [old, new]
    assert repr(sum(vectors) / len(vectors)) == "TaskVector(0.5·(old − base) + 0.5·(new − base))"


def test_a_repr_reads_like_the_formula(old: TaskVector, new: TaskVector) -> None:
    assert repr(old) == "TaskVector(1·(old − base))"
    assert repr(-0.3 * old + 0.1 * new) == "TaskVector(− 0.3·(old − base) + 0.1·(new − base))"
    assert formula(old - 1e-5 * new) == "+ 1·(old − base) − 1e-05·(new − base)"
    assert "/" not in repr(old)


def test_a_checkpoint_plus_a_vector_is_the_edited_checkpoint(base: Checkpoint, old: TaskVector, new: TaskVector) -> None:
    assert repr(base - 0.3 * old) == "EditedCheckpoint(base − 0.3·(old − base))"
    assert repr(base + old - 2 * new) == "EditedCheckpoint(base + 1·(old − base) − 2·(new − base))"
    assert (base - old).vector == -old
    assert (base + old + new).vector == old + new


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, np.float32("nan"), 10**400, -(10**400)])
def test_nan_and_inf_are_usage_errors(old: TaskVector, number: float) -> None:
    for use in (lambda: number * old, lambda: old * number, lambda: old / number):
        with pytest.raises(UsageError, match="expected a finite number"):
            use()


def test_a_coefficient_that_grows_beyond_float64_is_a_usage_error(old: TaskVector) -> None:
    with pytest.raises(UsageError, match="finite"):
        1e200 * (1e200 * old)
    with pytest.raises(UsageError, match="finite"):
        (1e200 * old) / 1e-200


def test_division_by_zero_is_a_usage_error(old: TaskVector) -> None:
    with pytest.raises(UsageError, match="/ 0"):
        old / 0


@pytest.mark.parametrize("thing", ["0.3", None, 1j, [0.3], True, np.array([0.3])])
def test_scaling_by_what_is_no_number_is_a_type_error(old: TaskVector, thing: Any) -> None:
    with pytest.raises(TypeError, match="expected a real number"):
        old * thing
    with pytest.raises(TypeError, match="expected a real number"):
        old / thing


def test_what_has_no_meaning_is_a_type_error_that_says_why(base: Checkpoint, old: TaskVector) -> None:
    with pytest.raises(TypeError, match=r"vector · taskvector has no meaning"):
        old * old
    with pytest.raises(TypeError, match=r"vector · checkpoint has no meaning"):
        old * base  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"vector / taskvector has no meaning"):
        old / old  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"vector \+ Checkpoint: expected another TaskVector"):
        old + base  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"did you mean base − vector\?"):
        old - base  # type: ignore[operator]
    with pytest.raises(TypeError, match=r"vector \+ int: expected another TaskVector"):
        old + 1  # type: ignore[operator]


@pytest.mark.parametrize("left", [1, 0.5, "model", None])
def test_only_a_checkpoint_and_the_zero_of_sum_may_stand_on_the_left(old: TaskVector, left: Any) -> None:
    with pytest.raises(TypeError):
        left + old
    with pytest.raises(TypeError):
        left - old


def test_finite_names_what_it_was_asked_about() -> None:
    assert finite(3) == 3.0
    assert isinstance(finite(np.float32(0.5)), float)
    with pytest.raises(UsageError, match=r"^alpha is nan"):
        finite(float("nan"), "alpha")
    with pytest.raises(TypeError, match=r"^alpha: found str"):
        finite("1", "alpha")  # type: ignore[arg-type]


def test_making_and_combining_vectors_reads_no_data(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    for name in ("base", "old"):
        (tmp_path / name / "model.safetensors").unlink()
    assert repr(base - 0.5 * (old + old)).startswith("EditedCheckpoint")


# views, sums and differences of checkpoints


def test_a_checkpoint_minus_a_checkpoint_is_their_vector(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    assert Checkpoint.open(tmp_path / "old") - base == old
    assert repr(base + 0.5 * (Checkpoint.open(tmp_path / "old") - base)) == "EditedCheckpoint(base + 0.5·(old − base))"


@pytest.mark.parametrize(
    "use",
    [
        lambda base: base + base,
        lambda base: 2 * base,
        lambda base: base * 2,
        lambda base: base / 2,
        lambda base: -base,
        lambda base: base * base,
    ],
)
def test_weights_are_not_to_be_added_or_scaled(base: Checkpoint, use: Any) -> None:
    with pytest.raises(TypeError, match=r"weights (\+|·) \w+ has no meaning; (add|scale) what .* learned: base \+"):
        use(base)


@pytest.mark.parametrize("other", [1, "x", None, 0.5])
def test_weights_and_what_is_no_vector_do_not_add(base: Checkpoint, other: Any) -> None:
    for use in (lambda: base + other, lambda: base - other, lambda: other + base, lambda: other - base):
        with pytest.raises(TypeError):
            use()


def test_a_sum_may_start_from_a_checkpoint(base: Checkpoint, old: TaskVector, new: TaskVector) -> None:
    assert sum([old, -new], start=base) == base + old - new  # type: ignore[arg-type]
    assert sum([base, old, new][1:], base) == base + old + new  # type: ignore[arg-type]


def test_equality_is_of_structure(base: Checkpoint, old: TaskVector, new: TaskVector) -> None:
    assert old + new == old + new and old + new != new + old and old + old != 2 * old
    assert (base - old) == (base - old) and (base - old) != (base + old)
    assert old.only("w") == old.only("w") and old.only("w") != old.without("w") and old.only("w") != old
    assert old != 1 and old != base


def test_a_view_of_a_sum_is_the_sum_of_views(old: TaskVector, new: TaskVector) -> None:
    assert (old - 2 * new).only("w") == old.only("w") - 2 * new.only("w")
    assert (old + new).scaled({"w": 2}) == old.scaled({"w": 2}) + new.scaled({"w": 2})
    assert (old + new).ramp(0, 1) == old.ramp(0, 1) + new.ramp(0, 1)


def test_a_view_of_nothing_in_particular(old: TaskVector) -> None:
    assert old.without() == old
    with pytest.raises(UsageError, match=r"only\(\) without a pattern would leave nothing"):
        old.only()


def test_views_refuse_what_is_no_pattern_at_once(old: TaskVector) -> None:
    for use in (
        lambda: old.only(["a", "b"]),  # type: ignore[arg-type]
        lambda: old.without(3),  # type: ignore[arg-type]
        lambda: old.scaled({3: 1.0}),  # type: ignore[dict-item]
    ):
        with pytest.raises(TypeError, match=r"a pattern of tensor names: found (list|int), expected str"):
            use()
    with pytest.raises(TypeError, match=r"scaled\(list\): expected a mapping"):
        old.scaled([("*", 1.0)])  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [np.nan, np.inf, 10**400])
def test_views_refuse_factors_that_are_not_finite_at_once(old: TaskVector, number: Any) -> None:
    for use in (
        lambda: old.scaled({"*": number}),
        lambda: old.scaled({"*": 1}, otherwise=number),
        lambda: old.ramp(number, 0),
        lambda: old.ramp(0, number),
        lambda: old.ramp(0, 1, otherwise=number),
    ):
        with pytest.raises(UsageError, match="expected a finite number"):
            use()
    with pytest.raises(TypeError, match=r"the factor of \*: found str"):
        old.scaled({"*": "0.5"})  # type: ignore[dict-item]
