"""Forgetting: θ′ = θ − λ·(what the second pass over the old facts taught), by taskvec on files; and the random control."""

from __future__ import annotations

from pathlib import Path

import torch
from model import weights
from safetensors.torch import save_file

import taskvec as tv


def forget(original: Path, old: Path, scale: float, out: Path) -> None:
    """`old` is a fine-tuned checkpoint or an adapter: taskvec sees which. Untouched tensors are copied as bytes."""
    tv.subtract(original, old, alpha=scale, output=out)


def norm(original: Path, old: Path) -> float:
    """‖Δ‖ over all tensors, of the full fine-tune or of the adapter's product."""
    vector = tv.TaskVector.from_adapter(old, original) if _is_adapter(old) else tv.TaskVector.between(original, old)
    moved = tv.Checkpoint.open(original) + vector
    before = weights(original)
    return sum(float((t.double() - before[name].double()).square().sum()) for name, t in moved.tensors()) ** 0.5


def random_fine_tune(original: Path, old: Path, out: Path, seed: int) -> None:
    """A checkpoint that moved from `original` as far as `old` did, tensor by tensor, in a random direction."""
    generator = torch.Generator().manual_seed(seed)
    before, after = weights(original), weights(old)
    moved = {}
    for name, tensor in before.items():
        direction = torch.randn(tensor.shape, generator=generator)
        moved[name] = tensor + direction * ((after[name] - tensor).norm() / direction.norm())
    out.mkdir(parents=True)
    save_file(moved, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_bytes((original / "config.json").read_bytes())


def _is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").exists()
