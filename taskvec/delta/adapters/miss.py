"""MiSS (Kang and Yin 2024; names and variants as PEFT 0.21 has them, tuners/miss).

W'[o, c] = W[o, c] + D[c mod r, o]           Linear   W: [out, in]   D: [r, out]      init_weights true or false
W'[o, c] = W[o, c] + D[c mod r, o mod q]     q = mini_r              D: [r, q]        init_weights "mini"
W'_mn    = W_mn + W_mn @ D_m + D_m           blocks [r, r] of W      D: [out/r, r, r] init_weights "bat"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import show
from ..source import Delta, Formula
from .adapter import Family, Module, Weight
from .agreement import expect_layer, expect_rank
from .config import AdapterFolder


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    out, inside = expect_layer(module, weight, 2)
    rank, variant = _rank(module), module.config.get("init_weights", True)
    if variant == "bat":
        block = module.expect("miss_block", out // rank, rank, rank)
        if out % rank or inside % rank:
            raise weight.refuse(module, f"made of blocks [{rank}, {rank}]")
        return weight.by(_Bat(rank), block)
    outputs = module.config.get("mini_r", 1) if variant == "mini" else out
    block = module.expect("miss_block", rank, outputs)
    if rank > inside or out % outputs:
        raise weight.refuse(module, f"{list(block.shape)} repeated")
    return weight.by(_Repeated(inside), block)


@dataclass(frozen=True)
class _Repeated(Formula):
    """Dᵀ, [q, r], again and again over a weight of `columns` columns."""

    columns: int

    uses_weight = False

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        (block,) = tensors
        return block.T

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        outputs, rank = state.shape
        shards = state[np.arange(rows.start, rows.stop) % outputs]  # [rows, r]
        return shards[:, np.arange(self.columns) % rank]


@dataclass(frozen=True)
class _Bat(Formula):
    """W_mn @ D_m + D_m for the blocks [r, r] of W; the rows of one D_m are taken together."""

    rank: int

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        (blocks,) = state  # [out/r, r, r]
        out = np.empty_like(weight)
        row = rows.start
        while row < rows.stop:
            m, top = divmod(row, self.rank)
            height = min(self.rank - top, rows.stop - row)
            at = slice(row - rows.start, row - rows.start + height)
            parts = weight[at].reshape(height, -1, self.rank)  # [height, in/r, r]
            out[at] = (parts @ blocks[m] + blocks[m, top : top + height, None]).reshape(height, -1)
            row += height
        return out


def _check(folder: AdapterFolder) -> None:
    variant, outputs = folder.config.get("init_weights", True), folder.config.get("mini_r", 1)
    if variant not in (True, False, "bat", "mini"):
        raise folder.refuse(f"init_weights is {show(variant)}, expected true, false, bat or mini")
    if isinstance(outputs, bool) or not isinstance(outputs, int) or outputs < 1:
        raise folder.refuse(f"mini_r is {show(outputs)}, expected a positive whole number")


def scale(module: Module, folder: AdapterFolder) -> float:
    """1: MiSS has no factor. Raises AdapterError when the config gives another rank."""
    expect_rank(module, folder, _rank(module))
    return 1.0


def _rank(module: Module) -> int:
    shape = module["miss_block"].shape
    if len(shape) not in (2, 3):
        raise module.refuse(f"miss_block is {list(shape)}, expected 2 or 3 axes")
    return shape[-1] if len(shape) == 3 else shape[0]


def _variants(config: Mapping[str, Any]) -> list[str]:
    return [variant for variant in ("bat", "mini") if config.get("init_weights") == variant]


FAMILY = Family(
    name="MISS",
    tensors=("miss_block",),
    weight=weight,
    fields=("r", "mini_r", "miss_dropout", "bias"),
    check=_check,
    scale=scale,
    rank=_rank,
    variants=_variants,
)
