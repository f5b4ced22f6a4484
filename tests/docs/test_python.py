"""Every block of docs/python.md, run as a reader would: in order, in one folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig
from safetensors.torch import load_file

from ..delta.adapters import peft_oracle as oracle

pytestmark = [pytest.mark.filterwarnings(line) for line in oracle.PEFT_CHATTER]
PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("base", "old", "newer"), 1):
        oracle.save_model(oracle.random_model(oracle.llama(), seed), tmp_path / name)
    oracle.train(oracle.llama(), tmp_path / "lora", LoraConfig(r=2, target_modules=["q_proj"]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_and_does_what_it_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, Any] = {}
    page = blocks(PAGE)
    assert len(page) == 9
    for block in page:
        exec(compile(block, str(PAGE), "exec"), namespace)
    shown = capsys.readouterr().out
    assert "TaskVector(0.5·(old − base) + 0.5·(newer − base) − 0.5·lora)" in shown
    assert "edited = base − 0.3·(old − base)" in shown
    assert (folder / "edited/model.safetensors").read_bytes() == (folder / "again/model.safetensors").read_bytes()
    edited, base = load_file("edited/model.safetensors"), load_file("base/model.safetensors")
    assert all(not edited[name].equal(base[name]) for name in base)
    live = namespace["model"].state_dict()
    assert all(live[name].equal(tensor) for name, tensor in edited.items())


def test_the_readme_shows_python_that_runs(folder: Path) -> None:
    block, in_memory = blocks(PAGE.parents[1] / "README.md")
    (folder / "path/to").mkdir(parents=True)
    for name, typed in {"base": "model", "old": "old-facts"}.items():
        (folder / name).rename(folder / "path/to" / typed)
    namespace: dict[str, Any] = {"evaluate": lambda model: None, "model": load_file("path/to/model/model.safetensors")}
    exec(compile(block + in_memory, "README.md", "exec"), namespace)
    assert (folder / "edited/taskvec.json").is_file()
