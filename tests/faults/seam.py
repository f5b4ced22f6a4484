"""Stand-ins for `taskvec.checkpoint.system.calls`: the k-th system call of a run fails, is short, or is the last one."""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from taskvec.checkpoint import system

SHORTEST = 7  # bytes that a short call moves


class Counting:
    """Every call is counted, by name, and then made."""

    def __init__(self) -> None:
        self.real = system.Calls()
        self.made = 0
        self.by_name: Counter[str] = Counter()
        self.failed: list[str] = []  # what failed: the call, and the file it was made on if that is of the output
        self._outputs: dict[int, str] = {}

    def __getattr__(self, name: str) -> Callable[..., Any]:
        call = getattr(self.real, name)

        def counted(*arguments: Any) -> Any:
            self.made += 1
            self.by_name[name] += 1
            try:
                result = self.answer(name, call, *arguments)
            except OSError:
                self.failed.append(f"{name} {self._outputs.get(arguments[0], '')}" if arguments else name)
                raise
            if name == "open" and arguments[1] & os.O_CREAT:
                self._outputs[result] = os.fspath(arguments[0])
            elif name == "open":
                self._outputs.pop(result, None)
            return result

        return counted

    def answer(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        return call(*arguments)


class Failing(Counting):
    """Call number `k` fails; `lasting`: all from there on that could fail so."""

    def __init__(self, k: int, number: int, *, lasting: bool = False) -> None:
        super().__init__()
        self.k, self.number, self.lasting = k, number, lasting

    def answer(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if self.made == self.k or (self.lasting and self.made > self.k):
            if name == "close":
                call(*arguments)  # Linux closes the file whatever it answers
            raise OSError(self.number, os.strerror(self.number))
        return call(*arguments)


class Full(Counting):
    """From call number `k` on the disk is full."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def answer(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        grows = name in ("pwrite", "fallocate", "mkdir") or (name == "open" and arguments[1] & os.O_CREAT)
        if self.made >= self.k and grows:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return call(*arguments)


class Short(Counting):
    """Call number `k`, if it moves bytes, moves a few; `lasting`: every one from there on."""

    def __init__(self, k: int, *, lasting: bool = False) -> None:
        super().__init__()
        self.k, self.lasting = k, lasting

    def answer(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if self.made == self.k or (self.lasting and self.made > self.k):
            if name == "preadv":
                fd, buffers, offset = arguments
                return call(fd, [buffers[0][:SHORTEST]], offset)
            if name == "pwrite":
                fd, data, offset = arguments
                return call(fd, data[:SHORTEST], offset)
        return call(*arguments)


class Killing(Counting):
    """The process is dead before call number `k`. `log`: a file that is told of every call that changes something, as it
    was made, for what a power cut would leave of it."""

    def __init__(self, k: int, log: int | None = None) -> None:
        super().__init__()
        self.k, self.log = k, log
        self._paths: dict[int, str] = {}

    def answer(self, name: str, call: Callable[..., Any], *arguments: Any) -> Any:
        if self.made == self.k:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments)
        if self.log is not None:
            self._tell(name, result, arguments)
        return result

    def _tell(self, name: str, result: Any, arguments: tuple[Any, ...]) -> None:
        if name == "open":
            self._paths[result] = os.path.abspath(arguments[0])
            words = ["create", self._paths[result]] if arguments[1] & os.O_CREAT else []
        elif name in ("pwrite", "fsync"):
            words = [name, self._paths[arguments[0]]]
        elif name == "mkdir":
            words = [name, os.path.abspath(arguments[0])]
        elif name in ("rename", "renameat2"):
            words = [name, os.path.abspath(arguments[0]), os.path.abspath(arguments[1]), str((*arguments, 0)[2])]
        else:
            words = []
        if words:
            assert self.log is not None
            os.write(self.log, ("\t".join(words) + "\n").encode())


class WithoutFlags(system.Calls):
    """A file system that can neither exchange two names nor refuse to replace one."""

    def renameat2(self, source: system.Path, target: system.Path, flags: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


@contextmanager
def replaced(calls: Any) -> Iterator[Any]:
    """The seam with `calls` in it."""
    before, system.calls = system.calls, calls
    try:
        yield calls
    finally:
        system.calls = before
