"""Everything is decided here, before a byte is written: (base, vector, options) -> for every output shard its header and
its jobs. Pure and deterministic; every refusal that names and headers can tell happens here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import FileIdentity
from ..checkpoint.folder import SideFile, side_files
from ..checkpoint.header import DTYPE_BITS, StoredTensor, encode_header
from ..delta.source import FLOATS, LowRankDelta, Resolved, ScaledDelta
from ..delta.vector import TaskVector, formula
from ..errors import NameMismatchError, UsageError, listing, show
from .jobs import TILE_BYTES, Job, ShardPlan, Term

OUT_DTYPES = {"same": None, "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_LARGEST_FLOAT32 = 3.4028234663852886e38
_STEMS = ("model", "diffusion_pytorch_model")  # what loaders look for; any other name would not be found


@dataclass(frozen=True)
class Options:
    """What changes the output. The run's own settings (device, threads) are not here: they change no byte of it.

    Attributes:
        out_dtype: one of OUT_DTYPES; "same" keeps every tensor's own dtype.
        max_shard_size: bytes of tensor data per output file, or text like 5GB; None keeps base's shard map.
        include, exclude: shell-style patterns of tensor names; what they leave out is copied.
    """

    out_dtype: str = "same"
    max_shard_size: int | str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a run will do. `print(plan)` is the dry run; `plan.summary()` the same as plain data."""

    base: Checkpoint
    vector: TaskVector
    options: Options
    single_file: bool
    shards: tuple[ShardPlan, ...]
    side: tuple[SideFile, ...]
    notes: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    identities: dict[Path, FileIdentity] = field(default_factory=dict, repr=False)

    @property
    def jobs(self) -> list[Job]:
        return [job for shard in self.shards for job in shard.jobs]

    @property
    def edited(self) -> list[Job]:
        return [job for job in self.jobs if job.terms]

    @property
    def bytes_to_read(self) -> int:
        return sum(t.nbytes for job in self.jobs for t in (*job.elementwise, *job.factors))

    @property
    def bytes_to_write(self) -> int:
        return sum(shard.size for shard in self.shards) + sum(file.nbytes for file in self.side)

    @property
    def formula(self) -> str:
        return f"edited = {self.base.label} {formula(self.vector)}"

    def buffer_bytes(self, workers: int) -> int:
        """An upper bound of the memory the run's own buffers take, in bytes: tiles and the factors of one tensor each."""
        streams = max((len(job.elementwise) for job in self.jobs), default=1)
        widest = max((DTYPE_BITS[t.dtype] // 8 for job in self.jobs for t in job.elementwise), default=1)
        narrowest = min((max(1, DTYPE_BITS[job.dtype] // 8) for job in self.jobs), default=1)
        elements = TILE_BYTES // narrowest
        factors = max((sum(t.elements * 4 + t.nbytes for t in job.factors) for job in self.jobs), default=0)
        return workers * (elements * (streams * widest + 6 * 4) + factors)

    def summary(self) -> dict[str, Any]:
        """The plan as plain data, JSON-ready."""
        edited = self.edited
        return {
            "formula": self.formula,
            "tensors_edited": len(edited),
            "tensors_copied": len(self.jobs) - len(edited),
            "elements_edited": sum(job.base.elements for job in edited),
            "bytes_to_read": self.bytes_to_read,
            "bytes_to_write": self.bytes_to_write,
            "shards": [
                {"name": s.name, "bytes": s.size, "tensors": len(s.jobs), "edited": sum(bool(j.terms) for j in s.jobs)}
                for s in self.shards
            ],
            "side_files": [file.name for file in self.side],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        s = self.summary()
        lines = [
            s["formula"],
            f"edit {s['tensors_edited']} tensors ({s['elements_edited']} elements), copy {s['tensors_copied']}",
            f"read {s['bytes_to_read']} bytes, write {s['bytes_to_write']} bytes in {len(self.shards)} files",
            *(f"  {f['name']}: {f['bytes']} bytes, {f['tensors']} tensors, {f['edited']} edited" for f in s["shards"]),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def make_plan(base: Checkpoint, vector: TaskVector, options: Options, *, single_file: bool = False) -> Plan:
    """Decide the whole run.

    Raises UsageError for options that make no sense, MismatchError (its kinds) when base and vector do not fit.
    """
    out_dtype = _out_dtype(options)
    base.refuse_quantized()
    keep = _name_filter(options, base)
    resolved = [(coefficient, source.resolve(base, keep)) for coefficient, source in vector.terms if coefficient != 0]
    terms = _collect_terms(resolved)
    if not terms and any(coefficient != 0 for coefficient, _ in vector.terms):
        raise NameMismatchError(f"{show(base.path)}: no tensor is edited: the vector has no float tensor of its names")
    compared = {name: tensor for _, found in resolved for name, tensor in found.compared.items()}
    side, notes = ([], []) if single_file else side_files(base, out_dtype)
    shards = _layout(base, terms, compared, options, out_dtype, single_file)
    opened = [base, *(checkpoint for _, source in vector.terms for checkpoint in source.inputs)]
    return Plan(
        base=base,
        vector=vector,
        options=options,
        single_file=single_file,
        shards=shards,
        side=tuple(side),
        notes=tuple(dict.fromkeys(note for _, found in resolved for note in found.notes)) + tuple(notes),
        missing=tuple(dict.fromkeys(name for _, found in resolved for name in found.missing)),
        unused=tuple(dict.fromkeys(name for _, found in resolved for name in found.unused)),
        identities={shard.path: shard.identity for checkpoint in opened for shard in checkpoint.shards},
    )


def factors_to_check(plan: Plan) -> list[StoredTensor]:
    """The stored tensors of adapters, each once: they are small, and one NaN in them spoils a whole weight."""
    found: dict[StoredTensor, None] = {}
    for job in plan.jobs:
        found.update(dict.fromkeys(job.factors))
        found.update((d.value, None) for _, d in job.terms if isinstance(d, ScaledDelta))
    return list(found)


def _out_dtype(options: Options) -> str | None:
    if options.out_dtype not in OUT_DTYPES:
        raise UsageError(f"out_dtype {show(options.out_dtype)}, expected one of {', '.join(OUT_DTYPES)}")
    return OUT_DTYPES[options.out_dtype]


def _name_filter(options: Options, base: Checkpoint) -> Callable[[str], bool]:
    """Which tensor names are edited. Raises UsageError for a pattern that matches no tensor: it is a typing error."""
    for option, patterns in (("--include", options.include), ("--exclude", options.exclude)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in base.tensors) and option == "--include":
                raise UsageError(
                    f"{option} '{show(pattern)}' matches no tensor of {show(base.path)}",
                    hint=f"Its names are like {listing(base.tensors, 3)}",
                )

    def keep(name: str) -> bool:
        included = not options.include or any(fnmatch.fnmatchcase(name, p) for p in options.include)
        return included and not any(fnmatch.fnmatchcase(name, p) for p in options.exclude)

    return keep


def _collect_terms(resolved: Iterable[tuple[float, Resolved]]) -> dict[str, tuple[Term, ...]]:
    terms: dict[str, tuple[Term, ...]] = {}
    for coefficient, found in resolved:
        for name, delta in found.deltas.items():
            scale = delta.scale if isinstance(delta, (LowRankDelta, ScaledDelta)) else 1.0
            if abs(coefficient * scale) > _LARGEST_FLOAT32:
                raise UsageError(f"the coefficient {coefficient * scale:g} of {show(name)} is outside float32")
            terms[name] = (*terms.get(name, ()), Term(-coefficient, delta))
    return terms


def _layout(
    base: Checkpoint,
    terms: dict[str, tuple[Term, ...]],
    compared: dict[str, StoredTensor],
    options: Options,
    out_dtype: str | None,
    single_file: bool,
) -> tuple[ShardPlan, ...]:
    groups = _groups(base, options, out_dtype, single_file)
    names = _shard_names(base, len(groups))
    shards = []
    for name, (tensors, metadata) in zip(names, groups):
        dtypes = [_dtype(tensor, out_dtype) for tensor in tensors]
        sizes = [tensor.elements * DTYPE_BITS[dtype] // 8 for tensor, dtype in zip(tensors, dtypes)]
        header = encode_header(
            [(t.name, dtype, t.shape, size) for t, dtype, size in zip(tensors, dtypes, sizes)],
            {"format": "pt", **metadata},
        )
        jobs, at = [], len(header)
        for tensor, dtype, size in zip(tensors, dtypes, sizes):
            own = terms.get(tensor.name, ())
            jobs.append(Job(tensor.name, dtype, tensor.shape, at, size, tensor, own, compared.get(tensor.name)))
            at += size
        shards.append(ShardPlan(name, header, tuple(jobs), at))
    return tuple(shards)


def _dtype(tensor: StoredTensor, out_dtype: str | None) -> str:
    return out_dtype if out_dtype and tensor.dtype in FLOATS else tensor.dtype


def _groups(
    base: Checkpoint, options: Options, out_dtype: str | None, single_file: bool
) -> list[tuple[Sequence[StoredTensor], dict[str, str]]]:
    """The tensors of each output file, and its `__metadata__`: base's shard map, one file, or cut by size."""
    shared: dict[str, str] = {}
    for shard in base.shards:
        shared.update(shard.metadata)
    everything = list(base.tensors.values())
    if options.max_shard_size is None:
        if single_file:
            return [(everything, shared)]
        return [(shard.tensors, dict(shard.metadata)) for shard in base.shards]
    sizes = {t.name: t.elements * DTYPE_BITS[_dtype(t, out_dtype)] // 8 for t in everything}
    groups = [([base.tensors[name] for name in names], shared) for names in _split(sizes, options.max_shard_size)]
    if single_file and len(groups) > 1:
        raise UsageError(
            f"one output file, but max_shard_size {options.max_shard_size} needs {len(groups)}",
            hint="Name a folder as output, or leave out --max-shard-size",
        )
    return list(groups)


def _split(sizes: dict[str, int], limit: int | str) -> list[list[str]]:
    """Names grouped in order so that each group is at most `limit` bytes, or one tensor."""
    from huggingface_hub import split_state_dict_into_shards_factory

    size = int(limit) if isinstance(limit, str) and limit.strip().isdigit() else limit
    try:
        if isinstance(size, int) and size <= 0:
            raise ValueError
        split = split_state_dict_into_shards_factory(
            sizes, get_storage_size=lambda nbytes: nbytes, filename_pattern="{suffix}", max_shard_size=size
        )
    except ValueError as error:
        expected = "expected a positive number of bytes or text like 5GB or 500MB"
        raise UsageError(f"max_shard_size {show(limit)}, {expected}") from error
    return list(split.filename_to_tensors.values())


def _shard_names(base: Checkpoint, count: int) -> list[str]:
    origin = base.index.name if base.index else base.shards[0].path.name
    stem = next((stem for stem in _STEMS if origin.startswith(stem + ".safetensors")), _STEMS[0])
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
