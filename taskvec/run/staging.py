"""The output in the making: a hidden folder beside its name, which one rename turns into the output. A run that was ended
leaves it; the next run for the same output takes it over, and goes on with it or removes it.

    .OUT.taskvec-partial-1a2b3c4d/
        lock       held by the run as long as it lives; there from the start, for the folder gets its name last
        journal    what the run is, and which files are finished (journal.py)
        output/    what OUT will be, or the folder of the one file that it will be
        replaced   the old output, for the moment between two renames where one cannot exchange them
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ..checkpoint import files, system
from ..checkpoint.folder import SideFile
from ..errors import OutputError, OutputExistsError, SourceChangedError, counted, show, tell
from .journal import OUTPUT, Journal, RunIdentity, read
from .output import Target, foreign_files, leftovers, staging_prefix
from .plan import Plan

_COPIED = 1 << 20  # bytes per read when a side file is copied
_LOCK, _JOURNAL, _REPLACED = "lock", "journal", "replaced"
_NEW = ".new"  # behind the name of a folder whose lock is not taken yet
_STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_TRIES = 3  # to get a folder of one's own, when other runs start in the same moment


class Staging:
    """A folder beside the target that becomes it, as a context manager. What was not committed is removed, but for files
    that a journal knows as finished."""

    def __init__(
        self, target: Target, *, fsync: bool, overwrite: bool = False, run: tuple[Plan, RunIdentity] | None = None
    ) -> None:
        """`run`: what is made, if it may go on where an earlier one of the same identity was ended."""
        self._target = target
        self._fsync = fsync
        self._overwrite = overwrite
        self._run = run
        self._home = target.relative.parent
        self.journal: Journal | None = None
        self.notes: list[str] = []
        self._lock: int | None = None
        self._taken_over = self._brought_back = self._committed = False
        self._room = self._new_name()

    @property
    def path(self) -> Path:
        """The folder to write into."""
        return self._room / OUTPUT

    def _new_name(self) -> Path:
        return self._home / f"{staging_prefix(self._target)}{secrets.token_hex(4)}"

    def __enter__(self) -> Staging:
        """Raises OutputError when nothing can be made there, OutputExistsError when a run that lives is making it."""
        above = self._target.path.parent
        self._new_parents = [folder for folder in (above, *above.parents) if not folder.exists()]
        try:
            for folder in reversed(self._new_parents):
                with suppress(FileExistsError):
                    system.again(system.calls.mkdir, folder)
            self._replaced = _identity(self._target.path)
            self._settle()
            if not self._overwrite and os.path.lexists(self._target.path):
                raise self._appeared()
            self._open_journal()
        except BaseException as error:
            if not self._taken_over:
                shutil.rmtree(self._room, ignore_errors=True)
            self._release()
            if isinstance(error, OSError):
                raise files.os_failure(error, self._target.typed, "cannot create the output there", OutputError) from error
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if error is not None and self._committed:
            tell(error, f"{show(self._target.typed)} is complete, but a power cut may still undo its name")
        if error is None or (kept := self._kept(error)) is None:
            shutil.rmtree(self._room, ignore_errors=True)
        else:
            with suppress(OSError):
                _keep_only(self.path, set(self.journal.finished) if self.journal is not None else set())
            tell(error, f"{kept}; the same command goes on from there")
        self._release()

    def _kept(self, error: BaseException) -> str | None:
        """What of a run that failed is worth keeping, in words."""
        if self._committed:
            return None
        if os.path.lexists(self._room / _REPLACED):
            return f"The old output is {show(self._room / _REPLACED)}"
        finished = len(self.journal.finished) if self.journal is not None else 0
        if not finished or self._run is None or isinstance(error, (SourceChangedError, OutputExistsError)):
            return None
        return f"{finished} of {counted(len(self._run[0].shards), 'file')} finished and kept in {show(self._room)}"

    def _release(self) -> None:
        """Close the journal, and let other runs have the folder."""
        if self.journal is not None:
            with suppress(OutputError):
                self.journal.close()
        if self._lock is not None:
            files.unlock(self._lock)
            files.close_input(self._lock)
        self.journal = self._lock = None

    def write(self, name: str, content: bytes) -> None:
        """A small file of the output."""
        self._fill(name, lambda fd, path: files.write_all(fd, memoryview(content), 0, path=path))

    def copy(self, file: SideFile) -> None:
        """A side file, byte for byte (or its new content)."""
        if file.content is not None:
            self.write(file.name, file.content)
            return
        source = files.open_input(file.source)
        try:
            if (size := files.identity(source, file.source).size) != file.nbytes:
                raise SourceChangedError(
                    f"{show(file.source)}: changed during the run: found {size} bytes, expected {file.nbytes}",
                    hint="Leave the inputs alone and run again",
                )
            self._fill(file.name, lambda fd, path: _copy(source, file, fd, path))
        finally:
            files.close_input(source)

    def commit(self) -> None:
        """Flush the folders and rename: from here on the output is there, whole.

        Raises OutputExistsError when something appeared under that name meanwhile; nothing of it is touched.
        """
        if self._fsync:
            for folder in (path for path in (self.path, *self.path.rglob("*")) if path.is_dir()):
                files.sync_folder(folder)
        try:
            made = next(self.path.iterdir()) if self._target.single_file else self.path
            with uninterrupted():  # between the rename and the end of the old one there is no half-way
                if self._overwrite and self._replaced is not None and os.path.lexists(self._target.path):
                    self._exchange(made)
                else:
                    files.rename_new(made, self._target.path)
                self._committed = True
                shutil.rmtree(self._room, ignore_errors=True)
        except FileExistsError as error:
            raise self._appeared() from error
        except OSError as error:
            raise files.os_failure(error, self._target.typed, "cannot rename the finished output", OutputError) from error
        if self._fsync:
            for folder in (self._target.path.parent, *(parent.parent for parent in self._new_parents)):
                files.sync_folder(folder, named=self._target.typed)

    def _exchange(self, made: Path) -> None:
        """Swap with the output that was there at the start. One that is another by now, or holds other files, stays; one that
        another run put there in the last moment is put back: renames change times, but no inode."""
        found = _identity(self._target.path)
        if found is None or found != self._replaced or (self.path == made and foreign_files(self._target.relative)):
            raise self._appeared()
        old = files.rename_exchange(made, self._target.path, self._room / _REPLACED)
        if (put_there := _identity(old)) is None or put_there[:2] != found[:2]:
            files.rename_exchange(old, self._target.path, self._room / "unwanted")
            raise self._appeared()

    def _appeared(self) -> OutputExistsError:
        what = "was changed" if self._overwrite and self._replaced else "appeared"
        what = "was set aside by a run that was killed, and is back" if self._brought_back else f"{what} after this run began"
        return OutputExistsError(
            f"{show(self._target.typed)}: {what}; it is left as it is",
            hint="Name another output, or run again with --overwrite",
        )

    def _settle(self) -> None:
        """A folder of this run's own, taken over or new, and the lock in it. Of two runs that start in the same moment one
        may take the other's folder before it is locked; then that one starts over."""
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                self._take_over()
                if self._lock is None:
                    self._new_room()
                return
        raise self._living()

    def _take_over(self) -> None:
        """What runs that have ended left: the one that can be gone on with becomes this run's, the others go."""
        with ExitStack() as locks:
            for room in self._ended(locks):
                claimed = self._new_name()
                try:
                    system.again(system.calls.rename, room.path, claimed)  # one run can do it, and who still uses it sees it
                except FileNotFoundError:
                    continue
                self._restore(claimed)
                if self._lock is None and room.lock is not None and self._is_same_run(claimed):
                    self._room, self._lock = claimed, os.dup(room.lock)  # of the same lock
                    self._taken_over = True
                else:
                    shutil.rmtree(claimed, ignore_errors=True)

    def _ended(self, locks: ExitStack) -> list[_Ended]:
        """The folders whose runs have ended, locked until the block ends. Raises when one lives."""
        found = []
        for room in leftovers(self._target):
            try:
                lock = _open_lock(room)
            except FileNotFoundError:  # it is being removed, or was by half; a run that lives has one
                found.append(_Ended(room, None))
                continue
            except OSError:  # no folder of a run
                continue
            locks.callback(files.close_input, lock)
            taken = files.lock(lock)
            if taken is False:
                raise self._living()
            if taken:
                found.append(_Ended(room, lock))
            else:
                self.notes.append(f"{show(room)} is left alone: it may be of a run that lives, and there are no locks here")
        return found

    def _new_room(self) -> None:
        """FileNotFoundError when another run took it for one that has ended, before it was locked."""
        name = self._new_name()
        self._room = name.with_name(name.name + _NEW)
        system.again(system.calls.mkdir, self._room)
        lock = _open_lock(self._room, os.O_CREAT)
        try:
            if files.lock(lock) is False:
                raise FileNotFoundError(self._room)
            system.again(system.calls.mkdir, self.path)
            system.again(system.calls.rename, self._room, name)
        except BaseException:
            files.close_input(lock)
            raise
        self._room, self._lock = name, lock

    def _is_same_run(self, room: Path) -> bool:
        """Whether the run that left this folder was the one that is made now; if not, it is said what goes."""
        left = read(room / _JOURNAL)
        if self._run is None or left.identity == self._run[1]:
            return self._run is not None and _is_folder(room / OUTPUT)
        if left.identity is not None and left.finished:
            why = "its inputs changed since" if left.identity.job == self._run[1].job else "it was another one"
            self.notes.append(f"an interrupted run left {counted(len(left.finished), 'finished file')}, not used: {why}")
        return False

    def _restore(self, room: Path) -> None:
        """The old output, if a run ended while it swapped two names in two steps."""
        if os.path.lexists(room / _REPLACED) and not os.path.lexists(self._target.path):
            system.again(system.calls.rename, room / _REPLACED, self._target.path)
            self._replaced = _identity(self._target.path)
            self._brought_back = True

    def _open_journal(self) -> None:
        if self._run is None:
            return
        plan, identity = self._run
        path = self._room / _JOURNAL
        if not path.exists():
            self.journal = Journal.begin(path, identity, fsync=self._fsync)
        else:
            self.journal = Journal.resume(path, plan, self.path, fsync=self._fsync)
            with suppress(FileExistsError):
                system.again(system.calls.mkdir, self.path)
            _keep_only(self.path, set(self.journal.finished))
        if self._fsync:
            for folder in (self._room, self._home):
                files.sync_folder(folder)
        if kept := len(self.journal.finished):
            self.notes.append(f"{kept} of {counted(len(plan.shards), 'file')} taken from an interrupted run, and checked")

    def _living(self) -> OutputExistsError:
        return OutputExistsError(
            f"{show(self._target.typed)}: another run is making it", hint="Wait for it, or name another output"
        )

    def _fill(self, name: str, write: Callable[[int, Path], None]) -> None:
        path = self.path / name
        self._make_folders(path.parent)
        fd = files.create_output(path)
        try:
            write(fd, path)
            if self._fsync:
                files.sync(fd, path=path)
        except BaseException:
            files.close_input(fd)
            raise
        files.close_output(fd, path=path)

    def _make_folders(self, folder: Path) -> None:
        if not folder.exists():
            self._make_folders(folder.parent)
            try:
                system.again(system.calls.mkdir, folder)
            except OSError as error:
                raise files.os_failure(error, folder, "cannot create", OutputError) from error


