"""Many runs at once, many files, many tensors, large tensors. Every output is compared to the last byte with what numpy
computes here, by itself; then seconds and peak RSS are printed. What is wrong ends it with exit 1.

    python benchmarks/load.py                   # two minutes, up to 9 GB of disk in a temporary folder, which is removed
    python benchmarks/load.py --only same       # of: concurrent same descriptors tensors large
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import Fill, write
from measure import measure
from run import environment, remove

ALPHA = 0.3
TASKVEC = (sys.executable, "-m", "taskvec")
NUMPY_ALONE = (
    sys.executable, "-c",
    "from pathlib import Path; from taskvec.run import native; native.LIBRARY = Path('absent'); "
    "from taskvec.cli.main import main; main()",
)  # fmt: skip
LOSES = re.compile(r"taskvec: \S+: (another run is making it|exists already|appeared after this run began)[^\n]*\n")
Shapes = Sequence[tuple[str, tuple[int, ...]]]
Words = NDArray[np.uint16]
_BLOCK = 1 << 26  # bytes compared at once


class Row(NamedTuple):
    """One line of the table: seconds, and MB (1e6 bytes) of the largest process."""

    job: str
    wall: float
    resident: float
    found: str


class Wrong(Exception):
    """What taskvec did is not what it promises."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Wrong(otherwise)


# inputs


def squares(count: int, side: int) -> Shapes:
    return [(f"model.layers.{layer}.mlp.up_proj.weight", (side, side)) for layer in range(count)]


def experts(layers: int = 70, each: int = 332) -> Shapes:
    """A mixture of experts: 70,000 tensors of 16 elements."""
    of_experts = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight", (4, 4))
        for layer in range(layers) for expert in range(each) for kind in ("gate", "up", "down")
    ]  # fmt: skip
    others = ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.o_proj")
    return of_experts + [(f"model.layers.{layer}.{name}.weight", (4,)) for layer in range(layers) for name in others]


def pair(work: Path, shapes: Shapes, shards: int) -> tuple[Path, Path]:
    """A base and a fine-tune of it, in BF16."""
    for name, drift in (("base", 0.0), ("tuned", 1e-3)):
        _write_model(work / name, shapes, shards, Fill(0, drift))
    return work / "base", work / "tuned"


def _write_model(folder: Path, shapes: Shapes, shards: int, fill: Fill) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    if shards == 1:
        write(folder / "model.safetensors", list(shapes), "bfloat16", fill)
        return
    files = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": list(shapes[i::shards]) for i in range(shards)}
    for file, own in files.items():
        write(folder / file, own, "bfloat16", fill)
    weight_map = {name: file for file, own in files.items() for name, _ in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


# what is right, without taskvec


def edited(base: Words, tuned: Words) -> Words:
    """BF16: f32(b) − f32(α)·(f32(t) − f32(b)), rounded once, to nearest, ties to even; base's where both are equal."""
    b, t = ((words.astype(np.uint32) << 16).view(np.float32) for words in (base, tuned))
    bits = (b - np.float32(ALPHA) * (t - b)).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(base == tuned, base, rounded)


def header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data begins, and the tensors."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = json.loads(file.read(length))
    entries.pop("__metadata__", None)
    return 8 + length, entries


def check_edit(out: Path, base: Path, tuned: Path) -> None:
    """`out`: a folder sharded as the base, or one file."""
    for shard in sorted(base.glob("*.safetensors")):
        made, other = out / shard.name if out.is_dir() else out, tuned / shard.name
        found, wanted, changed = header(made), header(shard), header(other)
        require(found[1] == wanted[1] == changed[1], f"{made}: other tensors than {shard}")
        nbytes = max(entry["data_offsets"][1] for entry in wanted[1].values())
        require(os.stat(made).st_size == found[0] + nbytes, f"{made}: {os.stat(made).st_size} bytes")
        for at in range(0, nbytes, _BLOCK):
            count = min(_BLOCK, nbytes - at) // 2
            own, b, t = (
                np.fromfile(path, np.uint16, count, offset=start + at)
                for path, start in ((made, found[0]), (shard, wanted[0]), (other, changed[0]))
            )
            require(np.array_equal(own, edited(b, t)), f"{made}: other values than numpy's, from byte {at} on")
    if out.is_dir():
        index = "model.safetensors.index.json"
        require((out / index).exists() == (base / index).exists(), f"{out}: {index}")
        require((out / "config.json").read_bytes() == (base / "config.json").read_bytes(), f"{out}: config.json")


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(folder)}


