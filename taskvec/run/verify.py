"""Checking a finished output: its structure, its checksums, its values, and a few tensors computed again."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.checkpoint import Checkpoint, Shard
from ..checkpoint.files import InputFiles, exists, names_in
from ..checkpoint.locate import ADAPTER_WEIGHTS, existing, locate_peft, read_json
from ..checkpoint.repository import cached
from ..delta.adapters import open_adapter
from ..delta.adapters.config import AdapterFolder
from ..delta.dense import FineTune
from ..delta.source import FLOATS, DeltaSource
from ..delta.stored import KIND, METADATA_KEY, StoredVector
from ..delta.vector import TaskVector
from ..delta.weighting import Depth, Masked, Scaled, Selected
from ..errors import CheckpointError, TaskvecError, VerificationError, counted, listing, show
from .extract import vector_plan
from .jobs import CHECKSUM_PLACE
from .output import RECORD
from .plan import Options, Plan, make_plan


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


def verify(
    output: str | os.PathLike[str], *, against: Sequence[str | os.PathLike[str]] = (), sample: int = 3
) -> Verification:
    """Check an output of taskvec: structure, checksum of every weight file, no NaN or inf that was not recorded, and
    `sample` random edited tensors computed again from the inputs, bit for bit.

    Inputs are looked for where the record says they lay, beside the output and in the working directory, and must have
    the recorded sizes and headers; `against` names them if they lie elsewhere. A folder with a record whose weights do
    not even open has that as its problem. Raises CheckpointError when the output was not made by taskvec.
    """
    try:
        adapter = locate_peft(output)
        checkpoint = Checkpoint.open(output) if adapter is None else AdapterFolder.open(adapter).weights
    except CheckpointError as error:
        if not os.path.isfile(os.path.join(os.path.expanduser(output), RECORD)):
            raise
        return Verification(Path(output), problems=[str(error)])
    content = _record(checkpoint)
    found = Verification(checkpoint.path)
    try:
        _check_files(checkpoint, content, found)
        _check_data(checkpoint, content, found)
        if content.get("kind") == "lora":
            found.skipped.append("nothing computed again: an extracted adapter is an approximation")
        elif found.ok:
            _recompute(checkpoint, content, against, sample, found)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
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


def _record(checkpoint: Checkpoint) -> dict[str, Any]:
    if checkpoint.folder is not None:
        path = checkpoint.folder / RECORD
        if not exists(path):
            raise CheckpointError(f"{show(checkpoint.path)}: no {RECORD}: not an output of taskvec")
        return read_json(path)
    (shard,) = checkpoint.shards
    try:
        content = json.loads(shard.metadata[METADATA_KEY])
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
        absent = [name for name in content.get("side_files", []) if not exists(checkpoint.folder / name)]
        found.problems += [f"{show(name)}: missing" for name in absent]
    for name in sorted(set(recorded) & set(present)):
        expected = recorded[name]
        if "nbytes" in expected and present[name].identity.size != expected["nbytes"]:
            found.problems.append(f"{show(name)}: {present[name].identity.size} bytes, expected {expected['nbytes']}")
        if "header_sha256" in expected and present[name].header_sha256 != expected["header_sha256"]:
            found.problems.append(f"{show(name)}: its header is not the one that was written")
    found.checks.append(f"structure: {counted(len(present), 'weight file')}, {counted(len(checkpoint.tensors), 'tensor')}")


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
    sample: int,
    found: Verification,
) -> None:
    try:
        plan = _plan_again(checkpoint, content, [existing(path) for path in against])
    except TaskvecError as error:
        if against:
            raise
        found.skipped.append(f"nothing computed again: {error}")
        return
    edited = [job for job in plan.jobs if not job.copied]
    chosen = random.sample(edited, min(sample, len(edited)))
    wrong = _differing(plan, checkpoint, {job.name for job in chosen})
    found.problems += [
        f"{show(name)}: is not {show(plan.formula)}: {count} elements differ, or an input changed"
        for name, count in wrong.items()
    ]
    found.checks.append(f"computed again: {len(chosen)} of {len(edited)} edited tensors ({listing(j.name for j in chosen)})")


def _differing(plan: Plan, checkpoint: Checkpoint, names: set[str]) -> dict[str, int]:
    import numpy as np

    from ..checkpoint.floats import words
    from .jobs import tiles, unit_bytes
    from .kernel import NumpyKernel
    from .stream import Worker

    files = InputFiles({**plan.identities, **{shard.path: shard.identity for shard in checkpoint.shards}})
    wrong: dict[str, int] = {}
    try:
        worker = Worker(files, NumpyKernel)
        for job in (job for job in plan.jobs if job.name in names):
            stored = checkpoint.tensors[job.name]
            for tile in tiles(job.dtype, job.shape, job.nbytes):
                out, _ = worker.compute(job, (tile,), worker.read(job, (tile,)))
                written = np.empty(len(out), np.uint8)
                files.read(stored.path, written.data, stored.offset + tile.start * unit_bytes(job.dtype), job.name)
                if different := int(np.count_nonzero(words(out, job.dtype) != words(written, job.dtype))):
                    wrong[job.name] = wrong.get(job.name, 0) + different
    finally:
        files.close()
    return wrong


def _plan_again(checkpoint: Checkpoint, content: dict[str, Any], against: list[Path]) -> Plan:
    home = checkpoint.path.resolve()
    base = Checkpoint.open(_find(content["base"], home, against))
    terms: list[tuple[float, DeltaSource]] = []
    for term in content["vector"]:
        terms.append((float(term["coefficient"]), _source_again(term, home, against)))
    settings: dict[str, Any] = content["options"]
    options = Options(
        settings["out_dtype"], settings["max_shard_size"], tuple(settings["include"]), tuple(settings["exclude"])
    )
    vector, single_file = TaskVector(tuple(terms)), checkpoint.folder is None
    if content.get("kind") == KIND:
        return vector_plan(base, vector, options, single_file=single_file, names=set(checkpoint.tensors))
    return make_plan(base, vector, options, single_file=single_file)


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


__all__ = ["Verification", "check", "verify"]
