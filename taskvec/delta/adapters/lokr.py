"""LoKr (LyCORIS, Yeh et al. 2024; names and scale as LyCORIS and PEFT 0.21 have them, tuners/lokr).

W' = W + s · kron(w1, w2)        out = a·b, in = c·d
    w1: [a, c], or w1_a @ w1_b   w1_a: [a, r]  w1_b: [r, c]
    w2: [b, d], of a convolution [b, d, k, l]
        or w2_a @ w2_b           w2_a: [b, r]  w2_b: [r, d·k·l]
        or in the CP form        w2_a: [r, b]  w2_b: [r, d]  t2: [r, r, k, l], of a Conv1d [r, r, k, 1]
            w2[b, d, k, l] = Σᵢⱼ t2[i, j, k, l] · w2_a[i, b] · w2_b[j, d]
kron(w1, w2)[i·b + j, l·d + m, …] = w1[i, l] · w2[j, m, …]
    but of a Conv1d with w2: [b, d, k] PEFT takes kron over the last two axes and reads the numbers in another order:
    Δ[j·a + i, …] is w1[i, l] · w2[j, m, k] in the order m, l, k
s  = alpha / r, also where neither w1 nor w2 is a product; alpha and r after alpha_ and rank_pattern
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checkpoint.header import StoredTensor
from ..source import Delta, Formula
from .adapter import Family, Module, Weight
from .agreement import expect_layer
from .config import AdapterFolder
from .lycoris import FIELDS, expect_core, factors, scale_of


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    out, inside, *kernel = expect_layer(module, weight, 2, 3, 4, 5)
    first, (a, c) = _first(module)
    second, (b, *rest) = _second(module, tuple(kernel))
    columns = inside * math.prod(kernel)
    if a * b != out or c * math.prod(rest) != columns or rest[1:] not in ([], kernel):
        raise weight.refuse(module, f"[{a}·{b}, {c}·{rest[0]}{''.join(f', {size}' for size in rest[1:])}]")
    if len(rest) == 2 and "peft_type" not in module.config:
        raise module.refuse("lokr_w2 is whole, on a Conv1d: PEFT and LyCORIS disagree on the order of its Δ")
    kind = _Interleaved if len(rest) == 2 else _Kronecker
    return weight.by(kind(module.scale, len(first), a * c + b * math.prod(rest)), *first, *second)


def _first(module: Module) -> tuple[list[StoredTensor], tuple[int, int]]:
    """What w1 is made of, and its shape."""
    if "lokr_w1" in module:
        _refuse_beside(module, "lokr_w1", "lokr_w1_a", "lokr_w1_b")
        whole = module.expect("lokr_w1", None, None)
        return [whole], (whole.shape[0], whole.shape[1])
    right = module.expect("lokr_w1_b", None, None)
    left = module.expect("lokr_w1_a", None, right.shape[0])
    return [left, right], (left.shape[0], right.shape[1])


def _second(module: Module, kernel: tuple[int, ...]) -> tuple[list[StoredTensor], tuple[int, ...]]:
    """What w2 is made of, and its shape: [b, d·k·l], or as it is stored."""
    if "lokr_w2" in module:
        _refuse_beside(module, "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        whole = module["lokr_w2"]
        if len(whole.shape) not in (2, 2 + len(kernel)):
            raise module.refuse(f"lokr_w2 is {list(whole.shape)}, expected 2 axes" + (" and the kernel's" if kernel else ""))
        return [whole], whole.shape
    right = module.expect("lokr_w2_b", None, None)
    rank = right.shape[0]
    if "lokr_t2" in module:
        expect_core(module, "lokr_t2", rank, kernel)
        left = module.expect("lokr_w2_a", rank, None)
        return [left, right, module["lokr_t2"]], (left.shape[1], right.shape[1] * math.prod(kernel))
    left = module.expect("lokr_w2_a", None, rank)
    return [left, right], (left.shape[0], right.shape[1])


def _refuse_beside(module: Module, whole: str, *parts: str) -> None:
    found = [part for part in parts if part in module]
    if found:
        raise module.refuse(f"found {whole} and {', '.join(found)}, expected either")


@dataclass(frozen=True)
class _Kronecker(Formula):
    """s · kron(w1, w2). `parts`: of how many tensors w1 is made; `elements`: of w1 and w2 together."""

    scale: float
    parts: int
    elements: int

    uses_weight = False

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        w1, w2 = _product(*tensors[: self.parts]), _product(*tensors[self.parts :])
        return self.scale * w1, w2.reshape(len(w2), -1)  # [a, c], [b, d·k·l]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        w1, w2 = state
        i, j = np.divmod(np.arange(rows.start, rows.stop), len(w2))
        return (w1[i][:, :, None] * w2[j][:, None, :]).reshape(len(i), -1)

    def scratch(self, rows: int, columns: int) -> int:
        return 16 * self.elements


class _Interleaved(_Kronecker):
    """A Conv1d whose w2 is stored whole, [b, d, k], as PEFT orders it."""

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        *first, w2 = tensors
        return self.scale * _product(*first), w2  # [a, c], [b, d, k]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        w1, w2 = state
        j, i = np.divmod(np.arange(rows.start, rows.stop), len(w1))
        return (w1[i][:, None, :, None] * w2[j][:, :, None, :]).reshape(len(i), -1)


def _product(whole: Any, *others: Any) -> Any:
    """w1 or w2: stored whole, or as two factors, or as those and a core."""
    if not others:
        return whole
    left, right = factors(whole, *others)
    return left @ right


def scale(module: Module, folder: AdapterFolder) -> float:
    """s of one module."""
    return scale_of(module, folder, _rank(module))


def _rank(module: Module) -> int | None:
    """r, if w1 or w2 is a product."""
    ranks = {module.expect(name, None, None).shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in module}
    if len(ranks) > 1:
        raise module.refuse(f"its factors have ranks {sorted(ranks)}, expected one")
    return ranks.pop() if ranks else None


FAMILY = Family(
    name="LOKR",
    tensors=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    weight=weight,
    fields=(*FIELDS, "decompose_both", "decompose_factor", "rank_dropout_scale"),
    scale=scale,
    rank=_rank,
)
