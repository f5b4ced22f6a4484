"""LoRA on bare parameters, `target_parameters` (PEFT 0.17-0.21, lora/layer.py, ParamWrapper): the experts of a layer.

W'[e] = W[e] + s · B_e @ A_e, or s · (B_e @ A_e)ᵀ    W: [E, rows, columns]
A_e = A[e·r : (e+1)·r]       A: [E·r, a]
B_e = B[:, e], B[:, E+e], …  B: [b, r·E], the rank is the outer index
s = alpha / r, or alpha / sqrt(r) with use_rslora; the patterns are matched against <module>.<parameter>
W' = W + s · B @ A           W: [out, in], a parameter of two axes, a router's for one

Which of the two it is, [a, b] tell, and where rows = columns, who wrote it:
    PEFT                 W in memory [E, out, in]    [E, in, out], known as such
    0.17, 0.18           a = out, b = in             a = in, b = out
    0.19.0               a = out, b = in             a = out, b = in
    0.19.1 and later     a = in, b = out             a = in, b = out
transformers 4 did not mark [E, in, out] as such (gpt_oss), so that PEFT took it for the other.
Of several parameters of a module the last is `<module>.lora_*`, the one before it `<module>.base_layer.lora_*`, and so on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ...checkpoint.header import StoredTensor
from ...errors import AdapterError, listing, show
from ..source import Delta, Formula, FormulaDelta, LowRankDelta
from .adapter import Family, Module, Weight
from .config import MERGE_FIRST, AdapterFolder
from .stacks import Part, rows_of

_ORDER = ("gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias")  # as registered
_NOT_FOR_PARAMETERS = ("use_dora", "use_bdlora", "lora_bias")  # PEFT refuses to train such
_AS_TRAINED = "Merge it with the PEFT and the transformers it was trained with, and subtract the merged model"


@dataclass(frozen=True)
class Parameter(Module):
    """A module of which one parameter is adapted; `name` is the parameter's too.

    Attributes:
        lora_rank: r, of one expert.
        peers: (last component of its name, a, b) of each kind of parameter that the same adapter holds.
    """

    lora_rank: int = 0
    peers: tuple[tuple[str, int, int], ...] = ()


def arrange(modules: list[Module], folder: AdapterFolder) -> list[Module]:
    """The modules, those that stand for parameters as Parameter. Raises AdapterError where it is not certain which is
    which."""
    targets = _targets(folder)
    nested: dict[str, list[Module]] = {}
    for module in modules:
        nested.setdefault(".".join(part for part in module.name.split(".") if part != "base_layer"), []).append(module)
    arranged: list[Module] = []
    for name, layers in nested.items():
        leaves = _leaves(name, targets)
        if leaves:
            arranged += _parameters(name, leaves, layers, folder)
        elif layers == [module for module in layers if module.name == name]:
            arranged += layers
        else:
            raise _unknown(layers)
    if targets and not any(isinstance(module, Parameter) for module in arranged):
        raise folder.refuse(f"target_parameters names {listing(targets)}, and the file has no factors of them")
    found = {(p.name.rpartition(".")[2], *_sides(p)) for p in arranged if isinstance(p, Parameter)}
    return [replace(module, peers=tuple(sorted(found))) if isinstance(module, Parameter) else module for module in arranged]


def _targets(folder: AdapterFolder) -> list[str]:
    targets = folder.config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) and target for target in targets):
        raise folder.refuse(f"target_parameters is {show(targets)}, expected a list of names")
    unfit = [key for key in _NOT_FOR_PARAMETERS if targets and folder.config.get(key)]
    if targets and str(folder.config.get("init_lora_weights")) in ("pissa", "olora"):
        unfit.append("init_lora_weights")
    if unfit:
        raise folder.refuse(f"target_parameters with {unfit[0]}: PEFT trains no such adapter", MERGE_FIRST)
    return targets


def _leaves(module: str, targets: list[str]) -> list[str]:
    """The parameters of a module that are targeted: PEFT takes those whose name ends with a target (tuners_utils.py).

    A target without its module, as PEFT writes it for what was w1, w2, w3, can only be one of the experts'.
    """
    found = set()
    for target in targets:
        prefix, _, leaf = target.rpartition(".")
        if f".{module}".endswith(f".{prefix}" if prefix else ".experts"):
            found.add(leaf)
    return sorted(found, key=lambda leaf: (_ORDER.index(leaf) if leaf in _ORDER else -1, leaf))


def _parameters(name: str, leaves: list[str], layers: list[Module], folder: AdapterFolder) -> Iterable[Module]:
    outermost_last = sorted(layers, key=lambda module: len(module.name), reverse=True)
    if [module.name for module in outermost_last] != [name + ".base_layer" * depth for depth in range(len(leaves))][::-1]:
        raise layers[0].refuse(
            f"target_parameters names {', '.join(show(leaf) for leaf in leaves)} of it, but the file holds factors for "
            f"{len(layers)} parameters",
            MERGE_FIRST,
        )
    if len(leaves) > 1 and not set(leaves) <= set(_ORDER):
        raise layers[0].refuse(f"which of {', '.join(show(leaf) for leaf in leaves)} comes first is not known", MERGE_FIRST)
    for leaf, module in zip(leaves, outermost_last):
        yield _parameter(f"{name}.{leaf}", module, folder)


def _parameter(name: str, module: Module, folder: AdapterFolder) -> Parameter:
    rank = folder.pattern_value("rank_pattern", name, "r", 8)
    alpha = folder.pattern_value("alpha_pattern", name, "lora_alpha", 8)
    if rank < 1 or rank != int(rank):
        raise folder.refuse(f"the rank of {show(name)} is {rank:g}, expected a whole number")
    scale = alpha / math.sqrt(rank) if folder.config.get("use_rslora") else alpha / rank
    _check_factors(module)
    return Parameter(name, FAMILY, module.tensors, module.path, module.config, scale, parameter=name, lora_rank=int(rank))


def _unknown(layers: list[Module]) -> AdapterError:
    deepest = max(layers, key=lambda module: len(module.name))
    if deepest.name.endswith(".base_layer.out_proj"):
        return deepest.refuse("the output of an nn.MultiheadAttention, which PEFT applies twice (peft#3774)", _AS_TRAINED)
    return deepest.refuse(
        "its factors belong to a bare parameter, but target_parameters in the config does not say which", MERGE_FIRST
    )


def _check_factors(module: Module) -> None:
    a, b = module.expect("lora_A.weight", None, None), module.expect("lora_B.weight", None, None)
    if len(module.tensors) != 2:
        raise module.refuse("a bare parameter has lora_A and lora_B, but there are others", MERGE_FIRST)
    if a.shape[0] != b.shape[1]:
        raise module.refuse(f"A is {list(a.shape)}, B is {list(b.shape)}: their ranks differ")


def _factors(module: Module) -> tuple[StoredTensor, StoredTensor]:
    """A, [E·r, a], and B, [b, r·E]."""
    return module["lora_A.weight"], module["lora_B.weight"]


def _sides(module: Module) -> tuple[int, int]:
    """a and b."""
    a, b = _factors(module)
    return a.shape[1], b.shape[0]


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of a parameter, or of the part of it that one stored tensor is."""
    assert isinstance(module, Parameter)
    a, b = _factors(module)
    if weight.part is None and (b.shape[0], a.shape[1]) != weight.stored.shape:
        raise weight.refuse(module, [b.shape[0], a.shape[1]])
    experts, _, columns = weight.part.shape if weight.part else (1, 0, 0)
    rows = module.lora_rank * experts
    if a.shape[0] != rows:
        counted = f"{experts} experts in the base, " if weight.part else ""
        raise module.refuse(f"A is {list(a.shape)}, expected {rows} rows: {counted}rank {module.lora_rank} in the config")
    if weight.part is None:
        return LowRankDelta(b, a, module.scale)
    if experts == 1:
        raise module.refuse("a layer of one expert, which PEFT merges as a plain matrix", MERGE_FIRST)
    turned = _turned(module, weight)
    if weight.part.expert is None:
        return FormulaDelta(_AllExperts(experts, module.scale, turned), (a, b), weight.origin, columns)
    return _of_one(module, weight.stored, weight.part, turned)


