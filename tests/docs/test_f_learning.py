"""Every command of docs/f-learning.md, run as it stands, on small models."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from peft import LoraConfig

from ..delta.adapters import peft_oracle as oracle

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]
ROOT = Path(__file__).parents[2]
SCORE = """
import json, sys
from pathlib import Path
from safetensors.torch import load_file
weights = load_file(Path(sys.argv[1]) / "model.safetensors")
size = float(weights["lm_head.weight"].norm())
Path(sys.argv[2]).write_text(json.dumps({"old": size, "rest": 1.0}))
"""


def commands(page: Path) -> list[str]:
    return re.findall(r"^    (taskvec .*)$", page.read_text(), re.MULTILINE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    oracle.save_model(oracle.random_model(oracle.llama(), 1), tmp_path / "original")
    oracle.save_model(oracle.random_model(oracle.llama(), 2), tmp_path / "original-again")
    oracle.train(oracle.llama(), tmp_path / "old-lora", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    (tmp_path / "score.py").write_text(SCORE)
    return tmp_path


def test_every_command_of_the_page_runs(folder: Path) -> None:
    found = commands(ROOT / "docs" / "f-learning.md")
    assert len(found) == 5 and {command.split()[1] for command in found} == {"diff", "subtract", "verify", "sweep"}
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # where the package is not installed
    for command in found:
        words = shlex.split(command.replace("python score.py", f"{sys.executable} score.py"))
        done = subprocess.run(
            [sys.executable, "-m", *words], cwd=folder, capture_output=True, text=True, check=False, env=env
        )
        assert done.returncode == 0, (command, done.stderr)
    assert (folder / "forgot/taskvec.json").is_file() and (folder / "sweep/sweep.svg").is_file()
