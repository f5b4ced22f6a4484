"""The script people write first: load both, subtract in the given dtype, save. BASE TUNED OUT ALPHA DTYPE"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

base, tuned, out, alpha, dtype = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
out.mkdir(parents=True)
left = {k: v for path in sorted(base.glob("*.safetensors")) for k, v in load_file(path).items()}
right = {k: v for path in sorted(tuned.glob("*.safetensors")) for k, v in load_file(path).items()}
compute = getattr(torch, dtype)
with torch.no_grad():
    edited = {k: (v.to(compute) - alpha * (right[k].to(compute) - v.to(compute))).to(v.dtype) for k, v in left.items()}
index = base / "model.safetensors.index.json"
weight_map = json.loads(index.read_text())["weight_map"] if index.exists() else dict.fromkeys(edited, "model.safetensors")
for shard in sorted(set(weight_map.values())):
    save_file({k: v for k, v in edited.items() if weight_map[k] == shard}, out / shard, metadata={"format": "pt"})
for side in (index, base / "config.json"):
    if side.exists():
        shutil.copy(side, out)
