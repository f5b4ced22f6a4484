"""Everything is decided here, before a byte is written: (base, vector, options) -> for every output shard its header and
its jobs. Pure and deterministic; every refusal that names and headers can tell happens here.
"""

from __future__ import annotations

import fnmatch
import re
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
from ..errors import NameMismatchError, UsageError, counted, listing, show
from .jobs import METADATA_KEY, TILE_BYTES, Job, ShardPlan, Term, unit_bytes

OUT_DTYPES = {"same": None, "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_SCRATCH = 4  # arrays of a tile's elements that the numpy kernel holds in the arithmetic's dtype
_PASSING = 28  # bytes per element of masks and of what a repair needs for a moment (tests/run/test_stream.py measures it)
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

    def buffer_bytes(self, batch: int = TILE_BYTES) -> int:
        """An upper bound of the memory one worker's buffers take, in bytes: a batch, and the factors of one tensor."""
        return max((_buffer_bytes(job, batch) for job in self.jobs), default=0)

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
            "buffer_bytes_per_worker": self.buffer_bytes(),
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
            show(s["formula"], 2000),
            f"edit {counted(s['tensors_edited'], 'tensor')} ({s['elements_edited']:,} elements), copy {s['tensors_copied']}",
            f"read {human_bytes(s['bytes_to_read'])}, write {human_bytes(s['bytes_to_write'])}, "
            f"buffers of at most {human_bytes(s['buffer_bytes_per_worker'])} per worker",
            *(f"  {f['name']}  {human_bytes(f['bytes'])}, {f['tensors']} tensors, {f['edited']} edited" for f in s["shards"]),
        ]
        if s["side_files"]:
            lines.append(f"copy along {', '.join(show(name) for name in s['side_files'])}")
        return "\n".join(lines + [f"note: {note}" for note in s["notes"]])


def human_bytes(size: float) -> str:
    """Decimal units, as disks and the Hub count."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"


def _buffer_bytes(job: Job, batch: int) -> int:
    units = min(batch, job.nbytes) // unit_bytes(job.dtype)
    widths = sum(unit_bytes(stored.dtype) for stored in job.elementwise)
    if job.copied:
        return units * (widths + 1)
    width = 8 if job.base.dtype == "F64" else 4
    factors = sum(stored.nbytes + 8 * stored.elements for stored in job.factors)
    return units * (widths + 2 * unit_bytes(job.dtype) + _SCRATCH * width + _PASSING + 4 * len(job.terms)) + factors


def make_plan(base: Checkpoint, vector: TaskVector, options: Options, *, single_file: bool = False) -> Plan:
    """Decide the whole run.

    Raises UsageError for options that make no sense, MismatchError (its kinds) when base and vector do not fit.
    """
    out_dtype = _out_dtype(options)
    base.refuse_quantized()
    keep = _name_filter(options, base, vector)
    resolved = [(coefficient, source.resolve(base, keep)) for coefficient, source in vector.terms]
    terms = _collect_terms(resolved)
    if not any(found.deltas for _, found in resolved) and vector.terms:
        raise NameMismatchError(f"{show(base.path)}: no tensor is edited: the vector has no float tensor of its names")
    compared: dict[str, tuple[StoredTensor, ...]] = {}
    for coefficient, found in resolved:
        for name, tensor in found.compared.items() if coefficient != 0 else ():
            compared[name] = (*compared.get(name, ()), tensor)
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


def _name_filter(options: Options, base: Checkpoint, vector: TaskVector) -> Callable[[str], bool]:
    """Which tensor names are edited. Raises UsageError for a pattern that matches no tensor: it is a typing error."""
    opened = [base, *(checkpoint for _, source in vector.terms for checkpoint in source.inputs)]
    known = {"--include": base.tensors, "--exclude": dict.fromkeys(name for c in opened for name in c.tensors)}
    for option, patterns in (("--include", options.include), ("--exclude", options.exclude)):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in known[option]):
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
            if coefficient != 0:  # nothing of it: base is copied as it is, whatever tuned holds
                terms[name] = (*terms.get(name, ()), Term(-coefficient, delta))
    return terms


def _layout(
    base: Checkpoint,
    terms: dict[str, tuple[Term, ...]],
    compared: dict[str, tuple[StoredTensor, ...]],
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
            {"format": "pt", **{key: value for key, value in metadata.items() if key != METADATA_KEY}},
            data_like=tensors[0].offset if tensors and out_dtype is None else 0,  # so that blocks can be shared with base
        )
        jobs, at = [], len(header)
        for tensor, dtype, size in zip(tensors, dtypes, sizes):
            own = terms.get(tensor.name, ())
            jobs.append(Job(tensor.name, dtype, tensor.shape, at, size, tensor, own, compared.get(tensor.name, ())))
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

    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda nbytes: nbytes,
        filename_pattern="{suffix}",
        max_shard_size=parse_bytes("max_shard_size", limit),
    )
    return list(split.filename_to_tensors.values())


def parse_bytes(option: str, size: int | str) -> int:
    """A number of bytes from a number or text like 5GB (decimal, as on the Hub). Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([kmgt]?b?)\s*", str(size).lower())
    number = round(float(found[1]) * 1000 ** " kmgt".index(found[2].rstrip("b") or " ")) if found else 0
    if number <= 0:
        raise UsageError(f"{option} {show(size)}, expected a positive number of bytes or text like 5GB or 500MB")
    return number


def _shard_names(base: Checkpoint, count: int) -> list[str]:
    origin = base.index.name if base.index else base.shards[0].path.name
    stem = next((stem for stem in _STEMS if origin.startswith(stem + ".safetensors")), _STEMS[0])
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
