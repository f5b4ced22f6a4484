"""Safetensors files made by hand, byte by byte and without the code under test, so that they may also be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, deserialize

# bits per element of the 22 dtypes of the format, written down from its README and the names alone
BITS = dict(
    F4=4, F6_E2M3=6, F6_E3M2=6, F8_E4M3=8, F8_E5M2=8, F8_E8M0=8, F8_E4M3FNUZ=8, F8_E5M2FNUZ=8, BOOL=8, U8=8, I8=8,
    F16=16, BF16=16, I16=16, U16=16, F32=32, I32=32, U32=32, F64=64, I64=64, U64=64, C64=64,
)  # fmt: skip

Entries = dict[str, tuple[str, list[int], int]]  # name -> dtype, shape, bytes


def framed(header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A file: the length of the header (or the `length` it claims), the header as it stands, the data."""
    text = json.dumps(header) if isinstance(header, dict) else header
    raw = text.encode() if isinstance(text, str) else text
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: str = "U8", shape: list[int] | None = None, begin: int = 0, end: int = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def header_of(entries: Entries, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for name, (dtype, shape, nbytes) in entries.items():
        header[name] = entry(dtype, shape, at, at + nbytes)
        at += nbytes
    return header


def weights(path: Path, *names: str, metadata: dict[str, str] | None = None, fill: int = 1) -> Path:
    """A small good file: one F32 [2] tensor per name, every byte of its data `fill`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = header_of({name: ("F32", [2], 8) for name in names or ("w",)}, metadata)
    path.write_bytes(framed(header, bytes([fill]) * 8 * len(names or ("w",))))
    return path


def sharded(folder: Path, shards: dict[str, list[str]], stem: str = "model") -> Path:
    """A model folder: shard name -> its tensors, and the index that says so."""
    for shard, names in shards.items():
        weights(folder / shard, *names)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    return indexed(folder, weight_map, stem)


def indexed(folder: Path, weight_map: object, stem: str = "model") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def hub_cache(root: Path, contents: dict[str, bytes]) -> Path:
    """The snapshot folder of a Hub cache: every file a link into ../../blobs, as huggingface_hub lays them out."""
    home = root / "models--org--name"
    snapshot = home / "snapshots" / "0123abcd"
    (home / "blobs").mkdir(parents=True)
    for number, (name, content) in enumerate(contents.items()):
        blob = home / "blobs" / f"{number:040x}"
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", blob.name))
    return snapshot


def library_reads(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What safetensors' own library makes of a file: name -> dtype, shape, bytes; None when it refuses."""
    try:
        found = deserialize(content)
    except SafetensorError:
        return None
    return {name: (spec["dtype"], list(spec["shape"]), bytes(spec["data"])) for name, spec in found}
