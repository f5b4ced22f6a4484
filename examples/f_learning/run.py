"""Forgetting before learning (Ni et al., ACL 2024), end to end on a laptop's processor, with taskvec for every subtraction.

    python examples/f_learning/run.py [--seeds 0-4] [--out DIR]         the whole experiment, about three minutes a seed
    python examples/f_learning/run.py --demo                            one seed, the arms of the paper, a picture
    python examples/f_learning/run.py --smoke                           one seed in seconds: is the arithmetic right?
    python examples/f_learning/run.py --facts FILE [--model NAME]       other facts, another model

Every stage is a folder in --out and is not made again. Exit 0 only if the acceptance is met: (a) to (e) of the made-up
world; of --facts, --model, --demo and --smoke only (e), the exactness of the files.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import experiment
import figures
import picture
import report
import torch
import transformers
from experiment import Seed, Settings
from rich.console import Console
from train import Pretraining

SMOKE = Settings(
    edits=40, pretraining=Pretraining(steps=20), epochs_original=1, epochs_old=1, epochs_new=1, scale=1.5, sweep=(0.5, 1.5)
)
OF_A_FILE = Settings(pretraining=Pretraining(steps=1000, batch_size=64, answers_only=True), epochs_new=16, epochs_curve=0)

console = Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else 150)


def main() -> int:
    options = _options()
    _quiet(options.threads)
    settings, small = _settings(options), options.demo or options.smoke
    whole = not (small or options.facts or options.model)
    seeds: figures.Seeds = {}
    for seed in options.seeds:
        seeds[seed] = _run_seed(settings, seed, options, small)
        results = _results(settings, seeds, small, whole)
        (options.out / "results.json").write_text(json.dumps(_short(results), indent=1, ensure_ascii=False) + "\n")
    _show(results, "the same person" if not options.facts else "unrelated")
    if not options.smoke:
        drawn = options.out / "f-learning.svg"
        drawn.write_text(picture.draw(results), encoding="utf-8")
        console.print(f"\npicture: {drawn}")
    return 0 if all(found["passed"] for found in results["acceptance"].values()) else 1


def _run_seed(settings: Settings, number: int, options: argparse.Namespace, small: bool) -> dict[str, Any]:
    """Every arm of one seed; what is already in its folder is read from there."""
    out: Path = options.out / f"seed-{number}"
    if options.fresh:
        shutil.rmtree(out, ignore_errors=True)
    console.print(f"[bold cyan]seed {number}[/bold cyan]")
    started = time.monotonic()
    seed = Seed(settings, number, out, options.device, lambda made: console.print(f"  {made}", style="dim"))
    every = experiment.arms(settings, small) + experiment.sweep(settings, small)
    found = {
        "edits": len(seed.world.edits),
        "arms": {arm.name: seed.scores(arm) for arm in every},
        "curves": {} if small else {arm.name: seed.curve(arm) for arm in experiment.curves(settings)},
        "checks": seed.checks(every),
        "norms": seed.norms(),
    }
    console.print(f"  seed {number}: {time.monotonic() - started:.0f} s")
    return found


def _results(settings: Settings, seeds: figures.Seeds, small: bool, whole: bool) -> dict[str, Any]:
    """All that is known after the seeds so far. Points (a) to (d) are for the `whole` experiment on the made-up world."""
    arms, swept = experiment.arms(settings, small), experiment.sweep(settings, small)
    described = asdict(settings) | {"facts": _named(settings.facts), "model": _named(settings.model)}
    # of a file: half of its rows, not what was asked of a made-up world
    described["edits"] = next(iter(seeds.values()))["edits"]
    return {
        "settings": described,
        "seeds": list(seeds),
        "arms": figures.rows(seeds, arms),
        "paired": figures.paired(seeds, arms),
        "sweep": figures.rows(seeds, swept),
        "sweep_paired": figures.paired(seeds, swept),
        "equal_reliability": {} if small else figures.equal_reliability(seeds),
        "norms": {name: figures.spread([s["norms"][name] for s in seeds.values()]) for name in ("old-full", "old-lora")},
        "observed": {} if small or whole else figures.acceptance(seeds, settings),
        "acceptance": figures.acceptance(seeds, settings) if whole else {"e": figures.exactness(seeds)},
    }


def _short(value: Any) -> Any:
    """Six digits of every number are enough."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_short(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _named(source: str | None) -> str | None:
    """A file or folder without where it lies; a Hub name as it is."""
    return Path(source).name if source and Path(source).exists() else source


