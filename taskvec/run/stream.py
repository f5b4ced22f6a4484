"""Executing a plan: tiles are read, computed and written by a few threads over reused buffers. No tensor or shard is ever
whole in memory. Each worker carries one tile through three stages (`read`, `compute`, `write`); workers take different
shards first, because a file system serialises the writers of one file.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from ..checkpoint import files
from .jobs import CHECKSUM_PLACE, TILE_BYTES, Job, ShardPlan, Tile, batches, unit_bytes
from .kernel import Counts, NumpyKernel, ReadStored
from .plan import Plan
from .worker import Kernel, Worker, untouched

if TYPE_CHECKING:
    from .journal import Journal

_COPIED = 8 << 20  # bytes of an untouched tensor that are shared at once, where they can be
_HASHED = 1 << 20  # bytes per read when a finished file is hashed with SHA-256
_POLL = 0.1  # seconds between two looks of the main thread; Ctrl-C is seen this soon


class ShardResult(NamedTuple):
    """`checksum`: XXH3-128 over the header, as it was planned, and the XXH3-128 of each tile, in the order of the file."""

    name: str
    nbytes: int
    checksum: str
    header_sha256: str
    sha256: str | None


@dataclass
class RunResult:
    """`counts` by the name of every edited tensor, and of every copied one that is another in tuned. `reused`: names of
    files of an earlier run. `notes`: what the user should know of how the run went."""

    shards: list[ShardResult]
    counts: dict[str, Counts] = field(default_factory=dict)
    reused: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How a run goes; none of it changes a byte of the output.

    `batch`: bytes of output that a worker carries at once, if the tensor is that large. `progress` is called in the calling
    thread with the bytes written so far; `shard_done` with each finished file.
    """

    workers: int = 1
    batch: int = TILE_BYTES
    fsync: bool = True
    sha256: bool = False
    make_kernel: Callable[[ReadStored], Kernel] = NumpyKernel
    progress: Callable[[int], None] = lambda written: None
    shard_done: Callable[[ShardResult], None] = lambda result: None


def execute(plan: Plan, folder: Path, settings: Settings, journal: Journal | None = None) -> RunResult:
    """Write every shard of the plan into `folder`, which exists, but for those that the journal knows as finished.

    Raises what the first failing thread raised; then, and on KeyboardInterrupt, every thread has ended on return.
    """
    return _Run(plan, folder, settings, journal).execute()


