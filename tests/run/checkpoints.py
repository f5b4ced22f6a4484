"""Checkpoints for the tests of the run: on disk, written by safetensors itself, and in memory, for one kernel alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from taskvec import Checkpoint
from taskvec.checkpoint.floats import Raw
from taskvec.checkpoint.header import DTYPE_BITS, StoredTensor
from taskvec.delta.source import DenseDelta
from taskvec.run.jobs import Job, Term, tiles, unit_bytes
from taskvec.run.kernel import Counts, ReadStored
from taskvec.run.worker import Kernel

from .reference import MASKS, Change, Stored, unsigned

_TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
Tensors = Mapping[str, torch.Tensor]
MakeKernel = Callable[[ReadStored], Kernel]


def tensor(dtype: str, words: Any, shape: Sequence[int] | None = None) -> torch.Tensor:
    """A torch tensor with exactly these bits."""
    if np.size(words) == 0:
        return torch.empty(tuple(shape or (0,)), dtype=_TORCH[dtype])
    raw = torch.frombuffer(bytearray(np.array(words).tobytes()), dtype=torch.uint8)
    return raw.view(_TORCH[dtype]).reshape(tuple(shape) if shape is not None else (-1,))


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_file(path: Path, tensors: Tensors) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    return path


def write_model(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    """A model folder: config.json, and the tensors dealt out over `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"}))
    if shards == 1:
        write_file(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": names[i::shards] for i in range(shards)}
    for file, own in files.items():
        write_file(folder / file, {name: tensors[name] for name in own})
    weight_map = {name: file for file, own in files.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_sparse(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> Path:
    """A file of zeros that takes no disk: for sizes, not for values."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    with open(path, "r+b") as file:
        file.truncate(8 + len(text) + end)
    return path


def read_model(path: Path) -> dict[str, bytes]:
    """Name -> bits of every tensor under `path`, as the safetensors library loads it."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    return {name: bits(found) for file in files for name, found in load_file(file).items()}


def loaded_headers(folder: Path) -> dict[str, dict[str, tuple[str, list[int]]]]:
    """File name -> tensor name -> dtype and shape, as the safetensors library reads them."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            found[path.name] = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    return found


def weight_files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.safetensors"))}


def opened(path: Path, tensors: Tensors, shards: int = 1) -> Checkpoint:
    """A checkpoint with these tensors: a model folder, or one file if `path` says so."""
    return Checkpoint.open(write_file(path, tensors) if path.suffix == ".safetensors" else write_model(path, tensors, shards))


class Memory:
    """Stored tensors without files."""

    def __init__(self) -> None:
        self._held: dict[StoredTensor, Raw] = {}

    def store(self, held: Stored, shape: tuple[int, ...] | None = None) -> StoredTensor:
        words = np.ascontiguousarray(held.words).reshape(-1)
        assert held.dtype in MASKS or words.dtype == unsigned(held.dtype)
        raw = words.view(np.uint8).copy()
        place = Path(f"memory-{len(self._held)}")
        found = StoredTensor("w", held.dtype, shape or (len(words),), place, 0, len(raw))
        self._held[found] = raw
        return found

    def read_stored(self, stored: StoredTensor, start: int, nbytes: int) -> Raw:
        return self._held[stored][start : start + nbytes].copy()

    def read_whole(self, stored: StoredTensor) -> Raw:
        return self._held[stored].copy()

    def part(self, stored: StoredTensor, start: int, units: int) -> Raw:
        width = unit_bytes(stored.dtype)
        return self._held[stored][start * width : (start + units) * width].copy()


def make_job(base: StoredTensor, terms: Iterable[Term], out: str | None = None) -> Job:
    dtype = out or base.dtype
    return Job("w", dtype, base.shape, 0, base.elements * DTYPE_BITS[dtype] // 8, base, tuple(terms))


def run_job(make_kernel: MakeKernel, job: Job, memory: Memory) -> tuple[Any, Counts]:
    """The output words of one job, and its counts, tile by tile as a worker does it."""
    kernel, counts, parts = make_kernel(memory.read_stored), Counts(), []
    for tile in tiles(job.dtype, job.shape, job.nbytes):
        raw = {stored: memory.part(stored, tile.start, tile.units) for stored in job.elementwise}
        out, did = kernel.edit(job, tile, raw)
        parts.append(out.copy())
        counts.add(did)
    whole = np.concatenate(parts) if parts else np.empty(0, np.uint8)
    return whole.view(unsigned(job.dtype)), counts


def edit_dense(
    make_kernel: MakeKernel, base: Stored, changes: Sequence[Change], out: str, shape: tuple[int, ...] | None = None
) -> tuple[Any, Counts]:
    """base − Σ α·(tuned − origin) by a kernel. A change whose origin is `base` itself shares its stored tensor."""
    memory = Memory()
    held: dict[int, StoredTensor] = {}

    def place(stored: Stored) -> StoredTensor:
        if id(stored.words) not in held:
            held[id(stored.words)] = memory.store(stored, shape)
        return held[id(stored.words)]

    at = place(base)
    terms = [Term(c.alpha, DenseDelta(place(c.tuned), place(c.origin)), tuple(map(place, c.masks))) for c in changes]
    return run_job(make_kernel, make_job(at, terms, out), memory)
