"""The reproduction's verdict: each point is met by good numbers and missed by the smallest bad one."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FIGURES = Path(__file__).parents[2] / "examples/f_learning/figures.py"
SETTINGS = SimpleNamespace(sweep=(0.5, 1.0))
# reliability, generality, locality: gains over a direct arm at 30, 20, 50
GAINS = {
    "direct full": (0, 0, 0),
    "direct lora": (0, 0, 0),
    "full>full": (9, 8, 7),
    "lora>full": (8, 7, 0),
    "lora>lora": (6, 5, 0),
    "random>full": (1, 0, 0),
    "other>full": (1, 0, -9),
    "full λ=-1 >full": (-4, -4, -9),
}
EXACT = {"passed": True, "elements_that_differ": 0}


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("f_learning_figures", FIGURES)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seeds() -> dict[int, dict[str, Any]]:
    arms = {
        name: {"reliability": 30.0 + r, "generality": 20.0 + g, "locality": 50.0 + k} for name, (r, g, k) in GAINS.items()
    }
    for kind in ("full", "lora"):
        for scale, old in ((0.5, 0.8), (1.0, 0.6)):
            arms[f"{kind} forget only, λ={scale:g}"] = {"old_probability": old}
    arms["original"] = {"old_probability": 0.9}
    return {seed: {"arms": copy.deepcopy(arms), "checks": {"forgot": dict(EXACT)}} for seed in range(3)}


def missed(figures: ModuleType, found: dict[int, dict[str, Any]]) -> str:
    return "".join(point for point, verdict in figures.acceptance(found, SETTINGS).items() if not verdict["passed"])


def test_good_numbers_meet_every_point(figures: ModuleType) -> None:
    assert missed(figures, seeds()) == ""


@pytest.mark.parametrize(
    ("arm", "column", "change", "point"),
    [
        ("lora>lora", "reliability", -2.5, "a"),  # +3.5 in the mean
        ("lora>lora", "generality", -1.5, "a"),
        ("lora>full", "locality", -1.5, "a"),
        ("full>full", "reliability", 5, "b"),  # LoRA 6 behind
        ("full>full", "generality", 5, "b"),
        ("random>full", "reliability", 2.5, "c"),
        ("random>full", "reliability", -4.5, "c"),
        ("other>full", "reliability", 1.5, "c"),
        ("full λ=-1 >full", "reliability", 4, "c"),  # no loss
        ("lora forget only, λ=1", "old_probability", 0.2, "d"),  # as at λ = 0.5
        ("original", "old_probability", -0.2, "d"),
    ],
)
def test_a_bad_mean_misses_its_point(figures: ModuleType, arm: str, column: str, change: float, point: str) -> None:
    found = seeds()
    for rows in found.values():
        rows["arms"][arm][column] += change
    assert missed(figures, found) == point


def test_one_seed_without_a_gain_misses_a(figures: ModuleType) -> None:
    found = seeds()
    found[1]["arms"]["full>full"]["generality"] = 20.0
    assert missed(figures, found) == "a"


def test_one_seed_that_does_not_fall_misses_d(figures: ModuleType) -> None:
    found = seeds()
    found[2]["arms"]["full forget only, λ=1"]["old_probability"] = 0.8
    assert missed(figures, found) == "d"


def test_one_wrong_file_or_none_checked_misses_e(figures: ModuleType) -> None:
    found = seeds()
    found[0]["checks"]["forgot"]["passed"] = False
    assert missed(figures, found) == "e"
    assert missed(figures, {seed: {**rows, "checks": {}} for seed, rows in seeds().items()}) == "e"


def test_paired_differences_are_within_a_seed(figures: ModuleType) -> None:
    found = seeds()
    for seed, rows in found.items():
        for name in ("full>full", "direct full"):
            for column in figures.LEARNED:
                rows["arms"][name][column] = 10.0 * seed + (3.0 if name == "full>full" else 0.0)
    arm = SimpleNamespace(name="full>full", against="direct full", learn="full", vector="old-full")
    gain = figures.paired(found, [arm])["full>full"]["reliability"]
    assert (gain["mean"], gain["sd"], gain["above"]) == (3.0, 0.0, 3)


def test_equal_reliability_is_read_between_two_epochs(figures: ModuleType) -> None:
    rows = [{"reliability": r, "generality": g, "locality": 80.0 - g} for r, g in ((40.0, 10.0), (60.0, 30.0))]
    found = figures.equal_reliability({0: {"curves": {"direct full": rows}}})["direct full"]
    assert found["50"] == {
        key: figures.spread([value]) for key, value in (("epochs", 1.5), ("generality", 20.0), ("locality", 60.0))
    }
    assert "70" not in found
