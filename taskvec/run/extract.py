"""Saving a task vector: the run of an edit whose base is zeros. 0 − (−1)·Δ is Δ, streamed, staged and committed like any
output.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint, fingerprint, same_bytes
from ..checkpoint.files import IN_MEMORY, InputFiles, absent
from ..checkpoint.header import DTYPE_BITS, StoredTensor, encode_header
from ..delta.dense import FineTune
from ..delta.source import AdapterSource, DeltaSource
from ..delta.stored import KIND, METADATA_KEY
from ..delta.vector import TaskVector, formula, when_saved
from ..delta.weighting import leaf
from ..errors import UsageError, counted, listing, show
from .edited import PathLike, edited_checkpoint, workers_for
from .inputs import check_factors, download
from .jobs import CHECKSUM_PLACE, Job, ShardPlan, tiles
from .name_filter import patterns
from .output import RECORD, Target, check_space, check_target
from .plan import OUT_DTYPES, Matched, Options, Plan, identities, match, shard_names, split_by_size

if TYPE_CHECKING:
    from .stream import RunResult, Settings, ShardResult

_DTYPES = ("float32", "bfloat16", "float16")
_SHARD = "5GB"  # of a vector folder
_HASHED = 1 << 20  # bytes per read
_NOWHERE = Path("<zeros>")  # where a tensor of zeros is stored


def _zero(buffer: memoryview, offset: int) -> None:
    buffer[:] = bytes(len(buffer))


IN_MEMORY[_NOWHERE] = _zero


@dataclass(frozen=True)
class SavedVector:
    """What was written. `zero`: tensors that are left out, since nothing changed in them. `warnings`: what a person must
    know of the numbers. Sizes in bytes."""

    output: Path
    output_name: str
    formula: str
    tensors: tuple[str, ...]
    zero: tuple[str, ...]
    bytes_written: int
    seconds: float
    notes: tuple[str, ...]
    warnings: tuple[str, ...] = ()

    def summary(self) -> dict[str, Any]:
        """As plain data, JSON-ready: what `--json` prints."""
        return {
            "ok": True,
            "output": self.output_name,
            "formula": self.formula,
            "tensors": len(self.tensors),
            "zero_tensors_omitted": list(self.zero),
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "warnings": list(self.warnings),
        }


def save_vector(
    vector: TaskVector,
    output: PathLike,
    *,
    base: Checkpoint | PathLike | None = None,
    dtype: str = "float32",
    max_shard_size: int | str | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    overwrite: bool = False,
    device: str = "cpu",
    jobs: int | None = None,
    memory: int | str | None = None,
    fsync: bool = True,
    progress: Callable[[int], None] = lambda written: None,
    shard_done: Callable[[ShardResult], None] = lambda result: None,
    planned: Callable[[Plan], None] = lambda plan: None,
) -> SavedVector:
    """Write Δ of every tensor that changed, by the names of `base`, as safetensors: one file, or a folder of shards.

    Args:
        output: a file when it ends in `.safetensors`, else a folder.
        base: the model whose names and shapes the vector has; by default what it is the difference from.
        dtype: "float32" (exact where float32 differences are), "bfloat16" or "float16".
        max_shard_size: of a folder, bytes or text like "5GB".
        include, exclude, overwrite, device, jobs, memory, fsync, progress, shard_done, planned: as in
            `EditedCheckpoint.save`.

    Raises UsageError, MismatchError, CheckpointError or OutputError, each naming the file; then nothing was made.
    """
    started = time.perf_counter()
    if dtype not in _DTYPES:
        raise UsageError(f"dtype {show(dtype)}, expected one of {', '.join(_DTYPES)}")
    target = Target.of(output)
    model = base_of(vector) if base is None else base if isinstance(base, Checkpoint) else Checkpoint.open(base)
    size = _SHARD if max_shard_size is None and not target.single_file else max_shard_size
    options = Options(dtype, size, patterns(include), patterns(exclude))
    check_target(target, [model, *(c for _, source in vector.terms for c in source.inputs)], overwrite)
    plan = vector_plan(model, vector, options, single_file=target.single_file)
    check_factors(plan)
    check_space(target, plan.bytes_to_write, plan.to_download)
    from . import stream
    from .device import open_device

    where = open_device(device)
    workers = workers_for(plan, where, jobs, memory)
    download(plan)
    zero = _zero_tensors(plan)
    kept = [job.name for job in plan.jobs if job.name not in zero]
    plan = vector_plan(model, vector, options, single_file=target.single_file, names=set(kept), sources=_hashes(plan))
    planned(plan)
    settings = stream.Settings(
        workers=workers, batch=where.batch, fsync=fsync, make_kernel=where.make_kernel, progress=progress,
        shard_done=shard_done,
    )  # fmt: skip
    differing = _differing(model, vector, options)
    result = _write(plan, target, settings, where.name, overwrite)
    return SavedVector(
        output=target.path,
        output_name=target.typed,
        formula=formula(vector).removeprefix("+ "),
        tensors=tuple(kept),
        zero=tuple(zero),
        bytes_written=plan.bytes_to_write - sum(s.size for s in plan.shards if s.name in result.reused),
        seconds=time.perf_counter() - started,
        notes=(*plan.notes, *result.notes),
        warnings=tuple(_warnings(plan, result, differing)),
    )


def extract(
    base: Checkpoint | PathLike,
    tuned: TaskVector | Checkpoint | PathLike,
    *,
    output: PathLike,
    alpha: float = 1.0,
    **options: Any,
) -> SavedVector:
    """Save alpha · (tuned − base): what `taskvec extract` does. `tuned` is a checkpoint, an adapter or a TaskVector."""
    edited = edited_checkpoint(base, tuned, alpha, None)
    return save_vector(edited.vector, output, base=edited.base, **options)


def vector_plan(
    base: Checkpoint,
    vector: TaskVector,
    options: Options,
    *,
    single_file: bool,
    names: Collection[str] | None = None,
    sources: dict[str, str] | None = None,
) -> Plan:
    """The plan of a saved vector: a job per tensor that changes (of `names`, if given), each starting from zeros.

    `sources`: name of an input file -> its SHA-256, for the metadata.
    """
    matched = match(base, vector, options)
    everything = {**base.tensors, **{name: t._replace(name=name) for name, t in matched.added.items()}}
    changed = [t for name, t in everything.items() if name in matched.terms and (names is None or name in names)]
    plan = Plan(base, vector, options, single_file, (), (), matched.notes, identities=identities(base, vector))
    about = _about(plan, matched, changed, sources or {})
    return replace(plan, shards=tuple(_shards(changed, matched, plan, about)))


def _shards(tensors: list[StoredTensor], matched: Matched, plan: Plan, about: dict[str, Any]) -> Iterator[ShardPlan]:
    dtype = OUT_DTYPES[plan.options.out_dtype] or "F32"
    sizes = {tensor.name: tensor.elements * DTYPE_BITS[dtype] // 8 for tensor in tensors}
    limit = plan.options.max_shard_size
    groups = [list(sizes)] if limit is None or not sizes else split_by_size(sizes, limit)
    if plan.single_file and len(groups) > 1:
        raise UsageError(
            f"one output file, but max_shard_size {limit} needs {len(groups)}",
            hint="Name a folder as output, or leave out --max-shard-size",
        )
    held = {tensor.name: tensor for tensor in tensors}
    text = json.dumps(about, ensure_ascii=False, sort_keys=True)
    metadata = {"format": "pt", METADATA_KEY: text.encode("utf-8", "backslashreplace").decode()}
    for file, group in zip(shard_names("vector", len(groups)), groups):
        header = encode_header([(name, dtype, held[name].shape, sizes[name]) for name in group], metadata)
        jobs, at = [], len(header)
        for name in group:
            jobs.append(Job(name, dtype, held[name].shape, at, sizes[name], _zeros(held[name]), matched.terms[name]))
            at += sizes[name]
        yield ShardPlan(file, header, tuple(jobs), at)


def _zeros(tensor: StoredTensor) -> StoredTensor:
    """Zeros of the tensor's shape, in the dtype its Δ is computed in."""
    dtype = "F64" if tensor.dtype == "F64" else "F32"
    return tensor._replace(dtype=dtype, path=_NOWHERE, offset=0, nbytes=tensor.elements * DTYPE_BITS[dtype] // 8)


def _about(plan: Plan, matched: Matched, tensors: list[StoredTensor], sources: dict[str, str]) -> dict[str, Any]:
    """What the file says about itself: what it is the difference of, and how to know the base it fits."""
    from . import record

    return {
        **record.recipe(plan, None),
        "kind": KIND,
        "formula": formula(plan.vector).removeprefix("+ "),
        "shapes_sha256": plan.base.shapes_sha256,
        "tensors_sha256": fingerprint(tensors),
        "sha256": sources,
        "added": {name: tensor.name for name, tensor in _starts(plan.base, matched).items()},
        "config": matched.config,
        **({"checksum_kind": record.CHECKSUM_KIND, "checksum": CHECKSUM_PLACE} if plan.single_file else {}),
    }


def _starts(base: Checkpoint, matched: Matched) -> dict[str, StoredTensor]:
    """Added tensor -> the tensor of base that it starts from."""
    places = {tensor[2:]: tensor for tensor in base.tensors.values()}  # all but name and dtype
    return {name: places[tensor[2:]] for name, tensor in matched.added.items()}


def _differing(base: Checkpoint, vector: TaskVector, options: Options) -> list[str]:
    """Tensors that are not floats, and others in a tuned model: a vector does not hold them."""
    compared = match(base, vector, options).compared
    return [n for n, others in compared.items() if not all(same_bytes(base.tensors[n], other) for other in others)]


def _warnings(plan: Plan, result: RunResult, differing: list[str]) -> Iterator[str]:
    """What the numbers of the file are not, or hold besides numbers; and whose licence they are under."""
    from .card import inputs_of, licence_note

    licences = licence_note(inputs_of(plan), with_card=not plan.single_file)
    if licences:
        yield licences
    dtype, counts = plan.options.out_dtype, result.counts
    overflowed = [name for name, did in counts.items() if did.overflow]
    if overflowed:
        number = counted(sum(did.overflow for did in counts.values()), "element")
        yield f"{number} overflowed {dtype}, in {listing(overflowed)}"
    nonfinite = [name for name, did in counts.items() if did.nonfinite > did.overflow]
    if nonfinite:
        number = counted(sum(counts[name].nonfinite - counts[name].overflow for name in nonfinite), "element")
        yield f"{number} inf or NaN, as an input is there, in {listing(nonfinite)}"
    lost = sum(did.lost for did in counts.values()) if dtype != "float32" else 0
    if lost:
        yield f"the difference of {counted(lost, 'element')} was lost to rounding into {dtype}"
    doubles = [job.name for job in plan.jobs if job.base.dtype == "F64"]
    if doubles:
        yield f"{counted(len(doubles), 'tensor')} float64 in the base, rounded to {dtype} here: {listing(doubles)}"
    if differing:
        yield f"{counted(len(differing), 'tensor')} not floats, other in tuned and not in the vector: {listing(differing)}"


def _write(plan: Plan, target: Target, settings: Settings, device: str, overwrite: bool) -> RunResult:
    from . import record, stream
    from .card import vector_card
    from .journal import identify
    from .staging import Staging

    identity = identify(plan, device, sha256=settings.sha256)
    with Staging(target, fsync=settings.fsync, overwrite=overwrite, run=(plan, identity)) as staging:
        result = stream.execute(plan, staging.path, settings, staging.journal)
        result.notes += staging.notes
        if not target.single_file:
            if len(plan.shards) > 1:
                staging.write("vector.safetensors.index.json", record.index_json(plan))
            staging.write("README.md", vector_card(plan, result))
            about = json.loads(plan_metadata(plan))
            staging.write(RECORD, record.finished({**about, **record.outcome(plan, result)}, staging.path))
        staging.commit()
    return result


def plan_metadata(plan: Plan) -> str:
    """What the metadata of the planned files say."""
    header = json.loads(plan.shards[0].header[8:])
    return str(header["__metadata__"][METADATA_KEY])


def base_of(vector: TaskVector) -> Checkpoint:
    """What the vector is the difference from, if its sources agree."""
    origins = [_origin(leaf(source)) for _, source in vector.terms]
    known = [origin for origin in origins if origin is not None]
    if not known or any(origin != known[0] for origin in known):
        named = listing(dict.fromkeys(origin.label for origin in known)) or "none is known"
        raise UsageError(
            f"the base of {show(formula(vector), 2000)} is not certain: {named}",
            hint="Name it with base=",
        )
    return known[0]


def _origin(source: DeltaSource) -> Checkpoint | None:
    return source.origin if isinstance(source, (FineTune, AdapterSource)) else None


def _zero_tensors(plan: Plan) -> dict[str, None]:
    """Tensors that would be saved as zeros. One that would not is left at its first tile with a number in it."""
    from .native import cpu_kernel
    from .worker import Worker

    files = InputFiles(plan.identities)
    zero: dict[str, None] = {}
    try:
        worker = Worker(files, cpu_kernel)
        for job in plan.jobs:
            every = tiles(job.dtype, job.shape, job.nbytes)
            if not any(worker.compute(job, (tile,), worker.read(job, (tile,)))[1].changed for tile in every):
                zero[job.name] = None
    finally:
        files.close()
    return zero


def _hashes(plan: Plan) -> dict[str, str]:
    """input/file -> SHA-256 of every weight file the vector is made of."""
    opened = [plan.base, *(checkpoint for _, source in plan.vector.terms for checkpoint in source.inputs)]
    files = InputFiles(plan.identities)
    found: dict[str, str] = {}
    buffer = bytearray(_HASHED)
    try:
        for label, shard in {shard.path: (c.label, shard) for c in opened for shard in c.shards}.values():
            digest = hashlib.sha256()
            remote = absent(shard.path)  # the Hub knows it of a file that is not needed here
            known = remote[0].sha256.get(remote[1]) if remote is not None else None
            for at in range(0, shard.identity.size if known is None else 0, _HASHED):
                part = memoryview(buffer)[: min(_HASHED, shard.identity.size - at)]
                files.read(shard.path, part, at, "")
                digest.update(part)
            file = os.path.basename(shard.path)
            name = label if label == file else f"{label}/{file}"
            again = sum(other == name or other.startswith(f"{name} (") for other in found)  # two inputs of one name
            found[f"{name} ({again + 1})" if again else name] = known or digest.hexdigest()
    finally:
        files.close()
    return found


when_saved(save_vector)

__all__ = ["SavedVector", "extract", "save_vector", "vector_plan"]
