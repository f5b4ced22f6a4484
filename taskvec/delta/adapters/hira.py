"""HiRA (Huang et al. 2025; as PEFT 0.21 has it, tuners/hira): W is multiplied element by element; there is no scale.

W' = W ∘ (1 + B @ A)    Linear, Conv1D  A: [r, in]        B: [out, r]          W: [out, in], stored [in, out] by a Conv1D
                        Conv1d/2d/3d    A: [r, in, k, …]  B: [out, r, 1, …]    W: [out, in, k, …]
                        Embedding       A: [r, V]         B: [D, r]            W: [V, D], W' = W ∘ (1 + (B @ A)ᵀ)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ...checkpoint.header import StoredTensor
from ..source import Delta, Formula, matrices
from .adapter import Family, Module, Weight
from .config import AdapterFolder


def _factors(module: Module) -> tuple[StoredTensor, StoredTensor]:
    """A and B of a module, whichever kind of layer it is."""
    embedding = "hira_embedding_A" in module or "hira_embedding_B" in module
    if embedding and ("hira_A" in module or "hira_B" in module):
        raise module.refuse("found hira_A or hira_B beside hira_embedding_A or hira_embedding_B: one module has one pair")
    a, b = (module[f"hira_embedding_{x}" if embedding else f"hira_{x}"] for x in "AB")
    if len(a.shape) < 2 or len(a.shape) != len(b.shape) or a.shape[0] != b.shape[1]:
        raise module.refuse(f"A is {list(a.shape)}, B is {list(b.shape)}: their ranks differ")
    return a, b


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    a, b = _factors(module)
    turned = weight.transposed or "hira_embedding_A" in module
    product = (b.shape[0], *a.shape[1:])
    found = product[::-1] if turned else product
    if found != weight.stored.shape or any(size != 1 for size in b.shape[2:]):
        raise weight.refuse(module, f"a product with {list(found)}")
    as_stored = replace(weight, transposed=False)  # the factors are turned round, W need not be
    return as_stored.by(_Hadamard(turned), a, b)


@dataclass(frozen=True)
class _Hadamard(Formula):
    """Δ = W ∘ (B @ A), or W ∘ (B @ A)ᵀ if `turned`."""

    turned: bool

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        a, b = tensors
        left, right = matrices(b, a)
        return (right.T, left.T) if self.turned else (left, right)  # [rows, r], [r, columns]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        left, right = state
        return weight * (left[rows] @ right)


def _rank(module: Module) -> int:
    return _factors(module)[0].shape[0]


def scale(module: Module, folder: AdapterFolder) -> float:
    """1. Raises AdapterError if the rank is not that of the config."""
    stored = _rank(module)
    rank = folder.number("r", folder.config.get("r", stored))
    if stored not in (rank, folder.pattern_value("rank_pattern", module.name, "r", stored)):  # PEFT 0.21 takes r always
        raise module.refuse(f"A is {list(_factors(module)[0].shape)}, expected rank {rank:g} as in the config")
    return 1.0


FAMILY = Family(
    name="HIRA",
    tensors=("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B"),
    weight=weight,
    fields=("r", "rank_pattern", "hira_dropout"),
    scale=scale,
    rank=_rank,
)
