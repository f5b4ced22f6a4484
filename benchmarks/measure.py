"""One command as a whole process: wall and CPU seconds, peak resident and peak anonymous memory of it (Linux)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

_POLL = 0.01  # seconds between two looks at /proc; VmHWM is the kernel's own peak, only RssAnon is sampled


class Sample(NamedTuple):
    """Seconds of one finished process and its children, and MB (1e6 bytes) of the process itself."""

    wall: float
    cpu: float
    resident: float
    anonymous: float


def measure(command: list[str], *, env: dict[str, str] | None = None, log: Path | None = None) -> Sample:
    """Run it, output to `log`. Raises RuntimeError with the log's end when it fails."""
    peaks = [0, 0]
    with open(log or os.devnull, "wb") as output:
        before = os.times()
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        watcher = threading.Thread(target=_watch, args=(process.pid, peaks), daemon=True)
        watcher.start()
        process.wait()
        wall = time.perf_counter() - started
        after = os.times()
    watcher.join()
    if process.returncode != 0:
        tail = log.read_text(errors="replace")[-600:] if log else ""
        raise RuntimeError(f"{command[0]} ended with {process.returncode}: {tail}")
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return Sample(wall, cpu, peaks[0] / 1000, peaks[1] / 1000)


def _watch(pid: int, peaks: list[int]) -> None:
    """VmHWM and the largest RssAnon seen, in kB, until the process is gone."""
    path = Path(f"/proc/{pid}/status")
    while True:
        try:
            status = path.read_text()
        except OSError:
            return
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                peaks[0] = max(peaks[0], int(line.split()[1]))
            elif line.startswith("RssAnon:"):
                peaks[1] = max(peaks[1], int(line.split()[1]))
        if "State:\tZ" in status:
            return
        time.sleep(_POLL)
