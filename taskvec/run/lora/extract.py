"""A full fine-tune as a LoRA that PEFT loads: B @ A ≈ Δ of every weight that changed, norms and biases as they are.

Δ = f32(tuned) − f32(base), one whole matrix per worker; its factors (`low_rank`) are rounded to their dtype, and the error
‖Δ − BA‖ / ‖Δ‖ is that of the rounded ones.
"""

from __future__ import annotations

import os
import queue
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.locate import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from ...errors import AdapterError, UsageError, show
from ..edited import PathLike
from ..jobs import Job, unit_bytes
from ..output import RECORD, Target
from ..plan import OUT_DTYPES, human_bytes, parse_bytes
from .file import AdapterFile
from .layout import Layer, config
from .plan import LoraPlan, difference, plan_lora

if TYPE_CHECKING:
    from ...checkpoint.floats import Floats, Raw
    from ..device import Device

_LARGEST_SQUARE = 1e30  # of a norm: beyond it products in float32 overflow
_MOST_WORKERS = 8


class Extracted(NamedTuple):
    """One weight as it is in the adapter. `norm`: ‖Δ‖ (Frobenius); `error`: ‖Δ − BA‖ / ‖Δ‖ of the stored factors."""

    layer: Layer
    rank: int
    norm: float
    error: float

    def summary(self) -> dict[str, Any]:
        """As plain data, JSON-ready."""
        return {
            "module": self.layer.module,
            "kind": self.layer.kind,
            "shape": list(self.layer.shape),
            "rank": self.rank,
            "norm": self.norm,
            "error": self.error,
        }


@dataclass(frozen=True)
class ExtractedLora:
    """What was written. `tensors` in the order of the file; sizes in bytes."""

    output: Path
    output_name: str
    plan: LoraPlan
    tensors: tuple[Extracted, ...]
    bytes_written: int
    seconds: float
    device: str

    @property
    def rank(self) -> int:
        """The largest: what an engine has to make room for."""
        return max(tensor.rank for tensor in self.tensors)

    @property
    def worst(self) -> Extracted:
        return max(self.tensors, key=lambda tensor: tensor.error)

    @property
    def median_error(self) -> float:
        return statistics.median(tensor.error for tensor in self.tensors)

    def summary(self) -> dict[str, Any]:
        """As plain data, JSON-ready: what `--json` prints."""
        return {
            "ok": True,
            "output": self.output_name,
            "base": self.plan.base.label,
            "tuned": self.plan.tuned.label,
            **_errors(self.tensors),
            "tensors": {tensor.layer.name: tensor.summary() for tensor in self.tensors},
            "new_values": list(self.plan.layout.values),
            "unchanged_tensors": len(self.plan.unchanged),
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "device": self.device,
            "notes": list(self.plan.notes),
        }


def extract_lora(
    base: Checkpoint | PathLike,
    tuned: Checkpoint | PathLike,
    *,
    output: PathLike,
    rank: int | None = None,
    energy: float | None = None,
    dtype: str = "float32",
    modules_to_save: bool = True,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    prefix: str = "",
    overwrite: bool = False,
    device: str = "cpu",
    jobs: int | None = None,
    memory: int | str | None = None,
    fsync: bool = True,
    planned: Callable[[LoraPlan], None] = lambda plan: None,
    extracted: Callable[[Extracted], None] = lambda tensor: None,
) -> ExtractedLora:
    """Write a PEFT LoRA folder that, added to `base`, comes as near to `tuned` as its ranks allow.

    Args:
        output: a folder.
        rank: of every factored weight, at most.
        energy: share of ‖Δ‖² that the factors hold, above 0 and at most 1: every weight gets the least rank that does;
            with `rank`, the smaller of both.
        dtype: of the factors: "float32", "bfloat16" or "float16".
        modules_to_save: carry norms and biases that changed, exactly. PEFT loads them, vLLM does not; when False, they are
            refused by name.
        include, exclude: shell-style patterns of tensor names; what they leave out stays as it is in base.
        prefix: what the names of the model in memory begin with and those of the file do not, like "transformer".
        overwrite: replace an output that taskvec made; it survives until the new one is complete.
        device: where the factors are computed: "cpu", "cuda", "cuda:N", "cuda:0,1", "cuda:all" or "auto".
        jobs: weights at a time.
        memory: cap for all of them together, bytes or text like 8GB; by default half of what the machine has. The whole
            difference of a weight has to fit.
        planned, extracted: called in this thread with the plan, and with each weight when it is written.

    The same inputs, library and device give the same bytes. Raises UsageError, MismatchError, CheckpointError or
    OutputError, each naming the file; then nothing was made.
    """
    started = time.perf_counter()
    plan = plan_lora(
        base, tuned, output=output, rank=rank, energy=energy, dtype=dtype, modules_to_save=modules_to_save, include=include,
        exclude=exclude, prefix=prefix, overwrite=overwrite,
    )  # fmt: skip
    from ..card import adapter_card
    from ..device import open_device
    from ..record import as_json, finished
    from ..staging import Staging

    where = open_device(device)
    workers = lora_workers(plan, where, jobs, memory)
    planned(plan)
    target = Target.of(output)
    with Staging(target, fsync=fsync, overwrite=overwrite) as staging:
        with AdapterFile(plan, staging.path / ADAPTER_WEIGHTS, fsync=fsync) as writer:
            found = tuple(_factored(plan, _places(where), workers, writer, extracted))
            writer.finish(_ranks(found))
        staging.write(ADAPTER_CONFIG, as_json(config(plan.base, plan.layout, _ranks(found), plan.settings.prefix)))
        staging.write("README.md", adapter_card(plan, found))
        staging.write(RECORD, finished(_record(plan, target, found, writer, where), staging.path))
        staging.commit()
    return ExtractedLora(
        output=target.path,
        output_name=target.typed,
        plan=plan,
        tensors=found,
        bytes_written=writer.size,
        seconds=time.perf_counter() - started,
        device=where.name,
    )


