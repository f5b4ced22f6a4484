"""The outside command, and the JSON Pointer to its number."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import taskvec as tv
from taskvec.insight.evaluator import Command, check_pointer, newest_json, number_at

# RFC 6901, section 5
DOCUMENT = json.loads(
    r"""{"foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4, "i\\j": 5, "k\"l": 6, " ": 7, "m~n": 8}"""
)
POINTERS = {"/": 0, "/a~1b": 1, "/c%d": 2, "/e^f": 3, "/g|h": 4, "/i\\j": 5, '/k"l': 6, "/ ": 7, "/m~0n": 8}


@pytest.mark.parametrize("pointer", POINTERS)
def test_pointers_are_those_of_the_rfc(pointer: str) -> None:
    check_pointer("metric", pointer)
    assert number_at(DOCUMENT, pointer, "here") == POINTERS[pointer]


def test_a_pointer_goes_through_lists_and_keys_with_commas() -> None:
    content = {"results": {"hellaswag": {"acc,none": 0.25}}, "list": [1, [2, 3]], "~1": 4}
    assert number_at(content, "/results/hellaswag/acc,none", "here") == 0.25
    assert number_at(content, "/list/1/0", "here") == 2
    assert number_at(content, "/~01", "here") == 4
    assert number_at(7, "", "here") == 7
    assert math.isnan(number_at({"a": math.nan}, "/a", "here"))
    assert math.copysign(1, number_at({"a": -0.0}, "/a", "here")) == 1
    assert number_at({"a": 10**400}, "/a", "here") == math.inf


@pytest.mark.parametrize("pointer", ["results", "/a~2b", "/~", "a/b"])
def test_what_is_no_pointer_is_refused(pointer: str) -> None:
    with pytest.raises(tv.UsageError, match=r"--metric .* expected a JSON Pointer"):
        check_pointer("--metric", pointer)


LOST: dict[str, tuple[Any, str, str]] = {
    "an absent key": ({"a": {"b": 1, "c": 2}}, "/a/x", "nothing at /a/x. There is b, c"),
    "an index beyond": ({"a": [1]}, "/a/1", "nothing at /a/1. There is a list"),
    "a leading zero": ({"a": [1, 2]}, "/a/01", "nothing at /a/01"),
    "the dash": ({"a": [1]}, "/a/-", "nothing at /a/-"),
    "a key of a number": ({"a": 1}, "/a/b", "nothing at /a/b. There is a int"),
    "a text": ({"a": "0.5"}, "/a", "found '0.5' at '/a', expected a number"),
    "a truth": ({"a": True}, "/a", "found True at '/a', expected a number"),
    "nothing": ({"a": None}, "/a", "found None at '/a', expected a number"),
    "a list": ({"a": [1]}, "/a", "expected a number"),
}


@pytest.mark.parametrize("case", LOST)
def test_a_pointer_to_no_number_says_what_is_there(case: str) -> None:
    content, pointer, words = LOST[case]
    with pytest.raises(tv.TaskvecError) as error:
        number_at(content, pointer, "r.json")
    assert words in str(error.value) and str(error.value).startswith("r.json: ")


# the command


def script(tmp_path: Path, body: str) -> str:
    path = tmp_path / "script.py"
    path.write_text(f"import sys, os, json\n{body}")
    return f"{shlex.quote(sys.executable)} {shlex.quote(str(path))}"


def fields(tmp_path: Path, model: str = "m") -> dict[str, str]:
    return {"model": model, "out": str(tmp_path / "out"), "alpha": "0.5", "i": "2"}


def test_the_fields_are_filled_in_word_by_word_without_a_shell(tmp_path: Path) -> None:
    line = script(tmp_path, "open('args.json', 'w').write(json.dumps(sys.argv[1:]))")
    evil = "a b; touch pwned $(touch pwned) '{out}'"
    command = Command(f"cd {tmp_path} && {line} x={{model}} '{{alpha}} {{i}}' {{out}} {{other}} '{{\"a\": 1}}'", shell=True)
    command.run(fields(tmp_path, evil), tmp_path / "log", "α = 0.5")
    expected = [f"x={evil}", "0.5 2", str(tmp_path / "out"), "{other}", '{"a": 1}']
    assert json.loads((tmp_path / "args.json").read_text()) != []
    plain = Command(f"{line} x={{model}} '{{alpha}} {{i}}' {{out}} {{other}} '{{\"a\": 1}}' ; touch pwned")
    assert plain.words(fields(tmp_path, evil))[2:] == [*expected, ";", "touch", "pwned"]
    assert not (tmp_path / "pwned").exists()


def test_with_a_shell_the_fields_are_quoted(tmp_path: Path) -> None:
    line = script(tmp_path, "open(sys.argv[1], 'w').write(json.dumps(sys.argv[2:]))")
    evil = "a b; touch pwned $(touch pwned) '{out}'"
    command = Command(f"cd {shlex.quote(str(tmp_path))}; {line} args.json {{model}} {{out}}", shell=True)
    command.run(fields(tmp_path, evil), tmp_path / "log", "α = 0.5")
    assert json.loads((tmp_path / "args.json").read_text()) == [evil, str(tmp_path / "out")]
    assert not (tmp_path / "pwned").exists()


def test_what_it_prints_is_in_the_log_and_it_has_no_stdin(tmp_path: Path) -> None:
    line = script(tmp_path, "print('to out', flush=True); print('to err', repr(sys.stdin.read()), file=sys.stderr)")
    Command(f"{line} {{model}} {{out}}").run(fields(tmp_path), tmp_path / "log", "α = 0.5")
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].startswith("$ ") and lines[1:] == ["to out", "to err ''"]


FAILURES = {
    "an exit code": ("sys.exit(7)", "the evaluator at α = 0.5 ended with exit code 7"),
    "a signal": ("os.kill(os.getpid(), 9)", "the evaluator at α = 0.5 was ended by signal 9"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_with_the_path_of_the_log(case: str, tmp_path: Path) -> None:
    body, words = FAILURES[case]
    with pytest.raises(tv.TaskvecError) as error:
        Command(script(tmp_path, body) + " {model} {out}").run(fields(tmp_path), tmp_path / "log", "α = 0.5")
    assert str(error.value) == f"{words}. What it printed is in {tmp_path / 'log'}"


def test_a_command_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(tv.TaskvecError, match=r"cannot be started: No such file or directory\. What it printed is in .*log$"):
        Command("no-such-command {model} {out}").run(fields(tmp_path), tmp_path / "log", "α = 0.5")


@pytest.mark.parametrize(
    ("line", "words"),
    [("score {model}", "has no {out}"), ("score {out}", "has no {model}"), ("score '{model} {out}", "No closing quotation")],
)  # fmt: skip
def test_a_command_that_cannot_work_is_refused_at_once(line: str, words: str) -> None:
    with pytest.raises(tv.UsageError, match=words):
        Command(line)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    with pytest.raises(tv.OutputError, match=r"log: cannot write the log there: Is a directory"):
        Command("true {model} {out}").run(fields(tmp_path), tmp_path / "log", "α = 0.5")


@pytest.mark.parametrize("shell", [False, True])
def test_it_has_the_descriptors_that_are_held_and_no_others(shell: bool, tmp_path: Path) -> None:
    line = script(
        tmp_path, "open(sys.argv[1], 'w').write(json.dumps([os.path.realpath(f'/proc/self/fd/{n}') for n in range(30)]))"
    )
    found = tmp_path / "found"
    with open(tmp_path / "held", "w") as held, open(tmp_path / "other", "w"):
        command = Command(f"{line} {shlex.quote(str(found))} {{model}} {{out}}", shell)
        command.run(fields(tmp_path), tmp_path / "log", "α = 0.5", (held.fileno(),))
    paths = json.loads(found.read_text())
    assert str(tmp_path / "held") in paths and str(tmp_path / "other") not in paths


def test_interrupted_it_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = script(
        tmp_path,
        "import subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pids.tmp')!r}, 'w').write(json.dumps([os.getpid(), child.pid]))\n"
        f"os.rename({str(tmp_path / 'pids.tmp')!r}, {str(tmp_path / 'pids')!r}); time.sleep(60)",
    )
    wait = subprocess.Popen.wait

    def interrupted(self: Any, timeout: float | None = None) -> int:
        monkeypatch.setattr(subprocess.Popen, "wait", wait)
        while not (tmp_path / "pids").exists():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Command(f"{line} {{model}} {{out}}").run(fields(tmp_path), tmp_path / "log", "α = 0.5")
    for pid in json.loads((tmp_path / "pids").read_text()):
        assert ended(pid)


def ended(pid: int) -> bool:
    """Whether a process is gone, or dead and only not collected yet by whoever adopted it."""
    for _ in range(500):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.01)
    return False


# its results


def test_the_json_that_was_written_last_counts(tmp_path: Path) -> None:
    for name, number, age in (("z.json", 1, 100), ("deep/er/a.json", 2, 10), ("b.jsonl", 3, 0), ("c.json", 4, 50)):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
        os.utime(path, ns=(0, 10**18 - age * 10**9))
    assert newest_json(tmp_path, "α = 1", tmp_path / "log") == (tmp_path / "deep/er/a.json", 2)


def test_no_json_or_broken_json_is_one_line_with_the_log(tmp_path: Path) -> None:
    with pytest.raises(tv.TaskvecError, match=r"at α = 1 wrote no \.json file under .*log$"):
        newest_json(tmp_path, "α = 1", tmp_path / "log")
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(tv.TaskvecError, match=r"a\.json: not JSON .*at α = 1.*log$"):
        newest_json(tmp_path, "α = 1", tmp_path / "log")
