"""What an output says about itself: `taskvec.json`, and the metadata of a single output file. Deterministic: no
time, no machine, no absolute path; an input is known by its name, sizes and header digests, and where it lay relative
to the output only if both were under the working directory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..checkpoint import files
from ..checkpoint.checkpoint import Checkpoint
from ..delta.dense import FineTune
from ..delta.source import AdapterSource, DeltaSource
from ..delta.stored import METADATA_KEY, StoredVector
from ..delta.weighting import Masked, Scaled, Selected
from .jobs import CHECKSUM_PLACE
from .plan import Plan

if TYPE_CHECKING:
    from .kernel import Counts
    from .stream import RunResult

FORMAT = 2  # of the record; from 2 on it lists the small files, and is sealed
FORMATS = (1, 2)  # that are known here
CARD = "README.md"
SEAL = "record_sha256"
_HASHED = 1 << 20  # bytes per read
CHECKSUM_KIND = "xxh3-128 over the header and the xxh3-128 of every tile"


def recipe(plan: Plan, output: Path | None) -> dict[str, Any]:
    """What was computed from what: enough to do it again, given the inputs. With `output`, also where they lie from there."""
    import numpy as np

    return {
        "format": FORMAT,
        "taskvec": __version__,
        "numpy": np.__version__,
        "formula": plan.formula,
        "base": _input(plan.base, output),
        "vector": [{"coefficient": c, **_source(source, output)} for c, source in plan.vector.terms],
        "options": asdict(plan.options),
    }


def full_record(plan: Plan, result: RunResult, output: Path) -> dict[str, Any]:
    """The recipe, a checksum for every weight file, and what the edit did to every tensor."""
    return {
        **recipe(plan, output),
        **outcome(plan, result),
        "changes": changes(plan, result),
        "only_in_base": list(plan.missing),
        "only_in_tuned": list(plan.unused),
    }


def outcome(plan: Plan, result: RunResult) -> dict[str, Any]:
    """The files that were written, with their checksums, and what happened to every tensor."""
    return {
        "checksum": CHECKSUM_KIND,
        "shards": [{key: value for key, value in shard._asdict().items() if value is not None} for shard in result.shards],
        "side_files": [file.name for file in plan.side],
        "tensors": tensor_changes(plan, result),
    }


def finished(content: dict[str, Any], folder: Path) -> bytes:
    """`taskvec.json` of a folder that is complete but for it: `content`, what the small files of it are, and a seal."""
    return as_json(sealed({**content, "files": side_records(folder, content)}))


def side_records(folder: Path, content: dict[str, Any]) -> list[dict[str, Any]]:
    """Name, size in bytes and SHA-256 of every file of an output that is no weight file, nor its record."""
    found = []
    for name in small_files(content):
        if files.exists(folder / name):
            nbytes, sha256 = hashed(folder / name)
            found.append({"name": name, "bytes": nbytes, "sha256": sha256})
    return found


def small_files(content: dict[str, Any]) -> Iterator[str]:
    """What an output of this record may hold besides weights and the record: side files, the index, the card."""
    yield from map(str, content.get("side_files") or [])
    if index := index_name(content):
        yield index
    yield CARD


def index_name(content: dict[str, Any]) -> str | None:
    """The name of the index; None where one weight file needs none."""
    names = [str(shard["name"]) for shard in content.get("shards") or []]
    return names[0].partition("-00001-of-")[0] + ".safetensors.index.json" if len(names) > 1 else None


def hashed(path: Path) -> tuple[int, str]:
    """Size in bytes and SHA-256 of a file, read a little at a time."""
    fd = files.open_input(path)
    try:
        size, digest = files.identity(fd, path).size, hashlib.sha256()
        buffer = memoryview(bytearray(min(_HASHED, max(1, size))))
        for at in range(0, size, len(buffer)):
            part = buffer[: min(len(buffer), size - at)]
            files.read_exact(fd, part, at, path=path)
            digest.update(part)
        return size, digest.hexdigest()
    finally:
        files.close_input(fd)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """A record with a digest of all else in it: one that was edited by hand is found out. It is no signature."""
    bare = {key: value for key, value in content.items() if key != SEAL}
    text = json.dumps(bare, sort_keys=True)
    return {**bare, SEAL: hashlib.sha256(text.encode()).hexdigest()}


def single_file_metadata(plan: Plan) -> dict[str, str]:
    """`__metadata__` of a single output file: the recipe, and the place its checksum will take. The same wherever the file
    is written, since it is part of it."""
    content = {**recipe(plan, None), "checksum_kind": CHECKSUM_KIND, "checksum": CHECKSUM_PLACE}
    text = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return {METADATA_KEY: text.encode("utf-8", "backslashreplace").decode()}


def tensor_changes(plan: Plan, result: RunResult) -> dict[str, dict[str, int]]:
    """What happened to every tensor that is not a plain copy, in elements; zeros are left out, `changed` is not."""
    return {job.name: counts_of(result.counts[job.name]) for job in plan.jobs if job.name in result.counts}


def changes(plan: Plan, result: RunResult) -> dict[str, int]:
    """Totals over all tensors, in tensors, elements and bytes."""
    return totals(plan, result.counts)


def totals(plan: Plan, did: Mapping[str, Counts]) -> dict[str, int]:
    """As `changes`, given what the edit did to each tensor."""
    from .kernel import Counts

    total = Counts()
    for counts in did.values():
        total.add(counts)
    edited = plan.edited
    return {
        "tensors_edited": len(edited),
        "tensors_copied": len(plan.jobs) - len(edited),
        "elements": sum(job.base.elements for job in plan.jobs),
        "elements_edited": sum(job.base.elements for job in edited),
        "elements_changed": total.changed,
        "elements_lost_to_rounding": total.lost,
        "elements_overflowed": total.overflow,
        "elements_not_finite": total.nonfinite,
        "copied_tensors_that_differ": sum(bool(counts.differs) for counts in did.values()),
    }


def as_json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def index_json(plan: Plan) -> bytes:
    """`X.safetensors.index.json`: which file holds which tensor, and the true size of all tensor data in bytes."""
    elements = sum(job.base.elements for job in plan.jobs)
    weight_map = {job.name: shard.name for shard in plan.shards for job in shard.jobs}
    return as_json(index(weight_map, elements, sum(job.nbytes for job in plan.jobs)))


def index(weight_map: dict[str, str], elements: int, nbytes: int) -> dict[str, Any]:
    """What an index says."""
    metadata = {"total_parameters": elements, "total_size": nbytes}
    return {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}


def counts_of(counts: Counts) -> dict[str, int]:
    found = {"changed": counts.changed, "lost": counts.lost, "overflow": counts.overflow}
    found |= {"nonfinite": counts.nonfinite, "differs": counts.differs}
    return {key: value for key, value in found.items() if value or key == "changed"}


def _source(source: DeltaSource, output: Path | None) -> dict[str, Any]:
    """A term of the vector: its input, and innermost first what it is seen through."""
    if isinstance(source, FineTune):
        return {"tuned": _input(source.tuned, output), "origin": _input(source.origin, output)}
    if isinstance(source, StoredVector):
        return {"stored": _input(source.checkpoint, output), "force_base": source.force_base}
    if isinstance(source, (Scaled, Selected, Masked)):
        inner = _source(source.source, output)
        inner.setdefault("through", []).append(_view(source, output))
        return inner
    assert isinstance(source, AdapterSource)
    found: dict[str, Any] = {"adapter": _input(source.weights, output), "family": source.family}
    found["config_sha256"] = source.config_sha256
    if source.origin is not None:
        found["origin"] = _input(source.origin, output)
    return found


def _view(view: Scaled | Selected | Masked, output: Path | None) -> dict[str, Any]:
    if isinstance(view, Scaled):
        depth = None if view.depth is None else [view.depth.first, view.depth.last]
        return {"patterns": [list(pair) for pair in view.patterns], "depth": depth, "otherwise": view.otherwise}
    if isinstance(view, Selected):
        return {"only": list(view.only), "without": list(view.without)}
    return {"masks": _input(view.masks, output)}


def _input(checkpoint: Checkpoint, output: Path | None) -> dict[str, Any]:
    files = [
        {"name": shard.path.name, "bytes": shard.identity.size, "header_sha256": shard.header_sha256}
        for shard in checkpoint.shards
    ]
    found: dict[str, Any] = {"name": checkpoint.label, "files": files}
    if checkpoint.hub is not None:
        found |= {"repository": checkpoint.hub.id, "revision": checkpoint.hub.commit, "path": checkpoint.hub.path}
    here, path = Path.cwd().resolve(), Path(os.path.abspath(checkpoint.path))
    if output is not None and path.is_relative_to(here) and output.is_relative_to(here):
        found["from_output"] = Path(os.path.relpath(path, output)).as_posix()
    return found
