"""What a run has finished, in a file beside its output in the making: the same run, started again after whatever ended it,
reuses those files once their checksums are as they were written.

A line is the XXH3-64 of its text, a blank and the text, which is JSON: first what the run is, then one line per finished
file. Reading stops at the first line that is not whole.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from ..checkpoint import files
from ..checkpoint.checkpoint import Checkpoint
from ..errors import TaskvecError
from .jobs import CHECKSUM_PLACE, ShardPlan, tiles, unit_bytes
from .kernel import Counts
from .plan import Plan
from .stream import ShardResult

_LARGEST = 1 << 30  # bytes of a journal that is read


class RunIdentity(NamedTuple):
    """SHA-256 of what is computed and by what, and of what the inputs were when it was planned."""

    job: str
    inputs: str


class Finished(NamedTuple):
    """An output file that is complete, and what happened to its tensors."""

    result: ShardResult
    counts: dict[str, Counts]


def identify(plan: Plan, device: str, *, sha256: bool) -> RunIdentity:
    """Two runs of one identity write the same bytes.

    Inputs count in their order, for each has its part, by size, mtime, ctime and inode; ctime is the one of them that nobody
    can set. Those of the Hub count by their commit. Of an input's config some layouts are read, so it counts as a whole.
    """
    from .record import recipe

    headers = [(shard.name, xxhash.xxh3_128_hexdigest(shard.header)) for shard in plan.shards]
    return RunIdentity(
        _sha256([recipe(plan, None), headers, device, _processor(), sha256]),
        _sha256([_pinned(checkpoint, plan) for checkpoint in plan.inputs]),
    )


def _pinned(checkpoint: Checkpoint, plan: Plan) -> list[Any]:
    if checkpoint.hub is not None:
        return [*checkpoint.hub, [(shard.path.name, plan.identities[shard.path].size) for shard in checkpoint.shards]]
    held = [(shard.path.name, *plan.identities[shard.path], _ctime(shard.path)) for shard in checkpoint.shards]
    return [checkpoint.config, held]


class Journal:
    """Of one run, whose finished files it knows by their names. It holds its own file open until `close`."""

    def __init__(self, path: Path, fd: int, end: int, finished: Mapping[str, Finished], *, fsync: bool) -> None:
        """`end`: bytes of the file that are whole lines."""
        self.finished = dict(finished)
        self._path = path
        self._fd = fd
        self._end = end
        self._fsync = fsync
        self._lock = threading.Lock()

    @classmethod
    def begin(cls, path: Path, identity: RunIdentity, *, fsync: bool) -> Journal:
        """A new one, of a run that has finished nothing."""
        journal = cls(path, files.create_output(path), 0, {}, fsync=fsync)
        try:
            journal._write(identity._asdict())
        except BaseException:
            files.close_input(journal._fd)
            raise
        return journal

    @classmethod
    def resume(cls, path: Path, plan: Plan, folder: Path, *, fsync: bool) -> Journal:
        """That of a run of the same identity, which ended. `folder`: where its files are, of which those are taken as
        finished that still are what was written."""
        planned = {shard.name: shard for shard in plan.shards}
        left = read(path)
        kept = {n: one for n, one in left.finished.items() if n in planned and intact(folder / n, planned[n], one)}
        return cls(path, files.open_to_change(path), left.nbytes, kept, fsync=fsync)

    def add(self, result: ShardResult, counts: dict[str, Counts]) -> None:
        """A file that is complete and flushed. On disk, with the file's name, before this returns."""
        plain = {name: astuple(did) for name, did in counts.items()}
        with self._lock:
            if self._fsync:
                files.sync_folder(self._path.parent / OUTPUT)
            self._write({"shard": result._asdict(), "counts": plain})
            self.finished[result.name] = Finished(result, counts)

    def close(self) -> None:
        files.close_output(self._fd, path=self._path)

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, ensure_ascii=True).encode()
        line = xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"
        files.write_all(self._fd, memoryview(line), self._end, path=self._path)
        self._end += len(line)
        if self._fsync:
            files.sync(self._fd, path=self._path)


OUTPUT = "output"  # the folder beside a journal in which the files are made


class Left(NamedTuple):
    """What a journal says: what the run was (None if it is not known), what is finished, and bytes of whole lines."""

    identity: RunIdentity | None
    finished: dict[str, Finished]
    nbytes: int


def read(path: Path) -> Left:
    """As far as it is whole, and of this version."""
    try:
        content = files.read_bytes(path, _LARGEST, follow=False)
        lines = list(_whole_lines(content))
        identity = RunIdentity(**lines[0]) if lines else None
        found = [_entry(line) for line in lines[1:]]
    except (TaskvecError, ValueError, TypeError, KeyError, RecursionError):
        return Left(None, {}, 0)
    return Left(identity, {one.result.name: one for one in found}, _whole_bytes(content))


def _whole_lines(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content[: _whole_bytes(content)].splitlines():
        yield json.loads(line.partition(b" ")[2])


def _whole_bytes(content: bytes) -> int:
    end = 0
    for line in content.splitlines(keepends=True):
        digest, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or xxhash.xxh3_64_hexdigest(text).encode() != digest:
            break
        end += len(line)
    return end


def _entry(line: dict[str, Any]) -> Finished:
    return Finished(ShardResult(**line["shard"]), {name: Counts(*did) for name, did in line["counts"].items()})


def intact(path: Path, shard: ShardPlan, finished: Finished) -> bool:
    """Whether the file is, to the last byte, what the journal says was written."""
    result = finished.result
    try:
        fd = files.open_input(path, follow=False)
    except TaskvecError:
        return False
    try:
        if files.identity(fd, path).size != shard.size or result.nbytes != shard.size:
            return False
        header = bytearray(len(shard.header))
        files.read_exact(fd, memoryview(header), 0, path=path)
        planned = bytes(header).replace(result.checksum.encode(), CHECKSUM_PLACE.encode(), 1)
        return shard.header in (header, planned) and _checksum(fd, path, shard) == result.checksum
    except TaskvecError:
        return False
    finally:
        files.close_input(fd)


def _checksum(fd: int, path: Path, shard: ShardPlan) -> str:
    digest = xxhash.xxh3_128(shard.header)
    for job in shard.jobs:
        unit = unit_bytes(job.dtype)
        for tile in tiles(job.dtype, job.shape, job.nbytes):
            part = bytearray(tile.units * unit)
            files.read_exact(fd, memoryview(part), job.offset + tile.start * unit, path=path, tensor=job.name)
            digest.update(xxhash.xxh3_128_digest(part))
    return digest.hexdigest()


def _ctime(path: Path) -> int:
    try:
        return os.stat(path).st_ctime_ns
    except OSError:  # the run will tell
        return 0


def _processor() -> str:
    """Matrix products may differ in the last bit between processors: numpy's library has code for each of them."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _sha256(content: object) -> str:
    import hashlib

    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