def _show(results: dict[str, Any], bystanders: str) -> None:
    console.print()
    settings, count = results["settings"], len(results["seeds"])
    title = f"Arms: λ = {settings['scale']:g}, {settings['epochs_new']} epochs, {count} seed{'s' * (count > 1)}"
    console.print(report.arms_table(results["arms"], bystanders, title))
    console.print(report.arms_table(results["sweep"], bystanders, "The λ sweep"))
    if results["sweep_paired"]:
        console.print(report.paired_table({**results["paired"], **results["sweep_paired"]}, bystanders))
    if results["equal_reliability"]:
        console.print(report.equal_table(results["equal_reliability"]))
    if results["observed"]:
        console.print(report.acceptance_table(results["observed"], "Not judged here, for comparison"))
    console.print(report.acceptance_table(results["acceptance"], "Acceptance"))
    console.print(report.in_words(results), soft_wrap=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=_numbers, default=None, help="like 0-4 or 0,7 (default: 0-4; 0 with --demo and --smoke)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("f-learning-out"), help="folder for every stage, about 100 MB a seed"
    )
    parser.add_argument("--facts", type=Path, help="rows of facts, .jsonl or .jsonl.gz; see README.md")
    parser.add_argument("--limit", type=int, default=400, help="of those rows; half of them change")
    parser.add_argument("--model", help="folder or Hub name of a causal language model, instead of a small one from nothing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of torch; another number changes the last bits")
    parser.add_argument("--demo", action="store_true", help="one seed, fewer arms, about two minutes")
    parser.add_argument("--smoke", action="store_true", help="one seed, hardly trained: only whether it runs and is exact")
    parser.add_argument("--fresh", action="store_true", help="make every stage again")
    for name, kind in {"scale": float, "epochs-original": int, "epochs-old": int, "epochs-new": int}.items():
        parser.add_argument(f"--{name}", type=kind, help=f"instead of {getattr(Settings(), name.replace('-', '_'))}")
    for name, kind in {"steps": int, "full-learning-rate": float, "lora-learning-rate": float}.items():
        parser.add_argument(f"--{name}", type=kind)
    options = parser.parse_args()
    if options.facts and not options.facts.is_file():
        parser.exit(2, f"{options.facts}: no such file, expected rows of facts, .jsonl or .jsonl.gz\n")
    options.seeds = options.seeds or ([0] if options.demo or options.smoke else list(range(5)))
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def _settings(options: argparse.Namespace) -> Settings:
    start = SMOKE if options.smoke else OF_A_FILE if options.facts else Settings()
    facts = str(options.facts) if options.facts else None
    settings = replace(start, facts=facts, limit=options.limit, model=options.model)
    given = {name: getattr(options, name) for name in ("scale", "epochs_original", "epochs_old", "epochs_new")}
    rates = {name: getattr(options, name) for name in ("full_learning_rate", "lora_learning_rate")}
    return replace(
        settings,
        **_only_given(given),
        pretraining=replace(settings.pretraining, **_only_given({"steps": options.steps})),
        fine_tuning=replace(settings.fine_tuning, **_only_given(rates)),
    )


def _only_given(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _numbers(text: str) -> list[int]:
    """`0-4` or `0,7`."""
    ranges = [part.split("-") for part in text.split(",")]
    return [number for ends in ranges for number in range(int(ends[0]), int(ends[-1]) + 1)]


def _quiet(threads: int) -> None:
    """One line per stage is enough."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


if __name__ == "__main__":
    sys.exit(main())
