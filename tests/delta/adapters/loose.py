"""Adapters of one file, and bases of one, written tensor by tensor: what sd-scripts, LyCORIS and diffusers leave behind."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import taskvec as tv

Tensors = dict[str, torch.Tensor]
Array = np.ndarray[Any, np.dtype[np.float64]]


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random, another one for every shape."""
    generator = torch.Generator().manual_seed(sum(size * 7**place for place, size in enumerate(shape, 1)))
    return torch.randn(shape, generator=generator).to(dtype)


def write(path: Path, tensors: Tensors, metadata: Mapping[str, Any] | None = None) -> Path:
    """`metadata`: the settings of `lora_adapter_metadata`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata, indent=2, sort_keys=True)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, path, {"format": "pt", **settings})
    return path


def base_of(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Path:
    return write(path, {name: draw(*shape, dtype=dtype) + n for n, (name, shape) in enumerate(shapes.items())})


def exact(tensor: torch.Tensor) -> Array:
    return tensor.double().numpy()


def edited(base: Path, adapter: Path, alpha: float = 1.0, **options: Any) -> Tensors:
    output = base.parent / f"out-{adapter.stem}.safetensors"
    tv.subtract(base, adapter, alpha=alpha, output=output, fsync=False, **options)
    return load_file(output)


def assert_changed(base: Path, adapter: Path, deltas: Mapping[str, Array], alpha: float = 0.7) -> None:
    """The edit is base − α·Δ in float32, rounded once, for these tensors; all others are base's, bit for bit."""
    before = load_file(base)
    after = edited(base, adapter, alpha)
    assert after.keys() == before.keys() and deltas.keys() <= before.keys() and deltas
    for name, found in after.items():
        if name not in deltas:
            assert found.equal(before[name]), name
            continue
        delta = deltas[name]
        assert np.abs(delta).max() > 0 and delta.shape == tuple(found.shape)
        want = exact(before[name]) - alpha * delta
        spacing = 0.0 if found.dtype == torch.float32 else torch.finfo(found.dtype).eps * np.abs(want)
        assert found.dtype == before[name].dtype
        assert (np.abs(exact(found) - want) <= 1e-6 * np.abs(delta).max() + spacing).all(), name


def refusal(base: Path, adapter: Path, kind: type[tv.TaskvecError] = tv.MismatchError) -> str:
    """What is said, in one line that names the adapter; nothing is written."""
    before = sorted(base.parent.rglob("*"))
    with pytest.raises(kind) as caught:
        edited(base, adapter)
    message = str(caught.value)
    assert "\n" not in message and str(adapter) in message and sorted(base.parent.rglob("*")) == before
    return message
