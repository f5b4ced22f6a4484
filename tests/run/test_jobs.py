from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from taskvec.checkpoint.header import DTYPE_BITS, StoredTensor
from taskvec.delta.source import DenseDelta, LowRankDelta, ScaledDelta
from taskvec.run import jobs
from taskvec.run.jobs import Job, Term, Tile, batches, merged, tiles, unit_bytes

SHAPES = [
    (),
    (1,),
    (7,),
    (5, 3),
    (3, 5, 2),
    (1, 64),
    (64, 1),
    (2, 33),
    (40, 16),
    (3, 2, 2, 3),
    (0,),
    (0, 4),
    (4, 0),
    (2, 0, 3),
]


def cut(dtype: str, shape: tuple[int, ...]) -> list[Tile]:
    return list(tiles(dtype, shape, int(np.prod(shape, dtype=int)) * DTYPE_BITS[dtype] // 8))


def stored(name: str, shape: tuple[int, ...] = (2,)) -> StoredTensor:
    return StoredTensor(name, "F32", shape, Path("f"), 0, 4 * int(np.prod(shape)))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TILE_BYTES", 64)


@pytest.mark.parametrize("dtype", ["F64", "F32", "BF16", "F8_E4M3", "I64", "BOOL"])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_cover_every_byte_once_and_in_order(dtype: str, shape: tuple[int, ...]) -> None:
    at = 0
    for tile in cut(dtype, shape):
        assert tile.start == at
        assert 0 < tile.units * unit_bytes(dtype) <= 64
        at += tile.units
    assert at * unit_bytes(dtype) == int(np.prod(shape, dtype=int)) * DTYPE_BITS[dtype] // 8


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1 and 0 not in shape])
def test_a_tile_of_floats_is_whole_rows_or_a_part_of_one(shape: tuple[int, ...]) -> None:
    columns = int(np.prod(shape[1:]))
    for tile in cut("F64", shape):
        assert tile.start == tile.row * columns + tile.column
        assert tile.units == tile.rows * tile.columns
        assert (tile.column == 0 and tile.columns == columns) or tile.rows == 1
        assert tile.row + tile.rows <= shape[0] and tile.column + tile.columns <= columns


def test_rows_longer_than_a_tile_are_cut_and_shorter_ones_are_packed() -> None:
    assert [(t.row, t.rows, t.column, t.columns) for t in cut("F32", (2, 20))] == [
        (0, 1, 0, 16), (0, 1, 16, 4), (1, 1, 0, 16), (1, 1, 16, 4),
    ]  # fmt: skip
    assert [(t.row, t.rows) for t in cut("F32", (7, 5))] == [(0, 3), (3, 3), (6, 1)]


def test_sub_byte_and_integer_tensors_are_cut_as_bytes() -> None:
    assert [tile.units for tile in tiles("F4", (150,), 75)] == [64, 11]
    assert [tile.units for tile in tiles("I64", (3, 3), 72)] == [64, 8]


def test_a_tensor_of_the_real_tile_size_is_one_tile_and_an_element_more_is_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "TILE_BYTES", 1 << 20)
    assert [t.units for t in cut("F32", (1 << 18,))] == [1 << 18]
    assert [t.units for t in cut("F32", ((1 << 18) + 1,))] == [1 << 18, 1]


def test_a_job_without_terms_is_a_copy_only_in_its_own_dtype() -> None:
    base = stored("w")
    assert Job("w", "F32", (2,), 0, 8, base, ()).copied
    assert not Job("w", "BF16", (2,), 0, 4, base, ()).copied
    assert not Job("w", "F32", (2,), 0, 8, base, (Term(1.0, ScaledDelta(stored("d"), 1.0)),)).copied


def test_a_job_reads_every_tensor_once_and_base_first() -> None:
    base, tuned, origin, value, left, right = (stored(name) for name in ("b", "t", "o", "v", "l", "r"))
    terms = (
        Term(1.0, LowRankDelta(left, right, 1.0)), Term(2.0, DenseDelta(tuned, base)), Term(3.0, DenseDelta(tuned, origin)),
        Term(4.0, ScaledDelta(value, 1.0)),
    )  # fmt: skip
    job = Job("w", "F32", (2,), 0, 8, base, terms)
    assert job.elementwise == (base, tuned, origin, value)
    assert job.factors == (left, right)


def test_a_copied_job_reads_the_tensor_it_is_compared_with() -> None:
    assert Job("w", "F32", (2,), 0, 8, stored("b"), (), (stored("t"),)).elementwise == (stored("b"), stored("t"))


@pytest.mark.parametrize("limit", [1, 64, 100, 200, 10**6])
@pytest.mark.parametrize("dtype", ["F64", "BF16", "F8_E4M3", "I64"])
@pytest.mark.parametrize("shape", SHAPES)
def test_batches_are_the_tiles_in_order_and_as_many_as_fit(shape: tuple[int, ...], dtype: str, limit: int) -> None:
    nbytes = int(np.prod(shape, dtype=int)) * DTYPE_BITS[dtype] // 8
    base = StoredTensor("w", dtype, shape, Path("f"), 0, nbytes)
    made = list(batches(Job("w", dtype, shape, 0, nbytes, base, ()), limit))
    assert [tile for batch in made for tile in batch] == cut(dtype, shape)
    for batch in made:
        assert len(batch) == 1 or sum(tile.units for tile in batch) * unit_bytes(dtype) <= limit


@pytest.mark.parametrize("limit", [64, 200, 10**6])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1 and 0 not in shape] + [(3, 20), (2, 1000)])
def test_a_batch_of_floats_merges_to_whole_rows_or_a_part_of_one(shape: tuple[int, ...], limit: int) -> None:
    nbytes, columns = 8 * int(np.prod(shape)), int(np.prod(shape[1:]))
    base = StoredTensor("w", "F64", shape, Path("f"), 0, nbytes)
    made = [merged(batch) for batch in batches(Job("w", "F64", shape, 0, nbytes, base, ()), limit)]
    assert sum(tile.units for tile in made) == int(np.prod(shape))
    for tile in made:
        assert tile.start == tile.row * columns + tile.column
        assert tile.units == tile.rows * tile.columns
        assert tile.columns == columns or tile.rows == 1


def test_a_large_limit_takes_a_tensor_of_whole_rows_at_once_and_long_rows_one_by_one() -> None:
    for shape, count in (((40, 5), 1), ((3, 20), 3)):
        base = StoredTensor("w", "F32", shape, Path("f"), 0, 4 * int(np.prod(shape)))
        assert len(list(batches(Job("w", "F32", shape, 0, base.nbytes, base, ()), 10**6))) == count
