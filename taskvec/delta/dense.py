"""The task vector of a full fine-tune: Δ = tuned − origin, tensor by tensor (Ilharco et al. 2023, section 2)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from ..checkpoint.checkpoint import Checkpoint, same_bytes
from ..checkpoint.header import StoredTensor
from ..errors import AdapterError, NameMismatchError, ShapeMismatchError, counted, listing, show
from .source import FLOATS, DenseDelta, Resolved

_ADAPTER_NAMES = re.compile(r"lora_|\.lora\.|hada_w|lokr_w|oft_|\.alpha$|ia3_l|vera_lambda|dora_scale")
_HEADS = ("lm_head.weight", "embed_out.weight")  # the output embeddings that transformers ties to the input ones


@dataclass(frozen=True)
class FineTune:
    """Δ = tuned − origin. Both checkpoints may be sharded differently from each other and from the edited one."""

    tuned: Checkpoint
    origin: Checkpoint

    @property
    def label(self) -> str:
        return f"({self.tuned.label} − {self.origin.label})"

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.tuned, self.origin)

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        """Δ for every float tensor of `base` that `keep` admits.

        Raises ShapeMismatchError for another shape or kind of number, NameMismatchError when nothing fits.
        """
        self.tuned.refuse_quantized()
        self.origin.refuse_quantized()
        found = Resolved()
        ties = _Ties(self.tuned, self.origin, base)
        missing: list[str] = []
        for name, tensor in base.tensors.items():
            if not keep(name):
                continue
            tuned = self.tuned.tensors.get(name) or ties.tuned_twin(tensor)
            origin = self.origin.tensors.get(name) or ties.origin_twin(tensor)
            if tuned is None or origin is None:
                missing.append(name)
                continue
            _add(found, tensor, tuned, origin)
        _check_overlap(self, base, found, missing)
        if missing:
            found.notes.append(f"{counted(len(missing), 'tensor')} only in {show(base.label)}, copied: {listing(missing)}")
        found.missing.extend(missing)
        _note_extra(self.tuned, base, keep, ties, found)
        return found


def _add(found: Resolved, base: StoredTensor, tuned: StoredTensor, origin: StoredTensor) -> None:
    _check_shape(base, tuned)
    _check_shape(base, origin)
    if base.dtype in FLOATS:
        for other in (tuned, origin):
            if other.dtype not in FLOATS:
                raise ShapeMismatchError(
                    f"{show(other.path)}: tensor {show(base.name)}: found {other.dtype}, expected floats as in "
                    f"{show(base.path)} ({base.dtype})",
                    hint=f"Leave it out with --exclude '{show(base.name)}'",
                )
        found.deltas[base.name] = DenseDelta(tuned, origin)
    elif tuned.dtype != base.dtype:
        found.notes.append(f"{show(base.name)} is {base.dtype} in the base and {tuned.dtype} in tuned: copied as it is")
    else:
        found.compared[base.name] = tuned


def _check_shape(base: StoredTensor, other: StoredTensor) -> None:
    if base.shape == other.shape:
        return
    resized = base.shape[1:] == other.shape[1:] and len(base.shape) == 2
    raise ShapeMismatchError(
        f"{show(other.path)}: tensor {show(base.name)}: found shape {list(other.shape)}, expected {list(base.shape)} "
        f"as in {show(base.path)}",
        hint=("Its vocabulary was resized; give both the same size first, or leave it" if resized else "Leave it")
        + f" out with --exclude '{show(base.name)}'",
    )


def _check_overlap(source: FineTune, base: Checkpoint, found: Resolved, missing: list[str]) -> None:
    if found.deltas or found.compared or not missing:
        return
    other = source.tuned if not any(name in source.tuned.tensors for name in missing) else source.origin
    factors = [name for name in other.tensors if _ADAPTER_NAMES.search(name)]
    if factors:
        raise AdapterError(
            f"{show(other.path)}: holds tensors of an adapter ({listing(factors, 2)}), and is read as a model here",
            hint="Give its path: an adapter is not opened as a Checkpoint",
        )
    raise NameMismatchError(
        f"{show(other.path)}: no tensor name in common with {show(base.path)}: found "
        f"{listing(other.tensors, 2)}, expected {listing(base.tensors, 2)}",
        hint="These are different models, or one was saved with another prefix",
    )


def _note_extra(tuned: Checkpoint, base: Checkpoint, keep: Callable[[str], bool], ties: _Ties, found: Resolved) -> None:
    extra = [name for name in tuned.tensors if name not in base.tensors and keep(name)]
    unknown = []
    for name in extra:
        twin = ties.twin(tuned, tuned.tensors[name])
        if twin is not None and twin.name in base.tensors:
            found.notes.append(f"{show(name)} of {show(tuned.label)} equals its {show(twin.name)} (tied): folded into it")
        elif name.endswith(_HEADS):
            raise NameMismatchError(
                f"{show(tuned.tensors[name].path)}: tensor {show(name)} is untied (no other tensor equals it), but "
                f"{show(base.path)} has none of that name: its head is tied to the embeddings",
                hint=f"Leave it out with --exclude '{show(name)}'",
            )
        else:
            unknown.append(name)
    if unknown:
        found.notes.append(f"{counted(len(unknown), 'tensor')} only in {show(tuned.label)}, not used: {listing(unknown)}")
    found.unused.extend(unknown)


class _Ties:
    """Which tensors are tied, decided by the bytes: one model stores a head that another leaves to its embeddings."""

    def __init__(self, tuned: Checkpoint, origin: Checkpoint, base: Checkpoint) -> None:
        self._tuned, self._origin, self._base = tuned, origin, base

    def tuned_twin(self, tensor: StoredTensor) -> StoredTensor | None:
        return self._counterpart(self._tuned, tensor)

    def origin_twin(self, tensor: StoredTensor) -> StoredTensor | None:
        return self._counterpart(self._origin, tensor)

    def _counterpart(self, other: Checkpoint, tensor: StoredTensor) -> StoredTensor | None:
        """What plays the part of base's `tensor` in `other`, which lacks the name: the counterpart of base's twin."""
        if not tensor.name.endswith(_HEADS):
            return None
        twin = self.twin(self._base, tensor)
        if twin is not None and twin.name in other.tensors:
            return other.tensors[twin.name]
        raise NameMismatchError(
            f"{show(other.path)}: no tensor {show(tensor.name)}: its head is tied to its embeddings, but "
            f"{show(tensor.path)} has a head of its own",
            hint=f"Leave it out with --exclude '{show(tensor.name)}'",
        )

    def twin(self, checkpoint: Checkpoint, tensor: StoredTensor) -> StoredTensor | None:
        """Another tensor of `checkpoint` with the same bytes, if there is one."""
        if not tensor.name.endswith(_HEADS):
            return None
        for other in checkpoint.tensors.values():
            if other.name != tensor.name and other[1:3] == tensor[1:3] and same_bytes(other, tensor):
                return other
        return None
