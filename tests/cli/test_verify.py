"""`taskvec verify`: what was checked on stdout, what is wrong on stderr, and 3 when something is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from .conftest import SHARDS, Command

FIRST, SECOND = SHARDS


@pytest.fixture
def out(taskvec: Command, here: Path) -> Path:
    assert taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out").code == 0
    return here / "out"


def flip_last_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def test_a_good_output_is_0_with_what_was_checked(taskvec: Command, out: Path) -> None:
    outcome = taskvec("verify", "out")
    assert outcome.code == 0 and outcome.err == ""
    assert [line.split()[0] for line in outcome.out.splitlines()] == ["ok", "ok", "ok", "ok"]
    assert "3 of 4 edited tensors" in outcome.out


@pytest.mark.parametrize("sample", [0, 1, 4])
def test_the_sample_is_as_large_as_asked(sample: int, taskvec: Command, out: Path) -> None:
    assert f"{sample} of 4 edited tensors" in taskvec("verify", "out", "--sample", str(sample)).out


def test_a_negative_sample_is_a_usage_error(taskvec: Command, out: Path) -> None:
    assert taskvec("verify", "out", "--sample", "-1").code == 2


def test_a_full_check_says_what_it_compared(taskvec: Command, out: Path) -> None:
    outcome = taskvec("verify", "out", "--full")
    assert outcome.code == 0 and outcome.err == ""
    assert "4 of 4 edited tensors" in outcome.out and "1 copied tensor, byte for byte" in outcome.out


def test_a_sample_and_everything_are_a_usage_error(taskvec: Command, out: Path) -> None:
    outcome = taskvec("verify", "out", "--full", "--sample", "3")
    assert outcome.code == 2 and "not both" in outcome.err


def test_a_foreign_pickle_and_an_edited_record_are_3(taskvec: Command, out: Path) -> None:
    (out / "pytorch_model.bin").touch()
    outcome = taskvec("verify", "out")
    assert outcome.code == 3 and outcome.err.startswith("taskvec: out: pytorch_model.bin: not of this output")
    (out / "pytorch_model.bin").unlink()
    (out / "taskvec.json").write_text((out / "taskvec.json").read_text().replace("0.3", "0.2"))
    outcome = taskvec("verify", "out")
    assert outcome.code == 3 and "taskvec.json: is not the record that was written" in outcome.err


def test_a_difference_is_3_and_named_on_stderr(taskvec: Command, out: Path) -> None:
    flip_last_bit(out / FIRST)
    outcome = taskvec("verify", "out")
    assert outcome.code == 3
    assert outcome.err.startswith(f"taskvec: out: {FIRST}: checksum ") and outcome.err.count("\n") == 1


def test_a_missing_shard_and_a_missing_tokenizer_are_3_too(taskvec: Command, out: Path) -> None:
    (out / "tokenizer.json").unlink()
    outcome = taskvec("verify", "out")
    assert outcome.code == 3 and "tokenizer.json: missing" in outcome.err
    (out / SECOND).unlink()
    outcome = taskvec("verify", "out")
    assert outcome.code == 3 and SECOND in outcome.err


def test_json_is_one_object_for_a_good_and_for_a_bad_output(taskvec: Command, out: Path) -> None:
    good = taskvec("verify", "out", "--json")
    content = json.loads(good.out)
    assert content["ok"] is True and len(content["checks"]) == 4 and content["problems"] == content["skipped"] == []
    flip_last_bit(out / SECOND)
    bad = taskvec("verify", "out", "--json")
    assert bad.code == 3 and bad.out.count("\n") == 1
    content = json.loads(bad.out)
    assert content["ok"] is False and SECOND in content["problems"][0]


def test_moved_inputs_are_said_to_be_missing_until_against_names_them(
    taskvec: Command, out: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "elsewhere").mkdir()
    os.rename(out, here / "elsewhere" / "moved")
    outcome = taskvec("verify", "elsewhere/moved")
    assert outcome.code == 0  # base and old still lie in the working directory
    assert "skipped" not in outcome.out
    monkeypatch.chdir(here / "elsewhere")
    outcome = taskvec("verify", "moved")
    assert outcome.code == 0 and "skipped nothing computed again: input base of moved was not found" in outcome.out
    outcome = taskvec("verify", "moved", "--against", "../base", "--against", "../old")
    assert outcome.code == 0 and "skipped" not in outcome.out and "3 of 4 edited tensors" in outcome.out


def test_against_another_model_is_an_error_that_says_which_input_is_missing(
    taskvec: Command, out: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "elsewhere").mkdir()
    os.rename(out, here / "elsewhere" / "moved")
    monkeypatch.chdir(here / "elsewhere")
    outcome = taskvec("verify", "moved", "--against", "../base", "--against", "../other.safetensors")
    assert outcome.code == 1
    assert "input old of moved was not found" in outcome.err and "--against PATH" in outcome.err


@pytest.mark.parametrize("kind", ["out.safetensors", "lora-out"])
def test_single_files_and_edits_by_adapters_are_verified_too(kind: str, taskvec: Command) -> None:
    old = "lora" if kind == "lora-out" else "old"
    taskvec("subtract", "base", old, "-a", "0.3", "-o", kind)
    outcome = taskvec("verify", kind)
    assert outcome.code == 0 and "skipped" not in outcome.out and "computed again" in outcome.out
