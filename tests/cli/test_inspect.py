"""`taskvec inspect`: every tensor of a checkpoint, and what an adapter would do or why it would be refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import taskvec as tv

from .conftest import SHAPES, SHARDS, Command, random_tensors, write_adapter


def test_every_tensor_has_a_line_with_dtype_shape_and_size(taskvec: Command) -> None:
    lines = taskvec("inspect", "base").out.splitlines()
    assert len(lines) == 6
    for name, shape in SHAPES.items():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        size = 2 * torch.Size(shape).numel()
        assert re.fullmatch(rf"{re.escape(name)} +BF16 +{'×'.join(map(str, shape))} +{size} bytes", line)
    assert lines[-1] == "base: 5 tensors, 656 parameters in 2 files (BF16 1.3 kB, I64 64 bytes)"


def test_json_has_the_same_as_data(taskvec: Command) -> None:
    outcome = taskvec("inspect", "base", "--json")
    content = json.loads(outcome.out)
    tensors = random_tensors(1)
    assert outcome.out.count("\n") == 1
    assert content["ok"] is True and content["name"] == "base" and content["adapter"] is content["refused"] is None
    assert content["parameters"] == sum(t.numel() for t in tensors.values())
    assert content["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert [file["name"] for file in content["files"]] == list(SHARDS)
    assert {t["name"]: t["shape"] for t in content["tensors"]} == {name: list(t.shape) for name, t in tensors.items()}
    assert content["metadata"] == {"format": "pt", "trained_by": "nobody"}


def test_one_file_is_inspected_too(taskvec: Command) -> None:
    out = taskvec("inspect", "other.safetensors").out
    assert out.splitlines()[-1] == "other.safetensors: 1 tensor, 3 parameters in 1 file (F32 12 bytes)"


def test_a_scalar_and_an_empty_file_are_shown(taskvec: Command, here: Path) -> None:
    save_file({"alpha": torch.tensor(1.0)}, here / "scalar.safetensors")
    save_file({}, here / "empty.safetensors")
    assert re.search(r"^alpha +F32 +scalar +4 bytes", taskvec("inspect", "scalar.safetensors").out)
    assert "0 tensors, 0 parameters in 1 file (empty)" in taskvec("inspect", "empty.safetensors").out


def shown(out: str) -> dict[str, str]:
    """The indented lines under the totals: what is said about an adapter."""
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines() if line.startswith("  ")}


def test_an_adapter_shows_its_ranks_scales_and_targets(taskvec: Command, here: Path) -> None:
    write_adapter(here / "rs", use_rslora=True, lora_alpha=3, base_model_name_or_path="org/model")
    assert shown(taskvec("inspect", "lora").out) == {
        "family": "LORA", "modules": "1", "ranks": "2 (1)", "scales": "2 (1)", "targets": "q (1)",
    }  # fmt: skip
    rs = shown(taskvec("inspect", "rs").out)
    assert rs["scales"] == "2.12132 (1)" and rs["variants"] == "rsLoRA" and rs["base"] == "org/model"


def test_an_adapter_as_json(taskvec: Command) -> None:
    content = json.loads(taskvec("inspect", "lora", "--json").out)
    assert content["refused"] is None
    assert content["adapter"]["ranks"] == {"2": 1} and content["adapter"]["scales"] == {"2": 1}
    assert content["adapter"]["replaced"] == []


REFUSED = {
    "activated LoRA": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is set: activated LoRA"),
    "another family": ({"peft_type": "VBLORA"}, "peft_type VBLORA"),
    "another rank": ({"r": 9}, "found rank 2, expected 9"),
    "a pattern that is no pattern": ({"alpha_pattern": {"(": 1}}, "alpha_pattern: pattern ( is not understood"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_would_be_refused_is_shown_and_says_why(case: str, taskvec: Command, here: Path) -> None:
    config, reason = REFUSED[case]
    write_adapter(here / "bad", **config)
    outcome = taskvec("inspect", "bad")
    assert outcome.code == 0 and reason in shown(outcome.out)["refused"]
    assert outcome.out.startswith("base_model.model.model.h.0.q.lora_A.weight ")
    assert reason in json.loads(taskvec("inspect", "bad", "--json").out)["refused"]
    refusal = taskvec("subtract", "base", "bad", "-a", "1", "-o", "out").err
    assert shown(outcome.out)["refused"] in refusal


@pytest.mark.parametrize("folder", ["base", "lora"])
def test_the_command_and_python_say_the_same(folder: str, taskvec: Command) -> None:
    content = json.loads(taskvec("inspect", folder, "--json").out)
    assert content == {"ok": True, **json.loads(json.dumps(tv.inspect(folder).summary()))}


def test_names_with_control_characters_cannot_draw_on_the_terminal(taskvec: Command, here: Path) -> None:
    save_file({"evil\x1b[2J\n\u202e": torch.ones(1)}, here / "evil.safetensors")
    out = taskvec("inspect", "evil.safetensors").out
    assert "\x1b" not in out and "\u202e" not in out and out.count("\n") == 2
