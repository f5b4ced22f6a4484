"""An input that is cut off, replaced or taken away while a run reads it: at every read, one line and no output."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from taskvec.checkpoint import system

from .conftest import Command, Told

RUN = ("subtract", "m.safetensors", "o.safetensors", "-a", "1", "-o", "out", "-j", "1", "-q")
TENSORS = ("first", "second", "third")
LARGE = (1 << 20) + 3  # elements of a tensor: several tiles


@pytest.fixture
def inputs(here: Path) -> Path:
    for name, fill in (("m", 2), ("o", 5)):
        save_file({tensor: np.full(LARGE, fill, "<f4") for tensor in TENSORS}, here / f"{name}.safetensors")
    return here


class Watched(system.Calls):
    """Calls as they are, and `act` before one read of the file."""

    def __init__(self, path: Path, when: int = -1, act: Callable[[Path], None] = lambda path: None) -> None:
        self.path, self.when, self.act = path, when, act
        self.reads = 0
        self.of_data = False  # what was being read when it happened

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if os.path.basename(os.readlink(f"/proc/self/fd/{fd}")) == self.path.name:
            if self.reads == self.when:
                self.of_data = offset > 8
                self.act(self.path)
            self.reads += 1
        return super().preadv(fd, buffers, offset)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def cut_off(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def replace(path: Path) -> None:
    """With a file of the same size and the same times, as a copy has them that was made with care."""
    status = path.stat()
    other = path.with_name("other")
    other.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


def write_over(path: Path) -> None:
    with open(path, "r+b") as out:
        out.seek(-4, os.SEEK_END)
        out.write(b"!!!!")


def grow(path: Path) -> None:
    with open(path, "ab") as out:
        out.write(b"more")


def take_away(path: Path) -> None:
    path.unlink()


def put_a_pipe_there(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


CHANGES = [empty, cut_off, write_over, grow]  # of the file that is open
EXCHANGES = [replace, take_away, put_a_pipe_there]  # of what the name stands for
MOMENTS = [
    *((name, when) for name in ("m.safetensors", "o.safetensors") for when in (2, 3, 5, 8)),  # reads before it happens
    *(("m.safetensors", when) for when in (0, 1)),  # its header; o is first looked at to see whether it is an adapter
]


@pytest.mark.parametrize("name", ["m.safetensors", "o.safetensors"])
def test_there_are_many_moments_to_choose_from(
    name: str, taskvec: Command, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(inputs / name)
    monkeypatch.setattr(system, "calls", watched)
    assert taskvec(*RUN).code == 0
    assert watched.reads > 8


@pytest.mark.parametrize(("name", "when"), MOMENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_while_it_is_read_makes_no_output(
    change: Callable[[Path], None], name: str, when: int, taskvec: Command, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(inputs / name, when, change)
    monkeypatch.setattr(system, "calls", watched)
    told = taskvec(*RUN, changing=name)
    assert watched.reads > when, "nothing was done"
    expect_one_line(told, name)
    if watched.of_data and "ends at byte" in told.err:
        assert any(f"tensor {tensor}" in told.err for tensor in TENSORS)
    assert not (inputs / "out").exists()


@pytest.mark.parametrize(("name", "when"), MOMENTS)
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_another_file_under_the_name_of_an_input_is_refused_or_never_looked_at(
    exchange: Callable[[Path], None], name: str, when: int, taskvec: Command, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is open already stays what it was; the two are never mixed."""
    watched = Watched(inputs / name, when, exchange)
    monkeypatch.setattr(system, "calls", watched)
    told = taskvec(*RUN, changing=name)
    assert watched.reads > when, "nothing was done"
    if told.code == 0:
        made = load_file(inputs / "out" / "model.safetensors")
        assert all((made[tensor] == -1).all() for tensor in TENSORS)
    else:
        expect_one_line(told, name)
        assert not (inputs / "out").exists()


def expect_one_line(told: Told, name: str) -> None:
    assert told.code == 1 and told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith(f"taskvec: {name}: ")
    assert any(words in line for words in ("changed during the run", "the file ends at byte", "cannot open", "not a regular"))
