"""LoRA and LoCon as sd-scripts (Kohya) and LyCORIS write them, with the shapes of their factors.

W' = W + s · up @ down                  down: [r, in(, k, k)]  up: [out, r(, 1, 1)]                   W: [out, in(, k, k)]
W'[o,i,k,l] = W[o,i,k,l] + s · Σ up[o,p] mid[p,q,k,l] down[q,i]                                       W: [out, in, k, k]
                                        down: [r, in, 1, 1]    mid: [r, r, k, k]   up: [out, r, 1, 1]
s  = alpha / r, alpha a scalar beside the factors (sd-scripts networks/lora.py, LyCORIS 4.1 modules/locon.py)
DoRA: `dora_scale` is m, [out, 1, …]: one length for every row (LyCORIS 4.1, wd_on_out)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ...errors import show
from ..source import Delta, LowRankDelta
from . import lora
from .adapter import Module, Weight

_MERGE_FIRST = "Merge it with the tool that made it, and subtract the merged model"


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    decomposed, with_core = "lora_magnitude_vector" in module, "lora_mid.weight" in module
    if decomposed and module["lora_magnitude_vector"].name.endswith(".dora_scale"):
        found, expected = module["lora_magnitude_vector"].shape, (weight.shape[0], *(1 for _ in weight.shape[1:]))
        if found != expected:
            raise module.refuse(f"dora_scale is {list(found)}, expected {list(expected)}: one for every row", _MERGE_FIRST)
    if decomposed and with_core:
        raise module.refuse("lora_mid together with dora_scale is not supported", _MERGE_FIRST)
    if with_core:
        return _with_core(module, weight)
    if "lora_A.weight" in module and "use_bdlora" not in module.config and not weight.transposed:
        module.expect("lora_A.weight", None, *weight.shape[1:])  # never the other way round
    return lora.weight(module, weight)


def _with_core(module: Module, weight: Weight) -> LowRankDelta:
    down, mid, up = module["lora_A.weight"], module["lora_mid.weight"], module["lora_B.weight"]
    if len(weight.shape) < 3:
        found = f"{show(weight.stored.name)} is {list(weight.stored.shape)}"
        raise module.refuse(f"{show(mid.name)} is for a convolution, and {found}")
    inner, outer = down.shape[0], up.shape[1]
    out, inside, *kernel = weight.shape
    ones = [1] * len(kernel)
    module.expect("lora_A.weight", inner, inside, *ones)
    module.expect("lora_mid.weight", outer, inner, *kernel)
    module.expect("lora_B.weight", out, outer, *ones)
    return LowRankDelta(up, down, module.scale, more=(mid,), factors=_factors)


def _factors(up: Any, down: Any, mid: Any) -> tuple[Any, Any]:
    """up, [out, r], and Σ mid[p,q,k,l] down[q,i], [r, in·k·l]."""
    core = mid.reshape(*mid.shape[:2], -1).astype(np.float64)  # [p, q, k·l]
    right = np.einsum("pqk,qi->pik", core, down.reshape(len(down), -1))
    return up.reshape(len(up), -1), right.reshape(len(mid), -1).astype(np.float32)


FAMILY = replace(lora.FAMILY, tensors=(*lora.FAMILY.tensors, "lora_mid.weight"), weight=weight)
