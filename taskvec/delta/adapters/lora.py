"""LoRA (Hu et al. 2021, eq. 3) and its variants (tensor names, scales and initialisations as PEFT 0.21 has them).

W' = W + s · B @ A        Linear, Conv1D  A: [r, in]       B: [out, r]          W: [out, in], stored [in, out] by a Conv1D
                          Conv1d/2d/3d    A: [r, in, k, …] B: [out, r, 1, …]    W: [out, in, k, …]
                          Embedding       A: [r, V]        B: [D, r]            W: [V, D], W' = W + s · (B @ A)ᵀ
b' = b + s · lora_B.bias                  only where the adapter has one (lora_bias, mergekit-extract)
s  = alpha / r, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023); alpha and r after alpha_ and rank_pattern
DoRA (Liu et al. 2024, eq. 5): V = W + s · B @ A, W' = m · V / ‖V‖, norms over all axes but the first of a Linear or a
    convolution, over the first axis as stored of a Conv1D or an Embedding. m: [out], [1, out, 1, …] or [D]
PiSSA (Meng et al. 2024, eq. 2-4), not converted: W' = W − U_r S_r V_r + s · B @ A, the r largest singular triplets of W
OLoRA (Büyükakyüz 2024), not converted: W' = W − s · Q_r R_r + s · B @ A, W = Q R
BD-LoRA: the compact factor of a module is cut into nblocks along its first axis, which are put on a diagonal
rows of an embedding (trainable_token_indices) are replaced: see trainable_tokens.py
every other tensor of the adapter (biases, modules_to_save) holds the new value itself: Δ = value − origin
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...checkpoint.header import StoredTensor
from ...errors import AdapterError, listing, show
from ..source import Delta, Formula, FormulaDelta, LowRankDelta, ScaledDelta, matrices
from .adapter import Family, Module, Weight
from .config import AdapterFolder
from .experts import arrange
from .trainable_tokens import rows

_ROWS = "token_adapter.trainable_tokens_delta"
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_SUBTRACTED_INITS = ("pissa", "olora")  # the base loses what A and B start from
_REFUSED_INITS = {
    "corda": "CorDA takes a part out of the base that only its training data tell",
    "loftq": "LoftQ was trained on a quantised base, whose rounding error is not in the file",
    "lora_ga": "LoRA-GA takes a part out of the base that only its training data tell",
}


def _factors(module: Module) -> tuple[StoredTensor, StoredTensor]:
    """A and B of a module, whichever kind of layer it is."""
    embedding, names = ("lora_embedding_A", "lora_embedding_B"), ("lora_A.weight", "lora_B.weight")
    if any(name in module for name in embedding):
        if any(name in module for name in names):
            raise module.refuse(f"found both {listing(names)} and {listing(embedding)}")
        names = embedding
    a, b = module[names[0]], module[names[1]]
    if len(a.shape) < 2 or len(a.shape) != len(b.shape):
        raise module.refuse(f"A is {list(a.shape)}, B is {list(b.shape)}: no two factors of one product")
    return a, b


def scale(module: Module, folder: AdapterFolder) -> float:
    """s of one module: alpha / r or alpha / sqrt(r). r is that of the tensors, checked against the config."""
    if _only_rows(module):
        return 1.0
    a, _ = _factors(module)
    stored = a.shape[0]
    rank = folder.pattern_value("rank_pattern", module.name, "r", stored)
    if rank != stored:
        raise AdapterError(
            f"{show(module.path)}: tensor {show(a.name)}: found rank {stored}, expected {rank:g} as in the config"
        )
    alpha = folder.pattern_value("alpha_pattern", module.name, "lora_alpha", 8)
    return alpha / math.sqrt(stored) if folder.config.get("use_rslora") else alpha / stored


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    if _only_rows(module):
        if len(module.tensors) > 1:
            raise module.refuse(
                f"found {listing(t.name for t in module.tensors.values())}: factors and trainable tokens both"
            )
        return rows(module, weight, module[_ROWS], _token_indices(module))
    a, b = _factors(module)
    low_rank = _low_rank(module, weight, a, b)
    magnitude = _magnitude(module)
    if magnitude is not None:
        return _decomposed(module, weight, low_rank, magnitude)
    init = module.config.get("init_lora_weights", True)
    if init in _SUBTRACTED_INITS and "lora_A.weight" in module:
        if len(weight.shape) != 2 or (init == "olora" and low_rank.transposed):
            raise module.refuse(f"init_lora_weights is {init} on a layer PEFT does not support it for")
        taken: Formula = (_Principal if init == "pissa" else _Orthonormal)(low_rank.scale, low_rank.transposed)
        return FormulaDelta(taken, (a, b), weight.origin)
    return low_rank


def bias(module: Module, weight: Weight) -> Delta | None:
    """Δ of the module's bias."""
    if "lora_B.bias" not in module:
        return None
    if module["lora_B.bias"].shape != weight.stored.shape:
        raise weight.refuse(module, list(module["lora_B.bias"].shape))
    return ScaledDelta(module["lora_B.bias"], module.scale)


