"""Everything taskvec does with files, in one place above the system calls: short reads and writes, EINTR and Linux's cap of
2 GiB per call are handled here and nowhere else. Reads are `pread`, never mmap: a file truncated under the run is an
error here, not a SIGBUS.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import CheckpointError, OutputError, SourceChangedError, TaskvecError, show
from . import system

_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h: start, do not wait
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
_BLOCK = 4096  # bytes; what file systems share when they share
_FICLONERANGE = 0x4020940D  # linux/fs.h
_LARGEST_CALL = 1 << 30  # bytes; Linux moves at most 0x7ffff000 per call
_RANGED = 1 << 16  # bytes; so few are asked for by themselves, of a file that is not in its place yet
_MOST_OPEN = 32  # input descriptors kept open at once


# Tensors that are in memory are read as files are, under paths that no file has: path -> (buffer to fill, first byte).
IN_MEMORY: dict[Path, Callable[[memoryview, int], None]] = {}


class Remote(Protocol):
    """A repository whose files have their places in a local folder, but come there only when they are needed."""

    @property
    def sizes(self) -> Mapping[str, int]: ...

    @property
    def sha256(self) -> Mapping[str, str]: ...

    @property
    def cached_only(self) -> bool: ...

    def read(self, name: str, buffer: memoryview, offset: int) -> None: ...

    def fetch(self, names: Iterable[str]) -> None: ...


REMOTE: dict[Path, Remote] = {}  # folder -> the repository whose files belong there


def absent(path: Path) -> tuple[Remote, str] | None:
    """The repository that has the file, and its name there, if it is not in its place yet; else None."""
    if not REMOTE or os.path.exists(path):
        return None
    for folder in path.parents:
        if folder in REMOTE:
            name = path.relative_to(folder).as_posix()
            return (REMOTE[folder], name) if name in REMOTE[folder].sizes else None
    return None


def remote_above(path: Path) -> tuple[Remote, str] | None:
    """The repository that a file or folder is of, here or not, and its name there."""
    for folder in (path, *path.parents) if REMOTE else ():
        if folder in REMOTE:
            return REMOTE[folder], path.relative_to(folder).as_posix().removeprefix(".")
    return None


def exists(path: Path) -> bool:
    """Whether there is such a file or folder, or the repository it would come from has it."""
    return os.path.exists(path) or absent(path) is not None or is_folder(path)


def is_folder(path: Path) -> bool:
    """As `exists`, of folders."""
    return os.path.isdir(path) or bool(_names_below(path))


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, or would come there, in the order of the names."""
    local = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted({*local, *(name.partition("/")[0] for name in _names_below(folder))})


def size_of(path: Path) -> int:
    """Bytes of a file, in its place or not."""
    found = absent(path)
    return os.stat(path).st_size if found is None else found[0].sizes[found[1]]


def fetch(paths: Iterable[Path]) -> None:
    """Bring those files into their places that are not there yet."""
    wanted: dict[int, tuple[Remote, list[str]]] = {}
    for found in filter(None, map(absent, paths)):
        wanted.setdefault(id(found[0]), (found[0], []))[1].append(found[1])
    for remote, names in wanted.values():
        remote.fetch(names)


def _names_below(folder: Path) -> list[str]:
    for above in (folder, *folder.parents) if REMOTE else ():
        if above in REMOTE:
            prefix = "" if above == folder else folder.relative_to(above).as_posix() + "/"
            return [name[len(prefix) :] for name in REMOTE[above].sizes if name.startswith(prefix)]
    return []


def fill(buffer: memoryview, content: bytes, *, path: Path) -> None:
    """Copy what was read into `buffer`. Raises CheckpointError if it is another number of bytes."""
    if len(content) != len(buffer):
        raise CheckpointError(f"{show(path)}: {len(content)} bytes came, expected {len(buffer)}", hint="Run it again")
    buffer[:] = content


class FileIdentity(NamedTuple):
    """What must not change while a run reads a file: size in bytes, mtime in ns, inode. A file that is not in its place yet
    has neither of the last two; it is pinned by its commit."""

    size: int
    mtime_ns: int
    inode: int


def open_input(path: Path, *, follow: bool = True) -> int:
    """A read-only descriptor of a regular file. O_NONBLOCK so that a FIFO cannot hang the open; it is refused after.
    `follow`: also where a link leads."""
    fetch([path])
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    try:
        fd: int = system.again(system.calls.open, path, flags)
    except OSError as error:
        raise os_failure(error, path, "cannot open") from error
    try:
        if not stat.S_ISREG(_status(fd, path).st_mode):
            raise CheckpointError(f"{show(path)}: not a regular file", hint="Name a .safetensors file or a model folder")
    except CheckpointError:
        close_input(fd)
        raise
    return fd


