"""Computing an output again from the inputs of its record: the plan that made it, and what differs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import InputFiles
from ..delta.adapters import open_adapter
from ..delta.dense import FineTune
from ..delta.source import DeltaSource
from ..delta.stored import KIND, StoredVector
from ..delta.vector import TaskVector, formula
from ..delta.weighting import Depth, Masked, Scaled, Selected
from ..errors import CheckpointError, counted, show
from .extract import vector_plan
from .jobs import Job
from .output import RECORD
from .plan import Options, Plan, make_plan
from .record import counts_of, hashed, totals
from .relocate import Places, inputs, key

if TYPE_CHECKING:
    from .kernel import Counts

_UNTOUCHED = {"changed": 0}


def plan_again(checkpoint: Checkpoint, content: dict[str, Any], places: Places) -> Plan:
    """The plan that made the output, its inputs being in `places`. Raises UsageError, MismatchError or OverflowError for an
    edit that cannot be made, CheckpointError for an input that cannot be read, or is another one by now."""
    base = Checkpoint.open(places[key("base", content["base"])])
    terms: list[tuple[float, DeltaSource]] = []
    for term in content["vector"]:
        terms.append((float(term["coefficient"]), _source_again(term, places)))
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


def found_wrong(
    plan: Plan, checkpoint: Checkpoint, content: dict[str, Any], names: Collection[str], did: dict[str, Counts]
) -> Iterator[str]:
    """What is wrong with these tensors, or with what the record says of them. `did` takes what the edit did to each."""
    recorded = content.get("tensors")
    for job, wrong, counts in differing(plan, checkpoint, names):
        if wrong and job.copied:
            yield f"{show(job.name)}: is not base's: {counted(wrong, 'byte')} different, or base changed"
        elif wrong:
            yield f"{show(job.name)}: is not {show(plan.formula)}: {wrong} elements differ, or an input changed"
        elif job.copied:
            if isinstance(recorded, dict) and (job.name in recorded) != bool(counts.differs):
                yield f"{show(job.name)}: {counted(counts.differs, 'byte')} other in tuned, and the record says otherwise"
        else:
            did[job.name] = counts
            said = recorded.get(job.name, _UNTOUCHED) if isinstance(recorded, dict) else counts_of(counts)
            if said != counts_of(counts):
                yield f"{show(job.name)}: the record says {show(said)} of it, and it is {counts_of(counts)}"


def misstated(
    plan: Plan, checkpoint: Checkpoint, content: dict[str, Any], places: Places, did: dict[str, Counts]
) -> Iterator[str]:
    """What the record says of the whole edit and is not so. `did`: of the tensors that were computed again; of the others
    the record's own numbers are added up."""
    vector = content.get("kind") == KIND
    expected: dict[str, Any] = {}
    if all(places[key(role, recorded)].name == recorded["name"] for role, recorded in inputs(content)):
        expected["formula"] = formula(plan.vector).removeprefix("+ ") if vector else plan.formula
    if checkpoint.folder is not None:
        named = _numbers_of(content["tensors"])
        for name in _unlike_names(plan, named):
            yield f"{RECORD}: tensor {show(name)}: its numbers are missing, or are of one that is only copied"
        if not vector:
            expected |= {"only_in_base": list(plan.missing), "only_in_tuned": list(plan.unused)}
            expected |= totals(plan, {**named, **did})
            if any(not job.copied and job.name not in did for job in plan.jobs):
                del expected["elements_lost_to_rounding"]  # no sum of what is lost in each
    said = {**content, **content.get("changes", {})}
    for what, value in expected.items():
        if said.get(what) != value:
            yield f"{RECORD}: {what}: {show(said.get(what))}, expected {show(value)}"


def _unlike_names(plan: Plan, named: Collection[str]) -> list[str]:
    """Tensors that the record has numbers of and should not, or the other way round; of an empty one it may have none."""
    possible = {job.name for job in plan.jobs if not job.copied or job.compared}
    needed = {job.name for job in plan.jobs if not job.copied and job.nbytes}
    return sorted({*named} - possible | needed - {*named})


def _numbers_of(tensors: dict[str, dict[str, int]]) -> dict[str, Counts]:
    from .kernel import Counts

    return {
        name: Counts(
            n["changed"] + n.get("lost", 0), n["changed"], *(n.get(k, 0) for k in ("overflow", "nonfinite", "differs"))
        )
        for name, n in tensors.items()
    }


def _hash(content: bytes) -> tuple[int, str]:
    return len(content), hashlib.sha256(content).hexdigest()


def _options(settings: dict[str, Any]) -> Options:
    include, exclude = tuple(settings["include"]), tuple(settings["exclude"])
    return Options(settings["out_dtype"], settings["max_shard_size"], include, exclude, bool(settings.get("code", True)))


def _source_again(term: dict[str, Any], places: Places) -> DeltaSource:
    source = _input_again(term, places)
    for view in term.get("through", []):
        if "masks" in view:
            source = Masked(source, Checkpoint.open(places[key("masks", view["masks"])]))
        elif "only" in view:
            source = Selected(source, tuple(view["only"]), tuple(view["without"]))
        else:
            depth = None if view["depth"] is None else Depth(*map(float, view["depth"]))
            patterns = tuple((str(pattern), float(value)) for pattern, value in view["patterns"])
            source = Scaled(source, patterns, depth, float(view["otherwise"]))
    return source


def _input_again(term: dict[str, Any], places: Places) -> DeltaSource:
    place = {role: places[key(role, term[role])] for role in ("tuned", "origin", "stored", "adapter") if role in term}
    if "stored" in term:
        return StoredVector.open(place["stored"], force_base=bool(term["force_base"]))
    if "adapter" in term:
        adapter = open_adapter(place["adapter"])
        if adapter.config_sha256 != term["config_sha256"]:
            raise CheckpointError(f"the config of adapter {show(adapter.label)} is another one by now")
        return adapter.trained_on(Checkpoint.open(place["origin"])) if "origin" in term else adapter
    return FineTune(Checkpoint.open(place["tuned"]), Checkpoint.open(place["origin"]))


__all__ = ["differing", "found_wrong", "misstated", "plan_again", "unlike_base", "unlike_plan"]