def state(*folders: Path) -> dict[Path, tuple[Any, ...]]:
    """What would show that an input was written to, or a file put beside it."""
    status = {path: path.stat() for folder in folders for path in _files(folder)}
    return {path: (s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_mode) for path, s in status.items()}


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def check_names(work: Path, *expected: str) -> None:
    found = sorted(path.name for path in work.iterdir() if path.suffix != ".log")
    require(found == sorted(expected), f"in the folder of the outputs: {', '.join(found)}")


# runs


class Ended(NamedTuple):
    code: int
    said: str
    resident: float


def subtract(base: Path, tuned: Path, out: Path, program: Sequence[str] = TASKVEC) -> list[str]:
    return [*program, "subtract", str(base), str(tuned), "--alpha", str(ALPHA), "-q", "-o", str(out)]


def together(commands: Sequence[list[str]], work: Path, apart: float = 0.0) -> tuple[float, list[Ended]]:
    """All at once, or `apart` seconds one after the other. Seconds until the last has ended, and how each did."""
    logs = [work / f"{number}.log" for number in range(len(commands))]
    started, processes, peaks = time.perf_counter(), [], [0] * len(commands)
    for command, log in zip(commands, logs, strict=True):
        with open(log, "wb") as said:
            processes.append(subprocess.Popen(command, stdout=said, stderr=said, env=environment()))
        time.sleep(apart)
    while any(process.poll() is None for process in processes):
        peaks = [max(peak, _resident(process.pid)) for peak, process in zip(peaks, processes, strict=True)]
        time.sleep(0.02)
    wall = time.perf_counter() - started
    found = zip(processes, logs, peaks, strict=True)
    return wall, [Ended(process.returncode, log.read_text(), peak / 1000) for process, log, peak in found]


def _resident(pid: int) -> int:
    """The kernel's own peak, in kB; 0 once it has ended."""
    try:
        found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


# the jobs


def concurrent(work: Path, runs: int = 60) -> Iterator[Row]:
    """Over the same inputs, into outputs beside each other."""
    base, tuned = pair(work, squares(20, 1024), 4)
    before, read = state(base, tuned), digests(base) | digests(tuned)
    outs = [work / f"out-{number}" for number in range(runs)]
    wall, ended = together([subtract(base, tuned, out) for out in outs], work)
    for one in ended:
        require(one.code == 0, f"exit {one.code}: {one.said}")
    check_names(work, "base", "tuned", *(out.name for out in outs))
    check_edit(outs[0], base, tuned)
    first = digests(outs[0])
    for out in outs[1:]:
        require(digests(out) == first, f"{out}: not the bytes of {outs[0]}")
    require(state(base, tuned) == before and digests(base) | digests(tuned) == read, "an input has changed")
    yield Row(f"{runs} runs at once, 42 MB each", wall, max(one.resident for one in ended), f"{runs} exit 0, all bytes equal")


def same(work: Path, runs: int = 8, rounds: int = 10) -> Iterator[Row]:
    """Into one name: a folder, then one file. In every second round they start 30 ms apart."""
    base, tuned = pair(work, squares(20, 1024), 1)
    before = state(base, tuned)
    for name in ("out", "out.safetensors"):
        out, why, walls, peak = work / name, Counter[str](), [], 0.0
        for number in range(rounds):
            wall, ended = together([subtract(base, tuned, out)] * runs, work, apart=0.03 * (number % 2))
            why.update(_one_won(ended))
            check_names(work, "base", "tuned", name)
            check_edit(out, base, tuned)
            walls.append(wall)
            peak = max(peak, *(one.resident for one in ended))
            remove(work / "out")
        require(state(base, tuned) == before, "an input has changed")
        said = ", ".join(f"{count} × {reason}" for reason, count in why.most_common())
        yield Row(f"{runs} runs into one {name}, {rounds} times", max(walls), peak, f"one exits 0 each time; {said}")