def _of_one(module: Parameter, stored: StoredTensor, part: Part, turned: bool) -> LowRankDelta:
    """Δ of some rows of one expert. What lies together in the file is all that is read: rows of A, and rows of B."""
    a, b = _factors(module)
    assert part.expert is not None
    a_e = rows_of(a, part.expert * module.lora_rank, module.lora_rank, a.shape[1])
    rows = slice(part.first, part.first + stored.shape[0])
    if turned:
        return LowRankDelta(a_e, b, module.scale, factors=_Turned(part.shape[0], part.expert, rows.start, rows.stop))
    b_rows = rows_of(b, rows.start, stored.shape[0], b.shape[1])
    return LowRankDelta(b_rows, a_e, module.scale, factors=_Straight(part.shape[0], part.expert))


@dataclass(frozen=True)
class _Straight:
    """B_e[rows], A_e from B[rows], [n, r·E], and A_e, [r, columns]."""

    experts: int
    expert: int

    def __call__(self, b: Any, a: Any) -> tuple[Any, Any]:
        return np.ascontiguousarray(b[:, self.expert :: self.experts]), a


@dataclass(frozen=True)
class _Turned:
    """(A_eᵀ)[rows], B_eᵀ from A_e, [r, rows], and B, [columns, r·E]."""

    experts: int
    expert: int
    first: int
    last: int

    def __call__(self, a: Any, b: Any) -> tuple[Any, Any]:
        left, right = a[:, self.first : self.last].T, b[:, self.expert :: self.experts].T
        return np.ascontiguousarray(left), np.ascontiguousarray(right)


