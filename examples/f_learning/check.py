"""Is the arithmetic right: the edited files against torch and PEFT, in formulas that share no code with taskvec."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import model as models
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

LORA_TOLERANCE = 1e-6  # absolute: two float32 products, each rounded once when stored
State = dict[str, torch.Tensor]


def check_full(original: Path, old: Path, edited: Path, scale: float) -> dict[str, Any]:
    """Every element of `edited` is θ − f32(λ)·(old − θ), in float32, one rounded operation after the other."""
    before, after, found = (models.weights(folder) for folder in (original, old, edited))
    factor = torch.tensor(scale, dtype=torch.float32)
    expected = {name: tensor - factor * (after[name] - tensor) for name, tensor in before.items()}
    differing = sum(int((_bits(found[name]) != _bits(expected[name])).sum()) for name in expected)
    return {"passed": found.keys() == before.keys() and differing == 0, "elements_that_differ": differing}


def check_lora(original: Path, adapter: Path, edited: Path, scale: float) -> dict[str, Any]:
    """`edited` is what PEFT merges at −λ; tensors on which the adapter does not act have θ's bytes."""
    before, found = models.weights(original), models.weights(edited)
    expected = _merged(original, adapter, -scale)
    targets = _targets(adapter)
    error = max(float((found[name].double() - expected[name].double()).abs().max()) for name in targets)
    untouched = before.keys() - targets
    identical = all(torch.equal(_bits(found[name]), _bits(before[name])) for name in untouched)
    moved = all(not torch.equal(found[name], before[name]) for name in targets) or scale == 0
    return {
        "passed": found.keys() == before.keys() and error <= LORA_TOLERANCE and identical and moved,
        "largest_error": error,
        "untouched_tensors": len(untouched),
        "untouched_identical": identical,
    }


def _merged(original: Path, adapter: Path, scale: float) -> State:
    """PEFT's merge of `adapter` times `scale`, in float32."""
    model = PeftModel.from_pretrained(models.load(original, "cpu"), adapter)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.scaling = {name: factor * scale for name, factor in module.scaling.items()}
    return dict(model.merge_and_unload().state_dict())


def _targets(adapter: Path) -> set[str]:
    prefix, suffix = "base_model.model.", ".lora_A.weight"
    names = load_file(adapter / "adapter_model.safetensors")
    return {name.removeprefix(prefix).removesuffix(suffix) + ".weight" for name in names if name.endswith(suffix)}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)
