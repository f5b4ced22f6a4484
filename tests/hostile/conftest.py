"""A folder of good inputs, and a runner that holds every command to what is promised of all inputs, hostile ones too."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from taskvec.cli.main import _run

from ..cli.conftest import write_adapter, write_base
from . import good

LONGEST = 60  # seconds by the clock, of a machine that may be busy
MOST_WORK = 20  # seconds of computing, where nothing takes one by itself
MOST_MEMORY = 700 << 10  # KiB more than before, at the worst moment
MOST_TOLD = 3000  # characters of an error


class Told(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Told]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with `base` (two shards) and `lora` as the tests of the command line have them, and two small
    models that fit each other, `model.safetensors` and `old.safetensors`."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    write_adapter(tmp_path / "lora")
    good.write(tmp_path)
    return tmp_path


@pytest.fixture
def taskvec(here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in this process. It must end in bounded time and memory, whatever it was given, and leave alone what
    was there, but for `changing`, which the test itself changes meanwhile."""

    def run(*arguments: str, changing: str | None = None) -> Told:
        monkeypatch.setattr(sys, "argv", ["taskvec", *arguments])
        before, memory, work = everything(here), _peak(), time.process_time()
        with within(LONGEST):
            code = _run()
        assert time.process_time() - work < MOST_WORK
        assert _peak() - memory < MOST_MEMORY, f"{_peak() - memory} KiB"
        after = everything(here)
        assert all(after.get(path) == was for path, was in before.items() if path != changing), "an input was changed"
        return Told(code, *capfd.readouterr())

    return run


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer, so that a hang is a failure and not the end of the test run."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def everything(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Every file, folder, link and pipe below: mode, size, modification time, and of a small file its bytes."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            small = path.is_file() and not path.is_symlink() and status.st_size < 1 << 20
            content = path.read_bytes() if small else b""
            found[str(path.relative_to(root))] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