def _one_won(ended: Sequence[Ended]) -> list[str]:
    """Why the others did not."""
    codes = sorted(one.code for one in ended)
    require(codes == [0] + [1] * (len(ended) - 1), f"exit codes {codes}: {' '.join(one.said for one in ended)}")
    lost = [LOSES.fullmatch(one.said) for one in ended if one.code]
    require(all(lost), f"not one line that says why: {[one.said for one in ended]}")
    return [found[1] for found in lost if found]


def descriptors(work: Path, shards: int = 120, limit: int = 64) -> Iterator[Row]:
    """More files on each side than a process may have open."""
    base, tuned = pair(work, squares(2 * shards, 128), shards)
    inner = [*subtract(base, tuned, work / "out"), "-j", "8"]
    sample = measure(
        ["sh", "-c", f'ulimit -n {limit} && exec "$0" "$@"', *inner], env=environment(), log=work / "taskvec.log"
    )
    check_edit(work / "out", base, tuned)
    yield Row(f"{shards} shards a side, ulimit -n {limit}, 8 threads", sample.wall, sample.resident, "right")


def tensors(work: Path) -> Iterator[Row]:
    """70,000 of them, in one file and in a hundred."""
    shapes = experts()
    for shards in (1, 100):
        home = work / str(shards)
        home.mkdir()
        base, tuned = pair(home, shapes, shards)
        job = f"{len(shapes):,} tensors, {shards} file{'s' * (shards > 1)} a side"
        command = subtract(base, tuned, home / "out")
        plan = measure([*command, "--dry-run"], env=environment(), log=home / "taskvec.log")
        check_names(home, "base", "tuned")
        yield Row(f"{job}, --dry-run", plan.wall, plan.resident, "nothing written")
        sample = measure(command, env=environment(), log=home / "taskvec.log")
        check_edit(home / "out", base, tuned)
        yield Row(job, sample.wall, sample.resident, "right")


# large

LARGE = {
    "odd": ("BF16", (5,)),  # nothing behind it is aligned
    "of more than 2³¹ elements": ("BF16", (65539, 32768)),  # 4 GiB and 196 kB
    "of more than 2 GiB": ("F32", (16387, 32768)),
    "copied": ("I8", ((1 << 31) + 4099,)),
    "last": ("BF16", (3,)),
}
WIDTH = {"BF16": 2, "F32": 4, "I8": 1}
Marks = dict[int, bytes]  # of a file that is zeros elsewhere: offset in the data -> the bytes of an element


def large(work: Path, programs: Mapping[str, Sequence[str]] | None = None) -> Iterator[Row]:
    """Sparse inputs, with values at the ends of every tensor and where 32-bit numbers end."""
    (work / "in").mkdir()
    base, tuned, out = work / "in/base.safetensors", work / "in/tuned.safetensors", work / "out.safetensors"
    entries = _entries()
    begin = _write_sparse(base, entries, {})  # the header's length says where the file's own 2 and 4 GiB are
    places = {name: _edges(entry, begin) for name, entry in entries.items()}
    marks = _marks(entries, places)
    for path, side in ((base, 0), (tuned, 1)):
        _write_sparse(path, entries, {at: found[side] for at, found in marks.items()})
    before, nbytes = state(base.parent), base.stat().st_size
    for kind, program in (programs or {"": TASKVEC, ", numpy alone": NUMPY_ALONE}).items():
        sample = measure(subtract(base, tuned, out, program), env=environment(), log=work / "taskvec.log")
        check_marks(out, entries, {at: found[2] for at, found in marks.items()})
        require(state(base.parent) == before, "an input has changed")
        out.unlink()
        yield Row(
            f"one file of {nbytes / 2**30:.1f} GiB{kind}", sample.wall, sample.resident, f"right, {len(marks)} not zero"
        )


