"""Failures: one line that names the file and says what to do, the right exit code, no traceback, no trace of an output."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import save_file

import taskvec as tv
from taskvec.hub import push
from taskvec.run import output, staging, stream

from .conftest import INPUTS, Command, files_under, random_tensors, snapshot, write_adapter

RUN = ("subtract", "base", "old", "-a", "0.3", "-o", "out")


class Failure(NamedTuple):
    """A command, its exit code, the kind of error, and what its line names."""

    arguments: tuple[str, ...]
    code: int
    kind: str
    parts: tuple[str, ...]


FAILURES = {
    "no such model": Failure(("subtract", "nowhere", "old", "-a", "1", "-o", "out"), 1, "CheckpointError", ("nowhere",)),
    "no such tuned": Failure(("subtract", "base", "nowhere", "-a", "1", "-o", "out"), 1, "CheckpointError", ("nowhere",)),
    "no such origin": Failure((*RUN, "--base", "nowhere"), 1, "CheckpointError", ("nowhere",)),
    "an output that is there": Failure(
        ("subtract", "base", "old", "-a", "1", "-o", "old"), 1, "OutputOverlapError", ("old", "never changed")
    ),
    "inside an input": Failure((*RUN[:-1], "base/x"), 1, "OutputOverlapError", ("base/x", "overlaps")),
    "around an input": Failure((*RUN[:-1], "."), 1, "OutputOverlapError", (".:", "overlaps")),
    "under a file": Failure((*RUN[:-1], "other.safetensors/x"), 1, "OutputError", ("other.safetensors", "not a folder")),
    "another model": Failure(
        ("subtract", "base", "other.safetensors", "-a", "1", "-o", "out"),
        3,
        "NameMismatchError",
        ("other.safetensors", "base"),
    ),
    "a pattern without a tensor": Failure((*RUN, "--include", "h.7.*"), 2, "UsageError", ("--include", "h.7.*", "base")),
    "alpha is nan": Failure(("subtract", "base", "old", "-a", "nan", "-o", "out"), 2, "UsageError", ("nan", "--help")),
    "alpha is inf": Failure(("add", "base", "old", "-a", "-inf", "-o", "out"), 2, "UsageError", ("-inf",)),
    "alpha is text": Failure(("add", "base", "old", "-a", "much", "-o", "out"), 2, "UsageError", ("much", "float")),
    "no alpha": Failure(("subtract", "base", "old", "-o", "out"), 2, "UsageError", ("--alpha",)),
    "no output": Failure(("subtract", "base", "old", "-a", "1"), 2, "UsageError", ("-o OUT", "--push")),
    "no inputs": Failure(("subtract", "-a", "1", "-o", "out"), 2, "UsageError", ("MODEL",)),
    "an unknown verb": Failure(("sub", "base"), 2, "UsageError", ("sub", "--help")),
    "an unknown option": Failure((*RUN, "--fast"), 2, "UsageError", ("--fast",)),
    "an unknown dtype": Failure((*RUN, "--out-dtype", "int4"), 2, "UsageError", ("int4", "bfloat16")),
    "an unknown device": Failure((*RUN, "--device", "tpu"), 2, "UsageError", ("tpu", "cuda:N")),
    "no threads": Failure((*RUN, "-j", "0"), 2, "UsageError", ("jobs 0",)),
    "a shard size of nothing": Failure((*RUN, "--max-shard-size", "0"), 2, "UsageError", ("max_shard_size", "0", "5GB")),
    "no memory": Failure((*RUN, "--memory", "1"), 2, "UsageError", ("memory 1",)),
    "an output without a name": Failure((*RUN[:-1], ""), 2, "UsageError", ("output",)),
    "an output that is a pickle": Failure((*RUN[:-1], "out.bin"), 2, "UsageError", ("out.bin", "safetensors")),
    "inspect of nothing": Failure(("inspect", "nowhere"), 1, "CheckpointError", ("nowhere",)),
    "verify of another's model": Failure(("verify", "base"), 1, "CheckpointError", ("base", "taskvec.json")),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_and_an_exit_code_and_leaves_nothing(case: str, taskvec: Command, here: Path) -> None:
    failure = FAILURES[case]
    before = set(files_under(here))
    outcome = taskvec(*failure.arguments)
    assert outcome.code == failure.code
    assert outcome.out == ""
    assert outcome.err.startswith("taskvec: ") and outcome.err.count("\n") == 1
    assert all(part in outcome.err for part in failure.parts), outcome.err
    assert set(files_under(here)) == before
    assert {path.name for path in here.iterdir()} == set(INPUTS)


@pytest.mark.parametrize("case", FAILURES)
def test_with_json_a_failure_is_also_one_object(case: str, taskvec: Command) -> None:
    failure = FAILURES[case]
    outcome = taskvec(*failure.arguments, "--json")
    assert outcome.out.count("\n") == 1
    content = json.loads(outcome.out)
    assert content.keys() == {"ok", "error", "exit_code"}
    assert content["ok"] is False and content["exit_code"] == outcome.code == failure.code
    assert content["error"]["type"] == failure.kind
    assert content["error"]["message"] in outcome.err


def test_success_is_0_and_so_is_help(taskvec: Command) -> None:
    assert taskvec(*RUN).code == 0
    for arguments in (["--help"], ["-h"], ["--version"], ["subtract", "--help"], ["verify", "-h"]):
        outcome = taskvec(*arguments)
        assert outcome.code == 0 and outcome.err == "" and outcome.out
    assert tv.__version__ in taskvec("--version").out


def test_without_a_verb_the_help_is_shown(taskvec: Command) -> None:
    outcome = taskvec()
    assert outcome.code == 2 and outcome.out == ""
    assert outcome.err.startswith("Usage: taskvec") and "\\n" not in outcome.err and "subtract" in outcome.err


def test_options_may_be_written_with_underscores(taskvec: Command) -> None:
    assert taskvec(*RUN, "--out_dtype", "float32", "--max_shard_size", "1GB").code == 0


def test_an_output_that_exists_is_left_as_it_is(taskvec: Command, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("years of work")
    before = snapshot(here, "out")
    for arguments in (RUN, (*RUN, "--overwrite")):
        outcome = taskvec(*arguments)
        assert outcome.code == 1 and outcome.err.startswith("taskvec: out: ")
        assert snapshot(here, "out") == before


def test_overwrite_replaces_an_output_of_taskvec(taskvec: Command, here: Path) -> None:
    assert taskvec(*RUN).code == 0
    first = files_under(here / "out")
    outcome = taskvec(*RUN)
    assert outcome.code == 1 and "--overwrite" in outcome.err
    assert taskvec("add", *RUN[1:], "--overwrite").code == 0
    second = files_under(here / "out")
    assert second.keys() == first.keys() and second["taskvec.json"] != first["taskvec.json"]
    assert {path.name for path in here.iterdir()} == {*INPUTS, "out"}


def test_a_refused_adapter_is_named_with_what_to_do(taskvec: Command, here: Path) -> None:
    write_adapter(here / "routed", arrow_config={"top_k": 1})
    outcome = taskvec("subtract", "base", "routed", "-a", "1", "-o", "out")
    assert outcome.code == 3 and outcome.err.count("\n") == 1
    assert all(part in outcome.err for part in ("routed/adapter_config.json", "arrow_config", "per token", "PEFT"))


def test_a_shape_that_does_not_fit_is_named_with_both_shapes_and_the_flag(taskvec: Command, here: Path) -> None:
    resized = random_tensors(2)
    resized["model.embed.weight"] = resized["model.embed.weight"][:30].clone()
    save_file(resized, here / "resized.safetensors")
    outcome = taskvec("subtract", "base", "resized.safetensors", "-a", "1", "-o", "out")
    assert outcome.code == 3
    for part in ("resized.safetensors", "model.embed.weight", "[30, 8]", "[32, 8]", "--exclude 'model.embed.weight'"):
        assert part in outcome.err
    assert taskvec("subtract", "base", "resized.safetensors", "-a", "1", "-o", "out", "--exclude", "*embed*").code == 0


def test_a_name_with_control_characters_cannot_draw_on_the_terminal(taskvec: Command) -> None:
    outcome = taskvec("inspect", "\x1b[2Jevil\n\u202emodel")
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert "\x1b" not in outcome.err and "\u202e" not in outcome.err and "evil" in outcome.err


# --- the machine fails ------------------------------------------------------------------------------------------------


def fail_after(calls: int, failure: Callable[[], BaseException], real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, until it was called that often."""
    left = iter(range(calls))

    def maybe(*arguments: Any, **named: Any) -> Any:
        if next(left, None) is None:
            raise failure()
        return real(*arguments, **named)

    return maybe


