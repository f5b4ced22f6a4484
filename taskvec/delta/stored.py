"""A task vector that was saved: a safetensors file of differences by the names of the base, with its story in `__metadata__`.

Any loader of safetensors reads it; `metadata["taskvec"]` is JSON that says what the numbers are the difference of.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.locate import parse_json
from ..errors import CheckpointError, MismatchError, NameMismatchError, ShapeMismatchError, counted, listing, show
from .source import FLOATS, Resolved, ScaledDelta

KIND = "vector"
METADATA_KEY = "taskvec"  # of `__metadata__`
HEAD = "lm_head.weight"  # the one tensor that a vector may add to a base
TIED = "tie_word_embeddings"  # of config.json: what an adapter that unties a head changes


@dataclass(frozen=True)
class StoredVector:
    """Δ as stored. `about` is what its metadata say; `force_base` takes it for a base of another fingerprint."""

    checkpoint: Checkpoint
    about: Mapping[str, Any] = field(compare=False)
    force_base: bool = False

    @classmethod
    def open(cls, source: Checkpoint | str | os.PathLike[str], *, force_base: bool = False) -> StoredVector:
        """Raises CheckpointError when it is not a vector that taskvec saved."""
        checkpoint = source if isinstance(source, Checkpoint) else Checkpoint.open(source)
        about = told(checkpoint)
        if about is None:
            raise CheckpointError(
                f"{show(checkpoint.path)}: not a saved task vector, its metadata do not say so",
                hint="Make one with `taskvec extract BASE TUNED -o VECTOR`",
            )
        _check_about(checkpoint, about)
        return cls(checkpoint, about, force_base)

    @property
    def label(self) -> str:
        return self.checkpoint.label

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        return (self.checkpoint,)

    def resolve(self, base: Checkpoint, keep: Callable[[str], bool]) -> Resolved:
        """Δ of every tensor it holds. Raises MismatchError when `base` is not of the names and shapes it was made for;
        with `force_base`, when a tensor that `keep` admits is not."""
        if not base.fits(self.about["shapes_sha256"]) and not self.force_base:
            raise MismatchError(
                f"{show(self.checkpoint.path)}: a vector of {show(self.about['base']['name'])}, and the names or "
                f"shapes of {show(base.path)} are others",
                hint="Take the model it was made for, or allow --force-base to edit what fits by name and shape",
            )
        found = Resolved()
        added = self.about["added"]
        known = {**base.tensors, **{n: base.tensors[o]._replace(name=n) for n, o in added.items() if o in base.tensors}}
        kept = {name: tensor for name, tensor in self.checkpoint.tensors.items() if keep(name)}
        unknown = [name for name in kept if name not in known]
        if unknown:
            raise NameMismatchError(
                f"{show(self.checkpoint.path)}: {counted(len(unknown), 'tensor')} that {show(base.path)} lacks: "
                f"{listing(unknown)}",
                hint=f"Leave it out with --exclude '{show(unknown[0])}'",
            )
        for name, value in kept.items():
            target = known[name]
            if value.shape != target.shape or target.dtype not in FLOATS or value.dtype not in FLOATS:
                raise ShapeMismatchError(
                    f"{show(value.path)}: tensor {show(name)}: found {value.dtype} {list(value.shape)}, expected floats of "
                    f"{list(target.shape)} for {target.dtype} in {show(target.path)}",
                    hint=f"Leave it out with --exclude '{show(name)}'",
                )
            found.deltas[name] = ScaledDelta(value, 1.0)
        found.unchanged.extend(n for n, t in base.tensors.items() if t.dtype in FLOATS and n not in kept and keep(n))
        found.added.update({name: known[name] for name in added if name in known and name not in base.tensors})
        found.config.update(self.about["config"] if found.added else {})
        return found


def _check_about(checkpoint: Checkpoint, about: Mapping[str, Any]) -> None:
    """Raises CheckpointError for metadata that a run could trip over, or that would change more of a config than a vector
    may: it says whether the head is tied, and nothing else."""
    base, added, config = about.get("base"), about.get("added"), about.get("config")
    if not isinstance(about.get("shapes_sha256"), str) or not isinstance(base, dict) or "name" not in base:
        raise CheckpointError(f"{show(checkpoint.path)}: its metadata name no base (base, shapes_sha256)")
    if about.get("tensors_sha256") != checkpoint.shapes_sha256:
        raise CheckpointError(
            f"{show(checkpoint.path)}: not the tensors its metadata were written for: a part of a vector, or changed since",
            hint="Name the folder, if it is one of several files",
        )
    if not isinstance(added, dict) or not set(added) <= {HEAD} or not all(isinstance(start, str) for start in added.values()):
        raise CheckpointError(f"{show(checkpoint.path)}: its metadata are damaged (added)")
    if not isinstance(config, dict) or any(key != TIED or type(value) is not bool for key, value in config.items()):
        raise CheckpointError(
            f"{show(checkpoint.path)}: its metadata set config.json to {show(config)}, expected at most {TIED}"
        )


def told(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the metadata of a saved vector say; None when it is not one. Raises CheckpointError when they begin to say so and
    cannot be read: it must not pass for a model."""
    said = [shard.metadata[METADATA_KEY] for shard in checkpoint.shards if METADATA_KEY in shard.metadata]
    if not said:
        return None
    try:
        content = parse_json(said[0])
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("kind", KIND) != KIND or len(set(said)) > 1:
        raise CheckpointError(
            f"{show(checkpoint.path)}: what its metadata say of taskvec is damaged, or its files do not belong together",
            hint="Make it again, or fetch it again",
        )
    return content if "kind" in content else None
