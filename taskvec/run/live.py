"""A model in memory as something the run can read and edit: in place, tile by tile, on whatever device each parameter lives;
and edited checkpoints handed out as tensors. The arithmetic is that of a run on files, and so are the bits.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import IN_MEMORY, InputFiles
from ..checkpoint.header import StoredTensor
from ..delta.adapters.names import names_on_disk
from ..delta.adapters.stacks import Stack, find_stacks
from ..delta.dense import FineTune
from ..delta.source import FormulaDelta
from ..delta.stored import StoredVector
from ..delta.vector import TaskVector
from ..delta.weighting import leaf
from ..errors import MismatchError, QuantizedError, ShapeMismatchError, listing, show
from .device import GPU_BATCH, open_device
from .edited import check_factors
from .in_memory import Applied
from .jobs import Job, ShardPlan, batches, merged, tiles, unit_bytes
from .kernel import Counts, ReadStored
from .native import cpu_kernel
from .plan import Options, Plan, identities, match
from .stream import Worker

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_QUANTIZED = (
    "Params4bit",
    "Int8Params",
    "QuantizedTensor",
    "AffineQuantizedTensor",
    "Linear4bitTensor",
)  # bitsandbytes, torchao, …
_QUANTIZED_MODULES = ("Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear", "HQQLinear", "QuantizedLinear", "FP8Linear")
_numbers = itertools.count()


class _Live(Checkpoint):
    """Tensors in memory as a checkpoint: every parameter once, by the names its checkpoint has."""

    def __init__(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
        super().__init__(Path("the model in memory"), None, (), tensors)
        self.__dict__["config"] = dict(config)  # in place of the one that is read from a folder


class Edit:
    """A vector matched to the tensors of a model; while it is entered, their memory can be read as files are."""

    def __init__(self, model: torch.nn.Module | Mapping[str, torch.Tensor], vector: TaskVector) -> None:
        self._parameters = _by_checkpoint_name(_parameters(model), vector)
        self._places: dict[Path, torch.Tensor] = {}
        stored = {name: self._stored(name, tensor) for name, tensor in self._parameters.items()}
        self._live = _Live(stored, _config(model))
        self._vector = vector
        self._plan: Plan | None = None

    def __enter__(self) -> Edit:
        for path, tensor in self._places.items():
            IN_MEMORY[path] = _reader(tensor)
        try:
            matched = match(self._live, self._vector, Options())
            if matched.added:
                raise MismatchError(
                    f"the vector unties {listing(matched.added)}, which a model in memory cannot do",
                    hint="Untie it first (config.tie_word_embeddings = False), or save the edited checkpoint and load it",
                )
            edited = [(t, matched.terms[name]) for name, t in self._live.tensors.items() if name in matched.terms]
            work = tuple(Job(t.name, t.dtype, t.shape, 0, t.nbytes, t, terms) for t, terms in edited)
            shard = ShardPlan("memory", b"", work, 0)
            pinned = identities(self._live, self._vector)
            self._plan = Plan(self._live, self._vector, Options(), True, (shard,), (), matched.notes, identities=pinned)
            check_factors(self._plan)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for path in self._places:
            IN_MEMORY.pop(path, None)

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """On leaving, the tensors that the vector edits have the bits they had on entering."""
        assert self._plan is not None
        touched = [self._parameters[job.name] for job in self._plan.jobs]
        held = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in touched]
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, before in held:
                    tensor.copy_(before)

    def run(self, jobs: int | None) -> Applied:
        """Edit them all."""
        assert self._plan is not None
        files, total = InputFiles(self._plan.identities), Counts()
        workers = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
        pool = ThreadPoolExecutor(min(8, workers))
        try:
            for done in [pool.submit(self._edit, job, files) for job in self._plan.jobs]:
                total.add(done.result())
        finally:
            pool.shutdown(cancel_futures=True)
            files.close()
        return Applied(tuple(job.name for job in self._plan.jobs), total.changed, total.lost, total.overflow)

    def _edit(self, job: Job, files: InputFiles) -> Counts:
        parameter = self._parameters[job.name]
        words = _bytes(parameter)
        held = _bytes(parameter.detach().contiguous()) if words is None else words
        assert held is not None
        counts = _on_host(job, files, held) if parameter.device.type == "cpu" else _on_device(job, files, held)
        if words is None:
            with torch.no_grad():
                parameter.copy_(held.view(parameter.dtype).view(parameter.shape))
        return counts

    def _stored(self, name: str, tensor: torch.Tensor) -> StoredTensor:
        path = Path(f"<model in memory, {next(_numbers)}>")
        self._places[path] = tensor
        return StoredTensor(name, DTYPES[tensor.dtype], tuple(tensor.shape), path, 0, tensor.nbytes)


def _on_host(job: Job, files: InputFiles, held: torch.Tensor) -> Counts:
    """Edit the bytes of a tensor in the host's memory."""
    worker, total, unit = Worker(files, cpu_kernel), Counts(), unit_bytes(job.dtype)
    for tile in tiles(job.dtype, job.shape, job.nbytes):
        out, counts = worker.compute(job, (tile,), worker.read(job, (tile,)))
        with torch.no_grad():
            held[tile.start * unit : (tile.start + tile.units) * unit].copy_(torch.from_numpy(out))
        total.add(counts)
    return total


