from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taskvec import Checkpoint, NameMismatchError, ShapeMismatchError, TaskVector, UsageError
from taskvec.delta.source import DenseDelta, ScaledDelta
from taskvec.run.jobs import Term
from taskvec.run.plan import Options, Plan, human_bytes, make_plan, parse_bytes

from .checkpoints import opened, tensor, weight_files, write_file
from .stored_deltas import StoredSource

F32 = ("a", "b", "layers.0.w", "layers.1.w")


def tensors(seed: int, **more: Any) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    found = {name: tensor("F32", rng.standard_normal(6).astype(np.float32), (2, 3)) for name in F32}
    return {**found, "n": tensor("I64", np.arange(3) + seed), **more}


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return opened(tmp_path / "base", tensors(0), 2)


@pytest.fixture
def tuned(tmp_path: Path) -> Checkpoint:
    return opened(tmp_path / "tuned", tensors(1))


@pytest.fixture
def vector(base: Checkpoint, tuned: Checkpoint) -> TaskVector:
    return TaskVector.between(base, tuned)


def planned(base: Checkpoint, vector: TaskVector, single_file: bool = False, **options: Any) -> Plan:
    return make_plan(base, vector, Options(**options), single_file=single_file)


def edited(plan: Plan) -> set[str]:
    return {job.name for job in plan.edited}


# pure and deterministic


def test_planning_twice_gives_the_same_plan(base: Checkpoint, vector: TaskVector, tmp_path: Path) -> None:
    again = TaskVector.between(Checkpoint.open(tmp_path / "base"), Checkpoint.open(tmp_path / "tuned"))
    first, second = planned(base, -0.3 * vector), planned(Checkpoint.open(tmp_path / "base"), -0.3 * again)
    assert first == second
    assert str(first) == str(second)
    assert json.dumps(first.summary()) == json.dumps(second.summary())
    assert planned(base, -0.4 * vector) != first


def test_planning_touches_no_file(base: Checkpoint, vector: TaskVector, tmp_path: Path) -> None:
    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")}

    before = state()
    planned(base, vector, max_shard_size=30, out_dtype="float64")
    assert state() == before


def test_planning_reads_no_tensor(base: Checkpoint, vector: TaskVector, tmp_path: Path) -> None:
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    assert edited(planned(base, vector)) == set(F32)


# what is done


def test_every_tensor_of_base_is_in_the_output_once_in_its_shard_and_place(base: Checkpoint, vector: TaskVector) -> None:
    plan = planned(base, vector)
    assert [[job.name for job in shard.jobs] for shard in plan.shards] == [[t.name for t in s.tensors] for s in base.shards]
    assert [shard.name for shard in plan.shards] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for shard in plan.shards:
        at = len(shard.header)
        for job in shard.jobs:
            assert (job.offset, job.base) == (at, base.tensors[job.name])
            at += job.nbytes
        assert at == shard.size


def test_a_term_carries_alpha_as_it_is_subtracted(base: Checkpoint, tuned: Checkpoint, vector: TaskVector) -> None:
    (job,) = (job for job in planned(base, -0.3 * vector + 2 * vector).jobs if job.name == "a")
    delta = DenseDelta(tuned.tensors["a"], base.tensors["a"])
    assert job.terms == (Term(0.3, delta), Term(-2.0, delta))


def test_a_coefficient_of_zero_makes_a_copy(base: Checkpoint, vector: TaskVector) -> None:
    plan = planned(base, 0 * vector)
    assert plan.edited == []
    assert all(job.copied for job in plan.jobs)


def test_a_zero_vector_beside_another_is_left_out(base: Checkpoint, vector: TaskVector) -> None:
    assert planned(base, 0 * vector + vector).jobs == planned(base, vector).jobs


def test_integers_are_copied_and_compared_with_every_fine_tune(base: Checkpoint, vector: TaskVector, tmp_path: Path) -> None:
    other = opened(tmp_path / "other", tensors(0))
    plan = planned(base, vector + TaskVector.between(base, other))
    (job,) = (job for job in plan.jobs if job.name == "n")
    assert job.copied
    assert job.compared == (vector.terms[0][1].inputs[0].tensors["n"], other.tensors["n"])


def test_include_and_exclude_choose_what_is_edited(base: Checkpoint, vector: TaskVector) -> None:
    assert edited(planned(base, vector, include=("layers.*",))) == {"layers.0.w", "layers.1.w"}
    assert edited(planned(base, vector, exclude=("layers.*", "b"))) == {"a"}
    assert edited(planned(base, vector, include=("layers.*", "a"), exclude=("*.1.*",))) == {"a", "layers.0.w"}
    assert edited(planned(base, vector, include=("[ab]",))) == {"a", "b"}
    assert len(planned(base, vector, include=("a",)).jobs) == 5


