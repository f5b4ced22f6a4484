"""From every seed's rows to figures: means, paired differences, equal reliability, and whether the acceptance is met."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiment import Arm, Settings

COLUMNS = (
    "reliability",
    "generality",
    "locality",
    "neighbours",
    "bystanders",
    "old_accuracy",
    "old_probability",
    "perplexity",
)
LEARNED = ("reliability", "generality", "locality", "neighbours", "bystanders")
PAPER = ("full>full", "lora>full", "lora>lora")
EQUAL_RELIABILITY = (50, 70, 90)
Seeds = dict[int, dict[str, Any]]  # seed: {"arms": {arm: scores}, "curves": {arm: rows}, "checks": …, "norms": …}


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean and sample standard deviation; none of one value."""
    return {"mean": fmean(values), "sd": stdev(values) if len(values) > 1 else None, "each": list(values)}


def rows(seeds: Seeds, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    return {a.name: {column: spread(_each(seeds, a.name, column)) for column in COLUMNS} for a in arms}


def paired(seeds: Seeds, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Each arm that forgets, minus the arm of the same seed that does not; `above` counts the seeds with a gain."""
    return {
        arm.name: {
            "against": arm.against,
            **{column: _difference(seeds, arm.name, arm.against, column) for column in LEARNED},
        }
        for arm in arms
        if arm.learn and arm.vector
    }


def equal_reliability(seeds: Seeds) -> dict[str, dict[str, Any]]:
    """Generality, locality and epochs where an arm's curve first reaches a reliability; only if it does in every seed."""
    found: dict[str, dict[str, Any]] = {}
    for name in next(iter(seeds.values()))["curves"]:
        found[name] = {}
        for level in EQUAL_RELIABILITY:
            crossings = [_crossing(seed["curves"][name], level) for seed in seeds.values()]
            reached = [crossing for crossing in crossings if crossing is not None]
            if len(reached) == len(crossings):
                found[name][str(level)] = {key: spread([crossing[key] for crossing in reached]) for key in reached[0]}
    return found


def acceptance(seeds: Seeds, settings: Settings) -> dict[str, dict[str, Any]]:
    """The five points, each with the numbers it was judged by."""
    return {
        "a": _gains(seeds),
        "b": _lora_as_good(seeds),
        "c": _controls(seeds),
        "d": _falling(seeds, settings),
        "e": exactness(seeds),
    }


def exactness(seeds: Seeds) -> dict[str, Any]:
    """(e) Every θ′ as torch or PEFT computes it."""
    checks = {f"seed {seed} {name}": found for seed, rows in seeds.items() for name, found in rows["checks"].items()}
    errors = [found["largest_error"] for found in checks.values() if "largest_error" in found]
    return {
        "passed": bool(checks) and all(found["passed"] for found in checks.values()),
        "failed": [name for name, found in checks.items() if not found["passed"]],
        "checked": len(checks),
        "elements_that_differ": sum(found.get("elements_that_differ", 0) for found in checks.values()),
        "largest_lora_error": max(errors, default=None),
    }


def _gains(seeds: Seeds) -> dict[str, Any]:
    """(a) Reliability and generality up by 4 points in the mean, and up at all in every seed; locality down by 1 at most."""
    judged, passed = {}, True
    for name in PAPER:
        against = f"direct {name.split('>')[1]}"
        up = [_difference(seeds, name, against, column) for column in ("reliability", "generality")]
        kept = _difference(seeds, name, against, "locality")
        passed &= all(d["mean"] >= 4 and d["above"] == len(seeds) for d in up) and kept["mean"] >= -1
        judged[name] = {"reliability": up[0]["mean"], "generality": up[1]["mean"], "locality": kept["mean"]}
        judged[name]["worst_seed"] = min(min(d["each"]) for d in up)
    return {"passed": passed, **judged}


def _lora_as_good(seeds: Seeds) -> dict[str, Any]:
    """(b) Forgetting by LoRA at most 5 points behind forgetting in full."""
    behind = {c: _difference(seeds, "lora>full", "full>full", c)["mean"] for c in ("reliability", "generality", "locality")}
    return {"passed": behind["reliability"] >= -5 and behind["generality"] >= -5, **behind}


def _controls(seeds: Seeds) -> dict[str, Any]:
    """(c) A random direction does nothing, other facts do not help, adding does harm."""
    gains = {
        name: _difference(seeds, name, "direct full", "reliability")["mean"]
        for name in ("random>full", "other>full", "full λ=-1 >full")
    }
    random, other, added = gains.values()
    return {"passed": abs(random) <= 3 and other <= 2 and added < 0, **gains}


def _falling(seeds: Seeds, settings: Settings) -> dict[str, Any]:
    """(d) The more is subtracted the less probable the old answer, strictly, in every seed."""
    paths = {}
    for kind in ("full", "lora"):
        names = ["original", *(f"{kind} forget only, λ={scale:g}" for scale in settings.sweep)]
        paths[kind] = [[rows["arms"][name]["old_probability"] for name in names] for rows in seeds.values()]
    falls = all(a > b for each in paths.values() for path in each for a, b in pairwise(path))
    return {"passed": falls, **{kind: [fmean(step) for step in zip(*each, strict=True)] for kind, each in paths.items()}}


def _each(seeds: Seeds, arm: str, column: str) -> list[float]:
    return [rows["arms"][arm][column] for rows in seeds.values()]


def _difference(seeds: Seeds, arm: str, against: str, column: str) -> dict[str, Any]:
    gains = [a - b for a, b in zip(_each(seeds, arm, column), _each(seeds, against, column), strict=True)]
    return {**spread(gains), "above": sum(gain > 0 for gain in gains)}


def _crossing(curve: list[dict[str, float]], level: float) -> dict[str, float] | None:
    """The row, between two epochs by a straight line, at which reliability first is `level`."""
    for epoch, (before, after) in enumerate(pairwise(curve), start=1):
        low, high = before["reliability"], after["reliability"]
        if low < level <= high:
            part = (level - low) / (high - low)
            between = {key: before[key] + part * (after[key] - before[key]) for key in ("generality", "locality")}
            return {"epochs": epoch + part, **between}
    return None
