"""AdaLoRA (Zhang et al. 2023, eq. 3; names and scale as PEFT 0.21 has them, tuners/adalora).

W' = W + s · B @ (E · A)   E: [r', 1]   B: [out, r']
    Linear, Conv1D   A: [r', in]       W: [out, in], stored [in, out] by a Conv1D
    Conv2d           A: [r', in·k·l]   W: [out, in, k, l]
s  = lora_alpha / (init_r + 1e-5); init_r / (init_r + 1e-5) where lora_alpha is not positive
r' is init_r, or what the training pruned it to: the number of true entries of the module in rank_pattern; it may be 0
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..source import Delta, LowRankDelta
from .adapter import Family, Module, Weight
from .agreement import expect_layer
from .config import AdapterFolder

_EPSILON = 1e-5  # PEFT adds it to the rank it divides by, which may be 0


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    out, *inner = expect_layer(module, weight, 2, 4, conv1d=True)
    rank = _rank(module)
    a, b = module.expect("lora_A", rank, math.prod(inner)), module.expect("lora_B", out, rank)
    values = module.expect("lora_E", rank, 1)
    return LowRankDelta(b, a, module.scale, weight.transposed, more=(values,), factors=_with_singular_values)


def _with_singular_values(b: Any, a: Any, values: Any) -> tuple[Any, Any]:
    """B and E · A: [out, r'], [r', in·…]; of rank 0 one that adds nothing, as not every device multiplies empty matrices."""
    if not values.size:
        return np.zeros((len(b), 1), np.float32), np.zeros((1, a.shape[1]), np.float32)
    return b, values * a


def scale(module: Module, folder: AdapterFolder) -> float:
    """s of one module. Raises AdapterError when the config prunes it to another rank than it has."""
    initial = folder.number("init_r", folder.config.get("init_r", 12))
    if initial <= 0:
        raise folder.refuse(f"init_r is {initial:g}, expected a positive number")
    expected = _kept(module, folder, initial)
    if _rank(module) != expected:
        raise module.refuse(f"found rank {_rank(module)}, expected {expected:g} as in the config")
    alpha = folder.number("lora_alpha", folder.config.get("lora_alpha", 8))
    if alpha <= 0 and folder.config.get("rank_pattern"):
        raise folder.refuse(
            "lora_alpha is not positive and rank_pattern is set: PEFT scales by one rank in training, by another on loading",
            "Set lora_alpha to init_r if it was trained with PEFT",
        )
    return (alpha if alpha > 0 else initial) / (initial + _EPSILON)


def _kept(module: Module, folder: AdapterFolder, initial: float) -> float:
    """The rank the config says the module was left with."""
    pattern = folder.config.get("rank_pattern") or {}
    if not isinstance(pattern, dict) or not all(isinstance(mask, list) for mask in pattern.values()):
        raise folder.refuse("rank_pattern is not understood, expected lists of true and false by name")
    for name, mask in pattern.items():
        if name.replace(".default", "") == f"{module.name}.lora_E":
            return sum(map(bool, mask))
    return initial


def _rank(module: Module) -> int:
    return module.expect("lora_A", None, None).shape[0]


FAMILY = Family(
    name="ADALORA",
    tensors=("lora_A", "lora_B", "lora_E"),
    weight=weight,
    prunes=True,
    fields=(
        "init_r", "lora_alpha", "rank_pattern", "bias", "r", "alpha_pattern", "use_rslora", "target_r", "tinit", "tfinal",
        "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "init_lora_weights", "lora_dropout", "megatron_core",
        "qalora_group_size", "ensure_weight_tying",
    ),
    refused={
        "layer_replication": "several layers share one weight of the base, which would have to become several",
        "target_parameters": "AdaLoRA on bare parameters (fused experts) is not supported",
        "trainable_token_indices": "trainable tokens beside AdaLoRA are not supported",
    },
    scale=scale,
    rank=_rank,
)  # fmt: skip
