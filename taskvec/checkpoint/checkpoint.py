"""A checkpoint as the rest of taskvec sees it: every tensor is a file, a byte range, a dtype and a shape. No data."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import CheckpointError, QuantizedError, listing, show
from .files import FileIdentity, InputFiles, exists, remote_above
from .header import DTYPE_BITS, Header, StoredTensor, read_header
from .locate import LARGEST_CONFIG, Location, locate, on_hub, read_json

_COMPARED = 1 << 20  # bytes, or elements, per read when two stored tensors are compared
_QUANTIZED_SUFFIXES = (
    ".absmax", ".quant_map", ".nested_absmax", ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4",
    ".SCB", ".qweight", ".qzeros", ".g_idx", ".weight_scale", ".weight_scale_inv", ".weight_scale_2", ".input_scale",
    ".weight_packed",
)  # fmt: skip


# Set by the room that knows what a difference is: (base, tuned) -> TaskVector. Rooms do not import upwards.
_difference: list[Callable[[Checkpoint, Checkpoint], Any]] = []


def when_subtracted(make: Callable[[Checkpoint, Checkpoint], Any]) -> None:
    """Register what `tuned - base` makes."""
    _difference[:] = [make]


class HubPlace(NamedTuple):
    """A repository, a commit of it, and what of it: empty for all."""

    id: str
    commit: str
    path: str


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
    def open(cls, source: str | os.PathLike[str], *, revision: str | None = None, token: str | None = None) -> Checkpoint:
        """Open a `.safetensors` file, a folder with one, or with an index and its shards, or such a folder on the Hub.

        `source` is a path, or, where nothing of that name exists, `org/name`, `org/name@revision`, `hf://…` or a web URL of
        the Hub; `revision` a branch, tag or commit there; `token` one that may read it, by default HF_TOKEN or that of `hf
        auth login`. Reads headers only: on the Hub by ranged requests.

        Raises CheckpointError (HeaderError for a malformed file) naming file and tensor, HubError for the Hub.
        """
        if revision is not None or token is not None:
            source = on_hub(source, revision, token)
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
        return read_json(path, LARGEST_CONFIG) if path and exists(path) else {}

    @property
    def hub(self) -> HubPlace | None:
        """Where on the Hub it is from, told by its place in the Hub's cache (models--org--name/snapshots/commit)."""
        path = self.path.resolve() if self.path.name in ("", ".", "..") else self.path
        for folder in (path, *path.parents):
            repository = folder.parent.parent.name
            if folder.parent.name == "snapshots" and repository.startswith("models--"):
                id = repository.removeprefix("models--").replace("--", "/")
                return HubPlace(id, folder.name, path.relative_to(folder).as_posix().removeprefix("."))
        return None

    @property
    def readme(self) -> Path | None:
        """The card beside its files, if there is one."""
        found = remote_above(self.path) if self.hub is not None else None
        folder = self.folder or (self.path.parent if found is not None else None)
        return folder / "README.md" if folder is not None and exists(folder / "README.md") else None

    @property
    def label(self) -> str:
        """The last part of the path: what messages, cards and records call this checkpoint (never an absolute path)."""
        if self.hub is not None and not self.hub.path:
            return self.hub.id
        path = self.path.resolve() if self.path.name in ("", ".", "..") else self.path
        return path.name

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def shapes_sha256(self) -> str:
        """A fingerprint of the names and shapes of its tensors, whatever their dtypes, files and order."""
        return fingerprint(self.tensors.values())

    def fits(self, shapes_sha256: str) -> bool:
        """Whether that is its fingerprint."""
        return self.shapes_sha256 == shapes_sha256

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

    def __sub__(self, other: Any) -> Any:
        """tuned − base: the TaskVector between two checkpoints. (checkpoint − vector is the vector's doing.)"""
        return _difference[0](other, self) if isinstance(other, Checkpoint) else NotImplemented

    def __add__(self, other: Any) -> Any:
        if isinstance(other, Checkpoint):
            raise TypeError("weights + weights has no meaning; add what one learned: base + (tuned − base)")
        return NotImplemented

    def __mul__(self, factor: Any = None) -> Any:
        raise TypeError("weights · number has no meaning; scale what was learned: base + 0.5 * (tuned − base)")

    __rmul__ = __truediv__ = __neg__ = __mul__

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


def fingerprint(tensors: Iterable[StoredTensor]) -> str:
    """SHA-256 of the names and shapes."""
    lines = sorted(f"{tensor.name} {list(tensor.shape)}" for tensor in tensors)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "backslashreplace")).hexdigest()


def same_bytes(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two stored tensors of one dtype and shape have the same bytes. Reads them, a little at a time."""
    return all(one == other for one, other in _side_by_side((left, 1), (right, 1), left.nbytes))


def same_values(left: StoredTensor, right: StoredTensor) -> bool:
    """Whether two stored float tensors of one shape hold the same numbers, as far as the coarser of their dtypes tells them
    apart. Reads them, a little at a time."""
    coarser = min(left.dtype, right.dtype, key=("F8_E5M2", "F8_E4M3", "BF16", "F16", "F32", "F64").index)
    sizes = [(stored, DTYPE_BITS[stored.dtype] // 8) for stored in (left, right)]
    for one, other in _side_by_side(sizes[0], sizes[1], left.elements):
        if _rounded(one, left.dtype, coarser) != _rounded(other, right.dtype, coarser):
            return False
    return True


def _rounded(data: bytes, dtype: str, coarser: str) -> bytes:
    import numpy as np

    from .floats import decode, encode

    count = len(data) * 8 // DTYPE_BITS[dtype]
    values = decode(np.frombuffer(data, np.uint8), dtype, np.empty(count, np.float64))
    out = np.empty(count * DTYPE_BITS[coarser] // 8, np.uint8)
    encode(values, coarser, out, np.empty(count, np.uint32))
    return out.tobytes()


def _side_by_side(
    left: tuple[StoredTensor, int], right: tuple[StoredTensor, int], units: int
) -> Iterator[tuple[bytes, bytes]]:
    """The bytes of both tensors, some of the units of so many bytes after others."""
    files = InputFiles({})
    try:
        for first in range(0, units, _COMPARED):
            count = min(_COMPARED, units - first)
            pair = []
            for stored, unit in (left, right):
                part = bytearray(count * unit)
                files.read(stored.path, memoryview(part), stored.offset + first * unit, stored.name)
                pair.append(bytes(part))
            yield pair[0], pair[1]
    finally:
        files.close()
