"""Ilharco's task-vector arithmetic on state dicts (build the vector, negate it, apply it): BASE TUNED OUT ALPHA DTYPE

Written from the formula τ = θ_ft − θ_pre, θ_new = θ_pre + λ·(−τ), with every dict whole in memory as in the reference class.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

base, tuned, out, alpha, dtype = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
out.mkdir(parents=True)
compute = getattr(torch, dtype)


def load(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v.to(compute) for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


with torch.no_grad():
    pretrained, finetuned = load(base), load(tuned)
    vector = {k: finetuned[k] - pretrained[k] for k in pretrained}
    negated = {k: -v for k, v in vector.items()}
    new = {k: pretrained[k] + alpha * negated[k] for k in pretrained}
stored = json.loads((base / "config.json").read_text())["torch_dtype"]
save_file({k: v.to(getattr(torch, stored)) for k, v in new.items()}, out / "model.safetensors", metadata={"format": "pt"})
