"""Deltas that are formulas of an adapter's tensors and of the weight itself: every kernel evaluates them to the same bits."""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskvec import Checkpoint, TaskVector
from taskvec.delta.source import DenseDelta, Formula, FormulaDelta, Resolved
from taskvec.run import jobs
from taskvec.run.jobs import Term
from taskvec.run.kernel import NumpyKernel
from taskvec.run.plan import Options, Plan, make_plan
from taskvec.run.stream import Settings, execute

from .checkpoints import MakeKernel, Memory, make_job, opened, run_job, tensor
from .reference import Stored, numbers, rounded

ROWS, COLUMNS = 37, 20


@dataclass(frozen=True)
class Scaled(Formula):
    """Δ = factor · l ⊙ W: row by row, of base."""

    factor: float

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        assert weight.shape == (rows.stop - rows.start, COLUMNS) and weight.dtype == np.float64
        return self.factor * state[0][rows] * weight


@dataclass(frozen=True)
class Centred(Formula):
    """Δ = W − the mean of each of its columns: all of W has to be seen first."""

    surveys_weight = True

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        return np.concatenate(list(blocks())).mean(axis=0)

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        return weight - state

    def scratch(self, rows: int, columns: int) -> int:
        return 24 * rows * columns


@dataclass(frozen=True)
class Numbered(Formula):
    """Δ[i, j] = 100 i + j, in rows of a width of its own."""

    width: int

    uses_weight = False

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        assert weight is None
        return 100.0 * np.arange(rows.start, rows.stop)[:, None] + np.arange(self.width)


class Case:
    """A base of `dtype` and a factor per row."""

    def __init__(self, dtype: str) -> None:
        rng = np.random.default_rng(31)
        self.memory = Memory()
        self.weight = Stored(dtype, rounded(rng.standard_normal(ROWS * COLUMNS), dtype))
        self.factor = Stored("F32", rounded(rng.standard_normal(ROWS), "F32"))
        self.base = self.memory.store(self.weight, (ROWS, COLUMNS))
        self.per_row = self.memory.store(self.factor, (ROWS, 1))

    @property
    def w(self) -> np.ndarray:
        return numbers(self.weight).reshape(ROWS, COLUMNS)

    def edit(self, kernel: MakeKernel, formula: Formula, *tensors: Any, alpha: float = 0.7, columns: int = 0) -> Any:
        return run_job(
            kernel, make_job(self.base, [Term(alpha, FormulaDelta(formula, tensors, self.base, columns))]), self.memory
        )

    def expected(self, delta: np.ndarray, alpha: float = 0.7) -> Any:
        """base − f32(α)·f32(Δ), each operation rounded to float32, and once more to the dtype."""
        step = (np.float32(alpha) * delta.astype(np.float32)).astype(np.float32)
        return rounded((self.w.astype(np.float32) - step).astype(np.float64).ravel(), self.weight.dtype)


@pytest.mark.parametrize("tile", [64, 200, 1 << 20])
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3"])
def test_rows_are_evaluated_with_their_own_part_of_the_weight(
    kernel: MakeKernel, dtype: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "TILE_BYTES", max(tile, COLUMNS * 4))
    case = Case(dtype)
    words, counts = case.edit(kernel, Scaled(3.0), case.per_row)
    assert np.array_equal(words, case.expected(3.0 * numbers(case.factor)[:, None] * case.w))
    assert counts.intended == np.count_nonzero(case.w)


def test_float64_weights_get_a_float32_delta(kernel: MakeKernel) -> None:
    case = Case("F64")
    words, _ = case.edit(kernel, Scaled(3.0), case.per_row)
    delta = (3.0 * numbers(case.factor)[:, None] * case.w).astype(np.float32).astype(np.float64)
    assert np.array_equal(numbers(Stored("F64", words)), (case.w - 0.7 * delta).ravel())


