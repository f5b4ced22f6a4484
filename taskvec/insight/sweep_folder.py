"""The folder of a sweep: a line of `sweep.jsonl` for every evaluation that was finished, so that none is done twice; its
picture; results and logs, a folder and a file of their own for every run of the evaluator; and, while it lasts, a hidden
folder for what is large. Nothing else in it is ever written or removed.
"""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from ..checkpoint.checkpoint import Checkpoint
from ..checkpoint.files import os_failure
from ..errors import OutputError, OutputExistsError, show
from ..run.output import Target, check_target

LINES = "sweep.jsonl"
_SCRATCH = re.compile(r"\.sweep-[0-9a-f]{16}")


class Kept(NamedTuple):
    """A finished evaluation: the JSON file it wrote, and how many seconds it took, with the making of the model."""

    result: Path
    seconds: float


class SweepFolder:
    """As a context manager: made if it is missing, and locked against another sweep.

    Args:
        key: pins what is evaluated, and by what; without one nothing that is there is taken for known.
        about: what the lines say of that, for people.
        inputs: where nothing may be made or removed.
    """

    def __init__(
        self, path: Path, key: str | None, about: Mapping[str, Any] | None = None, inputs: Iterable[Checkpoint] = ()
    ) -> None:
        self.path = path
        self._key = key
        self._about = dict(about or {})
        self._inputs = list(inputs)
        self._known: dict[tuple[float, int | None], Kept] = {}
        self._scratch: Path | None = None
        self.fd = -1  # of the lock, which an evaluator inherits: one that outlives a killed sweep keeps the folder

    def __enter__(self) -> SweepFolder:
        """Raises OutputExistsError for a folder with other things in it, OutputOverlapError for one in an input, OutputError
        when it cannot be made, or another sweep or its evaluator is using it."""
        self._check_overlap(self.path / ".sweep")
        if os.path.lexists(self.path) and not (self.path / LINES).is_file() and not _is_empty(self.path):
            raise OutputExistsError(
                f"{show(self.path)}: exists already, and holds no sweep (no {LINES} in it)", hint="Name another output"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(self.path / LINES, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise os_failure(error, self.path, "cannot keep a sweep there", OutputError) from error
        try:
            self._lock()
            self._remove_left(self._read())
        except BaseException:
            os.close(self.fd)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
        fcntl.flock(self.fd, fcntl.LOCK_UN)  # closing would not: an evaluator may have left a server running on purpose
        os.close(self.fd)

    def known(self, alpha: float, seed: int | None) -> Kept | None:
        """The last finished evaluation; `seed` is that of the random vector, None for the true one."""
        return self._known.get((alpha, seed))

    def add(self, alpha: float, seed: int | None, seconds: float, metrics: Mapping[str, float], result: Path | None) -> None:
        """A finished evaluation, on disk before this returns. `metrics`: JSON Pointer -> number, for people: what is known
        is read from `result` again."""
        written = {pointer: _written(number) for pointer, number in metrics.items()}
        where = None if result is None else result.relative_to(self.path).as_posix()
        line = {"alpha": alpha, "random": seed is not None, "seed": seed, "seconds": seconds, "metrics": written}
        self._append({**line, **self._about, "result": where, "key": self._key})

    def places(self, name: str) -> tuple[Path, Path]:
        """A new, empty folder for results, and the path of the log beside it. Never those of an earlier run: what that one
        left running cannot write into them."""
        results, logs = (self.path / kind / str(self._key)[:12] for kind in ("results", "logs"))
        try:
            for folder in (results, logs):
                folder.mkdir(parents=True, exist_ok=True)
            for number in count(1):
                run = name if number == 1 else f"{name}-{number}"
                if not os.path.lexists(logs / f"{run}.log"):
                    with suppress(FileExistsError):
                        (results / run).mkdir()
                        break
        except OSError as error:
            raise OutputError(
                f"{show(error.filename)}: cannot make this folder: {error.strerror}",
                hint="Move away what is in its place, or name another output",
            ) from error
        return results / run, logs / f"{run}.log"

    def scratch(self) -> Path:
        """A folder for what is gone when the sweep ends. Its name is in the lines first, so that the next sweep removes what
        a killed one left, and nothing that no sweep made."""
        if self._scratch is None:
            path = self.path / f".sweep-{secrets.token_hex(8)}"
            self._append({"scratch": path.name})
            try:
                path.mkdir()
            except OSError as error:
                raise os_failure(error, path, "cannot make a folder there", OutputError) from error
            self._scratch = path
        return self._scratch

    def write(self, name: str, content: str) -> None:
        """A small file, whole or not at all."""
        partial = self.path / f".{name}.partial"
        try:
            partial.write_text(content, encoding="utf-8")
            os.replace(partial, self.path / name)
        except OSError as error:
            raise os_failure(error, self.path / name, "cannot write", OutputError) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            users = ", ".join(map(str, _users(self.path / LINES)))
            raise OutputError(
                f"{show(self.path)}: another sweep is using it, or an evaluator that a killed sweep left running"
                + (f" (process {users})" if users else ""),
                hint="Wait until it ends, or end it; or name another output",
            ) from error
        except OSError as error:
            raise os_failure(error, self.path, "cannot be locked against another sweep", OutputError) from error

    def _read(self) -> list[str]:
        """Take what is known of this key, and return the names of scratch folders. A line that a killed run left unfinished
        is none; the next begins after it."""
        content, left = (self.path / LINES).read_bytes(), []
        if content and not content.endswith(b"\n"):
            os.write(self.fd, b"\n")
        for line in content.splitlines():
            try:
                held = json.loads(line)
                if "scratch" in held:
                    left.append(str(held["scratch"]))
                elif self._key is not None and held["key"] == self._key:
                    kept = Kept(self.path / held["result"], float(held["seconds"]))
                    self._known[float(held["alpha"]), held["seed"]] = kept
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
        return left

    def _remove_left(self, names: Iterable[str]) -> None:
        for path in (self.path / name for name in names if _SCRATCH.fullmatch(name)):
            if path.is_dir() and not path.is_symlink():
                self._check_overlap(path)
                shutil.rmtree(path, ignore_errors=True)

    def _check_overlap(self, path: Path) -> None:
        with suppress(OutputExistsError):  # that it is there is no obstacle
            check_target(Target.of(path), self._inputs, overwrite=False)

    def _append(self, line: dict[str, Any]) -> None:
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
        try:
            if os.write(self.fd, data) != len(data):
                raise OSError("not all of a line could be written")
            os.fsync(self.fd)
        except OSError as error:
            raise os_failure(error, self.path / LINES, "cannot write", OutputError) from error


def _written(number: float) -> float | str:
    """JSON has no inf and no nan: they are written as text."""
    return number if math.isfinite(number) else str(number)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not os.listdir(path)


def _users(path: Path) -> list[int]:
    """The processes that have the file open, as far as /proc tells; this one left out."""
    wanted, found = os.stat(path), set()
    for link in glob.iglob("/proc/[0-9]*/fd/*"):
        with suppress(OSError):
            if os.path.samestat(os.stat(link), wanted):
                found.add(int(link.split("/")[2]))
    return sorted(found - {os.getpid()})
