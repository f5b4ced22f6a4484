"""EditedCheckpoint, the lazy `checkpoint ± vector`, and the verbs `subtract` and `add`: plan, refuse, stream, commit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.header import encode_header
from ..checkpoint.locate import locate_adapter
from ..delta.stored import StoredVector, told
from ..delta.vector import TaskVector, finite, when_added
from ..errors import UsageError, counted, listing, show
from .inputs import check_factors, download
from .jobs import Job
from .name_filter import patterns
from .output import RECORD, Target, check_space, check_target
from .plan import Options, Plan, human_bytes, make_plan, parse_bytes

if TYPE_CHECKING:
    import torch

    from .device import Device
    from .stream import RunResult, Settings, ShardResult

PathLike = str | os.PathLike[str]

# Set by the room that can push: (edited, repo, **options) -> Pushed. Rooms do not import upwards.
_push: list[Callable[..., Any]] = []


def when_pushed(push: Callable[..., Any]) -> None:
    """Register what `edited.push_to_hub(…)` does."""
    _push[:] = [push]


@dataclass(frozen=True)
class Report:
    """What a run did. `changes`: totals in tensors and elements (keys as in taskvec.json); sizes in bytes; `notes`: of what
    an interrupted run had left."""

    output: Path
    output_name: str
    plan: Plan
    changes: dict[str, int]
    tensors: dict[str, dict[str, int]]
    bytes_read: int
    bytes_written: int
    seconds: float
    device: str
    notes: tuple[str, ...] = ()

    @property
    def warnings(self) -> list[str]:
        """What a person must know; nothing was lost by any of it."""
        from .card import inputs_of, licence_note

        found = [note for note in [licence_note(inputs_of(self.plan), with_card=not self.plan.single_file)] if note]
        if self.changes["elements_overflowed"]:
            names = [name for name, did in self.tensors.items() if did.get("overflow")]
            found.append(f"{self.changes['elements_overflowed']} elements overflowed, in {listing(names)}")
        nonfinite = [name for name, did in self.tensors.items() if did.get("nonfinite", 0) > did.get("overflow", 0)]
        if nonfinite:
            count = self.changes["elements_not_finite"] - self.changes["elements_overflowed"]
            found.append(
                f"{counted(count, 'element')} of the output inf or NaN, as an input is there, in {listing(nonfinite)}"
            )
        differ = [name for name, did in self.tensors.items() if did.get("differs")]
        if differ:
            found.append(
                f"{len(differ)} tensors are not floats and differ in the tuned model; base's were kept: {listing(differ)}"
            )
        if not self.changes["elements_edited"]:
            found.append("nothing was edited: every coefficient is 0, or the vector holds nothing")
        elif not self.changes["elements_changed"]:
            found.append("no element changed: the vector is zero, or every change was lost to rounding")
        return found

    def summary(self) -> dict[str, Any]:
        """The report as plain data, JSON-ready: what `--json` prints."""
        return {
            "ok": True,
            "output": self.output_name,
            "formula": self.plan.formula,
            "changes": self.changes,
            "bytes_read": self.bytes_read,
            "bytes_written": self.bytes_written,
            "seconds": round(self.seconds, 3),
            "device": self.device,
            "code": list(self.plan.code.files),
            "code_left_out": list(self.plan.code.left),
            "notes": [*self.plan.notes, *self.notes],
            "warnings": self.warnings,
        }


@dataclass(frozen=True)
class EditedCheckpoint:
    """`base + vector`, not computed yet."""

    base: Checkpoint
    vector: TaskVector

    def __add__(self, vector: TaskVector) -> EditedCheckpoint:
        return replace(self, vector=self.vector + vector)

    def __sub__(self, vector: TaskVector) -> EditedCheckpoint:
        return replace(self, vector=self.vector - vector)

    def plan(
        self,
        *,
        out_dtype: str = "same",
        max_shard_size: int | str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        output: PathLike | None = None,
        overwrite: bool = False,
        code: bool = True,
    ) -> Plan:
        """What `save` with the same options would do, decided from headers alone. `print` it for a dry run.

        Raises UsageError for options that make no sense, MismatchError when base and vector do not fit, and with
        `output` also OutputError when it cannot be made there.
        """
        options = Options(out_dtype, max_shard_size, patterns(include), patterns(exclude), code)
        target = None if output is None else Target.of(output)
        if target is not None:
            check_target(target, self._inputs(), overwrite)
        plan = make_plan(self.base, self.vector, options, single_file=target is not None and target.single_file)
        check_factors(plan)
        if target is not None:
            check_space(target, plan.bytes_to_write, plan.to_download)
        return plan

    def save(
        self,
        output: PathLike,
        *,
        device: str = "cpu",
        out_dtype: str = "same",
        max_shard_size: int | str | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        overwrite: bool = False,
        jobs: int | None = None,
        memory: int | str | None = None,
        fsync: bool = True,
        sha256: bool = False,
        code: bool = True,
        progress: Callable[[int], None] = lambda written: None,
        shard_done: Callable[[ShardResult], None] = lambda result: None,
        planned: Callable[[Plan], None] = lambda plan: None,
    ) -> Report:
        """Compute and write it: a model folder, or one file when `output` ends in `.safetensors`.

        The output appears complete, by one rename, or not at all; inputs are only read. The bytes depend on inputs and
        options alone, not on `device`, `jobs` or the run.

        Args:
            device: "cpu", "cuda", "cuda:N" or "auto" (a GPU if there is one).
            out_dtype: "same", "bfloat16", "float16", "float32" or "float64", for all float tensors.
            max_shard_size: bytes, or text like "5GB"; None keeps base's shard map.
            include, exclude: shell-style patterns of tensor names; what they leave out is copied.
            overwrite: replace an output that taskvec made; it survives until the new one is complete.
            jobs: threads, by default one per processor this process may use (at most 8).
            memory: cap on the buffers of all threads together, in bytes or text like 64MB; fewer threads then run.
            fsync: flush everything to disk before saying success. `sha256`: record the SHA-256 of every weight file.
            code: copy the Python files that the model's configs name, as bytes; False leaves them out.
            progress, shard_done, planned: called in this thread with bytes written, each finished file, the plan.

        Raises UsageError, MismatchError, CheckpointError or OutputError, each naming the file; then nothing was made.
        """
        started = time.perf_counter()
        target = Target.of(output)
        plan = self.plan(
            out_dtype=out_dtype, max_shard_size=max_shard_size, include=include, exclude=exclude, output=output,
            overwrite=overwrite, code=code,
        )  # fmt: skip
        from . import record, stream
        from .device import open_device

        where = open_device(device)
        workers = workers_for(plan, where, jobs, memory)
        download(plan)
        if target.single_file:
            plan = _with_metadata(plan, record.single_file_metadata(plan))
        planned(plan)
        settings = stream.Settings(
            workers=workers,
            batch=where.batch,
            fsync=fsync,
            sha256=sha256,
            make_kernel=where.make_kernel,
            progress=progress,
            shard_done=shard_done,
        )
        result = _write(plan, target, settings, where.name, overwrite)
        seconds = time.perf_counter() - started
        return Report(
            output=target.path,
            output_name=target.typed,
            plan=plan,
            changes=record.changes(plan, result),
            tensors=record.tensor_changes(plan, result),
            bytes_read=sum(s.size if s.name in result.reused else s.bytes_to_read for s in plan.shards),
            bytes_written=plan.bytes_to_write - sum(s.size for s in plan.shards if s.name in result.reused),
            seconds=seconds,
            device=where.name,
            notes=tuple(result.notes),
        )

    def tensors(self, *, device: str = "cpu", **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the output as (name, torch tensor), in the order of base's files: the bits `save` would write.

        One tensor is held at a time. `options`: out_dtype, include, exclude as in `save`. Raises as `plan` does.
        """
        plan = make_plan(self.base, self.vector, Options(**options), single_file=True)
        check_factors(plan)
        download(plan)
        from .live import edited_tensors

        yield from edited_tensors(plan, device)

    def state_dict(self, *, device: str = "cpu", **options: Any) -> dict[str, torch.Tensor]:
        """All of `tensors` as a dict, for `model.load_state_dict`."""
        return dict(self.tensors(device=device, **options))

    def push_to_hub(self, repo: str, **options: Any) -> Any:
        """Save it and push it to `org/name` on the Hub, in one commit: `output`, by default a folder here of the repository's
        name, stays. Options: private, create_pr, revision, commit_message, card, verify_checksums, token, and those of
        `save`. Returns a Pushed; raises HubError, and what `save` raises."""
        return _push[0](self, repo, **options)

    def _inputs(self) -> list[Checkpoint]:
        return [self.base, *(checkpoint for _, source in self.vector.terms for checkpoint in source.inputs)]

    def __repr__(self) -> str:
        from ..delta.vector import formula

        return f"EditedCheckpoint({self.base.label} {formula(self.vector)})"