class _Ended(NamedTuple):
    path: Path
    lock: int | None


def _open_lock(room: Path, create: int = 0) -> int:
    flags = os.O_RDWR | create | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd: int = system.again(system.calls.open, room / _LOCK, flags, 0o600)
    return fd


def _is_folder(path: Path) -> bool:
    """And no link to one."""
    return path.is_dir() and not path.is_symlink()


def _keep_only(folder: Path, names: set[str]) -> None:
    """Remove what is not one of these files."""
    for path in folder.iterdir() if _is_folder(folder) else ():
        if path.name not in names:
            if _is_folder(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int, int, int] | None:
    """Which file or folder this is, and when it was last changed; file systems give the inode of a removed one again."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP wait until the block is done. Python calls its handlers in the main thread, whichever thread
    gets the signal: so the handlers are set aside, and not the signals masked. In another thread this does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    waiting = [number for number in _STOPS if signal.getsignal(number) not in (None, signal.SIG_IGN)]
    before = {number: signal.signal(number, lambda number, frame: came.append(number)) for number in waiting}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _copy(source: int, file: SideFile, fd: int, path: Path) -> None:
    buffer = memoryview(bytearray(min(_COPIED, max(1, file.nbytes))))
    for at in range(0, file.nbytes, len(buffer)):
        part = buffer[: min(len(buffer), file.nbytes - at)]
        files.read_exact(source, part, at, path=file.source)
        files.write_all(fd, part, at, path=path)
