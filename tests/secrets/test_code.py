"""The output of a model with code of its own: transformers is the oracle that it loads as the base did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import taskvec as tv
from taskvec.cli.main import _run

from ..hub.stand_in import Hub
from .custom import CODE, write_custom

LOAD = """
import json, sys, torch
from transformers import AutoModel, AutoTokenizer
found = {}
for folder in sys.argv[1:]:
    try:
        model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        found[folder] = {
            "classes": [type(model).__name__, type(model.config).__name__, type(tokenizer).__name__],
            "missing": [len(report[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")],
            "of ones": model(torch.ones(6)).tolist(),
            "ids": tokenizer("hello")["input_ids"],
        }
    except Exception as error:
        found[folder] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_custom(tmp_path / "base", 1)
    write_custom(tmp_path / "old", 2)
    return tmp_path


def loaded(here: Path, *folders: str) -> dict[str, Any]:
    """What transformers makes of each folder, in a process of its own: it runs their code."""
    env = {**os.environ, "HF_HOME": str(here / "hf"), "HF_MODULES_CACHE": str(here / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *folders], cwd=here, env=env, capture_output=True, text=True, timeout=120, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def python_in(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.rglob("*.py")}


def test_transformers_loads_the_output_by_the_code_of_the_base_and_not_without_it(here: Path) -> None:
    tv.subtract("base", "old", alpha=0.5, output="out", fsync=False)
    tv.subtract("base", "old", alpha=0.5, output="bare", fsync=False, code=False)
    assert python_in(here / "out") == CODE and python_in(here / "bare") == {}
    found = loaded(here, "base", "out", "bare")
    base, out = found["base"], found["out"]
    assert out["classes"] == base["classes"] == ["OwnModel", "OwnConfig", "OwnTokenizer"]
    assert out["missing"] == base["missing"] == [0, 0, 0] and out["ids"] == base["ids"]
    for folder, did in (("base", base), ("out", out)):
        held = load_file(here / folder / "model.safetensors")
        torch.testing.assert_close(torch.tensor(did["of ones"]), 2 * (held["inner.up.weight"].sum(1) + held["inner.up.bias"]))
    assert out["of ones"] != base["of ones"]
    assert "configuration_own.py" in found["bare"]  # what is missing, as the report of that run said


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["taskvec", *arguments])
    assert _run() == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", [["subtract"], ["add"]])
def test_the_summary_the_card_and_the_record_say_that_there_is_code(
    verb: list[str], here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = [*verb, "base", "old", "-a", "0.5", "--no-fsync", "-o"]
    printed = command(monkeypatch, capsys, *run, "out")
    line = next(line for line in printed.splitlines() if line.startswith("  code "))
    assert "that came with the base: configuration_own.py, factor.py" in line and "trust_remote_code" in line
    card = (here / "out" / "README.md").read_text()
    assert all(f"- `{name}`" in card for name in CODE) and "`trust_remote_code=True` runs it: read it first" in card
    assert "training_loop.py" not in card
    assert set(CODE) < set(json.loads((here / "out" / "taskvec.json").read_text())["side_files"])
    assert tv.verify("out", full=True).ok


def test_without_code_the_summary_and_the_card_say_what_no_longer_loads(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = command(monkeypatch, capsys, "subtract", "base", "old", "-a", "0.5", "--no-code", "--no-fsync", "-o", "out")
    expected = "without it AutoConfig, AutoModel, AutoTokenizer cannot be loaded from the output"
    assert expected in next(line for line in printed.splitlines() if line.startswith("  code "))
    card = (here / "out" / "README.md").read_text()
    assert expected in card and "--no-code" in card
    content = json.loads((here / "out" / "taskvec.json").read_text())
    assert content["options"]["code"] is False and not any(name.endswith(".py") for name in content["side_files"])
    assert tv.verify("out", full=True).skipped == []


def test_json_and_the_plan_list_the_code(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["subtract", "base", "old", "-a", "0.5", "--no-fsync", "--overwrite", "-o", "out"]
    names, every = sorted(CODE), sorted([*CODE, "training_loop.py"])
    for options, code, left in (([], names, []), (["--no-code"], [], every)):
        plan = json.loads(command(monkeypatch, capsys, *run, *options, "--dry-run", "--json"))["plan"]
        assert plan["code"] == code and plan["code_left_out"] == left
        assert [name for name in plan["side_files"] if name.endswith(".py")] == code
        report = json.loads(command(monkeypatch, capsys, *run, *options, "--json"))
        assert report["code"] == code and report["code_left_out"] == left
    assert "code that came with the base: " in command(monkeypatch, capsys, *run, "--dry-run")


@pytest.mark.parametrize("keep", [True, False])
def test_of_a_model_on_the_hub_only_the_code_that_is_named_is_fetched(keep: bool, hub: Hub, here: Path) -> None:
    hub.add_model("org/own", here / "base")
    tv.subtract("org/own", "old", alpha=0.5, output="out", fsync=False, code=keep)
    assert python_in(here / "out") == (CODE if keep else {})
    cached = {path.name for path in hub.client.cache.rglob("*.py")}
    assert cached == (set(CODE) if keep else set())


def test_a_model_without_code_says_nothing_of_it(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("base", "old"):
        for path in (here / folder).glob("*.py"):
            path.unlink()
        (here / folder / "config.json").write_text('{"model_type": "llama"}')
        (here / folder / "tokenizer_config.json").write_text("{}")
    for options in ([], ["--no-code"]):
        printed = command(
            monkeypatch, capsys, "add", "base", "old", "-a", "1", "--no-fsync", "--overwrite", "-o", "out", *options
        )
        assert "code" not in printed and "## Code" not in (here / "out" / "README.md").read_text()
