"""A checkpoint as the rest of taskvec sees it: every tensor is a file, a byte range, a dtype and a shape. No data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError, QuantizedError, listing, show
from .files import FileIdentity, InputFiles
from .header import Header, StoredTensor, read_header
from .locate import Location, locate, read_json

_COMPARED = 1 << 20  # bytes per read when two stored tensors are compared
_QUANTIZED_SUFFIXES = (
    ".absmax", ".quant_map", ".nested_absmax", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
    ".SCB", ".qweight", ".qzeros", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale",
    ".weight_packed",
)  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """One weight file: its tensors in the order of their offsets, its `__metadata__`, and what pins the file."""

    path: Path
    tensors: tuple[StoredTensor, ...]
    metadata: Mapping[str, str]
    identity: FileIdentity
    header_sha256: str


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A model on disk, opened by its headers only. Make one with `Checkpoint.open`.

    Attributes:
        path: what the user named.
        folder: the model folder, None when a single file was named (then there are no side files).
        shards: the weight files, in the order of their names.
        tensors: name -> StoredTensor, in shard and offset order.
    """

    path: Path
    folder: Path | None
    shards: tuple[Shard, ...]
    tensors: Mapping[str, StoredTensor] = field(compare=False)
    index: Path | None = None

    @classmethod
    def open(cls, source: str | os.PathLike[str]) -> Checkpoint:
        """Open a `.safetensors` file, or a folder with one, or with an index and its shards.

        Reads headers only. Raises CheckpointError (HeaderError for a malformed file) naming file and tensor.
        """
        location = locate(source)
        shards = tuple(_shard(path, read_header(path)) for path in location.shards)
        tensors = _collect(shards)
        if location.weight_map is not None:
            _check_index(location, tensors)
        return cls(location.path, location.folder, shards, MappingProxyType(tensors), location.index_file)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json` of the folder; empty when there is none."""
        path = self.folder / "config.json" if self.folder else None
        return read_json(path) if path and path.exists() else {}

    @property
    def label(self) -> str:
        """The last part of the path: what messages, cards and records call this checkpoint (never an absolute path)."""
        path = self.path.resolve() if self.path.name in ("", ".", "..") else self.path
        repository = path.parent.parent.name  # of the Hub cache: models--org--name/snapshots/commit
        if path.parent.name == "snapshots" and repository.startswith("models--"):
            return repository.removeprefix("models--").replace("--", "/")
        return path.name

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def refuse_quantized(self) -> None:
        """Raise QuantizedError if the stored numbers are not the weights themselves."""
        hint = "Subtract from the unquantised model, then quantise the result"
        parts = (self.config, *self.config.values())  # and the configs nested in it: text_config, vision_config, …
        if any(isinstance(part, dict) and part.get("quantization_config") for part in parts):
            raise QuantizedError(f"{show(self.path)}: config.json has a quantization_config", hint=hint)
        companions = [name for name in self.tensors if name.endswith(_QUANTIZED_SUFFIXES)]
        if companions:
            raise QuantizedError(
                f"{show(self.path)}: quantised weights, found {listing(companions)}; expected plain floats", hint=hint
            )

    def __repr__(self) -> str:
        return f"Checkpoint({self.label!r}: {len(self.tensors)} tensors, {self.nbytes} bytes, {len(self.shards)} shards)"


def _shard(path: Path, header: Header) -> Shard:
    digest = hashlib.sha256(header.raw).hexdigest()
    return Shard(path, tuple(header.tensors), MappingProxyType(header.metadata), header.identity, digest)


def _collect(shards: tuple[Shard, ...]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{show(shard.path)}: tensor {show(tensor.name)} is also in {show(tensors[tensor.name].path)}"
                )
            tensors[tensor.name] = tensor
    return tensors


def _check_index(location: Location, tensors: dict[str, StoredTensor]) -> None:
    index, weight_map = location.index_file, location.weight_map or {}
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            found = show(tensors[name].path.name) if name in tensors else "no shard"
            raise CheckpointError(f"{show(index)}: tensor {show(name)} expected in {show(shard)}, found in {found}")
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(f"{show(index)}: tensors in the shards that the index does not list: {listing(unlisted)}")


def same_bytes(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two stored tensors of one dtype and shape have the same bytes. Reads them, a little at a time."""
    files = InputFiles({})
    one, other = bytearray(_COMPARED), bytearray(_COMPARED)
    try:
        for at in range(0, left.nbytes, _COMPARED):
            size = min(_COMPARED, left.nbytes - at)
            files.read(left.path, memoryview(one)[:size], left.offset + at, left.name)
            files.read(right.path, memoryview(other)[:size], right.offset + at, right.name)
            if one[:size] != other[:size]:
                return False
        return True
    finally:
        files.close()
