"""(IA)³ (Liu et al. 2022; names and shapes as PEFT 0.21 has them, tuners/ia3).

W' = l · W, b' = l · b   a factor per output   l: [out, 1], of a convolution [1, out, 1, …]   W: [out, in, k, …]   b: [out]
W' = W · l, b' = b       a factor per input    l: [1, in], of a convolution [1, in, 1, …]; in modules that
                         feedforward_modules names: a list of endings, or a regular expression of whole names
In a convolution of g groups W is [out, in/g, k, …], and the outputs of group i meet the i-th part of l. A Conv1D stores W as
[in, out], and has the l of a Linear.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...errors import show
from ..source import Delta, Formula
from .adapter import Family, Module, Weight
from .patterns import matches_whole


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    factors, shape = module["ia3_l"], weight.shape
    per_input = _per_input(module)
    if len(shape) not in (2, 4, 5):
        raise module.refuse(f"PEFT has no (IA)³ for {show(weight.stored.name)}, {list(weight.stored.shape)}")
    many = shape[1] * _groups(module, weight) if per_input else shape[0]
    expected = [1, many] + [1] * (len(shape) - 2) if per_input or len(shape) > 2 else [many, 1]
    if list(factors.shape) != expected:
        raise weight.refuse(module, f"a product with {list(factors.shape)}")
    as_stored = replace(weight, transposed=False)  # factors of rows and columns change place, W need not
    if per_input == weight.transposed:
        return as_stored.by(_ByRow(), factors)
    return as_stored.by(_ByColumn(many // shape[1] if per_input else 1, shape[0]), factors)


def bias(module: Module, bias: Weight) -> Delta | None:
    """Δ of the module's bias."""
    if _per_input(module):
        return None
    factors = module["ia3_l"]
    if bias.stored.shape != (factors.elements,):
        raise bias.refuse(module, f"a product with {list(factors.shape)}")
    return bias.by(_ByColumn(1, 1), factors)


def _per_input(module: Module) -> bool:
    """Whether the factors are those of the inputs: the shape tells, or else feedforward_modules, by PEFT's rule."""
    shape = module["ia3_l"].shape
    if len(shape) == 2 and shape[0] != shape[1]:
        return shape[0] == 1
    named = module.config.get("feedforward_modules")
    if isinstance(named, list) and all(isinstance(ending, str) for ending in named):
        return module.name.endswith(tuple(named))
    try:
        if isinstance(named, str):
            return matches_whole(named, module.name)
    except (ValueError, re.error) as error:
        raise module.refuse(f"feedforward_modules: pattern {show(named)} is not understood ({show(error)})") from error
    raise module.refuse(f"feedforward_modules is {show(named)}: whether outputs or inputs have factors is not in the file")


def _groups(module: Module, weight: Weight) -> int:
    """Of a convolution with a factor per input: its weight has the inputs of one group only."""
    groups = module["ia3_l"].elements // weight.shape[1]
    return groups if len(weight.shape) > 2 and groups and weight.shape[0] % groups == 0 else 1


@dataclass(frozen=True)
class _ByRow(Formula):
    """A factor for each row of W as it is stored: Δ = (l − 1) · W."""

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        return tensors[0].reshape(-1, 1) - 1  # [rows, 1]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        return state[rows] * weight


@dataclass(frozen=True)
class _ByColumn(Formula):
    """A factor for each column of W, [out, in/g, k·…], of its group: Δ = W · (l − 1)."""

    groups: int
    outputs: int

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        return tensors[0].reshape(self.groups, -1, 1) - 1  # [g, in/g, 1]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        if self.groups == 1:
            factors = state
        else:
            factors = state[np.arange(rows.start, rows.stop) * self.groups // self.outputs]  # [rows, in/g, 1]
        return (weight.reshape(len(weight), state.shape[1], -1) * factors).reshape(weight.shape)


FAMILY = Family(
    name="IA3",
    tensors=("ia3_l",),
    weight=weight,
    bias=bias,
    fields=("feedforward_modules", "init_ia3_weights"),
)
