"""Everything is decided here, before a byte is written: (base, vector, options) -> for every output shard its header and
its jobs. Pure and deterministic; every refusal that names and headers can tell happens here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.code import ModelCode, along
from ..checkpoint.files import FileIdentity, absent, remote_above, size_of
from ..checkpoint.folder import SideFile
from ..checkpoint.header import DTYPE_BITS, StoredTensor, encode_header
from ..delta.source import FLOATS, FormulaDelta, LowRankDelta, Resolved, ScaledDelta
from ..delta.stored import METADATA_KEY, told
from ..delta.vector import TaskVector, formula
from ..delta.weighting import leaf
from ..errors import NameMismatchError, UsageError, counted, show
from .jobs import KEPT_FACTORS, LARGE_FACTOR, TILE_BYTES, Job, ShardPlan, Term, matrix_shape, unit_bytes
from .name_filter import NameFilter

OUT_DTYPES = {"same": None, "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}
_SCRATCH = 4  # arrays of a tile's elements that the numpy kernel holds in the arithmetic's dtype
_PASSING = 28  # bytes per element of masks and of what a repair needs for a moment (tests/run/test_stream.py measures it)
_EVALUATED = 80  # bytes per element that a formula's tile takes: W, Δ and what lies between, in float64
_LARGEST_FLOAT32 = 3.4028234663852886e38
_STEMS = ("model", "diffusion_pytorch_model")  # what loaders look for; any other name would not be found


@dataclass(frozen=True)
class Options:
    """What changes the output. The run's own settings (device, threads) are not here: they change no byte of it.

    Attributes:
        out_dtype: one of OUT_DTYPES; "same" keeps every tensor's own dtype.
        max_shard_size: bytes of tensor data per output file, or text like 5GB; None keeps base's shard map.
        include, exclude: shell-style patterns of tensor names; what they leave out is copied.
        code: whether the Python files that the model's configs name come along.
    """

    out_dtype: str = "same"
    max_shard_size: int | str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    code: bool = True

    def __post_init__(self) -> None:
        """One number has one spelling: it is written into outputs, whose bytes must not depend on where it came from."""
        size = self.max_shard_size
        number = isinstance(size, Integral) and not isinstance(size, bool)
        if number or (isinstance(size, str) and re.fullmatch("[0-9]{1,15}", size)):
            object.__setattr__(self, "max_shard_size", int(size))  # type: ignore[arg-type]


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
    code: ModelCode = field(default_factory=ModelCode)

    @property
    def jobs(self) -> list[Job]:
        return [job for shard in self.shards for job in shard.jobs]

    @property
    def edited(self) -> list[Job]:
        return [job for job in self.jobs if job.terms]

    @property
    def bytes_to_read(self) -> int:
        return sum(shard.bytes_to_read for shard in self.shards)

    @property
    def bytes_to_write(self) -> int:
        return sum(shard.size for shard in self.shards) + sum(file.nbytes for file in self.side)

    @property
    def inputs(self) -> tuple[Checkpoint, ...]:
        """Base, and what each term of the vector is of, in the order of the formula; one that has two parts stands twice."""
        return (self.base, *(checkpoint for _, source in self.vector.terms for checkpoint in source.inputs))

    @property
    def to_download(self) -> dict[Path, int]:
        """Files that have to come from the Hub first -> their sizes in bytes."""
        read = (t.path for job in self.jobs for t in (*job.elementwise, *job.factors, *job.surveyed))
        side = (file.source for file in self.side if file.content is None)
        cards = (checkpoint.readme for checkpoint in self.inputs if not self.single_file)
        wanted = dict.fromkeys((*read, *side, *(card for card in cards if card is not None)))
        return {path: size_of(path) for path in wanted if absent(path) is not None}

    @property
    def formula(self) -> str:
        return f"edited = {self.base.label} {formula(self.vector)}"

    def buffer_bytes(self, batch: int = TILE_BYTES) -> int:
        """An upper bound of the memory one worker's buffers take, in bytes: a batch, and the factors of one tensor."""
        factors = {8 * factor.elements for job in self.jobs for factor in job.factors}
        kept = KEPT_FACTORS * max((nbytes for nbytes in factors if nbytes >= LARGE_FACTOR), default=0)
        return max((_buffer_bytes(job, batch) for job in self.jobs), default=0) + kept

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
            "bytes_to_download": sum(self.to_download.values()),
            "files_to_download": [path.name for path in self.to_download],
            "buffer_bytes_per_worker": self.buffer_bytes(),
            "shards": [
                {"name": s.name, "bytes": s.size, "tensors": len(s.jobs), "edited": sum(bool(j.terms) for j in s.jobs)}
                for s in self.shards
            ],
            "side_files": [file.name for file in self.side],
            "code": list(self.code.files),
            "code_left_out": list(self.code.left),
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
        if s["files_to_download"]:
            number = counted(len(s["files_to_download"]), "file")
            lines.append(f"first download {human_bytes(s['bytes_to_download'])} from the Hub, {number}")
        if s["side_files"]:
            lines.append(f"copy along {', '.join(show(name) for name in s['side_files'])}")
        lines += [f"code {self.code}"] if str(self.code) else []
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
    factors = sum(stored.nbytes + 16 * stored.elements for stored in job.factors)
    formulas = [(d.formula, d.origin) for _, d, _ in job.terms if isinstance(d, FormulaDelta)]
    tile = units * (widths + 2 * unit_bytes(job.dtype) + _SCRATCH * width + _PASSING + 4 * len(job.terms) + width)
    return tile + factors + sum(units * _EVALUATED + formula.scratch(*matrix_shape(w)) for formula, w in formulas)


