"""OFT (Qiu et al. 2023; as PEFT 0.18 to 0.21 have it, tuners/oft): the inputs are rotated in blocks of n.

Q  = U − Uᵀ            q: [blocks, n(n − 1)/2], the part of U, [n, n], above its diagonal; one block with block_share
R  = (I − Q)(I + Q)⁻¹                            Cayley
R  = I + 2Q + 2Q² + … + 2Qᴺ⁻² + Qᴺ⁻¹             Cayley-Neumann with N terms (N = 3 is read as 4; I + 2Q and I for 2 and 1)
W' = W · diag(R, R, …)ᵀ                          Linear and 1×1 Conv2d, W: [out, in] with in = blocks · n
W' = W · diag(R, R, …)                           Embedding, W: [V, D] with D = blocks · n
COFT: Q is scaled down to a length (Frobenius) of at most eps / √(stored blocks)
A larger kernel is refused: what PEFT 0.21 computes while it trains one is not what it merges.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import show
from ..source import Delta, Formula
from .adapter import Family, Module, Weight
from .config import AdapterFolder

_OLD = ("oft_r", "oft_s", "oft_r.weight", "oft_s.weight")
_MOST_TERMS = 1000  # of the series; 5 is usual
_RETRAIN = "Merge it with the PEFT version that trained it, and subtract the merged model"


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    old = next((suffix for suffix in _OLD if suffix in module), None)
    if old is not None:
        raise module.refuse(f"{old} is the OFT of PEFT before 0.16, whose formula is another one", _RETRAIN)
    embedding = "oft_embedding_R.weight" in module
    if embedding and "oft_R.weight" in module:
        raise module.refuse("found oft_R and oft_embedding_R: one module has one of them")
    stored = module.expect("oft_embedding_R.weight" if embedding else "oft_R.weight", None, None)
    _check_layer(module, weight, embedding)
    columns, blocks, size = weight.shape[1], stored.shape[0], (1 + math.isqrt(1 + 8 * stored.shape[1])) // 2
    shared = bool(module.config.get("block_share"))
    fits = columns % size == 0 and blocks == (1 if shared else columns // size)
    if size * (size - 1) // 2 != stored.shape[1] or not fits:
        raise weight.refuse(module, f"a rotation of {list(stored.shape)}")
    return weight.by(_formula(module, columns // size, embedding), stored)


def _check_layer(module: Module, weight: Weight, embedding: bool) -> None:
    shape = weight.shape
    if weight.transposed or len(shape) not in ((2,) if embedding else (2, 4)):
        raise module.refuse(
            f"PEFT has no OFT for {show(weight.stored.name)}, {list(weight.stored.shape)}: a Conv1D or the like"
        )
    if any(size != 1 for size in shape[2:]):
        raise module.refuse(
            f"{show(weight.stored.name)} is {list(shape)}: what PEFT 0.21 trains with OFT for kernels larger than 1×1 is not "
            "what it merges: no weight is its Δ"
        )


def _formula(module: Module, blocks: int, embedding: bool) -> Rotated:
    config = module.config
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else 0
    eps = config.get("eps", 6e-5) if config.get("coft") else math.inf
    return _Oft(blocks, straight=embedding, terms=terms, eps=eps)


@dataclass(frozen=True)
class Rotated(Formula):
    """Δ = W · (diag(R)ᵀ − I), or W · (diag(R) − I) if `straight`; `blocks` on the diagonal of R. W: [out, blocks · n]."""

    blocks: int
    straight: bool = False

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        change = self.rotations(tensors[0])  # [blocks or 1, n, n]
        change = change - np.eye(change.shape[-1])
        return change if self.straight else change.transpose(0, 2, 1)

    def rotations(self, stored: Any) -> Any:
        """R of each block that is stored, [blocks or 1, n, n]."""
        raise NotImplementedError

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        cut = weight.reshape(len(weight), self.blocks, -1).transpose(1, 0, 2)  # [blocks, rows, n]
        return np.matmul(cut, state).transpose(1, 0, 2).reshape(weight.shape)

    def scratch(self, rows: int, columns: int) -> int:
        return 64 * columns * (columns // self.blocks)


@dataclass(frozen=True)
class _Oft(Rotated):
    """`terms` of the Neumann series, 0 for the exact inverse; `eps`, inf if Q is of any length."""

    terms: int = 0
    eps: float = math.inf

    def rotations(self, stored: Any) -> Any:
        skew = self._shortened(_skew(stored))
        return _neumann(skew, self.terms) if self.terms else cayley(skew)

    def _shortened(self, skew: Any) -> Any:
        most = self.eps / math.sqrt(len(skew))
        length = np.sqrt(np.sum(skew * skew, axis=(1, 2), keepdims=True))  # [blocks or 1, 1, 1]
        return np.where(length <= most, skew, skew * (most / np.where(length > 0, length, 1)))


def _skew(stored: Any) -> Any:
    """[blocks, n(n − 1)/2] -> Q, [blocks, n, n]."""
    size = (1 + math.isqrt(1 + 8 * stored.shape[1])) // 2
    upper = np.zeros((len(stored), size, size))
    row, column = np.triu_indices(size, 1)
    upper[:, row, column] = stored
    return upper - upper.transpose(0, 2, 1)


def cayley(skew: Any) -> Any:
    """(I − Q)(I + Q)⁻¹ of each Q, [blocks, n, n]. The two factors commute, so the inverse may stand on the left."""
    identity = np.eye(skew.shape[-1])
    return np.linalg.solve(identity + skew, identity - skew)


def _neumann(skew: Any, terms: int) -> Any:
    """I + 2Q + … + 2Qᴺ⁻² + Qᴺ⁻¹ of each Q, [blocks, n, n]."""
    rotation = np.broadcast_to(np.eye(skew.shape[-1]), skew.shape).copy()
    if terms < 3:
        return rotation + 2 * (terms - 1) * skew
    power = skew
    for _ in range(1, max(terms, 4) - 1):
        rotation += 2 * power
        power = power @ skew
    return rotation + power


def _check(folder: AdapterFolder) -> None:
    config = folder.config
    if not config.get("oft_block_size") and not config.get("r"):
        raise folder.refuse("neither r nor oft_block_size is set: it is the OFT of another PEFT version", _RETRAIN)
    if "oft_block_size" not in config:
        raise folder.refuse("no oft_block_size: it is the OFT of PEFT before 0.14, whose formula is another one", _RETRAIN)
    if config.get("use_cayley_neumann", True):
        terms = config.get("num_cayley_neumann_terms", 5)
        if isinstance(terms, bool) or not isinstance(terms, int) or not 1 <= terms <= _MOST_TERMS:
            raise folder.refuse(f"num_cayley_neumann_terms is {show(terms)}, expected 1 to {_MOST_TERMS}")
        if not _since_018(config.get("peft_version")):
            raise folder.refuse(
                f"use_cayley_neumann with peft_version {show(config.get('peft_version'))}: another series before 0.18",
                _RETRAIN,
            )
    if config.get("coft") and folder.number("eps", config.get("eps", 6e-5)) < 0:
        raise folder.refuse(f"eps is {show(config.get('eps'))}, expected a length")


def _since_018(version: object) -> bool:
    """Whether it names PEFT 0.18.0 or a later one; the field itself is younger than that."""
    found = re.match(r"(\d+)\.(\d+)(\.0)?(\.dev|rc)?", version) if isinstance(version, str) else None
    if found is None:
        return False
    release = (int(found[1]), int(found[2]))
    return release > (0, 18) or (release == (0, 18) and not found[4])


FAMILY = Family(
    name="OFT",
    tensors=("oft_R.weight", "oft_embedding_R.weight", *_OLD),
    weight=weight,
    fields=(
        "r", "oft_block_size", "bias", "coft", "eps", "block_share", "use_cayley_neumann", "num_cayley_neumann_terms",
    ),
    check=_check,
)  # fmt: skip
