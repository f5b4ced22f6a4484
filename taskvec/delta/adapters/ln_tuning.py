"""LN tuning (Zhao et al. 2023; as PEFT 0.21 has it, tuners/ln_tuning): norms get new values.

W' = ln_tuning_layers.weight, b' = ln_tuning_layers.bias    both [n]; the second where the norm has a bias
"""

from __future__ import annotations

from ...errors import show
from ..source import Delta, DenseDelta
from .adapter import Family, Module, Weight


def weight(module: Module, weight: Weight) -> Delta:
    """Δ of the module's weight."""
    if len(weight.stored.shape) != 1:
        raise module.refuse(
            f"{show(weight.stored.name)} is {list(weight.stored.shape)}: LN tuning of anything but norms is not supported",
            "Merge it with PEFT (merge_and_unload, save_pretrained) and subtract the merged model",
        )
    return DenseDelta(module.expect("ln_tuning_layers.weight", *weight.stored.shape), weight.origin)


def bias(module: Module, bias: Weight) -> Delta:
    """Δ of the module's bias."""
    return DenseDelta(module.expect("ln_tuning_layers.bias", *bias.stored.shape), bias.origin)


FAMILY = Family(
    name="LN_TUNING",
    tensors=("ln_tuning_layers.weight", "ln_tuning_layers.bias"),
    weight=weight,
    bias=bias,
    biased=("ln_tuning_layers.bias",),
)
