"""What an adapter's tensors must agree with, in every family: the kind of layer they are for, the rank in the config."""

from __future__ import annotations

from ...errors import show
from .adapter import Module, Weight
from .config import AdapterFolder


def expect_layer(module: Module, weight: Weight, *axes: int, conv1d: bool = False) -> tuple[int, ...]:
    """Shape of the weight, [out, in, …]. Raises AdapterError unless it has one of these numbers of axes, and, but for
    families that know GPT-2's Conv1D, is stored [out, in]."""
    shape = weight.stored.shape
    if len(shape) in axes and (conv1d or not weight.transposed):
        return weight.shape
    found = f"{list(shape)}, stored [in, out]" if weight.transposed else str(list(shape))
    kinds = " or ".join(str(number) for number in axes)
    raise module.refuse(
        f"{show(weight.stored.name)} is {found}: {module.family.name} is for weights of {kinds} axes, stored [out, in"
        + (", …]" if max(axes) > 2 else "]")
    )


def expect_rank(module: Module, folder: AdapterFolder, stored: int) -> None:
    """Raises AdapterError unless the config gives the module the rank its tensors have."""
    rank = folder.pattern_value("rank_pattern", module.name, "r", stored)
    if rank != stored:
        raise module.refuse(f"found rank {stored}, expected {rank:g} as in the config")