def _write(plan: Plan, target: Target, settings: Settings, device: str, overwrite: bool) -> RunResult:
    """Everything of the output into a staging folder, weights first, its record last; then the one rename."""
    from . import record, stream
    from .card import card
    from .journal import identify
    from .staging import Staging

    identity = identify(plan, device, sha256=settings.sha256)
    with Staging(target, fsync=settings.fsync, overwrite=overwrite, run=(plan, identity)) as staging:
        result = stream.execute(plan, staging.path, settings, staging.journal)
        result.notes += staging.notes
        if not target.single_file:
            for file in plan.side:
                staging.copy(file)
            if len(plan.shards) > 1:
                stem = plan.shards[0].name.split("-00001-")[0]
                staging.write(f"{stem}.safetensors.index.json", record.index_json(plan))
            staging.write("README.md", card(plan, result))
            staging.write(RECORD, record.finished(record.full_record(plan, result, target.path), staging.path))
        staging.commit()
    return result


def subtract(
    model: Checkpoint | PathLike,
    old: TaskVector | Checkpoint | PathLike,
    *,
    alpha: float,
    output: PathLike,
    base: Checkpoint | PathLike | None = None,
    **options: Any,
) -> Report:
    """model − alpha · (old − base): what `taskvec subtract` does. `options` are those of `EditedCheckpoint.save`.

    `old` is a tuned checkpoint, an adapter, a saved vector or a TaskVector; `base` is what it was trained from, by default
    `model`. `alpha` is any finite real number (Ni et al. 2024, eq. 4, where it is λ).
    """
    return edited_checkpoint(model, old, -finite(alpha, "alpha"), base).save(output, **options)


