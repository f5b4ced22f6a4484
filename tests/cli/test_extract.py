from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import SHAPES, Command, files_under, random_tensors

BASE, OLD = random_tensors(1), random_tensors(2)


def test_extract_writes_a_file_any_loader_reads(taskvec: Command, here: Path) -> None:
    outcome = taskvec("extract", "base", "old", "-o", "old.taskvec.safetensors")
    assert outcome.code == 0
    assert outcome.out.startswith("old.taskvec.safetensors = 1·(old − base)\n")
    assert "tensors   4 saved, 0 without a change left out" in outcome.out
    found = load_file(here / "old.taskvec.safetensors")
    assert set(found) == set(SHAPES)
    for name, value in found.items():
        assert value.dtype == torch.float32 and value.equal(OLD[name].float() - BASE[name].float())


@pytest.mark.parametrize("alpha", ["0.3", "-2"])
def test_the_saved_vector_takes_the_place_of_old(taskvec: Command, here: Path, alpha: str) -> None:
    taskvec("extract", "base", "old", "-o", "v.safetensors")
    taskvec("extract", "base", "old", "-o", "v", "--max-shard-size", "800")
    for output, old in (("direct", "old"), ("file", "v.safetensors"), ("folder", "v")):
        assert taskvec("subtract", "base", old, "--alpha", alpha, "-o", output).code == 0
    made = [
        {n: c for n, c in files_under(here / way).items() if n.endswith(".safetensors")}
        for way in ("direct", "file", "folder")
    ]
    assert made[0] == made[1] == made[2]


def test_a_combination_and_an_adapter_are_extracted(taskvec: Command, here: Path) -> None:
    taskvec("extract", "base", "old", "-o", "v.safetensors")
    outcome = taskvec(
        "extract", "base", "v.safetensors", "lora", "old", "-a", "0.5", "-a", "-1", "-a", "0.25", "-o", "sum.safetensors"
    )
    assert outcome.code == 0
    assert "sum.safetensors = 0.5·v.safetensors − 1·lora + 0.25·(old − base)" in outcome.out
    assert taskvec("extract", "base", "lora", "-o", "lora.safetensors").code == 0
    lora, total = load_file(here / "lora.safetensors"), load_file(here / "sum.safetensors")
    assert set(lora) == {"model.h.0.q.weight"} and set(total) == set(SHAPES)
    for name, value in total.items():
        expected = 0.75 * (OLD[name].double() - BASE[name].double()) - (lora[name].double() if name in lora else 0)
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_is_asked_for(taskvec: Command, here: Path, dtype: str) -> None:
    assert taskvec("extract", "base", "old", "-o", "v.safetensors", "--dtype", dtype).code == 0
    for name, value in load_file(here / "v.safetensors").items():
        assert value.equal((OLD[name].float() - BASE[name].float()).to(getattr(torch, dtype)))


def test_json_is_one_object(taskvec: Command) -> None:
    found = json.loads(taskvec("extract", "base", "old", "-o", "v.safetensors", "--json", "--exclude", "*bias").out)
    assert found["ok"] is True and found["tensors"] == 3 and found["formula"] == "1·(old − base)"
    assert found["warnings"] == found["notes"] == found["zero_tensors_omitted"] == []


def test_quiet_prints_nothing(taskvec: Command) -> None:
    outcome = taskvec("extract", "base", "old", "-o", "v.safetensors", "-q")
    assert (outcome.out, outcome.err) == ("", "")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("base", "old"), 2, "Missing option"),
        (("base", "-o", "v.safetensors"), 2, "Missing argument"),
        (("base", "old", "-a", "1", "-a", "2", "-o", "v.safetensors"), 2, "2 --alpha for 1 tuned model"),
        (("base", "old", "-a", "nan", "-o", "v.safetensors"), 2, "expected a finite number"),
        (("base", "old", "--dtype", "float64", "-o", "v.safetensors"), 2, "float64"),
        (("base", "old", "--include", "nothing*", "-o", "v.safetensors"), 2, "matches no tensor"),
        (("base", "old", "-o", "v.bin"), 2, "taskvec writes safetensors"),
        (("base", "old", "-o", "v.safetensors", "--max-shard-size", "100"), 2, "one output file"),
        (("base", "old", "-o", "v", "--max-shard-size", "0"), 2, "expected a positive number"),
        (("base", "other.safetensors", "-o", "v.safetensors"), 3, "no tensor name in common"),
        (("base", "missing", "-o", "v.safetensors"), 1, "missing"),
        (("base", "old", "-o", "old"), 1, "inputs are never changed"),
        (("base", "old", "-o", "v.safetensors", "--force-base"), 2, "force_base is for saved vectors"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_leaves_nothing(
    taskvec: Command, here: Path, arguments: tuple[str, ...], code: int, words: str
) -> None:
    before = files_under(here)
    outcome = taskvec("extract", *arguments)
    assert outcome.code == code and words in outcome.err and outcome.err.count("\n") == 1, outcome
    assert files_under(here) == before


def test_a_vector_of_another_model_is_refused_unless_it_is_forced(taskvec: Command, here: Path) -> None:
    taskvec("extract", "base", "old", "-o", "v.safetensors")
    save_file({**BASE, "model.extra": torch.ones(3)}, here / "larger.safetensors")
    for verb in (
        ("subtract", "larger.safetensors", "v.safetensors", "-a", "1"),
        ("extract", "larger.safetensors", "v.safetensors"),
    ):
        outcome = taskvec(*verb, "-o", "out.safetensors")
        assert outcome.code == 3 and "a vector of base" in outcome.err and "--force-base" in outcome.err
        assert not (here / "out.safetensors").exists()
        assert taskvec(*verb, "-o", "out.safetensors", "--force-base").code == 0
        (here / "out.safetensors").unlink()


def test_a_saved_vector_knows_its_base(taskvec: Command) -> None:
    taskvec("extract", "base", "old", "-o", "v.safetensors")
    outcome = taskvec("subtract", "base", "v.safetensors", "--base", "base", "-a", "1", "-o", "out")
    assert outcome.code == 2 and "a saved vector knows that already" in outcome.err


def test_names_with_any_bytes_are_shown_and_kept_out_of_the_terminal(taskvec: Command, here: Path) -> None:
    os.symlink(here / "old", b"bad\xff\x1b[31mname")
    outcome = taskvec("extract", "base", os.fsdecode(b"bad\xff\x1b[31mname"), "-o", "v.safetensors")
    assert outcome.code == 0 and "\x1b" not in outcome.out + outcome.err
    with safe_open(here / "v.safetensors", "pt") as file:
        assert json.loads(file.metadata()["taskvec"])["kind"] == "vector"


def test_overwrite_replaces_one_of_ours(taskvec: Command, here: Path) -> None:
    taskvec("extract", "base", "old", "-o", "v.safetensors")
    assert taskvec("extract", "base", "lora", "-o", "v.safetensors").code == 1
    assert taskvec("extract", "base", "lora", "-o", "v.safetensors", "--overwrite").code == 0
    assert set(load_file(here / "v.safetensors")) == {"model.h.0.q.weight"}


def test_a_vector_is_no_model(taskvec: Command) -> None:
    taskvec("extract", "base", "old", "-o", "v.safetensors")
    assert taskvec("add", "v.safetensors", "lora", "-a", "1", "-o", "out").code != 0
