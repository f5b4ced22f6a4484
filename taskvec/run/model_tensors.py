"""The tensors of a model in memory, by the names that its checkpoint has. What cannot be edited is refused by name here,
before anything is changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoint.header import StoredTensor
from ..delta.adapters.names import names_on_disk, peft_name
from ..delta.adapters.stacks import Stack, find_stacks
from ..delta.dense import FineTune
from ..delta.stored import StoredVector
from ..delta.vector import TaskVector
from ..delta.weighting import leaf
from ..errors import MismatchError, NameMismatchError, QuantizedError, ShapeMismatchError, show

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_QUANTIZED = (  # bitsandbytes, torchao, …
    "Params4bit", "Int8Params", "QuantizedTensor", "AffineQuantizedTensor", "Linear4bitTensor",
)  # fmt: skip
_QUANTIZED_MODULES = ("Linear4bit", "Linear8bitLt", "QuantLinear", "WQLinear", "HQQLinear", "QuantizedLinear", "FP8Linear")


def named_tensors(model: object, vector: TaskVector) -> dict[str, torch.Tensor]:
    """The names that the vector's checkpoint has -> the tensors of the model, or the parts of them, that they are; each
    memory once. Names in memory are other than on disk where transformers renames modules or stacks experts.

    Raises MismatchError (its kinds) or QuantizedError for what cannot be edited, TypeError for what is no model.
    """
    parameters = _parameters(model)
    disk: dict[str, StoredTensor] = {}
    for source in (leaf(source) for _, source in vector.terms):
        if isinstance(source, (FineTune, StoredVector)):
            disk.update(source.inputs[0].tensors)
    plain = {peft_name(name): tensor for name, tensor in parameters.items()}
    found = dict(plain) if len(plain) == len(parameters) else dict(parameters)
    if disk:
        found = _by_checkpoint_name(found, disk)
    return _once(found)


def refuse_shared(tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises MismatchError if two of them are parts of one memory that overlap: editing both would edit it twice."""
    ranges = []
    for name, tensor in tensors.items():
        if any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape)):
            raise MismatchError(f"{show(name)}: expanded, several of its elements are one memory", hint="Clone it first")
        span = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape)) + 1
        if tensor.numel():
            ranges.append((str(tensor.device), tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size(), name))
    ranges.sort()
    for (device, _, end, name), (other, start, _, second) in itertools.pairwise(ranges):
        if device == other and start < end:
            raise MismatchError(
                f"{show(name)} and {show(second)} share memory, but not all of it as the same tensor",
                hint="Clone one of them",
            )


def _parameters(model: object) -> dict[str, torch.Tensor]:
    """name -> tensor, as the model has them."""
    if isinstance(model, torch.nn.Module):
        for name, module in model.named_modules():
            if type(module).__name__ in _QUANTIZED_MODULES or ".quantized" in type(module).__module__:
                raise QuantizedError(
                    f"{show(name)}: a {type(module).__name__}, quantised", hint="Load the model unquantised to edit it"
                )
        named: Mapping[str, Any] = model.state_dict(keep_vars=True)
        own = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if _is_plain(t)}
    elif isinstance(model, Mapping):
        named, own = model, None
    else:
        raise TypeError(f"expected a torch module or a state dict, found {type(model).__name__}")
    found: dict[str, torch.Tensor] = {}
    for name, tensor in named.items():
        if isinstance(tensor, torch.Tensor):
            _check_editable(name, tensor, own)
            if tensor.dtype in DTYPES:
                found[name] = tensor
    return found


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta and type(tensor).__name__ != "DTensor"


def _check_editable(name: str, tensor: torch.Tensor, own: set[int] | None) -> None:
    kind = type(tensor).__name__
    if kind in _QUANTIZED or tensor.is_quantized:
        raise QuantizedError(f"{show(name)}: a {kind}, quantised", hint="Load the model unquantised")
    if tensor.is_meta:
        raise MismatchError(f"{show(name)}: on the meta device, without data", hint="Load the weights first")
    if not _is_plain(tensor) or tensor.is_neg() or tensor.is_conj():
        raise MismatchError(f"{show(name)}: a {kind} of layout {tensor.layout}, expected a plain dense tensor")
    if own is not None and tensor.numel() and tensor.data_ptr() not in own and tensor.is_floating_point():
        raise MismatchError(f"{show(name)}: state_dict() gives a copy of it, of which editing changes nothing")


def _by_checkpoint_name(parameters: Mapping[str, torch.Tensor], disk: Mapping[str, StoredTensor]) -> dict[str, torch.Tensor]:
    stacks = find_stacks(disk.values(), parameters)
    names = names_on_disk(parameters, dict.fromkeys((*disk, *stacks)))
    found: dict[str, torch.Tensor] = {}
    for name, target in names.items():
        tensor = parameters[name]
        if target in found and _place(found[target]) != _place(tensor):
            raise NameMismatchError(
                f"{show(name)} and another parameter of the model are both {show(target)} of the checkpoint",
                hint="Name the part of the model that is meant, as in apply_(model.policy, …)",
            )
        found.update(_parts(tensor, stacks[target]) if target in stacks else {target: tensor})
    found.update({name: tensor for name, tensor in parameters.items() if name not in names and name not in found})
    return found


def _once(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without those that are the same memory, seen the same way, as one before them."""
    seen: set[tuple[Any, ...]] = set()
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.numel() or _place(tensor) not in seen:
            found[name] = tensor
        seen.add(_place(tensor))
    return found


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _parts(parameter: torch.Tensor, stack: Stack) -> dict[str, torch.Tensor]:
    """The experts of a stacked parameter by the names of their matrices on disk."""
    shape = stack.parts[0][1].shape
    if tuple(parameter.shape) != shape:
        raise ShapeMismatchError(f"{show(stack.name)} in memory: found shape {list(parameter.shape)}, expected {list(shape)}")
    flat = parameter.detach()
    return {t.name: flat[part.expert, part.first : part.first + t.shape[0]] for t, part in stack.parts}
