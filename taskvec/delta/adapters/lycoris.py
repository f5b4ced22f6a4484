"""What LoHa and LoKr share (LyCORIS, Yeh et al. 2024; PEFT 0.21, tuners/lycoris_utils.py): alpha / r, and factors that have a
core in between, the CP form of a convolution (Hyeon-Woo et al. 2022, proposition 3).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .adapter import Module
from .agreement import expect_rank
from .config import AdapterFolder

FIELDS = ("r", "alpha", "rank_pattern", "alpha_pattern", "rank_dropout", "use_effective_conv2d")
_DEFAULT = 8  # of r and of alpha


def scale_of(module: Module, folder: AdapterFolder, rank: int | None) -> float:
    """s = alpha / r. `rank` is that of the tensors, None where they do not tell: then it is the config's."""
    stated = folder.pattern_value("rank_pattern", module.name, "r", rank or _DEFAULT)
    if stated <= 0:
        raise folder.refuse(f"r is {stated:g}, expected a positive number")
    if rank is not None:
        expect_rank(module, folder, rank)
    return folder.pattern_value("alpha_pattern", module.name, "alpha", _DEFAULT) / stated


def factors(a: Any, b: Any, core: Any = None) -> tuple[Any, Any]:
    """Left and right of a product, [out, r] and [r, in·k·l], from a: [out, r] and b: [r, in·k·l] themselves; or, with a core
    t: [r, r, k, l], from a: [r, out] and b: [r, in]: product[p, q, k, l] = Σᵢⱼ t[i, j, k, l] · a[i, p] · b[j, q].
    """
    if core is None:
        return a, b
    rank = len(core)
    right = np.matmul(b.T, core.reshape(rank, rank, -1))  # [r, in, k·l]
    return a.T, right.reshape(rank, -1)


def expect_core(module: Module, suffix: str, rank: int, kernel: tuple[int, ...]) -> None:
    """Raises AdapterError unless there is a core for a kernel [k, l], or [k], which a core has as [k, 1]."""
    if not 1 <= len(kernel) <= 2:
        raise module.refuse(f"{suffix} is for convolutions of one or two dimensions, found {len(kernel)}")
    module.expect(suffix, rank, rank, *(*kernel, 1)[:2])