def close_input(fd: int) -> None:
    """What was read was read: nothing that goes wrong here matters."""
    with suppress(OSError):
        system.calls.close(fd)


def _status(fd: int, path: Path) -> os.stat_result:
    try:
        status: os.stat_result = system.again(system.calls.fstat, fd)
        return status
    except OSError as error:
        raise os_failure(error, path, "cannot read") from error


def os_failure(error: OSError, path: object, what: str, kind: type[TaskvecError] = CheckpointError) -> TaskvecError:
    """An OSError as one line: what was tried on which file, and the system's own words for why it failed."""
    words = error.strerror or str(error)
    hint = "Free space, or name an output on another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else None
    return kind(f"{show(path)}: {what}: {words}", hint=hint)


def identity(fd: int, path: Path) -> FileIdentity:
    status = _status(fd, path)
    return FileIdentity(status.st_size, status.st_mtime_ns, status.st_ino)


def read_exact(fd: int, buffer: memoryview, offset: int, *, path: Path, tensor: str = "") -> None:
    """Fill `buffer` from byte `offset` of the file, or raise naming file and tensor."""
    at, name = 0, f": tensor {show(tensor)}" if tensor else ""
    while at < len(buffer):
        try:
            got = system.again(system.calls.preadv, fd, [buffer[at : at + _LARGEST_CALL]], offset + at)
        except OSError as error:
            raise os_failure(error, path, f"cannot read{name}") from error
        if got == 0:
            end = min(offset + at, _status(fd, path).st_size)
            raise SourceChangedError(
                f"{show(path)}{name}: the file ends at byte {end}, expected bytes up to {offset + len(buffer)}",
                hint="It was truncated after it was opened; restore it and run again",
            )
        at += got


def read_bytes(path: Path, limit: int, *, follow: bool = True) -> bytes:
    """A whole small file (JSON and the like), refused above `limit` bytes. `follow`: as in `open_input`."""
    if absent(path) is not None and size_of(path) > limit:
        raise CheckpointError(f"{show(path)}: {size_of(path)} bytes, expected at most {limit}")
    fd = open_input(path, follow=follow)
    try:
        size = _status(fd, path).st_size
        if size > limit:
            raise CheckpointError(f"{show(path)}: {size} bytes, expected at most {limit}")
        content = bytearray(size)
        read_exact(fd, memoryview(content), 0, path=path)
        return bytes(content)
    finally:
        close_input(fd)