@dataclass(frozen=True)
class _AllExperts(Formula):
    """Δ of W, [E·rows, columns]: one product for each expert."""

    experts: int
    scale: float
    turned: bool

    uses_weight = False

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        a, b = tensors
        a = a.reshape(self.experts, -1, a.shape[1])  # [E, r, a]
        b = b.reshape(len(b), -1, self.experts).transpose(2, 0, 1)  # [E, b, r]
        left, right = (a.transpose(0, 2, 1), b.transpose(0, 2, 1)) if self.turned else (b, a)
        return np.ascontiguousarray(self.scale * left), np.ascontiguousarray(right)  # [E, rows, r], [E, r, columns]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        left, right = state
        height, products, at = left.shape[1], [], rows.start
        while at < rows.stop:
            expert, row = divmod(at, height)
            end = min(height, row + rows.stop - at)
            products.append(left[expert, row:end] @ right[expert])  # [end − row, r] @ [r, columns]
            at += end - row
        return np.concatenate(products)


def _turned(module: Parameter, weight: Weight) -> bool:
    """Whether Δ_e = (B_e @ A_e)ᵀ. Raises where the shape does not fit, or is a square and nothing else tells."""
    part = weight.part
    assert part is not None
    (a, b), sides = _sides(module), part.shape[1:]
    if (b, a) != sides and (a, b) != sides:
        raise weight.refuse(module, f"[{part.shape[0]}, {b}, {a}] or its transpose")
    if a != b:
        return (a, b) == sides
    takes_inputs = _a_takes_inputs(module, part)
    if takes_inputs is None or part.outputs_first is None:
        raise module.refuse(
            f"{show(weight.stored.name)} is square, and peft_version {show(module.config.get('peft_version'))} does not "
            "tell whether A or B is on the side of its input",
            _AS_TRAINED,
        )
    return takes_inputs != part.outputs_first


def _a_takes_inputs(module: Parameter, part: Part) -> bool | None:
    """Whether a is the input's size, for a square parameter: all parameters of one adapter are alike in this, and an oblong
    one shows it, because gate_up_proj takes what down_proj gives; else the version."""
    size = part.shape[1]
    for leaf, a, b in module.peers:
        if leaf in ("gate_up_proj", "up_proj", "down_proj") and a != b and size in (a, b):
            return (a == size) == (leaf != "down_proj")
    version = _released(module.config.get("peft_version"))
    if version is None or not part.as_in_memory:
        return None
    if part.outputs_first:
        return version >= (0, 19, 1)
    return True if version < (0, 19) else None  # later ones depend on the version of transformers


def _released(version: object) -> tuple[int, ...] | None:
    """(0, 19, 1) of 0.19.1; None for versions in between, and for what is no version."""
    found = re.fullmatch(r"(\d{1,4})\.(\d{1,4})\.(\d{1,4})", version) if isinstance(version, str) else None
    return tuple(map(int, found.groups())) if found else None


def _rank(module: Module) -> int | None:
    return module.lora_rank if isinstance(module, Parameter) else None


FAMILY = Family(
    name="LORA", tensors=("lora_A.weight", "lora_B.weight"), weight=weight, scale=lambda m, folder: m.scale, rank=_rank
)
