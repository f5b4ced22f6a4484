"""BOFT of one butterfly factor (Liu et al. 2024; as PEFT 0.21 has it, tuners/boft): inputs are rotated in blocks,
outputs scaled.

Q  = (D − Dᵀ)/2         D: [1, blocks, n, n]
R  = (I − Q)(I + Q)⁻¹   a block for each D, on a diagonal
W' = s · W · Rᵀ         s: [out, 1], of a convolution [1, out]   W: [out, in·k·k], in·k·k = blocks · n

More butterfly factors are refused: PEFT trains and merges them on a GPU only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ...errors import show
from ..source import Delta
from .adapter import Family, Module, Weight
from .oft import Rotated, cayley


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    blocks, scale = module.expect("boft_R", None, None, None, None), module["boft_s"]
    if blocks.shape[0] != 1:
        raise module.refuse(
            f"boft_R is {list(blocks.shape)}: {blocks.shape[0]} butterfly factors, expected 1",
            "Merge it with PEFT (merge_and_unload, save_pretrained) on a GPU, and subtract the merged model",
        )
    shape = weight.shape
    if weight.transposed or len(shape) not in (2, 4):
        raise module.refuse(f"PEFT has no BOFT for {show(weight.stored.name)}, {list(weight.stored.shape)}")
    module.expect("boft_s", *((shape[0], 1) if len(shape) == 2 else (1, shape[0])))
    _, many, size, other = blocks.shape
    if size != other or many * size * shape[0] != weight.stored.elements:
        raise weight.refuse(module, f"a rotation of {list(blocks.shape)}")
    return weight.by(_Boft(many), blocks, scale)


@dataclass(frozen=True)
class _Boft(Rotated):
    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        return super().prepare(tensors, blocks), tensors[1].reshape(-1, 1)  # [blocks, n, n], [out, 1]

    def rotations(self, stored: Any) -> Any:
        data = stored[0]
        return cayley((data - data.transpose(0, 2, 1)) / 2)

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        change, scale = state
        return scale[rows] * (super().delta(change, rows, weight) + weight) - weight


FAMILY = Family(
    name="BOFT",
    tensors=("boft_R", "boft_s"),
    weight=weight,
    fields=("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout", "bias"),
)
