"""The race: every contender does the same job in turn, round after round, each as a whole process; medians and ratios.

    python benchmarks/run.py --size 1.1b --rounds 5                      # cp, the floor, taskvec, scripts, PEFT
    python benchmarks/run.py --size 1.1b --peers PEER_VENV --mecha MECHA_VENV   # and mergekit, sd-mecha

Jobs: `full` (base − 0.7·(tuned − base)), `lora-all` (r=16 on all seven projections), `lora-qv` (q and v only). Inputs are
made once and read before the first round, so that they are in the page cache (`--cold` drops them before every run).
Nothing flushes to disk but the contenders named so. Ratios are per round, against `cp` and the floor of the same round.
"""

from __future__ import annotations

import argparse
import atexit
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import NAMES, SIZES, build
from measure import Sample, measure

HERE = Path(__file__).parent
ALPHA = "0.7"
SHOWN = ("size", "dtype", "shards", "rounds", "jobs", "only", "cold", "steady")  # the options that a result is labelled with
JOBS = {"full": "tuned", "lora-all": "lora-all", "lora-qv": "lora-qv"}


@dataclass
class Contender:
    """`command` gives the process for an output folder; `why_not` says why it cannot do this job here."""

    name: str
    command: Callable[[Path], list[str]]
    why_not: str | None = None
    samples: list[Sample] = field(default_factory=list)


def contenders(job: str, work: Path, floor: Path, arguments: argparse.Namespace) -> list[Contender]:
    base, old = work / "base", work / JOBS[job]
    taskvec = [sys.executable, "-m", "taskvec", "subtract", str(base), str(old), "--alpha", ALPHA, "-q", "-o"]
    shards, tuned = sorted(map(str, base.glob("*.safetensors"))), sorted(map(str, old.glob("*.safetensors")))
    found = [
        Contender("cp -r base", lambda out: ["cp", "-r", str(base), str(out)]),
        Contender(
            "floor (C, 2 threads)", lambda out: [str(floor), str(out), *shards, *(["--", *tuned] if job == "full" else [])]
        ),
        Contender("cat both > /dev/null", lambda out: ["sh", "-c", f"cat {base}/* {old}/* > /dev/null"]),
        Contender("taskvec", lambda out: [*taskvec, str(out), "--no-fsync"]),
        Contender("taskvec, flushed", lambda out: [*taskvec, str(out)]),
        Contender("cp -r base, flushed", lambda out: ["sh", "-c", f"cp -r {base} {out} && sync -d {out}/*"]),
    ]
    if arguments.peers is not None:
        found += peers(job, base, old, work, arguments)
    if arguments.only:
        found = [c for c in found if any(word in c.name for word in arguments.only)]
    return found


def peers(job: str, base: Path, old: Path, work: Path, arguments: argparse.Namespace) -> list[Contender]:
    mergekit = str(arguments.peers / "bin" / "mergekit-yaml")
    script = HERE / "peers"
    found = []
    if job == "full":
        for dtype in ("bfloat16", "float32"):
            for name in ("plain_script", "task_vectors_formula"):
                found.append(
                    Contender(
                        f"{name} {dtype}",
                        lambda out, name=name, dtype=dtype: [  # type: ignore[misc]
                            sys.executable, str(script / f"{name}.py"), str(base), str(old), str(out), ALPHA, dtype,
                        ],
                    )
                )  # fmt: skip
    else:
        peft = [sys.executable, str(script / "peft_merge.py"), str(base), str(old)]
        found.append(Contender("PEFT merge_and_unload", lambda out: [*peft, str(out), ALPHA]))
    for label, dtype, flags in (
        ("mergekit, best setting", "bfloat16", ["--out-shard-size", "500M"]),
        ("mergekit, float32", "float32", []),
    ):
        config = mergekit_config(work, job, base, old, dtype)
        cache = ["--lora-merge-cache", str(work / "merge-cache")] if job != "full" else []
        found.append(Contender(label, lambda out, c=config, f=flags, x=cache: [mergekit, str(c), str(out), *f, *x]))  # type: ignore[misc]
    why = None if arguments.mecha else "not installed (--mecha)"
    if job != "full":
        why = "reads no PEFT adapters"
    elif len(list(base.glob("*.safetensors"))) > 1:
        why = why or "reads single files only: run with --shards 1"
    mecha = [str((arguments.mecha or Path("x")) / "bin" / "python"), str(script / "sd_mecha_diff.py")]
    files = [str(base / "model.safetensors"), str(old / "model.safetensors")]
    found.append(Contender("sd-mecha add_difference", lambda out: [*mecha, *files, str(out) + ".safetensors", ALPHA], why))
    return found


def mergekit_config(work: Path, job: str, base: Path, old: Path, dtype: str) -> Path:
    """task_arithmetic with weight −α; normalize must be off for a negative weight."""
    model = f"{base}+{old}" if job != "full" else str(old)
    text = (
        f"merge_method: task_arithmetic\nbase_model: {base}\nmodels:\n  - model: {model}\n    parameters:\n"
        f"      weight: -{ALPHA}\nparameters:\n  normalize: false\ndtype: {dtype}\n"
    ) + ("out_dtype: bfloat16\n" if dtype == "float32" else "")
    path = work / f"mergekit-{job}-{dtype}.yaml"
    path.write_text(text)
    return path


