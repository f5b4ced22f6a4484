"""Checking a finished output: structure, checksums, values; other files (verify_side.py); the arithmetic (recompute.py)."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checkpoint.checkpoint import Checkpoint, Shard
from ..checkpoint.files import InputFiles, exists, names_in
from ..checkpoint.locate import existing, locate_peft, parse_json, read_json
from ..delta.adapters.config import AdapterFolder
from ..delta.source import FLOATS
from ..delta.stored import METADATA_KEY
from ..errors import CheckpointError, MismatchError, TaskvecError, UsageError, VerificationError, counted, listing, show
from .jobs import CHECKSUM_PLACE
from .output import RECORD
from .recompute import found_wrong, misstated, plan_again, unlike_base, unlike_plan
from .record import FORMATS
from .relocate import Places, relocate
from .verify_side import check_side, intruders

if TYPE_CHECKING:
    from .kernel import Counts
    from .plan import Plan

_SAMPLE = 3  # edited tensors computed again, if nothing is said


@dataclass
class Verification:
    """What was checked. `problems` is empty when the output is right; `skipped` says what could not be checked."""

    output: Path
    checks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


class _Depth(NamedTuple):
    """How much is computed again: so many edited tensors, or everything."""

    sample: int
    full: bool


def verify(
    output: str | os.PathLike[str],
    *,
    against: Sequence[str | os.PathLike[str]] = (),
    sample: int | None = None,
    full: bool = False,
) -> Verification:
    """Check an output of taskvec: structure, checksum of every file, no NaN or inf that was not recorded, nothing beside
    it that a loader would take; and from the inputs, bit for bit, side files and `sample` random edited tensors (3 if not
    given), or, if `full`, every tensor, the copied ones too. A card may be edited; a file that no loader takes is only named.

    Inputs are looked for where the record says they lay, beside the output and in the working directory, and must have
    the recorded sizes and headers; `against` names them if they lie elsewhere. A folder with a record whose weights do
    not even open has that as its problem. Raises CheckpointError when the output was not made by taskvec, UsageError for
    both `sample` and `full`, and with `against` or `full` CheckpointError when an input is not found.
    """
    if full and sample is not None:
        raise UsageError("a sample of the tensors, or all of them: not both", hint="Leave out --sample or --full")
    return _verified(output, against, _Depth(_SAMPLE if sample is None else sample, full))


def verify_listed(output: str | os.PathLike[str]) -> Verification:
    """As `verify`, but of what the record lists alone, and nothing is computed again: what is fit to leave this machine."""
    return _verified(output, (), _Depth(0, False), beside=False)


def _verified(
    output: str | os.PathLike[str], against: Sequence[str | os.PathLike[str]], depth: _Depth, *, beside: bool = True
) -> Verification:
    try:
        adapter = locate_peft(output)
        checkpoint = Checkpoint.open(output) if adapter is None else AdapterFolder.open(adapter).weights
    except CheckpointError as error:
        folder = Path(os.path.expanduser(output))
        if not os.path.isfile(folder / RECORD):
            raise
        return Verification(Path(output), problems=[str(error), *_intruders(folder)])
    content = _record(checkpoint)
    found = Verification(checkpoint.path)
    try:
        _check_files(checkpoint, content, found)
        _check_data(checkpoint, content, found)
        sound = found.ok
        _check_side(checkpoint, content, found, beside)
        if content.get("kind") == "lora":
            found.skipped.append("nothing computed again: an extracted adapter is an approximation")
        elif sound:
            _recompute(checkpoint, content, against, depth, found)
        else:
            found.skipped.append("nothing computed again: the weights are not those that were written")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, TaskvecError):
            raise
        raise CheckpointError(f"{show(checkpoint.path)}: its record is damaged ({show(repr(error))})") from error
    return found


def check(output: str | os.PathLike[str], **options: Any) -> Verification:
    """As `verify`, but raises VerificationError naming the first problem."""
    found = verify(output, **options)
    if not found.ok:
        raise VerificationError(f"{show(found.output)}: {found.problems[0]}")
    return found


def _intruders(folder: Path) -> list[str]:
    """What may be why the output does not open."""
    try:
        return intruders(folder, read_json(folder / RECORD))
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):
        return []


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    content = _read_record(checkpoint)
    if content.get("format") not in (None, *FORMATS):
        raise CheckpointError(
            f"{show(checkpoint.path)}: its record is of format {show(content['format'])}, expected one of {FORMATS}",
            hint="Take the taskvec that made it, or a newer one",
        )
    return content


def _read_record(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.folder is not None:
        path = checkpoint.folder / RECORD
        if not exists(path):
            raise CheckpointError(f"{show(checkpoint.path)}: no {RECORD}: not an output of taskvec")
        return read_json(path)
    (shard,) = checkpoint.shards
    try:
        content = parse_json(shard.metadata[METADATA_KEY])
        content["shards"] = [{"name": shard.path.name, "checksum": content["checksum"]}]
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{show(checkpoint.path)}: no record in its metadata: not an output of taskvec") from error
    return dict(content)


def _check_files(checkpoint: Checkpoint, content: dict[str, Any], found: Verification) -> None:
    recorded = {shard["name"]: shard for shard in content.get("shards", [])}
    present = {shard.path.name: shard for shard in checkpoint.shards}
    if checkpoint.folder is not None:
        on_disk = {name for name in names_in(checkpoint.folder) if name.endswith(".safetensors")}
        stray, missing = sorted((on_disk | set(present)) - set(recorded)), sorted(set(recorded) - set(present))
        found.problems += [f"{show(name)}: a weight file that the record does not list" for name in stray]
        found.problems += [f"{show(name)}: a weight file of the record that is missing" for name in missing]
    for name in sorted(set(recorded) & set(present)):
        expected = recorded[name]
        if "nbytes" in expected and present[name].identity.size != expected["nbytes"]:
            found.problems.append(f"{show(name)}: {present[name].identity.size} bytes, expected {expected['nbytes']}")
        if "header_sha256" in expected and present[name].header_sha256 != expected["header_sha256"]:
            found.problems.append(f"{show(name)}: its header is not the one that was written")
    found.checks.append(f"structure: {counted(len(present), 'weight file')}, {counted(len(checkpoint.tensors), 'tensor')}")


def _check_side(checkpoint: Checkpoint, content: dict[str, Any], found: Verification, beside: bool) -> None:
    checks, problems, noted = check_side(checkpoint, content, beside)
    found.checks += checks
    found.problems += problems
    found.skipped += noted


def _check_data(checkpoint: Checkpoint, content: dict[str, Any], found: Verification) -> None:
    recorded = {shard["name"]: shard.get("checksum") for shard in content.get("shards", [])}
    edited = content.get("tensors", {})
    files = InputFiles({shard.path: shard.identity for shard in checkpoint.shards})
    try:
        for shard in checkpoint.shards:
            checksum, nonfinite = _scan(shard, files, recorded.get(shard.path.name), checkpoint.folder is None)
            if recorded.get(shard.path.name) != checksum:
                found.problems.append(
                    f"{show(shard.path.name)}: checksum {checksum}, expected {recorded.get(shard.path.name)}"
                )
            for name, count in nonfinite.items():
                known = edited.get(name, {}).get("nonfinite", 0) if name in edited else count
                if count != known and "tensors" in content:
                    found.problems.append(f"{show(name)}: {count} values are inf or NaN, {known} were when it was made")
                else:
                    found.skipped.append(f"{show(name)} holds {count} inf or NaN, as it did when it was made")
    finally:
        files.close()
    found.checks.append(f"checksums: {checkpoint.nbytes} bytes of tensors; inf and NaN counted")


def _scan(shard: Shard, files: InputFiles, recorded: object, own_record: bool) -> tuple[str, dict[str, int]]:
    """The checksum of one weight file, and the tensors with inf or NaN in them.

    `recorded`: the checksum it should have; `own_record`: it is in the file's own header, where it is left out.
    """
    import numpy as np
    import xxhash

    from ..checkpoint.floats import FORMATS, decode, reaches
    from .jobs import TILE_BYTES, tiles, unit_bytes

    digests: list[bytes] = []
    nonfinite: dict[str, int] = {}
    buffer = np.empty(TILE_BYTES, np.uint8)
    for tensor in shard.tensors:
        unit = unit_bytes(tensor.dtype)
        for tile in tiles(tensor.dtype, tensor.shape, tensor.nbytes):
            raw = buffer[: tile.units * unit]
            files.read(shard.path, raw.data, tensor.offset + tile.start * unit, tensor.name)
            digests.append(xxhash.xxh3_128_digest(raw.data))
            if tensor.dtype in FLOATS:
                values = decode(raw, tensor.dtype, np.empty(tile.units, np.float64 if tensor.dtype == "F64" else np.float32))
                if reaches(values, FORMATS["F32"].overflow if tensor.dtype != "F64" else float("inf")):
                    nonfinite[tensor.name] = nonfinite.get(tensor.name, 0) + int((~np.isfinite(values)).sum())
    header = bytearray(shard.identity.size - sum(tensor.nbytes for tensor in shard.tensors))
    files.read(shard.path, memoryview(header), 0, "")
    planned = bytes(header)
    if own_record:
        planned = planned.replace(str(recorded).encode("utf-8", "replace"), CHECKSUM_PLACE.encode(), 1)
    return xxhash.xxh3_128_hexdigest(planned + b"".join(digests)), nonfinite


def _recompute(
    checkpoint: Checkpoint,
    content: dict[str, Any],
    against: Sequence[str | os.PathLike[str]],
    depth: _Depth,
    found: Verification,
) -> None:
    """Against the inputs: which tensors there are, the side files, the values of a sample or of all tensors, and what the
    record says of the whole. Where inputs look alike, one way that fits to tell them apart is enough."""
    needed = bool(against) or depth.full
    try:
        ways, sure = relocate(checkpoint, content, [existing(path) for path in against])
        again = _planned(checkpoint, content, ways, depth)
    except TaskvecError as error:
        _without_inputs(error, needed, found)
        return
    problems, checks = _fitting(again)
    if problems and not sure:
        alike = f"the inputs of {show(checkpoint.path.name)} look alike, and which is which is not clear"
        hint = "Name each with --against PATH, by the name it had then"
        _without_inputs(CheckpointError(alike, hint=hint), needed, found)
        return
    found.problems += problems
    found.checks += checks


def _without_inputs(error: TaskvecError, needed: bool, found: Verification) -> None:
    """What is wrong without them is said first; if nothing is, and they are `needed`, that is an error."""
    if not needed:
        found.skipped.append(f"nothing computed again: {error}")
    elif found.problems:
        found.problems.append(str(error))
    else:
        raise error


def _planned(checkpoint: Checkpoint, content: dict[str, Any], ways: list[Places], depth: _Depth) -> list[_Again]:
    """The ways whose inputs can be opened. Raises the first one's TaskvecError if there is none."""
    seed = random.random()
    found: list[_Again] = []
    errors: list[TaskvecError] = []
    for places in ways:
        try:
            found.append(_Again(checkpoint, content, places, depth, seed))
        except TaskvecError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _fitting(again: Sequence[_Again]) -> tuple[list[str], list[str]]:
    """Problems and checks of the way that fits; if none does, of the one with the fewest problems."""
    if len(again) > 1:
        for one in again:
            if not any(one.problems()):
                return [], one.checks
    found = [(list(one.problems()), one.checks) for one in again]
    return min(found, key=lambda outcome: len(outcome[0]))


