"""`taskvec subtract` and `taskvec add`: what they make, and what they show while they make it."""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import INPUTS, SHAPES, SHARDS, Command, Tensors, files_under, random_tensors, snapshot

BASE, OLD = random_tensors(1), random_tensors(2)


def weights(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def edited(alpha: float, origin: Tensors = BASE, only: str = "") -> Tensors:
    """base − α(old − origin), one float32 operation at a time, rounded once: the contract, in torch."""
    scale = torch.tensor(alpha, dtype=torch.float32)
    found = dict(BASE)
    for name in SHAPES:
        if only in name:
            step = (OLD[name].float() - origin[name].float()) * scale
            found[name] = (BASE[name].float() - step).to(BASE[name].dtype)
    return found


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == expected[name].dtype and found[name].equal(expected[name]), name


# --- what is made -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ["0.3", "1", "-0.5", "1e-3", "0", "3"])
def test_subtract_takes_alpha_times_the_difference_away(alpha: str, taskvec: Command, here: Path) -> None:
    assert taskvec("subtract", "base", "old", "--alpha", alpha, "-o", "out").code == 0
    assert_same(weights(here / "out"), edited(float(alpha)))


def test_add_is_subtract_with_the_other_sign(taskvec: Command, here: Path) -> None:
    taskvec("add", "base", "old", "--alpha", "0.3", "-o", "added")
    taskvec("subtract", "base", "old", "--alpha=-0.3", "-o", "subtracted")
    assert_same(weights(here / "added"), edited(-0.3))
    assert_same(weights(here / "added"), weights(here / "subtracted"))


def test_with_base_the_difference_is_from_that_origin(taskvec: Command, here: Path) -> None:
    origin = random_tensors(7)
    (here / "origin").mkdir()
    save_file(origin, here / "origin" / "model.safetensors")
    assert taskvec("subtract", "base", "old", "--base", "origin", "-a", "0.3", "-o", "out").code == 0
    assert_same(weights(here / "out"), edited(0.3, origin))


def test_an_adapter_is_subtracted_from_the_layer_it_adapts(taskvec: Command, here: Path) -> None:
    assert taskvec("subtract", "base", "lora", "-a", "1", "-o", "out").code == 0
    found = weights(here / "out")
    assert {name for name in BASE if not found[name].equal(BASE[name])} == {"model.h.0.q.weight"}


@pytest.mark.parametrize("option", [("--include", "*h.1*"), ("--exclude", "*embed*", "--exclude", "*h.0*")])
def test_only_the_tensors_that_were_asked_for_are_edited(option: tuple[str, ...], taskvec: Command, here: Path) -> None:
    assert taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", *option).code == 0
    assert_same(weights(here / "out"), edited(0.3, only="h.1"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_out_dtype_rounds_once_into_the_dtype_asked_for(dtype: str, taskvec: Command, here: Path) -> None:
    assert taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", "--out-dtype", dtype).code == 0
    found, scale = weights(here / "out"), torch.tensor(0.3, dtype=torch.float32)
    for name in SHAPES:
        exact = BASE[name].float() - (OLD[name].float() - BASE[name].float()) * scale
        assert found[name].equal(exact.to(getattr(torch, dtype))), name
    assert found["model.position_ids"].equal(BASE["model.position_ids"])
    assert json.loads((here / "out" / "config.json").read_text())["dtype"] == dtype


def test_the_output_has_the_shards_of_the_base_and_its_side_files(taskvec: Command, here: Path) -> None:
    taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out")
    made = {*SHARDS, "model.safetensors.index.json", "README.md", "taskvec.json"}
    assert set(files_under(here / "out")) == made | {"config.json", "tokenizer.json", "tokenizer_config.json"}
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (here / "out" / name).read_bytes() == (here / "base" / name).read_bytes()


def test_the_metadata_of_the_base_is_kept_and_the_format_is_named(taskvec: Command, here: Path) -> None:
    taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out")
    for shard in SHARDS:
        with safe_open(here / "out" / shard, "pt") as file:
            assert file.metadata() == {"format": "pt", "trained_by": "nobody"}


def test_the_index_tells_the_true_size_and_the_place_of_every_tensor(taskvec: Command, here: Path) -> None:
    taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out")
    index = json.loads((here / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in BASE.values())
    assert index["weight_map"] == {name: shard for shard in SHARDS for name in load_file(here / "out" / shard)}


def test_a_maximum_shard_size_cuts_the_output_anew(taskvec: Command, here: Path) -> None:
    assert taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", "--max-shard-size", "500").code == 0
    shards = sorted(path.name for path in (here / "out").glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert len(shards) > 2
    assert_same(weights(here / "out"), edited(0.3))


def test_a_name_that_ends_in_safetensors_is_one_file_with_its_recipe_inside(taskvec: Command, here: Path) -> None:
    assert taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out.safetensors").code == 0
    assert_same(load_file(here / "out.safetensors"), edited(0.3))
    with safe_open(here / "out.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt" and metadata["trained_by"] == "nobody"
    assert json.loads(metadata["taskvec"])["formula"] == "edited = base − 0.3·(old − base)"


def test_sha256_of_every_weight_file_is_recorded_on_request(taskvec: Command, here: Path) -> None:
    taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", "--sha256")
    for shard in json.loads((here / "out" / "taskvec.json").read_text())["shards"]:
        assert shard["sha256"] == hashlib.sha256((here / "out" / shard["name"]).read_bytes()).hexdigest()


@pytest.mark.parametrize("options", [("-j", "1"), ("-j", "3"), ("--no-fsync",), ("--memory", "64MB"), ("--device", "cpu")])
def test_how_it_is_run_changes_no_byte_of_the_output(options: tuple[str, ...], taskvec: Command, here: Path) -> None:
    taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out")
    assert taskvec("subtract", "base", "old", "-a", "0.3", "-o", "again", *options).code == 0
    assert files_under(here / "again") == files_under(here / "out")


# --- what is shown ----------------------------------------------------------------------------------------------------


def test_results_are_on_stdout_and_a_line_per_file_on_stderr(taskvec: Command) -> None:
    outcome = taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out")
    assert outcome.out.startswith("edited = base − 0.3·(old − base)\n")
    elements = sum(torch.Size(shape).numel() for shape in SHAPES.values())
    assert re.search(rf"tensors +4 edited, 1 copied\n  elements changed +\d+ of {elements} edited", outcome.out)
    assert re.search(r"output +out\n$", outcome.out)
    assert sorted(line.partition(":")[0] for line in outcome.err.splitlines()) == list(SHARDS)
    assert "file 1 of 2" in outcome.err and "file 2 of 2" in outcome.err
    assert "\x1b" not in outcome.out + outcome.err


def test_quiet_prints_nothing(taskvec: Command) -> None:
    assert taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", "-q") == (0, "", "")


def test_quiet_still_prints_an_error(taskvec: Command) -> None:
    outcome = taskvec("subtract", "base", "nowhere", "-a", "0.3", "-o", "out", "-q")
    assert outcome.code == 1 and outcome.out == "" and "nowhere" in outcome.err


def test_quiet_and_verbose_exclude_each_other(taskvec: Command) -> None:
    assert taskvec("subtract", "base", "old", "-a", "1", "-o", "out", "-q", "-v").code == 2


def test_verbose_lists_what_changed_in_every_tensor(taskvec: Command) -> None:
    brief = taskvec("subtract", "base", "old", "-a", "0.3", "-o", "brief").out
    verbose = taskvec("subtract", "base", "old", "-a", "0.3", "-o", "verbose", "-v").out
    for name in SHAPES:
        assert f"{name}: changed" in verbose and name not in brief


def test_json_is_one_object_on_stdout(taskvec: Command) -> None:
    outcome = taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", "--json")
    assert outcome.out.count("\n") == 1
    content = json.loads(outcome.out)
    assert content["ok"] is True and content["output"] == "out"
    assert content["formula"] == "edited = base − 0.3·(old − base)"
    assert content["changes"]["tensors_edited"] == 4 and content["changes"]["tensors_copied"] == 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(taskvec: Command, here: Path) -> None:
    before = sorted(here.iterdir())
    outcome = taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", "--dry-run")
    assert outcome.code == 0 and sorted(here.iterdir()) == before
    for part in ("edited = base − 0.3·(old − base)", "edit 4 tensors", "copy 1", *SHARDS, "tokenizer.json", "dry run"):
        assert part in outcome.out


def test_a_dry_run_as_json_tells_what_the_run_then_does(taskvec: Command, here: Path) -> None:
    planned = json.loads(taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", "--dry-run", "--json").out)
    done = json.loads(taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out", "--json").out)
    assert planned["dry_run"] is True
    assert planned["plan"]["bytes_to_read"] == done["bytes_read"]
    written = sum((here / "out" / shard).stat().st_size for shard in SHARDS)
    side = sum((here / "out" / name).stat().st_size for name in planned["plan"]["side_files"])
    assert planned["plan"]["bytes_to_write"] == done["bytes_written"] == written + side


@pytest.mark.parametrize("arguments", [("old", "other.safetensors"), ("base", "nowhere")])
def test_a_dry_run_refuses_what_the_run_would_refuse(arguments: tuple[str, str], taskvec: Command) -> None:
    command = ("subtract", *arguments, "-a", "1", "-o", "out")
    assert taskvec(*command, "--dry-run") == taskvec(*command)


def test_what_the_tuned_model_lacks_is_noted(taskvec: Command, here: Path) -> None:
    partial = {name: tensor for name, tensor in OLD.items() if "embed" not in name} | {"extra": torch.ones(2)}
    save_file(partial, here / "partial.safetensors")
    outcome = taskvec("subtract", "base", "partial.safetensors", "-a", "1", "-o", "out")
    assert outcome.code == 0
    assert "note: 1 tensor only in base, copied: model.embed.weight" in outcome.err
    assert "note: 1 tensor only in partial.safetensors, not used: extra" in outcome.err


def test_a_change_of_nothing_is_warned_of(taskvec: Command) -> None:
    outcome = taskvec("subtract", "base", "base", "-a", "1", "-o", "out")
    assert outcome.code == 0 and "warning: no element changed" in outcome.err


def test_an_overflow_is_warned_of_with_the_tensor(taskvec: Command) -> None:
    outcome = taskvec("subtract", "base", "old", "-a", "3e38", "-o", "out")
    assert outcome.code == 0 and re.search(r"warning: \d+ elements overflowed, in model\.", outcome.err)


# --- on a terminal ----------------------------------------------------------------------------------------------------


def test_on_a_terminal_a_bar_is_drawn_on_stderr_and_the_table_goes_to_stdout(here: Path) -> None:
    shown, terminal = pty.openpty()
    command = [sys.executable, "-m", "taskvec", "subtract", "base", "old", "-a", "0.3", "-o", "out"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(command, cwd=here, env=environment, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    drawn = _read_until_closed(shown)
    table = process.communicate()[0].decode()
    assert process.returncode == 0
    assert "writing" in drawn and "\x1b[" in drawn
    assert table.startswith("edited = base − 0.3·(old − base)\n") and "\x1b" not in table
    assert "file 1 of 2" not in drawn  # the plain lines are for files and pipes


def _read_until_closed(terminal: int) -> str:
    found = b""
    while True:
        select.select([terminal], [], [])
        try:
            part = os.read(terminal, 4096)
        except OSError:  # EIO: the other side is closed
            part = b""
        if not part:
            os.close(terminal)
            return found.decode()
        found += part


# --- what must not be shown -------------------------------------------------------------------------------------------

COMMANDS = {
    "full": ("subtract", "base", "old", "-a", "0.3", "-o", "out"),
    "adapter": ("subtract", "base", "lora", "-a", "0.3", "-o", "out", "-v"),
    "json": ("add", "base", "old", "-a", "0.3", "-o", "out", "--json"),
    "sharded anew": ("subtract", "base", "old", "-a", "0.3", "-o", "deep/er/out", "--max-shard-size", "1kB"),
    "origin": ("subtract", "base", "lora", "--base", "base", "-a", "0.3", "-o", "out"),
    "dry run": ("subtract", "base", "old", "-a", "0.3", "-o", "out", "--dry-run"),
    "no such input": ("subtract", "base", "nowhere", "-a", "0.3", "-o", "out", "--json"),
    "no fit": ("subtract", "base", "other.safetensors", "-a", "0.3", "-o", "out", "--json"),
    "inside an input": ("subtract", "base", "old", "-a", "0.3", "-o", "base/out", "--json"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_no_path_or_name_of_this_machine_is_written_or_shown(case: str, taskvec: Command, here: Path) -> None:
    inputs = set(files_under(here))
    outcome = taskvec(*COMMANDS[case])
    written = [content for name, content in files_under(here).items() if name not in inputs]
    secrets = [str(here), os.path.expanduser("~"), socket.gethostname(), "hf_token"]
    for secret in (found for found in secrets if len(found) >= 5):  # a host called "out" would prove nothing
        assert secret not in outcome.out + outcome.err
        assert not any(secret.encode() in content for content in written)


@pytest.mark.parametrize("old", ["old", "lora"])
def test_the_same_command_twice_makes_the_same_bytes(old: str, taskvec: Command, here: Path) -> None:
    taskvec("subtract", "base", old, "-a", "0.3", "-o", "out")
    first = files_under(here / "out")
    os.rename(here / "out", here / "kept")
    for path in here.rglob("base/*"):
        os.utime(path)  # the recipe may not hold a time, not even that of an input
    taskvec("subtract", "base", old, "-a", "0.3", "-o", "out")
    assert files_under(here / "out") == first


def test_nothing_is_made_beside_the_inputs_or_the_output(taskvec: Command, here: Path) -> None:
    before = set(files_under(here))
    taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out")
    assert {name for name in set(files_under(here)) - before if not name.startswith("out/")} == set()
    assert sorted(path.name for path in here.iterdir()) == sorted({*INPUTS, "out"})


def test_inputs_that_may_only_be_read_are_enough(taskvec: Command, here: Path) -> None:
    paths = [here / "base", *(here / "base").iterdir()]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = snapshot(here, "base")
    assert taskvec("subtract", "base", "old", "-a", "0.3", "-o", "out").code == 0
    assert snapshot(here, "base") == before
    assert os.access(here / "out" / "config.json", os.W_OK)
    (here / "base").chmod(0o755)
