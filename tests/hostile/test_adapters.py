"""Every hostile adapter, subtracted and merged; and what is hostile in an adapter but means nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from ..checkpoint.craft import library_reads
from .adapters import ADAPTERS, LONG
from .conftest import Command, everything
from .good import adapter
from .test_headers import expect_refusal

COMMANDS = {
    "subtracted": ("subtract", "{base}", "{bad}", "-a", "1", "-o", "out"),
    "merged": ("lora", "merge", "{base}", "{bad}", "-o", "out.safetensors"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("case", ADAPTERS)
def test_a_hostile_adapter_is_one_line_and_no_output(case: str, command: str, taskvec: Command, here: Path) -> None:
    bad = ADAPTERS[case]
    bad.make(here)
    before = everything(here).keys()
    base = "square.safetensors" if (here / "square.safetensors").exists() else "base"
    told = taskvec(*(argument.format(base=base, bad=bad.name) for argument in COMMANDS[command]))
    expect_refusal(told, ("bad", *bad.words), bad.code)
    assert everything(here).keys() == before, "something was left behind"


# Fields that no merge looks at, so that nothing in them may be tried, imported or opened.
HARMLESS: dict[str, dict[str, Any]] = {
    "an expression of whole names": {"target_modules": "(a*)*b" + "(.*)*" * 100},
    "an expression of what is left out": {"exclude_modules": "((h|h.)+)+x"},
    "an expression of layers": {"layers_pattern": ["(h*)*x"], "layers_to_transform": [0]},
    "expressions for layers and names": {"layers_pattern": "(" * 1000, "target_modules": ["(" * 1000]},
    "a module to import": {"auto_mapping": {"base_model_class": "system", "parent_library": "hostile_module"}},
    "a base elsewhere": {"base_model_name_or_path": "../../../../etc/passwd"},
    "a base on another machine": {"base_model_name_or_path": "https://example.org/evil", "revision": "\x1b[2J"},
    "a base that draws": {"base_model_name_or_path": "\x1b[2J\u202e[/red]\n", "revision": None},
    "a legal pattern that repeats": {"alpha_pattern": {".*.*.*.*.*.*.*.*.*.*.*.*x": 1, "(h|h.|.)*(k|v)_proj": 2}},
    "an alternative of many": {"rank_pattern": {"|".join(f"(k|v){n}" for n in range(100)): 4}},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_a_merge_has_no_use_for_is_not_evaluated(case: str, taskvec: Command, here: Path) -> None:
    (here / "hostile_module.py").write_text("raise SystemExit('imported')")
    adapter(**HARMLESS[case])(here)
    told = taskvec("lora", "merge", "base", "bad", "-o", "out")
    assert told.code == 0, told.err
    assert "hostile_module" not in sys.modules
    assert all(line.isprintable() for line in (told.out + told.err).splitlines())
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):  # its factors are zeros
        assert library_reads((here / "out" / name).read_bytes()) == library_reads((here / "base" / name).read_bytes())


@pytest.mark.parametrize(
    "key", ["h.*q", "(?:h.)*q", "[^x]+q", r".*\.q", ".*" * 20 + "q", "(h|.)*q", "(h.h|h.|.)+q|never", "a?" * 20 + "q"]
)
def test_a_legal_pattern_on_a_long_name_means_what_it_means_to_peft(key: str, taskvec: Command, here: Path) -> None:
    """PEFT would take for ever over some of these; that they match is plain to see."""
    names = {f"base_model.model.{LONG}.lora_A.weight": [2, 2], f"base_model.model.{LONG}.lora_B.weight": [2, 2]}
    adapter(None, names, alpha_pattern={key: 6})(here)
    factors = {n: np.eye(2, dtype="<f4") for n in names}
    _save(here / "bad" / "adapter_model.safetensors", factors)
    _save(here / "long.safetensors", {f"{LONG}.weight": np.zeros((2, 2), "<f4")})
    told = taskvec("lora", "merge", "long.safetensors", "bad", "-o", "out.safetensors")
    assert told.code == 0, told.err
    assert np.array_equal(load_file(here / "out.safetensors")[f"{LONG}.weight"], 3 * np.eye(2))  # 6 / r · B A


def _save(path: Path, tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    from safetensors.numpy import save_file

    save_file(tensors, path)