class _Again:
    """An output computed again from inputs in `places`. `checks`: what was compared by then."""

    def __init__(self, checkpoint: Checkpoint, content: dict[str, Any], places: Places, depth: _Depth, seed: float) -> None:
        self._checkpoint, self._content, self._places, self._depth, self._seed = checkpoint, content, places, depth, seed
        self._plan: Plan | str
        self.checks: list[str] = []
        try:
            self._plan = plan_again(checkpoint, content, places)
        except (UsageError, MismatchError, OverflowError) as error:
            self._plan = f"its record says what cannot be done: {show(error, 400)}"

    def problems(self) -> Iterator[str]:
        checkpoint, content, plan = self._checkpoint, self._content, self._plan
        if isinstance(plan, str):
            yield plan
            return
        self.checks.clear()
        if checkpoint.folder is not None and "files" in content:  # an older taskvec had other rules
            yield from unlike_base(plan, checkpoint.folder)
        unlike = list(unlike_plan(plan, checkpoint))
        yield from unlike
        if unlike:
            return
        chosen, copied = self._choose(plan)
        did: dict[str, Counts] = {}
        yield from found_wrong(plan, checkpoint, content, {*chosen, *copied}, did)
        if content.get("format") != 1:
            yield from misstated(plan, checkpoint, content, self._places, did)

    def _choose(self, plan: Plan) -> tuple[list[str], list[str]]:
        """Edited and copied tensors to compute again; the same ones each time."""
        edited, full = [job.name for job in plan.jobs if not job.copied], self._depth.full
        copied = [job.name for job in plan.jobs if job.copied] if full else []
        count = min(self._depth.sample, len(edited))
        chosen = edited if full else random.Random(self._seed).sample(edited, count)
        self.checks.append(f"computed again: {len(chosen)} of {len(edited)} edited tensors ({listing(chosen)})")
        if full:
            self.checks.append(f"compared with base: {counted(len(copied), 'copied tensor')}, byte for byte")
        return chosen, copied


__all__ = ["Verification", "check", "verify"]
