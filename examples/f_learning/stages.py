"""Restartable stages: a folder or a file that was made once, with what it was made from, is not made again."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

NOTE = "stage.json"  # beside the checkpoint's own files


def folder(
    out: Path,
    settings: dict[str, Any],
    inputs: list[Path],
    make: Callable[[Path], None],
    say: Callable[[str], None],
) -> Path:
    """`make` fills a folder that becomes `out`; skipped if `out` was made with these settings of these inputs.

    `say` is told what was made and how long it took.
    """
    note = {"settings": settings, "inputs": {path.name: _digest(path) for path in inputs}}
    known = out / NOTE
    if out.exists() and not known.exists():
        raise SystemExit(f"{out}: exists, and is no stage of this example; choose another --out")
    if known.exists() and json.loads(known.read_text()) == note:
        return out
    staging = out.with_name(out.name + ".part")
    shutil.rmtree(staging, ignore_errors=True)
    staging.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    make(staging)
    (staging / NOTE).write_text(json.dumps(note, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    say(f"{out.parent.name}/{out.name}  {time.monotonic() - started:.1f} s")
    return out


def described(source: Path) -> dict[str, Any]:
    """What tells an input that is no stage from another one of its name: the digest of a file; of a folder, the sizes and
    times of its files, since a model takes long to read."""
    if source.is_file():
        return {"name": source.name, "sha256": hashlib.sha256(source.read_bytes()).hexdigest()}
    files = {path.relative_to(source).as_posix(): path.stat() for path in sorted(source.rglob("*")) if path.is_file()}
    return {"name": source.name, "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in files.items()}}


def _digest(stage: Path) -> str:
    """Of how a stage was made, which through its own inputs is all of how it came about."""
    return hashlib.sha256((stage / NOTE).read_bytes()).hexdigest()[:16]
