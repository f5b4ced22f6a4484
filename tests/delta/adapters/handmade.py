"""Bases and adapters of a few random tensors, written without PEFT: for what PEFT would not write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]
MODEL = {"m.q.weight": (6, 4), "m.q.bias": (6,), "m.o.weight": (4, 6), "m.norm.weight": (4,)}


def write_base(folder: Path, shapes: Shapes = MODEL, **config: Any) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(3)
    content = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(content, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_adapter(folder: Path, tensors: Shapes | dict[str, torch.Tensor], **config: Any) -> Path:
    """`tensors`: name after `base_model.model.` -> shape (random) or the tensor itself. peft_type, r and alpha are given."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(4)
    content = {
        f"base_model.model.{name}": t if isinstance(t, torch.Tensor) else torch.randn(t, generator=generator)
        for name, t in tensors.items()
    }
    save_file(content, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def lora(module: str, outside: int, inside: int, rank: int = 2) -> Shapes:
    return {f"{module}.lora_A.weight": (rank, inside), f"{module}.lora_B.weight": (outside, rank)}