def create_output(path: Path) -> int:
    """A new file, never an existing one or a link; its mode follows the umask."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd: int = system.again(system.calls.open, path, flags, 0o666)
        return fd
    except OSError as error:
        raise os_failure(error, path, "cannot create", OutputError) from error


def open_to_change(path: Path) -> int:
    """A file of our own that is there, no link."""
    try:
        fd: int = system.again(system.calls.open, path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        return fd
    except OSError as error:
        raise os_failure(error, path, "cannot open", OutputError) from error


def close_output(fd: int, *, path: Path) -> None:
    """Some network file systems say only here that they could not keep what was written."""
    try:
        system.calls.close(fd)
    except InterruptedError:  # Linux has closed it
        return
    except OSError as error:
        raise os_failure(error, path, "cannot write", OutputError) from error


def write_all(fd: int, data: memoryview, offset: int, *, path: Path) -> None:
    """Write all of `data` at byte `offset`, however many calls that takes."""
    at = 0
    while at < len(data):
        try:
            at += system.again(system.calls.pwrite, fd, data[at : at + _LARGEST_CALL], offset + at)
        except OSError as error:
            raise os_failure(error, path, "cannot write", OutputError) from error


def share_range(source: int, target: int, start: int, offset: int, nbytes: int) -> tuple[int, int]:
    """Let `target` have the bytes from `start` of `source` at its byte `offset` without copying them (a reflink), where the
    file system can, and where both lie alike in their blocks.

    Returns the part that is shared now, as (begin, end) counted from `start`; the rest is the caller's to write.
    """
    edge = -start % _BLOCK
    whole = (nbytes - edge) // _BLOCK * _BLOCK
    if (start - offset) % _BLOCK or whole <= 0:
        return 0, 0
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, start + edge, whole, offset + edge))
    except OSError:  # not possible here; and what is wrong with either file, the plain way tells better
        return 0, 0
    return edge, edge + whole


def reserve(fd: int, size: int, *, path: Path) -> None:
    """Reserve `size` bytes now, so that a full disk is found before the work and not after it. Where a file system cannot
    reserve, nothing is: writing will tell."""
    if size == 0:
        return
    try:
        system.again(system.calls.fallocate, fd, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise os_failure(error, path, f"cannot reserve {size} bytes", OutputError) from error


def start_flush(fd: int, offset: int, nbytes: int) -> None:
    """Let the system begin to write this range to disk while the run goes on; the flush at the end then has less to wait for.
    A hint: where it is not known or fails, `sync` does it all, and tells."""
    with suppress(OSError):
        system.calls.sync_file_range(fd, offset, nbytes, _SYNC_FILE_RANGE_WRITE)


def sync(fd: int, *, path: Path | str) -> None:
    try:
        system.again(system.calls.fsync, fd)
    except OSError as error:
        raise os_failure(error, path, "cannot flush to disk", OutputError) from error


def rename_new(source: Path, target: Path) -> None:
    """Rename in one step, never over anything. Raises FileExistsError when `target` exists."""
    if _rename_flags(source, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    system.again(system.calls.rename, source, target)


def rename_exchange(source: Path, target: Path, aside: Path) -> Path:
    """Give `source` the name `target`, and return the name that what was there has now: in one step `source`, or where the
    system cannot do that, in two, `aside`. If the second fails it is brought back; killed between them, it is there.
    """
    if _rename_flags(source, target, _RENAME_EXCHANGE):
        return source
    system.again(system.calls.rename, target, aside)
    try:
        system.again(system.calls.rename, source, target)
    except OSError:
        system.again(system.calls.rename, aside, target)
        raise
    return aside


def _rename_flags(source: Path, target: Path, flags: int) -> bool:
    """renameat2; False where the system or the file system does not know the flags."""
    try:
        system.again(system.calls.renameat2, source, target, flags)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
            return False
        raise
    return True


def sync_folder(path: Path, *, named: Path | str | None = None) -> None:
    """The names in it. `named`: what messages say, if not the path."""
    try:
        fd = system.again(system.calls.open, path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise os_failure(error, named or path, "cannot flush to disk", OutputError) from error
    try:
        sync(fd, path=named or path)
    finally:
        close_input(fd)


def lock(fd: int) -> bool | None:
    """Take the file for this process until it closes it or ends, however it ends. False: another one has it; None: this file
    system has no locks."""
    try:
        system.again(system.calls.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def unlock(fd: int) -> None:
    """Before it is closed: a process that was forked meanwhile holds the descriptor too."""
    with suppress(OSError):
        system.calls.flock(fd, fcntl.LOCK_UN)


class InputFiles:
    """Input descriptors, opened when first read and closed when `_MOST_OPEN` others were used since. Thread-safe.

    `expected` pins what each file was when its header was read: a file that is another one by now is refused.
    """

    def __init__(self, expected: dict[Path, FileIdentity]) -> None:
        self._expected = expected
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._users: dict[Path, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def reading(self, path: Path) -> Iterator[int]:
        """The descriptor of `path`, which stays open at least until the block ends."""
        fd = self._acquire(path)
        try:
            yield fd
        finally:
            with self._lock:
                self._users[path] -= 1

    def read(self, path: Path, buffer: memoryview, offset: int, tensor: str) -> None:
        """Fill `buffer` from byte `offset` of the file on."""
        if path in IN_MEMORY:
            IN_MEMORY[path](buffer, offset)
            return
        remote = absent(path) if len(buffer) <= _RANGED else None
        if remote is not None:
            remote[0].read(remote[1], buffer, offset)
            return
        with self.reading(path) as fd:
            read_exact(fd, buffer, offset, path=path, tensor=tensor)

    def check_unchanged(self) -> None:
        """Raise SourceChangedError unless every file still is what it was when its header was read."""
        for path in self._expected:
            if absent(path) is not None:  # nothing of it was read
                continue
            with self.reading(path) as fd:
                self._check(path, fd)

    def close(self) -> None:
        with self._lock:
            while self._open:
                close_input(self._open.popitem()[1])

    def _acquire(self, path: Path) -> int:
        with self._lock:
            fd = self._open.get(path)
            if fd is None:
                self._close_idle()
                fd = self._open_checked(path)
                self._open[path] = fd
            self._open.move_to_end(path)
            self._users[path] = self._users.get(path, 0) + 1
            return fd

    def _open_checked(self, path: Path) -> int:
        fd = open_input(path)
        try:
            self._check(path, fd)
        except CheckpointError:
            close_input(fd)
            raise
        return fd

    def _close_idle(self) -> None:
        for path in [p for p in self._open if not self._users.get(p)]:
            if len(self._open) < _MOST_OPEN:
                return
            close_input(self._open.pop(path))

    def _check(self, path: Path, fd: int) -> None:
        found, expected = identity(fd, path), self._expected.get(path)
        if expected is not None and expected.inode == 0:
            expected = found._replace(size=expected.size)
        if expected is not None and found != expected:
            raise SourceChangedError(
                f"{show(path)}: changed during the run: found {found.size} bytes, expected {expected.size} bytes "
                "and the same modification time",
                hint="Leave the inputs alone and run again",
            )