def make_plan(base: Checkpoint, vector: TaskVector, options: Options, *, single_file: bool = False) -> Plan:
    """Decide the whole run.

    Raises UsageError for options that make no sense, MismatchError (its kinds) when base and vector do not fit.
    """
    out_dtype = _out_dtype(options)
    matched = match(base, vector, options)
    side, code, notes = along(None if single_file else base, out_dtype, matched.config, options.code)
    return Plan(
        base=base,
        vector=vector,
        options=options,
        single_file=single_file,
        shards=_layout(base, matched, options, out_dtype, single_file),
        side=tuple(side),
        notes=matched.notes + tuple(notes) + tuple(_cached_only(base, vector)),
        missing=matched.missing,
        unused=matched.unused,
        identities=identities(base, vector),
        code=code,
    )


def _cached_only(base: Checkpoint, vector: TaskVector) -> Iterator[str]:
    """What to say of inputs of the Hub when it was not reached."""
    opened = [base, *(checkpoint for _, source in vector.terms for checkpoint in source.inputs)]
    for checkpoint in {checkpoint.path: checkpoint for checkpoint in opened}.values():
        found, place = remote_above(checkpoint.path), checkpoint.hub
        if found is not None and found[0].cached_only and place is not None:
            what = f"{show(checkpoint.label)} is commit {place.commit} as the cache has it"
            yield f"the Hub was not reached: {what}, and only files that are in it"


class Matched(NamedTuple):
    """A vector matched to a base: what all its terms say together, per tensor of the base."""

    terms: dict[str, tuple[Term, ...]]
    compared: dict[str, tuple[StoredTensor, ...]]
    added: dict[str, StoredTensor]
    config: dict[str, Any]
    notes: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def match(base: Checkpoint, vector: TaskVector, options: Options) -> Matched:
    """Raises UsageError for patterns that choose nothing, MismatchError (its kinds) when base and vector do not fit."""
    base.refuse_quantized()
    if told(base) is not None:
        raise NameMismatchError(
            f"{show(base.path)}: a saved task vector, expected a model", hint="Name the model first, then the vector"
        )
    keep = NameFilter(options.include, options.exclude)
    resolved = [(coefficient, source.resolve(base, keep)) for coefficient, source in vector.terms]
    keep.check_used(base, vector)
    _check_patterns(resolved)
    effective = [(coefficient, found) for coefficient, found in resolved if coefficient != 0]
    _share_untied(effective, base, keep)
    terms = _collect_terms(resolved)
    holding = [source for _, source in vector.terms if any(checkpoint.tensors for checkpoint in leaf(source).inputs)]
    if holding and not any(found.deltas for _, found in resolved):
        raise NameMismatchError(f"{show(base.path)}: no tensor is edited: the vector has no float tensor of its names")
    compared: dict[str, tuple[StoredTensor, ...]] = {}
    for _, found in effective:
        for name, tensor in found.compared.items():
            compared[name] = (*compared.get(name, ()), tensor)
    return Matched(
        terms=terms,
        compared=compared,
        added={name: tensor for _, found in effective for name, tensor in found.added.items()},
        config={key: value for _, found in effective for key, value in found.config.items()},
        notes=tuple(dict.fromkeys(note for _, found in resolved for note in found.notes)),
        missing=tuple(dict.fromkeys(name for _, found in resolved for name in found.missing)),
        unused=tuple(dict.fromkeys(name for _, found in resolved for name in found.unused)),
    )


def _share_untied(resolved: list[tuple[float, Resolved]], base: Checkpoint, keep: Callable[[str], bool]) -> None:
    """Where one term unties a tensor from another, what other terms add to the two, one tensor to them, goes to both."""
    added = {name: tensor for _, found in resolved for name, tensor in found.added.items() if keep(name)}
    for name, tensor in added.items():
        start = next(own for own, held in base.tensors.items() if (held.path, held.offset) == (tensor.path, tensor.offset))
        for _, found in resolved:
            if name in found.added or start not in found.deltas:
                continue
            found.deltas[name] = found.deltas[start]
            found.masks.update({name: found.masks[start]} if start in found.masks else {})
            found.factors.update({name: found.factors[start]} if start in found.factors else {})