def lora_workers(plan: LoraPlan, device: Device, jobs: int | None, memory: int | str | None) -> int:
    """How many weights at a time. Raises UsageError when `memory` is too small for one."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs {jobs}, expected at least 1")
    needed = plan.worker_bytes
    given = parse_bytes("memory", memory) if memory is not None else _half_of_memory()
    fitting = given // needed
    if memory is not None and fitting < 1:
        raise UsageError(
            f"memory {show(memory)}: one weight of this run needs {human_bytes(needed)}",
            hint="Give it that much, or less to do: a --rank, or --exclude the largest",
        )
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = jobs or (min(_MOST_WORKERS, available) if device.name == "cpu" else len(_places(device)))
    return max(1, min(wanted, fitting))


def _half_of_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _places(device: Device) -> list[str]:
    """What torch calls the GPUs, or the CPU."""
    kind, _, numbers = device.name.partition(":")
    return [f"{kind}:{number}" for number in numbers.split(",")] if numbers else [kind]


class _Factored(NamedTuple):
    """A and B as bytes in the dtype of the file."""

    found: Extracted
    a: Raw
    b: Raw


def _factored(
    plan: LoraPlan, places: list[str], workers: int, writer: AdapterFile, done: Callable[[Extracted], None]
) -> Iterator[Extracted]:
    """Every layer, written in the order of the plan; a few are computed ahead of it."""
    free: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in range(workers):
        free.put(places[number % len(places)])
    jobs = {job.name: job for job in plan.differences.jobs}
    waiting: deque[Future[_Factored]] = deque()
    pool = ThreadPoolExecutor(workers)
    with _float32_products(places):
        try:
            for layer in plan.layout.layers:
                waiting.append(pool.submit(_factor_on, free, plan, jobs[layer.name], layer))
                if len(waiting) > workers:
                    yield _written(waiting.popleft(), writer, done)
            while waiting:
                yield _written(waiting.popleft(), writer, done)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _float32_products(places: list[str]) -> Iterator[None]:
    """No TF32 on a GPU, whose ten bits would be the error of the factors; as it was, afterwards."""
    if places == ["cpu"]:
        yield
        return
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _written(future: Future[_Factored], writer: AdapterFile, done: Callable[[Extracted], None]) -> Extracted:
    found, a, b = future.result()
    writer.add_factors(found.layer, found.rank, a, b)
    done(found)
    return found


def _factor_on(free: queue.SimpleQueue[str], plan: LoraPlan, job: Job, layer: Layer) -> _Factored:
    place = free.get()
    try:
        return _factor(plan, job, layer, place)
    finally:
        free.put(place)


def _factor(plan: LoraPlan, job: Job, layer: Layer, place: str) -> _Factored:
    import numpy as np

    from . import low_rank

    delta = np.empty(layer.shape, np.float32)
    flat = delta.reshape(-1)
    for start, raw, _ in difference(plan.differences, job):
        values = raw.view(np.float32)
        flat[start : start + len(values)] = values
    if not np.isfinite(delta).all():
        raise AdapterError(
            f"{show(plan.tuned.path)}: tensor {show(layer.name)}: NaN or inf in its difference from {show(plan.base.path)}",
            hint=f"Leave it as it is in the base with --exclude '{show(layer.name)}'",
        )
    if not 0 < low_rank.squared_norm(delta) < _LARGEST_SQUARE:
        raise AdapterError(
            f"{show(plan.tuned.path)}: tensor {show(layer.name)}: its difference from {show(plan.base.path)} is too "
            f"{'small' if low_rank.squared_norm(delta) < 1 else 'large'} to be factorised in float32",
            hint=f"Leave it as it is in the base with --exclude '{show(layer.name)}'",
        )
    xp, matrix = _on(place, delta)
    left, right = low_rank.factorise(matrix, plan.settings.rank, plan.settings.energy, xp)
    dtype = OUT_DTYPES[plan.settings.dtype] or "F32"
    pair = (left.T, right.T) if layer.turned else (right, left)
    (a, a_stored), (b, b_stored) = (_rounded(_on_host(factor), dtype) for factor in pair)
    rounded = (a_stored.T, b_stored.T) if layer.turned else (b_stored, a_stored)
    if not all(np.isfinite(factor).all() for factor in rounded):
        raise AdapterError(
            f"{show(plan.tuned.path)}: tensor {show(layer.name)}: its factors are outside {plan.settings.dtype}",
            hint="Take --dtype bfloat16 or float32",
        )
    error = low_rank.relative_error(matrix, *(_on(place, factor)[1] for factor in rounded))
    return _Factored(Extracted(layer, len(a_stored), low_rank.squared_norm(matrix) ** 0.5, error), a, b)


def _on(place: str, array: Floats) -> tuple[ModuleType, Any]:
    """numpy and the array, or torch and the array on that GPU."""
    if place == "cpu":
        import numpy as np

        return np, array
    import torch

    return torch, torch.from_numpy(array).to(place)


def _on_host(factor: Any) -> Floats:
    import numpy as np

    found: Floats = np.ascontiguousarray(factor if isinstance(factor, np.ndarray) else factor.cpu().numpy())
    return found


def _rounded(factor: Floats, dtype: str) -> tuple[Raw, Floats]:
    """The bytes of a factor in the dtype of the file, and what they stand for."""
    import numpy as np

    from ...checkpoint.floats import decode, encode

    raw = np.empty(factor.size * unit_bytes(dtype), np.uint8)
    encode(factor.reshape(-1).copy(), dtype, raw, np.empty(factor.size, np.uint32))
    return raw, decode(raw, dtype, np.empty(factor.size, np.float32)).reshape(factor.shape)


def _ranks(found: Sequence[Extracted]) -> dict[str, int]:
    return {tensor.layer.module: tensor.rank for tensor in found}


def _errors(found: Sequence[Extracted]) -> dict[str, Any]:
    rest = sum((tensor.error * tensor.norm) ** 2 for tensor in found)
    return {
        "rank": max(tensor.rank for tensor in found),
        "error": float((rest / sum(tensor.norm**2 for tensor in found)) ** 0.5),
        "worst_error": max(tensor.error for tensor in found),
        "median_error": statistics.median(tensor.error for tensor in found),
    }


def _record(
    plan: LoraPlan, target: Target, found: Sequence[Extracted], writer: AdapterFile, device: Device
) -> dict[str, Any]:
    """taskvec.json: from what it was made, and how near to it it is."""
    from .. import record

    made = record.recipe(plan.differences, target.path)
    if device.name != "cpu":
        import torch

        made["torch"] = torch.__version__
    return {
        **made,
        "kind": "lora",
        "formula": f"lora ≈ {plan.tuned.label} − {plan.base.label}",
        "options": plan.settings._asdict(),
        **_errors(found),
        "checksum": record.CHECKSUM_KIND,
        "shards": [{"name": ADAPTER_WEIGHTS, "nbytes": writer.size, "checksum": writer.checksum}],
        "side_files": [ADAPTER_CONFIG],
        "tensors": {tensor.layer.name: tensor.summary() for tensor in found},
    }


__all__ = ["Extracted", "ExtractedLora", "extract_lora", "lora_workers"]