def _on_device(job: Job, files: InputFiles, held: torch.Tensor) -> Counts:
    """Edit the bytes of a tensor on a GPU: it stays there, and only the vector's own tensors go to it."""
    from .torch_kernel import TorchKernel

    kernels: list[TorchKernel] = []

    def make_kernel(read_stored: ReadStored) -> TorchKernel:
        kernels.append(TorchKernel(read_stored, str(held.device)))
        return kernels[0]

    worker, total, unit = Worker(files, make_kernel), Counts(), unit_bytes(job.dtype)
    asked = {delta.origin for _, delta, _ in job.terms if isinstance(delta, FormulaDelta) and delta.formula.uses_weight}
    resident = None if job.base in asked else job.base  # formulas are evaluated on the host
    for batch in batches(job, GPU_BATCH):
        span = merged(batch)
        part = held[span.start * unit : (span.start + span.units) * unit]
        total.add(kernels[0].edit_in_place(job, span, worker.read(job, batch, without=resident), part))
    return total


def _parameters(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """name -> tensor, as the model has them. Raises QuantizedError or MismatchError for what cannot be edited."""
    if isinstance(model, torch.nn.Module):
        _refuse_quantized_modules(model)
    named = model.state_dict(keep_vars=True) if isinstance(model, torch.nn.Module) else model
    found: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES:
            continue
        if type(tensor).__name__ in _QUANTIZED:
            raise QuantizedError(f"{show(name)}: a {type(tensor).__name__}, quantised", hint="Load the model unquantised")
        if tensor.is_meta:
            raise MismatchError(f"{show(name)}: on the meta device, without data", hint="Load the weights first")
        found[name] = tensor
    return found


def _by_checkpoint_name(parameters: Mapping[str, torch.Tensor], vector: TaskVector) -> dict[str, torch.Tensor]:
    """The names that the vector's checkpoint has -> the tensors of the model, or the parts of them, that they are; each
    memory once. Names in memory are other than on disk where transformers renames modules or stacks experts."""
    disk: dict[str, StoredTensor] = {}
    for source in (leaf(source) for _, source in vector.terms):
        if isinstance(source, (FineTune, StoredVector)):
            disk.update(source.inputs[0].tensors)
    found = dict(parameters)
    if disk:
        stacks = find_stacks(disk.values(), parameters)
        names = names_on_disk(parameters, dict.fromkeys((*disk, *stacks)))
        found = {}
        for name, target in names.items():
            found.update(_parts(parameters[name], stacks[target]) if target in stacks else {target: parameters[name]})
        found.update({name: tensor for name, tensor in parameters.items() if name not in names and name not in found})
    seen: set[tuple[Any, ...]] = set()
    once: dict[str, torch.Tensor] = {}
    for name, tensor in found.items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if not tensor.numel() or place not in seen:
            once[name] = tensor
        seen.add(place)
    return once


def _parts(parameter: torch.Tensor, stack: Stack) -> dict[str, torch.Tensor]:
    """The experts of a stacked parameter by the names of their matrices on disk."""
    shape = stack.parts[0][1].shape
    if tuple(parameter.shape) != shape:
        raise ShapeMismatchError(f"{show(stack.name)} in memory: found shape {list(parameter.shape)}, expected {list(shape)}")
    flat = parameter.detach()
    return {t.name: flat[part.expert, part.first : part.first + t.shape[0]] for t, part in stack.parts}


def _refuse_quantized_modules(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if type(module).__name__ in _QUANTIZED_MODULES:
            raise QuantizedError(
                f"{show(name)}: a {type(module).__name__}, quantised", hint="Load the model unquantised to edit it"
            )


def _config(model: object) -> dict[str, Any]:
    """The config of a transformers model; empty for everything else."""
    config: Any = getattr(model, "config", None)
    content = config.to_dict() if hasattr(config, "to_dict") else {}
    return dict(content) if isinstance(content, dict) else {}


def _bytes(tensor: torch.Tensor) -> torch.Tensor | None:
    """The memory of a contiguous tensor as bytes, of which writing changes the tensor; None if it is not contiguous."""
    plain = tensor.detach()
    return plain.view(-1).view(torch.uint8) if plain.is_contiguous() else None


def _reader(tensor: torch.Tensor) -> Callable[[memoryview, int], None]:
    def read(buffer: memoryview, offset: int) -> None:
        held = _bytes(tensor)
        held = held if held is not None else _bytes(tensor.detach().contiguous())
        assert held is not None
        torch.from_numpy(np.frombuffer(buffer, np.uint8)).copy_(held[offset : offset + len(buffer)])

    return read


def edited_tensors(plan: Plan, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the planned output, in the order of its files: the bits a run would write, on `device`."""
    where = open_device(device)
    place = "cpu" if where.name == "cpu" else where.name.partition(",")[0]
    kinds = {name: kind for kind, name in DTYPES.items()}
    files = InputFiles(plan.identities)
    try:
        worker = Worker(files, where.make_kernel)
        for job in plan.jobs:
            if job.dtype not in kinds:
                raise MismatchError(f"{show(job.base.path)}: tensor {show(job.name)}: torch has no dtype for {job.dtype}")
            tensor = torch.empty(job.shape, dtype=kinds[job.dtype])
            words, unit = _bytes(tensor), unit_bytes(job.dtype)
            assert words is not None
            for batch in batches(job, where.batch):
                span = merged(batch)
                out, _ = worker.compute(job, batch, worker.read(job, batch))
                words[span.start * unit : (span.start + span.units) * unit].copy_(torch.from_numpy(out))
            yield job.name, tensor.to(place)
    finally:
        files.close()
