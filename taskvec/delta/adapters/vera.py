"""VeRA (Kopiczko et al. 2024, eq. 2; names as PEFT 0.21 has them, tuners/vera).

W' = W + (λ_b · B[:out]) @ (λ_d · A[:, :in])   Linear, Conv1D   W: [out, in], stored [in, out] by a Conv1D
λ_b: [out], a factor per row   λ_d: [r], a factor per row   A: [r, IN]   B: [OUT, r]
A and B are random, shared by all modules, and large enough for the largest; PEFT saves them if save_projection is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import show
from ..source import Delta, LowRankDelta
from .adapter import Family, Module, Weight
from .agreement import expect_layer, expect_rank
from .config import AdapterFolder
from .projection import check_saved, projection


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    out, inside = expect_layer(module, weight, 2, conv1d=True)
    rank = _rank(module)
    per_output, per_rank = module.expect("vera_lambda_b", out), module.expect("vera_lambda_d", rank)
    a, b = projection(module, "vera_A"), projection(module, "vera_B")
    fits = len(a.shape) == len(b.shape) == 2 and a.shape[0] == b.shape[1] == rank
    if not fits or a.shape[1] < inside or b.shape[0] < out:
        raise module.refuse(
            f"{show(a.name)} is {list(a.shape)}, {show(b.name)} is {list(b.shape)}, expected at least "
            f"[{rank}, {inside}] and [{out}, {rank}]"
        )
    scaled = _Scaled(out, inside)
    return LowRankDelta(b, a, module.scale, weight.transposed, more=(per_output, per_rank), factors=scaled)


@dataclass(frozen=True)
class _Scaled:
    """The parts of B and A that a layer of this size takes, each row with its factor: [out, r], [r, in]."""

    out: int
    inside: int

    def __call__(self, b: Any, a: Any, per_output: Any, per_rank: Any) -> tuple[Any, Any]:
        return per_output[:, None] * b[: self.out], per_rank[:, None] * a[:, : self.inside]


def scale(module: Module, folder: AdapterFolder) -> float:
    """1: VeRA has no other factors than λ. Raises AdapterError when the config gives another rank."""
    expect_rank(module, folder, _rank(module))
    return 1.0


def _rank(module: Module) -> int:
    return module.expect("vera_lambda_d", None).shape[0]


FAMILY = Family(
    name="VERA",
    tensors=("vera_lambda_b", "vera_lambda_d"),
    weight=weight,
    shared=("vera_A", "vera_B"),
    fields=("r", "projection_prng_key", "save_projection", "vera_dropout", "d_initial", "bias"),
    check=check_saved,
    scale=scale,
    rank=_rank,
)