def test_patterns_are_case_sensitive(base: Checkpoint, vector: TaskVector) -> None:
    with pytest.raises(UsageError, match="A"):
        planned(base, vector, include=("A",))


@pytest.mark.parametrize(
    ("out_dtype", "stored", "width"),
    [("bfloat16", "BF16", 2), ("float16", "F16", 2), ("float32", "F32", 4), ("float64", "F64", 8)],
)
def test_out_dtype_changes_every_float_and_no_integer(
    base: Checkpoint, vector: TaskVector, out_dtype: str, stored: str, width: int
) -> None:
    plan = planned(base, vector, out_dtype=out_dtype, exclude=("a",))
    assert {(job.dtype, job.nbytes) for job in plan.jobs if job.name != "n"} == {(stored, 6 * width)}
    assert [(job.dtype, job.nbytes, job.copied) for job in plan.jobs if job.name == "n"] == [("I64", 24, True)]
    (left_out,) = (job for job in plan.jobs if job.name == "a")
    assert (left_out.terms, left_out.copied) == ((), out_dtype == "float32")


def test_the_sizes_are_those_of_what_is_read_and_written(base: Checkpoint, vector: TaskVector) -> None:
    plan = planned(base, vector, exclude=("a",))
    assert plan.bytes_to_read == 3 * 2 * 24 + 24 + 2 * 24
    assert plan.bytes_to_write == sum(len(s.header) for s in plan.shards) + base.nbytes + sum(f.nbytes for f in plan.side)
    assert plan.summary()["elements_edited"] == 18


def test_every_input_file_is_pinned(base: Checkpoint, vector: TaskVector, tmp_path: Path) -> None:
    assert set(planned(base, vector).identities) == set(tmp_path.rglob("*.safetensors"))


def test_a_printed_plan_says_what_will_be_done(base: Checkpoint, vector: TaskVector) -> None:
    text = str(planned(base, -0.3 * vector, exclude=("a",)))
    assert text.startswith("edited = base − 0.3·(tuned − base)\nedit 3 tensors (18 elements), copy 2\n")
    assert "model-00002-of-00002.safetensors" in text
    assert "config.json" in text


def test_stored_differences_and_their_scales_are_terms(base: Checkpoint, tmp_path: Path) -> None:
    source = StoredSource(opened(tmp_path / "delta.safetensors", {"a": tensors(5)["a"]}), 4.0)
    plan = planned(base, TaskVector(((-0.5, source),)))
    value = source.checkpoint.tensors["a"]
    assert [job.terms for job in plan.edited] == [(Term(0.5, ScaledDelta(value, 4.0)),)]


# how it is split


def test_max_shard_size_packs_tensors_in_order(base: Checkpoint, vector: TaskVector) -> None:
    plan = planned(base, vector, max_shard_size=50)
    groups = [[job.name for job in shard.jobs] for shard in plan.shards]
    assert [name for group in groups for name in group] == list(base.tensors)
    assert [len(group) for group in groups] == [2, 2, 1]
    assert [shard.name for shard in plan.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def test_a_tensor_larger_than_a_shard_has_one_for_itself(base: Checkpoint, vector: TaskVector) -> None:
    assert [len(shard.jobs) for shard in planned(base, vector, max_shard_size=1).shards] == [1] * 5


def test_the_size_counts_in_the_output_s_dtype(base: Checkpoint, vector: TaskVector) -> None:
    assert len(planned(base, vector, max_shard_size=50, out_dtype="bfloat16").shards) == 2
    assert len(planned(base, vector, max_shard_size=50, out_dtype="float64").shards) == 5


def test_one_shard_is_called_model_safetensors(base: Checkpoint, vector: TaskVector) -> None:
    for limit in ("1GB", "1 gb", 10**9, "1000"):
        assert [shard.name for shard in planned(base, vector, max_shard_size=limit).shards] == ["model.safetensors"]


def test_a_diffusers_model_keeps_its_stem(tmp_path: Path) -> None:
    write_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors", tensors(0))
    base = Checkpoint.open(tmp_path / "unet")
    vector = TaskVector.between(base, opened(tmp_path / "tuned", tensors(1)))
    assert [s.name for s in planned(base, vector).shards] == ["diffusion_pytorch_model.safetensors"]
    assert planned(base, vector, max_shard_size=50).shards[1].name == "diffusion_pytorch_model-00002-of-00003.safetensors"


def test_one_output_file_holds_every_shard_of_base(base: Checkpoint, vector: TaskVector) -> None:
    plan = planned(base, vector, single_file=True)
    assert [[job.name for job in shard.jobs] for shard in plan.shards] == [list(base.tensors)]
    assert plan.side == ()


def test_one_output_file_cannot_be_split(base: Checkpoint, vector: TaskVector) -> None:
    with pytest.raises(UsageError, match=r"needs 3.*--max-shard-size"):
        planned(base, vector, single_file=True, max_shard_size=50)


@pytest.mark.parametrize("limit", ["0", 0, -1, "-5GB", "", "GB", "5XB", "five", "1e9", "²", "1.5.5GB", "nan", "inf"])
def test_a_size_that_makes_no_sense_is_a_usage_error(base: Checkpoint, vector: TaskVector, limit: int | str) -> None:
    with pytest.raises(UsageError, match=r"max_shard_size .*expected a positive number of bytes or text like 5GB"):
        planned(base, vector, max_shard_size=limit)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5kb", 1500), ("7", 7), (7, 7), ("2 TB", 2 * 10**12), ("3M", 3 * 10**6)],
)
def test_sizes_are_decimal_as_on_the_hub(text: int | str, size: int) -> None:
    assert parse_bytes("memory", text) == size


