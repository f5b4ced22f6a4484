"""Random matrices that all modules of an adapter share: in the file, or only the seed they were drawn from."""

from __future__ import annotations

from ...checkpoint.checkpoint import same_bytes
from ...checkpoint.header import StoredTensor
from ...errors import show
from .adapter import Module
from .config import AdapterFolder

_MERGE = "Merge it with PEFT where it was trained (merge_and_unload, save_pretrained) and subtract the merged model"


def check_saved(folder: AdapterFolder) -> None:
    """Raises AdapterError when the file holds no projection, but a seed: torch does not promise the same numbers again."""
    if not folder.config.get("save_projection", True):
        raise folder.refuse("save_projection is false: its random matrices are not in the file, only their seed is", _MERGE)


def projection(module: Module, name: str) -> StoredTensor:
    """The shared tensor of that name. Raises AdapterError when there is none, or the module has a copy that differs."""
    shared = module.shared.get(name)
    if shared is None:
        raise module.refuse(f"the file has no base_model.{name}, the random matrix that all modules share", _MERGE)
    copy = module.tensors.get(name)
    if copy is not None and not _alike(copy, shared):
        raise module.refuse(f"{show(copy.name)} should be a copy of {show(shared.name)}, but differs")
    return shared


def _alike(copy: StoredTensor, shared: StoredTensor) -> bool:
    return (copy.dtype, copy.shape) == (shared.dtype, shared.shape) and same_bytes(copy, shared)