class Step(NamedTuple):
    """What one worker carries: batches of tiles of one tensor, moved one after the other. Nearly always a single batch.

    `number` is the place of the first tile among the tiles of its shard.
    """

    shard: _ShardRun
    number: int
    job: Job
    batches: tuple[tuple[Tile, ...], ...]

    @property
    def tiles(self) -> list[Tile]:
        return [tile for batch in self.batches for tile in batch]

    @property
    def offset(self) -> int:
        """Where its output begins, in bytes of the file."""
        return self.job.offset + self.batches[0][0].start * unit_bytes(self.job.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of output."""
        return sum(tile.units for tile in self.tiles) * unit_bytes(self.job.dtype)


class _ShardRun:
    """An output file in the making. `take` and `put` are called under the run's lock."""

    def __init__(self, plan: ShardPlan, folder: Path, batch: int) -> None:
        self.plan = plan
        self._batch = batch
        self.path = folder / plan.name
        self.fd: int | None = None
        self.remaining = plan.size - len(plan.header)
        self.workers = 0
        self._steps = self._all_steps()
        self._taken = 0
        self._exhausted = False
        self._digests: dict[int, bytes] = {}

    def _all_steps(self) -> Iterator[Step]:
        number = 0
        for job in self.plan.jobs:
            every = batches(job, _COPIED if untouched(job) else self._batch)
            for held in [tuple(every)] if job.surveyed and job.nbytes else zip(every):
                step = Step(self, number, job, held)
                yield step
                number += len(step.tiles)

    def take(self) -> Step | None:
        """The next tile, or None. Opens the file with the first."""
        if self.fd is None:
            self.fd = files.create_output(self.path)
            files.reserve(self.fd, self.plan.size, path=self.path)
        step = next(self._steps, None)
        if step is None:
            self._exhausted = True
        else:
            self._taken += len(step.tiles)
            self.remaining -= step.nbytes
        return step

    def put(self, number: int, digests: list[bytes]) -> None:
        for place, digest in enumerate(digests, number):
            self._digests[place] = digest

    @property
    def complete(self) -> bool:
        return self._exhausted and len(self._digests) == self._taken

    def checksum(self) -> str:
        return xxhash.xxh3_128_hexdigest(self.plan.header + b"".join(self._digests[i] for i in range(self._taken)))


class _Run:
    def __init__(self, plan: Plan, folder: Path, settings: Settings, journal: Journal | None) -> None:
        self._settings = settings
        self._journal = journal
        self._single_file = plan.single_file
        self._order = {shard.name: place for place, shard in enumerate(plan.shards)}
        reused = {} if journal is None else dict(journal.finished)
        self._shards = [_ShardRun(shard, folder, settings.batch) for shard in plan.shards if shard.name not in reused]
        self._open = list(self._shards)
        self._inputs = files.InputFiles(plan.identities)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._finished = [one.result for one in reused.values()]
        self._written = sum(result.nbytes for result in self._finished)
        self._announced = 0
        self._reused = frozenset(reused)
        self._counts = {name: counts for one in reused.values() for name, counts in one.counts.items()}

    def execute(self) -> RunResult:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(max(1, self._settings.workers))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(_POLL)
                    self._report()
            if self._failure is not None:
                raise self._failure
            self._report()
            self._inputs.check_unchanged()
        finally:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            self._close()
        return RunResult(sorted(self._finished, key=lambda shard: self._order[shard.name]), self._counts, self._reused)

    def _report(self) -> None:
        self._settings.progress(self._written)
        while self._announced < len(self._finished):
            self._settings.shard_done(self._finished[self._announced])
            self._announced += 1

    def _work(self) -> None:
        try:
            worker = Worker(self._inputs, self._settings.make_kernel)
            shard: _ShardRun | None = None
            while not self._stop.is_set():
                step, shard = self._next(shard)
                if step is None:
                    return
                digests, counts = worker.carry(step)
                if self._settings.fsync and step.shard.fd is not None:
                    files.start_flush(step.shard.fd, step.offset, step.nbytes)
                self._settle(step, digests, counts)
        except BaseException as failure:  # carried to the calling thread, which raises it
            with self._lock:
                self._failure = self._failure or failure
            self._stop.set()

    def _next(self, current: _ShardRun | None) -> tuple[Step | None, _ShardRun | None]:
        """The next tile for a worker: of its own shard, else of the one with fewest workers and most left to do."""
        while True:
            finished = None
            with self._lock:
                if current is None or current not in self._open:
                    if not self._open:
                        return None, None
                    current = min(self._open, key=lambda shard: (shard.workers, -shard.remaining))
                    current.workers += 1
                step = current.take()
                if step is not None:
                    return step, current
                self._open.remove(current)
                if current.complete:
                    finished = current
            if finished is not None:
                self._finish(finished)
            current = None

    def _settle(self, step: Step, digests: list[bytes], counts: Counts) -> None:
        with self._lock:
            step.shard.put(step.number, digests)
            self._written += step.nbytes
            if not step.job.copied or counts.differs:
                self._counts.setdefault(step.job.name, Counts()).add(counts)
            finished = step.shard.complete
        if finished:
            self._finish(step.shard)

    def _finish(self, shard: _ShardRun) -> None:
        """The header goes in last, so that a file without its data never loads; then flush and close."""
        assert shard.fd is not None
        checksum = shard.checksum()
        header = shard.plan.header
        if self._single_file:  # its record is in the header itself
            header = header.replace(CHECKSUM_PLACE.encode(), checksum.encode(), 1)
        files.write_all(shard.fd, memoryview(header), 0, path=shard.path)
        digest = _sha256(shard.fd, shard.plan.size, shard.path, self._stop) if self._settings.sha256 else None
        if self._settings.fsync:
            files.sync(shard.fd, path=shard.path)
        fd, shard.fd = shard.fd, None
        files.close_output(fd, path=shard.path)
        result = ShardResult(shard.plan.name, shard.plan.size, checksum, hashlib.sha256(header[8:]).hexdigest(), digest)
        if self._journal is not None:
            own = {job.name: self._counts[job.name] for job in shard.plan.jobs if job.name in self._counts}
            self._journal.add(result, own)
        with self._lock:
            self._written += len(header)
            self._finished.append(result)

    def _close(self) -> None:
        self._inputs.close()
        for shard in self._shards:
            if shard.fd is not None:
                files.close_input(shard.fd)  # given up
                shard.fd = None


def _sha256(fd: int, size: int, path: Path, stop: threading.Event) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_HASHED))
    for at in range(0, size, _HASHED):
        if stop.is_set():
            break
        part = buffer[: min(_HASHED, size - at)]
        files.read_exact(fd, part, at, path=path)
        digest.update(part)
    return digest.hexdigest()
