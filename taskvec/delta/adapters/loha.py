"""LoHa (FedPara, Hyeon-Woo et al. 2022, propositions 1 and 3; names as LyCORIS and PEFT 0.21 have them, tuners/loha).

W' = W + s · (w1_a @ w1_b) ∘ (w2_a @ w2_b)   elementwise product of two low-rank products
    Linear                          w_a: [out, r]  w_b: [r, in]        W: [out, in]
    Conv1d, Conv2d                  w_a: [out, r]  w_b: [r, in·k·l]    W: [out, in, k, l]
    Conv1d, Conv2d in the CP form   w_a: [r, out]  w_b: [r, in]        t: [r, r, k, l], of a Conv1d [r, r, k, 1]
        w_a @ w_b becomes Σᵢⱼ t[i, j, k, l] · w_a[i, out] · w_b[j, in], [out, in, k, l]
s  = alpha / r; alpha and r after alpha_ and rank_pattern
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..source import Delta, Formula
from .adapter import Family, Module, Weight
from .agreement import expect_layer
from .config import AdapterFolder
from .lycoris import FIELDS, expect_core, factors, scale_of

_PRODUCTS = (("hada_w1_a", "hada_w1_b", "hada_t1"), ("hada_w2_a", "hada_w2_b", "hada_t2"))


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    out, inside, *kernel = expect_layer(module, weight, 2, 3, 4, 5)
    rank = _rank(module)
    with_core = "hada_t1" in module or "hada_t2" in module
    for a, b, core in _PRODUCTS:
        if with_core:
            expect_core(module, core, rank, tuple(kernel))
        module.expect(a, *((rank, out) if with_core else (out, rank)))
        module.expect(b, rank, inside if with_core else inside * math.prod(kernel))
    names = [name for product in _PRODUCTS for name in product[: 3 if with_core else 2]]
    return weight.by(_Hadamard(module.scale, rank if with_core else 0), *(module[name] for name in names))


@dataclass(frozen=True)
class _Hadamard(Formula):
    """s · (left₁ @ right₁) ∘ (left₂ @ right₂). `core_rank`: r of the CP form, 0 without."""

    scale: float
    core_rank: int

    uses_weight = False

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        half = len(tensors) // 2
        return factors(*tensors[:half]), factors(*tensors[half:])

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        (left, right), (other_left, other_right) = state
        return self.scale * (left[rows] @ right) * (other_left[rows] @ other_right)

    def scratch(self, rows: int, columns: int) -> int:
        return 24 * self.core_rank * columns


def scale(module: Module, folder: AdapterFolder) -> float:
    """s of one module."""
    return scale_of(module, folder, _rank(module))


def _rank(module: Module) -> int:
    return module.expect("hada_w1_b", None, None).shape[0]


FAMILY = Family(
    name="LOHA",
    tensors=tuple(name for product in _PRODUCTS for name in product),
    weight=weight,
    fields=FIELDS,
    scale=scale,
    rank=_rank,
)
