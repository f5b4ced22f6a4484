from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that hypothesis may write over and over."""
    return tmp_path_factory.mktemp("scratch") / "m.safetensors"


@pytest.fixture
def watchdog() -> Iterator[None]:
    """Makes an open or read that blocks fail instead of hanging the whole run."""

    def bark(number: int, frame: object) -> None:
        raise AssertionError("blocked in a system call")

    before = signal.signal(signal.SIGALRM, bark)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


_NOT_FILES = {"fifo": _fifo, "device": _device, "folder": Path.mkdir, "socket": _socket, "dangling": _dangling, "loop": _loop}


@pytest.fixture(params=list(_NOT_FILES))
def not_a_file(request: pytest.FixtureRequest, watchdog: None) -> tuple[str, Callable[[Path], None]]:
    """Each kind of thing that is not a regular file: what it is called, and how to put one at a path."""
    return request.param, _NOT_FILES[request.param]


@pytest.fixture
def unprivileged() -> Callable[[], AbstractContextManager[None]]:
    """A block in which file permissions hold, also when the tests are run by root."""

    @contextmanager
    def block() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        try:
            os.seteuid(65534)
        except PermissionError:
            pytest.skip("root here cannot become another user")
        try:
            yield
        finally:
            os.seteuid(0)

    return block


@pytest.fixture
def open_descriptors() -> Callable[[], int]:
    return lambda: len(os.listdir("/proc/self/fd"))
