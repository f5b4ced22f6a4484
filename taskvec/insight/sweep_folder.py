"""The folder of a sweep: a line of `sweep.jsonl` for every trial that was finished, so that none is done twice; its picture;
and, beside them, what others put there: logs and results of a command."""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from ..checkpoint.files import os_failure
from ..errors import OutputError, OutputExistsError, show

LINES = "sweep.jsonl"


class SweepFolder:
    """As a context manager: made if it is missing, and locked against another sweep. `key` pins what the trials are of;
    without one nothing that is there is taken for known."""

    def __init__(self, path: Path, key: str | None) -> None:
        self.path = path
        self._key = key
        self._known: dict[tuple[float, int | None], dict[str, Any]] = {}
        self._fd = -1

    def __enter__(self) -> SweepFolder:
        """Raises OutputExistsError for a folder with other things in it, OutputError when it cannot be made or another
        sweep is using it."""
        if os.path.lexists(self.path) and not (self.path / LINES).is_file() and not _is_empty(self.path):
            raise OutputExistsError(
                f"{show(self.path)}: exists already, and holds no sweep (no {LINES} in it)", hint="Name another output"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self.path / LINES, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise os_failure(error, self.path, "cannot keep a sweep there", OutputError) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._fd)
            raise OutputError(f"{show(self.path)}: another sweep is using it", hint="Name another output") from error
        self._read()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def known(self, alpha: float, seed: int | None) -> dict[str, Any] | None:
        """target, control and seconds of a finished trial; `seed` is that of the random vector, None for the true one."""
        return self._known.get((alpha, seed))

    def add(self, alpha: float, seed: int | None, target: float, control: float | None, seconds: float) -> None:
        """A finished trial, on disk before this returns."""
        numbers = {"target": _written(target), "control": None if control is None else _written(control)}
        line = {"alpha": alpha, **numbers, "seconds": seconds, "random": seed is not None, "seed": seed, "key": self._key}
        os.write(self._fd, (json.dumps(line) + "\n").encode())
        os.fsync(self._fd)

    def write(self, name: str, content: str) -> None:
        """A small file, whole or not at all."""
        partial = self.path / f".{name}.partial"
        partial.write_text(content, encoding="utf-8")
        os.replace(partial, self.path / name)

    def _read(self) -> None:
        """The trials of this key. A line that a killed run left unfinished is no trial; the next begins after it."""
        content = (self.path / LINES).read_bytes()
        if content and not content.endswith(b"\n"):
            os.write(self._fd, b"\n")
        for line in content.splitlines():
            try:
                held = json.loads(line)
                place = (float(held["alpha"]), held["seed"])
                numbers = {"target": float(held["target"]), "seconds": float(held["seconds"])}
                control = None if held["control"] is None else float(held["control"])
                own = self._key is not None and held["key"] == self._key
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if own:
                self._known[place] = {**numbers, "control": control}


def _written(number: float) -> float | str:
    """JSON has no inf and no nan: they are written as text, and read back as they were."""
    return number if math.isfinite(number) else str(number)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not os.listdir(path)
