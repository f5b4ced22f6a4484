"""Reading, computing and writing overlap: shown with a fake device whose stages wait for each other, so that a run whose
stages took turns would stand still (and fail by its own time limit)."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from taskvec import Checkpoint, TaskVector
from taskvec.checkpoint import files
from taskvec.run import stream
from taskvec.run.jobs import Job, Tile
from taskvec.run.kernel import Counts, NumpyKernel
from taskvec.run.plan import Plan

from .checkpoints import write_model

LIMIT = 20.0  # seconds a stage waits for the other before the run counts as serial


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Eight tensors in two shards: more tiles than workers."""
    tensors = {f"layer.{i}.weight": torch.full((8, 8), float(i)) for i in range(8)}
    base = Checkpoint.open(write_model(tmp_path / "base", tensors, shards=2))
    tuned = write_model(tmp_path / "tuned", {name: value + 1 for name, value in tensors.items()})
    return (base - 0.5 * TaskVector.between(base, tuned)).plan()


def run(plan: Plan, folder: Path, make_kernel: type[NumpyKernel], workers: int = 2) -> stream.RunResult:
    folder.mkdir()
    return stream.execute(plan, folder, stream.Settings(workers=workers, make_kernel=make_kernel, fsync=False))


def test_two_workers_compute_at_the_same_time(plan: Plan, tmp_path: Path) -> None:
    meeting = threading.Barrier(2, timeout=LIMIT)

    class Meeting(NumpyKernel):
        met = False

        def edit(self, job: Job, tile: Tile, raw: dict) -> tuple[np.ndarray, Counts]:
            if not self.met:
                meeting.wait()
                self.met = True
            return super().edit(job, tile, raw)

    assert len(run(plan, tmp_path / "out", Meeting).shards) == 2


@pytest.mark.parametrize("stage", ["read_exact", "write_all"])
def test_one_worker_reads_and_writes_while_another_computes(
    stage: str, plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computing, moved = threading.Event(), threading.Event()
    thread_of_kernel: list[int] = []
    plain = getattr(files, stage)

    def watched(*arguments: object, **named: object) -> None:
        if computing.is_set() and threading.get_ident() not in thread_of_kernel:
            moved.set()
        plain(*arguments, **named)

    class Slow(NumpyKernel):
        """The first call waits until another thread has moved bytes."""

        def edit(self, job: Job, tile: Tile, raw: dict) -> tuple[np.ndarray, Counts]:
            if not thread_of_kernel:
                thread_of_kernel.append(threading.get_ident())
                computing.set()
                assert moved.wait(LIMIT), f"no {stage} while a tile was computed"
            return super().edit(job, tile, raw)

    monkeypatch.setattr(files, stage, watched)
    run(plan, tmp_path / "out", Slow)


def test_a_worker_takes_its_buffers_once_and_no_more_than_one_batch_needs(plan: Plan, tmp_path: Path) -> None:
    taken: list[int] = []

    class Counting(NumpyKernel):
        def host_buffer(self, nbytes: int) -> np.ndarray:
            if nbytes:
                taken.append(nbytes)
            return super().host_buffer(nbytes)

    run(plan, tmp_path / "out", Counting, workers=1)
    assert taken == [8 * 8 * 4, 8 * 8 * 4]  # base and tuned of one tensor, for all eight
