"""A folder with the inputs of the jobs, and what each job makes of them when nothing goes wrong."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from .job import INPUTS, JOBS, Job, contents, taskvec, working_in, write_inputs
from .seam import Counting, WithoutFlags, replaced


class Clean(NamedTuple):
    """A job that nothing disturbed: the output, the one that was there before, and how many system calls it took."""

    job: Job
    made: dict[str, bytes]
    old: dict[str, bytes]
    calls: Counting


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is such a place: what a flush of a busy disk costs would be paid a million times."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def here(scratch: Path) -> Iterator[Path]:
    """The working directory."""
    (scratch / "here").mkdir()
    write_inputs(scratch / "here")
    with working_in(scratch / "here"):
        yield scratch / "here"


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Clean]:
    """What a job makes, computed once."""
    known: dict[str, Clean] = {}

    def run(name: str) -> Clean:
        if name not in known:
            folder = tmp_path_factory.mktemp("clean")
            write_inputs(folder)
            with working_in(folder):
                known[name] = _run(JOBS[name])
        return known[name]

    return run


def _run(job: Job) -> Clean:
    inputs = contents(*map(Path, INPUTS))
    if job.before:
        assert taskvec(*job.before).code == 0
    old = contents(Path(job.output))
    with replaced(Counting()) as calls:
        if not job.flags:
            calls.real = WithoutFlags()
        assert taskvec(*job.arguments).code == 0
    made = contents(Path(job.output))
    assert made and made != old and contents(*map(Path, INPUTS)) == inputs
    return Clean(job, made, old, calls)