def _low_rank(module: Module, weight: Weight, a: StoredTensor, b: StoredTensor) -> LowRankDelta:
    blocks = _blocks(module, a, b)
    inside, rank = a.shape[1] * (blocks.nblocks if blocks.a else 1), b.shape[1] * (blocks.nblocks if blocks.b else 1)
    if rank != a.shape[0]:
        groups = "; a convolution in groups, which PEFT cannot merge" if len(a.shape) > 2 else ""
        raise module.refuse(f"A is {list(a.shape)}, B is {list(b.shape)}: their ranks differ{groups}")
    found, stored = (b.shape[0], inside, *a.shape[2:]), weight.stored.shape
    embedding = "lora_embedding_A" in module
    straight, turned = found == stored and not embedding, len(stored) == 2 and found[::-1] == stored
    if not (straight or turned) or any(size != 1 for size in b.shape[2:]):
        raise weight.refuse(module, list(found[::-1] if embedding else found))
    factors = blocks if blocks.a or blocks.b else matrices
    return LowRankDelta(b, a, module.scale, weight.transposed if straight and turned else turned, factors=factors)


@dataclass(frozen=True)
class _BlockDiagonal:
    """BD-LoRA (PEFT 0.21, lora/variants.py): `a` or `b` is stored as the blocks of a diagonal, one below the other."""

    nblocks: int
    a: bool
    b: bool

    def __call__(self, left: Any, right: Any) -> tuple[Any, Any]:
        return (self._expanded(left) if self.b else left), (self._expanded(right) if self.a else right)

    def _expanded(self, compact: Any) -> Any:
        """[n·p, q] -> [n·p, n·q]: block i of p rows goes to columns i·q …"""
        rows, columns = compact.shape
        out = np.zeros((self.nblocks, rows // self.nblocks, self.nblocks, columns), np.float32)
        for i in range(self.nblocks):
            out[i, :, i] = compact[i * (rows // self.nblocks) : (i + 1) * (rows // self.nblocks)]
        return out.reshape(rows, self.nblocks * columns)


def _blocks(module: Module, a: StoredTensor, b: StoredTensor) -> _BlockDiagonal:
    config = module.config.get("use_bdlora") or {}
    lists = {f"target_modules_bd_{factor}": factor for factor in "ab"}
    if not isinstance(config, dict) or not config.keys() <= {"nblocks", "match_strict", *lists}:
        raise module.refuse(f"use_bdlora is {show(config)}, expected an object with nblocks and lists of modules")
    named = {factor: config.get(key) or [] for key, factor in lists.items()}
    nblocks = config.get("nblocks", 1)
    counted = isinstance(nblocks, int) and not isinstance(nblocks, bool) and nblocks >= 1
    if not counted or not all(isinstance(parts, list) for parts in named.values()):
        raise module.refuse(f"use_bdlora is {show(config)}, expected a number of blocks and lists of modules")
    in_a, in_b = (any(str(part) in module.name for part in named[factor]) for factor in "ab")
    if (in_a and a.shape[0] % nblocks) or (in_b and b.shape[0] % nblocks) or (in_a and in_b):
        what = "both factors" if in_a and in_b else "its shapes"
        raise module.refuse(f"use_bdlora asks for nblocks {show(nblocks)} of {what}")
    return _BlockDiagonal(nblocks, in_a, in_b)


def _magnitude(module: Module) -> StoredTensor | None:
    """DoRA's m, where the config asks for it."""
    found = module.tensors.get("lora_magnitude_vector") or module.tensors.get("lora_magnitude_vector.weight")
    if module.config.get("use_dora"):
        return found or module["lora_magnitude_vector"]
    if found is not None:
        raise module.refuse(f"found {show(found.name)}, which DoRA has, but use_dora is not set in the config")
    return None


def _decomposed(module: Module, weight: Weight, low_rank: LowRankDelta, magnitude: StoredTensor) -> FormulaDelta:
    out = low_rank.left.shape[0]
    if magnitude.elements != out:
        raise module.refuse(f"lora_magnitude_vector is {list(magnitude.shape)}, expected {out} numbers")
    formula = (_ByColumn if low_rank.transposed else _ByRow)(low_rank.scale)
    return FormulaDelta(formula, (low_rank.right, low_rank.left, magnitude), weight.origin)


@dataclass(frozen=True)
class _ByRow(Formula):
    """DoRA: every row of V = W + s · B @ A, [out, in·k·…], gets the length that m, [out], says."""

    scale: float

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        a, b, magnitude = tensors
        left, right = matrices(b, a)
        return self.scale * left, right, magnitude.reshape(-1, 1)  # [out, r], [r, in·k·…], [out, 1]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        left, right, magnitude = state
        direction = weight + left[rows] @ right  # [rows, in·k·…]
        norm = np.sqrt(np.sum(direction * direction, axis=1, keepdims=True))  # [rows, 1]
        return magnitude[rows] / norm * direction - weight


@dataclass(frozen=True)
class _ByColumn(Formula):
    """DoRA where the layer's output is the last axis, stored [in, out] or [V, D]: one norm per column, over all rows."""

    scale: float

    surveys_weight = True

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        a, b, magnitude = tensors
        left, right = a.T, self.scale * b.T  # [in, r], [r, out]
        squares, row = np.zeros(right.shape[1]), 0
        for block in blocks():
            direction = block + left[row : row + len(block)] @ right
            squares += np.sum(direction * direction, axis=0)
            row += len(block)
        return left, right, magnitude.reshape(-1) / np.sqrt(squares)  # …, [out]

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        left, right, factor = state
        return factor * (weight + left[rows] @ right) - weight

    def scratch(self, rows: int, columns: int) -> int:
        return 64 << 20  # a block of the survey and what is made of it


@dataclass(frozen=True)
class _Taken(Formula):
    """s · B @ A less what was taken out of W when the adapter was made: a product `left @ right` of W's own."""

    scale: float
    transposed: bool  # W is stored [in, out]

    uses_weight = False
    surveys_weight = True

    def prepare(self, tensors: list[Any], blocks: Callable[[], Iterable[Any]]) -> Any:
        a, b = tensors
        left, right = (a.T, self.scale * b.T) if self.transposed else (self.scale * b, a)
        taken_left, taken_right = self.taken(len(a), blocks)
        return np.concatenate([left, -taken_left], axis=1), np.concatenate([right, taken_right])

    def taken(self, rank: int, blocks: Callable[[], Iterable[Any]]) -> tuple[Any, Any]:
        """[rows, r] and [r, columns] of W as it is stored."""
        raise NotImplementedError

    def delta(self, state: Any, rows: slice, weight: Any) -> Any:
        left, right = state
        return left[rows] @ right


@dataclass(frozen=True)
class _Principal(_Taken):
    """U_r S_r V_r = U_r U_rᵀ W = W V_r V_rᵀ, from the eigenvectors of W Wᵀ or WᵀW, whichever is smaller."""

    def taken(self, rank: int, blocks: Callable[[], Iterable[Any]]) -> tuple[Any, Any]:
        weight = np.concatenate(list(blocks()))  # [rows, columns]
        if len(weight) <= weight.shape[1]:
            left = np.linalg.eigh(weight @ weight.T)[1][:, -rank:]  # [rows, r]
            return left, left.T @ weight
        right = np.linalg.eigh(weight.T @ weight)[1][:, -rank:]  # [columns, r]
        return weight @ right, right.T

    def scratch(self, rows: int, columns: int) -> int:
        return 16 * rows * columns + 32 * min(rows, columns) ** 2


@dataclass(frozen=True)
class _Orthonormal(_Taken):
    """s · Q_r R_r = s · Q_r Q_rᵀ W: the first r columns of Q span the first r columns of W, so W need not be held."""

    def taken(self, rank: int, blocks: Callable[[], Iterable[Any]]) -> tuple[Any, Any]:
        basis = np.linalg.qr(np.concatenate([block[:, :rank] for block in blocks()]))[0]  # [rows, r]
        right, row = 0, 0
        for block in blocks():
            right = right + basis[row : row + len(block)].T @ block  # [r, columns]
            row += len(block)
        return self.scale * basis, right

    def scratch(self, rows: int, columns: int) -> int:
        return 64 << 20


def _check(folder: AdapterFolder) -> None:
    init = folder.config.get("init_lora_weights", True)
    if init in _PLAIN_INITS or init in _SUBTRACTED_INITS:
        return
    kind = next((kind for kind in _REFUSED_INITS if str(init).startswith(kind)), None)
    reason = f"{_REFUSED_INITS[kind]}: s·B@A is not its Δ" if kind else "it may change the base when the adapter is made"
    if str(init).startswith("pissa_niter"):
        reason = "PiSSA by randomised SVD takes a part out of the base that cannot be found again: s·B@A is not its Δ"
    raise folder.refuse(
        f"init_lora_weights is {show(init)}: {reason}",
        "Save it with PEFT's path_initial_model_for_weight_conversion, or subtract the full model that its training gave",
    )


def _only_rows(module: Module) -> bool:
    """Whether it is no LoRA, but trainable tokens beside one."""
    return _ROWS in module


def _token_indices(module: Module) -> object:
    """Those of the config: for every module, or by the ends of their names (PEFT 0.21, utils/other.py, _set_trainable)."""
    found = module.config.get("trainable_token_indices")
    if not isinstance(found, dict):
        return found
    named = [indices for ending, indices in found.items() if module.name.endswith(ending)]
    if not named or any(indices != named[0] for indices in named):
        raise module.refuse(f"trainable_token_indices is {show(found)}: which rows of this module it changes is not certain")
    return named[0]


def _rank(module: Module) -> int | None:
    return None if _only_rows(module) else _factors(module)[0].shape[0]


def _variants(config: Mapping[str, Any]) -> list[str]:
    names = {"use_rslora": "rsLoRA", "use_dora": "DoRA", "use_bdlora": "BD-LoRA", "lora_bias": "LoRA bias"}
    init = {"pissa": "PiSSA", "olora": "OLoRA"}.get(str(config.get("init_lora_weights")))
    return [name for field, name in names.items() if config.get(field)] + ([init] if init else [])


FAMILY = Family(
    name="LORA",
    tensors=(
        "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B",
        "lora_magnitude_vector", "lora_magnitude_vector.weight", _ROWS,
    ),
    weight=weight,
    bias=bias,
    biased=("lora_B.bias",),
    fields=(
        "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "bias", "lora_bias", "init_lora_weights",
        "use_bdlora", "lora_dropout", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying",
        "trainable_token_indices", "use_dora", "target_parameters",
    ),
    refused={
        "layer_replication": "several layers share one weight of the base, which would have to become several",
        "alora_invocation_tokens": "activated LoRA changes some tokens only: no weight is its Δ",
        "arrow_config": "Arrow chooses among adapters per token: no weight is its Δ",
        "use_qalora": "QALoRA needs its quantised base",
        "kasa_config": "KaSA is not supported",
        "loftq_config": _REFUSED_INITS["loftq"],
        "corda_config": _REFUSED_INITS["corda"],
        "lora_ga_config": _REFUSED_INITS["lora_ga"],
        "velora_config": "VeLoRA is not supported",
        "monteclora_config": "MonteCLoRA is not supported",
        "megatron_config": "Megatron-parallel layers are not supported",
    },
    check=_check,
    scale=scale,
    rank=_rank,
    variants=_variants,
    arrange=arrange,
)  # fmt: skip
