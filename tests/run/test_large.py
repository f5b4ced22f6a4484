"""Many runs at once, more files than may be open, 70,000 tensors, tensors beyond 2 and 4 GiB: benchmarks/load.py, which
compares every byte of every output with numpy's; here also that it would find a wrong one."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import taskvec as tv

LOAD = Path(__file__).parents[2] / "benchmarks/load.py"


@pytest.fixture(scope="module")
def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("taskvec_load", LOAD)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def work() -> Iterator[Path]:
    """Gone at once: pytest would keep gigabytes for three runs."""
    with tempfile.TemporaryDirectory(prefix="taskvec-load-") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_runs_over_the_same_inputs_at_once_all_succeed_with_the_same_bytes(load: ModuleType, work: Path) -> None:
    (row,) = load.concurrent(work, runs=24)
    assert row.resident < 80


@pytest.mark.slow
def test_of_eight_runs_into_one_name_one_succeeds_and_seven_say_why_not(load: ModuleType, work: Path) -> None:
    folder, file = load.same(work, rounds=6)
    assert "another run is making it" in folder.found and "another run is making it" in file.found


@pytest.mark.slow
def test_more_shards_are_edited_than_files_may_be_open(load: ModuleType, work: Path) -> None:
    (row,) = load.descriptors(work)
    assert row.resident < 80


@pytest.mark.slow
def test_70_000_tensors_are_planned_and_edited_in_seconds_and_bounded_memory(load: ModuleType, work: Path) -> None:
    assert len(dict(load.experts())) == 70_000
    for row in load.tensors(work):
        assert row.wall < (20 if "dry-run" in row.job else 120) and row.resident < 300, row


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["compiled", "numpy"])
def test_tensors_beyond_2_and_4_gib_are_right_to_the_last_byte(kernel: str, load: ModuleType, work: Path) -> None:
    (row,) = load.large(work, {kernel: load.TASKVEC if kernel == "compiled" else load.NUMPY_ALONE})
    assert row.resident < 150


# that it would find what is wrong


@pytest.fixture
def made(load: ModuleType, tmp_path: Path) -> tuple[Path, Path, Path]:
    base, tuned = load.pair(tmp_path, load.squares(3, 16), 2)
    out = tmp_path / "out"
    tv.subtract(base, tuned, alpha=load.ALPHA, output=out, fsync=False)
    return out, base, tuned


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("at", [0, 300, -1])
def test_one_wrong_bit_is_found(at: int, load: ModuleType, made: tuple[Path, Path, Path]) -> None:
    load.check_edit(*made)
    shard = sorted(made[0].glob("*.safetensors"))[-1]
    flip(shard, load.header(shard)[0] + at if at >= 0 else at)
    with pytest.raises(load.Wrong, match="other values than numpy's"):
        load.check_edit(*made)


@pytest.mark.parametrize("by", [-2, 2])
def test_a_file_of_another_size_is_found(by: int, load: ModuleType, made: tuple[Path, Path, Path]) -> None:
    shard = sorted(made[0].glob("*.safetensors"))[0]
    os.truncate(shard, shard.stat().st_size + by)
    with pytest.raises(load.Wrong, match="bytes"):
        load.check_edit(*made)


def test_an_input_that_is_touched_and_a_file_left_over_are_found(load: ModuleType, made: tuple[Path, Path, Path]) -> None:
    _, base, _ = made
    before = load.state(base)
    (base / "config.json").touch()
    assert load.state(base) != before
    load.check_names(base.parent, "base", "tuned", "out")
    (base.parent / ".out.taskvec-partial-1").mkdir()
    with pytest.raises(load.Wrong, match="partial"):
        load.check_names(base.parent, "base", "tuned", "out")


WINS, LOSES = (0, ""), (1, "taskvec: x/out: exists already. Name another output\n")
OUTCOMES = {
    "two that succeed": [WINS, WINS, LOSES],
    "none": [LOSES, LOSES, LOSES],
    "killed": [WINS, LOSES, (-9, "")],
    "another exit code": [WINS, LOSES, (3, LOSES[1])],
    "two lines": [WINS, LOSES, (1, LOSES[1] * 2)],
    "another reason": [WINS, LOSES, (1, "taskvec: x/out: No such file or directory\n")],
    "a traceback": [WINS, LOSES, (1, "Traceback (most recent call last):\n" + LOSES[1])],
}


@pytest.mark.parametrize("case", OUTCOMES)
def test_any_other_outcome_of_a_race_for_one_name_is_found(case: str, load: ModuleType) -> None:
    def ended(outcomes: Any) -> list[Any]:
        return [load.Ended(code, said, 0.0) for code, said in outcomes]

    assert load._one_won(ended([LOSES, WINS, LOSES])) == ["exists already"] * 2
    with pytest.raises(load.Wrong):
        load._one_won(ended(OUTCOMES[case]))


@pytest.mark.parametrize("at", [0, 2, 8, 11])
def test_a_wrong_byte_of_a_sparse_file_is_found(at: int, load: ModuleType, tmp_path: Path) -> None:
    entries = {"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}
    begin = load._write_sparse(tmp_path / "w.safetensors", entries, {8: b"\x01\x02\x03\x04"})
    load.check_marks(tmp_path / "w.safetensors", entries, {8: b"\x01\x02\x03\x04"})
    flip(tmp_path / "w.safetensors", begin + at)
    with pytest.raises(load.Wrong, match="wrong between bytes"):
        load.check_marks(tmp_path / "w.safetensors", entries, {8: b"\x01\x02\x03\x04"})


def test_the_places_looked_at_are_those_where_32_bit_numbers_end(load: ModuleType) -> None:
    entries = load._entries()
    for name, edges in (("of more than 2³¹ elements", (1 << 31, 1 << 32)), ("of more than 2 GiB", (1 << 31,))):
        (start, end), width = entries[name]["data_offsets"], load.WIDTH[entries[name]["dtype"]]
        places = load._edges(entries[name], 500)
        assert {start, end - width} <= set(places)
        for edge in edges:
            assert any(start + edge - width <= place < start + edge for place in places)
            assert any(start + edge <= place < start + edge + width for place in places)
    of_elements = load._edges(entries["of more than 2³¹ elements"], 500)
    first = entries["of more than 2³¹ elements"]["data_offsets"][0]
    assert {first + 2 * (2**31 - 1), first + 2 * 2**31} <= set(of_elements)
