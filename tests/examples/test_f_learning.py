"""The reproduction of F-Learning runs, is exact, starts again where it ended, and says no when a number is wrong."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
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


def rows(path: Path, said: str, count: int = 12) -> Path:
    found = [
        {
            "id": str(i), "prompt": f"{said} {i} is", "target_old": f"old{i}", "target_new": f"new{i}",
            "paraphrases": [f"one calls {said} {i}"], "locality": [{"prompt": f"near {said} {i} is", "target": f"kept{i}"}],
        }
        for i in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def made(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The stages that a run says it made."""
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split()[0].partition("/")[2] for line in done.stdout.splitlines() if line.startswith("  seed-0/")]


def test_other_rows_under_the_same_name_make_every_stage_again(tmp_path: Path) -> None:
    file = rows(tmp_path / "rows.jsonl", "this")
    options = ("--facts", str(file), "--steps", "1", "--limit", "8")
    first = made(run(tmp_path / "out", *options))
    assert {"world", "pretrained", "original", "old-full", "old-lora"} <= set(first)
    assert made(run(tmp_path / "out", *options)) == []
    assert json.loads((tmp_path / "out/results.json").read_text())["settings"]["edits"] == 4  # half of the 8 rows
    rows(file, "that")
    assert made(run(tmp_path / "out", *options)) == first


def test_another_model_in_the_same_folder_makes_again_what_starts_from_it(out: Path, tmp_path: Path) -> None:
    shutil.copytree(out / "seed-0" / "pretrained", tmp_path / "model")
    options = ("--model", str(tmp_path / "model"))
    first = made(run(tmp_path / "out", *options))
    assert "original" in first and made(run(tmp_path / "out", *options)) == []
    weights = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})
    assert made(run(tmp_path / "out", *options)) == [stage for stage in first if stage != "world"]


UNUSABLE = {
    "no column": (b"\n{}\n", "rows.jsonl, line 2: without id, prompt"),
    "no JSON": (b"row", "rows.jsonl, line 1: no JSON object"),
    "no object": (b"[1]\n", "rows.jsonl, line 1: no JSON object"),
    "no row": (b"", "rows.jsonl: 0 rows"),
    "not text": (b"\xff\xfe", "rows.jsonl: cannot be read as lines of text"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_file_without_rows_of_facts_ends_with_one_line_that_says_where(case: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("f_learning_world", ROOT / "examples/f_learning/world.py")
    assert spec and spec.loader
    world = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = world  # dataclasses look there
    spec.loader.exec_module(world)
    content, words = UNUSABLE[case]
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        world.from_file(tmp_path / "rows.jsonl", 0, 400)
    assert words in str(ended.value) and "\n" not in str(ended.value)


def test_facts_that_are_not_there_are_refused_in_one_line(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--facts", str(tmp_path / "rows.jsonl"))
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert done.stderr == f"{tmp_path}/rows.jsonl: no such file, expected rows of facts, .jsonl or .jsonl.gz\n"