def add(
    model: Checkpoint | PathLike,
    old: TaskVector | Checkpoint | PathLike,
    *,
    alpha: float,
    output: PathLike,
    base: Checkpoint | PathLike | None = None,
    **options: Any,
) -> Report:
    """model + alpha · (old − base): what `taskvec add` does. Arguments as for `subtract`."""
    return edited_checkpoint(model, old, finite(alpha, "alpha"), base).save(output, **options)


def edited_checkpoint(
    model: Checkpoint | PathLike,
    old: TaskVector | Checkpoint | PathLike,
    coefficient: float,
    base: Checkpoint | PathLike | None,
    *,
    force_base: bool = False,
) -> EditedCheckpoint:
    """model + coefficient · (old − base), lazily; `old` and `base` as in `subtract`. `force_base`: of a saved vector."""
    edited = _opened(model)
    if isinstance(old, TaskVector):
        if base is not None:
            raise UsageError("base says what `old` was trained from, and a TaskVector knows that already")
        return EditedCheckpoint(edited, coefficient * old)
    origin = None if base is None else _opened(base)
    if not isinstance(old, Checkpoint) and locate_adapter(old) is not None:
        return EditedCheckpoint(edited, coefficient * TaskVector.from_adapter(old, origin))
    opened = _opened(old)
    if told(opened) is not None:
        if origin is not None:
            raise UsageError(f"base says what {show(opened.label)} was trained from, and a saved vector knows that already")
        return EditedCheckpoint(edited, coefficient * TaskVector(((1.0, StoredVector.open(opened, force_base=force_base)),)))
    if force_base:
        raise UsageError(f"force_base is for saved vectors, and {show(opened.label)} is none")
    return EditedCheckpoint(edited, coefficient * TaskVector.between(edited if origin is None else origin, opened))


def _opened(source: Checkpoint | PathLike) -> Checkpoint:
    return source if isinstance(source, Checkpoint) else Checkpoint.open(source)


def _with_metadata(plan: Plan, metadata: dict[str, str]) -> Plan:
    """The plan of a single file with its recipe in the header: the same jobs, moved by the longer header."""
    (shard,) = plan.shards
    merged: dict[str, str] = {"format": "pt"}
    for source in plan.base.shards:
        merged.update(source.metadata)
    header = encode_header([(j.name, j.dtype, j.shape, j.nbytes) for j in shard.jobs], {**merged, **metadata})
    shift = len(header) - len(shard.header)
    moved: tuple[Job, ...] = tuple(job._replace(offset=job.offset + shift) for job in shard.jobs)
    return replace(plan, shards=(shard._replace(header=header, jobs=moved, size=shard.size + shift),))


def workers_for(plan: Plan, device: Device, jobs: int | None, memory: int | str | None) -> int:
    """How many threads: as asked or one per processor, but no more than fit in `memory`. Raises UsageError if none does."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs {jobs}, expected at least 1")
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = jobs or device.workers or min(8, available)
    needed = plan.buffer_bytes(device.batch)
    if memory is None:
        return wanted if jobs else max(1, min(wanted, _half_of_memory() // max(1, needed)))
    fitting = parse_bytes("memory", memory) // max(1, needed)
    if fitting < 1:
        raise UsageError(f"memory {show(memory)}: one thread of this run needs {human_bytes(needed)} of buffers")
    return min(wanted, fitting)


def _half_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


when_added(EditedCheckpoint)

__all__ = ["EditedCheckpoint", "Report", "add", "subtract"]
