"""C3A (Chen et al. 2024; names and scale as PEFT 0.21 has them, tuners/c3a).

W' = W + C / in   Linear   W: [out, in]   kernel w: [out/b, in/b, b]
C[m·b + k, n·b + j] = w[m, n, (j − k) mod b]   a circulant block for each m, n
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..source import Delta, Formula
from .adapter import Family, Module, Weight
from .agreement import expect_layer


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    shape = expect_layer(module, weight, 2)
    kernel = module.expect("c3a_kernel", None, None, None)
    m, n, block = kernel.shape
    if (m * block, n * block) != shape:
        raise weight.refuse(module, [m * block, n * block])
    return weight.by(_Circulant(), kernel)


@dataclass(frozen=True)
class _Circulant(Formula):
    """Row k of each block is its kernel, turned by k places."""

    uses_weight = False

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        (kernel,) = tensors
        return kernel

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        n, block = state.shape[1:]
        m, k = np.divmod(np.arange(rows.start, rows.stop), block)  # [rows]
        places = (np.arange(block) - k[:, None]) % block  # [rows, b]
        turned = state[m[:, None, None], np.arange(n)[:, None], places[:, None, :]]  # [rows, in/b, b]
        return turned.reshape(len(m), -1) / (n * block)


FAMILY = Family(
    name="C3A",
    tensors=("c3a_kernel",),
    weight=weight,
    fields=("block_size", "block_size_pattern", "bias"),
)