def no_space() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("calls", [0, 2, 4])
@pytest.mark.parametrize("kind", ["out", "out.safetensors"])
def test_a_disk_that_fills_up_in_the_middle_is_one_line_without_paths_of_this_machine(
    calls: int, kind: str, taskvec: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", fail_after(calls, no_space, os.pwrite))
    outcome = taskvec(*RUN[:-1], kind)
    assert outcome.code == 1 and outcome.out == ""
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("taskvec: ")]
    assert "No space left on device" in line and "Free space" in line and kind in line
    assert "Traceback" not in outcome.err and str(here) not in outcome.err
    assert {path.name for path in here.iterdir()} == set(INPUTS)


def test_a_disk_that_is_too_small_is_refused_before_a_byte_is_written(
    taskvec: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = output.shutil.disk_usage(here)._replace(free=1000)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(staging.Staging, "__enter__", lambda self: pytest.fail("a folder was made"))
    outcome = taskvec(*RUN)
    assert outcome.code == 1 and "1000 are free" in outcome.err and "another disk" in outcome.err


def test_an_old_output_survives_a_run_that_fails(taskvec: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert taskvec(*RUN).code == 0
    before = snapshot(here, "out")
    monkeypatch.setattr(os, "pwrite", fail_after(3, no_space, os.pwrite))
    assert taskvec("add", *RUN[1:], "--overwrite").code == 1
    assert snapshot(here, "out") == before
    assert {path.name for path in here.iterdir()} == {*INPUTS, "out"}


def test_ctrl_c_is_130_and_leaves_nothing(taskvec: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "execute", fail_after(0, KeyboardInterrupt, stream.execute))
    outcome = taskvec(*RUN, "--json")
    assert outcome.code == 130 and outcome.err.strip() == "taskvec: interrupted; no half-made output is left"
    assert json.loads(outcome.out)["exit_code"] == 130
    assert {path.name for path in here.iterdir()} == set(INPUTS)


def test_ctrl_c_while_it_is_pushed_says_that_the_output_is_complete(
    taskvec: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(push, "push", fail_after(0, KeyboardInterrupt, push.push))
    outcome = taskvec(*RUN, "--push", "me/model", "--private", "-q")
    assert outcome.code == 130 and (here / "out" / "taskvec.json").exists()
    again = "taskvec push out me/model --private"
    assert outcome.err.strip() == f"taskvec: interrupted; out is complete: push it with `{again}`"


def test_a_bug_is_one_line_too_unless_it_is_being_looked_for(taskvec: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "execute", fail_after(0, lambda: ZeroDivisionError("a bug"), stream.execute))
    outcome = taskvec(*RUN)
    assert outcome.code == 1 and outcome.err == "taskvec: ZeroDivisionError: a bug. Set TASKVEC_DEBUG=1 to see where\n"
    monkeypatch.setenv("TASKVEC_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        taskvec(*RUN)


def test_debug_raises_an_error_of_taskvec_with_its_traceback(taskvec: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASKVEC_DEBUG", "1")
    with pytest.raises(tv.CheckpointError):
        taskvec("inspect", "nowhere")


def test_an_input_that_changes_under_the_run_makes_no_output(
    taskvec: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = stream.execute

    def swap_first(*arguments: Any) -> Any:
        save_file(random_tensors(5), here / "swapped.safetensors")
        os.replace(here / "swapped.safetensors", here / "tuned.safetensors")
        return real(*arguments)

    save_file(random_tensors(2), here / "tuned.safetensors")
    monkeypatch.setattr(stream, "execute", swap_first)
    outcome = taskvec("subtract", "base", "tuned.safetensors", "-a", "1", "-o", "out")
    assert outcome.code == 1 and "tuned.safetensors: changed during the run" in outcome.err
    assert not (here / "out").exists()


# --- signals ----------------------------------------------------------------------------------------------------------

# A run whose every write first says so on stdout and then takes its time: enough of it is left when the signal comes.
SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which whoever runs the tests may have set aside
from taskvec.checkpoint import files
from taskvec.cli.main import main
write = files.write_all
def slow(fd, data, offset, **named):
    print("writing", flush=True)
    time.sleep(0.2)
    write(fd, data, offset, **named)
files.write_all = slow
sys.argv[0] = "taskvec"
main()
"""


def interrupted(here: Path, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """A run in a process of its own that gets a signal in the middle of writing."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SLOW, *RUN, "-j", "1"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=here, env=environment, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert partial_folders(here), "the run had not begun"
    process.send_signal(number)
    out, err = process.communicate()
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def partial_folders(here: Path) -> list[Path]:
    return [path for path in here.iterdir() if path.name.startswith(".out.taskvec-partial-")]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_a_signal_ends_the_run_cleanly(number: signal.Signals, code: int, word: str, here: Path) -> None:
    before = snapshot(here, *INPUTS)
    done = interrupted(here, number)
    assert done.returncode == code
    assert done.stderr.lstrip("\n") == f"taskvec: {word}; no half-made output is left\n"  # click begins a new line after ^C
    assert snapshot(here, *INPUTS) == before
    assert {path.name for path in here.iterdir()} == set(INPUTS)


def test_a_killed_run_leaves_no_output_only_a_folder_that_says_it_is_partial(taskvec: Command, here: Path) -> None:
    assert interrupted(here, signal.SIGKILL).returncode == -signal.SIGKILL
    (partial,) = partial_folders(here)
    assert {path.name for path in here.iterdir()} == {*INPUTS, partial.name}
    assert taskvec(*RUN).code == 0  # and it is in nobody's way
    assert (here / "out" / "taskvec.json").exists() and not (here / "out" / partial.name).exists()


def test_a_reader_that_goes_away_is_no_traceback(here: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "taskvec", "inspect", "base"]
    done = subprocess.run(command, cwd=here, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


def test_the_descriptors_of_a_failed_run_are_closed(taskvec: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    taskvec(*RUN[:-1], "warm")
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pwrite", fail_after(4, no_space, os.pwrite))
    assert taskvec(*RUN).code == 1
    assert len(os.listdir("/proc/self/fd")) == before
