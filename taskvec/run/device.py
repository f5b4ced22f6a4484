"""From the name of a device to the kernels that compute on it. torch is imported only when a GPU is asked for."""

from __future__ import annotations

import glob
import itertools
import re
from collections.abc import Callable
from typing import NamedTuple

from ..errors import TaskvecError, UsageError, show
from .jobs import TILE_BYTES
from .kernel import ReadStored
from .native import cpu_kernel
from .worker import Kernel

GPU_BATCH = 16 << 20  # bytes of output per trip to the GPU: launches and the interpreter then cost nothing against copies
_GPU_WORKERS = 8  # each with its own stream: while one reads, others copy in, compute, copy out and write


class Device(NamedTuple):
    """`make_kernel` is called once per worker; `batch` is what a worker carries at once, in bytes; `workers` how many
    there should be, None for one per processor."""

    name: str
    make_kernel: Callable[[ReadStored], Kernel]
    batch: int = TILE_BYTES
    workers: int | None = None


def open_device(name: str) -> Device:
    """The device called "cpu", "cuda", "cuda:N", "cuda:0,1", "cuda:all" or "auto" (the first GPU, if there is one).

    Raises UsageError for another name, TaskvecError when the GPU is not there.
    """
    if name not in ("cpu", "auto", "cuda", "cuda:all") and not re.fullmatch(r"cuda:\d{1,3}(,\d{1,3})*", name):
        raise UsageError(f"device {show(name)}, expected cpu, cuda, cuda:N, cuda:0,1, cuda:all or auto")
    if name == "cpu" or (name == "auto" and not glob.glob("/dev/nvidia[0-9]*")):
        return Device("cpu", cpu_kernel)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto" and count == 0:
        return Device("cpu", cpu_kernel)
    numbers = _numbers(name, count)
    if not numbers or max(numbers) >= count:
        raise TaskvecError(
            f"device {name}: torch {torch.__version__} sees {count} GPUs", hint="Use --device cpu; the bytes are the same"
        )
    return _gpus(numbers)


def _numbers(name: str, count: int) -> list[int]:
    wanted = name.partition(":")[2]
    if wanted == "all":
        return list(range(count))
    return [int(number) for number in wanted.split(",")] if wanted else [0]


def _gpus(numbers: list[int]) -> Device:
    """Workers take the GPUs in turn, and shards as they become free."""
    from .torch_kernel import TorchKernel

    turn = itertools.cycle(numbers)
    name = "cuda:" + ",".join(map(str, numbers))
    return Device(
        name, lambda read_stored: TorchKernel(read_stored, f"cuda:{next(turn)}"), GPU_BATCH, _GPU_WORKERS * len(numbers)
    )