@pytest.mark.parametrize("tile", [80, 400, 1 << 20])
def test_what_has_to_be_seen_first_is_seen_whole(kernel: MakeKernel, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TILE_BYTES", tile)
    case = Case("F32")
    words, _ = case.edit(kernel, Centred())
    assert np.array_equal(words, case.expected(case.w - case.w.mean(axis=0)))


@pytest.mark.parametrize("tile", [36, 100, 1 << 20])
@pytest.mark.parametrize("width", [COLUMNS, 5, 4, 1])
def test_a_formula_may_have_rows_of_another_width(
    kernel: MakeKernel, width: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "TILE_BYTES", tile)
    case = Case("F32")
    words, _ = case.edit(kernel, Numbered(width), columns=width)
    delta = 100.0 * np.arange(ROWS * COLUMNS // width)[:, None] + np.arange(width)
    assert np.array_equal(words, case.expected(delta.reshape(ROWS, COLUMNS)))


@pytest.mark.parametrize("alpha", [1.0, -1.0])
def test_a_zero_of_the_formula_keeps_a_minus_zero(kernel: MakeKernel, alpha: float) -> None:
    case = Case("F32")
    case.weight = Stored("F32", np.full(ROWS * COLUMNS, 0x80000000, np.uint32))
    case.base = case.memory.store(case.weight, (ROWS, COLUMNS))
    words, counts = case.edit(kernel, Scaled(0.0), case.per_row, alpha=alpha)
    assert np.array_equal(words, case.weight.words) and counts.changed == counts.intended == 0


def test_a_formula_is_one_term_among_others(kernel: MakeKernel) -> None:
    case = Case("F32")
    tuned = case.memory.store(
        Stored("F32", rounded(np.random.default_rng(5).standard_normal(ROWS * COLUMNS), "F32")), (ROWS, COLUMNS)
    )
    terms = [Term(0.5, DenseDelta(tuned, case.base)), Term(0.7, FormulaDelta(Scaled(3.0), (case.per_row,), case.base))]
    ours, counts = run_job(kernel, make_job(case.base, terms), case.memory)
    theirs, expected = run_job(NumpyKernel, make_job(case.base, terms), case.memory)
    assert np.array_equal(ours, theirs) and counts == expected
    once, _ = run_job(kernel, make_job(case.base, terms[:1]), case.memory)
    assert not np.array_equal(ours, once)


# --- in a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Δ of every tensor by one formula."""

    base: Checkpoint
    formula: Formula

    label = "formula"
    inputs = ()

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        return Resolved(deltas={name: FormulaDelta(self.formula, (), t) for name, t in base.tensors.items() if keep(name)})


def planned(folder: Path, count: int, shape: tuple[int, int]) -> Plan:
    rng = np.random.default_rng(8)
    tensors = {
        f"w{i}": tensor("BF16", rounded(rng.standard_normal(shape[0] * shape[1]), "BF16"), shape) for i in range(count)
    }
    base = opened(folder / "base.safetensors", tensors)
    return make_plan(base, TaskVector(((-1.0, Source(base, Centred())),)), Options(), single_file=False)


def test_one_worker_surveys_a_tensor_once_and_threads_change_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TILE_BYTES", 1024)
    surveys: list[int] = []
    real = Centred.prepare

    def counted(self: Centred, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        surveys.append(threading.get_ident())
        return real(self, tensors, blocks)

    monkeypatch.setattr(Centred, "prepare", counted)
    plan = planned(tmp_path, 6, (50, 30))
    outputs = []
    for workers in (1, 4):
        surveys.clear()
        folder = tmp_path / f"out{workers}"
        folder.mkdir()
        execute(plan, folder, Settings(workers=workers, fsync=False))
        outputs.append((folder / "model.safetensors").read_bytes())
        assert len(surveys) == 6
    assert outputs[0] == outputs[1]


def test_a_survey_is_read_and_held_as_the_plan_says(tmp_path: Path) -> None:
    plan = planned(tmp_path, 1, (3000, 700))
    assert plan.bytes_to_read == 2 * 3000 * 700 * 2
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    try:
        execute(plan, tmp_path / "out", Settings(fsync=False))
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert held < plan.buffer_bytes() + 200_000
    assert plan.buffer_bytes() < 24 * 3000 * 700 + (1 << 19) * 200  # the survey, and some numbers per element of one tile


def test_bits_of_a_float64_formula_do_not_depend_on_how_many_tiles_a_batch_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "TILE_BYTES", 4096)
    plan = planned(tmp_path, 1, (500, 30))
    found = []
    for batch in (1, 5000, 1 << 20):
        folder = tmp_path / f"out{batch}"
        folder.mkdir()
        execute(plan, folder, Settings(batch=batch, fsync=False))
        found.append((folder / "model.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]
