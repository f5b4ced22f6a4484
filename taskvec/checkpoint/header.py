"""The safetensors header: a strict parser and a deterministic writer. No data is read here.

Format (the safetensors README, "Format"): 8 bytes little-endian N, N bytes of JSON, then the data; the offsets of the
tensors tile the data without hole or overlap. Where the reference library is laxer than that text (duplicate names,
leading blanks, unknown fields), this parser follows the text: what is accepted here, safetensors accepts too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from ..errors import HeaderError, show
from .files import FileIdentity, absent, close_input, identity, open_input, read_exact

# dtype name in the file -> bits per element; the 22 dtypes of safetensors 0.8
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip

LARGEST_HEADER = 100_000_000  # bytes, the format's own cap
_U64 = 2**64 - 1
_LARGEST_DIMENSION = 2**63 - 1  # torch, numpy: dimensions are signed


class StoredTensor(NamedTuple):
    """One tensor in a file. `offset` is absolute, in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    @property
    def elements(self) -> int:
        count = 1
        for dimension in self.shape:
            count *= dimension
        return count


class Header(NamedTuple):
    """A parsed header: tensors in the order of their offsets, and what pins the file."""

    tensors: list[StoredTensor]
    metadata: dict[str, str]
    raw: bytes
    identity: FileIdentity


def read_header(path: Path) -> Header:
    """Read and check the header of one file.

    Raises HeaderError naming file and tensor for anything the format forbids, CheckpointError if it cannot be read.
    """
    remote = absent(path)
    if remote is not None:
        size = remote[0].sizes[remote[1]]
        return _read(path, FileIdentity(size, 0, 0), lambda buffer, offset: remote[0].read(remote[1], buffer, offset))
    fd = open_input(path)
    try:
        return _read(path, identity(fd, path), lambda buffer, offset: read_exact(fd, buffer, offset, path=path))
    finally:
        close_input(fd)


def _read(path: Path, file: FileIdentity, read: Callable[[memoryview, int], None]) -> Header:
    if file.size < 8:
        _refuse(path, f"{file.size} bytes, expected at least the 8 of a header length")
    length_bytes = bytearray(8)
    read(memoryview(length_bytes), 0)
    length = int.from_bytes(length_bytes, "little")
    _check_length(path, length, file.size, bytes(length_bytes))
    raw = bytearray(length)
    read(memoryview(raw), 8)
    entries, metadata = _parse(path, bytes(raw))
    return Header(_locate(path, entries, 8 + length, file.size), metadata, bytes(raw), file)


def encode_header(
    tensors: list[tuple[str, str, tuple[int, ...], int]], metadata: dict[str, str], data_like: int = 0
) -> bytes:
    """Length prefix and JSON of a header for (name, dtype, shape, nbytes) in file order; the same bytes every time.

    Metadata keys are sorted; the whole is padded with spaces to a multiple of 8 bytes, as the reference writer does; or,
    where data begins at byte `data_like` of another file, so that it begins alike here in a block of 4096.
    """
    entries: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name, dtype, shape, nbytes in tensors:
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * ((data_like - 8 - len(text)) % 4096 if data_like % 8 == 0 < data_like else -len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _refuse(path: Path, what: str, tensor: str | None = None) -> NoReturn:
    where = f"{show(path)}: " + ("" if tensor is None else f"tensor {show(tensor)}: ")
    raise HeaderError(where + what, hint="The file is damaged or not safetensors; fetch or write it again")


def _check_length(path: Path, length: int, size: int, start: bytes) -> None:
    if length > size - 8 and (start[:2] == b"PK" or start[:1] == b"\x80"):
        raise HeaderError(
            f"{show(path)}: a pickle or zip file, expected safetensors",
            hint="taskvec never opens pickles; convert it to safetensors first",
        )
    if length > LARGEST_HEADER:
        _refuse(path, f"header of {length} bytes, expected at most {LARGEST_HEADER}")
    if length > size - 8:
        _refuse(path, f"header of {length} bytes, but only {size - 8} bytes follow its length")
    if length < 2:
        _refuse(path, f"header of {length} bytes, expected at least 2")


def _parse(path: Path, raw: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    if not raw.startswith(b"{"):
        _refuse(path, f"header begins with {raw[:1]!r}, expected '{{'")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, f"header is not UTF-8 (byte {error.start})")
    try:
        entries = json.loads(
            text.rstrip(" "),
            object_pairs_hook=_unique,
            parse_int=_whole if b"-" in raw else None,  # else the parser's own, which is fast
        )
    except RecursionError:
        _refuse(path, "header nests too deeply")
    except ValueError as error:
        _refuse(path, f"header is not JSON ({error})")
    if isinstance(entries, _Repeated):
        _refuse(path, "the name occurs twice in the header", entries.key)
    metadata = entries.pop("__metadata__", {})
    if isinstance(metadata, _Repeated):
        _refuse(path, f"__metadata__ has {show(metadata.key)} twice")
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "__metadata__ is not a map from text to text")
    for text_found in metadata.items():
        _encodable(path, *text_found)
    return entries, metadata


