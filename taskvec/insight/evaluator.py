"""An evaluator that is a command of its own, and the number that is taken from the JSON it writes."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..checkpoint.files import os_failure
from ..errors import OutputError, TaskvecError, UsageError, listing, show

_FIELDS = ("model", "alpha", "out", "i")
_LARGEST_JSON = 256 << 20  # bytes


@dataclass(frozen=True)
class Command:
    """A command line with {model}, {out}, {alpha} and {i} in it. It is cut into words as a shell would, before the fields are
    filled in, and run without one; with `shell` a shell runs it, and the fields come to it quoted."""

    line: str
    shell: bool = False

    def __post_init__(self) -> None:
        try:
            words = shlex.split(self.line)
        except ValueError as error:
            raise UsageError(f"--eval {show(self.line)!r}: {error}") from error
        for field in ("model", "out"):
            if not any(f"{{{field}}}" in word for word in words):
                raise UsageError(
                    f"--eval {show(self.line)!r} has no {{{field}}}",
                    hint="{model} is the folder to evaluate, {out} the folder for its results",
                )

    def words(self, fields: Mapping[str, str]) -> list[str] | str:
        """What is run: words, or with `shell` one line."""
        if self.shell:
            return _filled(self.line, {name: shlex.quote(value) for name, value in fields.items()})
        return [_filled(word, fields) for word in shlex.split(self.line)]

    def run(self, fields: Mapping[str, str], log: Path, what: str, held: Sequence[int] = ()) -> None:
        """Run it to its end; what it prints goes to `log`. Raises TaskvecError, in one line with the log's path, when it
        cannot be started or does not end with 0. Interrupted, it is ended with everything that it started; if this process
        is killed outright it runs on, and keeps the descriptors `held` open as long."""
        words = self.words(fields)
        with _new_log(log) as file:
            shown = words if isinstance(words, str) else shlex.join(words)
            file.write(f"$ {shown}\n".encode("utf-8", "backslashreplace"))
            file.flush()
            try:
                process = subprocess.Popen(
                    words, shell=self.shell, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True,
                    pass_fds=held,
                )  # fmt: skip
            except (OSError, ValueError) as error:
                reason = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                raise TaskvecError(f"the evaluator at {what} cannot be started: {show(reason)}", hint=see(log)) from error
            try:
                code = process.wait()
            except BaseException:
                _end(process)
                raise
        if code:
            ended = f"ended with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            raise TaskvecError(f"the evaluator at {what} {ended}", hint=see(log))


def newest_json(folder: Path, what: str, log: Path) -> tuple[Path, Any]:
    """The JSON file that was written last under `folder`, and what is in it. Raises TaskvecError if there is none."""
    found = [path for path in folder.rglob("*.json") if path.is_file()]
    if not found:
        raise TaskvecError(f"the evaluator at {what} wrote no .json file under {show(folder)}", hint=see(log))
    path = max(found, key=lambda path: (path.stat().st_mtime_ns, str(path)))
    try:
        return path, json_of(path)
    except (ValueError, RecursionError, OSError) as error:
        raise TaskvecError(f"{show(path)}: not JSON ({show(error)}), at {what}", hint=see(log)) from error


def json_of(path: Path) -> Any:
    """What is in a JSON file. Raises ValueError, RecursionError or OSError."""
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path.stat().st_size} bytes")
    return json.loads(path.read_bytes())


def check_pointer(option: str, pointer: str) -> None:
    """Raises UsageError for what is no JSON Pointer (RFC 6901, section 3)."""
    bare = pointer.replace("~0", "").replace("~1", "")
    if (pointer and not pointer.startswith("/")) or "~" in bare:
        raise UsageError(f"{option} {show(pointer)!r}, expected a JSON Pointer, as in '/results/task/acc,none'")


def number_at(content: Any, pointer: str, where: str) -> float:
    """The number that a JSON Pointer points to (RFC 6901, section 4); it may be inf or NaN. Raises TaskvecError otherwise,
    saying how far the pointer leads and what is there."""
    at, value = "", content
    for token in pointer.split("/")[1:]:
        key = token.replace("~1", "/").replace("~0", "~")
        if isinstance(value, Mapping) and key in value:
            value = value[key]
        elif isinstance(value, list) and _is_index(key) and int(key) < len(value):
            value = value[int(key)]
        else:
            there = listing(map(str, value)) if isinstance(value, Mapping) else f"a {type(value).__name__}"
            raise TaskvecError(f"{where}: nothing at {show(f'{at}/{token}')}", hint=f"There is {there or 'nothing'}")
        at += f"/{token}"
    if isinstance(value, bool) or not hasattr(value, "__float__") or isinstance(value, str):
        raise TaskvecError(f"{where}: found {show(repr(value))} at {show(pointer)!r}, expected a number")
    try:
        return float(value) + 0.0  # of -0 it makes 0
    except OverflowError:
        return math.inf


def _is_index(token: str) -> bool:
    return token.isascii() and token.isdigit() and len(token) < 10 and (token == "0" or token[0] != "0")


def _filled(text: str, fields: Mapping[str, str]) -> str:
    """{model} and the others filled in, in one pass: what is filled in is not looked at again. All other braces stay."""
    filled, rest = "", text
    while rest:
        name = next((name for name in _FIELDS if rest.startswith(f"{{{name}}}")), None)
        filled += rest[0] if name is None else fields[name]
        rest = rest[1 if name is None else len(name) + 2 :]
    return filled


def _new_log(path: Path) -> BinaryIO:
    try:
        return open(path, "wb")
    except OSError as error:
        raise os_failure(error, path, "cannot write the log there", OutputError) from error


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def see(log: Path) -> str:
    return f"What it printed is in {show(log)}"
