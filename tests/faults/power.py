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


def forget_names(log: Path) -> None:
    """Files, folders and renames that no flush of their folder followed are undone, the last one first."""
    logged = changes(log)
    for at, change in reversed(list(enumerate(logged))):
        if change.call not in ("create", "mkdir", "rename", "renameat2"):
            continue
        flushed = {later.path for later in logged[at:] if later.call == "fsync"}
        now = change.target or change.path
        if os.path.dirname(now) in flushed or not os.path.lexists(now):
            continue
        if change.call in ("create", "mkdir"):
            shutil.rmtree(now) if os.path.isdir(now) else os.unlink(now)
        elif change.flags == "2":  # an exchange
            os.rename(now, now + ".swap")
            os.rename(change.path, now) if os.path.lexists(change.path) else os.rename(now + ".swap", now)
            if os.path.lexists(now + ".swap"):
                os.rename(now + ".swap", change.path)
        elif os.path.isdir(os.path.dirname(change.path)):
            os.rename(now, change.path)


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


cut_power = (zero_unflushed, empty_unflushed, forget_names)
