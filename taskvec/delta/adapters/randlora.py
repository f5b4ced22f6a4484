"""RandLoRA (Albert et al. 2025; names, order and scale as PEFT 0.21 has them, tuners/randlora).

W' = W + s · L @ R     where in ≤ out     W: [out, in], stored [in, out] by a Conv1D
W' = W + s · (L @ R)ᵀ  where in > out
    short = min(in, out), long = max(in, out), n = ⌈short / r⌉ bases
    L: [long, n·r]   from B[:long, :n]: [long, n, r], its last two axes in one
    R: [r·n, short]  from λ[i, j] · A[i, 0, :short] · γ[j]: [r, n, short], its first two axes in one
    A: [r, 1, SHORT]   B: [LONG, N, r]   λ: [r, n]   γ: [n, short]
The inner axis is n·r on the left but r·n on the right, so a basis of B does not meet its own λ: PEFT trains and merges so.
A and B are random, shared by all modules, and large enough for the largest; PEFT saves them if save_projection is set, then
again in each module.
s  = randlora_alpha / r
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...errors import show
from ..source import Delta, Formula
from .adapter import Family, Module, Weight
from .agreement import expect_layer, expect_rank
from .config import AdapterFolder
from .projection import check_saved, projection


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    out, inside = expect_layer(module, weight, 2, conv1d=True)
    short, long, rank = min(out, inside), max(out, inside), _rank(module)
    bases = -(-short // rank)
    weights, per_column = module.expect("randlora_lambda", rank, bases), module.expect("randlora_gamma", bases, short)
    a, b = projection(module, "randlora_A"), projection(module, "randlora_B")
    expected = ((rank, 1, short), (long, bases, rank))
    fits = all(len(t.shape) == 3 and all(map(int.__ge__, t.shape, want)) for t, want in zip((a, b), expected))
    if not fits or a.shape[:2] != (rank, 1) or b.shape[2] != rank:
        raise module.refuse(
            f"{show(a.name)} is {list(a.shape)}, {show(b.name)} is {list(b.shape)}, expected at least "
            f"{list(expected[0])} and {list(expected[1])}"
        )
    return weight.by(_Bases(module.scale, rank, bases, out, inside), a, b, weights, per_column)


@dataclass(frozen=True)
class _Bases(Formula):
    """s · L @ R, or its transpose where W is wider than high."""

    scale: float
    rank: int
    bases: int
    out: int
    inside: int

    uses_weight = False

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        a, b, weights, per_column = tensors
        short, long = min(self.out, self.inside), max(self.out, self.inside)
        left = b[:long, : self.bases].reshape(long, -1)  # [long, n·r]
        right = self.scale * weights[:, :, None] * a[:, :, :short] * per_column  # [r, n, short]
        right = right.reshape(-1, short)  # [r·n, short]
        return (left, right) if self.inside <= self.out else (right.T, left.T)

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        left, right = state
        return left[rows] @ right

    def scratch(self, rows: int, columns: int) -> int:
        inner = self.rank * self.bases
        return 8 * inner * (max(self.out, self.inside) + 2 * min(self.out, self.inside))


def scale(module: Module, folder: AdapterFolder) -> float:
    """s of one module."""
    rank = _rank(module)
    expect_rank(module, folder, rank)
    return folder.number("randlora_alpha", folder.config.get("randlora_alpha", 640)) / rank


def _rank(module: Module) -> int:
    return module.expect("randlora_lambda", None, None).shape[0]


FAMILY = Family(
    name="RANDLORA",
    tensors=("randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"),
    weight=weight,
    shared=("randlora_A", "randlora_B"),
    fields=(
        "r", "randlora_alpha", "projection_prng_key", "save_projection", "sparse", "very_sparse", "randlora_dropout", "bias",
    ),
    check=check_saved,
    scale=scale,
    rank=_rank,
)  # fmt: skip
