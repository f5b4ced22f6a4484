"""The weight file of an extracted adapter, written as its factors come, in the order of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ...checkpoint import files
from ...checkpoint.files import InputFiles
from ...checkpoint.header import StoredTensor
from ..jobs import tiles, unit_bytes
from ..plan import OUT_DTYPES
from .layout import Layer
from .plan import LoraPlan

if TYPE_CHECKING:
    from ...checkpoint.floats import Raw


class AdapterFile:
    """What is added goes behind the place of the header, which is written last: only then are the ranks known. It is padded
    to the length it has for the largest ranks. `size`: bytes so far; `checksum`: as of every weight file of taskvec."""

    def __init__(self, plan: LoraPlan, path: Path, *, fsync: bool) -> None:
        self._plan = plan
        self._path = path
        self._fsync = fsync
        self._room = len(plan.header(plan.most()))
        self.size = self._room
        self.checksum = ""
        self._digests: list[bytes] = []

    def __enter__(self) -> AdapterFile:
        self._fd = files.create_output(self._path)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            files.close_output(self._fd, path=self._path)
        else:
            files.close_input(self._fd)  # given up

    def add_factors(self, layer: Layer, rank: int, a: Raw, b: Raw) -> None:
        dtype = OUT_DTYPES[self._plan.settings.dtype] or "F32"
        for raw, shape in zip((a, b), layer.shapes(rank)):
            for tile in tiles(dtype, shape, len(raw)):
                unit = unit_bytes(dtype)
                self._add(raw.data[tile.start * unit : (tile.start + tile.units) * unit])

    def finish(self, ranks: Mapping[str, int]) -> None:
        """Add the new values, and write the header."""
        import xxhash

        inputs = InputFiles({shard.path: shard.identity for c in (self._plan.base, self._plan.tuned) for shard in c.shards})
        try:
            for stored in self._plan.layout.values.values():
                self._copy(inputs, stored)
            inputs.check_unchanged()
        finally:
            inputs.close()
        text = self._plan.header(ranks)[8:]
        header = (self._room - 8).to_bytes(8, "little") + text + b" " * (self._room - 8 - len(text))
        files.write_all(self._fd, memoryview(header), 0, path=self._path)
        self.checksum = xxhash.xxh3_128_hexdigest(header + b"".join(self._digests))
        if self._fsync:
            files.sync(self._fd, path=self._path)

    def _copy(self, inputs: InputFiles, stored: StoredTensor) -> None:
        unit = unit_bytes(stored.dtype)
        for tile in tiles(stored.dtype, stored.shape, stored.nbytes):
            part = bytearray(tile.units * unit)
            inputs.read(stored.path, memoryview(part), stored.offset + tile.start * unit, stored.name)
            self._add(memoryview(part))

    def _add(self, tile: memoryview) -> None:
        import xxhash

        self._digests.append(xxhash.xxh3_128_digest(tile))
        files.write_all(self._fd, tile, self.size, path=self._path)
        self.size += len(tile)
