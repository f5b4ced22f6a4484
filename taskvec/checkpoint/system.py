"""The system calls of a run and nothing else: one seam, at which a test makes the k-th call fail, end the process or move
fewer bytes than asked. What a failure means is decided above (files.py, run/output.py), not here.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, Union

_LIBC = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD = -100
Result = TypeVar("Result")
Path = Union[str, "os.PathLike[str]"]


class Calls:
    """Every method is one system call and raises OSError. Offsets and sizes in bytes."""

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        return os.open(path, flags, mode)

    def close(self, fd: int) -> None:
        os.close(fd)

    def fstat(self, fd: int) -> os.stat_result:
        return os.fstat(fd)

    def preadv(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(fd, buffers, offset)

    def pwrite(self, fd: int, data: memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def flock(self, fd: int, operation: int) -> None:
        fcntl.flock(fd, operation)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def listdir(self, path: Path) -> list[str]:
        return os.listdir(path)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def renameat2(self, source: Path, target: Path, flags: int) -> None:
        """ENOSYS where the C library has no such call."""
        if not hasattr(_LIBC, "renameat2"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        _check(_LIBC.renameat2(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags), target)

    def fallocate(self, fd: int, size: int) -> None:
        """Linux's own, not posix_fallocate: where a file system cannot reserve, that one writes every block."""
        if not hasattr(_LIBC, "fallocate"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        _check(_LIBC.fallocate(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)))

    def sync_file_range(self, fd: int, offset: int, nbytes: int, flags: int) -> None:
        if hasattr(_LIBC, "sync_file_range"):
            _check(_LIBC.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(nbytes), flags))


calls: Any = Calls()


def again(call: Callable[..., Result], *arguments: object) -> Result:
    """The call, made again while a signal interrupts it (EINTR)."""
    while True:
        try:
            return call(*arguments)
        except InterruptedError:
            continue


def _check(result: int, path: Path | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path and os.fspath(path))
