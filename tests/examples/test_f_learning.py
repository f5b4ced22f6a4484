"""The reproduction of F-Learning runs, is exact, starts again where it ended, and says no when a number is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
FULL, LORA = "forgot-old-full-1.5", "forgot-old-lora-1.5"


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples/f_learning/run.py"), "--smoke", "--out", str(out), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("f-learning")
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_edited_model_is_what_torch_and_peft_compute(out: Path) -> None:
    exact = json.loads((out / "results.json").read_text())["acceptance"]["e"]
    assert exact["passed"] and exact["elements_that_differ"] == 0
    assert exact["checked"] == 5  # two λ of the full vector, two of the adapter, one of the random control
    assert exact["largest_lora_error"] <= 1e-6


def test_forgetting_moved_the_weights_away_from_what_was_learned(out: Path) -> None:
    original, old, forgot = (
        load_file(out / "seed-0" / name / "model.safetensors") for name in ("original", "old-full", FULL)
    )
    weight = "transformer.h.0.mlp.c_fc.weight"
    assert ((forgot[weight] - original[weight]) * (old[weight] - original[weight])).sum() < 0
    lora = load_file(out / "seed-0" / LORA / "model.safetensors")
    assert not lora[weight].equal(original[weight]) and lora["lm_head.weight"].equal(original["lm_head.weight"])


def test_a_second_run_makes_nothing_again_and_wrong_files_fail_it(out: Path) -> None:
    edits = [out / "seed-0" / name / "model.safetensors" for name in (FULL, LORA)]
    for edited in edits:
        tensors = load_file(edited)
        tensors["lm_head.weight"][0, 0] += 1e-6  # which the adapter does not touch
        save_file(tensors, edited, metadata={"format": "pt"})
    made = [edited.stat().st_mtime_ns for edited in edits]
    again = run(out)
    assert again.returncode == 1, again.stdout + again.stderr
    assert [edited.stat().st_mtime_ns for edited in edits] == made
    assert json.loads((out / "results.json").read_text())["acceptance"]["e"]["failed"] == [f"seed 0 {FULL}", f"seed 0 {LORA}"]