def identities(base: Checkpoint, vector: TaskVector) -> dict[Path, FileIdentity]:
    """What pins every input file, by its path."""
    opened = [base, *(checkpoint for _, source in vector.terms for checkpoint in source.inputs)]
    return {shard.path: shard.identity for checkpoint in opened for shard in checkpoint.shards}


def _out_dtype(options: Options) -> str | None:
    if options.out_dtype not in OUT_DTYPES:
        raise UsageError(f"out_dtype {show(options.out_dtype)}, expected one of {', '.join(OUT_DTYPES)}")
    return OUT_DTYPES[options.out_dtype]


def _collect_terms(resolved: Iterable[tuple[float, Resolved]]) -> dict[str, tuple[Term, ...]]:
    terms: dict[str, tuple[Term, ...]] = {}
    for coefficient, found in resolved:
        for name, delta in found.deltas.items():
            scale = delta.scale if isinstance(delta, (LowRankDelta, ScaledDelta)) else 1.0
            own = coefficient * found.factors.get(name, 1.0)
            if not abs(own * scale) <= _LARGEST_FLOAT32:
                raise UsageError(f"the coefficient {own * scale:g} of {show(name)} is outside float32")
            if own != 0:  # nothing of it: base is copied as it is, whatever tuned holds
                terms[name] = (*terms.get(name, ()), Term(-own, delta, found.masks.get(name, ())))
    return terms


def _check_patterns(resolved: Iterable[tuple[float, Resolved]]) -> None:
    used: dict[tuple[str, str], bool] = {}
    for _, found in resolved:
        used.update({pattern: did or used.get(pattern, False) for pattern, did in found.patterns.items()})
    for (what, pattern), did in used.items():
        if not did:
            raise UsageError(
                f"{what} '{show(pattern)}' chooses no tensor that is edited",
                hint="It matches no name, or only names that a pattern before it matches",
            )


def _layout(
    base: Checkpoint, matched: Matched, options: Options, out_dtype: str | None, single_file: bool
) -> tuple[ShardPlan, ...]:
    groups = _groups(base, options, out_dtype, single_file, matched.added)
    names = shard_names(_stem(base), len(groups))
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
            own, compared = matched.terms.get(tensor.name, ()), matched.compared.get(tensor.name, ())
            jobs.append(Job(tensor.name, dtype, tensor.shape, at, size, tensor, own, compared))
            at += size
        shards.append(ShardPlan(name, header, tuple(jobs), at))
    return tuple(shards)


def _dtype(tensor: StoredTensor, out_dtype: str | None) -> str:
    return out_dtype if out_dtype and tensor.dtype in FLOATS else tensor.dtype


def _groups(
    base: Checkpoint, options: Options, out_dtype: str | None, single_file: bool, added: Mapping[str, StoredTensor]
) -> list[tuple[Sequence[StoredTensor], dict[str, str]]]:
    """The tensors of each output file, and its `__metadata__`: base's shard map, one file, or cut by size. An added tensor
    goes where the tensor lies that it starts from."""
    shared: dict[str, str] = {}
    for shard in base.shards:
        shared.update(shard.metadata)
    new = [tensor._replace(name=name) for name, tensor in added.items()]
    everything = [*base.tensors.values(), *new]
    if options.max_shard_size is None:
        if single_file:
            return [(everything, shared)]
        return [((*s.tensors, *(t for t in new if t.path == s.path)), dict(s.metadata)) for s in base.shards]
    sizes = {t.name: t.elements * DTYPE_BITS[_dtype(t, out_dtype)] // 8 for t in everything}
    named = {tensor.name: tensor for tensor in everything}
    groups = [([named[name] for name in names], shared) for names in split_by_size(sizes, options.max_shard_size)]
    if single_file and len(groups) > 1:
        raise UsageError(
            f"one output file, but max_shard_size {options.max_shard_size} needs {len(groups)}",
            hint="Name a folder as output, or leave out --max-shard-size",
        )
    return list(groups)


def split_by_size(sizes: dict[str, int], limit: int | str) -> list[list[str]]:
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


def _stem(base: Checkpoint) -> str:
    origin = base.index.name if base.index else base.shards[0].path.name
    return next((stem for stem in _STEMS if origin.startswith(stem + ".safetensors")), _STEMS[0])


def shard_names(stem: str, count: int) -> list[str]:
    """The names of the files of one checkpoint, as transformers and the Hub expect them."""
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
