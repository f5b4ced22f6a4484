"""`inspect`: what a checkpoint or an adapter holds, from its headers alone."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.header import StoredTensor
from ..checkpoint.locate import locate_adapter, locate_peft
from ..delta.adapters import open_adapter
from ..delta.adapters.config import AdapterFolder
from ..errors import TaskvecError


@dataclass(frozen=True)
class Inspection:
    """`tensors` in the order of the files; `adapter` is None for a checkpoint; `refused` is why an adapter cannot be
    subtracted, None when it can."""

    label: str
    files: list[dict[str, Any]]
    tensors: list[StoredTensor]
    metadata: dict[str, str]
    adapter: dict[str, Any] | None = None
    refused: str | None = None

    @property
    def dtypes(self) -> dict[str, int]:
        """dtype -> bytes."""
        found: Counter[str] = Counter()
        for tensor in self.tensors:
            found[tensor.dtype] += tensor.nbytes
        return dict(found)

    def summary(self) -> dict[str, Any]:
        """Everything as plain data, JSON-ready. Sizes in bytes."""
        return {
            "name": self.label,
            "files": self.files,
            "parameters": sum(t.elements for t in self.tensors),
            "bytes": sum(t.nbytes for t in self.tensors),
            "dtypes": self.dtypes,
            "metadata": self.metadata,
            "adapter": self.adapter,
            "refused": self.refused,
            "tensors": [
                {"name": t.name, "dtype": t.dtype, "shape": list(t.shape), "bytes": t.nbytes, "file": t.path.name}
                for t in self.tensors
            ],
        }


def inspect(source: str | os.PathLike[str]) -> Inspection:
    """Names, shapes, dtypes and sizes of a `.safetensors` file, a model folder or an adapter.

    Reads headers (and adapter_config.json, and an adapter's scalars) only. Raises CheckpointError when it cannot be read;
    an adapter that taskvec refuses is still inspected, and `refused` says why.
    """
    folder = locate_peft(source)
    if folder is None:
        weights = Checkpoint.open(source)
        return _inspection(weights) if locate_adapter(source) is None else _inspection(weights, *_adapter(source, {}))
    adapter = AdapterFolder.open(folder)
    known = {"family": adapter.family, "base": adapter.named_base}
    return _inspection(adapter.weights, *_adapter(folder, known))


def _adapter(source: str | os.PathLike[str], known: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """What there is to know about an adapter beyond what is `known`, and why it is refused, if it is."""
    try:
        adapter = open_adapter(source)
        return {"family": adapter.family, **known, **adapter.summary()}, None
    except TaskvecError as error:
        return known, str(error)


def _inspection(checkpoint: Checkpoint, adapter: dict[str, Any] | None = None, refused: str | None = None) -> Inspection:
    files = [{"name": s.path.name, "bytes": s.identity.size, "tensors": len(s.tensors)} for s in checkpoint.shards]
    metadata = {key: value for shard in checkpoint.shards for key, value in shard.metadata.items()}
    return Inspection(checkpoint.label, files, list(checkpoint.tensors.values()), metadata, adapter, refused)
