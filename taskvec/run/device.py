"""From the name of a device to the kernel that computes on it. torch is imported only when a GPU is asked for."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable

from ..errors import TaskvecError, UsageError, show
from .kernel import NumpyKernel, ReadWhole
from .stream import Kernel


def kernel_for(device: str) -> tuple[str, Callable[[ReadWhole], Kernel]]:
    """The device that will compute ("cpu", "cuda:N") and what makes a kernel for each worker.

    Raises UsageError for another name, TaskvecError when the GPU is not there.
    """
    if device not in ("cpu", "auto", "cuda") and not re.fullmatch(r"cuda:\d{1,3}", device):
        raise UsageError(f"device {show(device)}, expected cpu, cuda, cuda:N or auto")
    if device == "cpu" or (device == "auto" and not glob.glob("/dev/nvidia[0-9]*")):
        return "cpu", NumpyKernel
    import torch

    from .torch_kernel import TorchKernel

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto" and count == 0:
        return "cpu", NumpyKernel
    number = int(device.partition(":")[2] or 0) if device != "auto" else 0
    if number >= count:
        raise TaskvecError(
            f"device {device}: torch {torch.__version__} sees {count} GPUs",
            hint="Use --device cpu; the bytes are the same",
        )
    return f"cuda:{number}", lambda read_whole: TorchKernel(read_whole, f"cuda:{number}")
