"""What a power cut may leave of a run: every system call that changed something was logged (seam.Killing), and what was not
flushed by the time is undone. No file system is as forgetful as all of this; each of it is what one may do.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple


class Change(NamedTuple):
    """A logged call: its name and the paths it was made on."""

    call: str
    path: str
    target: str = ""
    flags: str = ""


def changes(log: Path) -> list[Change]:
    return [Change(*line.split("\t")) for line in log.read_text().splitlines()]


def zero_unflushed(log: Path) -> None:
    """The sizes of files are there, and zeros in place of what was written and not flushed."""
    for path in _unflushed_content(changes(log)):
        with open(path, "r+b") as file:
            file.write(bytes(os.path.getsize(path)))


def empty_unflushed(log: Path) -> None:
    """Files are there, and nothing in those that were not flushed."""
    for path in _unflushed_content(changes(log)):
        os.truncate(path, 0)


def forget_new_names(log: Path) -> None:
    """Files and folders are not in their folders, if those were not flushed since; wherever the folders are by now."""
    logged = changes(log)
    for at, change in enumerate(logged):
        if change.call in ("create", "mkdir") and not _flushed(os.path.dirname(change.path), logged[at:]):
            _remove(_now(change.path, logged[at:]))


def forget_renames(log: Path) -> None:
    """Renames are undone, the last one first, if the folder was not flushed since."""
    logged = changes(log)
    for at, change in reversed(list(enumerate(logged))):
        if change.call in ("rename", "renameat2") and not _flushed(os.path.dirname(change.target), logged[at:]):
            _undo(change)


def _flushed(folder: str, later: list[Change]) -> bool:
    """Whether a folder was flushed, under whatever name it had then."""
    return any(c.call == "fsync" and c.path == _now(folder, later[:at]) for at, c in enumerate(later))


def _now(path: str, later: list[Change]) -> str:
    for change in later:
        if change.call in ("rename", "renameat2"):
            path = _moved(path, change)
    return path


def _undo(change: Change) -> None:
    """As far as there is still something to undo: of two names that were exchanged the run has removed one."""
    if not os.path.lexists(change.target):
        return
    if change.flags != "2":
        os.makedirs(os.path.dirname(change.path), exist_ok=True)  # its removal is undone too
        os.rename(change.target, change.path)
    elif os.path.lexists(change.path):
        os.rename(change.target, swap := change.target + ".swap")
        os.rename(change.path, change.target)
        os.rename(swap, change.path)


def _remove(path: str) -> None:
    if os.path.isdir(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _unflushed_content(logged: list[Change]) -> list[str]:
    """Files that were written to after their last flush, by the names they have now."""
    dirty: set[str] = set()
    for change in logged:
        if change.call == "pwrite":
            dirty.add(change.path)
        elif change.call == "fsync":
            dirty.discard(change.path)
        elif change.call in ("rename", "renameat2"):
            dirty = {_moved(path, change) for path in dirty}
    return [path for path in dirty if os.path.exists(path)]


def _moved(path: str, change: Change) -> str:
    for old, new in ((change.path, change.target), (change.target, change.path)):
        if path == old or path.startswith(old + os.sep):
            return new + path[len(old) :]
    return path


cut_power = (zero_unflushed, empty_unflushed, forget_new_names, forget_renames)
