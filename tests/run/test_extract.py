from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import taskvec as tv
from taskvec import Checkpoint, MismatchError, OutputError, TaskVector, UsageError
from taskvec.checkpoint import files
from taskvec.run import worker
from taskvec.run.extract import vector_plan
from taskvec.run.plan import Options

from .checkpoints import Tensors, bits, opened, read_model, write_model, write_sparse

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    "model.layers.0.w": (9, 7), "model.layers.1.w": (7, 9), "model.bias": (5,), "model.scalar": (), "model.none": (0, 3),
    "model.conv": (2, 3, 3, 3),
}  # fmt: skip


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {name: (torch.randn(shape, generator=generator) * scale).to(dtype) for name, shape in SHAPES.items()}
    return {**found, "model.ids": torch.arange(4)}


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return opened(tmp_path / "base", tensors(1))


@pytest.fixture
def old(base: Checkpoint, tmp_path: Path) -> TaskVector:
    return opened(tmp_path / "old", tensors(2)) - base


def floats(found: Tensors) -> list[str]:
    return [name for name, tensor in found.items() if tensor.is_floating_point() and tensor.numel()]


def story(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        found: dict[str, Any] = json.loads(file.metadata()["taskvec"])
    return found


def both_ways(base: Checkpoint, vector: TaskVector, alpha: float, work: Path, **options: Any) -> tuple[Any, Any]:
    """base − α·vector directly, and by way of a saved vector."""
    vector.save(work / "v.safetensors", base=base, fsync=False, **options)
    (base - alpha * vector).save(work / "direct", fsync=False)
    (base - alpha * TaskVector.open(work / "v.safetensors")).save(work / "saved", fsync=False)
    return read_model(work / "direct"), read_model(work / "saved")


# what is in the file


@pytest.mark.parametrize("dtype", FLOATS)
def test_it_holds_the_float32_difference_of_every_float_tensor(tmp_path: Path, dtype: str) -> None:
    b, t = tensors(1, FLOATS[dtype]), tensors(2, FLOATS[dtype])
    vector = opened(tmp_path / "old", t) - opened(tmp_path / "base", b)
    saved = vector.save(tmp_path / "v.safetensors", fsync=False)
    found = load_file(tmp_path / "v.safetensors")
    assert set(found) == set(floats(b)) == set(saved.tensors)
    for name, value in found.items():
        wide = torch.float64 if dtype == "F64" else torch.float32
        assert value.dtype == torch.float32 and value.equal((t[name].to(wide) - b[name].to(wide)).float()), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_of_the_file_is_chosen_by_one_rounding(
    base: Checkpoint, old: TaskVector, tmp_path: Path, dtype: str
) -> None:
    saved = old.save(tmp_path / "v.safetensors", dtype=dtype, fsync=False)
    for name, value in load_file(tmp_path / "v.safetensors").items():
        exact = tensors(2)[name].float() - tensors(1)[name].float()
        assert value.equal(exact.to(getattr(torch, dtype))), name
    assert saved.summary()["warnings"] == []


@pytest.mark.parametrize("dtype", ["float64", "same", "int8", ""])
def test_other_dtypes_are_a_usage_error(old: TaskVector, tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UsageError, match="expected one of float32, bfloat16, float16"):
        old.save(tmp_path / "v.safetensors", dtype=dtype)


def test_the_metadata_say_what_it_is_the_difference_of(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    (0.5 * old).save(tmp_path / "v.safetensors", fsync=False)
    told = story(tmp_path / "v.safetensors")
    assert (told["kind"], told["formula"], told["taskvec"]) == ("vector", "0.5·(old − base)", tv.__version__)
    lines = sorted(f"{name} {list(tensor.shape)}" for name, tensor in tensors(1).items())
    assert told["shapes_sha256"] == hashlib.sha256("\n".join(lines).encode()).hexdigest()
    expected = {f"{n}/model.safetensors": (tmp_path / n / "model.safetensors").read_bytes() for n in ("base", "old")}
    assert told["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in expected.items()}
    assert str(tmp_path) not in json.dumps(told)


def test_sources_of_one_name_are_hashed_each(base: Checkpoint, tmp_path: Path) -> None:
    paths = [opened(tmp_path / place / "old", tensors(seed)) for seed, place in enumerate("abc", 5)]
    sum(path - base for path in paths).save(tmp_path / "v.safetensors", fsync=False)
    hashes = {hashlib.sha256((path.path / "model.safetensors").read_bytes()).hexdigest() for path in (base, *paths)}
    assert set(story(tmp_path / "v.safetensors")["sha256"].values()) == hashes


def test_tensors_without_a_change_are_left_out_and_named(base: Checkpoint, tmp_path: Path) -> None:
    tuned = {**tensors(2), "model.layers.1.w": tensors(1)["model.layers.1.w"]}
    saved = (opened(tmp_path / "old", tuned) - base).save(tmp_path / "v.safetensors", fsync=False)
    assert set(saved.zero) == {"model.layers.1.w", "model.none"}
    assert set(load_file(tmp_path / "v.safetensors")) == set(floats(tensors(1))) - {"model.layers.1.w"}


def test_what_cancels_is_left_out_too(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    saved = (old - old).save(tmp_path / "v.safetensors", fsync=False)
    assert saved.tensors == () and load_file(tmp_path / "v.safetensors") == {}


def test_one_changed_element_in_the_last_tile_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskvec.run import jobs

    monkeypatch.setattr(jobs, "TILE_BYTES", 64)
    b = {"a": torch.zeros(40, 30), "z": torch.zeros(40, 30)}
    t = {"a": b["a"].clone(), "z": b["z"]}
    t["a"][-1, -1] = 1
    saved = (opened(tmp_path / "old", t) - opened(tmp_path / "base", b)).save(tmp_path / "v.safetensors", fsync=False)
    assert (saved.tensors, saved.zero) == (("a",), ("z",))
    assert load_file(tmp_path / "v.safetensors")["a"].equal(t["a"])


def test_a_vector_of_nothing_is_saved_and_applied(base: Checkpoint, tmp_path: Path) -> None:
    vector = opened(tmp_path / "old", tensors(1)) - base
    direct, saved = both_ways(base, vector, 0.3, tmp_path)
    assert direct == saved == read_model(tmp_path / "base")
    with pytest.raises(MismatchError):
        (opened(tmp_path / "other", {"w": torch.ones(2)}) - TaskVector.open(tmp_path / "v.safetensors")).plan()


def test_a_base_of_float64_is_said_to_be_rounded(tmp_path: Path) -> None:
    pair = [opened(tmp_path / name, tensors(seed, torch.float64)) for seed, name in enumerate(("base", "old"))]
    saved = (pair[1] - pair[0]).save(tmp_path / "v.safetensors", fsync=False)
    assert any("5 tensors float64 in the base, rounded to float32" in warning for warning in saved.warnings)


def test_overflow_and_what_is_no_number_is_said(tmp_path: Path) -> None:
    base = opened(tmp_path / "base", {"a": torch.zeros(3), "b": torch.zeros(3), "c": torch.zeros(3)})
    tuned = {"a": torch.tensor([1e6, 1, 1]), "b": torch.tensor([torch.nan, torch.inf, 1]), "c": torch.tensor([1e-12, 1, 0])}
    saved = (opened(tmp_path / "old", tuned) - base).save(tmp_path / "v.safetensors", dtype="float16", fsync=False)
    assert saved.warnings == (
        "1 element overflowed float16, in a",
        "2 elements inf or NaN, as an input is there, in b",
        "the difference of 1 element was lost to rounding into float16",
    )


def test_tensors_of_other_kinds_that_differ_are_said_to_be_missing(base: Checkpoint, tmp_path: Path) -> None:
    tuned = {**tensors(2), "model.ids": torch.arange(4) + 1}
    saved = (opened(tmp_path / "old", tuned) - base).save(tmp_path / "v.safetensors", fsync=False)
    assert saved.warnings == ("1 tensor not floats, other in tuned and not in the vector: model.ids",)


def test_what_only_one_side_has_is_noted(base: Checkpoint, tmp_path: Path) -> None:
    tuned = {**tensors(2), "extra.w": torch.ones(1)}
    del tuned["model.bias"]
    saved = (opened(tmp_path / "old", tuned) - base).save(tmp_path / "v.safetensors", fsync=False)
    assert "model.bias" not in saved.tensors
    assert any("extra.w" in note for note in saved.notes) and any("model.bias" in note for note in saved.notes)


# applied again


@pytest.mark.parametrize("alpha", [0.3, -0.3, 1.0, 2.5, 1e-3])
@pytest.mark.parametrize("tuned", ["F32", "BF16", "F16", "F8_E4M3"])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"])
def test_a_saved_fine_tune_gives_the_bytes_of_the_direct_edit(tmp_path: Path, dtype: str, tuned: str, alpha: float) -> None:
    base = opened(tmp_path / "base", tensors(1, FLOATS[dtype]))
    vector = opened(tmp_path / "old", tensors(2, FLOATS[tuned])) - base
    direct, saved = both_ways(base, vector, alpha, tmp_path)
    assert direct == saved


@pytest.mark.parametrize("seed", range(4))
def test_so_it_does_for_random_bfloat16_of_every_size(tmp_path: Path, seed: int) -> None:
    """Any bits but NaN and −0: exponents far apart too, where the float32 difference is itself rounded, once, both ways."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 1 << 16, (2, 60_000), np.uint16)
    words[(words & 0x7F80) == 0x7F80] = 0x3F80
    words[words == 0x8000] = 0
    words[(words & 0x7F00) == 0x7F00] &= 0xBFFF  # no difference overflows
    pair = [{"w": torch.from_numpy(part.view(np.int16).copy()).view(torch.bfloat16).reshape(200, 300)} for part in words]
    base = opened(tmp_path / "base", pair[0])
    direct, saved = both_ways(base, opened(tmp_path / "old", pair[1]) - base, float(rng.uniform(0.05, 1)), tmp_path)
    assert direct == saved


@pytest.mark.parametrize("alpha", [0.3, -0.3])
def test_inf_and_nan_are_saved_so_that_the_edit_is_the_same(tmp_path: Path, alpha: float) -> None:
    inf, nan = torch.inf, torch.nan
    base = opened(tmp_path / "base", {"w": torch.tensor([inf, -inf, nan, 1, 1, inf, nan, -0.0, 1])})
    tuned = torch.tensor([inf, -inf, nan, inf, nan, 1, 1, -0.0, 2])
    direct, saved = both_ways(base, opened(tmp_path / "old", {"w": tuned}) - base, alpha, tmp_path)
    assert direct == saved


def test_a_float64_base_is_within_a_float32_rounding_of_the_difference(tmp_path: Path) -> None:
    b, t = tensors(1, torch.float64), tensors(2, torch.float64)
    base = opened(tmp_path / "base", b)
    both_ways(base, opened(tmp_path / "old", t) - base, 0.3, tmp_path)
    direct, saved = (load_file(tmp_path / way / "model.safetensors") for way in ("direct", "saved"))
    for name in floats(b):
        assert ((direct[name] - saved[name]).abs() <= 0.3 * (t[name] - b[name]).abs() * 2**-24 * 1.01).all(), name


def test_a_combination_is_within_an_ulp(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    new = opened(tmp_path / "new", tensors(3)) - base
    vector = 0.7 * old - 0.25 * new + 0.1 * old
    both_ways(base, vector, 0.6, tmp_path)
    direct, saved = (load_file(tmp_path / way / "model.safetensors") for way in ("direct", "saved"))
    for name in floats(tensors(1)):
        near = torch.nextafter(direct[name], torch.full_like(direct[name], torch.inf)) - direct[name]
        assert ((direct[name] - saved[name]).abs() <= near.abs() * 2).all(), name
        assert (direct[name] == saved[name]).float().mean() > 0.95
    assert story(tmp_path / "v.safetensors")["formula"] == repr(vector)[len("TaskVector(") : -1]


def test_a_vector_of_views_is_saved_as_they_weigh_it(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    mask = opened(tmp_path / "mask.safetensors", {"model.layers.0.w": torch.rand(9, 7).round()})
    view = old.without("*conv*").scaled({"*.0.*": 0.5, "*": 2}).masked(mask)
    direct, saved = both_ways(base, view, 0.3, tmp_path)
    assert direct == saved
    t, b = tensors(2)["model.layers.0.w"].float(), tensors(1)["model.layers.0.w"].float()
    expected = torch.tensor(0.5) * (load_file(mask.path)["model.layers.0.w"] * (t - b))
    found = load_file(tmp_path / "v.safetensors")
    assert found["model.layers.0.w"].equal(expected) and "model.conv" not in found
    assert "mask.safetensors" in story(tmp_path / "v.safetensors")["sha256"]


def test_a_mask_over_a_saved_vector_is_a_mask_over_the_fine_tune(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    weights = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    mask = opened(tmp_path / "mask.safetensors", weights)
    old.save(tmp_path / "v.safetensors", fsync=False)
    (base - 0.3 * old.masked(mask)).save(tmp_path / "direct", fsync=False)
    (base - 0.3 * TaskVector.open(tmp_path / "v.safetensors").masked(mask)).save(tmp_path / "saved", fsync=False)
    assert read_model(tmp_path / "direct") == read_model(tmp_path / "saved")


def test_a_vector_of_vectors_needs_its_base_named(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    old.save(tmp_path / "v.safetensors", fsync=False)
    vector = TaskVector.open(tmp_path / "v.safetensors")
    with pytest.raises(UsageError, match=r"the base of .*v.safetensors is not certain: none is known. Name it with base="):
        (2 * vector).save(tmp_path / "w.safetensors")
    (2 * vector).save(tmp_path / "w.safetensors", base=base, fsync=False)
    once, twice = load_file(tmp_path / "v.safetensors"), load_file(tmp_path / "w.safetensors")
    assert once.keys() == twice.keys() and all(twice[name].equal(once[name] * 2) for name in once)
    (old + vector).save(tmp_path / "sum.safetensors", fsync=False)  # `old` says the base
    assert all(value.equal(once[name] * 2) for name, value in load_file(tmp_path / "sum.safetensors").items())


def test_vectors_from_different_bases_need_one_named(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    other = opened(tmp_path / "new", tensors(3)) - opened(tmp_path / "origin", tensors(4))
    with pytest.raises(UsageError, match="not certain: base, origin"):
        (old + other).save(tmp_path / "v.safetensors")
    assert (old + other).save(tmp_path / "v.safetensors", base=base, fsync=False).tensors


# how it is written


def test_a_folder_is_cut_into_shards_that_safetensors_loads(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    old.save(tmp_path / "one.safetensors", fsync=False)
    old.save(tmp_path / "many", max_shard_size=300, fsync=False)
    shards = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"vector-00001-of-{len(shards):05d}.safetensors"
    assert read_model(tmp_path / "many") == read_model(tmp_path / "one.safetensors")
    index = json.loads((tmp_path / "many" / "vector.safetensors.index.json").read_text())
    assert {name for file in shards for name in load_file(tmp_path / "many" / file)} == set(index["weight_map"])
    others = {"vector.safetensors.index.json", "README.md", "taskvec.json"}
    assert {path.name for path in (tmp_path / "many").iterdir()} == {*shards, *others}
    (base - TaskVector.open(tmp_path / "many")).save(tmp_path / "out", fsync=False)
    (base - old).save(tmp_path / "direct", fsync=False)
    assert read_model(tmp_path / "out") == read_model(tmp_path / "direct")


@pytest.mark.parametrize("size", [0, "", "-1", "5XB"])
def test_a_shard_size_that_is_none_is_a_usage_error(old: TaskVector, tmp_path: Path, size: Any) -> None:
    with pytest.raises(UsageError, match="expected a positive number"):
        old.save(tmp_path / "many", max_shard_size=size)
    with pytest.raises(UsageError, match=r"one output file, but max_shard_size 100 needs \d"):
        old.save(tmp_path / "v.safetensors", max_shard_size=100)


def test_the_same_vector_has_the_same_bytes_however_it_is_written(old: TaskVector, tmp_path: Path) -> None:
    for place, options in enumerate(({}, {"jobs": 1}, {"jobs": 3, "memory": "64MB"})):
        old.save(tmp_path / f"{place}.safetensors", fsync=False, **options)  # type: ignore[arg-type]
    assert len({(tmp_path / f"{place}.safetensors").read_bytes() for place in range(3)}) == 1


def test_an_output_is_replaced_only_when_asked_and_only_one_of_ours(old: TaskVector, tmp_path: Path) -> None:
    for output in ("v.safetensors", "folder"):
        old.save(tmp_path / output, fsync=False)
        with pytest.raises(OutputError, match="exists already"):
            old.save(tmp_path / output)
        (2 * old).save(tmp_path / output, overwrite=True, fsync=False)
        assert TaskVector.open(tmp_path / output)
    (tmp_path / "theirs.safetensors").write_bytes((tmp_path / "base" / "model.safetensors").read_bytes())
    with pytest.raises(OutputError, match="not made by taskvec"):
        old.save(tmp_path / "theirs.safetensors", overwrite=True)


def test_an_input_is_never_the_output(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    old.save(tmp_path / "v.safetensors", fsync=False)
    vector = TaskVector.open(tmp_path / "v.safetensors")
    mask = opened(tmp_path / "mask.safetensors", {"model.bias": torch.ones(5)})
    for output in ("v.safetensors", "mask.safetensors", "base/model.safetensors", "base/inner"):
        with pytest.raises(OutputError, match="inputs are never changed"):
            (2 * vector.masked(mask)).save(tmp_path / output, base=base, overwrite=True)


def test_inputs_stay_as_they_are_and_nothing_lies_beside_them(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    old.save(tmp_path / "made" / "v.safetensors", fsync=False)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*") if path.is_file()}
    assert after.pop(tmp_path / "made" / "v.safetensors") and after == before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("disk")])
def test_an_extraction_that_ends_half_way_leaves_nothing(
    old: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    before = set(tmp_path.rglob("*"))

    def fail(*arguments: Any) -> None:
        raise failure

    monkeypatch.setattr(worker.Worker, "write", fail)
    for output in ("v.safetensors", "folder"):
        with pytest.raises((KeyboardInterrupt, OSError)):
            old.save(tmp_path / output)
        assert set(tmp_path.rglob("*")) == before


def test_a_failed_overwrite_keeps_what_was_there(old: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old.save(tmp_path / "v.safetensors", fsync=False)
    before = (tmp_path / "v.safetensors").read_bytes()
    monkeypatch.setattr(files, "rename_exchange", lambda *paths: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OutputError):
        (2 * old).save(tmp_path / "v.safetensors", overwrite=True)
    assert (tmp_path / "v.safetensors").read_bytes() == before
    monkeypatch.undo()
    report = (2 * old).save(tmp_path / "v.safetensors", overwrite=True)  # with the file that was finished
    assert "1 of 1 file taken from an interrupted run" in report.notes[0]
    assert (tmp_path / "v.safetensors").read_bytes() != before
    assert not [path for path in tmp_path.iterdir() if "partial" in path.name]


# reading


class Reads:
    """Every byte range of an input that is read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ranges: Counter[tuple[str, int, int]] = Counter()
        read = files.read_exact

        def counted(fd: int, buffer: memoryview, offset: int, *, path: Path, tensor: str = "") -> None:
            if path.suffix == ".safetensors":
                self.ranges[str(path), offset, len(buffer)] += 1
            read(fd, buffer, offset, path=path, tensor=tensor)

        monkeypatch.setattr(files, "read_exact", counted)


def test_a_range_is_read_once_however_often_a_vector_occurs(
    base: Checkpoint, old: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = opened(tmp_path / "mask.safetensors", {"model.layers.0.w": torch.rand(9, 7)})
    vector = old + 0.5 * old - 2 * old.masked(mask) + old.only("*layers*").scaled({"*.0.*": 3}) + old.masked(mask)
    edited = base - vector
    plan = edited.plan()
    reads = Reads(monkeypatch)
    edited.save(tmp_path / "out", fsync=False, jobs=2)
    assert set(reads.ranges.values()) == {1}
    assert sum(size for _, _, size in reads.ranges) == plan.bytes_to_read
    assert plan.bytes_to_read == (base - old).plan().bytes_to_read + 9 * 7 * 4


def test_a_saved_vector_that_occurs_twice_is_read_once(
    base: Checkpoint, old: TaskVector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old.save(tmp_path / "v.safetensors", fsync=False)
    first, again = (TaskVector.open(tmp_path / "v.safetensors") for _ in range(2))
    edited = base - first + 0.5 * again - first.only("*layers*")
    reads = Reads(monkeypatch)
    edited.save(tmp_path / "out", fsync=False)
    assert set(reads.ranges.values()) == {1}


def test_buffers_are_bounded_whatever_the_size(tmp_path: Path) -> None:
    shapes = {f"model.layers.{i}.w": (8192, 8192) for i in range(4)}
    base, old = (Checkpoint.open(write_sparse(tmp_path / f"{name}.safetensors", shapes)) for name in ("base", "old"))
    plan = vector_plan(base, (old - base) + (old - base), Options("float32"), single_file=True)
    assert plan.buffer_bytes() < 40 << 20
    assert sum(len(shard.header) for shard in plan.shards) < 10_000


# sources of other kinds


def test_extract_is_the_verb_as_a_function(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    tv.extract(base, tmp_path / "old", output=tmp_path / "a.safetensors", alpha=-0.5, fsync=False)
    (-0.5 * old).save(tmp_path / "b.safetensors", fsync=False)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    tv.extract(tmp_path / "base", old, output=tmp_path / "c.safetensors", alpha=-0.5, fsync=False)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_a_model_of_several_shards_is_extracted_like_one_of_one(tmp_path: Path) -> None:
    base = Checkpoint.open(write_model(tmp_path / "base", tensors(1), shards=3))
    old = Checkpoint.open(write_model(tmp_path / "old", tensors(2), shards=2))
    (old - base).save(tmp_path / "v.safetensors", fsync=False)
    found = load_file(tmp_path / "v.safetensors")
    assert all(bits(v) == bits(tensors(2)[n].float() - tensors(1)[n].float()) for n, v in found.items())
    assert len(story(tmp_path / "v.safetensors")["sha256"]) == 5


def test_an_edit_of_a_saved_vector_hides_no_metadata_in_its_output(base: Checkpoint, old: TaskVector, tmp_path: Path) -> None:
    (base - old).save(tmp_path / "e.safetensors", fsync=False)
    (Checkpoint.open(tmp_path / "e.safetensors") + old).save(tmp_path / "again.safetensors", fsync=False)
    assert "kind" not in story(tmp_path / "again.safetensors")
