"""SHiRA (Bhardwaj et al. 2024; names as PEFT 0.21 has them, tuners/shira).

W'[i, j] = W[i, j] + w[p]  for each p, where (i, j) = indices[:, p]   Linear   W: [out, in]
w: [n]   indices: [2, n], int32, or float32 as PEFT on Windows saves them
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checkpoint.files import InputFiles
from ...checkpoint.header import StoredTensor
from ..source import Delta, Formula
from .adapter import Family, Module, Weight
from .agreement import expect_layer

_INDICES = {"I32": np.int32, "I64": np.int64, "F32": np.float32, "F64": np.float64}  # smaller floats skip numbers


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    shape = expect_layer(module, weight, 2)
    values = module.expect("shira_weight", None)
    indices = module.expect("shira_indices", 2, values.elements)
    _check_indices(module, indices, shape)
    return weight.by(_Sparse(shape[1], values.elements), values, indices)


def _check_indices(module: Module, indices: StoredTensor, shape: tuple[int, ...]) -> None:
    """Raises AdapterError unless all are whole numbers inside a weight of this shape. Reads them."""
    if indices.dtype not in _INDICES:
        raise module.refuse(f"shira_indices are {indices.dtype}, expected one of {', '.join(_INDICES)}")
    raw, files = bytearray(indices.nbytes), InputFiles({})
    try:
        files.read(indices.path, memoryview(raw), indices.offset, indices.name)
    finally:
        files.close()
    found = np.frombuffer(raw, _INDICES[indices.dtype]).reshape(2, -1)
    inside = (found >= 0) & (found < np.array(shape).reshape(2, 1)) & (found == np.floor(found))
    if not inside.all():
        raise module.refuse(f"shira_indices hold {found[~inside][0]:g}, expected whole numbers inside {list(shape)}")


@dataclass(frozen=True)
class _Sparse(Formula):
    """`entries` values at their places in a weight of `columns` columns, which are put in the order of their rows first."""

    columns: int
    entries: int

    uses_weight = False

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        values, indices = tensors
        order = np.argsort(indices[0], kind="stable")
        row, column = indices[:, order].astype(np.int64)
        return row, column, values[order]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        row, column, values = state
        first, last = np.searchsorted(row, (rows.start, rows.stop))
        out = np.zeros((rows.stop - rows.start, self.columns))
        np.add.at(out, (row[first:last] - rows.start, column[first:last]), values[first:last])
        return out

    def scratch(self, rows: int, columns: int) -> int:
        return 48 * self.entries


FAMILY = Family(
    name="SHIRA",
    integers=("shira_indices",),
    tensors=("shira_weight", "shira_indices"),
    weight=weight,
    fields=("r", "mask_type", "random_seed"),
)
