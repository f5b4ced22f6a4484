"""`taskvec lora merge`: add with α = 1, for adapters only. `taskvec lora extract`: an adapter of a full fine-tune."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .conftest import Command


def weights(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]


def test_merge_is_add_with_alpha_one(taskvec: Command, here: Path) -> None:
    assert taskvec("lora", "merge", "base", "lora", "-o", "merged").code == 0
    assert taskvec("add", "base", "lora", "--alpha", "1", "-o", "added").code == 0
    assert weights(here / "merged") == weights(here / "added") != weights(here / "base")


def test_merge_takes_another_alpha(taskvec: Command, here: Path) -> None:
    assert taskvec("lora", "merge", "base", "lora", "--alpha=-0.5", "-o", "merged").code == 0
    assert taskvec("subtract", "base", "lora", "--alpha", "0.5", "-o", "subtracted").code == 0
    assert weights(here / "merged") == weights(here / "subtracted")


def test_merge_has_the_options_of_add(taskvec: Command) -> None:
    content = json.loads(taskvec("lora", "merge", "base", "lora", "-o", "out", "--dry-run", "--json").out)
    assert content["ok"] and content["plan"]["formula"] == "edited = base + 1·lora"


@pytest.mark.parametrize("old", ["old", "other.safetensors"])
def test_what_is_no_adapter_is_not_merged(old: str, taskvec: Command, here: Path) -> None:
    before = sorted(here.iterdir())
    outcome = taskvec("lora", "merge", "base", old, "-o", "out")
    assert outcome.code == 2 and outcome.err.count("\n") == 1
    assert f"{old}: not an adapter" in outcome.err and "taskvec add" in outcome.err
    assert sorted(here.iterdir()) == before


def test_the_group_lists_its_verbs(taskvec: Command) -> None:
    shown = taskvec("lora", "--help").out
    assert "merge" in shown and "extract" in shown


def settings(adapter: Path) -> dict[str, object]:
    return dict(json.loads((adapter / "adapter_config.json").read_text()))


def test_extract_makes_an_adapter_that_add_gives_tuned_back_with(taskvec: Command, here: Path) -> None:
    assert taskvec("lora", "extract", "base", "old", "--energy", "1", "-o", "found").code == 0
    assert sorted(path.name for path in (here / "found").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "taskvec.json",
    ]  # fmt: skip
    assert taskvec("add", "base", "found", "--alpha", "1", "-o", "added").code == 0
    tuned, added = load_file(here / "old" / "model.safetensors"), {}
    for path in (here / "added").glob("*.safetensors"):
        added.update(load_file(path))
    torch.testing.assert_close(added, tuned, rtol=2**-7, atol=1e-6)  # an ulp of bfloat16


def test_extract_reports_ranks_and_errors(taskvec: Command, here: Path) -> None:
    outcome = taskvec("lora", "extract", "base", "old", "--rank", "2", "-o", "found", "-v")
    assert outcome.code == 0
    content = json.loads((here / "found" / "taskvec.json").read_text())
    assert f"error     {content['worst_error']:.3g} at worst" in outcome.out
    assert f"{content['median_error']:.3g} median" in outcome.out
    for name, tensor in content["tensors"].items():
        assert f"{name}: rank 2, error {tensor['error']:.3g}, linear" in outcome.out
    assert "modules_to_save" in outcome.err  # the note on biases


def test_extract_says_the_same_as_json(taskvec: Command, here: Path) -> None:
    outcome = taskvec(
        "lora", "extract", "base", "old", "-r", "2", "--energy", "0.5", "--dtype", "float16", "-o", "x", "--json"
    )
    content = json.loads(outcome.out)
    assert content["ok"] and content["output"] == "x" and outcome.err == ""
    recorded = json.loads((here / "x" / "taskvec.json").read_text())
    assert content["tensors"] == recorded["tensors"] and content["rank"] == settings(here / "x")["r"]
    assert set(content["new_values"]) == {"model.h.0.q.base_layer.bias"}


def test_extract_shows_what_it_would_do(taskvec: Command, here: Path) -> None:
    before = sorted(here.iterdir())
    outcome = taskvec("lora", "extract", "base", "old", "-r", "2", "-o", "x", "--dry-run")
    assert outcome.code == 0 and "nothing was written" in outcome.out and "memory per worker" in outcome.out
    plan = json.loads(taskvec("lora", "extract", "base", "old", "-r", "2", "-o", "x", "--dry-run", "--json").out)["plan"]
    assert plan["factored"].keys() == {"model.embed.weight", "model.h.0.q.weight", "model.h.1.q.weight"}
    assert taskvec("lora", "extract", "base", "old", "-r", "2", "-o", "x", "--dry-run", "--memory", "1KB").code == 2
    assert sorted(here.iterdir()) == before


def test_a_quiet_extract_prints_nothing(taskvec: Command) -> None:
    assert taskvec("lora", "extract", "base", "old", "-r", "2", "-o", "x", "-q") == (0, "", "")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["old"], 2, "--rank"),
        (["old", "-r", "0"], 2, "rank 0"),
        (["old", "--energy", "2"], 2, "energy 2"),
        (["old", "-r", "2", "-q", "-v"], 2, "--quiet"),
        (["old", "-r", "2", "--no-modules-to-save"], 3, "--exclude '*q.bias'"),
        (["lora", "-r", "2"], 2, "adapter already"),
        (["other.safetensors", "-r", "2"], 3, "no tensor name in common"),
        (["base", "-r", "2"], 3, "no weight of two axes differs"),
        (["nothing", "-r", "2"], 1, "no such file"),
    ],
)
def test_what_cannot_be_extracted_is_one_line(
    arguments: list[str], code: int, says: str, taskvec: Command, here: Path
) -> None:
    before = sorted(here.iterdir())
    outcome = taskvec("lora", "extract", "base", *arguments, "-o", "x")
    assert (outcome.code, outcome.out) == (code, "")
    assert outcome.err.count("\n") == 1 and says in outcome.err
    assert sorted(here.iterdir()) == before


def test_extract_replaces_an_adapter_it_made(taskvec: Command, here: Path) -> None:
    assert taskvec("lora", "extract", "base", "old", "-r", "2", "-o", "x").code == 0
    assert taskvec("lora", "extract", "base", "old", "-r", "3", "-o", "x").code == 1
    assert taskvec("lora", "extract", "base", "old", "-r", "3", "-o", "x", "--overwrite").code == 0
    assert settings(here / "x")["r"] == 3


def test_extract_without_biases_is_for_vllm(taskvec: Command, here: Path) -> None:
    options = ["--no-modules-to-save", "--exclude", "*q.bias"]
    assert taskvec("lora", "extract", "base", "old", "-r", "2", "-o", "x", *options).code == 0
    assert "bias" not in settings(here / "x") and "modules_to_save" not in settings(here / "x")


def test_what_was_extracted_is_inspected_as_a_lora(taskvec: Command) -> None:
    taskvec("lora", "extract", "base", "old", "-r", "2", "-o", "x")
    found = json.loads(taskvec("inspect", "x", "--json").out)
    assert found["adapter"]["family"] == "LORA" and found["refused"] is None
