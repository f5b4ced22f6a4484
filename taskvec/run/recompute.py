"""Computing an output again from the inputs of its record: where they lie, the plan that made it, and what differs."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import InputFiles, exists
from ..checkpoint.locate import ADAPTER_WEIGHTS, locate_peft
from ..checkpoint.repository import cached
from ..delta.adapters import open_adapter
from ..delta.dense import FineTune
from ..delta.source import DeltaSource
from ..delta.stored import KIND, StoredVector
from ..delta.vector import TaskVector
from ..delta.weighting import Depth, Masked, Scaled, Selected
from ..errors import CheckpointError, TaskvecError, counted, show
from .extract import vector_plan
from .jobs import Job
from .plan import Options, Plan, make_plan
from .record import counts_of, hashed

if TYPE_CHECKING:
    from .kernel import Counts


def plan_again(checkpoint: Checkpoint, content: dict[str, Any], against: list[Path]) -> Plan:
    """The plan that made the output. Raises CheckpointError when an input is not found, or is another one by now."""
    home = checkpoint.path.resolve()
    base = Checkpoint.open(_find(content["base"], home, against))
    terms: list[tuple[float, DeltaSource]] = []
    for term in content["vector"]:
        terms.append((float(term["coefficient"]), _source_again(term, home, against)))
    options, vector, single_file = _options(content["options"]), TaskVector(tuple(terms)), checkpoint.folder is None
    if content.get("kind") == KIND:
        return vector_plan(base, vector, options, single_file=single_file, names=set(checkpoint.tensors))
    return make_plan(base, vector, options, single_file=single_file)


def unlike_plan(plan: Plan, checkpoint: Checkpoint) -> Iterator[str]:
    """Tensors that the output should not have, lacks, or has in another dtype or shape."""
    planned = {job.name: job for job in plan.jobs}
    for name in sorted(planned.keys() - checkpoint.tensors.keys()):
        yield f"{show(name)}: a tensor that is missing"
    for name, found in checkpoint.tensors.items():
        job = planned.get(name)
        if job is None:
            yield f"{show(name)}: a tensor that {show(plan.formula)} does not have"
        elif (job.dtype, job.shape) != (found.dtype, found.shape):
            yield (f"{show(name)}: {found.dtype} {list(found.shape)}, expected {job.dtype} {list(job.shape)}")


def unlike_base(plan: Plan, folder: Path) -> Iterator[str]:
    """Side files that are not what the base, as it is now, would give."""
    for file in plan.side:
        expected = hashed(file.source) if file.content is None else _hash(file.content)
        try:
            found = hashed(folder / file.name)
        except CheckpointError:  # said already, if it should be there
            continue
        if found != expected:
            made = "that of" if file.content is None else "what the edit makes of that of"
            yield f"{show(file.name)}: is not {made} {show(plan.base.label)}, or that one changed since"


def differing(plan: Plan, checkpoint: Checkpoint, names: Collection[str]) -> Iterator[tuple[Job, int, Counts]]:
    """Of each of these tensors, computed again tile by tile: how many elements (bytes, if it is a copy) differ from the
    stored ones, and what the edit did."""
    import numpy as np

    from ..checkpoint.floats import words
    from .jobs import tiles, unit_bytes
    from .kernel import Counts, NumpyKernel
    from .worker import Worker

    files = InputFiles({**plan.identities, **{shard.path: shard.identity for shard in checkpoint.shards}})
    try:
        worker = Worker(files, NumpyKernel)
        for job in (job for job in plan.jobs if job.name in names):
            stored, wrong, did = checkpoint.tensors[job.name], 0, Counts()
            for tile in tiles(job.dtype, job.shape, job.nbytes):
                out, counts = worker.compute(job, (tile,), worker.read(job, (tile,)))
                written = np.empty(len(out), np.uint8)
                files.read(stored.path, written.data, stored.offset + tile.start * unit_bytes(job.dtype), job.name)
                pair = (out, written) if job.copied else (words(out, job.dtype), words(written, job.dtype))
                wrong += int(np.count_nonzero(pair[0] != pair[1]))
                did.add(counts)
            yield job, wrong, did
    finally:
        files.close()


def found_wrong(plan: Plan, checkpoint: Checkpoint, content: dict[str, Any], names: Collection[str]) -> Iterator[str]:
    """What is wrong with these tensors, or with what the record says of them."""
    recorded = content.get("tensors")
    for job, wrong, did in differing(plan, checkpoint, names):
        if wrong and job.copied:
            yield f"{show(job.name)}: is not base's: {counted(wrong, 'byte')} different, or base changed"
        elif wrong:
            yield f"{show(job.name)}: is not {show(plan.formula)}: {wrong} elements differ, or an input changed"
        elif job.terms and isinstance(recorded, dict) and recorded.get(job.name) != counts_of(did):
            yield f"{show(job.name)}: the record says {recorded.get(job.name)} of it, and it is {counts_of(did)}"


def _hash(content: bytes) -> tuple[int, str]:
    return len(content), hashlib.sha256(content).hexdigest()


def _options(settings: dict[str, Any]) -> Options:
    include, exclude = tuple(settings["include"]), tuple(settings["exclude"])
    return Options(settings["out_dtype"], settings["max_shard_size"], include, exclude, bool(settings.get("code", True)))


def _source_again(term: dict[str, Any], home: Path, against: list[Path]) -> DeltaSource:
    source = _input_again(term, home, against)
    for view in term.get("through", []):
        if "masks" in view:
            source = Masked(source, Checkpoint.open(_find(view["masks"], home, against)))
        elif "only" in view:
            source = Selected(source, tuple(view["only"]), tuple(view["without"]))
        else:
            depth = None if view["depth"] is None else Depth(*map(float, view["depth"]))
            patterns = tuple((str(pattern), float(value)) for pattern, value in view["patterns"])
            source = Scaled(source, patterns, depth, float(view["otherwise"]))
    return source


def _input_again(term: dict[str, Any], home: Path, against: list[Path]) -> DeltaSource:
    if "stored" in term:
        return StoredVector.open(_find(term["stored"], home, against), force_base=bool(term["force_base"]))
    if "adapter" in term:
        adapter = open_adapter(_find(term["adapter"], home, against))
        if adapter.config_sha256 != term["config_sha256"]:
            raise CheckpointError(f"the config of adapter {show(adapter.label)} is another one by now")
        if "origin" in term:
            return adapter.trained_on(Checkpoint.open(_find(term["origin"], home, against)))
        return adapter
    tuned, origin = (Checkpoint.open(_find(term[key], home, against)) for key in ("tuned", "origin"))
    return FineTune(tuned, origin)


def _find(recorded: dict[str, Any], home: Path, against: list[Path]) -> Path:
    """The recorded input among the places it can be: same files, same sizes, same headers."""
    name = str(recorded["name"])
    places = [
        *against,
        *([Path(os.path.normpath(home / recorded["from_output"]))] if "from_output" in recorded else []),
    ]
    if Path(name).name == name:
        places += [home.parent / name, Path(name)]
    if "revision" in recorded:
        places.append(cached(str(recorded["repository"]), str(recorded["revision"])) / str(recorded["path"]))
    for place in places:
        if exists(place) and _is_recorded(place, recorded):
            return place
    raise CheckpointError(
        f"input {show(name)} of {show(home.name)} was not found, or is another one by now",
        hint="Say where it is with --against PATH",
    )


def _is_recorded(place: Path, recorded: dict[str, Any]) -> bool:
    try:
        folder = locate_peft(place)
        opened = Checkpoint.open(place if folder is None else folder / ADAPTER_WEIGHTS)
    except TaskvecError:
        return False
    found = {(s.path.name, s.identity.size, s.header_sha256) for s in opened.shards}
    return found == {(f["name"], f["bytes"], f["header_sha256"]) for f in recorded["files"]}


__all__ = ["differing", "found_wrong", "plan_again", "unlike_base", "unlike_plan"]
