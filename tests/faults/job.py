"""Small jobs that take every path of a run: shards, side files in folders, a fine-tune, an adapter, outputs of each kind."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from taskvec.cli.main import _run

INPUTS = ("base", "old", "lora")
SHARDS = 3
_NAMES = [f"model.layers.{n}.mlp.up_proj.weight" for n in range(SHARDS)]


class Job(NamedTuple):
    """A command, and where its output is. `before`: a command whose output is there already."""

    arguments: tuple[str, ...]
    output: str
    before: tuple[str, ...] = ()
    flags: bool = True  # whether the file system can exchange two names in one call


_EDIT = ("subtract", "base", "old", "--alpha", "0.3", "-j", "1")
_EARLIER = ("add", "base", "lora", "--alpha", "1", "-j", "1", "-o")
JOBS = {
    "a folder": Job((*_EDIT, "-o", "out"), "out"),
    "a folder by an adapter": Job(("subtract", "base", "lora", "--alpha", "0.7", "-j", "1", "-o", "new/out"), "new/out"),
    "a single file": Job((*_EDIT, "-o", "out.safetensors"), "out.safetensors"),
    "a vector": Job(("extract", "base", "old", "-j", "1", "-o", "v.safetensors"), "v.safetensors"),
    "over a folder": Job((*_EDIT, "-o", "out", "--overwrite"), "out", (*_EARLIER, "out")),
    "over a folder in two steps": Job((*_EDIT, "-o", "out", "--overwrite"), "out", (*_EARLIER, "out"), flags=False),
    "over a file in two steps": Job(
        (*_EDIT, "-o", "out.safetensors", "--overwrite"), "out.safetensors", (*_EARLIER, "out.safetensors"), flags=False
    ),
}


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def write_inputs(here: Path) -> None:
    """Three shards and side files, a fine-tune in one file, and a LoRA."""
    import torch
    from safetensors.torch import save_file

    _write_model(here / "base", 1, shards=SHARDS)
    _write_model(here / "old", 2, shards=1)
    (here / "base" / "tokenizer").mkdir()
    (here / "base" / "tokenizer" / "vocab.json").write_text('{"a": 1}')
    (here / "base" / "config.json").write_text('{"model_type": "llama"}')
    (here / "lora").mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name in _NAMES:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(2, 24, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(8, 2, generator=generator)
    save_file(tensors, here / "lora" / "adapter_model.safetensors", {"format": "pt"})
    (here / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))


def _write_model(folder: Path, seed: int, *, shards: int) -> None:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(8, 24, generator=generator).to(torch.bfloat16) for name in _NAMES}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return
    files = {name: f"model-{n:05d}-of-{shards:05d}.safetensors" for n, name in enumerate(_NAMES, 1)}
    for name, file in files.items():
        save_file({name: tensors[name]}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def taskvec(*arguments: str) -> Outcome:
    """A command in this process and this folder."""
    before, sys.argv = sys.argv, ["taskvec", *arguments]
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = _run()
    finally:
        sys.argv = before
    return Outcome(code, out.getvalue(), err.getvalue())


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def contents(*roots: Path) -> dict[str, bytes]:
    """Every file below, by its path."""
    files = (path for root in roots for path in (root, *root.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def left_over(folder: Path) -> list[Path]:
    """The folders of runs that were ended."""
    return [path for path in folder.rglob(".*") if "taskvec-partial" in path.name]
