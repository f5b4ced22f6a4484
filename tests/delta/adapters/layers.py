"""One layer of each kind, and what PEFT makes of an adapter on them, in float64.

PEFT's float32 merge of a product with W is itself off by about 1e-6 of the largest Δ, so its float64 merge is the oracle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from . import peft_oracle as oracle


class Layers(nn.Module):
    """Square ones among them, whose shapes do not tell which way round a factor goes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.square_embedding = nn.Embedding(8, 8)
        self.linear = nn.Linear(8, 12)
        self.narrow = nn.Linear(12, 1)
        self.single = nn.Linear(1, 1)
        self.square = nn.Linear(8, 8)
        self.conv1 = nn.Conv1d(8, 6, 3)
        self.conv2 = nn.Conv2d(4, 6, 3)
        self.square_conv2 = nn.Conv2d(6, 6, 3)
        self.oblong_conv2 = nn.Conv2d(6, 6, (3, 2))
        self.grouped = nn.Conv2d(8, 4, 3, groups=2)
        self.square_grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.conv3 = nn.Conv3d(6, 4, (1, 2, 3))
        self.pointwise = nn.Conv2d(6, 12, 1)
        self.square_pointwise = nn.Conv2d(6, 6, 1)
        self.norm = nn.LayerNorm(8)
        self.group_norm = nn.GroupNorm(2, 6)


def save(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    folder.mkdir()
    model = oracle.random_model(Layers()).to(dtype)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    return folder


def train(folder: Path, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    return oracle.train(oracle.random_model(Layers()), folder, config, dtype)


def merged(base: Path, adapter: Path) -> oracle.Tensors:
    model = Layers().double()
    model.load_state_dict({name: tensor.double() for name, tensor in load_file(base / "model.safetensors").items()})
    return oracle.merged_in_double(model, adapter)


def assert_edited_as_peft_merges(
    config: Any, folder: Path, changed: set[str], dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32)
) -> Path:
    """Trains, edits and compares; `changed`: the tensors, and no others. `dtypes` of the base and of the adapter."""
    base, adapter = save(folder / "base", dtypes[0]), train(folder / "adapter", config, dtypes[1])
    edited = oracle.edited_by_taskvec(base, adapter, folder / "out", alpha=0.7)
    before = oracle.weights_of(base)
    oracle.assert_is_base_minus(edited, before, merged(base, adapter), 0.7, oracle.identity)
    assert {name for name in before if not edited[name].equal(before[name])} == changed
    return adapter


def assert_transformer_edited_as_peft_merges(model: Any, base: Path, config: Any, folder: Path) -> Path:
    """The same for a model of transformers; `model` makes one of its class."""
    adapter = oracle.train(model(), folder / "adapter", config)
    edited = oracle.edited_by_taskvec(base, adapter, folder / "out", alpha=0.7)
    expected = oracle.merged_in_double(oracle.in_double(model(), base), adapter)
    oracle.assert_is_base_minus(edited, oracle.weights_of(base), expected, 0.7, oracle.identity)
    return adapter


def weights(*layers: str) -> set[str]:
    return {f"{layer}.weight" for layer in layers}


def biases(*layers: str) -> set[str]:
    return {f"{layer}.bias" for layer in layers}


DTYPES = {
    "f32": (torch.float32, torch.float32),
    "bf16 base": (torch.bfloat16, torch.float32),
    "bf16 both": (torch.bfloat16, torch.bfloat16),
}