def test_sizes_are_shown_as_a_person_reads_them() -> None:
    assert [human_bytes(n) for n in (0, 999, 1000, 2_500_000, 7 * 10**9, 3 * 10**12)] == [
        "0 bytes", "999 bytes", "1.0 kB", "2.5 MB", "7.0 GB", "3.00 TB",
    ]  # fmt: skip


# what is refused


def test_an_include_pattern_that_matches_nothing_is_a_usage_error(base: Checkpoint, vector: TaskVector) -> None:
    with pytest.raises(UsageError, match=r"--include 'layer\.\*' matches no tensor of .*base.*Its names are like n, a,"):
        planned(base, vector, include=("a", "layer.*"))


def test_leaving_everything_out_is_refused(base: Checkpoint, vector: TaskVector) -> None:
    with pytest.raises(NameMismatchError, match="no tensor is edited"):
        planned(base, vector, exclude=("*",))


def test_an_unknown_out_dtype_is_a_usage_error(base: Checkpoint, vector: TaskVector) -> None:
    with pytest.raises(UsageError, match="int8, expected one of same, bfloat16"):
        planned(base, vector, out_dtype="int8")


@pytest.mark.parametrize("coefficient", [3.5e38, -3.5e38, 1e300])
def test_a_coefficient_beyond_float32_is_a_usage_error(base: Checkpoint, vector: TaskVector, coefficient: float) -> None:
    with pytest.raises(UsageError, match="outside float32"):
        planned(base, coefficient * vector)


def test_the_largest_float32_is_a_coefficient(base: Checkpoint, vector: TaskVector) -> None:
    assert edited(planned(base, float(np.finfo(np.float32).max) * vector)) == set(F32)


def test_a_coefficient_times_scale_beyond_float32_is_a_usage_error(base: Checkpoint, tmp_path: Path) -> None:
    source = StoredSource(opened(tmp_path / "delta.safetensors", {"a": tensors(5)["a"]}), 1e30)
    with pytest.raises(UsageError, match="outside float32"):
        planned(base, TaskVector(((1e10, source),)))


def test_what_does_not_fit_is_refused_before_anything_is_written(base: Checkpoint, tmp_path: Path) -> None:
    resized = opened(tmp_path / "resized", tensors(1, a=tensor("F32", np.zeros(9, np.float32), (3, 3))))
    with pytest.raises(ShapeMismatchError, match="tensor a"):
        planned(base, TaskVector.between(base, resized))
    renamed = opened(tmp_path / "renamed", {f"model.{name}": value for name, value in tensors(1).items()})
    with pytest.raises(NameMismatchError, match="no tensor name in common"):
        planned(base, TaskVector.between(base, renamed))
    assert edited(planned(base, TaskVector.between(base, resized), exclude=("a",))) == set(F32) - {"a"}
    assert len(weight_files(tmp_path / "base")) == 2


def test_one_vector_that_does_not_fit_refuses_the_whole(base: Checkpoint, vector: TaskVector, tmp_path: Path) -> None:
    other = opened(tmp_path / "other", {"x": tensors(0)["a"]})
    with pytest.raises(NameMismatchError, match="other"):
        planned(base, vector + TaskVector.between(base, other))


# what is named


def test_tensors_on_one_side_only_are_notes_and_lists(base: Checkpoint, tmp_path: Path) -> None:
    found = tensors(1)
    tuned = opened(tmp_path / "tuned2", {"a": found["a"], "x": found["b"]})
    plan = planned(base, TaskVector.between(base, tuned))
    assert set(plan.missing) == {"b", "layers.0.w", "layers.1.w", "n"}
    assert plan.unused == ("x",)
    assert len(plan.notes) == 2
    assert all(f"note: {note}" in str(plan) for note in plan.notes)


def test_two_vectors_with_the_same_note_say_it_once(base: Checkpoint, tmp_path: Path) -> None:
    tuned = opened(tmp_path / "tuned2", {"a": tensors(1)["a"]})
    vector = TaskVector.between(base, tuned)
    assert planned(base, vector + vector).notes == planned(base, vector).notes
