"""A model in memory as something the run can read and edit: in place, tile by tile, on whatever device each parameter lives;
and edited checkpoints handed out as tensors. The arithmetic is that of a run on files, and so are the bits.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import IN_MEMORY, InputFiles
from ..checkpoint.header import StoredTensor
from ..delta.source import FLOATS, FormulaDelta
from ..delta.vector import TaskVector
from ..delta.weighting import leaf
from ..errors import MismatchError, NameMismatchError, UsageError, counted, listing, show
from .device import GPU_BATCH, open_device
from .in_memory import Applied
from .inputs import check_factors
from .jobs import Job, ShardPlan, batches, merged, tiles, unit_bytes
from .kernel import Counts, ReadStored
from .model_tensors import DTYPES, named_tensors, refuse_shared
from .native import cpu_kernel
from .plan import Matched, Options, Plan, identities, match
from .staging import uninterrupted
from .worker import Worker

_numbers = itertools.count()


class _Live(Checkpoint):
    """Tensors in memory as a checkpoint: every parameter once, by the names its checkpoint has."""

    def __init__(self, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> None:
        super().__init__(Path("the model in memory"), None, (), tensors)
        self.__dict__["config"] = dict(config)  # in place of the one that is read from a folder

    def fits(self, shapes_sha256: str) -> bool:
        """Whatever the fingerprint: a model has buffers and names of its own. Every tensor is compared by itself."""
        return True


class Edit:
    """A vector matched to the tensors of a model; while it is entered, their memory can be read as files are."""

    def __init__(self, model: torch.nn.Module | Mapping[str, torch.Tensor], vector: TaskVector) -> None:
        if not isinstance(vector, TaskVector):
            raise TypeError(f"expected a TaskVector, found {type(vector).__name__}; make one with TaskVector.between or open")
        self._parameters = named_tensors(model, vector)
        self._places: dict[Path, torch.Tensor] = {}
        stored = {name: self._stored(name, tensor) for name, tensor in self._parameters.items()}
        self._live = _Live(stored, _config(model))
        self._vector = vector
        self._plan: Plan | None = None
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []

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
            _refuse_left_over(matched, self._vector)
            edited = [(t, matched.terms[name]) for name, t in self._live.tensors.items() if name in matched.terms]
            work = tuple(Job(t.name, t.dtype, t.shape, 0, t.nbytes, t, terms) for t, terms in edited)
            shard = ShardPlan("memory", b"", work, 0)
            pinned = identities(self._live, self._vector)
            self._plan = Plan(self._live, self._vector, Options(), True, (shard,), (), matched.notes, identities=pinned)
            refuse_shared({job.name: self._parameters[job.name] for job in work})
            check_factors(self._plan)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for path in self._places:
            IN_MEMORY.pop(path, None)

    def keep(self) -> None:
        """Hold the bits that the tensors to be edited have now, in the host's memory, for `restore`."""
        assert self._plan is not None
        touched = [self._parameters[job.name] for job in self._plan.jobs]
        self._held = [(tensor, tensor.detach().to("cpu", copy=True)) for tensor in touched]

    def restore(self) -> None:
        """Give every tensor the bits that were kept. One that fails does not keep the others from theirs; Ctrl-C waits."""
        failed: Exception | None = None
        with uninterrupted(), torch.no_grad():
            for tensor, before in self._held:
                try:
                    tensor.copy_(before)
                except Exception as error:
                    failed = failed or error
            self._held = []
        if failed is not None:
            raise failed

    def run(self, jobs: int | None) -> Applied:
        """Edit them all."""
        assert self._plan is not None
        if jobs is not None and jobs < 1:
            raise UsageError(f"jobs {jobs}, expected at least 1")
        files, total = InputFiles(self._plan.identities), Counts()
        available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        pool = ThreadPoolExecutor(min(8, jobs or available))
        try:
            for done in [pool.submit(self._edit, job, files) for job in self._plan.jobs]:
                total.add(done.result())
        finally:
            pool.shutdown(cancel_futures=True)
            files.close()
        names = tuple(job.name for job in self._plan.jobs)
        return Applied(names, total.changed, total.lost, total.overflow, self._plan.notes)

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


def _refuse_left_over(matched: Matched, vector: TaskVector) -> None:
    """A vector's tensor that the model has no place for would be left out without a word that anyone reads."""
    tuned = {name: t for _, s in vector.terms for c in leaf(s).inputs for name, t in c.tensors.items()}
    left = [name for name in matched.unused if name in tuned and tuned[name].dtype in FLOATS]
    if left:
        raise NameMismatchError(
            f"the model in memory: {counted(len(left), 'tensor')} of the vector it has no parameter for: {listing(left)}",
            hint=f"Leave them out with vector.without({left[0]!r}), or give it the whole model",
        )


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
