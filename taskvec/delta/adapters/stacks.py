"""The experts of a base as transformers 5 has them in memory: one parameter [E, rows, columns] for all experts of a layer,
which a checkpoint stores as such or as one matrix per expert (transformers 5.23, conversion_mapping.py).

gate_up_proj[e] = w1[e] above w3[e], or gate_proj[e] above up_proj[e]    [2·I, H]
down_proj[e]    = w2[e], or down_proj[e]                                 [H, I]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...checkpoint.checkpoint import Checkpoint
from ...checkpoint.header import StoredTensor
from ...errors import ShapeMismatchError, show

_MATRIX = re.compile(r"(.+\.experts)\.([0-9]{1,9})\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")
_PIECES = {  # parameter in memory -> the matrices of one expert that it is made of, from its first row to its last
    "gate_up_proj": (("w1", "w3"), ("gate_proj", "up_proj")),
    "up_proj": (("up_proj",),),  # nemotron_h: experts without a gate
    "down_proj": (("w2",), ("down_proj",)),
}
_STORED_AS_IN_MEMORY = ("gpt_oss",)  # model types whose [E, in, out] on disk was never anything else in memory


@dataclass(frozen=True)
class Part:
    """What a stored tensor is of a parameter [E, rows, columns]: all of it, or some rows of one expert.

    Attributes:
        shape: of the parameter.
        expert: whose rows they are; None if the tensor is the whole parameter.
        first: the first of the rows.
        outputs_first: whether rows are outputs ([E, out, in]) or inputs; None where the base does not tell.
        as_in_memory: whether the parameter was surely [E, rows, columns] in memory too when the adapter was trained.
    """

    shape: tuple[int, ...]
    expert: int | None = None
    first: int = 0
    outputs_first: bool | None = None
    as_in_memory: bool = False

    def of(self, value: StoredTensor, like: StoredTensor) -> StoredTensor:
        """The same part, `like` the base's, of a parameter that is stored as a whole. Raises ShapeMismatchError."""
        if value.shape != self.shape:
            raise ShapeMismatchError(
                f"{show(value.path)}: tensor {show(value.name)}: found shape {list(value.shape)}, expected "
                f"{list(self.shape)} for the experts of which {show(like.name)} in {show(like.path)} is one"
            )
        assert self.expert is not None
        return rows_of(value, self.expert * self.shape[1] + self.first, like.shape[0], self.shape[2])


@dataclass(frozen=True)
class Stack:
    """A parameter that is stored in `parts`."""

    name: str
    parts: tuple[tuple[StoredTensor, Part], ...]


def rows_of(tensor: StoredTensor, first: int, rows: int, columns: int) -> StoredTensor:
    """Some rows of a stored tensor, seen as a matrix of so many columns, as a stored tensor of its own."""
    row_bytes = tensor.nbytes // (tensor.elements // columns)
    return tensor._replace(shape=(rows, columns), offset=tensor.offset + first * row_bytes, nbytes=rows * row_bytes)


def find_stacks(base: Iterable[StoredTensor], wanted: Iterable[str]) -> dict[str, Stack]:
    """The parameters that a base stores as one matrix per expert, by the name they would have beside those. They
    are not looked for if no wanted name could be one of them."""
    if not any(name.rpartition(".")[2] in _PIECES for name in wanted):
        return {}
    layers: dict[str, dict[str, dict[int, StoredTensor]]] = {}
    for tensor in base:
        found = _MATRIX.fullmatch(tensor.name)
        if found and len(tensor.shape) == 2:
            layers.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensor
    stacks = (_stack(f"{layer}.{name}", matrices, name) for layer, matrices in layers.items() for name in _PIECES)
    return {stack.name: stack for stack in stacks if stack is not None}


def _stack(name: str, matrices: Mapping[str, Mapping[int, StoredTensor]], parameter: str) -> Stack | None:
    """None if some expert lacks a matrix or has one of another shape: then the parameter is nowhere to be found."""
    pieces = next((found for found in _PIECES[parameter] if all(piece in matrices for piece in found)), None)
    if pieces is None:
        return None
    experts = len(matrices[pieces[0]])
    shapes = {matrix.shape for piece in pieces for matrix in matrices[piece].values()}
    if len(shapes) != 1 or any(matrices[piece].keys() != set(range(experts)) for piece in pieces):
        return None
    ((rows, columns),) = shapes
    shape = (experts, rows * len(pieces), columns)
    return Stack(
        name,
        tuple(
            (matrices[piece][expert], Part(shape, expert, place * rows, outputs_first=True, as_in_memory=True))
            for expert in range(experts)
            for place, piece in enumerate(pieces)
        ),
    )


def whole(tensor: StoredTensor, base: Checkpoint) -> Part:
    """A parameter that is stored as such. Of its two matrices of experts the oblong one tells which axis is the input's:
    gate_up_proj takes what down_proj gives, the hidden state."""
    rows, columns = tensor.shape[1:]
    first = None
    if rows == columns:
        prefix, _, leaf = tensor.name.rpartition(".")
        other = base.tensors.get(f"{prefix}.{'gate_up_proj' if leaf == 'down_proj' else 'down_proj'}")
        if leaf in _PIECES and other is not None and len(other.shape) == 3 and other.shape[1:].count(rows) == 1:
            first = (other.shape[1] == rows) == (leaf != "down_proj")
    as_in_memory = first is True or base.config.get("model_type") in _STORED_AS_IN_MEMORY
    return Part(tensor.shape, outputs_first=first, as_in_memory=as_in_memory)
