"""A folder of small inputs to run commands on, and a runner that checks that no run changes an input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

from taskvec.cli.main import _run

SHAPES = {
    "model.embed.weight": (32, 8), "model.h.0.q.weight": (8, 24), "model.h.0.q.bias": (8,), "model.h.1.q.weight": (8, 24),
}  # fmt: skip
SHARDS = {"model-00001-of-00002.safetensors": slice(0, 2), "model-00002-of-00002.safetensors": slice(2, 5)}
INPUTS = ("base", "old", "lora", "other.safetensors")
Tensors = dict[str, torch.Tensor]


class Outcome(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


def random_tensors(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    return {**found, "model.position_ids": torch.arange(8)}


def write_base(folder: Path) -> None:
    """A model folder of two shards with an index, a tokenizer and a config."""
    folder.mkdir()
    tensors = random_tensors(1)
    names = list(tensors)
    weight_map = {}
    for file, part in SHARDS.items():
        save_file({name: tensors[name] for name in names[part]}, folder / file, {"format": "pt", "trained_by": "nobody"})
        weight_map |= dict.fromkeys(names[part], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type":  "llama", "dtype": "bfloat16"}\n')
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / ".secret").write_text("hf_token")


def write_adapter(folder: Path, **config: object) -> None:
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    shapes = {"lora_A": (2, 24), "lora_B": (8, 2)}
    tensors = {f"base_model.model.model.h.0.q.{x}.weight": torch.randn(s, generator=generator) for x, s in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `base` (two shards), `old` (one file, no side files), `lora`, `other` (another model)."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    (tmp_path / "old").mkdir()
    save_file(random_tensors(2), tmp_path / "old" / "model.safetensors", {"format": "pt"})
    write_adapter(tmp_path / "lora")
    save_file({"another.w": torch.ones(3)}, tmp_path / "other.safetensors")
    return tmp_path


@pytest.fixture
def taskvec(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command line in this process, and checks that the inputs are the same afterwards, bytes and times."""

    def run(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["taskvec", *arguments])
        before = snapshot(here, *INPUTS)
        code = _run()
        assert snapshot(here, *INPUTS) == before, "an input was changed"
        return Outcome(code, *capsys.readouterr())

    return run


def snapshot(root: Path, *names: str) -> dict[str, tuple[bytes, int, int]]:
    """Everything under these names: content, modification time, mode."""
    paths = [path for name in names for path in ((root / name), *(root / name).rglob("*"))]
    return {
        str(path.relative_to(root)): (
            path.read_bytes() if path.is_file() else b"",
            path.stat().st_mtime_ns,
            path.stat().st_mode,
        )
        for path in paths
    }


def files_under(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
