"""The small and the extreme: start-up, a 3 MB job, 70,000 tensors, one tensor of 2 GB. Prints seconds and peak RSS.

python benchmarks/limits.py --work bench-work
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import Fill, build, write
from measure import Sample, measure
from run import environment, remove


def many(folder: Path, layers: int = 70, experts: int = 332) -> None:
    """A mixture-of-experts model of 70,000 small tensors in one file; only the headers matter here."""
    names = [
        (f"model.layers.{layer}.mlp.experts.{expert}.{kind}_proj.weight", (4, 4))
        for layer in range(layers) for expert in range(experts) for kind in ("gate", "up", "down")
    ] + [(f"model.layers.{layer}.input_layernorm.weight", (4,)) for layer in range(layers)]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "model.safetensors", names, "bfloat16", Zero())


class Zero(Fill):
    """The same zeros for every tensor: nothing of it is looked at."""

    def __init__(self) -> None:
        super().__init__(0, 0.0)

    def __call__(self, name: str, at: int, count: int):  # type: ignore[no-untyped-def]
        import numpy as np

        return np.zeros(count, np.float32)


def inputs(work: Path) -> None:
    build(work / "small", "3m", "bfloat16", 1, seed=0)
    if not (work / "one" / "tuned").exists():
        for name, drift in (("base", 0.0), ("tuned", 1e-3)):
            (work / "one" / name).mkdir(parents=True, exist_ok=True)
            write(work / "one" / name / "model.safetensors", [("embed.weight", (262144, 4096))], "bfloat16", Fill(0, drift))
    for name in ("base", "tuned"):
        if not (work / "many" / name).exists():
            many(work / "many" / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("bench-work"))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    inputs(work)
    out, taskvec = work / "limits-out", [sys.executable, "-m", "taskvec"]
    edit = ["--alpha", "0.3", "-o", str(out), "-q", "--no-fsync"]
    jobs = {
        "taskvec --help": [*taskvec, "--help"],
        "subtract, 3 MB": [*taskvec, "subtract", str(work / "small/base"), str(work / "small/tuned"), *edit],
        "inspect, 70,000 tensors": [*taskvec, "inspect", str(work / "many/base")],
        "--dry-run, 70,000 tensors": [
            *taskvec, "subtract", str(work / "many/base"), str(work / "many/tuned"), *edit[:-2], "--dry-run",
        ],
        "subtract, one tensor of 2.1 GB": [*taskvec, "subtract", str(work / "one/base"), str(work / "one/tuned"), *edit],
    }  # fmt: skip
    print("| job | wall s | peak RSS MB |\n|---|---|---|")
    for name, command in jobs.items():
        samples: list[Sample] = []
        for _ in range(arguments.rounds + 1):
            remove(out)
            samples.append(measure(command, env=environment(), log=work / "limits.txt"))
        walls = [sample.wall for sample in samples[1:]]
        peak = max(sample.resident for sample in samples[1:])
        print(f"| {name} | {statistics.median(walls):.2f} [{min(walls):.2f}–{max(walls):.2f}] | {peak:.0f} |")
    remove(out)


if __name__ == "__main__":
    main()
