"""Runs that die: a small process that forks one per request, for a test process is too large to be forked often. It makes a
first run itself, so that those have nothing left to import.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from .job import Job, taskvec
from .seam import Killing, WithoutFlags, replaced


class Mortal:
    """Runs jobs in processes of their own, which die before their k-th system call."""

    def __enter__(self) -> Mortal:
        here = Path(__file__).parents[2]
        command = [sys.executable, "-m", f"{__package__}.mortal"]
        self._process = subprocess.Popen(command, cwd=here, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()

    def run(self, job: Job, folder: Path, k: int, log: Path) -> bool:
        """Whether the run died; else it has to have succeeded. With k = 0 it lives. `log`: what it changed (seam)."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"arguments": job.arguments, "flags": job.flags, "folder": str(folder), "k": k, "log": str(log)}
        print(json.dumps(request), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL)
        return code != 0


def _answer(request: dict[str, object]) -> int:
    if request["k"] == 0:
        return _run(request)
    child = os.fork()
    if child == 0:
        try:
            os._exit(_run(request))
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run(request: dict[str, object]) -> int:
    os.chdir(str(request["folder"]))
    log = os.open(str(request["log"]), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # the process ends with it
    with replaced(Killing(int(str(request["k"])), log)) as calls:
        if not request["flags"]:
            calls.real = WithoutFlags()
        return taskvec(*map(str, request["arguments"])).code  # type: ignore[call-overload]


if __name__ == "__main__":
    for line in sys.stdin:
        print(_answer(json.loads(line)), flush=True)
