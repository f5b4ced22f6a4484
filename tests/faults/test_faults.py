"""Every system call of a run fails once: at call 1, 2, 3 … until the run gets through. Whatever fails, the inputs are as they
were, the output is absent (or the old one) or whole, one line says what went wrong, and the same command then succeeds.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Clean
from .job import INPUTS, JOBS, Outcome, contents, left_over, taskvec
from .seam import Counting, Failing, Full, Short, WithoutFlags, replaced

FAULTS: dict[str, Callable[[int], Counting]] = {
    "EIO": lambda k: Failing(k, errno.EIO),
    "EIO from there on": lambda k: Failing(k, errno.EIO, lasting=True),
    "ENOSPC": lambda k: Failing(k, errno.ENOSPC),
    "a full disk": Full,
    "EACCES": lambda k: Failing(k, errno.EACCES),
    "EINTR": lambda k: Failing(k, errno.EINTR),
    "a short call": Short,
}
ALL = ("a folder", "a single file", "over a folder in two steps")  # the jobs of which every fault is tried
CASES = [(job, fault) for job in JOBS for fault in FAULTS if job in ALL or fault == "EIO"]
CASES.append(("over a file in two steps", "EIO from there on"))


@pytest.mark.parametrize(("name", "fault"), CASES)
def test_whatever_call_fails_the_output_is_whole_or_not_there_and_the_same_command_then_makes_it(
    name: str, fault: str, here: Path, clean: Callable[[str], Clean]
) -> None:
    expected = clean(name)
    inputs = contents(*map(Path, INPUTS))
    outcomes = []
    for k in range(1, 10 * expected.calls.made):
        prepare(expected)
        descriptors = len(os.listdir("/proc/self/fd"))
        with replaced(FAULTS[fault](k)) as calls:
            if not expected.job.flags:
                calls.real = WithoutFlags()
            outcome = taskvec(*expected.job.arguments)
        where = f"call {k}: {outcome}"
        assert len(os.listdir("/proc/self/fd")) == descriptors, where
        assert contents(*map(Path, INPUTS)) == inputs, where
        _check(outcome, expected, where)
        assert outcome.code == 1 or fault == "EINTR" or not any(map(fatal, calls.failed)), f"{where}: {calls.failed}"
        if outcome.code != 0:
            _run_again(outcome, expected, where)
        outcomes.append(outcome.code)
        if calls.made < k:
            break
    else:
        pytest.fail("the run never got through")
    assert len(outcomes) > expected.calls.made >= 50
    assert outcomes[-1] == 0
    if fault in ("EINTR", "a short call"):
        assert not any(outcomes)  # neither is a failure
    else:
        assert outcomes.count(1) > len(outcomes) / 2


def fatal(failed: str) -> bool:
    """Whether no run may say success after this call has failed: something may be missing on the disk."""
    call, path = failed.split(" ", 1)
    return call in ("pwrite", "fsync", "mkdir") or (call == "close" and "/output/" in path)


def prepare(expected: Clean) -> None:
    """The folder as it was before the job."""
    output = Path(expected.job.output)
    shutil.rmtree(output, ignore_errors=True)
    output.unlink(missing_ok=True)
    shutil.rmtree("new", ignore_errors=True)
    for path, content in expected.old.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)


def _check(outcome: Outcome, expected: Clean, where: str) -> None:
    present = contents(Path(expected.job.output))
    if "The old output is" in outcome.err:  # it could not be brought back; the next run will
        (replaced,) = (path / "replaced" for path in left_over(Path()))
        assert not present and not expected.job.flags and str(replaced) in outcome.err, where
        present = {path.replace(str(replaced), expected.job.output): held for path, held in contents(replaced).items()}
    if outcome.code == 0:
        assert present == expected.made and not left_over(Path()), where
        return
    assert outcome.code == 1 and outcome.out == "", where
    assert present in (expected.old, expected.made), where
    *told, line = outcome.err.splitlines()
    assert line.startswith("taskvec: ") and not any(word.startswith(("taskvec", "Trace", " ")) for word in told), where
    assert "TASKVEC_DEBUG" not in line, where  # that would be an error without a name
    assert str(Path.cwd()) not in line, where


def _run_again(outcome: Outcome, expected: Clean, where: str) -> None:
    """The same command, with nothing in its way."""
    again = taskvec(*expected.job.arguments)
    if again.code != 0:  # it failed after the output was there
        assert "exists already" in again.err and "is complete, but" in outcome.err, where
    assert contents(Path(expected.job.output)) == expected.made, where
    assert not left_over(Path()), where


def test_every_kind_of_call_goes_through_the_seam(clean: Callable[[str], Clean]) -> None:
    made = clean("a folder").calls.by_name + clean("over a folder in two steps").calls.by_name
    assert set(made) >= {
        "open", "close", "fstat", "preadv", "pwrite", "fsync", "fallocate", "mkdir", "listdir", "flock", "rename",
        "renameat2", "sync_file_range",
    }  # fmt: skip
