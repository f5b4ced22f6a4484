"""One thread of a run: its buffers, and the three stages of a batch of tiles: read, compute, write."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import xxhash

from ..checkpoint import files
from ..checkpoint.floats import Raw
from ..checkpoint.header import StoredTensor
from .jobs import Job, Tile, merged, unit_bytes
from .kernel import Counts, ReadStored

if TYPE_CHECKING:
    from .stream import Step

_READ_AHEAD = 8 << 20  # bytes; one block ahead, so that a cold disk does not wait for the request


class Kernel(Protocol):
    """The arithmetic of one worker. `edit` gives the output bytes of one tile (or of several that lie together), valid
    until the next call; `host_buffer` is memory that the kernel likes to be fed from."""

    def edit(self, job: Job, tile: Tile, raw: dict[StoredTensor, Raw]) -> tuple[Raw, Counts]: ...

    def host_buffer(self, nbytes: int) -> Raw: ...


class Worker:
    """The buffers of one thread, and the three stages of a batch of tiles: read, compute, write."""

    def __init__(self, inputs: files.InputFiles, make_kernel: Callable[[ReadStored], Kernel]) -> None:
        self._inputs = inputs
        self._kernel = make_kernel(_reader(inputs))
        self._buffers: list[Raw] = []
        self._advised: dict[Path, int] = {}

    def carry(self, step: Step) -> tuple[list[bytes], Counts]:
        """All stages; the digest of every tile, and what happened in them."""
        if untouched(step.job):
            return self.copy(step), Counts()
        digests: list[bytes] = []
        total = Counts()
        for batch in step.batches:
            out, counts = self.compute(step.job, batch, self.read(step.job, batch))
            self.write(step, batch, out)
            digests += self._digests(step.job, batch, out)
            total.add(counts)
        return digests, total

    def read(self, job: Job, batch: tuple[Tile, ...], without: StoredTensor | None = None) -> dict[StoredTensor, Raw]:
        """The bytes of every tensor that is read tile by tile, `without` one that is where it is needed already."""
        span, found = merged(batch), {}
        for place, stored in enumerate(job.elementwise):
            if stored == without:
                continue
            unit = unit_bytes(stored.dtype)
            found[stored] = self._fill(place, stored, span.start * unit, span.units * unit)
        return found

    def compute(self, job: Job, batch: tuple[Tile, ...], raw: dict[StoredTensor, Raw]) -> tuple[Raw, Counts]:
        """The output bytes, valid until the next call."""
        if not job.copied:
            return self._kernel.edit(job, merged(batch), raw)
        counts = Counts()
        if job.compared:
            counts.differs = max(int(np.count_nonzero(raw[job.base] != raw[tuned])) for tuned in job.compared)
        return raw[job.base], counts

    def write(self, step: Step, batch: tuple[Tile, ...], out: Raw) -> None:
        """To their final place in the output file."""
        assert step.shard.fd is not None
        at = step.job.offset + batch[0].start * unit_bytes(step.job.dtype)
        files.write_all(step.shard.fd, out.data, at, path=step.shard.path)

    def copy(self, step: Step) -> list[bytes]:
        """An untouched run: shared with base where the file system can, else written as it was read. Read it is either way,
        for its checksum; given that, copy_file_range would save nothing over writing what was just read.
        """
        assert step.shard.fd is not None
        stored, unit, digests = step.job.base, unit_bytes(step.job.dtype), []
        first, into = step.batches[0][0].start * unit, step.offset
        with self._inputs.reading(stored.path) as fd:
            shared = files.share_range(fd, step.shard.fd, stored.offset + first, into, step.nbytes)
        for tile in step.tiles:
            data = self._fill(0, stored, tile.start * unit, tile.units * unit)
            digests.append(_digest(data))
            at = tile.start * unit - first
            for begin, end in ((at, min(at + len(data), shared[0])), (max(at, shared[1]), at + len(data))):
                if begin < end:
                    files.write_all(step.shard.fd, data[begin - at : end - at].data, into + begin, path=step.shard.path)
        return digests

    def _digests(self, job: Job, batch: tuple[Tile, ...], out: Raw) -> list[bytes]:
        start, unit = batch[0].start, unit_bytes(job.dtype)
        return [_digest(out[(t.start - start) * unit : (t.start - start + t.units) * unit]) for t in batch]

    def _fill(self, place: int, stored: StoredTensor, start: int, nbytes: int) -> Raw:
        buffer = self._buffer(place, nbytes)
        self._advise(stored, stored.offset + start)
        self._inputs.read(stored.path, buffer.data, stored.offset + start, stored.name)
        return buffer

    def _advise(self, stored: StoredTensor, position: int) -> None:
        """Ask for the next block of this file before it is needed, once per block."""
        block = position // _READ_AHEAD
        if self._advised.get(stored.path) != block and hasattr(os, "posix_fadvise") and stored.path not in files.IN_MEMORY:
            self._advised[stored.path] = block
            with self._inputs.reading(stored.path) as fd, suppress(OSError):
                os.posix_fadvise(fd, position, 2 * _READ_AHEAD, os.POSIX_FADV_WILLNEED)

    def _buffer(self, place: int, nbytes: int) -> Raw:
        while len(self._buffers) <= place:
            self._buffers.append(self._kernel.host_buffer(0))
        if len(self._buffers[place]) < nbytes:
            self._buffers[place] = self._kernel.host_buffer(nbytes)
        held: Raw = self._buffers[place][:nbytes]
        return held


def untouched(job: Job) -> bool:
    """Whether no one needs to look at the tensor's bytes but for their checksum."""
    return job.copied and not job.compared


def _digest(data: Raw) -> bytes:
    return xxhash.xxh3_128_digest(data.data)


def _reader(inputs: files.InputFiles) -> ReadStored:
    """Reads parts of stored tensors into memory of their own. It does not know the worker, which so goes with its run."""

    def read(stored: StoredTensor, start: int, nbytes: int) -> Raw:
        buffer = np.empty(nbytes, np.uint8)
        inputs.read(stored.path, buffer.data, stored.offset + start, stored.name)
        return buffer

    return read
