"""Trainable tokens (as PEFT 0.21 has them, tuners/trainable_tokens): some rows of an embedding get new values.

W'[indices] = values    values: [n, D] (called a delta, but they are no difference)   W: [V, D]   n indices, all different
On a model whose head is tied to its embeddings one tensor is trained for both, and PEFT may store it once for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checkpoint.header import StoredTensor
from ...errors import show
from ..source import Delta, Formula
from .adapter import Family, Module, Weight


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    return rows(module, weight, module["trainable_tokens_delta"], module.config.get("token_indices"))


def rows(module: Module, weight: Weight, values: StoredTensor, indices: object) -> Delta:
    """Δ of a weight whose rows `indices` become `values`. Raises AdapterError where the indices do not say which."""
    if not isinstance(indices, list) or not indices or any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise module.refuse(f"the token indices are {show(indices)}, expected a list of numbers")
    shape = weight.stored.shape
    if weight.transposed or len(shape) != 2 or values.shape != (len(indices), shape[1]):
        raise weight.refuse(module, f"of {len(indices)} rows, given as {list(values.shape)}")
    if len(set(indices)) != len(indices) or not all(0 <= i < shape[0] for i in indices):
        raise module.refuse(f"the token indices are {show(indices)}: expected different numbers from 0 to {shape[0] - 1}")
    return weight.by(NewRows(tuple(indices)), values)


@dataclass(frozen=True)
class NewRows(Formula):
    """Δ[indices] = values − W[indices], 0 in every other row. Values: [n, D]; W: [V, D]."""

    indices: tuple[int, ...]

    replaces = True

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        order = np.argsort(self.indices)
        return np.array(self.indices)[order], tensors[0][order]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        indices, values = state
        first, last = np.searchsorted(indices, (rows.start, rows.stop))
        here = indices[first:last] - rows.start
        change = np.zeros_like(weight)
        change[here] = values[first:last] - weight[here]
        return change


FAMILY = Family(name="TRAINABLE_TOKENS", tensors=("trainable_tokens_delta",), weight=weight, fields=("token_indices",))