def race(job: str, work: Path, floor: Path, arguments: argparse.Namespace) -> list[Contender]:
    racers = contenders(job, work, floor, arguments)
    out = work / "out"
    for number in range(arguments.rounds + 1):  # the first round warms up and is not counted
        for racer in racers:
            if racer.why_not:
                continue
            remove(out)
            prepare(work, JOBS[job], cold=arguments.cold)
            try:
                sample = measure(racer.command(out), log=work / "log.txt", env=environment())
            except (RuntimeError, OSError) as error:
                racer.samples.clear()
                racer.why_not = str(error).strip().splitlines()[-1][:150]
                continue
            if number > 0:
                racer.samples.append(sample)
                print(f"  {job} round {number} {racer.name}: {sample.wall:.2f} s", file=sys.stderr)
    remove(out)
    return racers


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "2"}


def remove(out: Path) -> None:
    for path in (out, Path(f"{out}.safetensors"), out.parent / "merge-cache"):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def prepare(work: Path, old: str, *, cold: bool) -> None:
    """Inputs into the page cache, or out of it."""
    buffer = bytearray(1 << 22)
    for path in [*(work / "base").iterdir(), *(work / old).iterdir()]:
        with open(path, "rb", buffering=0) as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.readinto(buffer):
                    pass


def table(job: str, racers: list[Contender]) -> str:
    """Markdown: median [min–max] of wall seconds, the rest medians; ratios are medians of per-round ratios."""
    lines = [
        f"### {job}\n",
        "| contender | wall s | CPU s | peak RSS MB | peak anon MB | × cp | × floor |",
        "|---|---|---|---|---|---|---|",
    ]
    reference = {name: next((r.samples for r in racers if r.name.startswith(name)), []) for name in ("cp -r base", "floor")}
    for racer in racers:
        if not racer.samples:
            lines.append(f"| {racer.name} | — {racer.why_not} | | | | | |")
            continue
        wall = [s.wall for s in racer.samples]
        middle = [statistics.median(values) for values in zip(*racer.samples)]
        ratios = []
        for samples in reference.values():
            pairs = [mine.wall / other.wall for mine, other in zip(racer.samples, samples)]
            ratios.append(f"{statistics.median(pairs):.2f}" if pairs else "")
        lines.append(
            f"| {racer.name} | {middle[0]:.2f} [{min(wall):.2f}–{max(wall):.2f}] | {middle[1]:.2f} | {middle[2]:.0f} "
            f"| {middle[3]:.0f} | {ratios[0]} | {ratios[1]} |"
        )
    return "\n".join(lines) + "\n"


def compiled(name: str, work: Path) -> Path:
    program = work / name
    subprocess.run(["cc", "-O3", "-pthread", str(HERE / f"{name}.c"), "-o", str(program)], check=True)
    return program


def hold_memory(work: Path) -> None:
    """Start steady.c, which ends with this process."""
    process = subprocess.Popen([str(compiled("steady", work))], stdout=subprocess.PIPE, text=True)
    atexit.register(process.kill)
    assert process.stdout is not None and process.stdout.readline() == "ready\n", "steady.c could not hold the memory"


def machine() -> str:
    cpus = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in cpus if line.startswith("model name")), "?")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 1e6  # MemTotal comes first, in kB
    return f"{os.cpu_count()} × {cpu}, {memory:.0f} GB, Linux {platform.release()}, Python {platform.python_version()}"


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "" if value is True else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"), help="where inputs and outputs go")
    parser.add_argument("--size", choices=SIZES, default="110m")
    parser.add_argument("--dtype", choices=NAMES, default="bfloat16")
    parser.add_argument("--shards", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--only", nargs="+", help="contenders whose name has one of these words")
    parser.add_argument("--peers", type=Path, help="a venv with benchmarks/requirements.txt")
    parser.add_argument("--mecha", type=Path, help="a venv with sd-mecha")
    parser.add_argument("--cold", action="store_true", help="drop the inputs from the page cache before every run")
    parser.add_argument("--steady", action="store_true", help="hold free memory first: for virtual machines, see steady.c")
    parser.add_argument("--out", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    work = (arguments.work / f"{arguments.size}-{arguments.dtype}-{arguments.shards}").resolve()
    build(work, arguments.size, arguments.dtype, arguments.shards, seed=0)
    floor = compiled("floor", work)
    if arguments.steady:
        hold_memory(work)
    size = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
    what = f"{size / 1e9:.2f} GB per checkpoint, {arguments.dtype}, {arguments.shards} shards, {arguments.rounds} rounds"
    command = "python benchmarks/run.py " + " ".join(
        f"--{k} {_text(v)}" for k, v in vars(arguments).items() if v and k in SHOWN
    )
    text = [f"{machine()}\n\n{what}, {'cold' if arguments.cold else 'warm'} page cache\n\n`{command}`\n"]
    text += [table(job, race(job, work, floor, arguments)) for job in arguments.jobs]
    print("\n".join(text))
    if arguments.out:
        arguments.out.write_text("\n".join(text))


if __name__ == "__main__":
    main()
