"""Small models of a few tensors, as the files of a repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

SHAPES = {"model.embed.weight": (300, 8), "model.h.0.q.weight": (8, 8), "model.h.1.q.weight": (8, 8), "norm.weight": (8,)}
FIRST, SECOND, INDEX = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
SIDE = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "sub/chat.jinja": b"hi",
    "README.md": b"---\nlicense: mit\n---\n",
}
JUNK = {"pytorch_model.bin": b"\x80pickle", "original/consolidated.pth": b"\x80", "model.gguf": b"GGUF" * 100}


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in SHAPES.items()}


def sharded(seed: int) -> dict[str, bytes]:
    held = tensors(seed)
    parts = {FIRST: dict(list(held.items())[:2]), SECOND: dict(list(held.items())[2:])}
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = {"metadata": {}, "weight_map": weight_map}
    return {**{file: save(part) for file, part in parts.items()}, INDEX: json.dumps(index).encode()}


def adapter(**config: Any) -> dict[str, bytes]:
    generator = torch.Generator().manual_seed(9)
    held = {
        f"base_model.model.model.h.0.q.lora_{x}.weight": torch.randn(s, generator=generator)
        for x, s in (("A", (2, 8)), ("B", (8, 2)))
    }
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base", **config}
    return {"adapter_model.safetensors": save(held), "adapter_config.json": json.dumps(settings).encode()}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
