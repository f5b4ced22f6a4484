from __future__ import annotations

import hashlib
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

import taskvec as tv
from taskvec import Checkpoint, OutputError, SourceChangedError, TaskVector
from taskvec.checkpoint.floats import Raw
from taskvec.checkpoint.header import StoredTensor
from taskvec.errors import CheckpointError
from taskvec.run import jobs
from taskvec.run.jobs import Job, Tile, tiles
from taskvec.run.kernel import Counts, NumpyKernel, ReadStored
from taskvec.run.plan import Options, Plan, make_plan
from taskvec.run.stream import RunResult, Settings, ShardResult, execute

from .checkpoints import MakeKernel, loaded_headers, opened, read_model, tensor, weight_files, write_sparse
from .reference import Change, Stored, edit, numbers, pairs, rounded, ulp, unsigned
from .stored_deltas import StoredSource

TILE = 256  # bytes, so that small tensors have many
Tensors = dict[str, Any]
DTYPES = {"bf16": "BF16", "f32": "F32", "f16": "F16", "f64": "F64", "e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "real_tiles" not in request.fixturenames:
        monkeypatch.setattr(jobs, "TILE_BYTES", TILE)


@pytest.fixture
def real_tiles() -> None:
    """Asked for by tests that measure."""


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """No thread and no descriptor outlives a run, however it ends."""
    threads, descriptors = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == descriptors


def model(seed: int, count: int = 600) -> tuple[Tensors, Tensors]:
    """Base and tuned with every kind of tensor: all float dtypes, integers, booleans, 0-d, empty, long rows."""
    base: Tensors = {}
    tuned: Tensors = {}
    for name, dtype in DTYPES.items():
        left, right = pairs(dtype, dtype, count, seed)
        base[name], tuned[name] = tensor(dtype, left), tensor(dtype, right)
    left, right = pairs("BF16", "F32", count, seed + 1)
    base["mixed"], tuned["mixed"] = tensor("BF16", left), tensor("F32", right)
    base["rows"], tuned["rows"] = (t["bf16"][-(count // 3) * 3 :].reshape(3, -1) for t in (base, tuned))
    base["scalar"], tuned["scalar"] = (t["f32"][-1].reshape(()) for t in (base, tuned))
    base["empty"] = tuned["empty"] = tensor("F32", np.empty(0, np.uint32), (0, 4))
    base["ids"] = tensor("I64", np.arange(100), (10, 10))
    tuned["ids"] = tensor("I64", np.arange(100) + (np.arange(100) > 96), (10, 10))
    base["mask"] = tuned["mask"] = tensor("BOOL", np.arange(77, dtype=np.uint8) % 2)
    return {k: v.clone() for k, v in base.items()}, {k: v.clone() for k, v in tuned.items()}


def words(tensors: Tensors, name: str, dtype: str) -> Stored:
    return Stored(dtype, np.frombuffer(tensors[name].reshape(-1).view(_u8()).numpy().tobytes(), unsigned(dtype)))


def _u8() -> Any:
    import torch

    return torch.uint8


def run(plan: Plan, folder: Path, **settings: Any) -> RunResult:
    folder.mkdir()
    return execute(plan, folder, Settings(**{"fsync": False, "batch": TILE, **settings}))


def small_plan(tmp_path: Path, shards: int = 1, count: int = 600, **options: Any) -> Plan:
    base, tuned = model(1, count)
    base_at = opened(tmp_path / "base", base, shards)
    vector = TaskVector.between(base_at, opened(tmp_path / "tuned", tuned))
    return make_plan(base_at, -0.3 * vector, Options(**options))


# what comes out


@pytest.mark.parametrize("out_dtype", ["same", "float64", "bfloat16"])
def test_every_tensor_of_the_output_is_the_formula_or_a_copy(tmp_path: Path, out_dtype: str, kernel: MakeKernel) -> None:
    base, tuned = model(1)
    result = run(small_plan(tmp_path, out_dtype=out_dtype), tmp_path / "out", make_kernel=kernel)
    found = read_model(tmp_path / "out")
    out = {"float64": "F64", "bfloat16": "BF16"}.get(out_dtype)
    for name, dtype in {**DTYPES, "mixed": "BF16", "rows": "BF16", "scalar": "F32"}.items():
        left, right = words(base, name, dtype), words(tuned, name, "F32" if name == "mixed" else dtype)
        expected = edit(left, [Change(0.3, right, left)], out or dtype)
        counts = result.counts[name]
        assert found[name] == expected.words.tobytes(), name
        assert (counts.intended, counts.changed, counts.overflow, counts.nonfinite) == expected[1:], name
    assert {name: found[name] for name in ("empty", "ids", "mask")} == {
        name: base[name].numpy().tobytes() for name in ("empty", "ids", "mask")
    }
    assert found.keys() == base.keys()


def test_the_output_has_the_names_shapes_and_dtypes_of_base(tmp_path: Path) -> None:
    run(small_plan(tmp_path, shards=3), tmp_path / "out")
    assert loaded_headers(tmp_path / "out") == loaded_headers(tmp_path / "base")


def test_an_integer_tensor_that_differs_is_base_s_and_its_bytes_are_counted(tmp_path: Path) -> None:
    result = run(small_plan(tmp_path), tmp_path / "out")
    assert result.counts["ids"] == Counts(differs=3)
    assert "mask" not in result.counts


@pytest.mark.parametrize("batch", [1, TILE, 3 * TILE, 1 << 20])
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_and_batches_change_no_byte(tmp_path: Path, kernel: MakeKernel, workers: int, batch: int) -> None:
    plan = small_plan(tmp_path, shards=2, count=3000)
    first = run(plan, tmp_path / "first")
    second = run(plan, tmp_path / "second", workers=workers, batch=batch, make_kernel=kernel)
    assert weight_files(tmp_path / "first") == weight_files(tmp_path / "second")
    assert first == second


def test_the_sharding_of_the_inputs_changes_no_byte_but_of_base_s_own(tmp_path: Path) -> None:
    base, tuned = model(1)
    one, three = opened(tmp_path / "one", tuned), opened(tmp_path / "three", tuned, 3)
    file = opened(tmp_path / "file.safetensors", tuned)
    outputs = []
    for shards in (1, 4):
        at = opened(tmp_path / f"base-{shards}", base, shards)
        for place, source in enumerate((one, three, file)):
            out = tmp_path / f"out-{shards}-{place}"
            run(make_plan(at, -0.3 * TaskVector.between(at, source), Options()), out)
            outputs.append(out)
        assert weight_files(outputs[-1]) == weight_files(outputs[-2]) == weight_files(outputs[-3])
        assert len(weight_files(outputs[-1])) == shards
    assert read_model(outputs[0]) == read_model(outputs[-1])


def test_the_checksum_is_over_the_checksums_of_the_tiles_in_file_order(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, shards=2)
    result = run(plan, tmp_path / "out", workers=2, sha256=True)
    for shard, found in zip(plan.shards, result.shards):
        content = (tmp_path / "out" / shard.name).read_bytes()
        assert found.checksum == xxhash.xxh3_128_hexdigest(shard.header + b"".join(tile_digests(shard.jobs, content)))
        assert found.sha256 == hashlib.sha256(content).hexdigest()
        length = int.from_bytes(content[:8], "little")
        assert found.header_sha256 == hashlib.sha256(content[8 : 8 + length]).hexdigest()
        assert (found.name, found.nbytes) == (shard.name, len(content))


def tile_digests(planned: tuple[Job, ...], content: bytes) -> Iterator[bytes]:
    for job in planned:
        width = jobs.unit_bytes(job.dtype)
        for tile in tiles(job.dtype, job.shape, job.nbytes):
            at = job.offset + tile.start * width
            yield xxhash.xxh3_128_digest(content[at : at + tile.units * width])


def test_progress_and_finished_shards_are_told_in_the_calling_thread(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, shards=3)
    written: list[int] = []
    done: list[ShardResult] = []
    threads = set()

    def progress(count: int) -> None:
        written.append(count)
        threads.add(threading.current_thread())

    result = run(plan, tmp_path / "out", workers=2, progress=progress, shard_done=done.append)
    assert written == sorted(written)
    assert written[-1] == sum(shard.size for shard in plan.shards)
    assert sorted(done) == sorted(result.shards)
    assert threads == {threading.current_thread()}


def test_a_model_of_empty_tensors_makes_a_file_that_loads(tmp_path: Path) -> None:
    empty = {"a": tensor("F32", np.empty(0, np.uint32)), "b": tensor("BF16", np.empty(0, np.uint16), (3, 0))}
    base = opened(tmp_path / "base", empty)
    run(make_plan(base, TaskVector.between(base, opened(tmp_path / "tuned", empty)), Options()), tmp_path / "out")
    assert read_model(tmp_path / "out") == {"a": b"", "b": b""}


# what goes wrong


class Meddling(NumpyKernel):
    """A kernel that calls `meddle` before its n-th tile."""

    def __init__(self, read_stored: ReadStored, meddle: Callable[[], None], tile: int) -> None:
        super().__init__(read_stored)
        self._meddle, self._left = meddle, tile

    def edit(self, job: Job, tile: Tile, raw: Any) -> tuple[Raw, Counts]:
        self._left -= 1
        if self._left == 0:
            self._meddle()
        return super().edit(job, tile, raw)


def meddling(meddle: Callable[[], None], tile: int = 3) -> MakeKernel:
    return lambda read_stored: Meddling(read_stored, meddle, tile)


@pytest.mark.parametrize("victim", ["base", "tuned"])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_input_truncated_during_the_run_is_named_with_its_tensor(tmp_path: Path, victim: str, workers: int) -> None:
    plan, path = small_plan(tmp_path), tmp_path / victim / "model.safetensors"
    with pytest.raises(SourceChangedError) as caught:
        run(plan, tmp_path / "out", workers=workers, make_kernel=meddling(lambda: os.truncate(path, 3000)))
    assert str(path) in str(caught.value)
    assert any(f"tensor {name}" in str(caught.value) for name in plan.base.tensors)


@pytest.mark.parametrize("victim", ["base", "tuned"])
def test_an_input_written_to_during_the_run_is_refused_though_every_read_worked(tmp_path: Path, victim: str) -> None:
    plan, path = small_plan(tmp_path), tmp_path / victim / "model.safetensors"

    def touch() -> None:
        with open(path, "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x01")
        os.utime(path, ns=(1, 1))

    with pytest.raises(SourceChangedError, match="changed during the run") as caught:
        run(plan, tmp_path / "out", make_kernel=meddling(touch))
    assert str(path) in str(caught.value)


def test_an_input_replaced_between_planning_and_running_is_refused(tmp_path: Path) -> None:
    plan, path = small_plan(tmp_path), tmp_path / "tuned" / "model.safetensors"
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(path.stat().st_mtime_ns, path.stat().st_mtime_ns))
    copy.replace(path)  # same name, size and time: another file
    with pytest.raises(SourceChangedError, match="changed"):
        run(plan, tmp_path / "out")


def test_an_input_that_vanished_is_named(tmp_path: Path) -> None:
    plan, path = small_plan(tmp_path), tmp_path / "tuned" / "model.safetensors"
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tuned/model\.safetensors: cannot open"):
        run(plan, tmp_path / "out")


class Broken(Exception):
    pass


def fail() -> None:
    raise Broken("in a worker")


def edited_tiles(plan: Plan) -> int:
    return sum(1 for job in plan.edited for _ in tiles(job.dtype, job.shape, job.nbytes))


@pytest.mark.parametrize("workers", [1, 4])
def test_what_a_worker_raises_surfaces_and_the_file_it_left_does_not_load(tmp_path: Path, workers: int) -> None:
    with pytest.raises(Broken, match="in a worker"):
        run(small_plan(tmp_path), tmp_path / "out", workers=workers, make_kernel=meddling(fail))
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "out" / "model.safetensors")


def test_one_worker_that_fails_stops_the_others(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, count=40_000)
    carried: list[int] = []
    first = threading.Lock()

    class Slow(NumpyKernel):
        def edit(self, job: Job, tile: Tile, raw: Any) -> tuple[Raw, Counts]:
            if first.acquire(blocking=False):
                fail()
            time.sleep(0.002)
            carried.append(1)
            return super().edit(job, tile, raw)

    with pytest.raises(Broken):
        run(plan, tmp_path / "out", workers=3, make_kernel=Slow)
    assert len(carried) < 500 < edited_tiles(plan)


def test_a_kernel_that_cannot_be_made_surfaces_too(tmp_path: Path) -> None:
    def make_kernel(read_stored: ReadStored) -> NumpyKernel:
        raise Broken("no device")

    with pytest.raises(Broken, match="no device"):
        run(small_plan(tmp_path), tmp_path / "out", workers=3, make_kernel=make_kernel)


@pytest.mark.parametrize("workers", [1, 3])
def test_ctrl_c_stops_every_worker_after_the_tile_it_is_at(tmp_path: Path, workers: int) -> None:
    plan = small_plan(tmp_path, count=40_000)
    carried: list[int] = []
    interrupted = threading.Event()

    class Slow(NumpyKernel):
        def edit(self, job: Job, tile: Tile, raw: dict[StoredTensor, Raw]) -> tuple[Raw, Counts]:
            interrupted.wait()
            time.sleep(0.002)  # 6000 tiles would take many seconds
            carried.append(1)
            return super().edit(job, tile, raw)

    def progress(count: int) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "out", workers=workers, make_kernel=Slow, progress=progress)
    assert len(carried) < 500 < edited_tiles(plan)


def test_what_shard_done_raises_stops_the_run(tmp_path: Path) -> None:
    def shard_done(result: ShardResult) -> None:
        raise Broken(result.name)

    with pytest.raises(Broken, match="model-0000"):
        run(small_plan(tmp_path, shards=2), tmp_path / "out", shard_done=shard_done)


def test_an_output_that_is_there_is_never_written_over(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"mine")
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot create"):
        execute(plan, tmp_path / "out", Settings())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"mine"


# memory


def peak(plan: Plan, folder: Path, **settings: Any) -> int:
    """Bytes that Python and numpy held at once during a run, beyond those before it."""
    folder.mkdir()
    tracemalloc.start()
    try:
        execute(plan, folder, Settings(**{"fsync": False, "make_kernel": NumpyKernel, **settings}))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def sparse_plan(folder: Path, shapes: dict[str, tuple[int, ...]], dtype: str, *, nan: bool = False, **options: Any) -> Plan:
    folder.mkdir()
    base, tuned, origin = (write_sparse(folder / f"{name}.safetensors", shapes, dtype) for name in ("b", "t", "o"))
    for path, word in ((tuned, b"\x31\x31"), (base, b"\xff\xff" if nan else b"\x00\x00")):
        with open(path, "r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(word * 50)
    at = Checkpoint.open(base)
    vector = 0.5 * TaskVector.between(Checkpoint.open(origin), Checkpoint.open(tuned))
    return make_plan(at, vector, Options(**options), single_file=True)


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("shape", [(4 << 20,), (1, 4 << 20), (1 << 10, 1 << 12)])
def test_memory_does_not_grow_with_the_tensor(tmp_path: Path, shape: tuple[int, ...]) -> None:
    small = sparse_plan(tmp_path / "small", {"w": shape}, "BF16", nan=True)  # 8 MiB
    large = sparse_plan(tmp_path / "large", {"w": (*shape[:-1], shape[-1] * 8)}, "BF16", nan=True)  # 64 MiB
    held = [peak(plan, tmp_path / f"out-{i}") for i, plan in enumerate((small, large))]
    assert held[1] < held[0] + 200_000
    assert held[1] < 32 << 20


@pytest.mark.usefixtures("real_tiles")
def test_memory_does_not_grow_with_a_copied_tensor_or_with_the_number_of_tensors(tmp_path: Path) -> None:
    one = sparse_plan(tmp_path / "one", {"w": (1 << 20,)}, "BF16")
    many = sparse_plan(tmp_path / "many", {f"w{i}": (1 << 20,) for i in range(9)} | {"c": (8 << 20,)}, "BF16", exclude=("c",))
    assert peak(many, tmp_path / "out-many") < peak(one, tmp_path / "out-one") + 400_000


@pytest.mark.usefixtures("real_tiles")
@pytest.mark.parametrize("out_dtype", ["same", "float64", "bfloat16"])
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64", "F8_E5M2"])
def test_the_plan_s_bound_on_the_buffers_holds(tmp_path: Path, dtype: str, nan: bool, out_dtype: str) -> None:
    plan = sparse_plan(tmp_path / "in", {"w": (3 << 20,)}, dtype, nan=nan, out_dtype=out_dtype)
    assert peak(plan, tmp_path / "out") < plan.buffer_bytes() + 200_000


@pytest.mark.usefixtures("real_tiles")
def test_the_bound_holds_for_every_worker_and_for_several_vectors_of_several_dtypes(tmp_path: Path) -> None:
    plan = sparse_plan(tmp_path / "in", {"w": (3 << 20,)}, "BF16", nan=True)
    other = write_sparse(tmp_path / "f32.safetensors", {"w": (3 << 20,)}, "F32")
    vector = plan.vector - 2 * TaskVector.between(plan.base, other) + plan.vector
    plan = replace(make_plan(plan.base, vector, Options(), single_file=True))
    assert peak(plan, tmp_path / "out", workers=2) < 2 * plan.buffer_bytes() + 200_000


def test_no_file_is_opened_that_is_not_in_the_plan(tmp_path: Path) -> None:
    """Side files, indices and configs are not the stream's: they may be gone by now."""
    plan = small_plan(tmp_path, shards=2)
    for path in (tmp_path / "base" / "config.json", tmp_path / "base" / "model.safetensors.index.json"):
        assert json.loads(path.read_text())
        path.unlink()
    run(plan, tmp_path / "out")
    assert len(weight_files(tmp_path / "out")) == 2


# adapters: the same library gives the same bits, across libraries an ulp (test_torch_kernel.py)


def low_rank_plan(tmp_path: Path, transposed: bool = False) -> tuple[Plan, dict[str, np.ndarray]]:
    """base + 0.25 · Δ in bfloat16 for two tensors with Δ = 2 · left @ right of rank 8; and the same in float64."""
    rng, tensors, adapter, expected = np.random.default_rng(30), {}, {}, {}
    shape = (70, 90) if transposed else (90, 70)
    for name in ("v", "w"):
        stored = Stored("BF16", rounded(rng.standard_normal(90 * 70), "BF16"))
        left, right = (rng.standard_normal(size).astype(np.float32) * np.float32(0.3) for size in ((90, 8), (8, 70)))
        tensors[name] = tensor("BF16", stored.words, shape)
        adapter |= {f"{name}.left": tensor("F32", left, (90, 8)), f"{name}.right": tensor("F32", right, (8, 70))}
        product = left.astype(np.float64) @ right.astype(np.float64)
        expected[name] = numbers(stored) + 0.5 * (product.T if transposed else product).ravel()
    base = opened(tmp_path / "base", tensors)
    source = StoredSource(opened(tmp_path / "adapter.safetensors", adapter), 2.0, transposed)
    return make_plan(base, TaskVector(((0.25, source),)), Options()), expected


@pytest.mark.parametrize("transposed", [False, True])
def test_a_low_rank_edit_through_files_is_within_an_ulp_and_the_same_for_any_thread_count(
    tmp_path: Path, kernel: MakeKernel, transposed: bool
) -> None:
    plan, expected = low_rank_plan(tmp_path, transposed)
    found = []
    for place, workers in enumerate((1, 1, 2, 5)):
        run(plan, tmp_path / f"out-{place}", workers=workers, make_kernel=kernel)
        found.append(weight_files(tmp_path / f"out-{place}"))
    assert found[0] == found[1] == found[2] == found[3]
    for name, content in read_model(tmp_path / "out-0").items():
        edited = numbers(Stored("BF16", np.frombuffer(content, np.uint16)))
        assert (np.abs(edited - expected[name]) <= ulp(expected[name], "BF16")).all()


def test_a_truncated_adapter_is_named_with_its_tensor(tmp_path: Path) -> None:
    plan, _ = low_rank_plan(tmp_path)
    os.truncate(tmp_path / "adapter.safetensors", 600)
    with pytest.raises(SourceChangedError, match=r"adapter\.safetensors"):
        run(plan, tmp_path / "out")


def test_an_adapter_truncated_during_the_run_is_named_with_its_tensor(tmp_path: Path) -> None:
    plan, _ = low_rank_plan(tmp_path)
    with pytest.raises(SourceChangedError, match=r"adapter\.safetensors: tensor [wv]\.(left|right): the file ends"):
        run(plan, tmp_path / "out", make_kernel=adapter_eater(tmp_path / "adapter.safetensors"))


def adapter_eater(path: Path) -> MakeKernel:
    """A kernel that truncates the adapter once the first job's factors are read."""

    class Eater(NumpyKernel):
        def edit(self, job: Job, tile: Tile, raw: Any) -> tuple[Raw, Counts]:
            found = super().edit(job, tile, raw)
            os.truncate(path, 300)
            return found

    return Eater


# the public face


def three_models(tmp_path: Path) -> dict[str, Stored]:
    """A model, an old fine-tune in float32 and its origin in float16, each in files under its name."""
    model, old = (Stored(dtype, words) for dtype, words in zip(("BF16", "F32"), pairs("BF16", "F32", 400, 40)))
    origin = Stored("F16", pairs("F16", "F32", 400, 41)[0][: len(model.words)])
    models = {"model": model, "old": old, "origin": Stored("F16", np.resize(origin.words, len(model.words)))}
    for name, stored in models.items():
        opened(tmp_path / name, {"w": tensor(stored.dtype, stored.words)})
    return models


@pytest.mark.parametrize("alpha", [0.3, -0.3, 2.5])
def test_subtract_with_a_base_is_model_minus_alpha_times_old_minus_base(tmp_path: Path, alpha: float) -> None:
    models, paths = three_models(tmp_path), {name: tmp_path / name for name in ("model", "old", "origin")}
    tv.subtract(paths["model"], paths["old"], alpha=alpha, base=paths["origin"], output=tmp_path / "less")
    tv.add(paths["model"], paths["old"], alpha=-alpha, base=paths["origin"], output=tmp_path / "more")
    expected = edit(models["model"], [Change(alpha, models["old"], models["origin"])], "BF16").words.tobytes()
    assert read_model(tmp_path / "less") == read_model(tmp_path / "more") == {"w": expected}


def test_an_expression_of_vectors_is_evaluated_in_the_order_written(tmp_path: Path) -> None:
    models, base = three_models(tmp_path), Checkpoint.open(tmp_path / "model")
    old, origin = (TaskVector.between(base, tmp_path / name) for name in ("old", "origin"))
    report = (base - 0.3 * old + 0.1 * origin).save(tmp_path / "out", out_dtype="float32", fsync=False)
    model = models["model"]
    changes = [Change(0.3, models["old"], model), Change(-0.1, models["origin"], model)]
    expected = edit(model, changes, "F32")
    assert read_model(tmp_path / "out") == {"w": expected.words.tobytes()}
    assert expected.words.tobytes() != edit(model, changes[::-1], "F32").words.tobytes()
    assert report.changes["elements_changed"] == expected.changed
    assert report.changes["elements_lost_to_rounding"] == max(0, expected.intended - expected.changed)
    assert report.changes["elements_overflowed"] == expected.overflow
    assert report.changes["elements_not_finite"] == expected.nonfinite


def test_integers_that_differ_are_warned_about_by_name_whichever_fine_tune_has_them(tmp_path: Path) -> None:
    base, tuned = model(1)
    at, same = opened(tmp_path / "base", base), opened(tmp_path / "same", base)
    vectors = [TaskVector.between(at, found) for found in (opened(tmp_path / "tuned", tuned), same)]
    for place, (first, second) in enumerate((vectors, vectors[::-1])):
        report = (at - first - second).save(tmp_path / f"out-{place}", fsync=False)
        assert any("not floats and differ" in warning and "ids" in warning for warning in report.warnings)
        assert report.changes["copied_tensors_that_differ"] == 1
