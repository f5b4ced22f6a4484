"""`taskvec sweep`: the table, the choice, the command that makes it; every failure one line."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import pytest

from taskvec.cli.sweep import alphas

from ..insight.test_evaluator import ended
from .conftest import Command

SCORE = """
import json, pathlib, sys
model, out, alpha, number = sys.argv[1:5]
assert (pathlib.Path(model) / "taskvec.json").exists()
alpha = float(alpha)
content = {"results": {"old": {"acc,none": 1 - alpha / 2}, "rest": {"acc,none": 1 - alpha**2 / 50}}, "i": int(number)}
(pathlib.Path(out) / "r.json").write_text(json.dumps(content))
"""
EVAL = f"{shlex.quote(sys.executable)} score.py {{model}} {{out}} {{alpha}} {{i}}"
TARGET, CONTROL = "/results/old/acc,none", "/results/rest/acc,none"


@pytest.fixture
def sweep(here: Path, taskvec: Command) -> Command:
    (here / "score.py").write_text(SCORE)

    def run(*more: str, old: str = "old", line: str = EVAL, alpha: str = "0.5:2:0.5", control: bool = True) -> object:
        asked = ("--control", CONTROL) if control else ()
        return taskvec("sweep", "base", old, "-a", alpha, "--eval", line, "--metric", TARGET, *asked, "-o", "out", *more)

    return run  # type: ignore[return-value]


def test_a_line_for_each_alpha_the_choice_and_the_command_that_makes_it(here: Path, sweep: Command) -> None:
    outcome = sweep("--random-control", "--include", "model.h.*")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "base − α·(old − base)"
    assert [re.split(r"  +", line.strip()) for line in lines[1:8]] == [
        ["α", "target", "control", "of α = 0"],
        ["0", "1", "1", "100.0%"],
        ["0.5", "0.75", "0.995", "99.5%"],
        ["1", "0.5", "0.98", "98.0%"],
        ["1.5", "0.25", "0.955", "95.5%", "chosen"],
        ["2", "0", "0.92", "92.0%", "control lost"],
        ["1.5", "0.25", "0.955", "95.5%", "random vector"],
    ]
    assert lines[8] == "chosen: α = 1.5, target 0.25, control 0.955; at 0 target 1, control 1"
    assert lines[9] == "make it: taskvec subtract base old --alpha 1.5 --include 'model.h.*' -o OUT"
    assert lines[10] == "picture: out/sweep.svg" and (here / "out" / "sweep.svg").read_text().startswith("<svg")
    assert [line.partition(":")[0] for line in outcome.err.splitlines()] == [
        "alpha-0", "alpha-0.5", "alpha-1", "alpha-1.5", "alpha-2", "alpha-1.5-random",
    ]  # fmt: skip


def test_without_a_control_the_best_target_is_chosen(sweep: Command) -> None:
    outcome = sweep(control=False)
    assert "  α  target" in outcome.out and "%" not in outcome.out
    assert "chosen: α = 2, target 0; at 0 target 1\n" in outcome.out
    assert "no α is chosen: none is better than 0\n" in sweep("--goal", "max", control=False).out


def test_floor_and_goal_of_the_control_are_taken(sweep: Command) -> None:
    assert "chosen: α = 1," in sweep("--control-floor", "0.97").out
    assert "chosen: α = 2," in sweep("--control-goal", "min").out
    assert "no α is chosen: none but 0 keeps the control\n" in sweep("--control-floor", "1").out
    outcome = sweep("--goal", "max")
    assert outcome.code == 0 and outcome.err.endswith("\nwarning: the target is no better at α = 1.5 than at α = 0\n")
    assert json.loads(sweep("--goal", "max", "--json").out)["warnings"] == [
        "the target is no better at α = 1.5 than at α = 0"
    ]


def test_a_control_of_nothing_chooses_nothing_and_says_so(here: Path, sweep: Command) -> None:
    (here / "score.py").write_text(SCORE.replace("1 - alpha**2 / 50", "0"))
    outcome = sweep("--random-control")
    assert outcome.code == 0 and "no α is chosen: the control at 0 is no measure\n" in outcome.out
    assert "make it:" not in outcome.out and "random vector" not in outcome.out
    assert outcome.err.splitlines()[-1].startswith(f"warning: the control {CONTROL} is 0.0 at α = 0, of which no share")


def test_fresh_evaluates_everything_again(here: Path, sweep: Command) -> None:
    assert sweep(alpha="1").code == 0 and sweep(alpha="1").code == 0
    assert runs(here) == ["alpha-0", "alpha-1"]
    assert sweep("--fresh", alpha="1").code == 0 and runs(here) == ["alpha-0", "alpha-0-2", "alpha-1", "alpha-1-2"]


def test_what_is_in_the_way_in_the_folder_is_one_line_that_says_what_to_do(here: Path, sweep: Command) -> None:
    (here / "out").mkdir()
    (here / "out" / "sweep.jsonl").touch()
    (here / "out" / "logs").write_text("mine")
    outcome = sweep()
    assert outcome.code == 1 and outcome.err.count("\n") == 1 and "DEBUG" not in outcome.err
    assert outcome.err.endswith(": Not a directory. Move away what is in its place, or name another output\n")


def test_json_is_one_object(sweep: Command) -> None:
    outcome = sweep("--json", "--random-control", "--seed", "3")
    content = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1 and outcome.err == ""
    assert content["ok"] is True and content["chosen"] == 1.5 and content["output"] == "out"
    assert [trial["alpha"] for trial in content["trials"]] == [0, 0.5, 1, 1.5, 2]
    assert [trial["kept"] for trial in content["trials"]] == [True] * 4 + [False]
    assert content["random"]["random"] is True and content["metric"] == TARGET


def test_an_adapter_is_swept_too_and_stood_for_by_a_random_vector(sweep: Command) -> None:
    out = sweep("--random-control", old="lora").out
    assert out.startswith("base − α·lora\n") and "random vector" in out
    assert "make it: taskvec subtract base lora --alpha 1.5 -o OUT\n" in out


def test_quiet_prints_nothing(sweep: Command) -> None:
    outcome = sweep("-q")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_a_shell_only_when_it_is_asked_for(here: Path, sweep: Command) -> None:
    line = f"{EVAL} && touch by-a-shell"
    assert sweep(line=line).code == 0 and not (here / "by-a-shell").exists()
    assert sweep("--shell", line=line).code == 0 and (here / "by-a-shell").exists()


FAILURES = {
    "exit code": ("import sys; sys.exit(3)", "the evaluator at α = 0 ended with exit code 3"),
    "no result": ("", "the evaluator at α = 0 wrote no .json file under out/results/"),
    "no JSON": ("import sys; open(sys.argv[2] + '/r.json', 'w').write('{')", "r.json: not JSON"),
    "no metric": ("import sys; open(sys.argv[2] + '/r.json', 'w').write('{}')", "nothing at /results"),
    "no number": (SCORE.replace("1 - alpha / 2", "'N/A'"), "found 'N/A' at '/results/old/acc,none', expected a number"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_of_the_evaluator_is_one_line_with_the_log(case: str, here: Path, sweep: Command) -> None:
    body, words = FAILURES[case]
    (here / "score.py").write_text(body)
    outcome = sweep()
    assert outcome.code == 1 and outcome.out == "" and outcome.err.count("\n") == 1 and words in outcome.err
    (log,) = (here / "out" / "logs").glob("*/alpha-0.log")
    assert outcome.err.endswith(f"What it printed is in {log.relative_to(here)}\n")
    assert not list((here / "out").glob(".*"))


def test_a_command_that_is_not_there_is_one_line(sweep: Command) -> None:
    outcome = sweep(line="no-such-command {model} {out}")
    assert outcome.code == 1 and outcome.err.count("\n") == 1 and "cannot be started" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"line": "score"}, "has no {model}"), ({"alpha": "0:1"}, "--alpha '0:1'"), ({"alpha": "0"}, "no α but 0"),
     ({"alpha": "nan"}, "--alpha 'nan'"), ({"alpha": "1:0:0.1"}, "do not lead"), ({"alpha": "0:1:0"}, "do not lead"),
     ({"alpha": "0:1:1e-9"}, "more than 1000 steps"), ({"alpha": "0:1e999:1"}, "--alpha"),
     ({"alpha": "0:1e999999:1e-999999"}, "--alpha '0:1e999999:1e-999999', expected FIRST:LAST:STEP or numbers")],
)  # fmt: skip
def test_what_makes_no_sense_is_a_usage_error_before_anything_is_made(
    arguments: dict[str, str], words: str, here: Path, sweep: Command
) -> None:
    outcome = sweep(**arguments)
    assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0:1.5:0.25", [0, 0.25, 0.5, 0.75, 1, 1.25, 1.5]), ("0:0.3:0.1", [0, 0.1, 0.2, 0.3]), ("0:1:0.3", [0, 0.3, 0.6, 0.9]),
     ("1:-1:-1", [1, 0, -1]), ("0.1, 0.3,1", [0.1, 0.3, 1]), ("2", [2]), ("1:1:1", [1]), ("5e-1:1:5e-1", [0.5, 1])],
)  # fmt: skip
def test_a_range_goes_as_far_as_whole_steps_lead_and_has_the_numbers_that_were_typed(
    text: str, expected: list[float]
) -> None:
    assert alphas(text) == expected


SIGNALS = {  # exit code, and what is said
    signal.SIGINT: (130, "interrupted; "),
    signal.SIGTERM: (143, "terminated; "),
    signal.SIGHUP: (129, "terminated; "),  # the ssh session was closed
}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_interrupted_it_leaves_no_candidate_and_no_evaluator_and_goes_on_there(
    number: signal.Signals, here: Path, sweep: Command
) -> None:
    process, evaluator = stuck(here)
    process.send_signal(number)
    err = process.communicate(timeout=30)[1]
    code, words = SIGNALS[number]
    assert process.returncode == code and err.splitlines()[-1].startswith(f"taskvec: {words}"), err
    assert ended(evaluator)
    assert sorted(path.name for path in (here / "out").iterdir()) == ["logs", "results", "sweep.jsonl"]
    (here / "stuck").unlink()
    assert "chosen: α = 1.5" in sweep().out
    assert runs(here) == ["alpha-0", "alpha-0.5", "alpha-1", "alpha-1-2", "alpha-1.5", "alpha-2"]


def test_while_the_evaluator_of_a_killed_sweep_runs_the_folder_is_refused_and_then_goes_on_there(
    here: Path, sweep: Command
) -> None:
    process, evaluator = stuck(here)
    try:
        process.kill()
        process.communicate(timeout=30)
        outcome = sweep("--fresh")
        assert (outcome.code, outcome.out) == (1, "")
        assert outcome.err == (
            "taskvec: out: another sweep is using it, or an evaluator that a killed sweep left running (process "
            f"{evaluator}). Wait until it ends, or end it; or name another output\n"
        )
        assert runs(here) == ["alpha-0", "alpha-0.5", "alpha-1"] and list((here / "out").glob(".sweep-*"))
    finally:
        os.kill(evaluator, signal.SIGKILL)
    assert ended(evaluator)
    (here / "stuck").unlink()
    assert "chosen: α = 1.5" in sweep().out and not list((here / "out").glob(".*"))
    assert runs(here) == ["alpha-0", "alpha-0.5", "alpha-1", "alpha-1-2", "alpha-1.5", "alpha-2"]


def stuck(here: Path) -> tuple[subprocess.Popen[str], int]:
    """A sweep in a process of its own, and the process of its evaluator, which does not come to an end at α = 1."""
    waiting = "pathlib.Path('pid.new').write_text(str(os.getpid())); os.rename('pid.new', 'pid'); time.sleep(60)"
    (here / "score.py").write_text(f"{SCORE}import os, time\nif alpha == 1 and os.path.exists('stuck'):\n    {waiting}\n")
    (here / "stuck").touch()
    line = [sys.executable, "-m", "taskvec", "sweep", "base", "old", "-a", "0.5:2:0.5", "--eval", EVAL, "--metric", TARGET]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(
        [*line, "--control", CONTROL, "-o", "out"], env=environment, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in SIGNALS],  # these tests may run under nohup
    )  # fmt: skip
    while process.poll() is None and not (here / "pid").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]
    return process, int((here / "pid").read_text())


def runs(here: Path) -> list[str]:
    """Of the evaluator, by the folders of their results."""
    return sorted(path.name for path in (here / "out" / "results").glob("*/*"))


def test_a_picture_for_papers_needs_matplotlib_and_says_so_first(
    here: Path, sweep: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None)
    outcome = sweep("--png")
    assert outcome.code == 2 and "a PNG needs matplotlib, which is not installed" in outcome.err
    assert not (here / "out").exists()


def test_a_picture_for_papers(here: Path, sweep: Command) -> None:
    pytest.importorskip("matplotlib")
    assert sweep("--png", "--random-control").code == 0
    assert (here / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    (here / "out" / "sweep.png").unlink()
    (here / "out" / "sweep.png").mkdir()
    outcome = sweep("--png", "-q")
    assert (outcome.code, outcome.err) == (1, "taskvec: out/sweep.png: cannot write: Is a directory\n")
