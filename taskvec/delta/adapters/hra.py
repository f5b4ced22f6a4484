"""HRA (Yuan et al. 2024; as PEFT 0.21 has it, tuners/hra): W is multiplied by a chain of reflections.

W' = W · (I − 2 u₁u₁ᵀ)(I − 2 u₂u₂ᵀ) … (I − 2 uᵣuᵣᵀ)    u: [in, r], each column scaled to length 1    W: [out, in]
W' = W · (I − 2 Q Qᵀ)      with apply_GS: Q, [in, r], is u orthonormalised by Gram-Schmidt
Linear and Conv2d; the in of a convolution is in·k·k.
Both are W · (I − L @ R), [in, r] @ [r, in]; Δ = −W @ L @ R.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import AdapterError, show
from ..source import Delta, Formula
from .adapter import Family, Module, Weight
from .config import AdapterFolder

_VANISHED = 1e-6  # of its length: PEFT's float32 leaves nothing but rounding error of such a column


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    vectors = module.expect("hra_u", None, None)
    shape = weight.shape
    if weight.transposed or len(shape) not in (2, 4):
        raise module.refuse(f"PEFT has no HRA for {show(weight.stored.name)}, {list(weight.stored.shape)}")
    if vectors.shape[0] * shape[0] != weight.stored.elements:
        raise weight.refuse(module, f"a reflection by {list(vectors.shape)}")
    return weight.by(
        _Reflected(bool(module.config.get("apply_GS")), f"{show(module.path)}: tensor {show(vectors.name)}"), vectors
    )


@dataclass(frozen=True)
class _Reflected(Formula):
    orthonormal: bool
    where: str  # the tensor, for a message

    judges_tensors = True

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        """L and R."""
        lengths = np.sqrt(np.sum(tensors[0] * tensors[0], axis=0))
        self._check(lengths, 0)
        vectors = tensors[0] / lengths  # [in, r]
        if self.orthonormal:
            basis, triangle = np.linalg.qr(vectors)
            self._check(np.abs(np.diag(triangle)), _VANISHED)
            return 2 * basis, basis.T
        left, right = np.empty_like(vectors), vectors.T
        for i, vector in enumerate(right):
            left[:, i] = 2 * (vector - left[:, :i] @ (right[:i] @ vector))  # 2 (I − L @ R) u
        return left, right

    def _check(self, lengths: Any, least: float) -> None:
        if np.any(lengths <= least):
            raise AdapterError(f"{self.where}: column {int(np.argmin(lengths))} has no direction of its own")

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        left, right = state
        return -(weight @ left) @ right


def _rank(module: Module) -> int:
    return module.expect("hra_u", None, None).shape[1]


def scale(module: Module, folder: AdapterFolder) -> float:
    """1. Raises AdapterError if the rank is not that of the config."""
    rank = folder.number("r", folder.config.get("r", _rank(module)))
    if rank != _rank(module):
        raise module.refuse(f"hra_u is {list(module['hra_u'].shape)}, expected {rank:g} columns: r in the config")
    return 1.0


FAMILY = Family(name="HRA", tensors=("hra_u",), weight=weight, fields=("r", "apply_GS", "bias"), scale=scale, rank=_rank)