class _Repeated(NamedTuple):
    """What stands for a JSON object with a repeated key until it is refused where its place is known."""

    key: str


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Repeated:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    return _Repeated(Counter(key for key, _ in pairs).most_common(1)[0][0])


def _whole(word: str) -> int | float:
    """An int, or a float for what begins with a minus sign: "-0" would pass as 0, a float is refused with its tensor."""
    return float(word) if word.startswith("-") else int(word)


def _encodable(path: Path, *texts: str) -> None:
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            _refuse(path, "a name is not valid Unicode (lone surrogate)", text)


_FIELDS = {"dtype", "shape", "data_offsets"}


def _locate(path: Path, entries: dict[str, Any], data: int, size: int) -> list[StoredTensor]:
    found = []
    for name, entry in entries.items():
        _encodable(path, name)
        if isinstance(entry, _Repeated):
            _refuse(path, f"the field {show(entry.key)} occurs twice", name)
        if not isinstance(entry, dict) or entry.keys() != _FIELDS:
            _refuse(path, f"expected exactly the fields {', '.join(sorted(_FIELDS))}", name)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            _refuse(path, f"dtype {show(dtype)}, expected one of {', '.join(DTYPE_BITS)}", name)
        if not _all_whole(shape) or not _all_whole(offsets) or len(offsets) != 2:
            _refuse(path, f"shape {show(shape)}, data_offsets {show(offsets)}, expected lists of whole numbers", name)
        begin, end = offsets
        if end < begin or end > size - data:
            _refuse(path, f"data_offsets {show(offsets)}, but the data is {size - data} bytes", name)
        nbytes = _byte_size(path, name, dtype, shape)
        if nbytes != end - begin:
            _refuse(path, f"{dtype} {show(shape)} takes {nbytes} bytes, but its data_offsets span {end - begin}", name)
        found.append(StoredTensor(name, dtype, tuple(shape), path, data + begin, nbytes))
    found.sort(key=lambda tensor: (tensor.offset, tensor.offset + tensor.nbytes))
    _check_tiling(path, found, data, size)
    return found


def _all_whole(numbers: object) -> bool:
    return isinstance(numbers, list) and set(map(type, numbers)) <= {int}  # a bool is no number here


def _byte_size(path: Path, name: str, dtype: str, shape: list[int]) -> int:
    bits = 1
    for dimension in shape:
        bits *= dimension
        if dimension > _LARGEST_DIMENSION or bits > _U64:
            _refuse(path, f"shape {show(shape)} is larger than any machine", name)
    bits *= DTYPE_BITS[dtype]
    if bits > _U64 or bits % 8:
        _refuse(path, f"{dtype} {show(shape)} does not fill whole bytes", name)
    return bits // 8


def _check_tiling(path: Path, tensors: list[StoredTensor], data: int, size: int) -> None:
    at = data
    for tensor in tensors:
        if tensor.offset != at:
            kind = "overlaps the tensor before it" if tensor.offset < at else "leaves a hole before it"
            _refuse(path, f"starts at byte {tensor.offset - data} of the data, expected {at - data}: {kind}", tensor.name)
        at = tensor.offset + tensor.nbytes
    if at != size:
        _refuse(path, f"{size - at} bytes follow the last tensor, expected none")