def _entries() -> dict[str, Any]:
    entries, end = {}, 0
    for name, (dtype, shape) in LARGE.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * WIDTH[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    return entries


def _write_sparse(path: Path, entries: Mapping[str, Any], marks: Marks) -> int:
    """A file of zeros but for the marks. Returns where its data begins."""
    text = json.dumps(entries).encode()
    begin = 8 + len(text)
    with open(path, "wb", buffering=0) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(begin + max(entry["data_offsets"][1] for entry in entries.values()))
        for at, content in marks.items():
            os.pwrite(file.fileno(), content, begin + at)
    return begin


def _edges(entry: Mapping[str, Any], begin: int) -> list[int]:
    """Offsets in the data: the ends of the tensor, and the elements around 2 and 4 GiB of itself, of the data and of the
    file, and around its 2³¹st."""
    (start, end), width = entry["data_offsets"], WIDTH[entry["dtype"]]
    elements = {0, 1, (end - start) // width - 1, (end - start) // width - 2}
    for edge in (1 << 31, 1 << 32):
        near = (edge // width, edge, (edge - start) // width, (edge - begin - start) // width)
        elements.update(middle + step for middle in near for step in (-2, -1, 0, 1, 2))
    return [start + element * width for element in sorted(elements) if 0 <= element < (end - start) // width]


def _marks(entries: Mapping[str, Any], places: Mapping[str, list[int]]) -> dict[int, tuple[bytes, bytes, bytes]]:
    """Offset -> the element of the base, of the fine-tune, and the one that is right. No two are alike."""
    found = {}
    for name, offsets in places.items():
        dtype, count = entries[name]["dtype"], len(offsets)
        base = np.arange(1, count + 1, dtype=np.float32) / 16 + 1
        tuned = base + np.arange(count, 0, -1, dtype=np.float32) / 4
        if dtype == "F32":
            sides = (base, tuned, base - np.float32(ALPHA) * (tuned - base))
        elif dtype == "BF16":
            words = [(values.view(np.uint32) >> 16).astype(np.uint16) for values in (base, tuned)]  # cut off, as bfloat16
            sides = (*words, edited(*words))
        else:
            own = np.arange(1, count + 1, dtype=np.int8)
            sides = (own, -own, own)  # integers are the base's
        rows = zip(*([value.tobytes() for value in side] for side in sides), strict=True)
        found.update(zip(offsets, rows, strict=True))
    return found


def check_marks(path: Path, entries: Mapping[str, Any], marks: Marks) -> None:
    """Every byte: those of the marks, and zeros."""
    begin, found = header(path)
    require(found == entries, f"{path}: other tensors than the base's")
    nbytes = max(entry["data_offsets"][1] for entry in entries.values())
    require(path.stat().st_size == begin + nbytes, f"{path}: {path.stat().st_size} bytes")
    wanted = {at + i: value for at, content in marks.items() for i, value in enumerate(content)}
    fd = os.open(path, os.O_RDONLY)
    try:
        for at in range(0, nbytes, _BLOCK):
            block = np.frombuffer(os.pread(fd, min(_BLOCK, nbytes - at), begin + at), np.uint8)
            expected = np.zeros(min(_BLOCK, nbytes - at), np.uint8)
            for place in (place for place in wanted if at <= place < at + _BLOCK):
                expected[place - at] = wanted[place]
            require(np.array_equal(block, expected), f"{path}: wrong between bytes {at} and {at + _BLOCK} of the data")
    finally:
        os.close(fd)


JOBS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "concurrent": concurrent, "same": same, "descriptors": descriptors, "tensors": tensors, "large": large,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="the folder in which a temporary one is made")
    parser.add_argument("--only", nargs="*", choices=JOBS, default=list(JOBS))
    arguments = parser.parse_args()
    print("| job | wall s | peak RSS MB | found |\n|---|---|---|---|")
    for name in arguments.only:
        with tempfile.TemporaryDirectory(prefix="taskvec-load-", dir=arguments.work) as work:
            try:
                for row in JOBS[name](Path(work)):
                    print(f"| {row.job} | {row.wall:.2f} | {row.resident:.0f} | {row.found} |", flush=True)
            except (Wrong, RuntimeError) as error:
                sys.exit(f"{name}: {error}")


if __name__ == "__main__":
    main()
